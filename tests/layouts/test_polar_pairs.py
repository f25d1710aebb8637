"""Pairs as radius and angle: half a cell, ranges of the valid tokens alone, circles cut well."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squat_fx.codecs import Format, PolarRope, codec_from_spec
from squat_fx.layouts import LAYOUTS
from squat_fx.layouts.polar_pairs import LARGEST_HALF, cut_angles, round_to_cells
from tests.conftest import randn, stored_format

LAYOUT = LAYOUTS["polar/pairs"]
SEEDS = st.integers(0, 2**16)
WIDTHS = st.sampled_from([(4, 4), (3, 3), (2, 4), (1, 1), (8, 8), (3, 4), (1, 7)])
HEAD_DIMS = st.sampled_from([2, 16, 24, 40, 64, 80])
HALF_EPSILON = 2.0**-11


def format_of(head_dim: int = 32, widths: tuple[int, int] = (4, 4), group: int = 8) -> Format:
    fmt = stored_format(PolarRope(32), "key", head_dim, widths)
    return replace(fmt, token_group=group)


def quantize(x: Tensor, fmt: Format, valid: Tensor | None = None) -> tuple[Tensor, ...]:
    return LAYOUT.quantize(x, valid, fmt, codec_from_spec(fmt.codec), {})


def roundtrip(x: Tensor, fmt: Format, valid: Tensor | None = None) -> Tensor:
    return LAYOUT.dequantize(quantize(x, fmt, valid), fmt, {})


def around(center: float, spread: float, tokens: int, seed: int = 0) -> Tensor:
    """One pair whose vectors point about ``center``, ``[1, 1, tokens, 2]``, of radius 1 to 2."""
    generator = torch.Generator().manual_seed(seed)
    turn, radius = torch.rand(2, tokens, generator=generator)
    angle, radius = center + spread * (turn - 0.5), 1 + radius
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)[None, None]


# how far off it is ------------------------------------------------------------------------------


@given(head_dim=HEAD_DIMS, widths=WIDTHS, exponent=st.integers(-4, 8), seed=SEEDS)
def test_radius_and_angle_are_within_half_a_cell(
    head_dim: int, widths: tuple[int, int], exponent: int, seed: int
) -> None:
    fmt = format_of(head_dim, widths)
    x = randn(2, 2, 24, head_dim, seed=seed) * 2.0**exponent
    qdata, scale, zero_point = packed = quantize(x, fmt)
    restored = LAYOUT.dequantize(packed, fmt, {})
    pairs, back = (torch.complex(*t.double().chunk(2, -1)) for t in (x, restored))
    scales = scale.double().repeat_interleave(fmt.token_group, 2).chunk(2, -1)
    lows = zero_point.double().abs().repeat_interleave(fmt.token_group, 2).chunk(2, -1)
    # What rounding the smallest number and the step to fp16 costs, besides half a cell.
    slack = [
        HALF_EPSILON * (low + 2**bits * s) + (2**bits + 1) * 2.0**-25
        for low, s, bits in zip(lows, scales, widths, strict=True)
    ]
    radius_error = (back.abs() - pairs.abs()).abs()
    assert (radius_error <= scales[0] / 2 + slack[0] + 1e-6 * pairs.abs()).all()
    turned = (back * pairs.conj()).angle().abs()
    unclear = pairs.abs() < 1e-3 * pairs.abs().amax()  # nor has it an angle once it is rounded
    assert ((turned <= scales[1] / 2 + slack[1] + 1e-5) | unclear | (back.abs() < 1e-9)).all()
    assert qdata.shape == (*x.shape[:3], LAYOUT.last_dim(fmt, "qdata"))
    assert scale.shape == zero_point.shape == (2, 2, 3, head_dim)
    assert (zero_point[..., head_dim // 2 :].abs() <= math.pi + 2e-3).all()


@given(center=st.floats(-7.0, 7.0), spread=st.floats(0.0, 3.0), seed=SEEDS)
def test_a_cluster_has_the_same_cells_wherever_it_points(
    center: float, spread: float, seed: int
) -> None:
    """Above all across the angles 0 and pi, where a circle might be cut."""
    fmt = format_of(2, (4, 4), group=16)
    _, scale, _ = quantize(around(center, spread, 16, seed), fmt)
    assert scale[..., 1].item() <= spread / 16 * (1 + 2 * HALF_EPSILON) + 2e-4


@pytest.mark.parametrize(
    ("widths", "bits", "error"),
    [((4, 4), 4.25, 0.0144), ((3, 3), 3.25, 0.0576), ((2, 4), 3.25, 0.0393)],
)
def test_gaussian_pairs_in_groups_of_128(
    widths: tuple[int, int], bits: float, error: float
) -> None:
    """What is measured, so that a change is seen; at 3 bits the angle is worth more."""
    fmt = format_of(128, widths, group=128)
    x = randn(1, 2, 1024, 128)
    packed = quantize(x, fmt)
    found = (LAYOUT.dequantize(packed, fmt, {}) - x).square().mean() / x.square().mean()
    assert found.item() == pytest.approx(error, rel=0.03)
    assert 8 * sum(t.nbytes for t in packed) / x.numel() == bits == LAYOUT.bits_per_element(fmt)


# what it never does -----------------------------------------------------------------------------


@given(head_dim=HEAD_DIMS, widths=WIDTHS, seed=SEEDS,
       garbage=st.sampled_from([0.0, 1e4, -1e4, torch.inf, torch.nan]))  # fmt: skip
def test_padding_never_touches_a_range(
    head_dim: int, widths: tuple[int, int], seed: int, garbage: float
) -> None:
    fmt = format_of(head_dim, widths)
    x, valid = randn(2, 2, 24, head_dim, seed=seed), randn(2, 24, seed=seed + 1) > 0
    valid[0, :8] = False
    dirty = x.masked_fill(~valid[:, None, :, None], garbage)
    clean = quantize(x, fmt, valid)
    assert all(map(torch.equal, quantize(dirty, fmt, valid), clean))
    assert all(p.isfinite().all() for p in clean[1:])
    assert LAYOUT.dequantize(clean, fmt, {}).isfinite().all()


@given(seed=SEEDS)
def test_ranges_are_those_of_the_valid_tokens_alone(seed: int) -> None:
    x, valid = randn(1, 2, 8, 32, seed=seed), torch.arange(8)[None] >= 3
    _, *ranges = quantize(x, format_of(), valid)
    _, *alone = quantize(x[:, :, 3:], format_of(group=5))
    assert all(map(torch.equal, ranges, alone))


@given(seed=SEEDS, widths=WIDTHS)
def test_rows_and_groups_are_stored_as_if_they_were_alone(
    seed: int, widths: tuple[int, int]
) -> None:
    fmt, x = format_of(40, widths), randn(3, 2, 24, 40, seed=seed)
    for part, found in zip(quantize(x[1:2, :, 8:16], fmt), quantize(x, fmt), strict=True):
        step = found.shape[2] // 3
        assert torch.equal(part, found[1:2, :, step : 2 * step])


@pytest.mark.parametrize("value", [0.0, 1.5, -3.0])
def test_a_constant_group_comes_back(value: float) -> None:
    """To fp16, in which its only radius and its only angle are stored."""
    fmt, x = format_of(), torch.full((1, 1, 8, 32), value)
    torch.testing.assert_close(roundtrip(x, fmt), x, rtol=2e-3, atol=0.0)


def test_a_range_of_one_number_has_no_cells() -> None:
    codes, scale, low = round_to_cells(torch.full((1, 1, 1, 4, 3), 0.5), None, 4)
    assert not scale.any()
    assert (low == 0.5).all()
    assert (codes < 16).all()


@pytest.mark.parametrize("size", [1e5, 1e9, 1e25, 3e38])
def test_numbers_beyond_fp16_stay_finite(size: float) -> None:
    x = randn(1, 1, 8, 32).clamp(-1, 1) * size
    packed = quantize(x, format_of())
    assert all(p.isfinite().all() and (p.abs() <= LARGEST_HALF).all() for p in packed[1:])
    assert LAYOUT.dequantize(packed, format_of(), {}).isfinite().all()


@given(center=st.floats(-math.pi, math.pi), spread=st.floats(0.0, 6.2), seed=SEEDS)
def test_angles_are_cut_once_and_begin_on_the_circle(
    center: float, spread: float, seed: int
) -> None:
    x, y = (t[..., None] for t in around(center, spread, 16, seed).unbind(-1))
    x, y = x[:, :, None], y[:, :, None]  # [batch, heads, groups, tokens, pairs]
    angle = cut_angles(x, y, None)
    assert -math.pi - 1e-6 <= angle.min() <= math.pi + 1e-6
    assert angle.max() - angle.min() <= 2 * math.pi + 1e-6
    radius = torch.hypot(x, y)
    torch.testing.assert_close(radius * angle.cos(), x, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(radius * angle.sin(), y, rtol=0.0, atol=1e-5)


def test_halves_that_are_no_whole_plane_groups_are_padded_and_counted() -> None:
    fmt = format_of(80, (4, 4), group=128)  # 40 pairs in 48 lanes
    assert fmt.planes.head_dim == 96
    assert fmt.packed_bits_per_element() == 4 * 96 / 80 + 0.25
