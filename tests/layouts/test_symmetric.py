"""Symmetric levels: as good as a Gaussian allows, token by token, and never a number to fear."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squat_fx.layouts import symmetric
from squat_fx.layouts.planes import LANES, num_planes, uniform_widths
from squat_fx.layouts.symmetric import (
    LARGEST_HALF,
    REACH,
    REACH_OF_MIXED,
    SMALLEST_SCALE,
    STEP,
    alternating_signs,
    dequantize_tokens,
    least_scales,
    quantize_tokens,
    step_and_zero,
    token_size,
)
from tests.conftest import randn

SEEDS = st.integers(0, 2**16)
HALF_EPSILON = 2.0**-11  # relative error of rounding to fp16

# The least mean squared error of evenly spaced levels on a standard Gaussian (Max, 1960), 1 to 8
# bits.
LEAST_DISTORTION = (0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.00104, 3.043e-4, 8.769e-5)


@st.composite
def schedules(draw: st.DrawFn, smallest: int = 0) -> tuple[int, tuple[int, ...]]:
    """A head_dim and a width for each of its plane groups."""
    head_dim = draw(st.sampled_from([1, 16, 20, 40, 64, 80, 128]))
    width, count = st.integers(smallest, 8), num_planes(head_dim)
    return head_dim, draw(width.map(lambda w: (w,) * count) | st.tuples(*[width] * count))


def roundtrip(y: Tensor, widths: tuple[int, ...]) -> Tensor:
    return dequantize_tokens(*quantize_tokens(y, widths), widths)


def units(size: Tensor, widths: tuple[int, ...], head_dim: int) -> tuple[Tensor, Tensor]:
    """How far the levels of a token are apart, and how large the outermost is."""
    step, zero = step_and_zero(widths, head_dim, size.device)
    return size.float().abs() * step, size.float().abs() * step * zero


def as_rounded(codes: Tensor, y: Tensor, widths: tuple[int, ...]) -> Tensor:
    """The levels nearest to ``y``, before the scale gives the token its length."""
    step, zero = step_and_zero(widths, y.shape[-1], y.device)
    sign = alternating_signs(y.shape[-2], 0, y.device).float()
    return (codes.float() - zero) * token_size(y, widths) * sign * step


@lru_cache(maxsize=1)
def gaussian() -> tuple[Tensor, Tensor]:
    """Numbers on a fine grid and what each weighs under a standard Gaussian."""
    y = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    weight = torch.exp(-(y**2) / 2)
    return y, weight / weight.sum()


# how well it rounds -----------------------------------------------------------------------------


def distortion(step: float, bits: int) -> float:
    """Mean squared error of a Gaussian that is rounded to ``2**bits`` levels about zero."""
    (y, weight), zero = gaussian(), (2**bits - 1) / 2
    codes = (y / step + zero).round().clamp(0, 2 * zero)
    return (weight @ (step * (codes - zero) - y).square()).item()


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_step_is_the_best_for_a_gaussian(bits: int) -> None:
    best = distortion(STEP[bits], bits)
    assert best == pytest.approx(LEAST_DISTORTION[bits - 1], rel=1e-3)
    assert best < distortion(1.02 * STEP[bits], bits)
    assert best < distortion(0.98 * STEP[bits], bits)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_gaussian_token_is_rounded_that_well_where_nothing_has_to_be_reached(
    monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    monkeypatch.setattr(symmetric, "REACH", (0.0,) * 9)
    y = randn(1, 1, 4000, 64)
    widths = uniform_widths(64, bits)
    error = as_rounded(quantize_tokens(y, widths)[0], y, widths) - y
    error = error.square().mean() / y.square().mean()
    assert error.item() == pytest.approx(LEAST_DISTORTION[bits - 1], rel=0.1)


@pytest.mark.parametrize(
    ("bits", "factor"),
    [(1, 1.0), (2, 1.0), (3, 0.97), (4, 0.94), (5, 0.87), (6, 0.87), (7, 0.89), (8, 0.91)],
)
def test_what_reaching_the_largest_number_costs_on_a_gaussian(bits: int, factor: float) -> None:
    """From 4 bits on fewer numbers are clipped, and it gains."""
    y, widths = randn(1, 1, 4000, 64), uniform_widths(64, bits)
    error = as_rounded(quantize_tokens(y, widths)[0], y, widths) - y
    error = error.square().mean() / y.square().mean()
    assert error.item() == pytest.approx(factor * LEAST_DISTORTION[bits - 1], rel=0.03)


@given(
    head_dim=st.sampled_from([1, 16, 20, 64, 128]), bits=st.integers(1, 8),
    exponent=st.integers(-6, 8), unbiased=st.booleans(), seed=SEEDS,
)  # fmt: skip
def test_the_scale_gives_back_what_rounding_lost(
    head_dim: int, bits: int, exponent: int, unbiased: bool, seed: int
) -> None:
    y, widths = randn(2, 2, 5, head_dim, seed=seed) * 2.0**exponent, uniform_widths(head_dim, bits)
    back = dequantize_tokens(*quantize_tokens(y, widths, unbiased=unbiased), widths)
    kept = (back * (y if unbiased else back)).sum(-1)
    lost = 4 * HALF_EPSILON
    torch.testing.assert_close(kept, y.square().sum(-1), rtol=lost, atol=lost * 2.0**-12)


@given(
    schedule=schedules(), exponent=st.integers(-6, 8), unbiased=st.booleans(),
    latent=st.booleans(), seed=SEEDS,
)  # fmt: skip
def test_of_different_widths_it_gives_back_what_they_are_worth(
    schedule: tuple[int, tuple[int, ...]], exponent: int, unbiased: bool, latent: bool, seed: int
) -> None:
    """All the same in a rotated frame, in a calibrated one by what their widths leave."""
    head_dim, widths = schedule
    y = randn(2, 2, 5, head_dim, seed=seed) * 2.0**exponent
    packed = quantize_tokens(y, widths, unbiased=unbiased, latent=latent)
    back = dequantize_tokens(*packed, widths)
    weight = [(1 / LEAST_DISTORTION[w - 1] if latent else 1.0) if w else 0.0 for w in widths]
    weight = torch.tensor(weight).repeat_interleave(LANES)[:head_dim]
    kept = (weight * back * (y if unbiased else back)).sum(-1)
    expected, lost = (weight * y.square()).sum(-1), 4 * HALF_EPSILON
    # The table of errors has fewer digits; a token of few numbers may ask for a larger scale.
    mendable = packed[1][..., 0].abs() < LARGEST_HALF
    lost += 2e-3 * latent
    torch.testing.assert_close(kept[mendable], expected[mendable], rtol=lost, atol=lost * 2.0**-12)


def test_what_a_narrow_latent_group_loses_is_not_made_up_for_in_a_wide_one() -> None:
    """The wide plane group comes back as long as it was, though the token has lost a fifth."""
    y = torch.cat([randn(1, 1, 200, 16), 0.3 * randn(1, 1, 200, 48, seed=1)], -1)
    widths = (6, 1, 0, 0)
    lengths = {
        latent: dequantize_tokens(*quantize_tokens(y, widths, latent=latent), widths)[..., :16]
        .norm(dim=-1)
        .div(y[..., :16].norm(dim=-1))
        .mean()
        .item()
        for latent in (False, True)
    }
    assert lengths[True] == pytest.approx(1, abs=0.01)
    assert lengths[False] != pytest.approx(1, abs=0.01)


@given(schedule=schedules(smallest=1), exponent=st.integers(-8, 8), seed=SEEDS)
def test_error_is_half_a_step_where_nothing_is_clipped(
    schedule: tuple[int, tuple[int, ...]], exponent: int, seed: int
) -> None:
    head_dim, widths = schedule
    y = randn(2, 2, 5, head_dim, seed=seed) * 2.0**exponent
    codes, _ = quantize_tokens(y, widths)
    unit, outermost = units(token_size(y, widths), widths, head_dim)
    rounded = as_rounded(codes, y, widths)
    inside = y.abs() <= outermost + unit / 2
    error = (rounded - y).abs()
    assert (error <= unit * (0.5 + 1e-5))[inside].all()
    torch.testing.assert_close(rounded[~inside], (outermost * y.sign())[~inside])


@given(schedule=schedules(), seed=SEEDS)
def test_the_levels_reach_what_they_must_and_the_size_is_no_larger_than_needed(
    schedule: tuple[int, tuple[int, ...]], seed: int
) -> None:
    head_dim, widths = schedule
    y = randn(1, 2, 5, head_dim, seed=seed)
    size = token_size(y, widths)
    table = REACH_OF_MIXED if len(set(widths)) > 1 else REACH
    reach = torch.tensor([table[w] for w in widths]).repeat_interleave(LANES)[:head_dim]
    _, outermost = units(size, widths, head_dim)
    assert (y.abs() * reach <= outermost * (1 + 2 * HALF_EPSILON)).all()
    needed = [y.square().mean(-1, keepdim=True).sqrt()]
    for plane, least in enumerate(least_scales(widths)):
        part = y[..., plane * LANES : (plane + 1) * LANES].abs()
        needed.append(part.amax(-1, keepdim=True) * least)
    torch.testing.assert_close(size, torch.stack(needed).amax(0), rtol=HALF_EPSILON, atol=0)


def test_one_bit_is_the_sign_and_no_bits_say_nothing() -> None:
    y = randn(1, 1, 3, 32)
    restored = roundtrip(y, (1, 0))
    size = y[..., :16].square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(restored[..., :16], y[..., :16].sign() * size, rtol=1e-3, atol=0)
    assert not restored[..., 16:].any()


@given(schedule=schedules(smallest=1), first_slot=st.integers(0, 9), seed=SEEDS)
def test_the_sign_of_a_scale_is_that_of_its_slot_and_changes_no_number(
    schedule: tuple[int, tuple[int, ...]], first_slot: int, seed: int
) -> None:
    head_dim, widths = schedule
    y = randn(2, 2, 5, head_dim, seed=seed)
    codes, scale = quantize_tokens(y, widths, first_slot=first_slot)
    odd = (torch.arange(first_slot, first_slot + 5) % 2 == 1)[:, None]
    assert torch.equal(scale < 0, odd.expand_as(scale))
    mirrored, opposite = quantize_tokens(y, widths, first_slot=first_slot + 1)
    assert torch.equal(scale, -opposite)
    restored = dequantize_tokens(codes, scale, widths)
    ties = restored != dequantize_tokens(mirrored, opposite, widths)
    assert ties.float().mean() < 0.01


# what it never does -----------------------------------------------------------------------------


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


@given(schedule=schedules(), with_feedback=st.booleans())
def test_a_token_of_zeros_comes_back_as_good_as_zero(
    schedule: tuple[int, tuple[int, ...]], with_feedback: bool
) -> None:
    head_dim, widths = schedule
    feedback = torch.ones(1, 1, head_dim, head_dim).triu(1) if with_feedback else None
    codes, scale = quantize_tokens(torch.zeros(1, 1, 3, head_dim), widths, feedback)
    assert torch.equal(scale.abs(), torch.full_like(scale, SMALLEST_SCALE))
    assert dequantize_tokens(codes, scale, widths).abs().max() < 1e-4


@given(
    schedule=schedules(smallest=1),
    size=st.sampled_from([1e5, 1e9, 1e25, 3e38]),
    with_feedback=st.booleans(),
)
def test_numbers_beyond_fp16_stay_finite(
    schedule: tuple[int, tuple[int, ...]], size: float, with_feedback: bool
) -> None:
    head_dim, widths = schedule
    y = randn(1, 1, 4, head_dim).clamp(-1, 1) * size
    y[..., -1] = size
    feedback = torch.zeros(1, 1, head_dim, head_dim) if with_feedback else None
    codes, scale = quantize_tokens(y, widths, feedback)
    restored = dequantize_tokens(codes, scale, widths)
    assert restored.isfinite().all()
    assert (scale.abs() <= LARGEST_HALF).all()
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
        quantize_tokens(y[:, :, 2:3], widths, first_slot=2),
        quantize_tokens(among, widths),
        strict=True,
    ):
        assert torch.equal(alone, found[:, :, 2:3])


@given(schedule=schedules(smallest=1), seed=SEEDS)
def test_the_levels_are_the_same_on_both_sides_of_zero(
    schedule: tuple[int, tuple[int, ...]], seed: int
) -> None:
    """The mirrored number gets the mirrored code, unless it lies in the middle between two."""
    head_dim, widths = schedule
    y = randn(2, 2, 5, head_dim, seed=seed)
    codes, scale = quantize_tokens(y, widths)
    mirrored, same_scale = quantize_tokens(-y, widths)
    unit, _ = units(token_size(y, widths), widths, head_dim)
    largest = 2 ** torch.tensor(widths).repeat_interleave(LANES)[:head_dim] - 1
    torch.testing.assert_close(scale, same_scale, rtol=2 * HALF_EPSILON, atol=0)
    in_the_middle = ((y / unit) - (y / unit).round()).abs() < 1e-4  # levels lie at odd halves
    assert ((codes + mirrored == largest) | in_the_middle).all()


# with feedback ----------------------------------------------------------------------------------


@given(schedule=schedules(), seed=SEEDS)
def test_no_feedback_and_a_feedback_of_zeros_are_the_same(
    schedule: tuple[int, tuple[int, ...]], seed: int
) -> None:
    head_dim, widths = schedule
    y = randn(2, 2, 5, head_dim, seed=seed)
    found = quantize_tokens(y, widths, torch.zeros(2, 2, head_dim, head_dim))
    for a, b in zip(quantize_tokens(y, widths), found, strict=True):
        assert torch.equal(a, b)


@given(schedule=schedules(), seed=SEEDS)
def test_each_plane_is_rounded_after_the_errors_of_those_before_it(
    schedule: tuple[int, tuple[int, ...]], seed: int
) -> None:
    head_dim, widths = schedule
    y = randn(2, 2, 5, head_dim, seed=seed)
    plane = torch.arange(head_dim) // LANES
    feedback = 0.2 * randn(2, 2, head_dim, head_dim, seed=seed + 1) * (plane[:, None] < plane)
    before = y.clone()
    codes, _ = quantize_tokens(y, widths, feedback)
    assert torch.equal(y, before), "the numbers are the caller's"
    restored = as_rounded(codes, y, widths).double()  # the size is that of the numbers themselves
    # restored - y = own + own @ feedback, own the rounding error of each channel
    identity = torch.eye(head_dim, dtype=torch.float64)
    own = (restored - y.double()) @ torch.linalg.inv(identity + feedback.double())
    unit, outermost = units(token_size(y, widths), widths, head_dim)
    inside = (restored - own).abs() <= outermost + unit / 2
    coded = torch.tensor(widths).repeat_interleave(LANES)[:head_dim] > 0
    assert (own.abs() <= unit * (0.5 + 1e-4) + 1e-5)[inside & coded].all()
