"""The laws under Triton's interpreter; ``test_triton.py`` runs this file in its own process."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from squat_fx.codecs import Codec, Kivi, Role, Squat, SquatPaper, register
from squat_fx.kernels import launch
from tests.kernels import laws

# The interpreter multiplies bfloat16 as integers, so bfloat16 waits for a GPU.
DTYPES = (torch.float32, torch.float16)
HEAD_DIMS = (16, 24, 40, 64, 80)
ROLES = ("key", "value")


def case_of(seed: int) -> laws.Case:
    """A small case."""
    return laws.random_case(seed, DTYPES, HEAD_DIMS, longest=70)


def with_feedback(case: laws.Case) -> laws.Case:
    """``case`` with a codec that feeds errors back."""
    return replace(case, codec=Squat() if case.per_token else SquatPaper(32))


@pytest.mark.parametrize("seed", range(24))
def test_attending_agrees_with_float64(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "num_shares", lambda *_: 1 + seed % 3)
    laws.attending_agrees_with_float64(case_of(seed), "cpu")


@pytest.mark.parametrize("seed", range(100, 108))
@pytest.mark.parametrize("role", ROLES)
def test_writing_agrees_with_the_reference(seed: int, role: Role) -> None:
    laws.writing_agrees_with_the_reference(case_of(seed), role, "cpu")


@pytest.mark.parametrize("codec", [Kivi(32), Squat()], ids=lambda c: c.name)
@pytest.mark.parametrize("role", ROLES)
def test_writing_token_by_token_agrees_with_the_reference(codec: Codec, role: Role) -> None:
    case = replace(
        case_of(1), codec=codec, key_dim=40, value_dim=40, residual_length=3, pads=(0, 5)
    )
    laws.writing_agrees_with_the_reference(replace(case, chunks=(1,) * 38), role, "cpu")


@pytest.mark.parametrize("seed", range(600, 608))
def test_writing_both_agrees_with_writing_each(seed: int) -> None:
    laws.writing_both_agrees_with_writing_each(case_of(seed), "cpu")


@pytest.mark.parametrize("seed", range(400, 406))
def test_writing_a_prompt_with_feedback_agrees_with_the_reference(seed: int) -> None:
    case = with_feedback(case_of(seed))
    laws.writing_agrees_with_the_reference(case, "key", "cpu", with_feedback=True)


@pytest.mark.parametrize("seed", range(500, 504))
def test_quantizing_with_feedback_agrees_with_the_reference(seed: int) -> None:
    case = with_feedback(case_of(seed))
    laws.quantizing_agrees_with_the_reference(case, "key", "cpu", with_feedback=True)


@pytest.mark.parametrize("seed", range(200, 208))
@pytest.mark.parametrize("role", ROLES)
def test_quantizing_agrees_with_the_reference(seed: int, role: Role) -> None:
    laws.quantizing_agrees_with_the_reference(case_of(seed), role, "cpu")


@pytest.mark.parametrize("seed", range(300, 304))
@pytest.mark.parametrize("role", ROLES)
def test_dequantizing_agrees_with_the_reference(seed: int, role: Role) -> None:
    laws.dequantizing_agrees_with_the_reference(case_of(seed), role, "cpu")


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
