"""SQuat in a rotated space: the default codec, at every width.

    y = ((key - mean) / factor) @ R       mean and factor of each channel, from the prompt;
                                          R a fixed Hadamard rotation
    code, scale = symmetric levels of y   one fp16 scale per token, as long as y was; the error of
                                          a block of channels fed back into the later ones, on the
                                          tokens of the prompt
    key' = (scale * step * (code - zero)) @ R.T * factor + mean

Values are rotated and rounded the same way, without mean, factors and feedback, and unbiased. The
rotation makes levels that fit a Gaussian fit every token (PolarQuant's preconditioning, Han et al.,
2025), the mean takes out what all keys share, the factors balance channels between keys and queries
(:mod:`squat_fx.codecs.smoothing`), and the feedback (SQuat, Wang et al., COLM 2025, section 4)
keeps the rounding error of the prompt away from the subspace of its queries:
``H = I + lambda * C`` with the Gram ``C`` of the prompt's queries in the frame of ``y``, see
:mod:`squat_fx.codecs.feedback`.

Tokens that arrive later are rounded without feedback: it would have to be stored for them. With
fewer than ``SMALLEST_PROMPT`` tokens to learn from, mean and feedback are zero and factors one. In
a calibrated basis, which weighs channels itself, factors are one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from squat_fx.codecs.base import Codec, Fit, PerToken, Role, Tap
from squat_fx.codecs.feedback import feedback_matrix, metric, query_gram
from squat_fx.codecs.smoothing import smoothing_factors
from squat_fx.layouts.hadamard import rotation_pair
from squat_fx.layouts.planes import LANES
from squat_fx.layouts.symmetric import LARGEST_HALF

SMALLEST_PROMPT = 16  # tokens
ALL_CHANNELS = 2**30


@dataclass(frozen=True)
class Squat(Codec):
    """Rotated keys and values, symmetric levels, a scale per token; query-aware.

    Attributes:
        strength: ``lambda`` of the feedback, relative to the mean eigenvalue of the queries' Gram;
            0 turns the feedback off.
        center: whether the mean of the prompt's keys is removed from packed keys.
        smooth: whether channels of keys are divided by factors that the prompt's queries and keys
            give.
    """

    name: ClassVar[str] = "squat"
    layout: ClassVar[str] = "planes/token"
    summary: ClassVar[str] = "rotated, a scale per token; keys centred, smoothed, query-aware"
    paper: ClassVar[str] = "Wang et al., SQuat, COLM 2025; Han et al., PolarQuant, 2025"
    takes_calibration: ClassVar[bool] = True

    strength: float = 1.0
    center: bool = True
    smooth: bool = True

    def __post_init__(self) -> None:
        if not self.strength >= 0.0 or self.strength == float("inf"):
            raise ValueError(f"strength must be a number, 0 or more, got {self.strength}")

    def granularity(self, role: Role) -> PerToken:
        """One scale for all channels of a token."""
        return PerToken(ALL_CHANNELS)

    def taps(self, role: Role) -> frozenset[Tap]:
        """The queries, for keys."""
        wanted = role == "key" and (self.smooth or self.strength > 0)
        return frozenset({"query"}) if wanted else frozenset()

    def affine(self, role: Role) -> bool:
        """Keys are shifted and scaled, values are not."""
        return role == "key" and (self.center or self.smooth)

    def fit(
        self,
        role: Role,
        x: Tensor,
        query: Tensor | None,
        keep: Tensor,
        basis: Tensor | None = None,
    ) -> Fit:
        """Mean and factors of the kept keys, and the feedback matrix in the latent frame."""
        if not self.affine(role) and not self.taps(role):
            return Fit()
        batch, heads, _, head_dim = x.shape
        learned_from = keep & (keep.sum(1, keepdim=True) >= SMALLEST_PROMPT)
        mean = x.new_zeros((batch, heads, 1, head_dim), dtype=torch.float16)
        factor = torch.ones_like(mean)
        feedback = None
        if self.center:
            mean = token_mean(x, learned_from)
        if query is not None:
            gram = query_gram(query, learned_from, heads)
            if self.smooth and basis is None:
                moment = second_moment(x, mean, learned_from)
                of_queries = gram.diagonal(dim1=-2, dim2=-1)
                factor = smoothing_factors(moment, of_queries[:, :, None])
            if self.strength:
                pair = rotation_pair(head_dim, x.device) if basis is None else basis
                latent = pair[1].double() * factor.double()  # queries go there with its transpose
                h = metric(latent @ gram @ latent.transpose(-1, -2), self.strength, relative=True)
                feedback = feedback_matrix(h, LANES)  # zeros where nothing is learned
        learned = {"affine": torch.cat([mean, factor], 2)} if self.affine(role) else {}
        return Fit(learned, feedback)


def token_mean(x: Tensor, keep: Tensor) -> Tensor:
    """Mean of the kept tokens, fp16 ``[batch, heads, 1, head_dim]``; zero where none is kept."""
    kept = x.masked_fill(~keep[:, None, :, None], 0.0)
    total = kept.sum(2, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    mean = total / keep.sum(1).clamp_min(1)[:, None, None, None]
    return mean.clamp(-LARGEST_HALF, LARGEST_HALF).half()


def second_moment(x: Tensor, mean: Tensor, keep: Tensor) -> Tensor:
    """Mean square of the kept tokens about ``mean``, ``[batch, heads, 1, head_dim]``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    squares = (x.to(wide) - mean).masked_fill_(~keep[:, None, :, None], 0.0).square_()
    return squares.sum(2, keepdim=True) / keep.sum(1).clamp_min(1)[:, None, None, None]
