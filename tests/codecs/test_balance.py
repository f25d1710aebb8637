"""Balancing: the published iterations, token by token and channel by channel."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squat_fx.codecs.balance import balancing_factors
from tests.conftest import randn

SEEDS = st.integers(0, 2**16)


def by_the_book(tile: Tensor, iterations: int = 16) -> Tensor:
    """Factors of the tokens of one tile ``[tokens, channels]`` without padding, in float64."""
    tile = tile.double()
    of_tokens, of_channels = torch.zeros(tile.shape[0], 1), torch.zeros(1, tile.shape[1])

    def balanced() -> Tensor:
        return tile / of_tokens.exp() / of_channels.exp()

    def imbalance() -> float:
        spreads = balanced().std(1), balanced().std(0)
        return sum(float(s.max() / s.min().clamp_min(1e-8)) for s in spreads)

    best, least = of_tokens, imbalance()
    for _ in range(iterations):
        spread = balanced().std(1, keepdim=True).clamp(1e-3, 1e3)
        of_tokens = (of_tokens + spread.log()).clamp(-0.3, 10.0)
        spread = balanced().std(0, keepdim=True).clamp(1e-3, 1e3)
        of_channels = (of_channels + spread.log()).clamp(-0.3, 10.0)
        if imbalance() <= least:
            best, least = of_tokens, imbalance()
    return best.exp()


def uneven(tokens: int, channels: int, seed: int, size: float = 4.0) -> Tensor:
    """Gaussian numbers times factors of tokens and of channels."""
    of_tokens, of_channels = randn(tokens, 1, seed=seed), randn(1, channels, seed=seed + 1)
    return size * randn(tokens, channels, seed=seed + 2) * (0.7 * of_tokens + of_channels / 3).exp()


EVERY_TOKEN = torch.ones(1, 1, dtype=torch.bool)


@given(
    tokens=st.sampled_from([2, 32, 128]),
    channels=st.sampled_from([16, 40, 128]),
    size=st.sampled_from([0.05, 1.0, 4.0, 1e4]),
    seed=SEEDS,
)
def test_the_factors_are_the_published_ones(
    tokens: int, channels: int, size: float, seed: int
) -> None:
    """But for what they have in common, where iterates are equally good."""
    tile = uneven(tokens, channels, seed, size)
    for iterations, tolerance in ((0, 0.0), (1, 1e-4), (2, 1e-4), (16, 2e-2)):
        found = balancing_factors(tile, EVERY_TOKEN.expand(tokens, 1), True, iterations)
        expected = by_the_book(tile, iterations).float()
        found, expected = found / found.mean(), expected / expected.mean()
        torch.testing.assert_close(found, expected, rtol=tolerance + 1e-6, atol=0.0)


@given(seed=SEEDS)
def test_channels_are_balanced_as_tokens_are(seed: int) -> None:
    tile = uneven(64, 32, seed)
    of_tokens = balancing_factors(tile, EVERY_TOKEN.expand(64, 1), True)
    of_channels = balancing_factors(tile.mT, EVERY_TOKEN.expand(32, 1), False)
    torch.testing.assert_close(of_channels.mT, of_tokens, rtol=2e-2, atol=0.0)


def test_a_token_that_is_larger_by_a_factor_gets_that_factor() -> None:
    tile = 2.0 * randn(128, 64, seed=3)
    keep = EVERY_TOKEN.expand(128, 1)
    before = balancing_factors(tile, keep, True)
    tile[5] *= 10.0
    after = balancing_factors(tile, keep, True)
    assert (after / before)[5].item() == pytest.approx(10.0, rel=0.05)
    torch.testing.assert_close(after[6:], before[6:], rtol=0.05, atol=0.0)


@given(of_tokens=st.booleans(), seed=SEEDS)
def test_padding_counts_for_nothing(of_tokens: bool, seed: int) -> None:
    """As if the tile had only its valid tokens."""
    tile, keep = uneven(64, 32, seed), randn(64, 1, seed=seed + 9) > 0
    valid = tile[keep[:, 0]]
    found = balancing_factors(tile.masked_fill(~keep, 0.0), keep, of_tokens, 2)
    alone = balancing_factors(valid, EVERY_TOKEN.expand(len(valid), 1), of_tokens, 2)
    found = found[keep[:, 0]] if of_tokens else found
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("value", [0.0, 2.5, -1e-30, 1e6, 1e30])
@pytest.mark.parametrize("valid", [0, 1, 2, 64])
@pytest.mark.parametrize("of_tokens", [False, True])
def test_degenerate_tiles_have_finite_factors(value: float, valid: int, of_tokens: bool) -> None:
    keep = torch.arange(64)[:, None] < valid
    for tile in (torch.full((64, 16), value), value * randn(64, 16)):
        factors = balancing_factors(tile.masked_fill(~keep, 0.0), keep, of_tokens)
        assert (factors >= math.exp(-0.3) * 0.999).all()
        assert (factors <= math.exp(10.0) * 1.001).all()
