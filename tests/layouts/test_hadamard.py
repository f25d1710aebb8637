"""The rotation: orthogonal at every size, the same everywhere, and even to what all keys share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squat_fx.layouts.hadamard import hadamard, rotation, rotation_pair, signs
from tests.conftest import randn

CPU = torch.device("cpu")


@pytest.mark.parametrize("order", [1, 2, 4, 64, 256])
def test_a_hadamard_matrix_is_of_ones_and_its_rows_are_orthogonal(order: int) -> None:
    matrix = hadamard(order)
    assert matrix.dtype == torch.float64
    assert torch.equal(matrix.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))
    assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("order", [-4, 0, 3, 12, 255])
def test_another_order_is_refused(order: int) -> None:
    text = f"^the order of a Hadamard matrix must be a power of two, got {order}$"
    with pytest.raises(ValueError, match=text):
        hadamard(order)


def test_every_head_dim_has_an_orthogonal_rotation_of_equal_blocks() -> None:
    """Of the largest power of two that divides it, and of numbers that are all of one size."""
    for head_dim in range(1, 257):
        matrix, block = rotation(head_dim), head_dim & -head_dim
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_dim), rtol=0, atol=1e-6)
        index = torch.arange(head_dim) // block
        expected = (index[:, None] == index) * block**-0.5
        torch.testing.assert_close(matrix.abs(), expected, rtol=1e-6, atol=0)


def test_it_is_the_same_for_every_model() -> None:
    """Stored caches and calibrations depend on it: this is part of the stored format."""
    assert signs(16).tolist() == [1, 1, 1, -1, 1, 1, -1, 1, 1, 1, 1, -1, -1, -1, 1, -1]
    assert (2 * rotation(4)).tolist() == [
        [1, 1, 1, 1],
        [1, -1, 1, -1],
        [1, 1, -1, -1],
        [-1, 1, 1, -1],
    ]
    assert (8 * rotation(64)[60:, :4]).tolist() == [
        [-1, -1, -1, -1],
        [-1, 1, -1, 1],
        [1, 1, -1, -1],
        [-1, 1, 1, -1],
    ]


@pytest.mark.parametrize("head_dim", [4, 16, 64, 256])
def test_what_all_channels_share_spreads_evenly(head_dim: int) -> None:
    """A plain Hadamard matrix would collect it in one channel."""
    assert torch.equal((torch.ones(head_dim) @ rotation(head_dim)).abs(), torch.ones(head_dim))


@given(head_dim=st.integers(1, 256), channel=st.integers(0, 255))
def test_an_outlier_spreads_over_its_block(head_dim: int, channel: int) -> None:
    x = torch.zeros(head_dim)
    x[channel % head_dim] = 1.0
    block = head_dim & -head_dim
    spread = (x @ rotation(head_dim)).abs()
    assert int(spread.count_nonzero()) == block
    torch.testing.assert_close(spread.max(), torch.tensor(block**-0.5))


@given(head_dim=st.integers(1, 256), seed=st.integers(0, 2**16))
def test_the_pair_goes_there_and_back_for_all_heads(head_dim: int, seed: int) -> None:
    there, back = rotation_pair(head_dim, CPU)
    x = randn(2, 3, 5, head_dim, seed=seed)
    assert there.shape == back.shape == (1, head_dim, head_dim)
    torch.testing.assert_close(x @ there @ back, x)
    torch.testing.assert_close((x @ there).norm(dim=-1), x.norm(dim=-1))


def test_the_matrices_are_made_once_and_are_normal_tensors() -> None:
    rotation.cache_clear()
    rotation_pair.cache_clear()
    with torch.inference_mode():
        pair = rotation_pair(24, CPU)
    assert rotation_pair(24, CPU) is pair
    assert not pair.is_inference()
    assert not rotation(24).is_inference()
    assert pair.is_contiguous()
