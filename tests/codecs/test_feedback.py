"""Feedback: the paper's recursion, its closed forms, and what makes it the best there is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squat_fx.codecs.feedback import (
    CHUNK,
    feedback_matrix,
    leading_subspace,
    metric,
    query_gram,
)
from tests.conftest import randn, whole_numbers

SEEDS = st.integers(0, 2**16)
HEAD_DIMS = st.sampled_from([16, 20, 40, 64, 80, 128])
BLOCKS = st.sampled_from([16, 32, 64])
STRENGTHS = st.sampled_from([1e-3, 0.3, 1.0, 10.0, 1e3])


def gram_of(head_dim: int, tokens: int, seed: int) -> Tensor:
    """``Q.T @ Q`` of random queries, some directions far stronger than others, fp64."""
    query = randn(1, 2, tokens, head_dim, seed=seed).double()
    query = query * torch.logspace(1, -1, head_dim, dtype=torch.float64)
    return query.mT @ query


def edges(head_dim: int, block: int) -> list[tuple[slice, slice]]:
    """Each block of channels that has later ones, and those."""
    starts = range(0, head_dim - block, block)
    return [(slice(first, first + block), slice(first + block, head_dim)) for first in starts]


# the metric ---------------------------------------------------------------------------------------


@given(
    num_kv_heads=st.integers(1, 3),
    queries_per_kv=st.integers(1, 4),
    tokens=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    garbage=st.sampled_from([0.0, 1e4, torch.inf, torch.nan]),
    seed=SEEDS,
)
def test_the_gram_sums_the_kept_queries_of_the_heads_that_share_a_key(
    num_kv_heads: int,
    queries_per_kv: int,
    tokens: int,
    dtype: torch.dtype,
    garbage: float,
    seed: int,
) -> None:
    heads = num_kv_heads * queries_per_kv
    query = whole_numbers(2, heads, tokens, 4, seed=seed)
    keep = randn(2, tokens, seed=seed + 1) > 0
    shown = query.masked_fill(~keep[:, None, :, None], garbage).to(dtype)
    gram = query_gram(shown, keep, num_kv_heads)
    assert gram.dtype == torch.float64
    expected = torch.zeros(2, num_kv_heads, 4, 4, dtype=torch.float64)
    for row in range(2):
        for head in range(heads):
            for q in query[row, head][keep[row]].double():
                expected[row, head // queries_per_kv] += q[:, None] * q
    assert torch.equal(gram, expected)


def test_a_long_prompt_is_summed_in_pieces() -> None:
    query = whole_numbers(1, 2, 2 * CHUNK + 7, 4)
    keep = torch.ones(1, query.shape[2], dtype=torch.bool)
    stacked = query.flatten(1, 2).double()
    assert torch.equal(query_gram(query, keep, 1)[:, 0], stacked.mT @ stacked)


@given(scale=st.sampled_from([1e-3, 7.0, 1e4]), repeats=st.integers(1, 5), strength=STRENGTHS)
def test_a_relative_strength_sees_neither_the_size_nor_the_number_of_queries(
    scale: float, repeats: int, strength: float
) -> None:
    query, keep = randn(1, 4, 12, 16), torch.ones(1, 12, dtype=torch.bool)
    more = scale * query.repeat(1, 1, repeats, 1)
    grams = query_gram(query, keep, 2), query_gram(more, keep.repeat(1, repeats), 2)
    relative = [metric(gram, strength, relative=True) for gram in grams]
    torch.testing.assert_close(*relative, rtol=1e-5, atol=1e-6)
    mean = relative[0].diagonal(dim1=-2, dim2=-1).mean(-1)
    torch.testing.assert_close(mean, torch.full_like(mean, 1 + strength))


def test_an_absolute_strength_is_the_papers() -> None:
    gram = gram_of(16, 12, 0)
    expected = torch.eye(16, dtype=torch.float64) + 1e-3 * gram
    torch.testing.assert_close(metric(gram, 1e-3, relative=False), expected)


@pytest.mark.parametrize("relative", [False, True])
def test_without_queries_or_strength_nothing_is_fed_back(relative: bool) -> None:
    nothing = torch.zeros(1, 2, 48, 48, dtype=torch.float64)
    assert not feedback_matrix(metric(nothing, 1.0, relative), 16).any()
    assert not feedback_matrix(metric(gram_of(48, 12, 0), 0.0, relative), 16).any()


# the compensation ---------------------------------------------------------------------------------


def papers_recursion(h: Tensor, block: int) -> Tensor:
    """SQuat, section 4: inverses downdated block by block from the end.

    ``A_T = inv(H)`` of all channels; dropping the last block of ``inv(A_t)`` leaves its Schur
    complement. With ``H_t`` the last columns of ``inv(A_t)`` and ``B_t`` a block of ``inv(H)``,
    ``k[later] += (rounded - k)[block] @ (B_t @ H_t).T``.
    """
    head_dim = h.shape[-1]
    p_inverse, a_inverse = torch.linalg.inv(h), h
    out = torch.zeros_like(h)
    for first in reversed(range(0, head_dim, block)):
        last = min(first + block, head_dim)
        if last < head_dim:
            compensation = p_inverse[last:, :last] @ a_inverse[:, first:]
            out[first:last, last:] = compensation.T
        m, n_t = a_inverse[:first, :first], a_inverse[:first, first:]
        n, o = a_inverse[first:, :first], a_inverse[first:, first:]
        a_inverse = m - n_t @ torch.linalg.solve(o, n)
    return out


@given(head_dim=HEAD_DIMS, block=BLOCKS, strength=STRENGTHS, seed=SEEDS)
def test_it_is_the_papers_recursion(head_dim: int, block: int, strength: float, seed: int) -> None:
    h = metric(gram_of(head_dim, 40, seed), strength, relative=True)
    feedback = feedback_matrix(h, block)
    assert feedback.dtype == torch.float32
    for head in range(2):
        expected = papers_recursion(h[0, head], block).float()
        torch.testing.assert_close(feedback[0, head], expected, rtol=1e-5, atol=1e-6)


@given(head_dim=HEAD_DIMS, block=BLOCKS, rank=st.integers(1, 12), strength=STRENGTHS, seed=SEEDS)
def test_it_is_the_closed_form_of_few_queries(
    head_dim: int, block: int, rank: int, strength: float, seed: int
) -> None:
    """``-lambda * Q[later].T @ inv(I + lambda * Q[later] @ Q[later].T) @ Q[block]``."""
    query = randn(rank, head_dim, seed=seed).double()
    identity = torch.eye(rank, dtype=torch.float64)
    h = metric((query.T @ query)[None, None], strength, relative=False)
    feedback = feedback_matrix(h, block)[0, 0]
    for rows, later in edges(head_dim, block):
        q, a = query[:, later], query[:, rows]
        expected = -strength * q.T @ torch.linalg.solve(identity + strength * q @ q.T, a)
        torch.testing.assert_close(feedback[rows, later], expected.T.float(), rtol=1e-4, atol=1e-5)


@given(head_dim=HEAD_DIMS, block=BLOCKS, strength=STRENGTHS, seed=SEEDS)
def test_no_other_shift_of_the_later_channels_makes_the_error_smaller(
    head_dim: int, block: int, strength: float, seed: int
) -> None:
    """The gradient of ``e @ H @ e.T`` in the later channels is zero, whatever the block's error."""
    h = metric(gram_of(head_dim, 40, seed), strength, relative=True)
    feedback = feedback_matrix(h, block).double()
    for rows, later in edges(head_dim, block):
        gradient = h[..., rows, later] + feedback[..., rows, later] @ h[..., later, later]
        assert gradient.abs().max() <= 1e-5 * h.abs().max()


