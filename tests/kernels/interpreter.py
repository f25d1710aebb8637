"""The laws under Triton's interpreter; ``test_triton.py`` runs this file in its own process."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from squat_fx.codecs import (
    Codec,
    Kivi,
    Kvarn,
    Qjl,
    Role,
    Squat,
    SquatPaper,
    Svdq,
    Think,
    TurboQuant,
    codec_spec,
    make_format,
    register,
)
from squat_fx.kernels import fit, launch, ops, reference
from squat_fx.kernels.triton_append import load_rows, store_rows
from squat_fx.kernels.triton_hadamard import rotate, rotate_back, rotate_rows, rotate_rows_back
from squat_fx.kernels.triton_planes import stored_format
from squat_fx.layouts.hadamard import rotation
from squat_fx.layouts.rotary import Rotation
from tests.kernels import laws

# The interpreter multiplies bfloat16 as integers, so bfloat16 waits for a GPU.
DTYPES = (torch.float32, torch.float16)
HEAD_DIMS = (16, 24, 40, 64, 80)
ROLES = ("key", "value")
DECODED_APART = (Kvarn(32), Kvarn(64), Think(32), Think(64, ratio=0.7), Think(32, ratio=0.0))


def case_of(seed: int) -> laws.Case:
    """A small case."""
    return laws.random_case(seed, DTYPES, HEAD_DIMS, longest=70)


def with_feedback(case: laws.Case) -> laws.Case:
    """``case`` with a codec that feeds errors back."""
    return replace(case, codec=Squat() if case.per_token else SquatPaper(32))


def of_other_layouts(codec: Codec, head_dim: int, **changes: Any) -> laws.Case:
    """A case of a layout that packs with torch and decodes in a function of its own."""
    case = replace(
        case_of(head_dim), codec=codec, key_dim=head_dim, value_dim=40, bits=3,
        widths="uniform", pads=(0, 11), chunks=(90, 1, 7), residual_length=5, sink_length=4,
        shifted=False, calibrated=False,
    )  # fmt: skip
    return replace(case, **changes)


OTHER_LAYOUTS = (
    *(of_other_layouts(TurboQuant(), head_dim, bits=b) for head_dim, b in ((16, 1), (24, 2))),
    *(of_other_layouts(TurboQuant(False), head_dim, bits=b) for head_dim, b in ((64, 3), (80, 4))),
    of_other_layouts(TurboQuant(), 64, value_dim=64, bits=2.25),
    of_other_layouts(Qjl(64, 3, 32), 24),
    of_other_layouts(Qjl(48, 0), 40, pads=(0, 0)),
    of_other_layouts(Qjl(96, 8, 144), 80, dtype=torch.float16),
)
IDS = [f"{case.codec.name}-{case.key_dim}-{case.bits}" for case in OTHER_LAYOUTS]


@pytest.mark.parametrize("case", OTHER_LAYOUTS, ids=IDS)
@pytest.mark.parametrize("q_len", [1, 5])
def test_attending_in_other_layouts_agrees_with_float64(
    case: laws.Case, q_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_into(2, monkeypatch)
    case = replace(case, q_len=q_len, new_len=q_len)
    laws.attending_agrees_with_float64(case, "cpu")


@pytest.mark.parametrize("case", OTHER_LAYOUTS, ids=IDS)
@pytest.mark.parametrize("role", ROLES)
def test_writing_and_dequantizing_in_other_layouts_agree_with_the_reference(
    case: laws.Case, role: Role
) -> None:
    laws.writing_agrees_with_the_reference(case, role, "cpu")
    laws.dequantizing_agrees_with_the_reference(case, role, "cpu")
    if case.format(role).channel_group in (1, case.format(role).head_dim):
        laws.quantizing_agrees_with_the_reference(case, role, "cpu")


@pytest.mark.parametrize("case", OTHER_LAYOUTS, ids=IDS)
def test_writing_both_in_other_layouts_agrees_with_writing_each(case: laws.Case) -> None:
    laws.writing_both_agrees_with_writing_each(case, "cpu")


LATENT = (
    of_other_layouts(Svdq(schedule=(5, 3, 0)), 40, rotation=Rotation(20, "halves")),
    of_other_layouts(Svdq(schedule=(4, 2)), 24, rotation=Rotation(24, "interleaved")),
    of_other_layouts(Svdq(), 64, rotation=Rotation(64, "halves"), dtype=torch.float16),
    of_other_layouts(Svdq(pre_rope=False), 16, pads=(0, 0)),
)


@pytest.mark.parametrize("case", LATENT, ids=lambda c: f"{c.key_dim}-{c.codec}")
def test_latent_keys_are_read_and_written_as_in_the_reference(
    case: laws.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_into(2, monkeypatch)
    case = replace(case, chunks=(50, 1, 7), value_dim=16, q_len=3, new_len=3)
    laws.attending_agrees_with_float64(case, "cpu")
    laws.dequantizing_agrees_with_the_reference(case, "key", "cpu")
    laws.writing_agrees_with_the_reference(case, "key", "cpu")
    laws.quantizing_agrees_with_the_reference(case, "key", "cpu")


def split_into(shares: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split tokens even if they are few."""
    monkeypatch.setattr(launch, "num_shares", lambda *_: shares)
    monkeypatch.setattr(launch, "TILES_PER_SHARE", 1)


