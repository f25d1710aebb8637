"""SQuat as published: kivi's format, the error kept out of the query subspace."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squat_fx import QuantizedKV
from squat_fx.codecs import Kivi, SquatPaper
from squat_fx.codecs.planes import LANES
from squat_fx.kernels import reference
from tests.conftest import randn, stored_format

HEAD_DIM = 64


def store(codec: Kivi, x: Tensor, query: Tensor | None, bits: int = 2) -> QuantizedKV:
    fmt = stored_format(codec, "key", HEAD_DIM, bits, residual_length=0, sink_length=0)
    return QuantizedKV.from_dense(x, fmt, "key", query=query)


@given(bits=st.integers(1, 8), seed=st.integers(0, 50))
def test_without_strength_it_is_kivi_bit_for_bit(bits: int, seed: int) -> None:
    x, query = randn(1, 2, 70, HEAD_DIM, seed=seed), randn(1, 4, 70, HEAD_DIM, seed=seed + 1)
    for plain, paper in zip(
        store(Kivi(), x, None, bits)._storage.tensors,
        store(SquatPaper(strength=0), x, query, bits)._storage.tensors,
        strict=True,
    ):
        assert torch.equal(plain, paper)


@given(rank=st.integers(1, HEAD_DIM - 2 * LANES), seed=st.integers(0, 50))
def test_a_large_strength_makes_the_error_orthogonal_to_the_queries(rank: int, seed: int) -> None:
    """All but the last block's own rounding is cancelled on the query subspace.

    After each block the best compensation is added to the later channels, so that, as ``lambda``
    grows, what the rounding errors so far and their compensation project on the queries tends to
    zero as long as ``rank`` channels are left to compensate in. What remains in the end is the
    rounding of the last blocks, which nothing comes after: with the last ``rank`` channels kept
    exact, nothing remains.
    """
    query = randn(1, 2, 64, rank, seed=seed) @ randn(rank, HEAD_DIM, seed=seed + 1)
    x = randn(1, 1, 64, HEAD_DIM, seed=seed + 2)
    projected = []
    for strength in (0.0, 1.0, 1e6):
        fit = SquatPaper(strength=strength).fit("key", x, query, torch.ones(1, 64).bool())
        y = x.clone().double()
        last = HEAD_DIM - -(-rank // LANES) * LANES
        for first in range(0, last, LANES):
            block, later = slice(first, first + LANES), slice(first + LANES, HEAD_DIM)
            rounded = (2 * y[..., block]).round() / 2
            if fit.feedback is not None:
                weights = fit.feedback[..., block, later].double()
                y[..., later] += (rounded - y[..., block]) @ weights
            y[..., block] = rounded
        error = (y - x) @ query[0].double().flatten(0, 1).T
        projected.append(float(error.norm()))
    assert projected[2] < projected[1]
    assert projected[2] < 1e-2 * projected[0]


def test_it_lowers_the_error_of_the_scores() -> None:
    query = randn(1, 4, 256, 8, seed=1) @ randn(8, HEAD_DIM, seed=2)
    x = randn(1, 2, 256, HEAD_DIM, seed=3)
    errors = []
    for codec in (Kivi(), SquatPaper(rank=8), SquatPaper(), SquatPaper(block=32)):
        error = store(codec, x, query).dequantize() - x
        scores = error.repeat_interleave(2, 1) @ query.transpose(-1, -2)
        errors.append(float(scores.square().mean()))
    assert max(errors[1:]) < 0.7 * errors[0]
    assert errors[2] < errors[3], "smaller blocks compensate more"


def test_the_published_strength_grows_with_the_prompt() -> None:
    short, long = (randn(1, 2, tokens, HEAD_DIM, seed=1) for tokens in (64, 640))
    x, keep = randn(1, 1, 64, HEAD_DIM), torch.ones(1, 640).bool()
    published = SquatPaper(strength=1e-4, relative=False, block=32)
    a, b = (
        published.fit("key", x, q, keep[:, : q.shape[2]]).feedback.norm()  # pyright: ignore
        for q in (short, long)
    )
    assert b > 2 * a


def test_only_whole_plane_groups_are_rounded_together() -> None:
    for options, text in (
        ({"block": 8}, "block must be a multiple of 16 channels, got 8"),
        ({"rank": 0}, "rank must be at least 1, or None for all, got 0"),
        ({"strength": -1.0}, "strength must be a number, 0 or more, got -1.0"),
        ({"group_size": 16}, "group_size must be 32, 64 or 128, got 16"),
    ):
        with pytest.raises(ValueError, match=f"^{text}$"):
            SquatPaper(**options)  # pyright: ignore


def test_appended_keys_are_rounded_as_kivi_rounds_them() -> None:
    x, query = randn(1, 2, 128, HEAD_DIM), randn(1, 4, 64, HEAD_DIM, seed=4)
    handle = torch.cat([store(SquatPaper(), x[:, :, :64], query), x[:, :, 64:]], 2)
    plain = torch.cat([store(Kivi(), x[:, :, :64], None), x[:, :, 64:]], 2)
    mine, kivis = (h.writable_storage() for h in (handle, plain))  # pyright: ignore
    assert torch.equal(mine["qdata"][:, :, 64:128], kivis["qdata"][:, :, 64:128])
    assert not torch.equal(mine["qdata"][:, :, :64], kivis["qdata"][:, :, :64])
    assert reference.Extent(128, 128) == mine.extent