@given(head_dim=HEAD_DIMS, block=BLOCKS, seed=SEEDS)
def test_errors_flow_from_a_block_into_later_ones_only(
    head_dim: int, block: int, seed: int
) -> None:
    feedback = feedback_matrix(metric(gram_of(head_dim, 40, seed), 1.0, relative=True), block)
    index = torch.arange(head_dim) // block
    later = index[:, None] < index
    assert not feedback[..., ~later].any()
    assert feedback[..., later].all()


def test_every_sequence_and_head_has_its_own() -> None:
    h = metric(torch.cat([gram_of(48, 40, seed) for seed in (0, 1)]), 1.0, relative=True)
    together = feedback_matrix(h, 16)
    for row in range(2):
        for head in range(2):
            alone = feedback_matrix(h[row : row + 1, head : head + 1], 16)
            torch.testing.assert_close(together[row, head], alone[0, 0])


# the subspace -------------------------------------------------------------------------------------


@given(
    head_dim=st.sampled_from([16, 40, 64]),
    rank=st.integers(1, 15),
    gap=st.sampled_from([10, 1000]),
    seed=SEEDS,
)  # fmt: skip
def test_the_subspace_is_that_of_the_largest_eigenvalues(
    head_dim: int, rank: int, gap: float, seed: int
) -> None:
    """Where the eigenvalues leave no doubt which they are."""
    vectors = torch.linalg.qr(randn(2, 3, head_dim, head_dim, seed=seed).double()).Q
    values = 1 + randn(head_dim, seed=seed + 1).double().abs()
    values[:rank] *= gap * values.max() / values[:rank].min()
    gram = (vectors * values) @ vectors.mT
    kept = vectors[..., :rank]
    expected = (kept * values[:rank]) @ kept.mT
    torch.testing.assert_close(
        leading_subspace(gram, rank), expected, rtol=1e-4, atol=1e-4 * values.max().item()
    )
    eigenvalues = torch.linalg.eigvalsh(leading_subspace(gram, rank))
    assert (eigenvalues[..., :-rank].abs() <= 1e-9 * values.max()).all()


def test_a_rank_of_all_channels_changes_nothing() -> None:
    gram = gram_of(16, 40, 0)
    assert leading_subspace(gram, 16) is gram


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_fewer_queries_than_the_rank_give_all_of_them(tokens: int) -> None:
    gram = gram_of(16, tokens, 0)
    torch.testing.assert_close(leading_subspace(gram, 5), gram)
