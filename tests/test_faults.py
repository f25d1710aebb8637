"""What happens when something is wrong: with memory, a kernel, a number, a shape, an option."""

from __future__ import annotations

import ast
import gc
import logging
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import squat_fx
from squat_fx import Config, QuantizedKV
from squat_fx.codecs import CODECS, Lossless, Role
from squat_fx.kernels import fallback, ops, reference
from squat_fx.pool import POOL, ArenaPool
from tests.conftest import randn, stored_format
from tests.models import build, prompt
from tests.test_uses import caches_of
from tests.uses import generate, prefilled, steps, tiny

OPTIONS: dict[str, Any] = {"inner": "eager", "residual_length": 8}


# memory -------------------------------------------------------------------------------------------


@pytest.fixture
def full_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes every new arena fail from its call on, after ``spare`` more."""

    def fill(spare: int = 0) -> None:
        zeros, left = ArenaPool._zeros, [spare]
        gc.collect()
        POOL.clear()  # none that is free may do instead

        def failing(self: ArenaPool, *args: Any) -> Tensor:
            if left[0] == 0:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")
            left[0] -= 1
            return zeros(self, *args)

        monkeypatch.setattr(ArenaPool, "_zeros", failing)

    return fill


def _notes(raised: pytest.ExceptionInfo[BaseException]) -> str:
    return "\n".join(getattr(raised.value, "__notes__", []))


@pytest.mark.parametrize("spare", [0, 1])
def test_no_memory_to_grow_a_handle(
    spare: int, full_memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the codes found room and their scales did not."""
    handle = QuantizedKV.from_dense(
        randn(1, 2, 100, 32), stored_format(CODECS["kivi"](), "key", 32), "key"
    )
    before, room = handle.dequantize(), handle._storage.capacity - 100
    new = randn(1, 2, room + 5, 32, seed=2)
    longer = torch.cat([handle, new], 2)  # waits, exact, until it is written
    full_memory(spare)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory") as raised:
        longer.writable_storage()
    assert "a cache of keys with 100 tokens grew to hold" in _notes(raised)
    assert torch.equal(handle.dequantize(), before)
    assert torch.equal(longer.dequantize()[:, :, 100:], new)
    monkeypatch.undo()
    fresh = torch.cat([QuantizedKV.from_dense(randn(1, 2, 100, 32), handle.format, "key"), new], 2)
    assert torch.equal(longer.clone().dequantize(), fresh.clone().dequantize())


@pytest.mark.parametrize("spare", range(4))
def test_no_memory_to_store_a_prompt_leaves_no_arena_behind(spare: int, full_memory: Any) -> None:
    full_memory(spare)
    before = POOL.live_bytes
    fmt = stored_format(CODECS["squat"](), "key", 32)
    with pytest.raises(torch.OutOfMemoryError):
        QuantizedKV.from_dense(randn(1, 2, 100, 32), fmt, "key")
    assert POOL.live_bytes == before


def test_no_memory_to_grow_in_a_compiled_step(
    full_memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = squat_fx.compile(build("llama"), bits=2, **OPTIONS)
    cache = prefilled(model, prompt(1, 60))
    steps(model, cache, 1, 2)
    room = caches_of(cache)[0]._storage.capacity - 62
    ids = prompt(1, room + 1, seed=7)
    before = [x.dequantize() for x in caches_of(cache)]
    full_memory(1)  # the second layer finds none
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError) as raised:
        model(ids, past_key_values=cache)
    assert "it is as it was" in _notes(raised)
    assert all(
        torch.equal(x.dequantize(), b) for x, b in zip(caches_of(cache), before, strict=True)
    )
    monkeypatch.undo()
    again = prefilled(model, prompt(1, 60))
    steps(model, again, 1, 2)
    with torch.no_grad():
        answers = [model(ids, past_key_values=c).logits for c in (cache, again)]
    assert torch.equal(*answers)


# kernels ------------------------------------------------------------------------------------------


