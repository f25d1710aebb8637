"""Symmetric levels with a scale per token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squat_fx.codecs.planes import uniform_widths
from squat_fx.codecs.symmetric import (
    REACH,
    STEP,
    dequantize_tokens,
    quantize_tokens,
    token_scale,
)
from tests.conftest import randn

WIDTHS = st.lists(st.integers(0, 8), min_size=4, max_size=4).map(tuple)


@pytest.mark.parametrize(
    ("bits", "error"),
    [(1, 0.38), (2, 0.18), (3, 0.057), (4, 0.013), (5, 3.3e-3), (6, 1e-3), (7, 3e-4), (8, 1e-4)],
)
def test_the_error_on_a_gaussian(bits: int, error: float) -> None:
    y = randn(1, 1, 2000, 128)
    widths = uniform_widths(128, bits)
    rounded = dequantize_tokens(*quantize_tokens(y, widths), widths)
    assert (rounded - y).square().mean() < error


@given(widths=WIDTHS, seed=st.integers(0, 99), log_size=st.integers(-4, 4))
def test_a_number_inside_the_levels_is_off_by_half_a_step(
    widths: tuple[int, ...], seed: int, log_size: int
) -> None:
    y = randn(2, 1, 5, 64, seed=seed) * 10.0**log_size
    codes, scale = quantize_tokens(y, widths)
    unit = scale.float() * torch.tensor([STEP[b] for b in widths]).repeat_interleave(16)
    reach = unit * torch.tensor([2.0**b / 2 for b in widths]).repeat_interleave(16)
    off = (dequantize_tokens(codes, scale, widths) - y).abs()
    inside = y.abs() <= reach
    assert (off <= unit / 2 * (1 + 1e-3))[inside].all()
    assert (codes <= torch.tensor([2**b - 1 for b in widths]).repeat_interleave(16)).all()


@given(bits=st.integers(2, 8), seed=st.integers(0, 99))
def test_the_levels_reach_the_largest_number_of_a_token(bits: int, seed: int) -> None:
    y = randn(1, 1, 3, 64, seed=seed)
    y[..., 7] *= 20
    scale = token_scale(y, uniform_widths(64, bits)).float()
    outermost = scale[..., 0] * STEP[bits] * (2**bits - 1) / 2
    assert (outermost >= 0.999 * REACH[bits] * y.abs().amax(-1)).all()
    assert (scale[..., 0] >= 0.999 * y.square().mean(-1).sqrt()).all()


def test_zeros_and_huge_numbers_stay_finite() -> None:
    y = torch.zeros(1, 1, 3, 64)
    y[0, 0, 1] = 1e9
    y[0, 0, 2] = -1e-9
    for bits in range(1, 9):
        codes, scale = quantize_tokens(y, uniform_widths(64, bits))
        assert scale.dtype == torch.float16
        assert scale.isfinite().all()
        assert dequantize_tokens(codes, scale, uniform_widths(64, bits)).isfinite().all()


@given(widths=WIDTHS, seed=st.integers(0, 99))
def test_a_token_does_not_depend_on_others(widths: tuple[int, ...], seed: int) -> None:
    y = randn(2, 3, 7, 64, seed=seed)
    codes, scale = quantize_tokens(y, widths)
    alone_codes, alone_scale = quantize_tokens(y[1:, 2:, 4:5].clone(), widths)
    assert torch.equal(codes[1:, 2:, 4:5], alone_codes)
    assert torch.equal(scale[1:, 2:, 4:5], alone_scale)


@given(widths=WIDTHS, seed=st.integers(0, 99))
def test_no_feedback_is_feedback_of_zero(widths: tuple[int, ...], seed: int) -> None:
    y = randn(2, 1, 9, 64, seed=seed)
    zero = torch.zeros(2, 1, 64, 64)
    for a, b in zip(quantize_tokens(y, widths), quantize_tokens(y, widths, zero), strict=True):
        assert torch.equal(a, b)
