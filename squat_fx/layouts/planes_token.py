"""Bit planes with one scale per token, in a frame that mixes the channels: ``planes/token``.

    y = ((x - offset) / factor) @ basis      the fixed rotation unless there is a basis
    codes and scale                          :mod:`squat_fx.layouts.symmetric`

| arena | |
|---|---|
| ``qdata`` | uint8 ``[batch, heads, tokens, row_bytes]``, :mod:`squat_fx.layouts.planes` |
| ``scale`` | fp16 ``[batch, heads, tokens, 1]`` |
| ``affine`` | fp16 ``[batch, heads, 2 or 0, head_dim]``: offsets and factors |
| ``basis`` | fp32 ``[2, heads, head_dim, head_dim]``, a matrix and its inverse, of the model; ``[2, heads, 0, 0]``: the fixed rotation |
"""  # noqa: E501

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from squat_fx.layouts.base import Fixed, StoredLayout
from squat_fx.layouts.hadamard import rotation_pair
from squat_fx.layouts.planes import PlaneLayout, pack, plane_layout, unpack
from squat_fx.layouts.symmetric import dequantize_tokens, quantize_tokens

if TYPE_CHECKING:
    from squat_fx.codecs.base import Codec
    from squat_fx.layouts.format import Format


class PlanesPerToken(StoredLayout):
    """See the module."""

    name: ClassVar[str] = "planes/token"
    packed: ClassVar[tuple[str, ...]] = ("qdata", "scale")
    fixed: ClassVar[tuple[str, ...]] = ("affine", "basis")
    given: ClassVar[str | None] = "basis"
    shared: ClassVar[tuple[str, ...]] = ("basis",)
    values: ClassVar[str] = "planes/token"

    def planes(self, fmt: Format) -> PlaneLayout:
        """Every plane group has a width of its own."""
        return plane_layout(fmt.head_dim, fmt.widths)

    def last_dim(self, fmt: Format, name: str) -> int:
        """The bytes of a token, and its scale."""
        return self.planes(fmt).row_bytes if name == "qdata" else 1

    def dtype(self, fmt: Format, name: str, dtype: torch.dtype) -> torch.dtype:
        """A basis is fp32."""
        return torch.float32 if name == "basis" else super().dtype(fmt, name, dtype)

    def fixed_shape(self, fmt: Format, name: str, batch: int, heads: int) -> tuple[int, ...]:
        """Offsets and factors, or nothing; no basis."""
        return (2, heads, 0, 0) if name == "basis" else (batch, heads, 2 * fmt.affine, fmt.head_dim)

    def empty_fixed(self, fmt: Format, name: str, like: Tensor) -> Tensor:
        """Offsets are zeros and factors ones."""
        arena = super().empty_fixed(fmt, name, like)
        if name == "affine":
            arena[:, :, 1:] = 1.0
        return arena

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
        """Rounded in the latent frame; no token depends on another, padding or not."""
        latent = to_latent(x, fixed.get("affine"), fixed.get("basis"))
        kept = fmt.unbiased, fmt.latent
        codes, scale = quantize_tokens(latent, fmt.widths, feedback, first_slot, *kept)
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
        latent = dequantize_tokens(codes, packed[1], fmt.widths)
        return from_latent(latent, fixed.get("affine"), fixed.get("basis"))


def basis_pair(basis: Tensor | None, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The matrix that takes tokens into the latent frame and its inverse, ``[heads or 1, head_dim,
    head_dim]``; the fixed rotation unless there is a basis.
    """
    if basis is None or not basis.numel():
        basis = rotation_pair(head_dim, device)
    return basis[0], basis[1]


def to_latent(x: Tensor, affine: Tensor | None, basis: Tensor | None) -> Tensor:
    """``(x - offset) / factor @ basis``, fp32: the frame in which ``planes/token`` rounds."""
    x = x.float()
    if affine is not None and affine.numel():
        x = (x - affine[:, :, :1].float()) / affine[:, :, 1:].float()
    return x @ basis_pair(basis, x.shape[-1], x.device)[0]


def from_latent(y: Tensor, affine: Tensor | None, basis: Tensor | None) -> Tensor:
    """Undo :func:`to_latent`."""
    x = y @ basis_pair(basis, y.shape[-1], y.device)[1]
    if affine is None or not affine.numel():
        return x
    return x * affine[:, :, 1:].float() + affine[:, :, :1].float()