@pytest.fixture
def broken_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A GPU, it seems, on which nothing compiles; the ops that tried."""
    errors = pytest.importorskip("triton.compiler.errors")
    tried: list[str] = []

    def kernel(name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            tried.append(name)
            raise errors.CompilationError(None, ast.Pass(), "no such instruction")

        return run

    names = ("quantize", "write", "write_both", "attend", "dense_past")
    launch = SimpleNamespace(**{name: kernel(name) for name in names})
    monkeypatch.setattr(
        ops, "_implementation", lambda _: reference if fallback.reference_only() else launch
    )
    monkeypatch.setattr(ops, "_learn", lambda _: reference.learn)
    monkeypatch.setattr(fallback, "_FAILED", {})
    return tried


def test_a_kernel_that_does_not_compile_gives_way_to_the_reference(
    broken_kernels: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING, "squat_fx"):
        model = squat_fx.compile(tiny(), bits=2, guard="off", **OPTIONS)
        actual = generate(model, prompt(1, 40))
    texts = [r.getMessage() for r in caplog.records if "does not compile" in r.getMessage()]
    attending = [text for text in texts if "attend.planes_token" in text]
    assert attending == [
        "the Triton kernel of attend.planes_token for float32 [1, 4, 1, 16] does not compile "
        "(CompilationError: no such instruction); the torch reference runs instead, which is slower"
    ]
    assert len(texts) == len(set(texts)) == 3, "a prompt is stored, then attended and appended to"
    assert len(broken_kernels) == 4, "keys and values are stored apart, and nothing is tried again"
    monkeypatch.undo()
    assert torch.equal(generate(squat_fx.compile(tiny(), bits=2, **OPTIONS), prompt(1, 40)), actual)


def test_strict_raises_where_a_kernel_does_not_compile(broken_kernels: list[str]) -> None:
    model = squat_fx.compile(tiny(), bits=2, strict=True, **OPTIONS)
    with pytest.raises(
        fallback.KernelNotCompiled, match=r"kernel of store\.planes_token for float32"
    ):
        generate(model, prompt(1, 40))
    assert broken_kernels == ["write"]


def test_a_head_wider_than_kernels_are_for_runs_as_the_reference(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU, it seems; Gemma 4 has heads of 512 channels."""
    monkeypatch.setattr(fallback, "DEVICE", "cpu")
    monkeypatch.setattr(fallback, "_FAILED", {})
    fmt = stored_format(CODECS["squat"](), "key", 512, 2)
    x = randn(1, 2, 90, 512)
    with caplog.at_level(logging.WARNING, "squat_fx"):
        stored = [QuantizedKV.from_dense(x, fmt, "key").dequantize() for _ in range(2)]
    assert torch.equal(*stored)
    texts = [r.getMessage() for r in caplog.records]
    assert texts[0] == (
        "the Triton kernel of store.planes_token for float32 [1, 2, 90, 512] does not compile "
        "(HeadTooWide: head_dim 512 is more than 256); the torch reference runs instead, which is "
        "slower"
    )
    assert len(texts) == len(set(texts)) == 2
    monkeypatch.setattr(fallback, "_FAILED", {})
    with fallback.strictly(), pytest.raises(fallback.KernelNotCompiled, match="512 is more than"):
        QuantizedKV.from_dense(x, fmt, "key")


