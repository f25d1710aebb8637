"""SQuat as published (Wang et al., COLM 2025): KIVI's stored format, and its keys query-aware.

Values are KIVI's. Keys of the prompt are rounded as KIVI rounds them, a block of channels after the
other; the error of a block is compensated in the later blocks against ``H = I + lambda * C``
(section 4 of the paper, :mod:`squat_fx.codecs.feedback`), whose minimum and maximum are taken after
the compensation. ``lambda = 0`` is KIVI; as ``lambda`` grows the error becomes orthogonal to the
subspace of the queries, as far as there are channels to compensate in.

Queries and keys are both taken after rotary embedding (the paper's ``squat_post``), which is the
frame in which the cache holds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from squat_fx.codecs.base import Fit, Role, Tap
from squat_fx.codecs.feedback import feedback_matrix, leading_subspace, metric, query_gram
from squat_fx.codecs.kivi import Kivi
from squat_fx.layouts.planes import LANES


@dataclass(frozen=True)
class SquatPaper(Kivi):
    """KIVI with the rounding error of the prompt's keys kept out of the query subspace.

    Attributes:
        group_size: as in :class:`Kivi`.
        strength: ``lambda``; relative to the mean eigenvalue of the queries' Gram, or absolute.
        relative: the published code takes ``lambda`` as it is (1e-3), which is weak on a short
            prompt and too strong on a long one.
        block: channels rounded together, a multiple of 16; 64 in the published code.
        rank: leading dimensions of the query subspace that count; None: all.
    """

    name: ClassVar[str] = "squat_paper"
    summary: ClassVar[str] = "kivi with query-aware error feedback on the prompt's keys"
    paper: ClassVar[str] = "Wang et al., SQuat, COLM 2025"

    strength: float = 1.0
    relative: bool = True
    block: int = 16
    rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.strength >= 0.0 or self.strength == float("inf"):
            raise ValueError(f"strength must be a number, 0 or more, got {self.strength}")
        if self.block < LANES or self.block % LANES:
            raise ValueError(f"block must be a multiple of {LANES} channels, got {self.block}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, or None for all, got {self.rank}")

    def taps(self, role: Role) -> frozenset[Tap]:
        """The queries, for keys."""
        return frozenset({"query"}) if role == "key" and self.strength else frozenset()

    def fit(
        self,
        role: Role,
        x: Tensor,
        query: Tensor | None,
        keep: Tensor,
        basis: Tensor | None = None,
    ) -> Fit:
        """The feedback matrix of the prompt's queries."""
        if query is None or not self.strength:
            return Fit()
        gram = query_gram(query, keep, x.shape[1])
        if self.rank is not None:
            gram = leading_subspace(gram, self.rank)
        return Fit(feedback=feedback_matrix(metric(gram, self.strength, self.relative), self.block))
