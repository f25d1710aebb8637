"""Factors between keys and queries: what they minimise, and what they do to scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squat_fx import QuantizedKV
from squat_fx.codecs import Squat
from squat_fx.codecs.smoothing import LARGEST_EXPONENT, smoothing_factors
from tests.conftest import randn, stored_format

SEEDS = st.integers(0, 2**16)


def spread(seed: int, octaves: float) -> Tensor:
    """Mean squares of 64 channels that spread over so many octaves."""
    return torch.exp2(octaves * (torch.rand(1, 2, 1, 64, generator=_generator(seed)) - 0.5))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(octaves=st.floats(0.0, 20.0), seed=SEEDS)
def test_factors_are_powers_of_two_about_one(octaves: float, seed: int) -> None:
    factors = smoothing_factors(spread(seed, octaves), spread(seed + 1, octaves))
    assert factors.dtype == torch.float16
    exponents = factors.double().log2()
    assert torch.equal(exponents, exponents.round())
    assert exponents.abs().max() <= LARGEST_EXPONENT
    assert exponents.mean(-1).abs().max() < 0.5


@given(octaves=st.floats(0.0, 12.0), seed=SEEDS)
def test_they_minimise_the_error_of_a_score_to_a_rounded_exponent(
    octaves: float, seed: int
) -> None:
    """Within what half an exponent can cost: ``(2 + 1 / 2)**2 / 4``, by Kantorovich."""
    key, query = spread(seed, octaves), spread(seed + 1, octaves)
    factors = smoothing_factors(key, query).double()
    found = (query * factors**2).sum(-1) * (key / factors**2).sum(-1)
    least = (key * query).sqrt().sum(-1) ** 2
    floor = 1.1  # of channels that are nearly zero
    assert (found <= 1.5625 * floor * least).all()


@given(seed=SEEDS, scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_only_ratios_between_channels_count(seed: int, scale: float) -> None:
    key, query = spread(seed, 8.0), spread(seed + 1, 8.0)
    assert torch.equal(
        smoothing_factors(key, query), smoothing_factors(key * 4096, query * scale / scale)
    )


@pytest.mark.parametrize("bad", [0.0, torch.inf, torch.nan])
def test_moments_that_say_nothing_give_ones(bad: float) -> None:
    moment = torch.full((1, 1, 1, 16), bad)
    assert (smoothing_factors(moment, torch.ones(1, 1, 1, 16)) == 1).all()
    assert (smoothing_factors(torch.ones(1, 1, 1, 16), moment) == 1).all()


def score_error(codec: Squat, bits: int = 2) -> float:
    """Relative error of scores over stored keys with a few large channels, which move with the
    position so that no mean holds them."""
    key, query = randn(1, 2, 300, 64), randn(1, 4, 300, 64, seed=1)
    key[..., ::16] *= 30
    query[..., ::16] *= 0.1
    fmt = stored_format(codec, head_dim=64, bits=bits, residual_length=32, sink_length=4)
    handle = QuantizedKV.from_dense(key, fmt, "key", None, query)
    error = (handle.dequantize() - key).repeat_interleave(2, 1)
    scores = query @ key.repeat_interleave(2, 1).mT
    return float((query @ error.mT).norm() / scores.norm())


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_large_channels_that_queries_do_not_look_at_no_longer_drown_the_others(
    strength: float,
) -> None:
    smooth, plain = (score_error(Squat(strength, smooth=smooth)) for smooth in (True, False))
    assert smooth < 0.75 * plain


def test_tokens_that_come_later_are_smoothed_too() -> None:
    key, query = randn(1, 2, 100, 64), randn(1, 4, 100, 64, seed=1)
    later = randn(1, 2, 80, 64, seed=2)
    for x in (key, later):
        x[..., 3] *= 30
    query[..., 3] *= 0.1
    errors = []
    for smooth in (True, False):
        fmt = stored_format(Squat(smooth=smooth), head_dim=64, residual_length=32, sink_length=4)
        handle = QuantizedKV.from_dense(key, fmt, "key", None, query)
        longer = torch.cat([handle, later], 2).clone().dequantize()
        error = (longer[:, :, 100:148] - later[:, :, :48])[..., torch.arange(64) != 3]
        errors.append(float(error.norm()))
    assert errors[0] < 0.75 * errors[1]


def test_a_calibrated_basis_weighs_channels_itself() -> None:
    key, query = randn(1, 2, 100, 16), randn(1, 4, 100, 16, seed=1)
    key[..., 3] *= 30
    basis = torch.eye(16).expand(2, 2, 16, 16).contiguous()
    fmt = stored_format(Squat(), head_dim=16, latent=True)
    handle = QuantizedKV.from_dense(key, fmt, "key", None, query, basis)
    assert (handle._storage["affine"][:, :, 1:] == 1).all()
