"""QJL: keys as signs of random projections (Zandieh, Daliri, Han, AAAI 2025).

    k = k_in + k_out                    k_out: the channels of largest norm among 32 tokens
    stored: sign(S k_in), sign(S k_out), |k|, |k_out| and which channels k_out has
    q @ k' = sqrt(pi/2)/m |k_in| (S q_in) @ sign(S k_in) + the same of k_out

``S`` has ``m`` rows, the directions of :mod:`squat_fx.layouts.sketch`; the outliers' sketch takes
the first of them. Each part of the key meets the same channels of the query. The estimate is
unbiased, as nothing else here is, and pays for it with an error of ``(pi / 2 - 1) d / m`` of the
key's square: at 2 bits twice that of rounding, and softmax turns variance into bias again.

Values are rounded to ``2**bits`` levels between minimum and maximum of 32 channels of a token,
which is what the paper does with them. The number of bits does not change the keys, which take
``sketch_dim`` and ``outlier_sketch_dim`` bits a token at every head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from squat_fx.codecs.base import Codec, PerChannel, PerToken, Role
from squat_fx.codecs.kivi import round_to_levels, value_range
from squat_fx.layouts.planes import LANES

GROUP_SIZE = 32  # tokens that share their outliers, channels of a value that share a scale
ALL_CHANNELS = 2**30
LARGEST_HEAD_DIM = 256  # a channel is a byte


@dataclass(frozen=True)
class Qjl(Codec):
    """Keys as signs of projections, with outlier channels apart; values by min-max rounding.

    Attributes:
        sketch_dim: signs of a key, a multiple of 16.
        outliers: channels of each 32 keys that are sketched apart; 0 for none.
        outlier_sketch_dim: signs of that part of a key, a multiple of 16.
    """

    name: ClassVar[str] = "qjl"
    layout: ClassVar[str] = "signs/token"
    summary: ClassVar[str] = "keys as signs of projections, outlier channels apart"
    paper: ClassVar[str] = "Zandieh et al., QJL, AAAI 2025"

    sketch_dim: int = 256
    outliers: int = 8
    outlier_sketch_dim: int = 256

    def __post_init__(self) -> None:
        for name in ("sketch_dim", "outlier_sketch_dim"):
            value = getattr(self, name)
            if type(value) is not int or value < LANES or value % LANES:
                nearest = LANES * max(round(value / LANES), 1) if _is_number(value) else 256
                raise ValueError(
                    f"{name} must be a multiple of {LANES}, {LANES} or more, got {value!r}; "
                    f"choose {nearest}"
                )
        if type(self.outliers) is not int or self.outliers < 0:
            raise ValueError(
                f"outliers must be a number of channels, 0 or more, got {self.outliers!r}; "
                "choose 0 for none or 8 as in the paper"
            )

    def granularity(self, role: Role) -> PerChannel | PerToken:
        """Keys share their outlier channels along tokens, values a scale along channels."""
        if role == "value":
            return PerToken(GROUP_SIZE)
        return PerChannel(GROUP_SIZE) if self.outliers else PerToken(ALL_CHANNELS)

    def widths_of(self, role: Role, head_dim: int, bits: float) -> tuple[int, ...]:
        """Keys: the signs, and with outliers their signs and their number. Values: bits."""
        if role == "value":
            return super().widths_of(role, head_dim, bits)
        if not self.outliers:
            return (self.sketch_dim,)
        if self.outliers >= head_dim or head_dim > LARGEST_HEAD_DIM:
            raise ValueError(
                f"codec {self.name!r} keeps {self.outliers} outlier channels apart in heads of "
                f"{self.outliers + 1} to {LARGEST_HEAD_DIM} channels, got head_dim {head_dim}; "
                "choose outliers=0"
            )
        return (self.sketch_dim, self.outlier_sketch_dim, self.outliers)

    def quantize(
        self, groups: Tensor, valid: Tensor | None, bits: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of values; see :meth:`squat_fx.codecs.base.Codec.quantize`."""
        low, high = value_range(groups, valid)
        return round_to_levels(groups, low, high, bits)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e9
