"""PolarQuant: rotated tokens in recursive polar coordinates (Han et al., 2025, section 4).

    y = x @ R                                       the fixed rotation, a random preconditioning
    radius, angles = 16 numbers of y at a time      four levels of angles, of 8, 4, 2 and 1
    code = the nearest centroid of the level        radius in fp16; no scales, no zero points

Keys and values are treated the same. ``R`` makes numbers look like a Gaussian's, whose angles have
densities that are known (``f_l`` of lemma 2), so that one codebook for each level fits everything:
``codebook="offline"``. ``"online"`` moves the centroids of each head to the angles of the prompt by
Lloyd's iteration (the paper's k-means++ differs in where it starts), and stores them.

Of the paper's schedules those of four levels are here, named by the bits of a number with its share
of the radius: 3.375 (3, 2, 2 and 2 bits from the first level on), 3.875 (4, 2, 2, 2; the paper's)
and 4.25 (4, 3, 3, 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from squat_fx.codecs.base import Codec, Fit, PerToken, Role
from squat_fx.layouts import Format, polar_tree
from squat_fx.layouts.polar_token import to_latent

SMALLEST_PROMPT = 32  # tokens; of fewer nothing is learned
Codebook = Literal["offline", "online"]


@dataclass(frozen=True)
class Polar(Codec):
    """A radius and 15 angles for every 16 rotated channels.

    Attributes:
        codebook: ``"offline"``, that of Gaussian numbers, or ``"online"``, of the prompt.
    """

    name: ClassVar[str] = "polar"
    layout: ClassVar[str] = "polar/token"
    summary: ClassVar[str] = "rotated, recursive polar coordinates, no scales"
    paper: ClassVar[str] = "Han et al., PolarQuant, 2025"

    codebook: Codebook = "offline"

    def __post_init__(self) -> None:
        if self.codebook not in get_args(Codebook):
            raise ValueError(
                f"codebook must be 'offline', the same for everything, or 'online', "
                f"of each prompt, got {self.codebook!r}"
            )

    def check_bits(self, bits: float) -> None:
        """See :meth:`Codec.check_bits`."""
        self.widths_of("key", polar_tree.BLOCK, bits)

    def granularity(self, role: Role) -> PerToken:
        """A radius for 16 channels of a token."""
        return PerToken(polar_tree.BLOCK)

    def fit_format(
        self,
        role: Role,
        fmt: Format,
        x: Tensor,
        query: Tensor | None,
        keep: Tensor,
        basis: Tensor | None = None,
    ) -> Fit:
        """The codebooks of the prompt's angles."""
        if self.codebook == "offline":
            return Fit()
        learned_from = keep & (keep.sum(1, keepdim=True) >= SMALLEST_PROMPT)
        _, angles = polar_tree.to_polar(to_latent(x))
        start = polar_tree.codebooks(fmt.widths, x.device)
        books = polar_tree.fit_codebooks(angles, learned_from, start, fmt.widths)
        return Fit({"codebook": polar_tree.cosines_and_sines(books)})
