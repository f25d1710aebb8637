"""The generation features of transformers: with a lossless cache they answer as with a dense one,
with a 2-bit cache every answer is finite and every cache is packed.

All uses share one compiled model, as they would in a process that serves people.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import squat_fx
from squat_fx import QuantizedKV
from tests.choose import diagonal, full
from tests.models import build, greedy, prompt
from tests.uses import LEFT_DENSE, USES, generate, prefilled, steps, tiny

OPTIONS: dict[str, Any] = {"inner": "eager", "residual_length": 8}
ELSEWHERE = {
    "greedy", "beam", "prompt_lookup", "left_padded_batch", "chat", "chunked_prefill",
    "several_samples",
}  # fmt: skip
"""Uses that ``test_models`` compares for all families, or that others are like."""
LIKE_GREEDY = {
    "greedy", "sampling", "several_samples", "beam_sampling", "streaming", "returned_dict",
    "embeddings", "guidance", "text_pipeline", "chunked_prefill", "prompt_lookup", "crop",
    "autocast_for_a_while",
}  # fmt: skip
"""Uses that do to a cache what others do, too."""


def caches_of(cache: Any) -> list[Tensor]:
    """Keys and values of every layer that holds any."""
    return [x for layer in cache.layers for x in (layer.keys, layer.values) if x is not None]


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    """The untouched model."""
    return tiny()


@pytest.fixture(scope="module")
def lossless() -> PreTrainedModel:
    """The same, compiled once for all uses, with exact storage."""
    torch._dynamo.reset()
    return squat_fx.compile(tiny(), codec="none", **OPTIONS)


@pytest.fixture(scope="module")
def two_bits() -> PreTrainedModel:
    """The same with 2 bits; raises if an answer is not finite."""
    model = squat_fx.compile(tiny(), bits=2, **OPTIONS)
    compiled = model._compiled_call_impl

    def checked(*args: Any, **kwargs: Any) -> Any:
        out = compiled(*args, **kwargs)
        assert bool(out.logits.isfinite().all())
        checked.caches.append(getattr(out, "past_key_values", None))
        return out

    checked.caches = []
    model._compiled_call_impl = checked
    return model


@pytest.mark.parametrize("use", [full(use)[0] if use in ELSEWHERE else use for use in USES])
def test_a_lossless_cache_answers_as_a_dense_one(
    use: str, dense: PreTrainedModel, lossless: PreTrainedModel
) -> None:
    expected, actual = USES[use](dense), USES[use](lossless)
    report = squat_fx.report(lossless)
    assert torch.equal(actual, expected), str(report)
    assert report.eager_calls == 0, str(report)
    assert not report.notes, str(report)


@pytest.mark.parametrize(
    "use",
    [full(use)[0] if use in LIKE_GREEDY else use for use in USES if use not in LEFT_DENSE],
)
def test_a_2_bit_cache_stays_packed_and_answers_are_finite(
    use: str, two_bits: PreTrainedModel
) -> None:
    seen = two_bits._compiled_call_impl.caches
    seen.clear()
    tokens = USES[use](two_bits)
    assert tokens.numel() > 0
    held = [x for cache in seen for x in caches_of(cache)]
    assert held
    assert all(isinstance(x, QuantizedKV) for x in held)


@pytest.mark.parametrize(("draft_is_packed", "do_sample"), diagonal([False, True], [False, True]))
def test_assisted_decoding(
    draft_is_packed: bool, do_sample: bool, dense: PreTrainedModel, lossless: PreTrainedModel
) -> None:
    """A draft model that is right now and then: caches are cropped by some tokens every round."""

    def draft() -> PreTrainedModel:
        model = tiny()
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(0.8)
        return model

    options = {"tokens": 40, "do_sample": do_sample}
    expected = generate(dense, prompt(1, 20), assistant_model=draft(), **options)
    assistant = draft()
    if draft_is_packed:
        assistant = squat_fx.compile(assistant, codec="none", **OPTIONS)
    actual = generate(lossless, prompt(1, 20), assistant_model=assistant, **options)
    assert torch.equal(actual, expected)
    if draft_is_packed:
        assert squat_fx.report(assistant).rewritten > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *full(torch.float32)])
def test_every_precision(dtype: torch.dtype) -> None:
    """Exact storage is exact in each; 2 bits are small in each."""
    expected = generate(tiny().to(dtype), prompt(2, 40), 24)
    model = squat_fx.compile(tiny().to(dtype), codec="none", **OPTIONS)
    assert torch.equal(generate(model, prompt(2, 40), 24), expected)
    model = squat_fx.compile(tiny().to(dtype), bits=2, **OPTIONS)
    cache = prefilled(model, prompt(2, 500))
    assert caches_of(cache)[0].dtype == dtype
    assert steps(model, cache, 2, 4).shape == (2, 4)
    # 3 stored bits of 16 or 32 at head_dim 16, exact tokens and spare capacity.
    assert squat_fx.cache_bytes(cache).ratio > 0.15 * torch.finfo(dtype).bits


def test_gradients_reach_the_weights_over_a_packed_past() -> None:
    model = squat_fx.compile(tiny(), codec="none", **OPTIONS)
    gradients = []
    for each in (tiny(), model):
        cache = prefilled(each, prompt(1, 40))
        each(prompt(1, 9, seed=3), past_key_values=cache).logits.square().sum().backward()
        gradients.append(each.model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(*gradients)
    assert "torch.no_grad()" in str(squat_fx.report(model))


@pytest.mark.parametrize("last_layer", ["cpu", "disk"])
def test_device_map(last_layer: str, tmp_path: Any) -> None:
    """Layers that accelerate moves at every call are compiled each for itself."""
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    dense = build("llama")
    dense.save_pretrained(tmp_path)
    places = dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    ) | {"model.layers.1": last_layer}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "offloaded"
    ).eval()
    model.generation_config = dense.generation_config
    model = squat_fx.compile(model, codec="none", **OPTIONS)
    assert torch.equal(greedy(model, 16), greedy(dense, 16))
    report = squat_fx.report(model)
    layers = [[site.layer for site in g.sites] for g in report.graphs if g.kind == "prefill"]
    assert layers in ([[0], [1]], [[0, 1]]), str(report)
    model = squat_fx.compile(model, codec="kivi", layer_bits={1: 4}, **OPTIONS)
    bits = [layer.keys.format.bits for layer in prefilled(model, prompt(1, 60)).layers]
    assert bits == [2, 4]
    assert sorted(squat_fx.report(model).attention_errors) == [0, 1]


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("options", [{"codec": "none"}, {"bits": 2}], ids=["none", "2 bits"])
def test_offloaded_cache_on_a_gpu(options: dict[str, Any]) -> None:
    model, ids = build("llama").cuda().half(), prompt(2, 300).cuda()
    expected = generate(model, ids, cache_implementation="offloaded")
    model = squat_fx.compile(model, residual_length=8, inner="eager", **options)
    out = generate(
        model, ids, cache_implementation="offloaded", return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    assert bool(torch.stack(out.logits).isfinite().all())
    assert squat_fx.report(model).rewritten > 0
    for layer in out.past_key_values.layers:
        assert isinstance(layer.keys, QuantizedKV)
        assert layer.keys.device.type == "cpu"
    if "codec" in options:
        assert torch.equal(out.sequences, expected), str(squat_fx.report(model))


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("options", [{"codec": "none"}, {"bits": 2}], ids=["none", "2 bits"])
def test_autocast_on_a_gpu(options: dict[str, Any]) -> None:
    """Keys are fp32 after the rotary embedding, values and queries of the dtype of autocast."""
    model, ids = tiny().cuda(), prompt(2, 300).cuda()
    packed = squat_fx.compile(tiny().cuda(), residual_length=8, inner="eager", **options)
    with torch.autocast("cuda", dtype=torch.float16):
        expected = generate(model, ids)
        out = generate(packed, ids, return_dict_in_generate=True, output_logits=True)
    assert bool(torch.stack(out.logits).isfinite().all())
    assert squat_fx.report(packed).rewritten > 0
    if "codec" in options:
        assert (out.sequences == expected).float().mean() > 0.98, str(squat_fx.report(packed))


@pytest.mark.gpu
@on_a_gpu
def test_device_map_over_cpu_and_gpu(tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    build("llama").save_pretrained(tmp_path)
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.rotary_emb": 0} | dict.fromkeys(
        ("model.layers.1", "model.norm", "lm_head"), "cpu"
    )
    answers = []
    for compiled in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places).eval()
        model.generation_config = build("llama").generation_config
        if compiled:
            model = squat_fx.compile(model, codec="none", **OPTIONS)
        answers.append(generate(model, prompt(1, 20).cuda()).cpu())
    assert torch.equal(*answers)
