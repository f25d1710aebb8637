"""ThinK: the channels of keys that queries hardly see are not stored (Xu et al., ICLR 2025).

    score_c = (sum over the query heads of a KV head of the mean of q_c**2 over the newest queries)
              * mean over tokens of k_tc**2

The channels of the highest scores are kept, ``1 - ratio`` of them, up to whole plane groups of 16:
no more are dropped than asked. They are rounded as KIVI rounds them, the others come back as zeros.
The choice is made once for each sequence and KV head, when a prompt is stored, and holds for all
later tokens. (The published code repeats KV heads first, so that each query head chooses for itself
and a group of them shares nothing.)

With fewer than ``WINDOW`` tokens to learn from, or without queries, the score is that of the keys
alone; with no token at all the first channels are kept. Values are KIVI's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from squat_fx.codecs.base import Fit, Role, Tap
from squat_fx.codecs.kivi import Kivi
from squat_fx.layouts.planes import LANES

WINDOW = 32  # newest queries of a prompt


@dataclass(frozen=True)
class Think(Kivi):
    """KIVI on the channels of keys that matter to queries.

    Attributes:
        group_size: as in :class:`Kivi`.
        ratio: the share of channels of keys to drop, from 0 (``kivi``) to less than 1.
    """

    name: ClassVar[str] = "think"
    layout: ClassVar[str] = "planes/pruned"
    summary: ClassVar[str] = "kivi on the channels of keys that queries see most"
    paper: ClassVar[str] = "Xu et al., ThinK, ICLR 2025"

    ratio: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.ratio < 1.0:
            raise ValueError(
                f"ratio must be a share of channels, at least 0 and less than 1, got {self.ratio}; "
                "choose 0.4 as published, or 0 to drop none"
            )

    def kept_channels(self, head_dim: int) -> int:
        """How many channels of keys are stored."""
        wanted = head_dim - int(head_dim * self.ratio)
        return min(-(-wanted // LANES) * LANES, head_dim)

    def widths_of(self, role: Role, head_dim: int, bits: float) -> tuple[int, ...]:
        """One width for each plane group of kept channels."""
        widths = super().widths_of(role, head_dim, bits)
        return widths if role == "value" else widths[: -(-self.kept_channels(head_dim) // LANES)]

    def taps(self, role: Role) -> frozenset[Tap]:
        """The queries, for keys."""
        return frozenset({"query"}) if role == "key" and self.ratio else frozenset()

    def fit(
        self,
        role: Role,
        x: Tensor,
        query: Tensor | None,
        keep: Tensor,
        basis: Tensor | None = None,
    ) -> Fit:
        """The kept channels of each head, int16 ``[batch, heads, 1, kept]``, ascending."""
        if role == "value":
            return Fit()
        score = channel_energy(x, keep)
        if query is not None:
            of_queries = channel_energy(query, newest(keep, WINDOW))
            seen = score * of_queries.unflatten(1, (x.shape[1], -1)).sum(2)
            enough = keep.sum(1) >= WINDOW
            score = torch.where(enough[:, None, None], seen, score)
        best = score.argsort(dim=-1, descending=True, stable=True)
        channels = best[..., : self.kept_channels(x.shape[-1])].sort().values
        return Fit({"channels": channels[:, :, None].to(torch.int16)})


def channel_energy(x: Tensor, keep: Tensor) -> Tensor:
    """Sum of squares of each channel over the kept tokens, fp64 ``[batch, heads, head_dim]``."""
    kept = x.masked_fill(~keep[:, None, :, None], 0.0)
    return torch.linalg.vector_norm(kept, dim=2, dtype=torch.float64).square()


def newest(keep: Tensor, count: int) -> Tensor:
    """The last ``count`` kept tokens of each row, bool ``[batch, tokens]``."""
    from_the_end = keep.flip(1).cumsum(1).flip(1)
    return keep & (from_the_end <= count)
