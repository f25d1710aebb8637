"""Sign sketches: orthogonal directions, exact packing, and an estimate that is right on average."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squat_fx.layouts.sketch import BYTE, directions, estimate, sign_bits, signs_of
from tests.conftest import randn

CPU = torch.device("cpu")
SEEDS = st.integers(0, 2**16)
HEAD_DIMS = st.sampled_from([8, 16, 24, 40, 64, 80, 128])
SKETCH_DIMS = st.sampled_from([16, 48, 64, 128, 256])


@given(head_dim=HEAD_DIMS, sketch_dim=SKETCH_DIMS)
def test_directions_are_orthogonal_in_blocks_and_as_long_as_gaussian_ones(
    head_dim: int, sketch_dim: int
) -> None:
    matrix = directions(head_dim, sketch_dim, CPU).double()
    assert matrix.shape == (sketch_dim, head_dim)
    block = torch.arange(sketch_dim) // head_dim
    products = (matrix @ matrix.T)[block[:, None] == block]
    expected = head_dim * torch.eye(sketch_dim, dtype=torch.float64)[block[:, None] == block]
    torch.testing.assert_close(products, expected, rtol=0, atol=2e-3 * head_dim)


@given(head_dim=HEAD_DIMS, sketch_dim=SKETCH_DIMS)
def test_fewer_directions_are_the_first_of_more(head_dim: int, sketch_dim: int) -> None:
    more = directions(head_dim, sketch_dim + 16, CPU)
    assert torch.equal(directions(head_dim, sketch_dim, CPU), more[:sketch_dim])


def test_they_are_the_same_for_every_model() -> None:
    """Stored caches depend on them: this is part of the stored format."""
    first = directions(64, 16, CPU)[0, :4].float()
    expected = torch.tensor([0.28687, 0.29346, 0.35205, -0.21130])
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-3)


def test_they_are_made_once_and_are_normal_tensors() -> None:
    directions.cache_clear()
    with torch.inference_mode():
        matrix = directions(24, 32, CPU)
    assert directions(24, 32, CPU) is matrix
    assert not matrix.is_inference()
    assert matrix.is_contiguous()


@given(head_dim=HEAD_DIMS, sketch_dim=SKETCH_DIMS, seed=SEEDS)
def test_the_signs_come_back(head_dim: int, sketch_dim: int, seed: int) -> None:
    x = randn(2, 3, 5, head_dim, seed=seed)
    stored = sign_bits(x, sketch_dim)
    assert (stored.dtype, stored.shape) == (torch.uint8, (2, 3, 5, sketch_dim // BYTE))
    products = x @ directions(head_dim, sketch_dim, CPU).float().T
    assert torch.equal(signs_of(stored), torch.where(products >= 0, 1.0, -1.0))


def test_sign_i_is_bit_i_modulo_8_of_byte_i_over_8() -> None:
    stored = torch.tensor([0b00000101, 0b10000000], dtype=torch.uint8)
    assert signs_of(stored).tolist() == [1, -1, 1] + [-1] * 12 + [1]


@given(head_dim=HEAD_DIMS, sketch_dim=SKETCH_DIMS, seed=SEEDS)
def test_a_product_with_the_estimate_is_the_papers_estimator(
    head_dim: int, sketch_dim: int, seed: int
) -> None:
    x, query = randn(5, head_dim, seed=seed), randn(7, head_dim, seed=seed + 1)
    stored, norm = sign_bits(x, sketch_dim), x.norm(dim=-1, keepdim=True)
    sketched_query = query @ directions(head_dim, sketch_dim, CPU).float().T
    papers = math.sqrt(math.pi / 2) / sketch_dim * norm.T * (sketched_query @ signs_of(stored).T)
    estimated = estimate(stored, norm, head_dim)
    rounding = 2e-7 * (query.norm(dim=-1).max() * estimated.norm(dim=-1).max()).item()
    torch.testing.assert_close(query @ estimated.T, papers, rtol=1.3e-6, atol=max(1e-5, rounding))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_estimate_is_unbiased(head_dim: int) -> None:
    """But for what an even direction has more than a Gaussian one, ``1 / (4 d)``."""
    x = randn(20_000, head_dim)
    norm = x.norm(dim=-1, keepdim=True)
    stored = sign_bits(x, 256)
    along = (estimate(stored, norm, head_dim) * x).sum(-1) / norm[:, 0].square()
    bound = 3 * along.std().item() / 20_000**0.5
    assert along.mean().item() == pytest.approx(1 + 1 / (4 * head_dim), abs=bound + 5e-4)


@pytest.mark.parametrize("sketch_dim", [128, 256, 512])
def test_the_error_falls_with_the_number_of_signs(sketch_dim: int) -> None:
    """``pi / 2 - 1`` for a full orthogonal block, where i.i.d. directions have ``pi / 2 * d / m``,
    and half of it for two of them.
    """
    x = randn(4000, 128)
    restored = estimate(sign_bits(x, sketch_dim), x.norm(dim=-1, keepdim=True), 128)
    error = (restored - x).square().sum(-1).mean() / x.square().sum(-1).mean()
    expected = (math.pi / 2 - 1) * 128 / sketch_dim
    assert error.item() == pytest.approx(expected, rel=0.03)
