"""Lloyd-Max levels: the best for a Gaussian, token by token, and never a number to fear."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squat_fx.layouts.levels import (
    LARGEST_HALF,
    POSITIVE_LEVELS,
    WIDTHS,
    dequantize_tokens,
    level_of,
    level_table,
    quantize_tokens,
)
from squat_fx.layouts.planes import LANES, num_planes, uniform_widths
from tests.conftest import randn

CPU = torch.device("cpu")
SEEDS = st.integers(0, 2**16)
HALF_EPSILON = 2.0**-11  # relative error of rounding to fp16

# The mean squared error of the best levels on a standard Gaussian (Max, 1960, table I), 1 to 4
# bits.
LEAST_DISTORTION = (0.3634, 0.1175, 0.03454, 0.009497)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, tuple[int, ...]]:
    """A head_dim and a width for each of its plane groups."""
    head_dim = draw(st.sampled_from([1, 16, 20, 40, 64, 80, 128]))
    width, count = st.sampled_from(WIDTHS), num_planes(head_dim)
    return head_dim, draw(width.map(lambda w: (w,) * count) | st.tuples(*[width] * count))


def roundtrip(y: Tensor, widths: tuple[int, ...], norm_correction: bool = True) -> Tensor:
    return dequantize_tokens(*quantize_tokens(y, widths, norm_correction), widths)


def relative_error(y: Tensor, restored: Tensor) -> float:
    return ((restored - y).square().mean() / y.square().mean()).item()


def density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def tail(x: float) -> float:
    return math.erfc(x / math.sqrt(2)) / 2


# the table ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", WIDTHS)
def test_each_level_is_the_mean_of_the_gaussian_between_its_thresholds(bits: int) -> None:
    """Lloyd's condition; with thresholds in the middle, what no better set of levels escapes."""
    positive = POSITIVE_LEVELS[bits - 1]
    assert len(positive) == 2 ** (bits - 1)
    thresholds = [0.0, *((a + b) / 2 for a, b in pairwise(positive)), math.inf]
    for level, (low, high) in zip(positive, pairwise(thresholds), strict=True):
        centroid = (density(low) - density(high)) / (tail(low) - tail(high))
        assert level == pytest.approx(centroid, abs=2e-7)


@pytest.mark.parametrize("bits", WIDTHS)
def test_their_distortion_is_the_least(bits: int) -> None:
    """Of levels that are the means of their cells, the variance less that of the levels."""
    positive = POSITIVE_LEVELS[bits - 1]
    thresholds = [0.0, *((a + b) / 2 for a, b in pairwise(positive)), math.inf]
    weights = [tail(low) - tail(high) for low, high in pairwise(thresholds)]
    captured = 2 * sum(w * x * x for w, x in zip(weights, positive, strict=True))
    assert 1 - captured == pytest.approx(LEAST_DISTORTION[bits - 1], rel=1e-3)


@pytest.mark.parametrize("bits", WIDTHS)
def test_levels_ascend_mirror_each_other_and_have_thresholds_in_their_middles(bits: int) -> None:
    levels, thresholds = level_table(bits, CPU)
    assert levels.shape == (2**bits,)
    assert (levels.diff() > 0).all()
    assert torch.equal(levels, -levels.flip(0))
    torch.testing.assert_close(thresholds, (levels[1:] + levels[:-1]) / 2)


def test_the_tables_are_made_once_and_are_normal_tensors() -> None:
    level_table.cache_clear()
    with torch.inference_mode():
        tables = level_table(2, CPU)
    assert level_table(2, CPU) is tables
    assert not any(table.is_inference() for table in tables)


# how well it rounds -------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("head_dim", [128, 256])
def test_a_gaussian_token_is_rounded_that_well(bits: int, head_dim: int) -> None:
    y = randn(1, 1, 4000, head_dim)
    error = relative_error(y, roundtrip(y, uniform_widths(head_dim, bits), False))
    assert error == pytest.approx(LEAST_DISTORTION[bits - 1], rel=0.03)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_token_of_few_channels_is_rounded_as_well_as_its_beta_distribution_says(
    bits: int,
) -> None:
    """A coordinate of an even direction times ``sqrt(d)`` is not quite a Gaussian."""
    head_dim, y = 32, randn(1, 1, 20_000, 32)
    grid = torch.linspace(-(head_dim**0.5), head_dim**0.5, 400_001, dtype=torch.float64)
    weight = (1 - grid.square() / head_dim).clamp_min(0) ** ((head_dim - 3) / 2)
    levels, thresholds = (t.double() for t in level_table(bits, CPU))
    squares = (levels[torch.bucketize(grid, thresholds)] - grid).square()
    expected = (weight @ squares / weight.sum()).item()
    error = relative_error(y, roundtrip(y, uniform_widths(head_dim, bits), False))
    assert error == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("bits", WIDTHS)
