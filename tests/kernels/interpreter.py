"""The laws under Triton's interpreter; ``test_triton.py`` runs this file in its own process."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from squat_fx.codecs import (
    Codec,
    Kivi,
    Role,
    Squat,
    SquatPaper,
    codec_spec,
    make_format,
    register,
)
from squat_fx.codecs.hadamard import rotation
from squat_fx.kernels import launch
from squat_fx.kernels.triton_append import load_rows, store_rows
from squat_fx.kernels.triton_hadamard import rotate, rotate_back, rotate_rows, rotate_rows_back
from squat_fx.kernels.triton_planes import stored_format
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


@pytest.mark.parametrize(("head_dim", "shares"), [(16, 5), (48, 40), (144, 6)])
def test_attending_in_many_shares_agrees_with_float64(
    head_dim: int, shares: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "num_shares", lambda *_: shares)
    case = replace(case_of(4), codec=Squat(), key_dim=head_dim, value_dim=head_dim, chunks=(300,))
    laws.attending_agrees_with_float64(replace(case, calibrated=False, bits=2, pads=(0, 9)), "cpu")


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


def test_quantizing_wide_heads_with_feedback_agrees_with_the_reference() -> None:
    case = replace(case_of(500), codec=Squat(), key_dim=144)
    laws.quantizing_agrees_with_the_reference(case, "key", "cpu", with_feedback=True)


@pytest.mark.parametrize("seed", range(200, 208))
@pytest.mark.parametrize("role", ROLES)
def test_quantizing_agrees_with_the_reference(seed: int, role: Role) -> None:
    laws.quantizing_agrees_with_the_reference(case_of(seed), role, "cpu")


@pytest.mark.parametrize("seed", range(300, 304))
@pytest.mark.parametrize("role", ROLES)
def test_dequantizing_agrees_with_the_reference(seed: int, role: Role) -> None:
    laws.dequantizing_agrees_with_the_reference(case_of(seed), role, "cpu")


@triton.jit
def rotation_kernel(
    x, there, back, fmt: tl.constexpr, TOKENS: tl.constexpr, PADDED_D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, TOKENS)[:, None]
    if ROWS:
        channel = tl.arange(0, PADDED_D)[None, :]
        inside = channel < fmt.head_dim
        numbers = tl.load(x + row * fmt.head_dim + channel, mask=inside, other=0.0).to(tl.float32)
        rotated, rotated_back = rotate_rows(numbers, fmt), rotate_rows_back(numbers, fmt)
        tl.store(there + row * fmt.head_dim + channel, rotated, mask=inside)
        tl.store(back + row * fmt.head_dim + channel, rotated_back, mask=inside)
    else:
        lane = tl.arange(0, 16)[None, :]
        rows = x + row * fmt.head_dim
        planes = load_rows(rows, row >= 0, lane, fmt)
        rotated, rotated_back = rotate(planes, lane, fmt), rotate_back(planes, lane, fmt)
        store_rows(there + row * fmt.head_dim, rotated, row >= 0, lane, fmt)
        store_rows(back + row * fmt.head_dim, rotated_back, row >= 0, lane, fmt)


@pytest.mark.parametrize("in_rows", [False, True])
@pytest.mark.parametrize("head_dim", [16, 24, 40, 64, 72, 80, 96, 112, 128, 192, 256])
def test_the_transform_is_the_fixed_rotation(head_dim: int, in_rows: bool) -> None:
    matrix = rotation(head_dim).double()
    fmt = stored_format(make_format(Squat(), codec_spec(Squat()), "key", head_dim, 2, 32, 4))
    for tokens in (1, 2, 32):
        for dtype in DTYPES:
            generator = torch.Generator().manual_seed(tokens)
            x = (100 * torch.randn(tokens, head_dim, generator=generator)).to(dtype)
            there, back = torch.full((2, tokens, head_dim), torch.nan)
            rotation_kernel[(1,)](x, there, back, fmt, tokens, launch.padded(head_dim), in_rows)
            for actual, expected in ((there, x.double() @ matrix), (back, x.double() @ matrix.T)):
                torch.testing.assert_close(actual.double(), expected, rtol=0.0, atol=1e-4)


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
