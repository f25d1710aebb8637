"""Whole models, rewritten: the lossless codec must answer token for token as the untouched model
does.
"""

from __future__ import annotations

import pytest
import torch

import squat_fx
from tests.models import FAMILIES, SCENARIOS, build


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("family", FAMILIES)
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