def test_what_a_norm_costs(bits: int) -> None:
    """With ``D`` the distortion, the mean reconstruction has the square ``1 - D`` and the product
    ``1 - D`` with what it stands for; made as long, it errs by ``2 - 2 * sqrt(1 - D)``.
    """
    y = randn(1, 1, 4000, 256)
    expected = 2 - 2 * math.sqrt(1 - LEAST_DISTORTION[bits - 1])
    error = relative_error(y, roundtrip(y, uniform_widths(256, bits)))
    assert error == pytest.approx(expected, rel=0.03)


@given(schedule=schedules(), exponent=st.integers(-8, 8), seed=SEEDS)
def test_with_the_norm_correction_a_token_has_its_own_norm(
    schedule: tuple[int, tuple[int, ...]], exponent: int, seed: int
) -> None:
    head_dim, widths = schedule
    y = randn(2, 2, 5, head_dim, seed=seed) * 2.0**exponent
    restored = roundtrip(y, widths)
    slack = HALF_EPSILON + 2.0**-25 / y.norm(dim=-1)  # a scale may be subnormal
    assert ((restored.norm(dim=-1) / y.norm(dim=-1) - 1).abs() <= 1.1 * slack).all()


@given(schedule=schedules(), norm_correction=st.booleans(), seed=SEEDS)
def test_every_number_gets_the_level_that_is_nearest_to_it(
    schedule: tuple[int, tuple[int, ...]], norm_correction: bool, seed: int
) -> None:
    head_dim, widths = schedule
    y = randn(2, 2, 5, head_dim, seed=seed)
    codes, _ = quantize_tokens(y, widths, norm_correction)
    unit = y / y.square().mean(-1, keepdim=True).sqrt()
    error = (level_of(codes, widths) - unit).abs()
    for plane, bits in enumerate(widths):
        channels = slice(plane * LANES, (plane + 1) * LANES)
        distances = (unit[..., channels, None] - level_table(bits, CPU)[0]).abs()
        assert (error[..., channels] <= distances.amin(-1) + 1e-6).all()


# what it never does -------------------------------------------------------------------------------


@given(schedule=schedules(), seed=SEEDS)
def test_codes_fit_their_width_and_the_scale_is_fp16(
    schedule: tuple[int, tuple[int, ...]], seed: int
) -> None:
    head_dim, widths = schedule
    codes, scale = quantize_tokens(randn(2, 2, 5, head_dim, seed=seed) * 10, widths)
    limits = 2 ** torch.tensor(widths).repeat_interleave(LANES)[:head_dim]
    assert (codes.dtype, scale.dtype) == (torch.uint8, torch.float16)
    assert scale.shape == (2, 2, 5, 1)
    assert (codes < limits).all()


@given(schedule=schedules(), norm_correction=st.booleans())
def test_a_token_of_zeros_comes_back_as_zeros(
    schedule: tuple[int, tuple[int, ...]], norm_correction: bool
) -> None:
    head_dim, widths = schedule
    assert not roundtrip(torch.zeros(1, 1, 3, head_dim), widths, norm_correction).any()


@given(
    schedule=schedules(),
    size=st.sampled_from([1e-38, 1e-20, 1e5, 1e9, 1e18]),
    norm_correction=st.booleans(),
)
def test_tiny_and_huge_numbers_stay_finite(
    schedule: tuple[int, tuple[int, ...]], size: float, norm_correction: bool
) -> None:
    head_dim, widths = schedule
    y = randn(1, 1, 4, head_dim).clamp(-1, 1) * size
    codes, scale = quantize_tokens(y, widths, norm_correction)
    assert (scale <= LARGEST_HALF).all()
    restored = dequantize_tokens(codes, scale, widths)
    assert restored.isfinite().all()
    if size > 1:
        assert (restored.sign() == y.sign()).all()


@given(schedule=schedules(), seed=SEEDS, garbage=st.sampled_from([0.0, 1e9, torch.inf, torch.nan]))
def test_a_token_does_not_depend_on_others(
    schedule: tuple[int, tuple[int, ...]], seed: int, garbage: float
) -> None:
    head_dim, widths = schedule
    y = randn(2, 2, 6, head_dim, seed=seed)
    among = y.clone()
    among[:, :, 1::2] = garbage
    for alone, found in zip(
        quantize_tokens(y[:, :, 2:3], widths), quantize_tokens(among, widths), strict=True
    ):
        assert torch.equal(alone, found[:, :, 2:3])


@given(schedule=schedules(), exponent=st.integers(-6, 6), seed=SEEDS)
def test_a_power_of_two_scales_the_scale_and_a_sign_mirrors_the_codes(
    schedule: tuple[int, tuple[int, ...]], exponent: int, seed: int
) -> None:
    head_dim, widths = schedule
    y = randn(2, 2, 5, head_dim, seed=seed)
    codes, scale = quantize_tokens(y, widths)
    same, scaled = quantize_tokens(y * 2.0**exponent, widths)
    assert torch.equal(same, codes)
    assert torch.equal(scaled, scale * 2.0**exponent)
    mirrored, same_scale = quantize_tokens(-y, widths)
    largest = 2 ** torch.tensor(widths).repeat_interleave(LANES)[:head_dim] - 1
    assert torch.equal(mirrored + codes, largest.to(torch.uint8).expand_as(codes))
    assert torch.equal(same_scale, scale)
