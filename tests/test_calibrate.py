"""Calibrating: what the model is run over, what is collected there, and what is left behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import squat_fx
from squat_fx import QuantizedKV
from squat_fx.calibrate import FIRST, Statistics, calibrate
from squat_fx.calibration import LayerCalibration
from tests.models import build, prompt


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Every key and query that was collected."""
    seen: list[tuple[Tensor, Tensor]] = []
    add = Statistics.add

    def spy(self: Statistics, key: Tensor, query: Tensor) -> None:
        seen.append((key, query))
        add(self, key, query)

    monkeypatch.setattr(Statistics, "add", spy)
    return seen


# what is collected ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_it_sees_the_keys_that_are_cached_and_the_queries_that_read_them(
    family: str, collected: list[tuple[Tensor, Tensor]]
) -> None:
    """Gemma-2 slides over every other layer, with a window of 24 tokens: all keys count."""
    model, ids = build(family), prompt(1, 40)
    with torch.no_grad():
        layers = model(ids, use_cache=True).past_key_values.layers
    found = calibrate(model, ids[0])
    assert sorted(found.layers) == [0, 1]
    assert found.tokens == 40
    for layer, (key, query) in zip(layers, collected, strict=True):
        kept = layer.keys
        torch.testing.assert_close(key[:, :, -kept.shape[2] :], kept)
        assert key.shape[2] == 40
        assert query.shape == (1, 4, 40, key.shape[3])


def test_the_statistics_are_averages_over_texts_and_all_tokens_but_the_first(
    collected: list[tuple[Tensor, Tensor]],
) -> None:
    model = build("llama")
    texts = [prompt(1, n, seed=n)[0] for n in (40, 25)]
    found = calibrate(model, texts)
    first_layer = collected[::2]
    moment = gram = torch.zeros(2, 16, 16, dtype=torch.float64)
    for key, query in first_layer:
        tokens = key.shape[2]
        k, q = key[0].double(), query[0].double().unflatten(0, (2, 2)).flatten(1, 2)
        k = k[:, FIRST:] - k[:, FIRST:].mean(1, keepdim=True)
        moment, gram = moment + k.mT @ k / (tokens - FIRST) / 2, gram + q.mT @ q / tokens / 2
    expected = LayerCalibration.of(moment, gram)
    torch.testing.assert_close(found.layers[0].importance, expected.importance)
    product = found.layers[0].matrices[0] @ expected.matrices[1]
    torch.testing.assert_close(product @ product.mT, torch.eye(16).expand(2, -1, -1))


@torch._dynamo.config.patch(recompile_limit=2)
def test_texts_of_any_number_of_lengths_are_all_seen(
    collected: list[tuple[Tensor, Tensor]],
) -> None:
    """One graph a length, more than torch compiles by itself, and again for the next model."""
    lengths = [5, 6, 7]
    for model_lengths in (lengths, [20]):
        texts = [prompt(1, length)[0] for length in model_lengths]
        collected.clear()
        found = calibrate(build("llama"), texts, windows=len(texts))
        assert found.tokens == sum(model_lengths)
        assert [key.shape[2] for key, _ in collected[::2]] == model_lengths


# what it is run over ----------------------------------------------------------------------------

PIECES: dict[str, tuple[Any, dict[str, int], list[int]]] = {
    "one text": (prompt(1, 30)[0], {}, [30]),
    "one text with a batch dim": (prompt(1, 30), {}, [30]),
    "a long text in windows": (prompt(1, 100)[0], {"window": 20, "windows": 3}, [20, 20, 20]),
    "no more windows than fit": (prompt(1, 50)[0], {"window": 20, "windows": 8}, [20, 20]),
    "windows shared by texts": (
        [prompt(1, 90)[0], prompt(1, 90)[0]], {"window": 10, "windows": 3}, [10, 10, 10]
    ),
    "fewer windows than texts": (
        [prompt(1, 15)[0]] * 3, {"window": 10, "windows": 2}, [10, 10]
    ),
    "keyword arguments": (
        {"input_ids": prompt(1, 12), "attention_mask": torch.ones(1, 12, dtype=torch.long)},
        {"window": 5},
        [12],
    ),
    "a mixture": ([{"input_ids": prompt(1, 7)}, prompt(1, 9)[0]], {}, [7, 9]),
}  # fmt: skip


@pytest.mark.parametrize("name", PIECES)
def test_texts_are_cut_into_windows(name: str, collected: list[tuple[Tensor, Tensor]]) -> None:
    texts, options, expected = PIECES[name]
    found = calibrate(build("llama"), texts, **options)
    assert [key.shape[2] for key, _ in collected[::2]] == expected
    assert found.tokens == sum(expected)


def test_windows_of_a_text_are_spread_over_it() -> None:
    from squat_fx.calibrate import _pieces

    ids = torch.arange(100)
    pieces = _pieces(nn.Linear(1, 1), ids, None, 10, 4)
    assert [piece["input_ids"][0, 0].item() for piece in pieces] == [0, 25, 50, 75]


