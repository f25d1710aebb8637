"""Attention over packed tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest

from squat_fx.codecs import Codec, Squat
from squat_fx.kernels import launch
from tests.choose import diagonal, every
from tests.kernels import laws
from tests.kernels.interpreted.cases import DECODED_APART, LATENT, OTHER_LAYOUTS, case_of, named


def split_into(shares: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split tokens even if they are few."""
    monkeypatch.setattr(launch, "num_shares", lambda *_: shares)
    monkeypatch.setattr(launch, "TILES_PER_SHARE", 1)


@pytest.mark.parametrize("seed", every(2, range(24)))
def test_attending_agrees_with_float64(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    split_into(1 + seed % 3, monkeypatch)
    laws.attending_agrees_with_float64(case_of(seed), "cpu")


# Each of four codecs with each of their bits; everywhere, each with one of them.
@pytest.mark.parametrize("seed", every(5, range(16)))
def test_attending_to_radii_and_angles_agrees_with_float64(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_into(1 + seed % 3, monkeypatch)
    laws.attending_agrees_with_float64(laws.polar_case(case_of(seed)), "cpu")


@pytest.mark.parametrize(("head_dim", "shares"), [(16, 5), (48, 40), (144, 6)])
def test_attending_in_many_shares_agrees_with_float64(
    head_dim: int, shares: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_into(shares, monkeypatch)
    case = replace(case_of(4), codec=Squat(), key_dim=head_dim, value_dim=head_dim, chunks=(300,))
    laws.attending_agrees_with_float64(replace(case, calibrated=False, bits=2, pads=(0, 9)), "cpu")


@pytest.mark.parametrize(("codec", "seed"), diagonal(DECODED_APART, range(700, 704)), ids=named)
def test_attending_to_what_is_decoded_apart_agrees_with_float64(
    codec: Codec, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_into(1 + seed % 3, monkeypatch)
    laws.attending_agrees_with_float64(replace(case_of(seed), codec=codec), "cpu")


@pytest.mark.parametrize(("case", "q_len"), diagonal(OTHER_LAYOUTS, (1, 5)), ids=named)
def test_attending_in_other_layouts_agrees_with_float64(
    case: laws.Case, q_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_into(2, monkeypatch)
    case = replace(case, q_len=q_len, new_len=q_len)
    laws.attending_agrees_with_float64(case, "cpu")


@pytest.mark.parametrize("case", LATENT, ids=named)
def test_attending_to_latent_keys_agrees_with_float64(
    case: laws.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_into(2, monkeypatch)
    laws.attending_agrees_with_float64(case, "cpu")
