"""SQuat in a rotated space: the default codec, at every width.

    y = (key - mean) @ R                  R a fixed Hadamard rotation, mean that of the prompt
    code, scale = symmetric levels of y   one fp16 scale per token, the error of a block of channels
                                          fed back into the later ones, on the tokens of the prompt
    key' = (scale * step * (code - zero)) @ R.T + mean

Values are rotated and rounded the same way, without mean and feedback. The rotation makes levels
that fit a Gaussian fit every token (PolarQuant's preconditioning, Han et al., 2025), the mean takes
out what all keys share, and the feedback (SQuat, Wang et al., COLM 2025, section 4) keeps the
rounding error of the prompt away from the subspace of its queries:
``H = R.T @ (I + lambda * C) @ R`` with the Gram ``C`` of the prompt's queries, see
:mod:`squat_fx.codecs.feedback`.

Tokens that arrive later are rounded without feedback: it would have to be stored for them. With
fewer than ``SMALLEST_PROMPT`` tokens to learn from, mean and feedback are zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from squat_fx.codecs.base import Codec, Fit, Layout, PerToken, Role, Tap
from squat_fx.codecs.feedback import feedback_matrix, metric, query_gram
from squat_fx.codecs.hadamard import rotation_pair
from squat_fx.codecs.planes import LANES
from squat_fx.codecs.symmetric import LARGEST_HALF

SMALLEST_PROMPT = 32  # tokens
ALL_CHANNELS = 2**30


@dataclass(frozen=True)
class Squat(Codec):
    """Rotated keys and values, symmetric levels, a scale per token; query-aware on the prompt.

    Attributes:
        strength: ``lambda`` of the feedback, relative to the mean eigenvalue of the queries' Gram;
            0 turns the feedback off.
        center: whether the mean of the prompt's keys is removed from packed keys.
    """

    name: ClassVar[str] = "squat"
    layout: ClassVar[Layout] = "planes/token"
    summary: ClassVar[str] = "rotated, a scale per token, keys centred, query-aware on the prompt"
    paper: ClassVar[str] = "Wang et al., SQuat, COLM 2025; Han et al., PolarQuant, 2025"
    takes_calibration: ClassVar[bool] = True

    strength: float = 1.0
    center: bool = True

    def __post_init__(self) -> None:
        if not self.strength >= 0.0 or self.strength == float("inf"):
            raise ValueError(f"strength must be a number, 0 or more, got {self.strength}")

    def granularity(self, role: Role) -> PerToken:
        """One scale for all channels of a token."""
        return PerToken(ALL_CHANNELS)

    def taps(self, role: Role) -> frozenset[Tap]:
        """The queries, for keys."""
        return frozenset({"query"}) if role == "key" and self.strength else frozenset()

    def centers(self, role: Role) -> bool:
        """Keys are centred, values are not."""
        return self.center and role == "key"

    def fit(self, role: Role, x: Tensor, query: Tensor | None, keep: Tensor) -> Fit:
        """Mean of the kept keys, and the feedback matrix in the rotated space."""
        enough = keep.sum(1) >= SMALLEST_PROMPT
        mean = feedback = None
        if self.centers(role):
            mean = token_mean(x, keep & enough[:, None])
        if query is not None and self.strength:
            rotate, back = rotation_pair(x.shape[3], x.device).double()
            h = metric(query_gram(query, keep, x.shape[1]), self.strength, relative=True)
            feedback = feedback_matrix(back @ h @ rotate, LANES)
            feedback = feedback * enough[:, None, None, None]
        return Fit(mean, feedback)


def token_mean(x: Tensor, keep: Tensor) -> Tensor:
    """Mean of the kept tokens, fp16 ``[batch, heads, 1, head_dim]``; zero where none is kept."""
    kept = x.masked_fill(~keep[:, None, :, None], 0.0)
    total = kept.sum(2, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    mean = total / keep.sum(1).clamp_min(1)[:, None, None, None]
    return mean.clamp(-LARGEST_HALF, LARGEST_HALF).half()
