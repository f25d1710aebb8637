"""Some tokens of a prompt, rounded by another codec: more tokens at lower precision.

    votes[t] = sum over the newest queries and the query heads of a KV head of
               softmax(q @ k * head_dim**-0.5)[t], averaged over the neighbours of t

Each KV head keeps the packed tokens of most votes, ``budget`` of them (SnapKV, Li et al., NeurIPS
2024), and rounds what it keeps: at the same size, more tokens of fewer bits are worth more than few
exact ones (Zhang et al., EMNLP Findings 2025). First and newest tokens are exact as ever and not
counted. The choice is made once, when a prompt is stored; tokens that come later, later chunks of a
prompt among them, are never dropped. Values keep the tokens of their keys.

The newest queries are those of ``window`` tokens. Their own tokens have every vote, as published;
most of them are exact anyway. Where a prompt has no queries that attend to all of it (calls that
run eagerly, cross attention, sliding windows, which forget by themselves), all tokens are kept.

What the codec beneath learns, it learns from the whole prompt. It must not round by position:
``svdq`` turns keys back by theirs. The published code repeats KV heads first and so votes for each
query head; here those of a KV head vote together, and share what is stored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import lcm
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from squat_fx.codecs.base import Codec, Fit, PerChannel, PerToken, Role, Tap
from squat_fx.codecs.squat import Squat
from squat_fx.layouts import LAYOUTS, Format
from squat_fx.layouts.kept import PREFIX, beneath
from squat_fx.layouts.symmetric import LARGEST_HALF

AT_ONCE = 2**26  # scores
OWN_VOTE, NO_VOTE = 2.0, -1.0  # more than a mean of probabilities, and less


@dataclass(frozen=True)
class Pruned(Codec):
    """The tokens of a prompt that its newest queries attend to, in another codec.

    Attributes:
        budget: packed tokens of a prompt that each KV head keeps.
        codec: what rounds them; a codec, or its name, with fields as json if they are not the
            defaults.
        window: how many of the newest queries vote.
        pooling: over how many neighbours votes are averaged, an odd number; 1 for none.
    """

    name: ClassVar[str] = "pruned"
    layout: ClassVar[str] = PREFIX + Squat.layout
    summary: ClassVar[str] = "the tokens that the prompt's newest queries see, in another codec"
    paper: ClassVar[str] = (
        "Li et al., SnapKV, NeurIPS 2024; Zhang et al., More Tokens, Lower Precision, EMNLP 2025"
    )

    remedy: ClassVar[str] = "a larger budget helps, or more bits"

    budget: int = 1024
    codec: Codec = field(default_factory=Squat)
    window: int = 32
    pooling: int = 7

    def __post_init__(self) -> None:
        if isinstance(self.codec, str):
            from squat_fx.codecs import codec_from_spec  # has a row for this file

            object.__setattr__(self, "codec", codec_from_spec(self.codec))
        if not isinstance(self.codec, Codec):
            raise ValueError(f"codec must be a codec or the name of one, got {self.codec!r}")
        if isinstance(self.codec, Pruned):
            raise ValueError("codec must be one that keeps all tokens, got another 'pruned'")
        for role in ("key", "value"):
            if LAYOUTS[self.codec.layout_of(role)].positional:
                raise ValueError(
                    f"codec {self.codec.name!r} rounds a {role} by its position, which kept "
                    f"tokens lose; choose another, such as {Squat.name!r}"
                )
        for name in ("budget", "window", "pooling"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be a number of tokens, 1 or more, got {getattr(self, name)!r}"
                )
        if self.pooling % 2 == 0:
            raise ValueError(f"pooling must be odd, got {self.pooling}; choose {self.pooling + 1}")
        if self.budget % self._group:
            nearest = -(-self.budget // self._group) * self._group
            raise ValueError(
                f"budget must be whole groups of {self._group} tokens, which codec "
                f"{self.codec.name!r} packs at once, got {self.budget}; choose {nearest}"
            )

    @property
    def _group(self) -> int:
        """Tokens that are packed at once, by keys or by values."""
        return lcm(*(self.codec.granularity(role).token_group for role in ("key", "value")))

    def layout_of(self, role: Role) -> str:
        """That of the codec beneath, of a part."""
        return PREFIX + self.codec.layout_of(role)

    def check_bits(self, bits: float) -> None:
        """What the codec beneath takes."""
        self.codec.check_bits(bits)

    def widths_of(self, role: Role, head_dim: int, bits: float) -> tuple[int, ...]:
        """Those of the codec beneath."""
        return self.codec.widths_of(role, head_dim, bits)

    def granularity(self, role: Role) -> PerChannel | PerToken:
        """That of the codec beneath."""
        return self.codec.granularity(role)

    def taps(self, role: Role) -> frozenset[Tap]:
        """Queries whose products with keys are scores, for keys."""
        wanted: frozenset[Tap] = frozenset({"query", "scores"} if role == "key" else ())
        return wanted | self.codec.taps(role)

    def details(self, role: Role) -> tuple[int, ...]:
        """See :mod:`squat_fx.layouts.kept`."""
        return (self.budget, self._group, int(role == "key"), *self.codec.details(role))

    def affine(self, role: Role) -> bool:
        """Whether the codec beneath gives offsets and factors."""
        return self.codec.affine(role)

    def fit_format(
        self,
        role: Role,
        fmt: Format,
        x: Tensor,
        query: Tensor | None,
        keep: Tensor,
        basis: Tensor | None = None,
    ) -> Fit:
        """What the codec beneath learns."""
        query = query if "query" in self.codec.taps(role) else None
        return self.codec.fit_format(role, beneath(fmt), x, query, keep, basis)

    def quantize(
        self, groups: Tensor, valid: Tensor | None, bits: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As the codec beneath."""
        return self.codec.quantize(groups, valid, bits)

    def balance(self, tiles: Tensor, keep: Tensor, of_tokens: bool) -> Tensor:
        """As the codec beneath."""
        return self.codec.balance(tiles, keep, of_tokens)

    def votes(self, query: Tensor, key: Tensor, valid: Tensor) -> Tensor:
        """How much each token of a prompt is wanted, fp32 ``[batch, heads, tokens]``.

        Args:
            query: ``[batch, num_heads, tokens, head_dim]``.
            key: ``[batch, heads, tokens, head_dim]``.
            valid: bool ``[batch, tokens]``; False for padding, which votes for nothing and is
                wanted least.
        """
        tokens = key.shape[2]
        rows = max(AT_ONCE // (query.shape[1] * min(self.window, tokens) * tokens), 1)
        parts = [x.split(rows) for x in (query[:, :, -self.window :], key, valid)]
        found = torch.cat([attention_to(*part) for part in zip(*parts, strict=True)])
        own = torch.arange(tokens, device=key.device) >= tokens - self.window
        found = found.masked_fill(own, 0.0)
        found = F.avg_pool1d(found, self.pooling, 1, self.pooling // 2)
        return found.masked_fill(own, OWN_VOTE).masked_fill(~valid[:, None], NO_VOTE)


def attention_to(query: Tensor, key: Tensor, valid: Tensor) -> Tensor:
    """The mean probability with which the newest queries attend to each token, fp32 ``[batch,
    heads, tokens]``; they are ``[batch, num_heads, queries, head_dim]``, of the last tokens.
    """
    query, key = (x.float().where(x.abs() <= LARGEST_HALF, 0.0) for x in (query, key))
    count, tokens = query.shape[2], key.shape[2]
    rows = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # of all query heads of a KV head
    scores = (rows * key.shape[3] ** -0.5) @ key.mT
    seen = torch.ones(count, tokens, dtype=torch.bool, device=key.device).tril(tokens - count)
    seen = seen & valid[:, None] & valid[:, -count:, None]  # [batch, queries, tokens]
    by_head = scores.unflatten(2, (-1, count))
    by_head.masked_fill_(~seen[:, None, None], -torch.inf)
    return scores.softmax(-1).nan_to_num_(0.0).mean(2)
