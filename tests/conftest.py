"""Shared by the tests of numbers and of state: seeded tensors, formats, Hypothesis profiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from squat_fx.codecs import Codec, Format, Lossless, Role, codec_spec, make_format
from squat_fx.pool import POOL

settings.register_profile("ci", deadline=None, max_examples=25, print_blob=True)
settings.register_profile("full", settings.get_profile("ci"), max_examples=1000)
settings.load_profile("ci")  # unless pytest is given --hypothesis-profile=full


@pytest.fixture(autouse=True)
def empty_pool() -> None:
    """No test gets arenas that another one made large."""
    POOL.clear()


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that depend on ``seed`` alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stored_format(
    codec: Codec | None = None,
    role: Role = "key",
    head_dim: int = 16,
    bits: float | tuple[int, ...] = 2,
    residual_length: int = 8,
    sink_length: int = 2,
    latent: bool = False,
) -> Format:
    """A stored format; by default a lossless one whose groups of 4 tokens soon leave the ring."""
    codec = codec or Lossless(group_size=4)
    exact = residual_length, sink_length
    return make_format(codec, codec_spec(codec), role, head_dim, bits, *exact, latent)


def whole_numbers(*shape: int, seed: int = 0, largest: int = 7) -> Tensor:
    """Integers from ``-largest`` to ``largest``; sums of them are exact, in whatever order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


def left_padding(pads: list[int], tokens: int) -> Tensor:
    """Which tokens are valid, bool ``[batch, tokens]``: row ``b`` begins with ``pads[b]`` pads."""
    return torch.arange(tokens) >= torch.tensor(pads)[:, None]