def test_near_miss_another_error_of_a_kernel_is_not_hidden(
    broken_kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(ops._implementation(torch.device("cuda")), "dense_past", run)
    fmt = stored_format(Lossless(4))
    handle = QuantizedKV.from_dense(randn(1, 2, 30, 16), fmt, "key")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        handle.dequantize()


# numbers ------------------------------------------------------------------------------------------

TOKENS, BAD = 300, 170
FAULTS: dict[str, Callable[[Tensor], Any]] = {
    "all NaN": lambda x: x.fill_(torch.nan),
    "a NaN": lambda x: x[0].fill_(torch.nan),
    "an infinity": lambda x: x[0].fill_(torch.inf),
    "minus infinity": lambda x: x.fill_(-torch.inf),
    "beyond fp16": lambda x: x.mul_(1e5),
    "far beyond fp16": lambda x: x.mul_(1e30),
}


def _stored(codec: str, role: Role, head_dim: int = 32) -> Any:
    bits = 3.875 if codec == "polar" else 2
    return stored_format(CODECS[codec](), role, head_dim, bits)


def _errors(stored: Tensor, exact: Tensor) -> Tensor:
    """Relative to the token, ``[batch, heads, tokens]``."""
    return (stored - exact).norm(dim=-1) / exact.norm(dim=-1)


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("codec", CODECS)
def test_a_token_that_is_not_finite_spoils_its_own_group_and_no_more(
    codec: str, role: Role
) -> None:
    """Other rows, heads and groups are what they would be; in exact storage other tokens, too."""
    fmt, x = _stored(codec, role), randn(2, 2, TOKENS, 32)
    query = randn(2, 4, TOKENS, 32, seed=3)

    def packed(x: Tensor, at_once: int) -> Tensor:
        handle = QuantizedKV.from_dense(x[:, :, :at_once], fmt, role, query=query[:, :, :at_once])
        return torch.cat([handle, x[:, :, at_once:]], 2).clone().dequantize()

    first = (BAD - fmt.sink_length) // fmt.token_group * fmt.token_group + fmt.sink_length
    others = torch.ones(2, 2, TOKENS, dtype=torch.bool)
    others[0, 0, first : first + fmt.token_group] = False
    for fault, spoil in FAULTS.items():
        for at_once in (TOKENS, 100):  # in the prompt, or later
            usual = _errors(packed(x, at_once), x).amax()
            spoiled = x.clone()
            spoil(spoiled[0, 0, BAD])
            errors = _errors(packed(spoiled, at_once), x)[others]
            assert bool((errors <= 1.5 * usual + 1e-6).all()), (fault, at_once, errors.max(), usual)


@pytest.mark.parametrize("bits", [2, 8])
def test_attention_over_a_nan_is_nan_as_in_a_dense_cache(bits: int) -> None:
    """Of the rows that see it; a 0 would hide that something is wrong with the model."""
    fmt, x = stored_format(CODECS["squat"](), "key", 32, bits), randn(2, 2, 80, 32)
    x[0, 0, 40] = torch.nan
    handle = QuantizedKV.from_dense(x, fmt, "key")
    out = F.scaled_dot_product_attention(randn(2, 2, 1, 32, seed=2), handle, handle)
    assert bool(out[0, 0].isnan().all())
    assert bool(out[0, 1].isfinite().all())
    assert bool(out[1].isfinite().all())


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("codec", CODECS)
def test_degenerate_tokens_stay_finite_and_what_they_were(codec: str, role: Role) -> None:
    fmt, normal = _stored(codec, role), randn(1, 2, 200, 32)
    query = randn(1, 4, 200, 32, seed=3)

    def packed(x: Tensor) -> Tensor:
        handle = QuantizedKV.from_dense(x, fmt, role, query=query.to(x.dtype))
        stored = handle.dequantize()
        assert bool(stored.isfinite().all())
        return stored

    assert packed(torch.zeros_like(normal)).abs().max() <= 1e-6
    for size in (1e-9, 1e-40):  # the second are subnormal
        assert (packed(normal * size) - normal * size).abs().max() <= 1e-6
    equal = normal[:, :, :1].expand_as(normal).contiguous()
    assert _errors(packed(equal), equal).max() < 0.5
    packed((normal * 1e5).bfloat16())  # scales are fp16, and saturate
    packed(normal * 1e30)


# shapes and options -------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [1, 8, 20, 24, 40, 72, 100])
@pytest.mark.parametrize("codec", ["squat", "kivi", "none", "turboquant"])
def test_head_dims_that_are_no_whole_plane_groups(codec: str, head_dim: int) -> None:
    fmt = stored_format(CODECS[codec](), "key", head_dim, 4)
    x = randn(1, 2, 90, head_dim)
    stored = QuantizedKV.from_dense(x, fmt, "key").dequantize()
    assert (stored - x).norm() <= 0.2 * x.norm()


@pytest.mark.parametrize(
    ("codec", "head_dim", "reason"),
    [
        ("squat", 520, r"head_dim 520 is outside 1\.\.512"),
        ("polar_rope", 15, "pairs the channels of keys, got head_dim 15; choose another codec"),
        ("qjl", 4, "heads of 9 to 256 channels, got head_dim 4; choose outliers=0"),
    ],
)
def test_a_head_dim_that_a_codec_cannot_store_is_a_reason(
    codec: str, head_dim: int, reason: str
) -> None:
    found = Config(codec=codec).formats(0, 1, 2, head_dim, head_dim)
    assert isinstance(found, str)
    assert re.search(reason, found), found


@pytest.mark.parametrize("shape", [(1, 0), (0, 5)])
def test_empty_prompts_are_answered_as_without_us(shape: tuple[int, int]) -> None:
    ids = torch.zeros(shape, dtype=torch.long)

    def answer(model: Any) -> Any:
        with torch.no_grad():
            try:
                return model(ids, use_cache=True).logits
            except Exception as error:
                return type(error)

    expected, model = answer(tiny()), squat_fx.compile(tiny(), bits=2, **OPTIONS)
    actual = answer(model)
    if isinstance(expected, Tensor):
        assert actual.shape == expected.shape
    else:
        assert issubclass(actual, expected)
    assert torch.equal(generate(model, prompt(1, 20)), generate(model, prompt(1, 20)))


def _step(x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    key = torch.cat([past, x], dim=2)
    return F.scaled_dot_product_attention(x, key, key), key


@pytest.mark.parametrize("codec", ["none", "squat"])
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("tokens", [(0, 3), (40, 0), (40, 0, 1)])
def test_calls_that_bring_no_tokens(codec: str, batch: int, tokens: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    step = squat_fx.compile(_step, codec=codec, bits=8, **OPTIONS)
    past = expected_past = torch.zeros(batch, 2, 0, 16)
    with torch.no_grad():
        for seed, count in enumerate(tokens):
            x = randn(batch, 2, count, 16, seed=seed)
            out, past = step(x, past)
            expected, expected_past = _step(x, expected_past)
            assert past.shape == expected_past.shape
            torch.testing.assert_close(out, expected, atol=0.05, rtol=0.05)


def test_a_handle_of_nothing() -> None:
    fmt = stored_format()
    handle = QuantizedKV.from_dense(randn(0, 2, 30, 16), fmt, "key")
    assert handle.dequantize().shape == (0, 2, 30, 16)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"codec": "squad"}, "unknown codec 'squad', choose one of .*; did you mean 'squat'"),
        ({"bits": 9}, "bits must be a number of bits from 1 to 8, got 9; the nearest is 8"),
        ({"inner": "inducter"}, "inner must be one of inductor, aot_eager, eager, got 'inducter'"),
        ({"residual_length": -1}, "residual_length must be a number of tokens, 0 or more, got -1"),
        ({"layer_bits": {"0": 2}}, "layer_bits maps layer numbers to bits, got the key '0'"),
        ({"calibration": "file"}, r"calibration must come from squat_fx\.calibrate\(\)"),
    ],
)
def test_a_wrong_option_changes_nothing(options: dict[str, Any], text: str) -> None:
    model = tiny()
    with pytest.raises(ValueError, match=text):
        squat_fx.compile(model, **options)
    assert model._compiled_call_impl is None
    with pytest.raises(ValueError, match="was not compiled"):
        squat_fx.report(model)


@pytest.mark.parametrize("call", [squat_fx.compile, lambda m, **o: squat_fx.explain(m, {}, **o)])
def test_a_misspelled_option_is_named(call: Any) -> None:
    model = tiny()
    with pytest.raises((TypeError, ValueError), match="residual_lenght"):
        call(model, residual_lenght=8)
    assert model._compiled_call_impl is None
