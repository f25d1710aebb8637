"""Rotated tokens as a radius and 15 angles for every 16 channels: ``polar/token``.

    y = x @ R                       the fixed rotation, :mod:`squat_fx.layouts.hadamard`
    radius and codes of each block  :mod:`squat_fx.layouts.polar_tree`

``Format.widths`` are the bits of an angle of each of the four levels. The codebooks are those of
Gaussian numbers, the same for everything; ``polar/fitted`` has codebooks for each head and sequence
beside them, stored as cosines and sines.

| arena | |
|---|---|
| ``qdata`` | uint8 ``[batch, heads, tokens, row_bytes]``: all angles of a token |
| ``radius`` | fp16 ``[batch, heads, tokens, blocks]`` |
| ``codebook`` | fp32 ``[batch, heads, 2, entries]``, in ``polar/fitted``: cosines, then sines, level by level |
"""  # noqa: E501

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
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

    def tables(self, fmt: Format) -> tuple[tuple[float, ...], ...]:
        """The cosines of each level's codebook."""
        books = (polar_tree.codebook(level, bits) for level, bits in enumerate(fmt.widths, 1))
        return tuple(tuple(math.cos(angle) for angle in book) for book in books)

    def cosines_and_sines(self, fmt: Format, fixed: Fixed, device: torch.device) -> Tensor:
        """Of all centroids, fp32 ``[batch or 1, heads or 1, 2, entries]``."""
        return shared_codebook(fmt.widths, device)

    def quantize(
        self,
        x: Tensor,
        valid: Tensor | None,
        fmt: Format,
        codec: Codec,
        fixed: Fixed,
        feedback: Tensor | None = None,
        first_slot: int = 0,
    ) -> tuple[Tensor, ...]:
        """See :meth:`StoredLayout.quantize`; no token depends on another, padding or not."""
        cosines, sines = self.cosines_and_sines(fmt, fixed, x.device).unbind(2)
        latent = to_latent(x)
        return polar_tree.quantize_blocks(latent, cosines, sines, fmt.widths)

    def dequantize(self, packed: tuple[Tensor, ...], fmt: Format, fixed: Fixed) -> Tensor:
        """See :meth:`StoredLayout.dequantize`."""
        qdata, radius = packed
        cosines, sines = self.cosines_and_sines(fmt, fixed, qdata.device).unbind(2)
        latent = polar_tree.dequantize_blocks(qdata, radius, cosines, sines, fmt.widths)
        return latent[..., : fmt.head_dim] @ rotation_pair(fmt.head_dim, qdata.device)[1]


class PolarFitted(PolarPerToken):
    """The same with codebooks of each head's own angles."""

    name: ClassVar[str] = "polar/fitted"
    fixed: ClassVar[tuple[str, ...]] = ("codebook",)
    values: ClassVar[str] = "polar/fitted"

    def dtype(self, fmt: Format, name: str, dtype: torch.dtype) -> torch.dtype:
        """A codebook is fp32."""
        return torch.float32 if name == "codebook" else super().dtype(fmt, name, dtype)

    def fixed_shape(self, fmt: Format, name: str, batch: int, heads: int) -> tuple[int, ...]:
        """Cosines and sines of all centroids."""
        return batch, heads, 2, polar_tree.entries(fmt.widths)

    def empty_fixed(self, fmt: Format, name: str, like: Tensor) -> Tensor:
        """The codebooks of Gaussian numbers, until there are others."""
        arena = super().empty_fixed(fmt, name, like)
        return arena.copy_(shared_codebook(fmt.widths, arena.device))

    def tables(self, fmt: Format) -> tuple[tuple[float, ...], ...]:
        """None: kernels read the arena."""
        return ()

    def cosines_and_sines(self, fmt: Format, fixed: Fixed, device: torch.device) -> Tensor:
        """The arena."""
        return fixed["codebook"]


def shared_codebook(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """Cosines and sines of the codebooks of Gaussian numbers, fp32 ``[1, 1, 2, entries]``."""
    return polar_tree.cosines_and_sines(polar_tree.codebooks(widths, device))[None, None]


def to_latent(x: Tensor) -> Tensor:
    """``x @ R``, fp32: the frame in which tokens are rounded."""
    return x.float() @ rotation_pair(x.shape[-1], x.device)[0]
