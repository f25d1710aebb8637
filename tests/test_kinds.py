"""Whole models whose caches are windows, chunks, written once, shared or beside other states: the
lossless codec must answer token for token as the untouched model does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

import squat_fx
from squat_fx import QuantizedKV, Report
from tests.choose import full
from tests.kinds import CROSS, OTHER, SLIDING, WINDOW, build, generate
from tests.models import greedy, prompt

EXACT: dict[str, Any] = {"codec": "none", "inner": "eager", "residual_length": 8}


def packed(kind: str, attention: str, **options: Any) -> PreTrainedModel:
    """The model compiled; by default nothing is lost."""
    torch._dynamo.reset()
    return squat_fx.compile(build(kind, attention), **(EXACT | options))


def layers_of(report: Report) -> set[int]:
    """Layers with an attention that was rewritten in every graph."""
    return set.intersection(*({site.layer for site in graph.sites} for graph in report.graphs))


def check(kind: str, attention: str, layers: set[int], **given: int) -> Report:
    """Generate with both; returns what happened."""
    expected = generate(build(kind, attention), **given)
    model = packed(kind, attention)
    actual, report = generate(model, **given), squat_fx.report(model)
    assert torch.equal(actual, expected), str(report)
    assert layers_of(report) == layers, str(report)
    assert report.eager_calls == 0, str(report)
    assert not report.notes, str(report)
    return report


SHORT = {"prompt_tokens": 18}
LONG = {"prompt_tokens": 2 * WINDOW + 5, "tokens": 40}
PADDED = {"prompt_tokens": WINDOW + 6, "pads": 11, "tokens": 40}


@pytest.mark.parametrize(
    ("kind", "attention", "given"),
    [
        ("mistral", "sdpa", SHORT),
        ("gemma3", "eager", LONG),
        ("llama4", "sdpa", PADDED),
        *full(
            *(
                (kind, attention, given)
                for kind in SLIDING
                for attention in ("sdpa", "eager")
                for given in (SHORT, LONG, PADDED)
            )
        ),
    ],
)
def test_windows_and_chunks(kind: str, attention: str, given: dict[str, int]) -> None:
    """Sequences far longer than the window, prompts shorter and longer than it."""
    report = check(kind, attention, {0, 1}, **given)
    assert len(report.graphs) <= 6, str(report)
    assert not report.skipped, str(report)
    if not given.get("pads") and kind != "llama4":  # of which a chunk is less than what is kept
        assert report.graphs[-1].static, str(report)
        assert "attn_mask" not in report.graphs[-1].text


def chunks(model: PreTrainedModel, sizes: tuple[int, ...]) -> Tensor:
    """Logits of a sequence in parts of such sizes."""
    ids, cache = prompt(2, sum(sizes), seed=9), DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(x, past_key_values=cache).logits for x in ids.split(list(sizes), 1)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("kind", ["mistral", *full("gemma3", "llama4", "cohere2", "phi3")])
def test_chunks_across_the_border_of_a_window(kind: str) -> None:
    sizes = (WINDOW - 5, 3, 1, 1, 1, 1, 4, 2 * WINDOW, 1, 1, 7)
    expected = chunks(build(kind), sizes)
    model = packed(kind, "sdpa")
    torch.testing.assert_close(chunks(model, sizes), expected, rtol=1e-4, atol=1e-4)
    assert layers_of(squat_fx.report(model)) == {0, 1}


@pytest.mark.parametrize("kind", ["mistral", "llama4"])
def test_a_layer_with_a_window_says_how_long_it_is_and_holds_as_much(kind: str) -> None:
    """Sliding or in chunks; transformers sizes its masks from the one, the other is the point."""
    model = packed(kind, "sdpa")
    cache, ids = DynamicCache(config=model.config), prompt(1, 450)
    layer = next(x for x in cache.layers if isinstance(x, DynamicSlidingWindowLayer))
    sizes = set()
    with torch.no_grad():
        for x in (ids[:, :30], *ids[:, 30:].split(1, 1)):
            model(x, past_key_values=cache)
            assert isinstance(layer.keys, QuantizedKV)
            assert layer.keys.shape[2] == WINDOW - 1
            sizes.add(layer.keys.storage_nbytes + layer.values.storage_nbytes)
    assert len(sizes) == 1
    assert cache.get_seq_length() == 450


@pytest.mark.full
def test_assisted_decoding_crops_windows() -> None:
    def assisted(model: PreTrainedModel) -> Tensor:
        repeated = prompt(1, 12).repeat(1, 4)
        options = {"max_new_tokens": 40, "prompt_lookup_num_tokens": 4, "do_sample": False}
        return model.generate(repeated, **options)

    expected, model = assisted(build("mistral")), packed("mistral", "sdpa")
    assert torch.equal(assisted(model), expected)
    assert squat_fx.report(model).eager_calls == 0


@pytest.mark.parametrize("bits", [2, *full(8)])
def test_rounded_windows_answer_like_exact_ones(bits: int) -> None:
    sizes = (60, *[1] * 20)
    expected, model = (
        chunks(build("mistral"), sizes),
        packed("mistral", "sdpa", codec=None, bits=bits),
    )
    error = (chunks(model, sizes) - expected).norm() / expected.norm()
    assert error < {8: 0.02, 2: 0.6}[bits]
    assert layers_of(squat_fx.report(model)) == {0, 1}


def test_calls_that_run_eagerly_keep_windows_packed() -> None:
    expected, model = greedy(build("mistral"), 40), packed("mistral", "sdpa")
    cache = DynamicCache(config=model.config)
    with torch.compiler.set_stance("force_eager"):
        actual = model.generate(
            prompt(1, 20), past_key_values=cache, max_new_tokens=40, do_sample=False
        )
    assert torch.equal(actual, expected)
    assert squat_fx.report(model).eager_calls == 40
    for layer in cache.layers:
        assert isinstance(layer.keys, QuantizedKV)
        assert layer.keys.shape[2] == WINDOW - 1


@pytest.mark.parametrize(
    ("kind", "attention", "pads"),
    [
        ("bart", "sdpa", 7),
        ("t5", "eager", 0),
        *full(*((k, a, p) for k in CROSS for a in ("sdpa", "eager") for p in (0, 7))),
    ],
)
def test_cross_attention(kind: str, attention: str, pads: int) -> None:
    """What was encoded is packed at the first call and read at the others."""
    report = check(kind, attention, {0, 1}, tokens=30, pads=pads)
    first, *later = report.graphs
    assert [site.kind for site in first.sites] == ["prefill"] * 4
    for graph in later:
        assert sorted(site.kind for site in graph.sites) == ["decode", "decode", "read", "read"]


def test_what_was_encoded_stays_packed_and_takes_no_room_to_grow() -> None:
    model = packed("bart", "sdpa", codec="squat", bits=2)
    ids = prompt(1, 300)[:, :256]
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with torch.no_grad():
        encoded = model.get_encoder()(ids)
        for token in prompt(1, 5).split(1, 1):
            model(encoder_outputs=encoded, decoder_input_ids=token, past_key_values=cache)
    for layer in cache.cross_attention_cache.layers:
        assert isinstance(layer.keys, QuantizedKV)
        assert layer.keys.shape[2] == 256
        assert layer.keys._storage.capacity == 256
        assert layer.keys._storage.length == 256
    for layer in cache.self_attention_cache.layers:
        assert layer.keys.shape[2] == 5


@pytest.mark.parametrize(
    ("kind", "attention", "layers"),
    [
        ("lfm2", "sdpa", {1}),
        *full(
            ("gemma3n", "sdpa", {0, 1, 2, 3}),
            ("lfm2", "eager", {1}),
            ("qwen3_next", "sdpa", {1}),
            ("qwen3_next", "eager", {1}),
            ("gemma3n", "eager", {0, 1, 2, 3}),
        ),
    ],
)
def test_layers_beside_other_states_and_layers_that_share(
    kind: str, attention: str, layers: set[int]
) -> None:
    """Conv and linear-attention states stay as they are; one cache is read by several layers."""
    assert set(OTHER) >= {kind}
    check(kind, attention, layers, tokens=40)
