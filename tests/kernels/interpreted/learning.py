"""What a prompt teaches, how errors are fed back, and the transform before rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from squat_fx.codecs import Codec, Squat, SquatPaper, codec_spec, make_format
from squat_fx.kernels import fit, launch, ops, reference
from squat_fx.kernels.triton_append import load_rows, store_rows
from squat_fx.kernels.triton_hadamard import rotate, rotate_back, rotate_rows, rotate_rows_back
from squat_fx.kernels.triton_planes import stored_format
from squat_fx.layouts.hadamard import rotation
from tests.choose import full
from tests.kernels import laws
from tests.kernels.interpreted.cases import DTYPES, case_of


def with_feedback(case: laws.Case) -> laws.Case:
    """``case`` with a codec that feeds errors back."""
    return replace(case, codec=Squat() if case.per_token else SquatPaper(32))


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
        *(learning(head_dim) for head_dim in (16, 24, 40)),
        *full(learning(80)),
        learning(144, chunks=(70,), queries_per_kv=1, pads=(0,)),
        *full(learning(128, chunks=(70,), queries_per_kv=1, pads=(0,))),
        *(learning(32, queries_per_kv=n, pads=(0, 0)) for n in (1, 8)),
        *full(learning(32, queries_per_kv=3, pads=(0, 0))),
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


@pytest.mark.parametrize("in_chunk", [64, *full(192)])
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


@pytest.mark.parametrize("seed", [400, 401, 402, 403, *full(404, 405)])
def test_writing_a_prompt_with_feedback_agrees_with_the_reference(seed: int) -> None:
    case = with_feedback(case_of(seed))
    laws.writing_agrees_with_the_reference(case, "key", "cpu", with_feedback=True)


@pytest.mark.parametrize("seed", [500, 501, *full(502, 503)])
def test_quantizing_with_feedback_agrees_with_the_reference(seed: int) -> None:
    case = with_feedback(case_of(seed))
    laws.quantizing_agrees_with_the_reference(case, "key", "cpu", with_feedback=True)


def test_quantizing_wide_heads_with_feedback_agrees_with_the_reference() -> None:
    case = replace(case_of(500), codec=Squat(), key_dim=144)
    laws.quantizing_agrees_with_the_reference(case, "key", "cpu", with_feedback=True)


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
@pytest.mark.parametrize("head_dim", [16, 24, 40, 64, 72, 112, 128, 256, *full(80, 96, 192)])
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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_fp16_cannot_hold_is_not_learned_from(
    bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "chunk_tokens", lambda *_: 64)
    laws.learning_leaves_out(bad, learning(64, pads=(0, 0)), "cpu")
