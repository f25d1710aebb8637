"""SVDq: keys before their rotary embedding in their singular basis (Yankun et al., 2025).

    K - mean = U S W.T                    of the prompt's keys, for each sequence and KV head
    latent = (k - mean) @ W               channels in the order of singular values
    code = round((latent - min) / scale)  min and scale of each channel, of the prompt
    k' = latent' @ W.T + mean             then the rotary embedding

Singular values of keys fall off fast before the embedding, and less so after it, so the latent
channels get bits by their order: eight groups of equal size, the later ones few bits or none. The
paper has this basis, mean and ranges from the prompt and says nothing of tokens that come later;
here they are projected and rounded with the same (:mod:`squat_fx.layouts.latent_rope`, which also
says why no position need be known). The paper's sources leave open whether heads share a basis;
here each KV head has its own.

``SCHEDULES`` names the widths by their average. At 1 bit min-max levels are the two ends of a
range, where hardly any number is, so the schedules have none. ``"1.25 slow"`` and ``"2 published"``
are widths that are named in or follow from the paper's text, and have some. Where head_dim / 8 is
no whole number of plane groups of 16 channels, there are four groups, or the widths are spread over
the plane groups that there are.

The basis costs 16 bits for each channel of each latent channel, once for a sequence and head. A
prompt must have more tokens than there are latent channels for it to mean anything, and with fewer
than ``SMALLEST_PROMPT`` nothing is learned: then the channels are those of the fixed rotation, with
a range of ``UNLEARNED_RANGE`` times the size of what is known. Values are rounded as in ``kivi``.

With a ``budget`` a single query attends to few of the packed keys, as in the paper's experiments
with ShadowKV: of 64K tokens to 2048, and at 1.25 bits 16 / 1.25 * 32 = 409.6 times fewer bytes of
keys are read than in fp16. All keys stay stored. The landmarks come on top, 2 bits a number, and
every one of them is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from squat_fx.codecs.base import Fit, PerToken, Role, Tap
from squat_fx.codecs.kivi import Kivi
from squat_fx.layouts import Format
from squat_fx.layouts.hadamard import rotation_pair
from squat_fx.layouts.latent_rope import largest_codes, num_latent
from squat_fx.layouts.latent_sparse import CHUNK, LatentSparse
from squat_fx.layouts.planes import num_planes

SMALLEST_PROMPT = 32  # tokens
UNLEARNED_RANGE = 4.0
GROUPS = 8
ALL_CHANNELS = 2**30
IN_FP64 = 2048  # tokens at a time

SCHEDULES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "1": ((4, 2, 2, 0, 0, 0, 0, 0), (2, 2, 0, 0)),
    "1.25": ((4, 4, 2, 0, 0, 0, 0, 0), (3, 2, 0, 0)),
    "1.25 slow": ((4, 2, 2, 1, 1, 0, 0, 0), (2, 2, 1, 0)),
    "1.5": ((4, 4, 2, 2, 0, 0, 0, 0), (4, 2, 0, 0)),
    "2": ((4, 4, 4, 2, 2, 0, 0, 0), (4, 4, 0, 0)),
    "2 published": ((8, 4, 2, 1, 1, 0, 0, 0), (6, 2, 0, 0)),
    "3": ((6, 5, 4, 4, 3, 2, 0, 0), (5, 4, 3, 0)),
    "4": ((8, 6, 5, 4, 4, 3, 2, 0), (5, 5, 4, 2)),
    "5": ((8, 7, 6, 5, 5, 4, 3, 2), (6, 6, 5, 3)),
    "6": ((8, 8, 7, 6, 6, 5, 4, 4), (7, 7, 6, 4)),
    "7": ((8, 8, 8, 8, 7, 6, 6, 5), (8, 8, 7, 5)),
    "8": ((8, 8, 8, 8, 8, 8, 8, 8), (8, 8, 8, 8)),
}
"""Bits of eight groups of latent channels, and of four, by name."""


@dataclass(frozen=True)
class Svdq(Kivi):
    """Keys as codes of latent channels of mixed widths; values as in :class:`Kivi`.

    Attributes:
        group_size: channels of a value that share a scale; 32, 64 or 128.
        schedule: a name of ``SCHEDULES``, or the bits of latent channels, a width for each of
            equal groups in the order of singular values; None takes the name that is the number of
            bits.
        budget: how many packed tokens a query of its own attends to, chosen by landmarks (see
            :mod:`squat_fx.layouts.latent_sparse`), a multiple of 8; None attends to all. The paper
            takes 2048 of 64K.
        outlier_chunks: with a budget, the chunks of 8 tokens whose keys are kept exactly.
        pre_rope: whether keys are turned back to what they were before their rotary embedding;
            False rounds them as they are cached, which is worse, and needs no such embedding.
    """

    name: ClassVar[str] = "svdq"
    layout: ClassVar[str] = "latent/rope"
    summary: ClassVar[str] = "keys before rotary embedding, singular basis, mixed widths"
    paper: ClassVar[str] = "Yankun et al., SVDq, 2025"

    schedule: str | tuple[int, ...] | None = None
    pre_rope: bool = True
    budget: int | None = None
    outlier_chunks: int = 48

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.schedule, list):  # from a spec
            object.__setattr__(self, "schedule", tuple(self.schedule))
        if isinstance(self.schedule, str):
            if self.schedule not in SCHEDULES:
                raise ValueError(
                    f"schedule must be one of {', '.join(SCHEDULES)}, or widths, "
                    f"got {self.schedule!r}"
                )
        elif self.schedule is not None:
            _check_widths(self.schedule)
        if not isinstance(self.pre_rope, bool):
            raise ValueError(f"pre_rope must be True or False, got {self.pre_rope!r}")
        if self.budget is not None and not _is_count(self.budget, CHUNK, CHUNK):
            raise ValueError(
                f"budget must be a number of tokens, a multiple of {CHUNK}, got {self.budget!r}; "
                "choose 2048, or None for all"
            )
        if not _is_count(self.outlier_chunks, 0, 1):
            raise ValueError(
                f"outlier_chunks must be a number of chunks, 0 or more, got {self.outlier_chunks!r}"
            )

    def check_bits(self, bits: float) -> None:
        """Keys take what has a schedule, values whole bits, which all have one."""
        if self.schedule is None and f"{bits:g}" not in SCHEDULES:
            named = [float(name) for name in SCHEDULES if " " not in name]
            below = max((n for n in named if n < bits), default=min(named))
            above = min((n for n in named if n > bits), default=max(named))
            raise ValueError(
                f"codec {self.name!r} has no schedule of {bits:g} bits; the nearest are "
                f"{below:g} and {above:g}; or give it widths, as in Svdq(schedule=(4, 4, 2, 0))"
            )

    def widths_of(self, role: Role, head_dim: int, bits: float) -> tuple[int, ...]:
        """Bits of each plane group of latent channels; of values, of each plane group."""
        if role == "value":
            return super().widths_of(role, head_dim, bits)
        planes, schedule = num_planes(head_dim), self.schedule
        if schedule is None:
            self.check_bits(bits)
            schedule = f"{bits:g}"
        if isinstance(schedule, str):
            eighths, quarters = SCHEDULES[schedule]
            schedule = quarters if planes % GROUPS and planes % len(quarters) == 0 else eighths
        return spread(schedule, planes)

    def layout_of(self, role: Role) -> str:
        """With a budget, the one with landmarks."""
        return LatentSparse.name if role == "key" and self.budget else super().layout_of(role)

    def details(self, role: Role) -> tuple[int, ...]:
        """Budget and outliers, behind the rotation that is to be found."""
        return (0, 0, self.budget, self.outlier_chunks) if role == "key" and self.budget else ()

    def granularity(self, role: Role) -> PerToken:
        """The ranges of keys are fixed, landmarks are of a chunk; values share a scale along
        channels.
        """
        if role == "value":
            return PerToken(self.group_size)
        return PerToken(ALL_CHANNELS, CHUNK if self.budget else 1)

    def taps(self, role: Role) -> frozenset[Tap]:
        """The rotary embedding, for keys."""
        return frozenset({"rotary"}) if role == "key" and self.pre_rope else frozenset()

    def fit_format(
        self,
        role: Role,
        fmt: Format,
        x: Tensor,
        query: Tensor | None,
        keep: Tensor,
        basis: Tensor | None = None,
    ) -> Fit:
        """Mean, basis and ranges of the kept keys of each sequence and head."""
        if role == "value":
            return Fit()
        mean, directions, low, high = singular_frame(x, keep, num_latent(fmt))
        scale = (high - low) / largest_codes(fmt, x.device)
        learned = {"basis": directions, "scale": scale, "zero_point": low, "center": mean}
        return Fit({name: numbers.float() for name, numbers in learned.items()})


def singular_frame(x: Tensor, keep: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean of the kept tokens, their ``count`` strongest directions, and the range of each.

    In fp64, ``[batch, heads, 1, head_dim]``, ``[..., count, head_dim]`` and ``[..., 1, count]``.
    Of too few tokens: no mean, the fixed rotation, and ranges by their size.
    """
    tokens = keep.sum(1)[:, None, None, None]
    enough = tokens >= SMALLEST_PROMPT
    rows = keep[:, None, :, None]
    parts = [slice(first, first + IN_FP64) for first in range(0, x.shape[2], IN_FP64)]

    def kept(part: slice) -> Tensor:
        return x[:, :, part].double().masked_fill(~rows[:, :, part], 0.0)

    shape = (*x.shape[:2], 1, x.shape[3])
    nothing = x.new_zeros(shape, dtype=torch.float64)
    mean = sum((kept(p).sum(2, keepdim=True) for p in parts), nothing) / tokens.clamp_min(1)
    mean = mean.float().double().where(enough, nothing)  # what is stored

    def centred(part: slice) -> Tensor:
        return (kept(part) - mean).masked_fill(~rows[:, :, part], 0.0)

    gram = sum((c.mT @ c for c in map(centred, parts)), nothing.mT @ nothing).nan_to_num_(0.0)
    directions = torch.linalg.eigh(gram).eigenvectors.flip(-1)[..., :count].mT
    largest = directions.gather(-1, directions.abs().argmax(-1, keepdim=True))
    fixed = rotation_pair(x.shape[3], x.device)[0].double().mT[:, :count]
    directions = torch.where(enough, directions * largest.sign(), fixed).half().double()
    low = x.new_full((*x.shape[:2], 1, count), torch.inf, dtype=torch.float64)
    high = -low
    for part in parts:
        latent = centred(part) @ directions.mT
        low = low.minimum(latent.masked_fill(~rows[:, :, part], torch.inf).amin(2, keepdim=True))
        high = high.maximum(latent.masked_fill(~rows[:, :, part], -torch.inf).amax(2, keepdim=True))
    squares = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    size = (squares / (tokens.clamp_min(1) * x.shape[3])).sqrt()
    size = UNLEARNED_RANGE * torch.where(tokens > 0, size, 1.0)
    return mean, directions, low.where(enough, -size), high.where(enough, size)


