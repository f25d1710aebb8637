"""Lloyd-Max levels with one scale per token: the rounding of the layout ``levels/token``.

    size  = sqrt(mean(y**2))
    code  = how many thresholds lie below y / size
    y'    = scale * level(code)
    scale = size * sqrt(d) / |level(codes)|  with the norm correction, else size     fp16, per token

The ``2**bits`` levels round a standard Gaussian with the least mean squared error of all such sets,
evenly spaced or not: each level is the mean of the numbers that become it, each threshold lies in
the middle between two levels (Lloyd, 1982). They are those of Max, Quantizing for minimum
distortion, 1960, table I, to eight digits, found by iterating the two conditions in float64. The
levels are symmetric about zero and lie the closer the nearer they are to it; their distortion is
.3634, .1175, .0345 and .0095 of the variance at 1 to 4 bits.

A mean is shorter than what it is the mean of, so tokens come back too short: the norm correction
stores the scale that gives each token its own length again. Attention weighs by exponentials of
products, where a common factor on all keys costs more than a little noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import groupby

import torch
from torch import Tensor

from squat_fx.layouts.planes import LANES

# The positive half of the levels of each width, from 1 bit on.
POSITIVE_LEVELS: tuple[tuple[float, ...], ...] = (
    (0.79788456,),
    (0.45278003, 1.51041761),
    (0.24509418, 0.75600528, 1.34390928, 2.15194570),
    (
        *(0.12839503, 0.38804830, 0.65675912, 0.94234046),
        *(1.25623120, 1.61804639, 2.06901723, 2.73258957),
    ),
)
WIDTHS = range(1, len(POSITIVE_LEVELS) + 1)
LARGEST_HALF = 65504.0
SMALLEST_SIZE = 1e-30  # what a token of zeros is divided by


@cache  # recorded CUDA graphs read them where they are
def level_table(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The ``2**bits`` levels, ascending, and the thresholds between them, fp32; not to be written
    to.
    """
    with torch.inference_mode(False), torch.no_grad():
        positive = torch.tensor(POSITIVE_LEVELS[bits - 1], dtype=torch.float64)
        levels = torch.cat([-positive.flip(0), positive])
        thresholds = (levels[1:] + levels[:-1]) / 2
        return levels.float().to(device), thresholds.float().to(device)


def quantize_tokens(
    y: Tensor, widths: tuple[int, ...], norm_correction: bool = True
) -> tuple[Tensor, Tensor]:
    """Codes (uint8, the shape of ``y``) and scales (fp16 ``[..., tokens, 1]``).

    Args:
        y: fp32 ``[..., tokens, head_dim]``, whose squares fit fp32.
        widths: bits of each plane group of 16 channels, 1 to 4.
        norm_correction: whether a token comes back with its own norm.
    """
    size = y.square().mean(-1, keepdim=True).sqrt()
    unit = y / size.clamp_min(SMALLEST_SIZE)
    codes = torch.empty(y.shape, dtype=torch.uint8, device=y.device)
    for bits, channels in _runs(widths):
        _, thresholds = level_table(bits, y.device)
        codes[..., channels] = torch.bucketize(
            unit[..., channels].contiguous(), thresholds, out_int32=True
        )
    if norm_correction:
        size = size / level_of(codes, widths).square().mean(-1, keepdim=True).sqrt()
    return codes, size.clamp(max=LARGEST_HALF).half()


def level_of(codes: Tensor, widths: tuple[int, ...]) -> Tensor:
    """The level of each code ``[..., head_dim]``, fp32."""
    levels = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for bits, channels in _runs(widths):
        table, _ = level_table(bits, codes.device)
        levels[..., channels] = table[codes[..., channels].int()]
    return levels


def dequantize_tokens(codes: Tensor, scale: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Undo :func:`quantize_tokens`, in fp32."""
    return level_of(codes, widths) * scale.float()


def _runs(widths: tuple[int, ...]) -> Iterator[tuple[int, slice]]:
    """Neighbouring plane groups of one width: ``(bits, channels)``."""
    first = 0
    for bits, planes in groupby(widths):
        end = first + LANES * len(list(planes))
        yield bits, slice(first, end)
        first = end