def test_strings_go_through_the_tokenizer(collected: list[tuple[Tensor, Tensor]]) -> None:
    def tokenizer(text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=torch.tensor([[ord(c) % 90 for c in text]]))

    found = calibrate(build("llama"), ["Call me Ishmael.", "Some years ago"], tokenizer=tokenizer)
    assert found.tokens == 16 + 14
    assert [key.shape[2] for key, _ in collected[::2]] == [16, 14]


# what is left behind ----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model, ids = build("llama").train(training), prompt(1, 40)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with torch.no_grad():
        logits = model(ids).logits
    calibrate(model, prompt(1, 200)[0], window=64, windows=3)
    assert model.training == training
    assert model._compiled_call_impl is None
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        out = model(ids)
    assert torch.equal(out.logits, logits)
    assert type(out.past_key_values.layers[0].keys) is Tensor


def test_a_model_that_fails_is_left_in_training_too() -> None:
    model = build("llama").train()
    with pytest.raises(Exception, match="out of range"):
        calibrate(model, torch.tensor([10**6]))
    assert model.training


def test_a_compiled_model_can_be_calibrated_and_stays_compiled() -> None:
    model = squat_fx.compile(build("llama"), codec="none", inner="eager")
    expected = calibrate(build("llama"), prompt(1, 60)[0])
    found = calibrate(model, prompt(1, 60)[0])
    assert torch.equal(found.layers[1].matrices, expected.layers[1].matrices)
    with torch.no_grad():
        keys = model(prompt(1, 20), use_cache=True).past_key_values.layers[0].keys
    assert isinstance(keys, QuantizedKV)


# what it is good for ----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 8])
def test_a_calibrated_model_generates(bits: int) -> None:
    model, ids = build("llama"), prompt(2, 70)
    with torch.no_grad():
        expected = model(ids).logits
    found = calibrate(model, prompt(1, 300, seed=5)[0], window=100, windows=3)
    squat_fx.compile(model, bits=bits, calibration=found, inner="eager", strict=True)
    out = model.generate(ids[:, :40], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 45)
    with torch.no_grad():
        cache = model(ids[:, :60]).past_key_values
        logits = [model(t, past_key_values=cache).logits for t in ids[:, 60:].split(1, 1)]
    for layer, number in zip(cache.layers, found.layers, strict=True):
        assert layer.keys.format.latent
        assert not layer.values.format.latent
        assert layer.keys._storage["basis"] is found.layers[number].basis(torch.device("cpu"))
    error = (torch.cat(logits, 1) - expected[:, 60:]).abs().max() / expected.abs().max()
    assert error < (0.02 if bits == 8 else 1.0)
    report = squat_fx.report(model)
    assert report.rewritten == 2 * len(report.graphs)
    assert f"keys squat calibrated {bits} bits per token" in str(report)
    assert f"values squat {bits} bits per token" in str(report)


def test_keys_from_the_eager_fallback_are_calibrated_too() -> None:
    model = build("llama")
    found = calibrate(model, prompt(1, 100)[0])
    squat_fx.compile(model, bits=8, calibration=found, inner="eager")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        out = model(prompt(1, 60), use_cache=True)
    keys = out.past_key_values.layers[1].keys
    assert keys.format.latent
    assert keys._storage["basis"] is found.layers[1].basis(torch.device("cpu"))


# what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [[], torch.tensor([], dtype=torch.long)])
def test_no_text_is_refused(texts: Any) -> None:
    text = "^there is nothing to calibrate on: give at least one text$"
    with pytest.raises(ValueError, match=text):
        calibrate(build("llama"), texts)


def test_strings_without_a_tokenizer_are_refused() -> None:
    model = build("llama")
    model.config._name_or_path = model.name_or_path = ""
    with pytest.raises(
        ValueError,
        match=r"^texts are strings, and this model does not say which tokenizer is its own; "
        r"pass tokenizer=..., or token ids$",
    ):
        calibrate(model, "Call me Ishmael.")


@pytest.mark.parametrize("option", ["window", "windows"])
def test_no_window_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=r"^window and windows must be at least 1, got "):
        calibrate(build("llama"), prompt(1, 20)[0], **{option: 0})


def test_a_model_without_a_cache_is_refused() -> None:
    class Embedding(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids.float()

    with pytest.raises(ValueError, match=r"^no attention over a cache was found in Embedding$"):
        calibrate(Embedding(), prompt(1, 20)[0])


def test_a_model_whose_attention_was_not_understood_is_refused_with_the_reason() -> None:
    with pytest.raises(
        ValueError,
        match=r"^no attention over a cache was found in LlamaForCausalLM: ",
    ):
        calibrate(build("llama"), {"input_ids": prompt(1, 20), "use_cache": False})


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_torch_compile_gave_up_is_refused_with_what_to_do() -> None:
    class Cacheless(nn.Module):
        @torch.compiler.disable
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids.float()

    with pytest.raises(ValueError, match=r"traced no graph; torch._dynamo.reset\(\) lets it try"):
        calibrate(Cacheless(), prompt(1, 20)[0])
