"""Rotated tokens as a radius and 15 angles for every 16 channels: ``polar/token``.

    y = x @ R                       the fixed rotation, :mod:`squat_fx.layouts.hadamard`
    radius and codes of each block  :mod:`squat_fx.layouts.polar_tree`

``Format.widths`` are the bits of an angle of each of the four levels. The codebooks are those of
Gaussian numbers unless the codec learns others of a prompt.

| arena | |
|---|---|
| ``qdata`` | uint8 ``[batch, heads, tokens, row_bytes]``: all angles of a token |
| ``radius`` | fp16 ``[batch, heads, tokens, blocks]`` |
| ``codebook`` | fp16 ``[batch, heads, 2, entries]``: cosines of its angles, level by level, then sines |
"""  # noqa: E501

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from squat_fx.layouts import polar_tree
from squat_fx.layouts.base import Fixed, StoredLayout
from squat_fx.layouts.hadamard import rotation_pair

if TYPE_CHECKING:
    from squat_fx.codecs.base import Codec
    from squat_fx.layouts.format import Format

WIDTHS = {
    3.375: (3, 2, 2, 2),
    3.875: (4, 2, 2, 2),
    4.25: (4, 3, 3, 2),
}
"""Bits of each level, by the bits of a number that they and the radius come to."""


class PolarPerToken(StoredLayout):
    """See the module."""

    name: ClassVar[str] = "polar/token"
    packed: ClassVar[tuple[str, ...]] = ("qdata", "radius")
    fixed: ClassVar[tuple[str, ...]] = ("codebook",)
    values: ClassVar[str] = "polar/token"

    def widths(self, head_dim: int, bits: float) -> tuple[int, ...]:
        """Of each level."""
        if bits not in WIDTHS:
            *others, last = WIDTHS
            nearest = min(WIDTHS, key=lambda choice: abs(choice - bits))
            raise ValueError(
                f"the layout {self.name!r} takes {', '.join(f'{x:g}' for x in others)} or {last:g} "
                f"bits a number, its radius among them, got {bits:g}; the nearest is {nearest:g}"
            )
        return WIDTHS[bits]

    def last_dim(self, fmt: Format, name: str) -> int:
        """The bytes of a token's angles, and its radii."""
        if name == "qdata":
            return polar_tree.row_bytes(fmt.head_dim, fmt.widths)
        return polar_tree.num_blocks(fmt.head_dim)

    def bits(self, fmt: Format) -> float:
        """Of a number in a whole block: the radius is as much a code as the angles are."""
        return (polar_tree.block_bits(fmt.widths) + 16) / polar_tree.BLOCK

    def describe(self, fmt: Format) -> str:
        """A radius belongs to a block."""
        return f"{polar_tree.BLOCK} channels"

    def fixed_shape(self, fmt: Format, name: str, batch: int, heads: int) -> tuple[int, ...]:
        """Cosines and sines of all centroids."""
        return batch, heads, 2, polar_tree.entries(fmt.widths)

    def empty_fixed(self, fmt: Format, name: str, like: Tensor) -> Tensor:
        """The codebooks of Gaussian numbers."""
        arena = super().empty_fixed(fmt, name, like)
        books = polar_tree.codebooks(fmt.widths, arena.device)
        return arena.copy_(polar_tree.cosines_and_sines(books))

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
        """See :meth:`StoredLayout.quantize`; no token depends on another, padding or not."""
        cosines, sines = fixed["codebook"].float().unbind(2)
        latent = to_latent(x)
        return polar_tree.quantize_blocks(latent, cosines, sines, fmt.widths)

    def dequantize(
        self,
        packed: tuple[Tensor, ...],
        fmt: Format,
        fixed: Fixed,
        first_position: int | Tensor = 0,
    ) -> Tensor:
        """See :meth:`StoredLayout.dequantize`."""
        qdata, radius = packed
        cosines, sines = fixed["codebook"].float().unbind(2)
        latent = polar_tree.dequantize_blocks(qdata, radius, cosines, sines, fmt.widths)
        return latent[..., : fmt.head_dim] @ rotation_pair(fmt.head_dim, qdata.device)[1]


def to_latent(x: Tensor) -> Tensor:
    """``x @ R``, fp32: the frame in which tokens are rounded."""
    return x.float() @ rotation_pair(x.shape[-1], x.device)[0]
