"""Error feedback equals the paper's recursion, and does what it is for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squat_fx.codecs.feedback import feedback_matrix, leading_subspace, metric, query_gram
from tests.conftest import left_padding, randn


def random_metric(head_dim: int, seed: int, strength: float = 3.0) -> Tensor:
    query = randn(1, 2, 3 * head_dim, head_dim, seed=seed) * torch.logspace(0, -2, head_dim)
    return metric(query_gram(query, torch.ones(1, 3 * head_dim).bool(), 2), strength, True)


def published(h: Tensor, block: int) -> Tensor:
    """The recursion of the paper's code: ``B_t @ H_t`` for every block, transposed into rows."""
    head_dim = h.shape[-1]
    inverse = torch.linalg.inv(h)
    out = torch.zeros_like(h)
    a = h
    for last in range(head_dim, block, -block):
        first = last - block  # the trailing block is taken out of A
        m, n, o = a[:first, :first], a[:first, first:], a[first:, first:]
        a = m - n @ torch.linalg.solve(o, n.T)
        rows = slice(first - block, first)
        h_t = a[:, first - block :]  # [first, block]
        b_t = inverse[first:, :first]
        out[rows, first:] = (b_t @ h_t).T
    return out


@given(block=st.sampled_from([16, 32]), seed=st.integers(0, 50))
def test_it_equals_the_published_recursion(block: int, seed: int) -> None:
    h = random_metric(64, seed)
    found = feedback_matrix(h, block)
    for head in range(2):
        expected = published(h[0, head], block)
        torch.testing.assert_close(found[0, head].double(), expected, rtol=1e-5, atol=1e-6)


@given(rank=st.integers(1, 30), seed=st.integers(0, 50))
def test_it_equals_the_closed_form_of_low_rank(rank: int, seed: int) -> None:
    """``-lambda Qf.T (I + lambda Qf Qf.T)^-1 Qa``, which never builds ``H``."""
    q = randn(rank, 64, seed=seed).double()
    h = torch.eye(64).double() + 0.7 * q.T @ q
    first, later = q[:, 16:32], q[:, 32:]
    inner = torch.eye(rank).double() + 0.7 * later @ later.T
    expected = (-0.7 * later.T @ torch.linalg.solve(inner, first)).T
    found = feedback_matrix(h[None, None], 16)[0, 0, 16:32, 32:]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_it_is_strictly_upper_triangular_in_blocks() -> None:
    found = feedback_matrix(random_metric(80, 1), 16)
    index = torch.arange(80) // 16
    assert not found[..., index[:, None] >= index[None, :]].any()


def test_the_best_compensation_is_found() -> None:
    """No other change of the later channels lowers the weighted error."""
    h = random_metric(64, 3)[0, 0]
    matrix = feedback_matrix(h[None, None], 16)[0, 0].double()
    error = torch.zeros(64).double()
    error[:16] = randn(16, seed=5).double()
    error[16:] = error[:16] @ matrix[:16, 16:]
    gradient = (h @ error)[16:]
    assert gradient.abs().max() < 1e-5 * (h @ error).abs().max()


def test_the_gram_leaves_padding_out_and_groups_heads() -> None:
    query = randn(2, 6, 40, 16)
    keep = left_padding([0, 13], 40)
    found = query_gram(query, keep, 3)
    mine = query[1, 2:4, 13:].reshape(-1, 16).double()
    torch.testing.assert_close(found[1, 1], mine.T @ mine, rtol=1e-5, atol=1e-5)
    assert found.shape == (2, 3, 16, 16)


@given(factor=st.floats(0.01, 100), seed=st.integers(0, 20))
def test_a_relative_strength_does_not_feel_the_length_of_a_prompt(factor: float, seed: int) -> None:
    gram = query_gram(randn(1, 2, 50, 32, seed=seed), torch.ones(1, 50).bool(), 2)
    torch.testing.assert_close(metric(gram, 2.0, True), metric(factor * gram, 2.0, True))
    assert not torch.allclose(metric(gram, 2.0, False), metric(2 * gram, 2.0, False))


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_the_leading_subspace_is_that_of_the_largest_eigenvalues(rank: int) -> None:
    vectors = torch.linalg.qr(randn(3, 2, 64, 64).double())[0]
    values = torch.cat([torch.linspace(9, 5, rank), torch.linspace(0.3, 0.01, 64 - rank)]).double()
    gram = vectors * values @ vectors.mT
    expected = vectors[..., :rank] * values[:rank] @ vectors[..., :rank].mT
    torch.testing.assert_close(leading_subspace(gram, rank), expected, rtol=0, atol=1e-4)


def test_a_gram_of_zeros_gives_no_feedback() -> None:
    h = metric(torch.zeros(1, 1, 32, 32).double(), 1.0, True)
    assert not feedback_matrix(h, 16).any()
    assert leading_subspace(torch.zeros(1, 1, 32, 32).double(), 4).isfinite().all()
