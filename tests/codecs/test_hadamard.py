"""The fixed rotation is orthogonal, fixed, and spreads what it should."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squat_fx.codecs.hadamard import hadamard, rotation, rotation_pair, signs


@given(head_dim=st.integers(1, 256))
def test_it_is_orthogonal(head_dim: int) -> None:
    matrix = rotation(head_dim)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_dim), rtol=0, atol=1e-6)
    there, back = rotation_pair(head_dim, torch.device("cpu"))
    assert torch.equal(there[0], matrix)
    assert torch.equal(back[0], matrix.T)


@pytest.mark.parametrize(
    ("head_dim", "block"), [(64, 64), (80, 16), (96, 32), (112, 16), (192, 64)]
)
def test_blocks_are_the_largest_power_of_two_divisor(head_dim: int, block: int) -> None:
    mixed = rotation(head_dim) != 0
    index = torch.arange(head_dim) // block
    assert torch.equal(mixed, index[:, None] == index[None, :])


@pytest.mark.parametrize("head_dim", [16, 64, 256])
def test_a_constant_spreads_evenly(head_dim: int) -> None:
    spread = (torch.ones(head_dim) @ rotation(head_dim)).abs()
    torch.testing.assert_close(spread, torch.ones(head_dim))
    assert (torch.ones(head_dim, dtype=torch.float64) @ hadamard(head_dim)).count_nonzero() == 1


def test_the_signs_are_fixed() -> None:
    assert signs(16).tolist() == [1, 1, 1, -1, 1, 1, -1, 1, 1, 1, 1, -1, -1, -1, 1, -1]


def test_an_order_that_is_no_power_of_two_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a power of two, got 12"):
        hadamard(12)
