"""Bit planes with a scale and a zero point along one side of a tile and a factor along the other.

    y = x @ R                                            R the fixed rotation
    keys:    y'[t, c] = (code * scale[c] + zero_point[c]) * factor[t]
    values:  y'[t, c] = (code * scale[t] + zero_point[t]) * factor[c]
    x' = y' @ R.T

A tile is ``token_group`` tokens and all channels of a head. A channel group of 1 says that scales
belong to channels, as those of keys do; else all channels of a token share one.

| arena | where scales belong to channels | where they belong to tokens |
|---|---|---|
| ``qdata`` | uint8 ``[batch, heads, tokens, row_bytes]`` | the same |
| ``scale``, ``zero_point`` | fp16 ``[batch, heads, tiles, head_dim]`` | fp16 ``[batch, heads, tokens, 1]`` |
| ``factor`` | fp16 ``[batch, heads, tokens, 1]`` | fp16 ``[batch, heads, tiles, head_dim]`` |
"""  # noqa: E501

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from squat_fx.layouts.base import Fixed
from squat_fx.layouts.hadamard import rotation_pair
from squat_fx.layouts.planes import pack, unpack
from squat_fx.layouts.planes_channel import PlanesPerChannel

if TYPE_CHECKING:
    from squat_fx.codecs.base import Codec
    from squat_fx.layouts.format import Format


class PlanesDual(PlanesPerChannel):
    """See the module."""

    name: ClassVar[str] = "planes/dual"
    packed: ClassVar[tuple[str, ...]] = ("qdata", "scale", "zero_point", "factor")
    values: ClassVar[str] = "planes/dual"

    def last_dim(self, fmt: Format, name: str) -> int:
        """The bytes of a token; a number for each channel of a tile, or one for a token."""
        if name == "qdata":
            return self.planes(fmt).row_bytes
        return fmt.head_dim if _of_tiles(fmt, name) else 1

    def tokens_per_slot(self, fmt: Format, name: str) -> int:
        """Numbers of channels are those of a tile."""
        return fmt.token_group if _of_tiles(fmt, name) else 1

    def describe(self, fmt: Format) -> str:
        """The tile."""
        return f"tile of {fmt.token_group} tokens"

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
        """Balanced and rounded by the codec, tile by tile, in the rotated frame."""
        rotated = x.float() @ rotation_pair(fmt.head_dim, x.device)[0]
        tiles = rotated.unflatten(2, (-1, fmt.token_group))
        if valid is None:
            keep = torch.ones_like(tiles[:, :1, :, :, :1], dtype=torch.bool)
        else:
            keep = valid.unflatten(1, (-1, fmt.token_group))[:, None, :, :, None]
            tiles = tiles.masked_fill(~keep, 0.0)
        per_channel = fmt.channel_group == 1

        def grouped(tensor: Tensor) -> Tensor:
            """Dims 3 and 5 share a scale."""
            return tensor[..., None] if per_channel else tensor.flatten(2, 3)[:, :, :, None, None]

        factor = codec.balance(tiles, keep, per_channel).half()
        seen = None if valid is None else grouped(keep)
        codes, *scales = codec.quantize(grouped(tiles / factor.float()), seen, fmt.widths[0])
        parameters = (
            numbers.reshape(*x.shape[:2], -1, self.last_dim(fmt, name))
            for name, numbers in zip(self.packed[1:], (*scales, factor), strict=True)
        )
        return pack(codes.reshape(x.shape), fmt.widths), *parameters

    def dequantize(
        self,
        packed: tuple[Tensor, ...],
        fmt: Format,
        fixed: Fixed,
        first_position: int | Tensor = 0,
    ) -> Tensor:
        """See :meth:`StoredLayout.dequantize`."""
        codes = unpack(packed[0], fmt.head_dim, fmt.widths).unflatten(2, (-1, fmt.token_group))
        scale, zero_point, factor = (
            numbers.float()[:, :, :, None]
            if _of_tiles(fmt, name)
            else numbers.float().unflatten(2, (-1, fmt.token_group))
            for name, numbers in zip(self.packed[1:], packed[1:], strict=True)
        )
        rotated = ((codes.float() * scale + zero_point) * factor).flatten(2, 3)
        return rotated @ rotation_pair(fmt.head_dim, rotated.device)[1]

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


def _of_tiles(fmt: Format, name: str) -> bool:
    """Whether an arena has a number for each channel of a tile."""
    return name != "qdata" and (name == "factor") != (fmt.channel_group == 1)