@pytest.mark.parametrize("seed", range(24))
def test_attending_agrees_with_float64(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    split_into(1 + seed % 3, monkeypatch)
    laws.attending_agrees_with_float64(case_of(seed), "cpu")


@pytest.mark.parametrize("seed", range(16))
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


@pytest.mark.parametrize("codec", DECODED_APART, ids=codec_spec)
@pytest.mark.parametrize("seed", range(700, 704))
def test_attending_to_what_is_decoded_apart_agrees_with_float64(
    codec: Codec, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_into(1 + seed % 3, monkeypatch)
    laws.attending_agrees_with_float64(replace(case_of(seed), codec=codec), "cpu")


@pytest.mark.parametrize(
    ("codec", "role"), [(Kvarn(32), "value"), *((codec, "key") for codec in DECODED_APART)]
)
def test_what_is_decoded_apart_is_as_in_the_reference(codec: Codec, role: Role) -> None:
    for seed, head_dim in ((710, 16), (711, 40), (712, 80)):
        case = replace(case_of(seed), codec=codec, key_dim=head_dim, value_dim=head_dim)
        case = replace(case, residual_length=5, chunks=(70, 1, 40, 1, 33), pads=(0, 9))
        laws.dequantizing_agrees_with_the_reference(case, role, "cpu")
        laws.quantizing_agrees_with_the_reference(case, role, "cpu")
        laws.writing_agrees_with_the_reference(case, role, "cpu")


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


@pytest.mark.parametrize("seed", range(100, 108))
@pytest.mark.parametrize("role", ROLES)
def test_radii_and_angles_are_written_read_and_quantized_as_in_the_reference(
    seed: int, role: Role
) -> None:
    case = laws.polar_case(case_of(seed))
    laws.writing_agrees_with_the_reference(case, role, "cpu")
    laws.quantizing_agrees_with_the_reference(case, role, "cpu")
    laws.dequantizing_agrees_with_the_reference(case, role, "cpu")


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


def learning(head_dim: int, **changes: Any) -> laws.Case:
    """A prompt of fp16 keys to learn from, the second row padded."""
    case = replace(
        case_of(head_dim), codec=Squat(), key_dim=head_dim, bits=2, widths="uniform",
        dtype=torch.float16, pads=(0, 30), chunks=(150,), sink_length=4, queries_per_kv=2,
        shifted=False, calibrated=False,
    )  # fmt: skip
    return replace(case, **changes)


@pytest.mark.parametrize(
    "case",
    [
        *(learning(head_dim) for head_dim in (16, 24, 40, 80)),
        *(learning(n, chunks=(70,), queries_per_kv=1, pads=(0,)) for n in (128, 144)),
        *(learning(32, queries_per_kv=n, pads=(0, 0)) for n in (1, 3, 8)),
        *(learning(32, chunks=(n,), pads=(0, 9, n)) for n in (1, 35, 36)),
        *(learning(48, calibrated=True, codec=Squat(center=c)) for c in (False, True)),
        learning(32, sink_length=0),
        learning(32, codec=Squat(center=False)),
        learning(32, codec=Squat(smooth=False)),
        learning(32, codec=Squat(center=False, smooth=False)),
        learning(32, codec=Squat(strength=0.0)),
        learning(64, codec=Squat(strength=fit.LARGEST_STRENGTH)),
        *(learning(n, codec=SquatPaper(32), chunks=(20,), pads=(0, 9, 20)) for n in (40, 64)),
    ],
    ids=lambda c: f"{c.key_dim}-{c.codec}-{c.chunks[0]}-{c.queries_per_kv}",
)
def test_learning_agrees_with_float64(case: laws.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "chunk_tokens", lambda *_: 64)
    laws.learning_agrees_with_float64(case, "cpu")


@pytest.mark.parametrize("in_chunk", [64, 192])
def test_a_mean_far_from_the_spread_costs_no_precision(
    in_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "chunk_tokens", lambda *_: in_chunk)
    laws.learning_agrees_with_float64(learning(64), "cpu", shift=50.0)


@pytest.mark.parametrize(
    "case",
    [
        learning(64, dtype=torch.float32),
        learning(64, codec=Squat(strength=2 * fit.LARGEST_STRENGTH)),
        learning(64, codec=SquatPaper(32, relative=False)),
        learning(64, codec=SquatPaper(32, block=64)),
        learning(64, codec=SquatPaper(32, rank=8)),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_compute_is_learned_as_in_the_reference(case: laws.Case) -> None:
    fmt = case.format("key")
    x, query = (case.randn(2, laws.NUM_KV_HEADS, 70, 64, seed=seed) for seed in (1, 2))
    arenas = [reference.empty_arenas(x, 0, fmt, None) for _ in range(2)]
    found = fit.learn(arenas[0], x, None, query, fmt, "key")
    expected = reference.learn(arenas[1], x, None, query, fmt, "key")
    assert found.feedback is not None
    assert expected.feedback is not None
    laws.assert_same((found.feedback,), (expected.feedback,))
    for name, learned in expected.fixed.items():
        laws.assert_same((arenas[0].fixed[name],), (learned,))


@pytest.mark.parametrize("codec", [Squat(), SquatPaper(32)], ids=lambda c: c.name)
def test_storing_learns_with_kernels_where_it_rounds_with_them(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_implementation", lambda _: launch)
    ran = []
    monkeypatch.setattr(fit, "_run", lambda *a, run=fit._run: ran.append(a) or run(*a))
    laws.storing_agrees_with_the_reference(learning(40, codec=codec), "key", "cpu")
    assert len(ran) == 1


def test_nothing_is_learned_from_values() -> None:
    case = learning(64, value_dim=64)
    fmt, x = case.format("value"), case.randn(2, laws.NUM_KV_HEADS, 70, 64)
    found = fit.learn(reference.empty_arenas(x, 0, fmt, None), x, None, None, fmt, "value")
    assert not found.fixed
    assert found.feedback is None


def test_without_queries_a_mean_is_learned_all_the_same() -> None:
    case = learning(64)
    fmt, x = case.format("key"), case.randn(2, laws.NUM_KV_HEADS, 70, 64)
    arenas = [reference.empty_arenas(x, 0, fmt, None) for _ in range(2)]
    found = fit.learn(arenas[0], x, None, None, fmt, "key")
    reference.learn(arenas[1], x, None, None, fmt, "key")
    assert found.feedback is None
    torch.testing.assert_close(arenas[0].affine, arenas[1].affine)


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
