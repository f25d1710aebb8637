"""Tokens into storage, with and without the ring, and out of it again."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from torch import Tensor

from squat_fx.codecs import Codec, Kivi, Kvarn, Role, Squat, register
from squat_fx.kernels import launch
from tests.choose import diagonal, every, full
from tests.kernels import laws
from tests.kernels.interpreted.cases import (
    DECODED_APART,
    LATENT,
    OTHER_LAYOUTS,
    ROLES,
    case_of,
    named,
)


@pytest.mark.parametrize(("seed", "role"), diagonal(range(100, 108), ROLES))
def test_writing_agrees_with_the_reference(seed: int, role: Role) -> None:
    laws.writing_agrees_with_the_reference(case_of(seed), role, "cpu")


@pytest.mark.parametrize(("codec", "role"), diagonal((Kivi(32), Squat()), ROLES[::-1]), ids=named)
def test_writing_token_by_token_agrees_with_the_reference(codec: Codec, role: Role) -> None:
    case = replace(
        case_of(1), codec=codec, key_dim=40, value_dim=40, residual_length=3, pads=(0, 5)
    )
    laws.writing_agrees_with_the_reference(replace(case, chunks=(1,) * 38), role, "cpu")


@pytest.mark.parametrize(("seed", "role"), diagonal(range(100, 108), ROLES))
def test_radii_and_angles_are_written_read_and_quantized_as_in_the_reference(
    seed: int, role: Role
) -> None:
    case = laws.polar_case(case_of(seed))
    laws.writing_agrees_with_the_reference(case, role, "cpu")
    laws.quantizing_agrees_with_the_reference(case, role, "cpu")
    laws.dequantizing_agrees_with_the_reference(case, role, "cpu")


@pytest.mark.parametrize("seed", [600, 601, 604, 605, *full(602, 603, 606, 607)])
def test_writing_both_agrees_with_writing_each(seed: int) -> None:
    laws.writing_both_agrees_with_writing_each(case_of(seed), "cpu")


@pytest.mark.parametrize(("seed", "role"), diagonal(range(200, 208), ROLES))
def test_quantizing_agrees_with_the_reference(seed: int, role: Role) -> None:
    laws.quantizing_agrees_with_the_reference(case_of(seed), role, "cpu")


@pytest.mark.parametrize(("seed", "role"), diagonal(range(300, 304), ROLES))
def test_dequantizing_agrees_with_the_reference(seed: int, role: Role) -> None:
    laws.dequantizing_agrees_with_the_reference(case_of(seed), role, "cpu")


@pytest.mark.parametrize(
    ("stored", "seeded"),
    diagonal(
        [(Kvarn(32), "value"), *((codec, "key") for codec in DECODED_APART)],
        [(710, 16), (711, 40), (712, 80)],
    ),
    ids=str,
)
def test_what_is_decoded_apart_is_as_in_the_reference(
    stored: tuple[Codec, Role], seeded: tuple[int, int]
) -> None:
    (codec, role), (seed, head_dim) = stored, seeded
    case = replace(case_of(seed), codec=codec, key_dim=head_dim, value_dim=head_dim)
    case = replace(case, residual_length=5, chunks=(70, 1, 40, 1, 33), pads=(0, 9))
    laws.dequantizing_agrees_with_the_reference(case, role, "cpu")
    laws.quantizing_agrees_with_the_reference(case, role, "cpu")
    laws.writing_agrees_with_the_reference(case, role, "cpu")


@pytest.mark.parametrize(("case", "role"), diagonal(OTHER_LAYOUTS, ROLES), ids=named)
def test_writing_and_dequantizing_in_other_layouts_agree_with_the_reference(
    case: laws.Case, role: Role
) -> None:
    laws.writing_agrees_with_the_reference(case, role, "cpu")
    laws.dequantizing_agrees_with_the_reference(case, role, "cpu")
    if case.format(role).channel_group in (1, case.format(role).head_dim):
        laws.quantizing_agrees_with_the_reference(case, role, "cpu")


@pytest.mark.parametrize("case", LATENT, ids=named)
def test_latent_keys_are_read_and_written_as_in_the_reference(case: laws.Case) -> None:
    laws.dequantizing_agrees_with_the_reference(case, "key", "cpu")
    laws.writing_agrees_with_the_reference(case, "key", "cpu")
    laws.quantizing_agrees_with_the_reference(case, "key", "cpu")


@pytest.mark.parametrize("case", every(2, OTHER_LAYOUTS), ids=named)
def test_writing_both_in_other_layouts_agrees_with_writing_each(case: laws.Case) -> None:
    laws.writing_both_agrees_with_writing_each(case, "cpu")


@register
@dataclass(frozen=True)
class Wider(Kivi):
    """A rounding that the kernels do not know."""

    name: ClassVar[str] = "wider"

    def quantize(
        self, groups: Tensor, valid: Tensor | None, bits: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        codes, scale, zero_point = super().quantize(groups, valid, bits)
        return codes, scale * 1.5, zero_point


@pytest.mark.parametrize("role", ROLES)
def test_a_codec_that_kernels_do_not_know_is_rounded_by_torch_and_says_so(
    role: Role, caplog: pytest.LogCaptureFixture
) -> None:
    launch.rounds_in_kernel.cache_clear()
    launch._warn_once.cache_clear()
    case = replace(case_of(3), codec=Wider(), chunks=(50, 1, 40, 1, 33), pads=(0, 4))
    with caplog.at_level(logging.WARNING):
        laws.writing_agrees_with_the_reference(case, role, "cpu")
    assert [r.getMessage() for r in caplog.records] == [
        "the Triton kernels do not know the rounding of codec 'wider': "
        "quantizing with torch operations on the GPU, which is slower"
    ]


def test_a_slice_of_an_arena_is_refused() -> None:
    case = case_of(1)
    arenas, extent = laws.stored(case, "key")
    part = type(arenas)(tuple(t[:, :, :1] for t in arenas.packed), arenas.dense, arenas.start)
    with pytest.raises(ValueError, match="arenas must be contiguous"):
        launch.dense_past(part, extent, case.format("key"))
