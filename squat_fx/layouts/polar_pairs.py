"""Pairs of channels as a radius and an angle, with ranges per channel: ``polar/pairs``.

    radius = hypot(x_i, x_{i + d/2})                        the pairs that rotary embeddings turn
    angle  = atan2(x_{i + d/2}, x_i)
    scale  = (max - min) / 2**bits                          of each, by pair and group of tokens
    code   = clamp(floor((number - min) / scale), 0, 2**bits - 1)
    number'= min + (code + 1/2) * scale

(Wu et al., PolarQuant, NeurIPS 2025, section 3; ``d`` is ``head_dim``.) ``Format.widths`` are the
bits of a radius and of an angle. Angles go round: so that a cluster about zero is not taken for
both ends of the range, the circle of each pair and group is cut opposite to the mean direction of
its vectors, and angles are counted from the smallest after the cut, which is what is stored, in
``-pi .. pi``. A range of one number has scale 0 and is exact.

| arena | |
|---|---|
| ``qdata`` | uint8 ``[batch, heads, tokens, row_bytes]``, bit planes: radii, then angles, each in whole plane groups |
| ``scale`` | fp16 ``[batch, heads, token groups, head_dim]``: of the radii, then of the angles |
| ``zero_point`` | the same of the smallest numbers |
"""  # noqa: E501

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from squat_fx.layouts.base import Fixed, StoredLayout
from squat_fx.layouts.planes import LANES, PlaneLayout, num_planes, pack, plane_layout, unpack

if TYPE_CHECKING:
    from squat_fx.codecs.base import Codec
    from squat_fx.layouts.format import Format

LARGEST_HALF = 65504.0
SMALLEST_SCALE = 2.0**-24  # the smallest fp16; below it a scale is 0
TOKENS = 3  # dim of a group's tokens


class PolarPairs(StoredLayout):
    """See the module."""

    name: ClassVar[str] = "polar/pairs"
    packed: ClassVar[tuple[str, ...]] = ("qdata", "scale", "zero_point")
    values: ClassVar[str] = "planes/channel"

    def widths(self, head_dim: int, bits: float) -> tuple[int, ...]:
        """Of a radius and of an angle; the angle has the odd bit."""
        both = round(2 * bits)
        if abs(both - 2 * bits) > 1e-6:
            raise ValueError(
                f"a radius and an angle cannot average {bits:g} bits; "
                f"the nearest are {math.floor(2 * bits) / 2:g} and {math.ceil(2 * bits) / 2:g}"
            )
        return both // 2, both - both // 2

    def planes(self, fmt: Format) -> PlaneLayout:
        """Radii are the channels of the first half of the plane groups, angles of the second."""
        half = num_planes(fmt.head_dim // 2)
        widths = tuple(bits for bits in fmt.widths for _ in range(half))
        return plane_layout(2 * LANES * half, widths)

    def last_dim(self, fmt: Format, name: str) -> int:
        """The bytes of a token, and a parameter for each radius and each angle of a pair."""
        return self.planes(fmt).row_bytes if name == "qdata" else fmt.head_dim

    def describe(self, fmt: Format) -> str:
        """Radii and angles share a range along tokens."""
        return f"pair and {fmt.token_group} tokens"

    def quantize(
        self,
        x: Tensor,
        valid: Tensor | None,
        fmt: Format,
        codec: Codec,
        fixed: Fixed,
        feedback: Tensor | None = None,
        first_slot: int = 0,
        first_position: int | Tensor = 0,
    ) -> tuple[Tensor, ...]:
        """See :meth:`StoredLayout.quantize`."""
        pairs = x.float().unflatten(2, (-1, fmt.token_group)).unflatten(-1, (2, -1))
        if valid is not None:
            valid = valid.unflatten(1, (-1, fmt.token_group))[:, None, :, :, None]
            pairs = pairs.masked_fill(~valid[..., None], 0.0)
        radius = pairs.square().sum(-2).sqrt()
        angle = cut_angles(pairs[..., 0, :], pairs[..., 1, :], valid)
        padding = -(fmt.head_dim // 2) % LANES
        codes, scales, zero_points = [], [], []
        for number, bits in zip((radius, angle), fmt.widths, strict=True):
            code, scale, zero_point = round_to_cells(number, valid, bits)
            codes.append(F.pad(code.flatten(2, 3), (0, padding)))
            scales.append(scale.squeeze(TOKENS))
            zero_points.append(zero_point.squeeze(TOKENS))
        qdata = pack(torch.cat(codes, -1), self.planes(fmt).widths)
        return qdata, torch.cat(scales, -1), torch.cat(zero_points, -1)

    def dequantize(
        self,
        packed: tuple[Tensor, ...],
        fmt: Format,
        fixed: Fixed,
        first_position: int | Tensor = 0,
    ) -> Tensor:
        """See :meth:`StoredLayout.dequantize`."""
        qdata, scale, zero_point = packed
        planes, pairs = self.planes(fmt), fmt.head_dim // 2
        codes = unpack(qdata, planes.head_dim, planes.widths).unflatten(-1, (2, -1))[..., :pairs]
        codes = codes.flatten(-2).unflatten(2, (-1, fmt.token_group))
        numbers = zero_point.float()[:, :, :, None] + (codes + 0.5) * scale.float()[:, :, :, None]
        radius, angle = numbers.flatten(2, 3).chunk(2, -1)
        return torch.cat([radius * angle.cos(), radius * angle.sin()], -1)


def cut_angles(x: Tensor, y: Tensor, valid: Tensor | None) -> Tensor:
    """The angles of ``(x, y)`` ``[batch, heads, token groups, tokens, pairs]``, less than a turn
    above the smallest valid one of their group, which is in ``-pi .. pi``.

    ``x`` and ``y`` are zero where not ``valid``.
    """
    x, y = x.double(), y.double()  # so that the order of sums is nothing that is stored
    cut = torch.atan2(y.sum(TOKENS, keepdim=True), x.sum(TOKENS, keepdim=True)) - math.pi
    angle = cut + (torch.atan2(y, x) - cut).remainder(2 * math.pi)
    smallest, _ = value_range(angle, valid)
    return torch.where(smallest < -math.pi, angle + 2 * math.pi, angle).float()


def value_range(x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest valid number of each group; zeros where a group holds padding only."""
    if valid is None:
        return x.amin(TOKENS, keepdim=True), x.amax(TOKENS, keepdim=True)
    low = x.masked_fill(~valid, torch.inf).amin(TOKENS, keepdim=True)
    high = x.masked_fill(~valid, -torch.inf).amax(TOKENS, keepdim=True)
    empty = low > high
    return low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)


def round_to_cells(x: Tensor, valid: Tensor | None, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8), scales and smallest numbers (fp16) of ``2**bits`` cells of each group.

    The smallest number is rounded first, and cells reach from there to the largest.
    """
    low, high = value_range(x, valid)
    low = low.clamp(-LARGEST_HALF, LARGEST_HALF).half()
    scale = ((high - low.float()) / 2**bits).clamp(0.0, LARGEST_HALF).half()
    codes = (x - low.float()) / scale.float().clamp_min(SMALLEST_SCALE)
    return codes.floor_().clamp_(0, 2**bits - 1).to(torch.uint8), scale, low
