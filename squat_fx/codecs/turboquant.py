"""TurboQuant: a random rotation and the best levels for what comes out (Zandieh et al., ICLR 2026).

    y = x @ R                              R a fixed random rotation
    idx_j = argmin_k |y_j / |x| - c_k|     c_1 .. c_(2**b): the codebook, levels / sqrt(d)
    x' = |x| * (c_idx @ R.T)

This is the algorithm that the paper calls mse (section 3.1). A coordinate of a rotated unit vector
is distributed as a Beta that is close to a Gaussian of variance ``1/d`` from a few dozen channels
on, so one codebook, that of the Gaussian, serves all heads and nothing is learned from a prompt.
Keys and values are treated alike. ``|x| / sqrt(d)`` is stored as the token's scale. The rotation is
the randomised Hadamard of :mod:`squat_fx.layouts.hadamard` where the paper has any orthogonal
matrix; the levels are those of :mod:`squat_fx.layouts.levels`. The paper's second algorithm, prod,
spends one of the bits on a sign sketch of the error, which is unbiased and noisier: ``qjl`` has the
sketch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from squat_fx.codecs.base import Codec, PerToken, Role
from squat_fx.layouts.levels import WIDTHS

ALL_CHANNELS = 2**30


@dataclass(frozen=True)
class TurboQuant(Codec):
    """Rotated keys and values, Lloyd-Max levels of a Gaussian, a scale per token.

    Attributes:
        norm_correction: whether tokens come back with their own norm, as in vLLM; False is the
            paper's reconstruction, which is nearer in the mean square and too short.
    """

    name: ClassVar[str] = "turboquant"
    layout: ClassVar[str] = "levels/token"
    summary: ClassVar[str] = "rotated, Lloyd-Max levels, a scale per token"
    paper: ClassVar[str] = "Zandieh et al., TurboQuant, ICLR 2026"

    norm_correction: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.norm_correction, bool):
            raise ValueError(
                f"norm_correction must be True or False, got {self.norm_correction!r}; "
                "True gives tokens their own norm back, False is the paper's reconstruction"
            )

    def granularity(self, role: Role) -> PerToken:
        """One scale for all channels of a token."""
        return PerToken(ALL_CHANNELS)

    def check_bits(self, bits: float) -> None:
        """There are levels for 1 to 4 bits."""
        if not WIDTHS[0] <= bits <= WIDTHS[-1]:
            raise ValueError(
                f"codec {self.name!r} has levels for {WIDTHS[0]} to {WIDTHS[-1]} bits, got "
                f"{bits:g}; choose {WIDTHS[-1]} or another codec"
            )
