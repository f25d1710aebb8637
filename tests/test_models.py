"""Whole models, rewritten: the lossless codec must answer token for token as the untouched model
does.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import squat_fx
from squat_fx.codecs import Codec, Kvarn, Qjl, Svdq, Think, TurboQuant
from tests.choose import full
from tests.models import FAMILIES, SCENARIOS, build, prompt

IN_CI = {
    "llama": tuple(SCENARIOS),
    "gemma2": ("greedy", "left_padded_batch", "chunked_prefill"),
    "gpt2": ("greedy", "beam"),
    "opt": ("left_padded_batch", "prompt_lookup"),
    "qwen2": ("interleaved", "chat"),
    "gpt_oss": ("greedy", "left_padded_batch"),
}
"""Every family in two scenarios at least, and every scenario with one; ``-m full`` has all."""


@pytest.mark.parametrize(
    ("family", "scenario"),
    [
        case if case[1] in IN_CI[case[0]] else full(case)[0]
        for case in itertools.product(FAMILIES, SCENARIOS)
    ],
)
def test_lossless_cache_gives_the_same_tokens(family: str, scenario: str) -> None:
    torch._dynamo.reset()
    expected = SCENARIOS[scenario](build(family))
    model = squat_fx.compile(build(family), codec="none", inner="eager", residual_length=8)
    actual = SCENARIOS[scenario](model)
    report = squat_fx.report(model)
    assert report.rewritten > 0, str(report)
    assert report.eager_calls == 0, str(report)
    assert not report.notes, str(report)
    assert torch.equal(actual, expected), str(report)


def logits(model: PreTrainedModel, prompt_tokens: int = 150, steps: int = 20) -> Tensor:
    """Of 20 single steps after a prompt that is mostly packed."""
    ids, cache = prompt(2, prompt_tokens + steps), DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :prompt_tokens], past_key_values=cache, use_cache=True)
        found = [
            model(token, past_key_values=cache, use_cache=True).logits
            for token in ids[:, prompt_tokens:].split(1, 1)
        ]
    return torch.cat(found, 1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_eight_bits_answer_as_the_dense_cache_within_rounding(family: str) -> None:
    """Among them a softcap and sinks, to which a score that is off by a constant is another one."""
    torch._dynamo.reset()
    expected = logits(build(family))
    errors = {}
    for bits in (8, 2):
        model = squat_fx.compile(build(family), bits=bits, inner="eager", residual_length=8)
        errors[bits] = ((logits(model) - expected).norm() / expected.norm()).item()
        report = squat_fx.report(model)
        assert report.rewritten > 0, str(report)
        assert report.eager_calls == 0, str(report)
    assert errors[8] < 0.02, errors
    assert errors[2] > 5 * errors[8], errors


@pytest.mark.parametrize("codec", [Kvarn(32), Think(ratio=0.0), Svdq()], ids=lambda c: c.name)
def test_eight_bits_of_other_layouts_answer_within_rounding(codec: Codec) -> None:
    torch._dynamo.reset()
    expected = logits(build("llama"))
    model = squat_fx.compile(build("llama"), bits=8, codec=codec, inner="eager", residual_length=8)
    error = ((logits(model) - expected).norm() / expected.norm()).item()
    report = squat_fx.report(model)
    assert report.rewritten > 0, str(report)
    assert report.eager_calls == 0, str(report)
    assert error < 0.02, error


def test_keys_behind_padding_are_turned_back_and_forth() -> None:
    """Rows whose positions begin at their first token, and cropping behind the prompt."""
    torch._dynamo.reset()
    ids, mask = prompt(3, 160), torch.ones(3, 160, dtype=torch.long)
    mask[1, :50], mask[2, :121] = 0, 0
    found = []
    for options in (None, {"bits": 8, "codec": "svdq", "residual_length": 8, "inner": "eager"}):
        model = build("llama")
        model = model if options is None else squat_fx.compile(model, **options)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            for first, last in ((0, 140), (140, 150), (150, 151), (151, 152), (146, 147)):
                if cropped := cache.get_seq_length() - first:
                    cache.crop(-cropped)
                positions = mask[:, :last].cumsum(1)[:, first:] - 1
                out = model(
                    ids[:, first:last], attention_mask=mask[:, :last], past_key_values=cache,
                    position_ids=positions.clamp(min=0), use_cache=True,
                )  # fmt: skip
                found.append(out.logits[:, -1])
    expected, actual = torch.stack(found[:5]), torch.stack(found[5:])
    assert squat_fx.report(model).rewritten > 0, str(squat_fx.report(model))
    assert ((actual - expected).norm() / expected.norm()).item() < 0.02


@pytest.mark.parametrize(
    ("rough", "fine"),
    [
        ({"codec": TurboQuant(), "bits": 1}, {"codec": TurboQuant(), "bits": 4}),
        (
            {"codec": Qjl(64, 2, 64), "value_bits": 8},
            {"codec": Qjl(2048, 2, 2048), "value_bits": 8},
        ),
    ],
    ids=["turboquant", "qjl"],
)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_more_bits_answer_more_like_the_dense_cache(
    family: str, rough: dict[str, Any], fine: dict[str, Any]
) -> None:
    """Of codecs whose layouts are not those of the default, keys and values apart or alike."""
    torch._dynamo.reset()
    expected, errors = logits(build(family)), []
    for options in (rough, fine):
        model = squat_fx.compile(build(family), inner="eager", residual_length=8, **options)
        errors.append(((logits(model) - expected).norm() / expected.norm()).item())
        report = squat_fx.report(model)
        assert report.rewritten > 0, str(report)
        assert report.eager_calls == 0, str(report)
    assert 2.5 * errors[1] < errors[0] < 1, errors
