"""Rotary position embeddings on plain tensors: pairs of channels turn by an angle a token.

    y1 = x1 * cos1 - x2 * sin1
    y2 = x2 * cos2 + x1 * sin2

A pair is channels ``i`` and ``i + rotary_dim / 2`` (``"halves"``: Llama, GPT-NeoX) or ``2 i`` and
``2 i + 1`` (``"interleaved"``: GPT-J, Cohere). Channels from ``rotary_dim`` on stay as they are.
``cos`` and ``sin`` may hold a factor (YaRN's ``attention_scaling``); the inverse divides by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Pairing = Literal["halves", "interleaved"]


@dataclass(frozen=True)
class Rotation:
    """Which channels turn with which, and which way round.

    Attributes:
        rotary_dim: how many channels turn, from the first one on.
        pairing: which two channels are a pair.
        sign: 1, or -1 where the model turns by minus the angle whose sine it is given.
        dtype: what the model computes in; None is the dtype of what comes.
    """

    rotary_dim: int
    pairing: Pairing
    sign: int = 1
    dtype: torch.dtype | None = None

    def apply(self, key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn ``key``, ``[batch, heads, tokens, head_dim]``.

        ``cos`` and ``sin`` broadcast to its leading dims and have a number for each of
        ``rotary_dim`` channels or one for each pair. The result has the dtype of ``key``.
        """
        turning, rest = self._split(key)
        cos, sin = self.per_channel(cos), self.per_channel(sin) * self.sign
        turned = turning * cos + self._quarter(turning) * sin
        return torch.cat([turned.to(key.dtype), rest], -1)

    def invert(self, key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Undo :meth:`apply` with the same ``cos`` and ``sin``.

        Where both channels of a pair have the same ``cos`` and ``sin``, this turns by minus the
        angle and divides by ``cos**2 + sin**2``; it is the inverse where they differ, too.
        """
        turning, rest = self._split(key)
        cos, sin = self.per_channel(cos), self.per_channel(sin) * self.sign
        other = self._partner(cos)
        turned = turning * other - self._quarter(turning) * sin
        scale = cos * other + sin * self._partner(sin)
        return torch.cat([(turned / scale).to(key.dtype), rest], -1)

    def _split(self, key: Tensor) -> tuple[Tensor, Tensor]:
        turning, rest = key[..., : self.rotary_dim], key[..., self.rotary_dim :]
        return turning if self.dtype is None else turning.to(self.dtype), rest

    def per_channel(self, x: Tensor) -> Tensor:
        """``cos`` or ``sin`` with a number for each channel."""
        x = x if self.dtype is None else x.to(self.dtype)
        return x if x.shape[-1] == self.rotary_dim else self._join(x, x)

    def _quarter(self, x: Tensor) -> Tensor:
        """Every pair turned by a quarter: ``(x1, x2)`` becomes ``(-x2, x1)``."""
        first, second = self._pairs(x)
        return self._join(-second, first)

    def _partner(self, x: Tensor) -> Tensor:
        """What the other channel of each pair holds."""
        first, second = self._pairs(x)
        return self._join(second, first)

    def _pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.pairing == "halves":
            half = self.rotary_dim // 2
            return x[..., :half], x[..., half:]
        return x[..., ::2], x[..., 1::2]

    def _join(self, first: Tensor, second: Tensor) -> Tensor:
        if self.pairing == "halves":
            return torch.cat([first, second], -1)
        return torch.stack([first, second], -1).flatten(-2)


def rearranged(x: Tensor, dims: Sequence[int | None]) -> Tensor:
    """``x`` with its dims in the order ``dims``.

    None is a new dim of size one; a dim that ``dims`` does not name has size one and goes.
    """
    named = [d for d in dims if d is not None]
    x = x.permute(*named, *(d for d in range(x.dim()) if d not in named))
    x = x[(..., *[0] * (x.dim() - len(named)))]
    return x[tuple(None if d is None else slice(None) for d in dims)]
