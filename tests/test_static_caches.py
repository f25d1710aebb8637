"""Static caches of transformers grow, packed, and answer as they did."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache

import squat_fx
from squat_fx import QuantizedKV, Report
from squat_fx.static_caches import GREW, with_growing_caches
from tests import kinds, models
from tests.choose import full
from tests.models import prompt

OPTIONS: dict[str, Any] = {"codec": "none", "inner": "eager", "residual_length": 8}
CAPACITY = 60


def build(family: str) -> PreTrainedModel:
    torch._dynamo.reset()
    return (models.build if family in models.FAMILIES else kinds.build)(family)


def generated(model: PreTrainedModel, **options: Any) -> Any:
    ids = prompt(2, 18)
    mask = torch.ones_like(ids)
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=30, do_sample=False,
        cache_implementation="static", return_dict_in_generate=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["gemma2", *full("llama", "gpt_oss", "mistral", "bart")])
def test_generate_with_a_static_cache(family: str) -> None:
    expected = generated(build(family)).sequences
    model = squat_fx.compile(build(family), **OPTIONS)
    out, report = generated(model), squat_fx.report(model)
    assert torch.equal(out.sequences, expected)
    assert report.notes == [GREW]
    assert not report.skipped
    cache = getattr(out.past_key_values, "self_attention_cache", out.past_key_values)
    assert isinstance(cache, StaticCache)
    assert all(isinstance(layer.keys, QuantizedKV) for layer in cache.layers)


def test_what_generate_compiles_around_the_model_calls_it() -> None:
    """On a GPU it compiles the decode steps of a static cache."""
    settings = CompileConfig(mode="default", backend="eager")
    settings._compile_all_devices = True  # pyright: ignore[reportAttributeAccessIssue]
    expected = generated(build("llama")).sequences
    model = squat_fx.compile(build("llama"), **OPTIONS)
    assert torch.equal(generated(model, compile_config=settings).sequences, expected)
    kinds_of_graphs = [graph.kind for graph in squat_fx.report(model).graphs]
    assert kinds_of_graphs == ["prefill", "decode"]


def run(model: PreTrainedModel, ids: Tensor, cache: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits[:, -1:]


@pytest.mark.parametrize("tokens", [9, 40])
def test_a_static_cache_that_holds_tokens_gives_its_buffers_away(tokens: int) -> None:
    """One layer slides over 24 tokens, the other does not."""
    model, ids = build("gemma2"), prompt(1, tokens + 3)
    cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
    run(model, ids[:, :tokens], cache)
    buffers = [weakref.ref(x) for layer in cache.layers for x in (layer.keys, layer.values)]
    reference = DynamicCache(config=model.config)
    run(model, ids[:, :tokens], reference)
    expected = [run(model, token, reference) for token in ids[:, tokens:].split(1, 1)]
    report = Report()
    with_growing_caches((), {"past_key_values": cache}, report)
    assert report.notes == [GREW]
    gc.collect()
    assert not any(buffer() is not None for buffer in buffers)
    for ours, theirs in zip(cache.layers, DynamicCache(config=model.config).layers, strict=True):
        assert type(ours) is type(theirs)
    assert cache.get_seq_length() == tokens
    assert cache.layers[0].keys.shape[2] == min(tokens, 23)
    actual = [run(model, token, cache) for token in ids[:, tokens:].split(1, 1)]
    torch.testing.assert_close(actual, expected)


def test_other_caches_and_other_things_are_not_touched() -> None:
    report, cache = Report(), DynamicCache()
    mine: Any = type("Mine", (), {"layers": [torch.nn.Linear(1, 1)]})()
    layers = list(mine.layers)
    with_growing_caches((cache, 3, None), {"cache": mine}, report)
    assert mine.layers == layers
    assert report.notes == []