def spread(schedule: Sequence[int], planes: int) -> tuple[int, ...]:
    """Widths of ``planes`` plane groups that have those of ``schedule`` in equal shares, as near as
    whole bits come; at least one bit in all.
    """
    total = [0.0]
    for plane in range(planes):
        first, last = (n * len(schedule) / planes for n in (plane, plane + 1))
        shares = (max(min(last, i + 1) - max(first, i), 0.0) for i in range(len(schedule)))
        bits = sum(share * width for share, width in zip(shares, schedule, strict=True))
        total.append(total[-1] + bits * planes / len(schedule))
    ends = [int(t + 0.5 + 1e-9) for t in total]
    widths = sorted((b - a for a, b in pairwise(ends)), reverse=True)
    return (max(widths[0], 1), *widths[1:])


def _check_widths(schedule: Sequence[int]) -> None:
    """Refuse widths that no latent channels can have."""
    whole = all(type(bits) is int and 0 <= bits <= 8 for bits in schedule)
    falling = whole and all(a >= b for a, b in pairwise(schedule))
    if not schedule or not falling or schedule[0] == 0:
        raise ValueError(
            "a schedule is bits from 0 to 8 in falling order, of which the first are not 0, got "
            f"{tuple(schedule)}; singular values fall, too"
        )


def _is_count(number: object, least: int, step: int) -> bool:
    return type(number) is int and number >= least and number % step == 0
