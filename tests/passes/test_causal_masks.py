"""Masks computed from positions: causality where that is all they say, and their near misses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import squat_fx
from squat_fx.kernels.reference import BOTTOM_RIGHT, NO_CAUSALITY, TOP_LEFT

Mask = Callable[[int, int], Tensor]


def bottom_right(q: int, past: int) -> Tensor:
    """As Hugging Face builds it."""
    keys = torch.arange(past + q)[None, None, None, :]
    queries = (torch.arange(q) + past)[None, None, :, None]
    return (keys <= queries).expand(2, -1, q, past + q)


def written_with_ge(q: int, past: int) -> Tensor:
    """The comparison the other way round, axes by ``unsqueeze``."""
    queries = torch.arange(past, past + q).unsqueeze(-1)
    return queries >= torch.arange(q + past).unsqueeze(0)


def top_left(q: int, past: int) -> Tensor:
    """Query ``i`` sees keys up to ``i``, whatever the past."""
    return torch.arange(past + q)[None, :] <= torch.arange(q)[:, None]


def one_too_few(q: int, past: int) -> Tensor:
    """A query that does not see itself."""
    return torch.arange(past + q)[None, :] <= (torch.arange(q) + (past - 1))[:, None]


def sliding(q: int, past: int) -> Tensor:
    """Causal, and no further back than ten tokens."""
    keys, queries = torch.arange(past + q)[None, :], (torch.arange(q) + past)[:, None]
    return (keys <= queries) & (keys > queries - 10)


def flipped(q: int, past: int) -> Tensor:
    """Written in place after the comparison."""
    mask = torch.arange(past + q)[None, :] <= (torch.arange(q) + past)[:, None]
    mask[:, :2] = False
    return mask


def step_with(mask: Mask) -> Callable[..., Any]:
    """One step of attention over a cache under ``mask``."""

    def step(x: Tensor, past_key: Tensor, past_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, past = x.shape[2], past_key.shape[2]
        key, value = torch.cat([past_key, x], 2), torch.cat([past_value, -x], 2)
        out = F.scaled_dot_product_attention(x, key, value, attn_mask=mask(q, past))
        return out, key, value

    return step


def run(mask: Mask, tokens: int) -> squat_fx.Report:
    """Three steps of ``tokens`` after a prompt, compared with the untouched function."""
    torch._dynamo.reset()
    plain, compiled = (
        step_with(mask),
        squat_fx.compile(step_with(mask), codec="none", inner="eager"),
    )
    generator = torch.Generator().manual_seed(0)
    expected = actual = (torch.zeros(2, 2, 0, 16), torch.zeros(2, 2, 0, 16))
    with torch.no_grad():
        for n in (30, tokens, tokens, tokens):
            x = torch.randn(2, 2, n, 16, generator=generator)
            want, *expected = plain(x, *expected)
            got, *actual = compiled(x, *actual)
            torch.testing.assert_close(got, want)
    return squat_fx.report(compiled)


@pytest.mark.parametrize("mask", [bottom_right, written_with_ge])
def test_a_causal_mask_says_nothing_to_one_query_and_leaves_a_static_graph(mask: Mask) -> None:
    report = run(mask, tokens=1)
    decode = report.graphs[-1]
    assert decode.kind == "decode"
    assert decode.sites[0].attention.mask is None
    assert decode.sites[0].attention.causal == NO_CAUSALITY
    assert decode.static, str(report)


@pytest.mark.parametrize(
    ("mask", "causal"),
    [(bottom_right, BOTTOM_RIGHT), (written_with_ge, BOTTOM_RIGHT), (top_left, TOP_LEFT)],
)
def test_several_queries_keep_the_causality_the_mask_spelled(mask: Mask, causal: int) -> None:
    attention = run(mask, tokens=4).graphs[-1].sites[0].attention
    assert (attention.mask, attention.causal) == (None, causal)


@pytest.mark.parametrize("mask", [one_too_few, sliding, flipped])
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_mask_that_says_more_stays_a_mask(mask: Mask, tokens: int) -> None:
    attention = run(mask, tokens).graphs[-1].sites[0].attention
    assert attention.mask is not None
    assert attention.causal == NO_CAUSALITY
