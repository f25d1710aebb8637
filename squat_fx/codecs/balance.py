"""Factors of tokens and channels that make all of them vary alike (KVarN, Huawei CSL, 2026).

    repeat ITERATIONS times:
        log s += log std of each token over its channels                 of tile / (s * r)
        log r += log std of each channel over the tile's tokens          of tile / (s * r)
    of the starting point and the iterates, keep the one with the least
        max std / min std over tokens  +  max std / min std over channels

Standard deviations are clamped to ``SPREADS`` and both logarithms to ``LOGS``. Min-max rounding
shares its range along one of the sides, and absorbs the factors of the other: only ``s`` is stored.
For keys it belongs to tokens, as above; for values tokens and channels change places.
"""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 16
SPREADS = (1e-3, 1e3)
LOGS = (-0.3, 10.0)
SMALLEST_SPREAD = 1e-8  # in the ratio of spreads

TOKENS, CHANNELS = -2, -1


def balancing_factors(
    tiles: Tensor, keep: Tensor, of_tokens: bool, iterations: int = ITERATIONS
) -> Tensor:
    """What to divide the tokens, or the channels, of each tile by.

    Args:
        tiles: fp32 ``[..., tokens, channels]``, zero where not ``keep``.
        keep: bool ``[..., tokens, 1]``, broadcastable; False marks padding, which touches nothing.
        of_tokens: factors ``[..., tokens, 1]``; else of channels, ``[..., 1, channels]``.
        iterations: how often to balance; 0 gives ones.
    """
    sides = (CHANNELS, TOKENS) if of_tokens else (TOKENS, CHANNELS)
    spread = {side: _spread(tiles, keep, side) for side in sides}
    logs = {side: torch.zeros_like(spread[side]) for side in sides}
    factors, least = logs[sides[0]].exp(), _imbalance(spread, keep)
    for _ in range(iterations):
        for side, other in (sides, sides[::-1]):
            logs[side] = (logs[side] + spread[side].clamp(*SPREADS).log()).clamp(*LOGS)
            balanced = tiles / (logs[side] + logs[other]).exp()
            spread[other] = _spread(balanced, keep, other)
        spread[sides[1]] = _spread(balanced, keep, sides[1])
        imbalance = _imbalance(spread, keep)
        factors = torch.where(imbalance <= least, logs[sides[0]].exp(), factors)
        least = torch.minimum(imbalance, least)
    return factors


def _spread(tiles: Tensor, keep: Tensor, dim: int) -> Tensor:
    """Standard deviation along ``dim``, which is kept; zero of padding."""
    if dim == CHANNELS:
        return tiles.std(CHANNELS, correction=int(tiles.shape[CHANNELS] > 1), keepdim=True)
    count = keep.sum(TOKENS, keepdim=True)
    mean = tiles.sum(TOKENS, keepdim=True) / count.clamp_min(1)
    squares = (tiles - mean).square_().masked_fill_(~keep, 0.0)
    return (squares.sum(TOKENS, keepdim=True) / (count - 1).clamp_min(1)).sqrt_()


def _imbalance(spread: dict[int, Tensor], keep: Tensor) -> Tensor:
    """How far the largest spreads of each tile are from the smallest, ``[..., 1, 1]``."""
    of_tokens, of_channels = spread[CHANNELS], spread[TOKENS]
    lowest = of_tokens.masked_fill(~keep, torch.inf).amin(TOKENS, keepdim=True)
    ratio = of_tokens.amax(TOKENS, keepdim=True) / lowest.clamp_min(SMALLEST_SPREAD)
    lowest = of_channels.amin(CHANNELS, keepdim=True)
    ratio = ratio + of_channels.amax(CHANNELS, keepdim=True) / lowest.clamp_min(SMALLEST_SPREAD)
    return ratio.nan_to_num(torch.inf, torch.inf)
