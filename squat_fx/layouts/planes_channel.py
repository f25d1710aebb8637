"""Bit planes with a scale and a zero point per group of tokens and channels: ``planes/channel``.

Keys share them along ``token_group`` tokens of a channel, values along ``channel_group`` channels
of a token. The codec says how a group becomes codes (:meth:`squat_fx.codecs.base.Codec.quantize`).

| arena | |
|---|---|
| ``qdata`` | uint8 ``[batch, heads, tokens, row_bytes]``, :mod:`squat_fx.layouts.planes` |
| ``scale``, ``zero_point`` | fp16 ``[batch, heads, tokens / token_group, channel_groups]`` |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from squat_fx.layouts.base import Fixed, StoredLayout
from squat_fx.layouts.planes import LANES, PlaneLayout, pack, plane_layout, spread_widths, unpack

if TYPE_CHECKING:
    from squat_fx.codecs.base import Codec
    from squat_fx.layouts.format import Format


class PlanesPerChannel(StoredLayout):
    """See the module."""

    name: ClassVar[str] = "planes/channel"
    packed: ClassVar[tuple[str, ...]] = ("qdata", "scale", "zero_point")
    values: ClassVar[str] = "planes/channel"
    whole_bits: ClassVar[bool] = True

    def widths(self, head_dim: int, bits: float) -> tuple[int, ...]:
        """The same for all channels."""
        widths = spread_widths(head_dim, bits)
        if len(set(widths)) > 1:
            raise ValueError(
                f"the layout {self.name!r} gives all channels the same width, got {bits:g} bits; "
                f"the nearest are {min(widths)} and {max(widths)}"
            )
        return widths

    def planes(self, fmt: Format) -> PlaneLayout:
        """All plane groups have the same width."""
        return plane_layout(fmt.head_dim, fmt.widths)

    def last_dim(self, fmt: Format, name: str) -> int:
        """The bytes of a token, and the scales of a token group."""
        return self.planes(fmt).row_bytes if name == "qdata" else fmt.channel_groups

    def describe(self, fmt: Format) -> str:
        """Keys per tokens, values per channels."""
        if fmt.token_group > 1:
            return f"{fmt.token_group} tokens"
        return f"{fmt.channel_group} channels"

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
        """Rounded by the codec, group by group."""
        if valid is not None:
            valid = valid.unflatten(1, (-1, fmt.token_group))[:, None, :, :, None, None]
        x = x.float()
        if feedback is None:
            codes, scale, zero_point = codec.quantize(grouped(x, fmt), valid, fmt.widths[0])
            codes = codes.flatten(-2)[..., : fmt.head_dim].flatten(2, 3)
        else:
            codes, scale, zero_point = _quantize_with_feedback(x, valid, fmt, codec, feedback)
        parameters = (p.squeeze(5).squeeze(3) for p in (scale, zero_point))
        return pack(codes, fmt.widths), *parameters

    def dequantize(
        self,
        packed: tuple[Tensor, ...],
        fmt: Format,
        fixed: Fixed,
        first_position: int | Tensor = 0,
    ) -> Tensor:
        """See :meth:`StoredLayout.dequantize`."""
        qdata, scale, zero_point = packed
        codes = unpack(qdata, fmt.head_dim, fmt.widths).float()
        numbers = _times_and_plus(grouped(codes, fmt), scale, zero_point)
        return numbers.flatten(-2)[..., : fmt.head_dim].flatten(2, 3)

    def dequantize_into(
        self,
        packed: tuple[Tensor, ...],
        fmt: Format,
        fixed: Fixed,
        out: Tensor,
        first_position: int | Tensor = 0,
    ) -> Tensor:
        """Without memory beside ``out`` where its numbers are fp32 in whole groups."""
        if out.dtype != torch.float32 or fmt.head_dim % fmt.channel_group:
            return super().dequantize_into(packed, fmt, fixed, out, first_position)
        qdata, scale, zero_point = packed
        codes = unpack(qdata, fmt.head_dim, fmt.widths, out)
        _times_and_plus(grouped(codes, fmt), scale, zero_point)
        return out


def grouped(x: Tensor, fmt: Format) -> Tensor:
    """``[batch, heads, token groups, tokens, channel groups, channels]``; a ragged last channel
    group repeats its end.
    """
    if ragged := fmt.channel_groups * fmt.channel_group - fmt.head_dim:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], ragged)], -1)
    return x.unflatten(-1, (-1, fmt.channel_group)).unflatten(2, (-1, fmt.token_group))


def _times_and_plus(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """In place: ``codes`` as :func:`grouped` gives them, parameters ``[batch, heads, token groups,
    channel groups]``.
    """
    scale, zero_point = (p.float()[:, :, :, None, :, None] for p in (scale, zero_point))
    return codes.mul_(scale).add_(zero_point)


def _quantize_with_feedback(
    x: Tensor, valid: Tensor | None, fmt: Format, codec: Codec, feedback: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Plane group by plane group; each error goes into the channels after it."""
    x = x.clone()
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for first in range(0, fmt.head_dim, LANES):
        block, later = slice(first, first + LANES), slice(first + LANES, fmt.head_dim)
        found = codec.quantize(grouped(x[..., block], fmt), valid, fmt.widths[0])
        parts.append(found)
        codes, scale, zero_point = found
        rounded = (codes.float() * scale.float() + zero_point.float()).flatten(-2).flatten(2, 3)
        x[..., later] += (rounded - x[..., block]) @ feedback[..., block, later]
    codes, scale, zero_point = (torch.cat(part, 4) for part in zip(*parts, strict=True))
    return codes.flatten(-2).flatten(2, 3), scale, zero_point
