"""Through packed arenas and back, for tests of codecs that come with a layout of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from squat_fx.codecs import Codec, Role
from squat_fx.layouts import Fixed, Format
from tests.conftest import stored_format


@dataclass(frozen=True)
class RoundTrip:
    """What was packed, what it was packed with, and what came back, fp32."""

    fmt: Format
    fixed: Fixed
    packed: tuple[Tensor, ...]
    numbers: Tensor

    @property
    def bits_per_element(self) -> float:
        """Bits that there are, by element that was packed."""
        tensors = (*self.packed, *self.fixed.values())
        return 8 * sum(t.nbytes for t in tensors) / self.numbers.numel()


def round_trip(
    codec: Codec,
    role: Role,
    x: Tensor,
    bits: int = 2,
    valid: Tensor | None = None,
    query: Tensor | None = None,
) -> RoundTrip:
    """Learn from ``x`` ``[batch, heads, tokens, head_dim]``, pack all of it, and read it back."""
    fmt = stored_format(codec, role, x.shape[3], bits)
    keep = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool) if valid is None else valid
    fixed = codec.fit(role, x, query, keep).fixed
    packed = fmt.stored_layout.quantize(x, valid, fmt, codec, fixed)
    for name, arena in zip(fmt.packed_names, packed, strict=True):
        slots = x.shape[2] // fmt.tokens_per_slot(name)
        assert arena.shape == (*x.shape[:2], slots, fmt.last_dim(name)), name
        assert arena.dtype == fmt.arena_dtype(name, x.dtype), name
    return RoundTrip(fmt, fixed, packed, fmt.stored_layout.dequantize(packed, fmt, fixed))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Squared error over the squared norm of the whole."""
    return float((actual - expected).square().sum() / expected.square().sum())
