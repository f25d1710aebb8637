"""SQuat: what it learns from a prompt, from which tokens, and what that is good for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squat_fx.codecs import Format, Kivi, Squat
from squat_fx.codecs.squat import SMALLEST_PROMPT, token_mean
from squat_fx.kernels import reference
from squat_fx.layouts.hadamard import rotation
from squat_fx.layouts.planes import pack
from squat_fx.layouts.symmetric import quantize_tokens
from squat_fx.state import QuantizedKV
from tests.conftest import left_padding, randn, stored_format, whole_numbers

SEEDS = st.integers(0, 2**16)
BITS = st.sampled_from([1, 2, 3, 4, 8, (0, 2, 5, 8)])
SINKS, RESIDUAL = 4, 8
PLAIN = Squat(strength=0.0, center=False, smooth=False)


def format_of(codec: Squat, bits: Any = 2, role: Any = "key", head_dim: int = 64) -> Format:
    return stored_format(codec, role, head_dim, bits, RESIDUAL, SINKS)


def stored(
    codec: Squat,
    key: Tensor,
    query: Tensor | None = None,
    valid: Tensor | None = None,
    bits: Any = 2,
    role: Any = "key",
) -> QuantizedKV:
    return QuantizedKV.from_dense(
        key, format_of(codec, bits, role, key.shape[3]), role, valid, query
    )


def packed(handle: QuantizedKV, row: int, pads: int = 0) -> tuple[Tensor, Tensor]:
    """Codes and scales of what is packed of a row, copied: a pool owns the arenas."""
    count = handle._storage.extent.packed(pads, handle.format)
    return handle._storage["qdata"][row, :, :count].clone(), handle._storage["scale"][
        row, :, :count
    ].clone()


def correlated(tokens: int, seed: int, batch: int = 1, heads: int = 2) -> Tensor:
    """Queries that lie near a few directions, as real ones do."""
    few = randn(batch, heads, tokens, 6, seed=seed) @ randn(batch, heads, 6, 64, seed=seed + 1)
    return few + 0.3 * randn(batch, heads, tokens, 64, seed=seed + 2)


# the mean ---------------------------------------------------------------------------------------


@given(
    pads=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    garbage=st.sampled_from([0.0, 6e4, torch.inf, torch.nan]),
    seed=SEEDS,
)
def test_the_mean_is_that_of_valid_tokens_after_the_sinks(
    pads: list[int], garbage: float, seed: int
) -> None:
    tokens = 60
    key = whole_numbers(len(pads), 2, tokens, 64, seed=seed)
    shown = key.clone()
    for row, first in enumerate(pads):
        shown[row, :, :first] = garbage
        shown[row, :, first : first + SINKS] = 6e4
    handle = stored(Squat(), shown, valid=left_padding(pads, tokens))
    for row, first in enumerate(pads):
        expected = key[row, :, first + SINKS :].mean(1, keepdim=True).half()
        assert torch.equal(handle._storage["affine"][row, :, :1], expected)


def test_tokens_in_the_middle_that_nobody_sees_do_not_touch_the_mean() -> None:
    key = whole_numbers(1, 2, 60, 64)
    valid = torch.ones(1, 60, dtype=torch.bool)
    valid[:, 20:30] = False
    handle = stored(Squat(), key.masked_fill(~valid[:, None, :, None], 6e4), valid=valid)
    seen = torch.cat([key[:, :, SINKS:20], key[:, :, 30:]], 2)
    assert torch.equal(handle._storage["affine"][:, :, :1], seen.mean(2, keepdim=True).half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_mean_is_summed_in_fp32_at_least(dtype: torch.dtype) -> None:
    key = torch.full((1, 1, 4000, 16), 0.5, dtype=dtype)
    mean = token_mean(key, torch.ones(1, 4000, dtype=torch.bool))
    assert mean.dtype == torch.float16
    assert torch.equal(mean, torch.full((1, 1, 1, 16), 0.5).half())


def test_a_mean_beyond_fp16_stays_finite() -> None:
    mean = token_mean(torch.full((1, 1, 40, 16), -1e9), torch.ones(1, 40, dtype=torch.bool))
    assert torch.equal(mean, torch.full_like(mean, -65504.0))


@given(shift=st.integers(-16, 16), bits=BITS, strength=st.sampled_from([0.0, 1.0]), seed=SEEDS)
def test_what_all_keys_share_changes_no_code(
    shift: int, bits: Any, strength: float, seed: int
) -> None:
    """Bit for bit: with 64 tokens of whole numbers to learn from, the mean is exact in fp16."""
    key, query = whole_numbers(1, 2, 64 + SINKS, 64, seed=seed), correlated(64 + SINKS, seed)
    shared = shift * whole_numbers(1, 2, 1, 64, seed=seed + 1, largest=1)
    codec = Squat(strength)
    ours, shifted = (stored(codec, x, query, bits=bits) for x in (key, key + shared))
    assert torch.equal(
        shifted._storage["affine"][:, :, :1], ours._storage["affine"][:, :, :1] + shared.half()
    )
    assert torch.equal(shifted._storage["affine"][:, :, 1:], ours._storage["affine"][:, :, 1:])
    for a, b in zip(packed(ours, 0), packed(shifted, 0), strict=True):
        assert torch.equal(a, b)


def test_without_the_mean_what_all_keys_share_drowns_them() -> None:
    key = randn(1, 2, 100, 64) + 50 * randn(1, 2, 1, 64, seed=1)
    error = [
        (stored(Squat(center=center), key).dequantize() - key).norm().item()
        for center in (True, False)
    ]
    assert error[0] < 0.1 * error[1]


def test_values_have_no_mean_and_ask_for_no_queries() -> None:
    handle = stored(Squat(), randn(1, 2, 60, 64) + 5, role="value")
    assert handle._storage["affine"].shape == (1, 2, 0, 64)
    assert Squat().taps("key") == {"query"}
    assert Squat(strength=0.0).taps("key") == Squat(smooth=False).taps("key") == {"query"}
    assert Squat().taps("value") == PLAIN.taps("key") == frozenset()


def assert_identity(affine: Tensor) -> None:
    """Offsets of zero and factors of one."""
    assert not affine[:, :, :1].any()
    assert (affine[:, :, 1:] == 1).all()


# too little to learn from -----------------------------------------------------------------------


@given(kept=st.integers(1, 40), pads=st.integers(0, 9), bits=BITS, seed=SEEDS)
def test_a_prompt_of_fewer_tokens_teaches_nothing(
    kept: int, pads: int, bits: Any, seed: int
) -> None:
    """No mean, factors, feedback below 32 valid tokens after the sinks; all from there on."""
    tokens = pads + SINKS + kept
    key, query = randn(1, 2, tokens, 64, seed=seed) + 3, correlated(tokens, seed)
    valid = left_padding([pads], tokens)
    handle, plain = (stored(codec, key, query, valid, bits) for codec in (Squat(), PLAIN))
    same = all(map(torch.equal, packed(handle, 0, pads), packed(plain, 0, pads)))
    if kept < SMALLEST_PROMPT:
        assert same
        assert_identity(handle._storage["affine"])
    else:
        assert not same
        assert handle._storage["affine"][:, :, :1].any()
        assert (handle._storage["affine"][:, :, 1:] != 1).any()


def test_each_row_learns_by_itself() -> None:
    """One row of a batch is too short, the other is not."""
    pads, tokens = [0, 42], 60
    key, query = randn(2, 2, tokens, 64) + 3, correlated(tokens, 0, batch=2)
    valid = left_padding(pads, tokens)
    handle, plain = (stored(codec, key, query, valid) for codec in (Squat(), PLAIN))
    assert handle._storage["affine"][0, :, :1].any()
    assert_identity(handle._storage["affine"][1:])
    assert torch.equal(packed(handle, 1, 42)[0], packed(plain, 1, 42)[0])


# which tokens are rounded how -------------------------------------------------------------------


@given(bits=BITS, tokens=st.integers(1, 60), at_once=st.booleans(), seed=SEEDS)
def test_tokens_that_are_packed_later_are_centred_and_rounded_without_feedback(
    bits: Any, tokens: int, at_once: bool, seed: int
) -> None:
    prompt = 60
    key, query = randn(1, 2, prompt + tokens, 64, seed=seed) + 3, correlated(prompt, seed)
    handle = stored(Squat(), key[:, :, :prompt], query, bits=bits)
    first = handle._storage.extent.packed(0, handle.format)
    for new in [key[:, :, prompt:]] if at_once else key[:, :, prompt:].split(1, 2):
        handle = torch.cat([handle, new], 2)
    handle.writable_storage()
    codes, scale = packed(handle, 0)
    last = codes.shape[1]
    assert last == prompt + tokens - SINKS - RESIDUAL
    mean, factor = handle._storage["affine"].float().split(1, 2)
    latent = (key[:, :, SINKS + first : SINKS + last] - mean) / factor @ rotation(64)
    expected = reference.quantize(
        key[:, :, SINKS + first : SINKS + last], None, handle.format,
        {"affine": handle._storage["affine"]},
    )  # fmt: skip
    assert_same_rounding((codes[:, first:], scale[:, first:]), expected, handle.format)
    plain, plain_scale = quantize_tokens(latent, handle.format.widths)
    assert_same_rounding(
        (codes[:, first:], scale[:, first:]),
        (pack(plain, handle.format.widths), plain_scale),
        handle.format,
    )


def assert_same_rounding(
    found: tuple[Tensor, ...], expected: tuple[Tensor, ...], fmt: Format
) -> None:
    """The same but for the order of the sums of a matrix product.

    A number in the middle between two codes may fall to either, which one in thousands does.
    """
    codes, others = (
        reference.unpack(x[0].reshape(-1, x[0].shape[-1]), fmt.head_dim, fmt.widths).int()
        for x in (found, expected)
    )
    difference = (codes - others).abs()
    assert not difference.numel() or difference.max() <= 1
    assert difference.sum() <= 1 + difference.numel() / 2000
    torch.testing.assert_close(
        found[1].float().flatten(), expected[1].float().flatten(), rtol=2.0**-10, atol=2.0**-24
    )


@given(
    pads=st.lists(st.integers(0, 20), min_size=1, max_size=3), bits=BITS,
    role=st.sampled_from(["key", "value"]), seed=SEEDS,
)  # fmt: skip
def test_a_row_of_a_batch_is_stored_like_the_row_alone(
    pads: list[int], bits: Any, role: str, seed: int
) -> None:
    """To what the order of sums leaves open; the mean and exact tokens bit for bit."""
    tokens = 60
    key = whole_numbers(len(pads), 2, tokens, 64, seed=seed)
    query = whole_numbers(len(pads), 4, tokens, 64, seed=seed + 1)
    batch = stored(Squat(), key, query, left_padding(pads, tokens), bits, role)
    for row, first in enumerate(pads):
        here = slice(row, row + 1)
        alone = stored(Squat(), key[here, :, first:], query[here, :, first:], None, bits, role)
        assert torch.equal(batch._storage["affine"][here], alone._storage["affine"])
        assert_same_rounding(packed(batch, row, first), packed(alone, 0), batch.format)
        ours, theirs = batch.dequantize()[here, :, first:], alone.dequantize()
        assert torch.equal(ours[:, :, :SINKS], theirs[:, :, :SINKS])
        assert torch.equal(ours[:, :, -RESIDUAL:], theirs[:, :, -RESIDUAL:])


@given(pads=st.lists(st.integers(0, 20), min_size=1, max_size=3), bits=BITS, seed=SEEDS)
def test_without_learning_a_row_is_stored_bit_for_bit_like_the_row_alone(
    pads: list[int], bits: Any, seed: int
) -> None:
    """Whole numbers and the rotation of 64 channels, of eighths, make every sum exact."""
    key = whole_numbers(len(pads), 2, 60, 64, seed=seed)
    batch = stored(PLAIN, key, None, left_padding(pads, 60), bits)
    for row, first in enumerate(pads):
        alone = stored(PLAIN, key[row : row + 1, :, first:], None, None, bits)
        for a, b in zip(packed(batch, row, first), packed(alone, 0), strict=True):
            assert torch.equal(a, b)


# what it is good for ----------------------------------------------------------------------------


def score_error(codec: Squat, key: Tensor, query: Tensor, bits: Any = 2) -> float:
    """What the rounding of packed keys does to scores, relative to the scores."""
    error = stored(codec, key, query, bits=bits).dequantize() - key
    return ((query @ error.mT).norm() / (query @ key.mT).norm()).item()


@given(bits=st.sampled_from([2, 2.5, 3, 4]), seed=SEEDS)
def test_feedback_lowers_the_error_of_scores(bits: float, seed: int) -> None:
    key, query = randn(1, 2, 128, 64, seed=seed), correlated(128, seed + 3)
    with_feedback, without = (
        score_error(Squat(strength), key, query, bits) for strength in (1.0, 0.0)
    )
    assert with_feedback < 0.8 * without


def test_feedback_lowers_the_error_of_scores_of_queries_that_it_did_not_see() -> None:
    key, query = randn(1, 2, 128, 64), correlated(256, 3)
    seen, later = query.split(128, 2)
    errors = []
    for strength in (1.0, 0.0):
        restored = stored(Squat(strength), key, seen).dequantize()
        errors.append((later @ (restored - key).mT).norm().item())
    assert errors[0] < 0.8 * errors[1]


def test_it_rounds_as_well_as_kivi_in_three_quarters_of_the_bits() -> None:
    """Gaussian values at 2 bits: 2.25 stored bits against 3."""
    value = randn(1, 2, 2000, 64)
    fmt = stored_format(Kivi(), "value", 64, 2, RESIDUAL, SINKS)
    kivis = QuantizedKV.from_dense(value, fmt, "value").dequantize()
    ours = stored(Squat(), value, role="value")
    assert ours.format.packed_bits_per_element() == 0.75 * fmt.packed_bits_per_element()
    assert (ours.dequantize() - value).norm() < (kivis - value).norm()


# how much it stores -----------------------------------------------------------------------------


@given(
    head_dim=st.sampled_from([16, 64, 80, 128, 256]),
    sixteenths=st.integers(16, 128),
    role=st.sampled_from(["key", "value"]),
)
def test_a_token_takes_its_code_bits_and_one_scale(
    head_dim: int, sixteenths: int, role: str
) -> None:
    planes = head_dim // 16
    bits = max(1.0, round(sixteenths / 16 * planes) / planes)
    fmt = format_of(Squat(), bits, role, head_dim)
    assert fmt.bits == pytest.approx(bits)
    assert fmt.packed_bits_per_element() == pytest.approx(bits + 16 / head_dim)
    assert fmt.packed_names == ("qdata", "scale")
    assert fmt.last_dim("qdata") == 2 * sum(fmt.widths)


def test_keys_of_three_bits_and_values_of_two_average_two_and_three_quarters() -> None:
    key, value = format_of(Squat(), 3, "key"), format_of(Squat(), 2, "value")
    assert (key.packed_bits_per_element() + value.packed_bits_per_element()) / 2 == 2.75


def test_only_the_packed_arenas_grow() -> None:
    short, long = (stored(Squat(), randn(1, 2, n, 64)) for n in (100, 3000))
    assert short._storage["affine"].shape == long._storage["affine"].shape == (1, 2, 2, 64)
    assert short.dense.shape == long.dense.shape
    assert short._storage["basis"].shape == long._storage["basis"].shape == (2, 2, 0, 0)


# options ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match=f"^strength must be a number, 0 or more, got {strength}$"):
        Squat(strength)


def test_the_strength_matters() -> None:
    key, query = randn(1, 2, 100, 64), correlated(100, 3)
    found = [packed(stored(Squat(s), key, query), 0)[0] for s in (0.0, 1.0, 3.0)]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    assert PLAIN.affine("key") is False
    assert replace(PLAIN, center=True).affine("key") is replace(PLAIN, smooth=True).affine("key")
