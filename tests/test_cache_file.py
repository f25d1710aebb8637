"""Caches in files: as they were, in another process too; what does not fit is refused by name."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

import squat_fx
from squat_fx import QuantizedKV, cache_file
from squat_fx.codecs import CODECS, Kivi
from tests.conftest import left_padding, randn, stored_format
from tests.models import build, prompt
from tests.uses import generate, prefilled, steps, tiny

OPTIONS: dict[str, Any] = {"inner": "eager", "residual_length": 8}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.safetensors"


def packed(codec: Any = None, tokens: int = 90, **options: Any) -> QuantizedKV:
    """Keys of two rows, one of them padded."""
    fmt = stored_format(codec, head_dim=32, **options)
    return QuantizedKV.from_dense(randn(2, 3, tokens, 32), fmt, "key", left_padding([0, 9], tokens))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda arenas, state: arenas.update(qdata=arenas["qdata"][:, :, :-8]), "have room for"),
        (lambda arenas, state: state.update(length=10**6, watermark=10**6), "have room for"),
        (lambda arenas, state: arenas["start"].fill_(-10), "begin at -10 to -10"),
        (lambda arenas, state: arenas["start"].fill_(1000), "begin at 1000 to 1000"),
        (lambda arenas, state: state.update(first=90), "a window begins at 90 of 90 tokens"),
        (
            lambda arenas, state: arenas.update(scale=arenas["scale"].float()),
            r"arena scale of layout 'planes/token' is torch.float32 .*, not torch.float16",
        ),
        (lambda arenas, state: arenas.update(dense=arenas["dense"][:1]), "the arena .* is "),
    ],
)
def test_arenas_that_do_not_fit_are_refused(change: Any, text: str) -> None:
    """A kernel would read beyond them."""
    arenas, state = packed(CODECS["squat"]()).to_state()
    QuantizedKV.from_state(arenas, state)
    change(arenas, state)
    with pytest.raises(ValueError, match=text):
        QuantizedKV.from_state(arenas, state)


# what comes back ----------------------------------------------------------------------------------

PROGRAM = """
import sys, torch, squat_fx
from tests.models import prompt
from tests.uses import generate, tiny
model = squat_fx.compile(tiny(), bits=2, inner="eager", residual_length=8)
cache = squat_fx.load_cache(sys.argv[1], model)
ids = torch.cat([prompt(2, 150), prompt(2, 5, seed=3)], 1)
print(generate(model, ids, past_key_values=cache).tolist())
"""


def test_another_process_goes_on_with_equal_tokens(path: Path) -> None:
    model = squat_fx.compile(tiny(), bits=2, **OPTIONS)
    prefix = prompt(2, 150)
    cache = prefilled(model, prefix)
    squat_fx.save_cache(path, cache, model)
    used = squat_fx.cache_bytes(cache).dense
    assert path.stat().st_size < used / 2
    ids = torch.cat([prefix, prompt(2, 5, seed=3)], 1)
    expected = generate(model, ids, past_key_values=cache)
    command = [sys.executable, "-c", PROGRAM, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == expected.tolist()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_cache_of_transformers_is_rebuilt(family: str, path: Path) -> None:
    """Sliding windows and their counters among it; the layers stay independent."""
    model = squat_fx.compile(build(family), bits=2, **OPTIONS)
    cache = prefilled(model, prompt(2, 60))
    squat_fx.save_cache(path, cache, model)
    loaded = squat_fx.load_cache(path, model)
    assert type(loaded) is type(cache)
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in cache.layers]
    assert loaded.get_seq_length() == 60
    assert torch.equal(steps(model, loaded, 2), steps(model, cache, 2))


def test_nested_containers_of_packed_and_dense_tensors(path: Path) -> None:
    key, dense = packed(), randn(2, 3, 4).bfloat16()
    cache = {"layers": [(key, dense), (None, 2.5)], 7: {"key": key, "empty": torch.zeros(0, 3)}}
    squat_fx.save_cache(path, cache)
    loaded = squat_fx.load_cache(path)
    (first, second), others = loaded["layers"][0], loaded[7]
    assert torch.equal(first.dequantize(), key.dequantize())
    assert torch.equal(second, dense)
    assert loaded["layers"][1] == (None, 2.5)
    assert others["key"] is first, "what was one tensor is one again"
    assert others["empty"].shape == (0, 3)


@pytest.mark.parametrize("codec", CODECS)
def test_every_stored_layout_comes_back_bit_for_bit(codec: str, path: Path) -> None:
    key = packed(CODECS[codec](), tokens=300, bits=3.875 if codec == "polar" else 2)
    new = randn(2, 3, 50, 32, seed=5)
    squat_fx.save_cache(path, [key])
    (loaded,) = squat_fx.load_cache(path)
    assert loaded.format == key.format
    assert torch.equal(loaded.dequantize(), key.dequantize())
    both = [torch.cat([x, new], 2).clone().dequantize() for x in (key, loaded)]
    assert torch.equal(*both)


def test_only_what_is_used_is_written(path: Path) -> None:
    key = packed(Kivi(), tokens=40)
    squat_fx.save_cache(path, [key])
    assert path.stat().st_size < 0.7 * key.storage_nbytes
    assert key.shape[2] == 40


def test_tokens_that_wait_and_cropped_ones(path: Path) -> None:
    key = packed()
    grown, cropped = torch.cat([key, randn(2, 3, 5, 32, seed=2)], 2), copy.deepcopy(key)[:, :, :70]
    expected = grown.dequantize(), cropped.dequantize()
    squat_fx.save_cache(path, [grown, cropped])
    for loaded, numbers in zip(squat_fx.load_cache(path), expected, strict=True):
        assert torch.equal(loaded.dequantize(), numbers)


def test_a_window_and_tokens_before_heads(path: Path) -> None:
    """What has left a window is not kept, and where it began is."""
    key = packed(tokens=300)
    window, turned = key[:, :, -40:], key.transpose(1, 2)
    expected = window.dequantize(), turned.dequantize()
    squat_fx.save_cache(path, [window, turned])
    for loaded, before, numbers in zip(
        squat_fx.load_cache(path), (window, turned), expected, strict=True
    ):
        assert type(loaded) is type(before)
        assert loaded.first == before.first
        assert torch.equal(loaded.dequantize(), numbers)
        new = randn(2, 3, 30, 32, seed=4)
        new = new if loaded.shape[1] == 3 else new.transpose(1, 2)
        dim = loaded.token_dim
        longer = [torch.cat([x, new], dim).clone().dequantize() for x in (loaded, before)]
        assert torch.equal(*longer)


def test_a_cache_of_an_encoder_and_a_decoder(path: Path) -> None:
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for part in (cache.self_attention_cache, cache.cross_attention_cache):
        part.update(randn(1, 2, 9, 4), randn(1, 2, 9, 4), 0)
    cache.is_updated[0] = True
    squat_fx.save_cache(path, cache)
    loaded = squat_fx.load_cache(path)
    assert isinstance(loaded, EncoderDecoderCache)
    assert loaded.is_updated == {0: True}
    held = loaded.cross_attention_cache.layers[0].keys
    assert torch.equal(held, cache.cross_attention_cache.layers[0].keys)


def test_a_cache_that_holds_nothing_yet(path: Path) -> None:
    squat_fx.save_cache(path, DynamicCache())
    assert squat_fx.load_cache(path).get_seq_length() == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_loaded_cache_may_be_written_under_any_mode(mode: Any, path: Path) -> None:
    model = squat_fx.compile(tiny(), bits=2, **OPTIONS)
    squat_fx.save_cache(path, prefilled(model, prompt(1, 40)), model)
    with mode():
        loaded = squat_fx.load_cache(path, model)
    other = torch.no_grad if mode is torch.inference_mode else torch.inference_mode
    assert steps(model, loaded, 1, 4, other).shape == (1, 4)


# what is refused ----------------------------------------------------------------------------------


def rewritten(path: Path, old: str, new: str) -> None:
    """Other words in the header of the same file, its checksum made right again."""
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert old in metadata["about"]
    text = metadata["about"].replace(old, new)
    metadata |= {"about": text, "sha256": cache_file._checksum(text, tensors)}
    save_file(tensors, str(path), metadata=metadata)


def test_every_flipped_byte_is_noticed(path: Path) -> None:
    squat_fx.save_cache(path, [packed(Kivi(), tokens=40)])
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    positions = [*range(8), *range(8, 8 + header, 17), *range(8 + header, len(content), 211)]
    positions.append(len(content) - 1)
    for position in positions:
        flipped = bytearray(content)
        flipped[position] ^= 0x10
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"cache\.safetensors (is|holds)"):
            squat_fx.load_cache(path)
    path.write_bytes(content[:-9])
    with pytest.raises(ValueError, match="no safetensors file, or damaged"):
        squat_fx.load_cache(path)


def test_a_flipped_byte_of_a_tensor_is_a_checksum_that_differs(path: Path) -> None:
    squat_fx.save_cache(path, [packed()])
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its checksum differs; make the cache again"):
        squat_fx.load_cache(path)


def test_another_version(path: Path) -> None:
    squat_fx.save_cache(path, [packed()])
    rewritten(path, '"version": 1', '"version": 2')
    with pytest.raises(ValueError, match="has version 2, this squat_fx reads version 1"):
        squat_fx.load_cache(path)


def test_other_files(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no cache file"):
        squat_fx.load_cache(path)
    save_file({"x": torch.zeros(1)}, str(path))
    with pytest.raises(ValueError, match=r"is no cache file; squat_fx.save_cache\(\) writes one"):
        squat_fx.load_cache(path)
    path.write_text("something else")
    with pytest.raises(ValueError, match="is no safetensors file, or damaged"):
        squat_fx.load_cache(path)


@pytest.fixture
def saved(path: Path) -> Path:
    """The cache of a tiny Llama at 2 bits."""
    model = squat_fx.compile(tiny(), bits=2, **OPTIONS)
    squat_fx.save_cache(path, prefilled(model, prompt(1, 40)), model)
    return path


def _other_weights() -> Any:
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: build("gpt2"), "a LlamaForCausalLM, than this GPT2LMHeadModel: its parameters"),
        (_other_weights, "a LlamaForCausalLM, than this LlamaForCausalLM: its weights are others"),
    ],
)
def test_another_model(saved: Path, model: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"holds a cache of another model, {reason}"):
        squat_fx.load_cache(saved, model())


def test_near_miss_the_same_model_in_half_precision(saved: Path) -> None:
    assert squat_fx.load_cache(saved, tiny().half()).get_seq_length() == 40


def test_another_codec(saved: Path) -> None:
    model = squat_fx.compile(tiny(), codec="kivi", **OPTIONS)
    with pytest.raises(ValueError, match=r"stored with codec 'squat .* is compiled with 'kivi "):
        squat_fx.load_cache(saved, model)


def test_near_miss_a_layer_that_is_kept_exactly(path: Path) -> None:
    model = squat_fx.compile(build("llama"), bits=2, exact_layers=[0], **OPTIONS)
    cache = prefilled(model, prompt(1, 40))
    assert cache.layers[0].keys.format.layout == "dense"
    squat_fx.save_cache(path, cache, model)
    assert squat_fx.load_cache(path, model).get_seq_length() == 40


def test_a_codec_that_is_unknown_here(path: Path) -> None:
    squat_fx.save_cache(path, [packed(Kivi())])
    rewritten(path, "kivi", "kiwi")
    with pytest.raises(ValueError, match="cannot be rebuilt here: unknown codec 'kiwi'"):
        squat_fx.load_cache(path)


def test_a_file_without_its_model_cannot_be_checked(path: Path) -> None:
    squat_fx.save_cache(path, [packed()])
    with pytest.raises(ValueError, match="was saved without its model, so it cannot be checked"):
        squat_fx.load_cache(path, tiny())


class Mine:
    """No cache of transformers."""


@pytest.mark.parametrize("what", [Mine(), [{1.5: torch.zeros(1)}], {"x": {1, 2}}])
def test_what_cannot_be_saved(what: Any, path: Path) -> None:
    with pytest.raises(TypeError, match=r"cannot save a .*; save_cache takes a cache of"):
        squat_fx.save_cache(path, what)
    assert not path.exists()


# pickles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights_only", [True, False])
def test_torch_load_of_a_pickled_cache(weights_only: bool, tmp_path: Path) -> None:
    key = packed()
    torch.save({"past": (key, randn(2))}, tmp_path / "cache.pt")
    loaded = torch.load(tmp_path / "cache.pt", weights_only=weights_only)["past"][0]
    assert isinstance(loaded, QuantizedKV)
    assert torch.equal(loaded.dequantize(), key.dequantize())


def test_a_pickle_holds_no_spare_capacity() -> None:
    key = packed(Kivi(), tokens=40)
    assert len(pickle.dumps(key)) < 0.7 * key.storage_nbytes


def test_where_tensors_go() -> None:
    class Spread(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.empty(1, device="meta"))
            self.b = torch.nn.Parameter(torch.empty(1))

    place: Callable[[str], torch.device] = cache_file._placement(Spread(), None)
    assert place("cpu") == torch.device("cpu"), "where it was, if the model is there"
    assert place("cuda:3") == torch.device("meta"), "else where the model begins"
    assert cache_file._placement(Spread(), "cpu")("meta") == torch.device("cpu")
    assert cache_file._placement(None, None)("cuda:0") == torch.device("cpu")


def test_a_dense_tensor_is_the_callers(path: Path) -> None:
    x: Tensor = randn(3)
    squat_fx.save_cache(path, x)
    assert torch.equal(squat_fx.load_cache(path), x)
