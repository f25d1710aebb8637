"""Bit planes of Lloyd-Max levels with one scale per token, rotated: ``levels/token``.

    y = x @ R                the fixed rotation, :mod:`squat_fx.layouts.hadamard`
    codes and scale          :mod:`squat_fx.layouts.levels`

| arena | |
|---|---|
| ``qdata`` | uint8 ``[batch, heads, tokens, row_bytes]``, :mod:`squat_fx.layouts.planes` |
| ``scale`` | fp16 ``[batch, heads, tokens, 1]`` |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from squat_fx.layouts.base import Fixed, StoredLayout
from squat_fx.layouts.hadamard import rotation_pair
from squat_fx.layouts.levels import WIDTHS, dequantize_tokens, quantize_tokens
from squat_fx.layouts.planes import PlaneLayout, pack, plane_layout, unpack

if TYPE_CHECKING:
    from squat_fx.codecs.base import Codec
    from squat_fx.layouts.format import Format

LARGEST_NUMBER = 2.0**48  # no scale reaches it by far, and sums of its squares fit fp32


class LevelsPerToken(StoredLayout):
    """See the module. ``Format.widths`` has 1 to 4 bits for each plane group."""

    name: ClassVar[str] = "levels/token"
    packed: ClassVar[tuple[str, ...]] = ("qdata", "scale")
    values: ClassVar[str] = "levels/token"

    def widths(self, head_dim: int, bits: float) -> tuple[int, ...]:
        """Of each plane group, where there are levels of such a width."""
        if not WIDTHS[0] <= bits <= WIDTHS[-1]:
            nearest = WIDTHS[0] if bits < WIDTHS[0] else WIDTHS[-1]
            raise ValueError(
                f"the layout {self.name!r} has levels for {WIDTHS[0]} to {WIDTHS[-1]} bits, "
                f"got {bits:g}; the nearest is {nearest}"
            )
        return super().widths(head_dim, bits)

    def planes(self, fmt: Format) -> PlaneLayout:
        """Every plane group has a width of its own."""
        return plane_layout(fmt.head_dim, fmt.widths)

    def last_dim(self, fmt: Format, name: str) -> int:
        """The bytes of a token, and its scale."""
        return self.planes(fmt).row_bytes if name == "qdata" else 1

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
        """Rounded in the rotated frame; padding is zeros. A codec with ``norm_correction=False``
        stores the scale without it.
        """
        x = x.float().clamp(-LARGEST_NUMBER, LARGEST_NUMBER)
        if valid is not None:
            x = x.masked_fill(~valid[:, None, :, None], 0.0)
        there = rotation_pair(fmt.head_dim, x.device)[0]
        correct = getattr(codec, "norm_correction", True)
        codes, scale = quantize_tokens(x @ there, fmt.widths, correct)
        return pack(codes, fmt.widths), scale

    def dequantize(
        self,
        packed: tuple[Tensor, ...],
        fmt: Format,
        fixed: Fixed,
        first_position: int | Tensor = 0,
    ) -> Tensor:
        """See :meth:`StoredLayout.dequantize`."""
        codes = unpack(packed[0], fmt.head_dim, fmt.widths)
        back = rotation_pair(fmt.head_dim, codes.device)[1]
        return dequantize_tokens(codes, packed[1], fmt.widths) @ back
