"""Latent codes of keys before their rotary embedding: ``latent/rope``.

    x = turned back by the angle of its position
    latent = (x - center) @ basis.T                           as many numbers as the basis has rows
    code = round((latent - zero_point) / scale)             0 .. 2**bits - 1, bits by plane group
    x' = (code * scale + zero_point) @ basis + center       turned by the angle of its position

``Format.widths`` are the bits of each plane group of 16 latent channels, never more than those of
the group before; the groups without bits are not stored, and the basis has no rows for them.

A key is turned back and forth by ``position * frequency``, where position counts from the first
token that was fed, padding included, and need not be the one that the model counts. Turning is
undone exactly by turning back, so whatever the angles are, what is read is the key after the
model's embedding. Where the model's positions go up by one along a row, as they do in prompts,
behind left padding and in generation, both angles differ by one fixed rotation of the row, which
changes no singular value and which center and basis take in: codes are those of the key before its
embedding. So no position is stored, a decode graph need not be read for its rotation, and keys
between which positions jump are rounded worse but come back right. ``Format.details`` are how many
channels turn (0: none, and keys stay as the model cached them) and whether pairs are neighbours.

| arena | |
|---|---|
| ``qdata`` | uint8 ``[batch, heads, tokens, row_bytes]``, planes of the latent channels |
| ``basis`` | fp16 ``[batch, heads, latent, head_dim]``, orthonormal rows |
| ``scale``, ``zero_point`` | fp32 ``[batch, heads, 1, latent]`` |
| ``center`` | fp32 ``[batch, heads, 1, head_dim]`` |
| ``frequency`` | fp32 ``[batch, heads, 1, pairs]``: radians from token to token |
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from squat_fx.layouts.base import Fixed, StoredLayout, positions_from
from squat_fx.layouts.planes import LANES, PlaneLayout, pack, plane_layout, unpack
from squat_fx.layouts.rotary import Rotation

if TYPE_CHECKING:
    from squat_fx.codecs.base import Codec
    from squat_fx.layouts.format import Format

SMALLEST_SCALE = 1e-30  # a range of one number has codes 0


class LatentRope(StoredLayout):
    """See the module."""

    name: ClassVar[str] = "latent/rope"
    packed: ClassVar[tuple[str, ...]] = ("qdata",)
    fixed: ClassVar[tuple[str, ...]] = ("basis", "scale", "zero_point", "center", "frequency")
    given: ClassVar[str | None] = "frequency"
    values: ClassVar[str] = "planes/channel"
    positional: ClassVar[bool] = True

    def planes(self, fmt: Format) -> PlaneLayout:
        """Those of the latent channels."""
        return plane_layout(num_latent(fmt), latent_widths(fmt))

    def last_dim(self, fmt: Format, name: str) -> int:
        """The bytes of a token."""
        return self.planes(fmt).row_bytes

    def dtype(self, fmt: Format, name: str, dtype: torch.dtype) -> torch.dtype:
        """Only the basis is long."""
        if name in ("qdata", "basis"):
            return super().dtype(fmt, name, dtype)
        return torch.float32

    def fixed_shape(self, fmt: Format, name: str, batch: int, heads: int) -> tuple[int, ...]:
        """See the module."""
        sizes = {
            "basis": (num_latent(fmt), fmt.head_dim),
            "center": (1, fmt.head_dim),
            "frequency": (1, rotary_dim(fmt) // 2),
        }
        return (batch, heads, *sizes.get(name, (1, num_latent(fmt))))

    def place_given(self, fmt: Format, given: Tensor, like: Tensor) -> Tensor:
        """Of radians from token to token: a number for each pair, or such an arena."""
        arena = self.empty_fixed(fmt, "frequency", like)
        return arena.copy_(given.reshape(-1)[: arena.shape[-1]])

    def with_rotation(self, fmt: Format, rotation: Rotation) -> Format:
        """Keys are turned back as ``rotation`` says; its sign is that of the angles given."""
        details = (rotation.rotary_dim, int(rotation.pairing == "interleaved"))
        return replace(fmt, details=details + fmt.details[len(details) :])

    def describe(self, fmt: Format) -> str:
        """Which channels they are."""
        before = " before rotary embedding" if rotary_dim(fmt) else ""
        return f"latent channel, {num_latent(fmt)} of {fmt.head_dim}{before}"

    def to_frame(self, x: Tensor, fmt: Format, fixed: Fixed) -> Tensor:
        """Keys turned back, fp32."""
        return turned(x, fmt, fixed, positions_from(0, x.shape[2], x.device), back=True)

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
        """Ranges are fixed: no token depends on another, padding or not."""
        position = positions_from(first_position, x.shape[2], x.device)
        x = turned(x, fmt, fixed, position, back=True) - fixed["center"]
        latent = x @ fixed["basis"].float().transpose(-1, -2)
        scale = fixed["scale"].clamp_min(SMALLEST_SCALE)
        codes = ((latent - fixed["zero_point"]) / scale).round_().nan_to_num_(0.0).clamp_(min=0.0)
        codes = codes.minimum(largest_codes(fmt, x.device)).to(torch.uint8)
        return (pack(codes, latent_widths(fmt)),)

    def dequantize(
        self,
        packed: tuple[Tensor, ...],
        fmt: Format,
        fixed: Fixed,
        first_position: int | Tensor = 0,
    ) -> Tensor:
        """See :meth:`StoredLayout.dequantize`."""
        qdata = packed[0]
        position = positions_from(first_position, qdata.shape[2], qdata.device)
        return from_codes(qdata, fmt, fixed, position)


def from_codes(qdata: Tensor, fmt: Format, fixed: Fixed, position: Tensor) -> Tensor:
    """Keys of stored tokens ``[batch, heads, tokens, row_bytes]`` at ``position``, fp32."""
    codes = unpack(qdata, num_latent(fmt), latent_widths(fmt)).float()
    latent = codes * fixed["scale"] + fixed["zero_point"]
    x = latent @ fixed["basis"].float() + fixed["center"]
    return turned(x, fmt, fixed, position)


def turned(x: Tensor, fmt: Format, fixed: Fixed, position: Tensor, back: bool = False) -> Tensor:
    """``x`` turned by the angles of ``position``, which broadcasts to ``[batch, heads, tokens]``,
    or by minus those, fp32.

    Of an angle fp32 keeps what is left of whole turns, so that kernels find the same.
    """
    x = x.float()
    if not rotary_dim(fmt):
        return x
    turns = position.float()[..., None] * (fixed["frequency"] * (0.5 / math.pi))
    angle = (turns - (turns + 0.5).floor()) * (2 * math.pi)
    pairing = "interleaved" if is_interleaved(fmt) else "halves"
    rotation = Rotation(rotary_dim(fmt), pairing, -1 if back else 1)
    return rotation.apply(x, angle.cos(), angle.sin())


def rotary_dim(fmt: Format) -> int:
    """How many channels of a key turn; 0 where keys are not turned back."""
    return fmt.details[0] if fmt.details else 0


def is_interleaved(fmt: Format) -> bool:
    """Whether pairs are neighbours, and not half of ``rotary_dim`` apart."""
    return bool(fmt.details and fmt.details[1])


def latent_widths(fmt: Format) -> tuple[int, ...]:
    """Bits of each plane group of latent channels that is stored."""
    return tuple(bits for bits in fmt.widths if bits)


def num_latent(fmt: Format) -> int:
    """How many latent channels are stored."""
    return min(LANES * len(latent_widths(fmt)), fmt.head_dim)


def largest_codes(fmt: Format, device: torch.device) -> Tensor:
    """The largest code of each latent channel, fp32 ``[latent]``."""
    largest = torch.tensor([2.0**bits - 1 for bits in latent_widths(fmt)], device=device)
    return largest.repeat_interleave(LANES)[: num_latent(fmt)]
