"""PolarQuant for rotary keys: a radius and an angle for each pair (Wu et al., NeurIPS 2025).

    radius, angle = polar(key_i, key_{i + d/2})     after the rotary embedding
    a range of both for each pair and group of tokens, cut in cells

A rotary embedding turns a pair by the token's position: its radius does not change, and pairs of a
channel with outliers lie on a ring, which a range of radii and one of angles holds tightly. See
:mod:`squat_fx.layouts.polar_pairs`. Values are rounded token by token (section 3.4), as ``kivi``
does, in groups of ``VALUE_GROUP`` channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from squat_fx.codecs.base import PerChannel, PerToken, Role
from squat_fx.codecs.kivi import Kivi

VALUE_GROUP = 128


@dataclass(frozen=True)
class PolarRope(Kivi):
    """Keys as radius and angle of rotary pairs, values per token and rounded as in :class:`Kivi`.

    Attributes:
        group_size: tokens of a pair of key channels that share their ranges; 32, 64 or 128. The
            ranges add ``32 / group_size`` bits per element.
        radius_bits: of a key pair; what is left of its bits is the angle's. None: half of them, an
            odd one is the angle's. At 3 bits, 2 for the radius are better than 3.
    """

    name: ClassVar[str] = "polar_rope"
    layout: ClassVar[str] = "polar/pairs"
    summary: ClassVar[str] = "keys as radius and angle of rotary pairs, values per token"
    paper: ClassVar[str] = "Wu et al., PolarQuant, NeurIPS 2025"

    group_size: int = 128
    radius_bits: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.radius_bits is not None and self.radius_bits not in range(1, 9):
            raise ValueError(
                f"radius_bits must be from 1 to 8, or None for half the bits of a pair, "
                f"got {self.radius_bits!r}"
            )

    def widths_of(self, role: Role, head_dim: int, bits: float) -> tuple[int, ...]:
        """Of keys, the bits of a radius and of an angle."""
        widths = super().widths_of(role, head_dim, bits)
        if role == "value":
            return widths
        if head_dim % 2:
            raise ValueError(
                f"codec {self.name!r} pairs the channels of keys, got head_dim {head_dim}; "
                f"choose another codec"
            )
        if self.radius_bits is None:
            return widths
        angle_bits = sum(widths) - self.radius_bits
        if not 1 <= angle_bits <= 8:
            nearest = (self.radius_bits + min(max(angle_bits, 1), 8)) / 2
            raise ValueError(
                f"codec {self.name!r} with radius_bits={self.radius_bits} leaves an angle "
                f"{angle_bits} bits at {bits:g} bits, it takes 1 to 8; the nearest is {nearest:g}"
            )
        return self.radius_bits, angle_bits

    def granularity(self, role: Role) -> PerChannel | PerToken:
        """Keys share ranges along tokens, values along channels."""
        return PerChannel(self.group_size) if role == "key" else PerToken(VALUE_GROUP)
