"""KIVI: keys per channel, values per token, min-max rounding (Liu et al., ICML 2024, section 3).

    scale = (max - min) / (2**bits - 1)
    zero_point = min
    code = round((x - zero_point) / scale)

Keys carry a few channels with large magnitudes, so a key group runs along tokens inside one
channel; values do not, so a value group runs along channels inside one token. Scale and zero point
are rounded to fp16 *before* the codes are computed: what is stored is what was quantized with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from squat_fx.codecs.base import Codec, PerChannel, PerToken, Role

GROUP_DIMS = (3, 5)
SMALLEST_SCALE = 1e-6  # a constant group gets this step, and code 0
LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class Kivi(Codec):
    """Round each group to ``2**bits`` levels between its minimum and its maximum.

    Attributes:
        group_size: tokens of one channel (keys) or channels of one token (values) that share a
            scale; 32, 64 or 128. Scale and zero point add ``32 / group_size`` bits per element.
    """

    name: ClassVar[str] = "kivi"
    layout: ClassVar[str] = "planes/channel"
    summary: ClassVar[str] = "min-max rounding, keys per channel, values per token"
    paper: ClassVar[str] = "Liu et al., KIVI, ICML 2024"

    group_size: int = 32

    def __post_init__(self) -> None:
        if self.group_size not in (32, 64, 128):
            raise ValueError(f"group_size must be 32, 64 or 128, got {self.group_size}")

    def granularity(self, role: Role) -> PerChannel | PerToken:
        """Keys share a scale along tokens, values along channels."""
        return PerChannel(self.group_size) if role == "key" else PerToken(self.group_size)

    def quantize(
        self, groups: Tensor, valid: Tensor | None, bits: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`squat_fx.codecs.base.Codec.quantize`."""
        low, high = value_range(groups, valid)
        return round_to_levels(groups, low, high, bits)


def value_range(groups: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest valid number of each group; zero where a group holds padding only."""
    if valid is None:
        return groups.amin(GROUP_DIMS, keepdim=True), groups.amax(GROUP_DIMS, keepdim=True)
    low = groups.masked_fill(~valid, torch.inf).amin(GROUP_DIMS, keepdim=True)
    high = groups.masked_fill(~valid, -torch.inf).amax(GROUP_DIMS, keepdim=True)
    empty = low > high
    return low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)


def round_to_levels(
    groups: Tensor, low: Tensor, high: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point of ``2**bits`` evenly spaced levels from ``low`` to ``high``."""
    levels = 2**bits - 1
    zero_point = low.clamp(-LARGEST_HALF, LARGEST_HALF).half()
    scale = ((high - low) / levels).clamp(SMALLEST_SCALE, LARGEST_HALF).half()
    codes = ((groups - zero_point.float()) / scale.float()).round_().clamp_(0, levels)
    return codes.to(torch.uint8), scale, zero_point
