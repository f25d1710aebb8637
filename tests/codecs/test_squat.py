"""The default codec: what it learns, from whom, and what it stores."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squat_fx import QuantizedKV
from squat_fx.codecs import Role, Squat
from squat_fx.codecs.squat import SMALLEST_PROMPT
from squat_fx.kernels import reference
from squat_fx.kernels.reference import Extent
from tests.conftest import left_padding, randn, stored_format

PLAIN = Squat(strength=0, center=False)


def keys(batch: int = 1, tokens: int = 100, head_dim: int = 64, seed: int = 0) -> Tensor:
    """Keys with a mean, as real ones have."""
    return randn(batch, 2, tokens, head_dim, seed=seed) + 3 * randn(1, 2, 1, head_dim, seed=99)


def packed(
    x: Tensor,
    codec: Squat | None = None,
    role: Role = "key",
    valid: Tensor | None = None,
    query: Tensor | None = None,
    **options: int,
) -> QuantizedKV:
    fmt = stored_format(codec or Squat(), role, head_dim=x.shape[3], **options)  # pyright: ignore
    return QuantizedKV.from_dense(x, fmt, role, valid, query)


def center(handle: QuantizedKV) -> Tensor:
    return handle._storage["center"]


def test_the_mean_is_that_of_valid_tokens_after_the_sinks() -> None:
    x = keys(2)
    x[0, :, :2] = 1e4  # sinks
    x[1, :, :22] = 1e4  # padding and sinks
    handle = packed(x, valid=left_padding([0, 20], 100))
    expected = torch.stack([x[0, :, 2:].mean(1), x[1, :, 22:].mean(1)])[:, :, None].half()
    torch.testing.assert_close(center(handle), expected)


@pytest.mark.parametrize("tokens", [SMALLEST_PROMPT + 1, SMALLEST_PROMPT + 2])
def test_a_short_prompt_teaches_nothing(tokens: int) -> None:
    x, query = keys(tokens=tokens), randn(1, 4, tokens, 64, seed=5)
    handle = packed(x, query=query, residual_length=0)
    plain = packed(x, PLAIN, residual_length=0)
    learned = tokens - 2 >= SMALLEST_PROMPT  # two sinks
    assert bool(center(handle).any()) == learned
    assert torch.equal(handle._storage["qdata"], plain._storage["qdata"]) != learned


def test_tokens_that_come_later_are_rounded_without_feedback() -> None:
    x, query = keys(tokens=120), 5 * randn(1, 4, 60, 64, seed=5)
    handle = packed(x[:, :, :60], query=query)
    longer = torch.cat([handle, x[:, :, 60:]], 2)
    assert isinstance(longer, QuantizedKV)
    storage = longer.writable_storage()
    mean = center(handle).float()
    fit_only = packed(x[:, :, :60] * 0 + mean, query=None)  # the same mean, no feedback
    assert torch.equal(center(fit_only), center(handle))
    other = torch.cat([fit_only, x[:, :, 60:]], 2).writable_storage()  # pyright: ignore
    late = slice(60 - 2, 120 - 2 - 8)
    assert torch.equal(storage["qdata"][:, :, late], other["qdata"][:, :, late])


@given(pad=st.integers(1, 40), seed=st.integers(0, 30))
def test_a_padded_row_is_stored_like_the_row_alone(pad: int, seed: int) -> None:
    x, query = keys(2, 100, 32, seed=seed), randn(2, 4, 100, 32, seed=seed + 1)
    both = packed(x, valid=left_padding([0, pad], 100), query=query)._storage
    alone = packed(x[1:, :, pad:], query=query[1:, :, pad:])._storage
    torch.testing.assert_close(both["center"][1:], alone["center"], rtol=2e-3, atol=1e-3)
    same = both["qdata"][1:, :, : 100 - pad - 10] == alone["qdata"][:, :, : 100 - pad - 10]
    assert same.float().mean() > 0.98, "another order of summation may flip a tie"


def test_feedback_keeps_the_error_away_from_the_queries() -> None:
    directions = torch.linalg.qr(randn(64, 6, seed=3))[0]
    query = randn(1, 4, 200, 6, seed=4) @ directions.T * 4
    x = keys(tokens=200)
    errors = []
    for codec in (Squat(strength=0), Squat(strength=3)):
        handle = packed(x, codec, query=query, residual_length=0, sink_length=0)
        error = handle.dequantize() - x
        errors.append(float((error @ directions).square().mean()))
    assert errors[1] < 0.4 * errors[0]


def test_values_are_neither_centred_nor_fed_back() -> None:
    handle = packed(keys(), role="value", query=None)
    assert center(handle).numel() == 0
    assert not Squat().taps("value")


def test_a_mean_of_all_keys_costs_nothing() -> None:
    x = randn(1, 2, 200, 64)
    far = x + 50 * randn(1, 2, 1, 64, seed=3)
    for bits in (2, 4, 8):
        near_error, far_error = (
            (packed(y, bits=bits).dequantize() - y).square().mean() for y in (x, far)
        )
        assert far_error < 1.05 * near_error + 1e-3
    assert (packed(far, PLAIN).dequantize() - far).square().mean() > 100


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_attention_is_true_under_softcap_and_sinks(bits: int) -> None:
    """What is removed from all keys comes back before anything that is not a plain softmax."""
    x = keys(2, 150) + 10 * randn(1, 2, 1, 64, seed=7)
    v, query = randn(2, 2, 150, 64, seed=1), randn(2, 4, 1, 64, seed=2)
    valid = left_padding([0, 20], 150)
    key, value = packed(x, valid=valid, bits=bits), packed(v, role="value", valid=valid, bits=bits)
    sides = [(h._storage.arenas, h._storage.extent, h.format) for h in (key, value)]
    options = {"sinks": randn(4, seed=8) * 3, "scale": 0.125, "causal": 0, "softcap": 5.0}
    found = reference.attend(query, None, None, *sides, mask=None, **options)  # pyright: ignore
    mask = valid[:, None, None]
    for stored_numbers, tolerance in ((True, 1e-4), (False, 0.02 if bits == 8 else None)):
        if tolerance is None:
            continue
        k, u = (key.dequantize(), value.dequantize()) if stored_numbers else (x, v)
        expected = reference.attention(
            query.double(),
            k.double(),
            u.double(),
            mask=mask,
            **options,  # pyright: ignore
        )
        assert (found - expected).abs().max() < tolerance
    key._storage["center"].zero_()
    without = reference.attend(query, None, None, *sides, mask=None, **options)  # pyright: ignore
    assert (without - found).abs().max() > 0.05, "the mean must matter here"


@given(
    q_len=st.sampled_from([1, 2, 5, 16, 17]),
    groups=st.integers(1, 4),
    new=st.booleans(),
    causal=st.sampled_from([0, 1, 2]),
    kind=st.sampled_from(["none", "bool", "float"]),
    head_dim=st.sampled_from([24, 64, 80]),
    seed=st.integers(0, 20),
)
def test_attending_in_the_latent_frame_is_attending_to_the_numbers(
    q_len: int, groups: int, new: bool, causal: int, kind: str, head_dim: int, seed: int
) -> None:
    x, v = keys(2, 70, head_dim, seed=seed), randn(2, 2, 70, head_dim, seed=seed + 1)
    valid = left_padding([0, 9], 70)
    key, value = packed(x, valid=valid), packed(v, role="value", valid=valid)
    query = randn(2, 2 * groups, q_len, head_dim, seed=seed + 2)
    fresh = [randn(2, 2, q_len, head_dim, seed=seed + s) if new else None for s in (3, 4)]
    total = 70 + (q_len if new else 0)
    mask = {
        "none": None,
        "bool": randn(2, 1, q_len, total, seed=seed) > -1,
        "float": randn(1, 2 * groups, 1, total, seed=seed),
    }[kind]
    options = {"sinks": None, "scale": 0.2, "causal": causal, "softcap": 0.0}
    sides = [(h._storage.arenas, h._storage.extent, h.format) for h in (key, value)]
    found = reference.attend(query, *fresh, *sides, mask=mask, **options)  # pyright: ignore
    numbers = [
        torch.cat([h.dequantize(), f], 2).double() if f is not None else h.dequantize().double()
        for h, f in zip((key, value), fresh, strict=True)
    ]
    seen = torch.arange(total) >= torch.tensor([0, 9])[:, None, None, None]
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        seen = mask.double().masked_fill(~seen, -torch.inf)
    expected = reference.attention(query.double(), *numbers, mask=seen, **options)  # pyright: ignore
    torch.testing.assert_close(found.double(), expected.nan_to_num(0.0), rtol=1e-3, atol=1e-5)


def calibrated(head_dim: int = 32) -> tuple[QuantizedKV, Tensor, Tensor]:
    there = torch.linalg.qr(randn(2, head_dim, head_dim))[0] * torch.linspace(0.5, 2, head_dim)
    basis = torch.stack([there, torch.linalg.inv(there)])
    x = keys(3, 90, head_dim)
    fmt = stored_format(Squat(), "key", head_dim=head_dim, bits=8)
    fmt = type(fmt)(**{**vars(fmt), "latent": True})
    return QuantizedKV.from_dense(x, fmt, "key", basis=basis), x, basis


def test_a_handle_with_a_basis_stays_itself() -> None:
    handle, x, basis = calibrated()
    assert handle._storage["basis"] is basis
    torch.testing.assert_close(handle.dequantize(), x, rtol=0, atol=0.2)
    numbers = handle.dequantize()
    rows = torch.tensor([2, 0])
    for changed, expected in (
        (handle.clone(), numbers),
        (handle.index_select(0, rows), numbers[rows]),
        (handle.repeat_interleave(2, 0), numbers.repeat_interleave(2, 0)),
        (handle[:, :, :70], numbers[:, :, :70]),
        (copy.deepcopy(handle), numbers),
        (pickle.loads(pickle.dumps(handle)), numbers),
    ):
        assert isinstance(changed, QuantizedKV)
        torch.testing.assert_close(changed.dequantize(), expected, rtol=0, atol=1e-5)
    assert handle.index_select(0, rows)._storage["basis"] is basis, "rows share it"


def test_appending_keeps_the_mean_and_the_basis() -> None:
    handle, x, _ = calibrated()
    more = keys(3, 40, 32, seed=8)
    longer = torch.cat([handle, more], 2)
    numbers = torch.cat([x, more], 2)
    torch.testing.assert_close(longer.dequantize(), numbers, rtol=0, atol=0.3)  # pyright: ignore
    assert longer.writable_storage().extent == Extent(130, 122)  # pyright: ignore


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match="strength must be a number, 0 or more"):
        Squat(strength=strength)
