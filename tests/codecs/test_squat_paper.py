"""SQuat as published: KIVI whose key errors are orthogonal to the queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squat_fx.codecs import Codec, Kivi, SquatPaper
from squat_fx.codecs.feedback import feedback_matrix, metric, query_gram
from squat_fx.state import QuantizedKV
from tests.conftest import left_padding, randn, stored_format

TOKENS, HEADS = 64, 2
SEEDS = st.integers(0, 2**16)


def stored(
    codec: Codec,
    x: Tensor,
    query: Tensor | None,
    bits: int = 2,
    role: Any = "key",
    valid: Tensor | None = None,
) -> QuantizedKV:
    """All of ``x``, packed: no token stays exact."""
    fmt = stored_format(codec, role, x.shape[3], bits, residual_length=0, sink_length=0)
    return QuantizedKV.from_dense(x, fmt, role, valid, query)


def errors(codec: Codec, key: Tensor, query: Tensor | None, bits: int = 2) -> Tensor:
    """Rounded minus true, fp64."""
    return stored(codec, key, query, bits).dequantize().double() - key.double()


def assert_same_arenas(a: QuantizedKV, b: QuantizedKV) -> None:
    for one, other in zip(a._storage.tensors, b._storage.tensors, strict=True):
        assert torch.equal(one, other)


def few_directions(rank: int, head_dim: int, seed: int, num_heads: int = HEADS) -> Tensor:
    """Queries of which every head has ``rank`` directions, ``[1, num_heads, tokens, head_dim]``."""
    return randn(1, num_heads, TOKENS, rank, seed=seed) @ randn(
        1, num_heads, rank, head_dim, seed=seed + 1
    )


# KIVI and no more -------------------------------------------------------------------------------


@given(
    head_dim=st.sampled_from([16, 20, 64]),
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    role=st.sampled_from(["key", "value"]),
    group_size=st.sampled_from([32, 64]),
    pads=st.sampled_from([None, [0, 9]]),
    seed=SEEDS,
)
def test_at_strength_zero_it_is_kivi(
    head_dim: int, bits: int, role: str, group_size: int, pads: list[int] | None, seed: int
) -> None:
    x, query = randn(2, 2, 80, head_dim, seed=seed), randn(2, 4, 80, head_dim, seed=seed + 1)
    valid = left_padding(pads, 80) if pads else None
    found = stored(SquatPaper(group_size, strength=0.0), x, query, bits, role, valid)
    assert_same_arenas(found, stored(Kivi(group_size), x, None, bits, role, valid))


@given(bits=st.sampled_from([1, 2, 3, 4, 8]), seed=SEEDS)
def test_without_queries_it_is_kivi(bits: int, seed: int) -> None:
    x = randn(2, 2, 80, 40, seed=seed)
    assert_same_arenas(stored(SquatPaper(), x, None, bits), stored(Kivi(), x, None, bits))


def test_values_are_kivis_and_only_keys_ask_for_queries() -> None:
    x, query = randn(2, 2, 80, 40), randn(2, 4, 80, 40, seed=1)
    assert_same_arenas(
        stored(SquatPaper(), x, None, role="value"), stored(Kivi(), x, None, role="value")
    )
    assert not torch.equal(errors(SquatPaper(), x, query), errors(Kivi(), x, query))
    assert SquatPaper().taps("key") == {"query"}
    assert SquatPaper().taps("value") == frozenset()
    assert SquatPaper(strength=0.0).taps("key") == frozenset()


@given(head_dim=st.sampled_from([16, 20, 64]), bits=st.sampled_from([2, 3, 8]), seed=SEEDS)
def test_a_strength_of_almost_nothing_is_kivi(head_dim: int, bits: int, seed: int) -> None:
    """The same rounding, a block of channels after the other."""
    x, query = randn(1, 2, 64, head_dim, seed=seed), randn(1, 2, 64, head_dim, seed=seed + 1)
    assert_same_arenas(
        stored(SquatPaper(strength=1e-300), x, query, bits), stored(Kivi(), x, None, bits)
    )


# the law ----------------------------------------------------------------------------------------


@given(
    head_dim=st.sampled_from([48, 64, 80]),
    rank=st.integers(1, 8),
    bits=st.sampled_from([2, 3, 4]),
    seed=SEEDS,
)
def test_what_queries_see_of_the_error_is_what_the_last_block_rounds(
    head_dim: int, rank: int, bits: int, seed: int
) -> None:
    """As lambda grows, the error is orthogonal to the queries but for the last block's own.

    With ``own`` the rounding error of each channel, at most half a step, and ``F`` the feedback,
    ``error = own + own @ F``. Row ``i`` of ``I + F`` is orthogonal to the queries' subspace as soon
    as there are as many channels after its block as the subspace has dimensions; the last block
    has none after it, so ``error @ q = own[last block] @ q[last block]``, all others cancelled.
    """
    key = randn(1, HEADS, TOKENS, head_dim, seed=seed)
    query = few_directions(rank, head_dim, seed=seed + 1)
    strength = 1e6
    handle = stored(SquatPaper(strength=strength), key, query, bits)
    error = handle.dequantize().double() - key.double()

    keep = torch.ones(1, TOKENS, dtype=torch.bool)
    h = metric(query_gram(query, keep, HEADS), strength, relative=True)
    feedback = feedback_matrix(h, 16).double()
    own = error @ torch.linalg.inv(torch.eye(head_dim, dtype=torch.float64) + feedback)
    step = handle._storage["scale"][:, :, : TOKENS // 32].double().repeat_interleave(32, 2)
    reach = own.abs().amax() + error.abs().amax()
    assert (own.abs() <= step / 2 * (1 + 1e-2) + 1e-3 * reach).all()

    q, last = query.double().mT, slice(-16, None)
    seen, expected = error @ q, own[..., last] @ q[..., last, :]
    slack = 1e-3 * (own.norm(dim=-1, keepdim=True) * q.norm(dim=-2, keepdim=True))
    assert ((seen - expected).abs() <= slack).all()


@given(rank=st.integers(1, 8), bits=st.sampled_from([2, 3, 4]), seed=SEEDS)
def test_queries_see_far_less_of_it_than_of_kivis(rank: int, bits: int, seed: int) -> None:
    """The last of eight blocks has a third of the whole error, if all are alike."""
    key = randn(1, HEADS, TOKENS, 128, seed=seed)
    query = few_directions(rank, 128, seed=seed + 1)
    ours, kivis = (
        (errors(codec, key, query, bits) @ query.double().mT).norm()
        for codec in (SquatPaper(strength=1e4), Kivi())
    )
    assert ours < 0.6 * kivis


def test_the_whole_error_grows_meanwhile() -> None:
    """Why it must not be judged by the error of the keys."""
    key, query = randn(1, HEADS, TOKENS, 64), few_directions(4, 64, seed=1)
    sizes = [errors(SquatPaper(strength=s), key, query).norm().item() for s in (0.0, 1.0, 1e6)]
    assert sizes == sorted(sizes)


# what the options do ----------------------------------------------------------------------------


def test_an_absolute_strength_grows_with_the_prompt_and_a_relative_one_does_not() -> None:
    key, query = randn(1, HEADS, TOKENS, 64), few_directions(20, 64, seed=1)
    for relative in (False, True):
        codec = SquatPaper(strength=1e-3, relative=relative)
        once = errors(codec, key, query)
        thrice = errors(codec, key.repeat(1, 1, 3, 1), query.repeat(1, 1, 3, 1))[:, :, :TOKENS]
        assert torch.equal(once, thrice) == relative


def test_the_published_strength_is_taken_as_it_is() -> None:
    key, query = randn(1, HEADS, TOKENS, 64), few_directions(20, 64, seed=1)
    gram = query_gram(query, torch.ones(1, TOKENS, dtype=torch.bool), HEADS)
    fit = SquatPaper(strength=1e-3, relative=False, block=64).fit(
        "key", key, query, torch.ones(1, TOKENS, dtype=torch.bool)
    )
    h = torch.eye(64, dtype=torch.float64) + 1e-3 * gram
    assert not fit.fixed
    assert torch.equal(fit.feedback, feedback_matrix(h, 64))  # pyright: ignore[reportArgumentType]


def test_a_block_is_rounded_together() -> None:
    key, query = randn(1, HEADS, TOKENS, 128), few_directions(20, 128, seed=1)
    first_block = [errors(SquatPaper(block=b), key, query)[..., :64] for b in (16, 64)]
    plain = errors(Kivi(), key, None)[..., :64]
    assert torch.equal(first_block[1], plain)
    assert not torch.equal(first_block[0], plain)


def test_a_rank_keeps_the_leading_directions() -> None:
    """One direction a thousand times stronger is all that a rank of one sees."""
    key, strong = randn(1, HEADS, TOKENS, 64), 1e3 * few_directions(1, 64, seed=1)
    query = strong + few_directions(20, 64, seed=3)
    found, expected = (
        errors(codec, key, q) for codec, q in ((SquatPaper(rank=1), query), (SquatPaper(), strong))
    )
    assert ((found - expected).norm() / expected.norm()).item() < 0.02


def test_padding_and_its_queries_do_not_count() -> None:
    key, query = randn(2, HEADS, 80, 40), randn(2, 4, 80, 40, seed=1)
    valid = left_padding([0, 16], 80)
    hidden = ~valid[:, None, :, None]
    clean = stored(SquatPaper(), key, query, valid=valid)
    for garbage in (1e4, torch.nan):
        other = stored(
            SquatPaper(), key.masked_fill(hidden, garbage), query.masked_fill(hidden, garbage),
            valid=valid,
        )  # fmt: skip
        assert_same_arenas(other, clean)


def test_appended_tokens_are_kivis() -> None:
    key, query = randn(1, HEADS, 96, 64), few_directions(4, 64, seed=1)
    handle = stored(SquatPaper(), key[:, :, :TOKENS], query)
    longer = torch.cat([handle, key[:, :, TOKENS:]], 2).clone()
    plain = stored(Kivi(), key, None)
    ours, kivis = longer.dequantize(), plain.dequantize()
    assert torch.equal(ours[:, :, TOKENS:], kivis[:, :, TOKENS:])
    assert not torch.equal(ours[:, :, :TOKENS], kivis[:, :, :TOKENS])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"strength": -0.1}, "strength must be a number, 0 or more, got -0.1"),
        ({"strength": float("nan")}, "strength must be a number, 0 or more, got nan"),
        ({"strength": float("inf")}, "strength must be a number, 0 or more, got inf"),
        ({"block": 8}, "block must be a multiple of 16 channels, got 8"),
        ({"block": 0}, "block must be a multiple of 16 channels, got 0"),
        ({"block": 40}, "block must be a multiple of 16 channels, got 40"),
        ({"rank": 0}, "rank must be at least 1, or None for all, got 0"),
        ({"group_size": 16}, "group_size must be 32, 64 or 128, got 16"),
    ],
)
def test_other_options_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        SquatPaper(**options)
