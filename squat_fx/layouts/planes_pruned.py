"""Bit planes of some channels of a head, chosen once: ``planes/pruned``, for keys.

    x'[t, channels[i]] = code[t, i] * scale[i] + zero_point[i]        zero in all other channels

As ``planes/channel`` with a scale per channel, of the kept channels alone: as many plane groups as
``Format.widths`` has, or all channels where those are more than the head has.

| arena | |
|---|---|
| ``qdata`` | uint8 ``[batch, heads, tokens, row_bytes]``, planes of the kept channels |
| ``scale``, ``zero_point`` | fp16 ``[batch, heads, token groups, kept]`` |
| ``channels`` | int16 ``[batch, heads, 1, kept]``, ascending: which channels they are |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from squat_fx.layouts.base import Fixed
from squat_fx.layouts.planes import LANES, PlaneLayout, pack, plane_layout, unpack
from squat_fx.layouts.planes_channel import PlanesPerChannel

if TYPE_CHECKING:
    from squat_fx.codecs.base import Codec
    from squat_fx.layouts.format import Format


class PlanesPruned(PlanesPerChannel):
    """See the module."""

    name: ClassVar[str] = "planes/pruned"
    fixed: ClassVar[tuple[str, ...]] = ("channels",)
    values: ClassVar[str] = "planes/channel"

    def planes(self, fmt: Format) -> PlaneLayout:
        """Those of the kept channels."""
        return plane_layout(kept_channels(fmt), fmt.widths)

    def last_dim(self, fmt: Format, name: str) -> int:
        """The bytes of a token, and the scales of a token group."""
        return self.planes(fmt).row_bytes if name == "qdata" else kept_channels(fmt)

    def dtype(self, fmt: Format, name: str, dtype: torch.dtype) -> torch.dtype:
        """Channels are int16."""
        return torch.int16 if name == "channels" else super().dtype(fmt, name, dtype)

    def fixed_shape(self, fmt: Format, name: str, batch: int, heads: int) -> tuple[int, ...]:
        """The kept channels of each head."""
        return batch, heads, 1, kept_channels(fmt)

    def empty_fixed(self, fmt: Format, name: str, like: Tensor) -> Tensor:
        """The first channels."""
        arena = super().empty_fixed(fmt, name, like)
        return arena.copy_(torch.arange(arena.shape[-1], device=like.device))

    def describe(self, fmt: Format) -> str:
        """Tokens, and how many channels there are."""
        return f"{fmt.token_group} tokens of {kept_channels(fmt)} channels"

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
        """The kept channels, rounded by the codec."""
        channels = fixed["channels"].long().expand(-1, -1, x.shape[2], -1)
        groups = x.gather(3, channels).float().unflatten(2, (-1, fmt.token_group))[..., None]
        if valid is not None:
            valid = valid.unflatten(1, (-1, fmt.token_group))[:, None, :, :, None, None]
        codes, scale, zero_point = codec.quantize(groups, valid, fmt.widths[0])
        parameters = (p.squeeze(5).squeeze(3) for p in (scale, zero_point))
        return pack(codes.squeeze(5).flatten(2, 3), fmt.widths), *parameters

    def dequantize(
        self,
        packed: tuple[Tensor, ...],
        fmt: Format,
        fixed: Fixed,
        first_position: int | Tensor = 0,
    ) -> Tensor:
        """See :meth:`StoredLayout.dequantize`."""
        qdata, scale, zero_point = packed
        codes = unpack(qdata, kept_channels(fmt), fmt.widths).float()
        groups = codes.unflatten(2, (-1, fmt.token_group))
        groups = groups.mul_(scale.float()[:, :, :, None]).add_(zero_point.float()[:, :, :, None])
        kept = groups.flatten(2, 3)
        out = kept.new_zeros((*kept.shape[:3], fmt.head_dim))
        return out.scatter_(3, fixed["channels"].long().expand_as(kept), kept)

    def dequantize_into(
        self,
        packed: tuple[Tensor, ...],
        fmt: Format,
        fixed: Fixed,
        out: Tensor,
        first_position: int | Tensor = 0,
    ) -> Tensor:
        """The same into ``out``, of any float dtype."""
        return out.copy_(self.dequantize(packed, fmt, fixed, first_position))


def kept_channels(fmt: Format) -> int:
    """How many channels are stored."""
    return min(LANES * len(fmt.widths), fmt.head_dim)
