"""KIVI: half a step, no influence of padding, and scales that are stored as they were used."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squat_fx.codecs import Kivi, PerChannel, PerToken
from squat_fx.codecs.kivi import GROUP_DIMS, LARGEST_HALF, SMALLEST_SCALE
from tests.conftest import randn

WIDTHS = st.sampled_from([1, 2, 3, 4, 8])
SEEDS = st.integers(0, 2**16)
HALF_EPSILON = 2.0**-11  # relative error of rounding to fp16
HALF_SUBNORMAL = 2.0**-25  # absolute error of rounding to fp16 near zero


def reconstruct(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return codes.float() * scale.float() + zero_point.float()


def rounding_slack(groups: Tensor, scale: Tensor, bits: int) -> Tensor:
    """What storing scale and zero point in fp16 may cost beyond half a step, at most."""
    largest = groups.abs().amax(GROUP_DIMS, keepdim=True)
    levels = 2**bits - 1
    return HALF_EPSILON * (largest + levels * scale.float()) + (levels + 1) * HALF_SUBNORMAL


@given(
    bits=WIDTHS,
    tokens=st.sampled_from([1, 32]),
    channels=st.sampled_from([1, 32]),
    exponent=st.integers(-8, 8),
    offset=st.sampled_from([0.0, 3.0, -40.0]),
    seed=SEEDS,
)
def test_round_trip_error_is_at_most_half_a_step(
    bits: int, tokens: int, channels: int, exponent: int, offset: float, seed: int
) -> None:
    groups = (randn(2, 2, 3, tokens, 4, channels, seed=seed) + offset) * 2.0**exponent
    codes, scale, zero_point = Kivi().quantize(groups, None, bits)
    error = (reconstruct(codes, scale, zero_point) - groups).abs()
    assert codes.max() <= 2**bits - 1
    assert (error <= scale.float() / 2 + rounding_slack(groups, scale, bits)).all()


@given(bits=WIDTHS, seed=SEEDS)
def test_the_step_is_the_range_over_the_levels(bits: int, seed: int) -> None:
    """Without this a codec with a step too coarse would satisfy the law of half a step."""
    groups = randn(1, 2, 2, 32, 3, 1, seed=seed)
    _, scale, _ = Kivi().quantize(groups, None, bits)
    span = groups.amax(GROUP_DIMS, keepdim=True) - groups.amin(GROUP_DIMS, keepdim=True)
    torch.testing.assert_close(scale.float(), span / (2**bits - 1), rtol=HALF_EPSILON, atol=1e-7)


@given(bits=WIDTHS, seed=SEEDS, padding=st.sampled_from([0.0, 1e4, -1e4, torch.inf, torch.nan]))
def test_padding_never_touches_a_range(bits: int, seed: int, padding: float) -> None:
    groups = randn(2, 2, 3, 32, 4, 1, seed=seed)
    valid = randn(2, 1, 3, 32, 1, 1, seed=seed + 1) > 0
    padded = groups.masked_fill(~valid, padding)
    expected = Kivi().quantize(groups, valid, bits)
    actual = Kivi().quantize(padded, valid, bits)
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[2], expected[2])
    assert torch.equal(actual[0][valid.expand_as(groups)], expected[0][valid.expand_as(groups)])


@given(bits=WIDTHS, seed=SEEDS)
def test_the_range_is_that_of_the_valid_tokens_alone(bits: int, seed: int) -> None:
    groups = randn(1, 2, 1, 32, 3, 1, seed=seed)
    valid = torch.zeros(1, 1, 1, 32, 1, 1, dtype=torch.bool)
    valid[:, :, :, 20:] = True
    _, scale, zero_point = Kivi().quantize(groups, valid, bits)
    _, alone_scale, alone_zero_point = Kivi().quantize(groups[:, :, :, 20:], None, bits)
    assert torch.equal(scale, alone_scale)
    assert torch.equal(zero_point, alone_zero_point)


def test_a_group_of_padding_is_finite() -> None:
    groups = torch.full((1, 1, 1, 32, 2, 1), 5.0)
    codes, scale, zero_point = Kivi().quantize(groups, torch.tensor(False), 2)
    assert reconstruct(codes, scale, zero_point).isfinite().all()
    assert not zero_point.any()


@pytest.mark.parametrize("value", [0.0, 1.5, -3.0])
def test_a_constant_group_is_exact(value: float) -> None:
    groups = torch.full((1, 1, 1, 32, 1, 1), value)
    codes, scale, zero_point = Kivi().quantize(groups, None, 2)
    assert not codes.any()
    assert torch.equal(reconstruct(codes, scale, zero_point), groups)
    assert scale.item() == torch.tensor(SMALLEST_SCALE).half().item()


def test_numbers_beyond_fp16_stay_finite() -> None:
    groups = torch.linspace(-1e9, 1e9, 32).reshape(1, 1, 1, 32, 1, 1)
    codes, scale, zero_point = Kivi().quantize(groups, None, 2)
    assert scale.item() == LARGEST_HALF
    assert reconstruct(codes, scale, zero_point).isfinite().all()


def test_keys_share_a_scale_along_tokens_and_values_along_channels() -> None:
    assert Kivi(64).granularity("key") == PerChannel(64)
    assert Kivi(64).granularity("value") == PerToken(64)


@pytest.mark.parametrize("group_size", [0, 16, 48, 256])
def test_other_group_sizes_are_refused(group_size: int) -> None:
    with pytest.raises(ValueError, match=rf"^group_size must be 32, 64 or 128, got {group_size}$"):
        Kivi(group_size)
