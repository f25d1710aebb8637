"""KVarN: half a step in the rotated frame, tokens of any size, and bits that are counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squat_fx.codecs import Kivi, Kvarn, Role
from squat_fx.layouts.hadamard import rotation
from tests.codecs.round_trip import relative_error, round_trip
from tests.conftest import randn, stored_format

WIDTHS = st.sampled_from([1, 2, 3, 4, 8])
GROUPS = st.sampled_from([32, 64, 128])
ROLES = st.sampled_from(["key", "value"])
SEEDS = st.integers(0, 2**16)


def uneven(tokens: int, head_dim: int, seed: int) -> Tensor:
    """Tokens whose norms differ as those of a log-normal distribution."""
    norms = (0.7 * randn(2, 2, tokens, 1, seed=seed)).exp()
    return 3.0 * norms * randn(2, 2, tokens, head_dim, seed=seed + 1)


def rotated_kivi_error(x: Tensor, role: Role, group_size: int, bits: int = 2) -> float:
    """Of min-max rounding alone, in the same frame and of the same groups."""
    matrix = rotation(x.shape[-1])
    return relative_error(round_trip(Kivi(group_size), role, x @ matrix, bits).numbers, x @ matrix)


@given(
    role=ROLES, bits=WIDTHS, group_size=GROUPS, head_dim=st.sampled_from([16, 40, 64]),
    exponent=st.integers(-6, 6), seed=SEEDS,
)  # fmt: skip
def test_the_error_is_at_most_half_a_step_in_the_rotated_frame(
    role: Role, bits: int, group_size: int, head_dim: int, exponent: int, seed: int
) -> None:
    x = uneven(group_size, head_dim, seed) * 2.0**exponent
    found = round_trip(Kvarn(group_size), role, x, bits)
    _, scale, zero_point, factor = (p.double() for p in found.packed)
    matrix = rotation(head_dim).double()
    rotated = x.double() @ matrix
    error = (found.numbers.double() @ matrix - rotated).abs()
    largest = zero_point.abs() + (2**bits - 1) * scale
    slack = factor * (2.0**-11 * (largest + zero_point.abs()) + 2.0**bits * 2.0**-24)
    slack = slack + 1e-5 * rotated.abs().amax()
    assert (error <= scale * factor / 2 + slack).all()


@given(role=ROLES, seed=SEEDS, padding=st.sampled_from([0.0, 1e4, -1e4, torch.inf, torch.nan]))
def test_padding_never_touches_a_valid_token(role: Role, seed: int, padding: float) -> None:
    x = uneven(64, 32, seed)
    valid = randn(2, 64, seed=seed + 7) > 0
    valid[0, :32] = False
    there = valid[:, None, :, None]
    expected = round_trip(Kvarn(32), role, x, valid=valid)
    actual = round_trip(Kvarn(32), role, x.masked_fill(~there, padding), valid=valid)
    for a, e in zip(actual.packed, expected.packed, strict=True):
        assert torch.equal(a, e)
    assert actual.numbers.isfinite().all()


@given(role=ROLES, seed=SEEDS)
def test_padding_is_as_if_it_were_not_there(role: Role, seed: int) -> None:
    x = uneven(64, 32, seed)
    valid = (torch.arange(64) >= 20).expand(2, -1)
    padded = round_trip(Kvarn(64), role, x, 8, valid=valid).numbers[:, :, 20:]
    assert relative_error(padded, x[:, :, 20:]) < 1e-4


@given(role=ROLES, seed=SEEDS)
def test_rows_of_a_batch_are_independent(role: Role, seed: int) -> None:
    x = uneven(64, 32, seed)
    valid = randn(2, 64, seed=seed + 7) > 0
    both = round_trip(Kvarn(32), role, x, valid=valid)
    for row in range(2):
        alone = round_trip(Kvarn(32), role, x[row : row + 1], valid=valid[row : row + 1])
        for a, e in zip(both.packed, alone.packed, strict=True):
            assert torch.equal(a[row : row + 1], e)


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("value", [0.0, 1.5, -3e4, 1e9, 1e30])
def test_constant_and_huge_numbers_stay_finite(role: Role, value: float) -> None:
    for x in (torch.full((1, 1, 32, 64), value), value * randn(1, 1, 32, 64)):
        found = round_trip(Kvarn(32), role, x)
        assert all(p.isfinite().all() for p in found.packed[1:])
        assert found.numbers.isfinite().all()
    if value == 0.0:
        assert not found.numbers.any()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3])
def test_it_beats_the_same_rounding_without_factors_where_token_norms_differ(
    group_size: int, bits: int
) -> None:
    x = uneven(256, 128, seed=1)
    error = relative_error(round_trip(Kvarn(group_size), "key", x, bits).numbers, x)
    assert error < 0.7 * rotated_kivi_error(x, "key", group_size, bits)


@pytest.mark.parametrize("role", ["key", "value"])
def test_it_loses_nothing_where_they_do_not(role: Role) -> None:
    x = 3.0 * randn(2, 2, 256, 128)
    error = relative_error(round_trip(Kvarn(), role, x).numbers, x)
    assert error < 1.02 * rotated_kivi_error(x, role, 128)


@pytest.mark.parametrize("role", ["key", "value"])
def test_the_factors_cost_an_eighth_of_a_bit(role: Role) -> None:
    x = randn(1, 2, 256, 128)
    kvarn, kivi = (round_trip(codec, role, x) for codec in (Kvarn(), Kivi(128)))
    assert kvarn.bits_per_element == kivi.bits_per_element + 0.125 == 2.375


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    ("role", "group_size", "head_dim", "parameters"),
    [
        ("key", 128, 128, 0.375),
        ("value", 128, 128, 0.375),
        ("key", 32, 64, 1.25),
        ("value", 32, 64, 1.0),
        ("key", 64, 80, 0.7),
        ("value", 64, 80, 0.65),
    ],
)
def test_bits_are_those_that_are_stored(
    role: Role, group_size: int, head_dim: int, parameters: float, bits: int
) -> None:
    found = round_trip(Kvarn(group_size), role, randn(2, 3, 256, head_dim), bits)
    assert found.bits_per_element == pytest.approx(bits + parameters)
    assert found.fmt.packed_bits_per_element() == pytest.approx(bits + parameters)


def test_what_a_tile_stores() -> None:
    key, value = (stored_format(Kvarn(64), role, head_dim=128) for role in ("key", "value"))
    assert key.arena_names == ("qdata", "scale", "zero_point", "factor", "dense", "start")
    assert (key.token_group, key.channel_group) == (64, 1)
    assert [key.last_dim(name) for name in key.packed_names] == [32, 128, 128, 1]
    assert [key.tokens_per_slot(name) for name in key.packed_names] == [1, 64, 64, 1]
    assert (value.token_group, value.channel_group) == (64, 128)
    assert [value.last_dim(name) for name in value.packed_names] == [32, 1, 1, 128]
    assert [value.tokens_per_slot(name) for name in value.packed_names] == [1, 1, 1, 64]


@pytest.mark.parametrize("group_size", [0, 16, 48, 256])
def test_other_group_sizes_are_refused(group_size: int) -> None:
    with pytest.raises(ValueError, match=rf"^group_size must be 32, 64 or 128, got {group_size}$"):
        Kvarn(group_size)


def test_one_width_for_all_channels() -> None:
    with pytest.raises(ValueError, match=r"^the layout 'planes/dual' gives .* are 2 and 3$"):
        stored_format(Kvarn(), "key", head_dim=64, bits=2.5)
