"""Models that are not from transformers: whatever a cache is kept in, it is packed or left alone
with its reason, and the outputs are those of the dense cache.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import squat_fx
from squat_fx import QuantizedKV
from squat_fx.token_major import TokenMajorKV
from tests.conftest import randn
from tests.own import (
    BATCH,
    EXACT,
    HEAD_DIM,
    KV_HEADS,
    WIDTH,
    Layer,
    Own,
    check,
    check_exported,
    einsums,
    head_major,
    in_a_dict,
    leaves,
    mask_by_vmap,
    run,
    token_major,
    token_major_written_out,
)


@pytest.mark.parametrize(
    "update",
    [head_major, token_major, token_major_written_out, mask_by_vmap, einsums, in_a_dict],
)
def test_cache_of_separate_tensors_is_packed(update: Callable[..., Any]) -> None:
    model = Own(update)
    step = squat_fx.compile(lambda x, cache: model(x, cache), **EXACT)
    cache, report = check(model, step)
    assert all(isinstance(kept, QuantizedKV) for kept in leaves(cache)), str(report)
    assert not report.skipped, str(report)
    assert {graph.kind for graph in report.graphs} == {"prefill", "decode"}


def test_token_major_cache_is_what_it_says() -> None:
    """Shapes, operations that stay packed, copies, pickles, and steps that are not compiled."""
    model = Own(token_major)
    step = squat_fx.compile(lambda x, cache: model(x, cache), **EXACT)
    dense = run(model)[1]
    key = run(step)[1][0][0]
    wanted = dense[0][0]
    assert type(key) is TokenMajorKV
    assert key.shape == wanted.shape
    assert type(key.transpose(1, 2)) is QuantizedKV
    assert type(key.transpose(1, 2).transpose(2, 1)) is TokenMajorKV
    new, rows = randn(BATCH, 2, KV_HEADS, HEAD_DIM), torch.tensor([1, 0, 1])
    operations: dict[str, Callable[[Tensor], Tensor]] = {
        "cat": lambda x: torch.cat([x, new], 1),
        "crop": lambda x: x[:, :5],
        "narrow": lambda x: x.narrow(1, 0, 4),
        "rows": lambda x: x[rows],
        "index_select": lambda x: x.index_select(0, rows),
        "repeat": lambda x: x.repeat_interleave(2, dim=0),
        "clone": lambda x: x.clone(),
        "to": lambda x: x.to(torch.float64),
        "permute": lambda x: x.permute(0, 2, 1, 3),
        "deepcopy": copy.deepcopy,
        "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    }
    with torch.no_grad():
        for name, operation in operations.items():
            result, expected = operation(key), operation(wanted)
            assert isinstance(result, QuantizedKV), name
            torch.testing.assert_close(result.dequantize(), expected, msg=name)
        for index in (key[:, :, :1], key[:, 3:5, 1], key.flatten(2), key * 2):
            assert not isinstance(index, QuantizedKV)
        torch.testing.assert_close(key[:, 3:5, 1], wanted[:, 3:5, 1])


def test_token_major_cache_is_saved_and_loaded(tmp_path: Path) -> None:
    model = Own(token_major)
    step = squat_fx.compile(lambda x, cache: model(x, cache), **EXACT)
    cache = run(step)[1]
    squat_fx.save_cache(tmp_path / "cache.safetensors", cache)
    loaded = squat_fx.load_cache(tmp_path / "cache.safetensors")
    for kept, wanted in zip(leaves(loaded), leaves(cache), strict=True):
        assert type(kept) is TokenMajorKV
        torch.testing.assert_close(kept.dequantize(), wanted.dequantize())


def test_token_major_steps_that_are_not_compiled_stay_packed() -> None:
    model = Own(token_major)
    step = squat_fx.compile(lambda x, cache: model(x, cache), **EXACT)
    expected, found = run(model)[1], run(step)[1]
    with torch.no_grad():
        for call in (model, model, step):
            x = randn(BATCH, 1, WIDTH, seed=77)
            (out, found), (wanted, expected) = call(x, found), model(x, expected)
            torch.testing.assert_close(out, wanted)
            assert all(type(kept) is TokenMajorKV for kept in leaves(found))


def test_cache_in_attributes_of_the_module() -> None:
    """Buffers that the module replaces at every call."""

    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = Layer()
            self.register_buffer("past_key", None, persistent=False)
            self.register_buffer("past_value", None, persistent=False)
            self.eval()

        def forward(self, x: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
            old = None if self.past_key is None else {0: (self.past_key, self.past_value)}
            out, (self.past_key, self.past_value) = head_major(self.layer, x, old, 0)
            return x + self.layer.out(out), None

    plain, compiled = Remembering(), squat_fx.compile(Remembering(), **EXACT)
    torch.testing.assert_close(run(compiled)[0], run(plain)[0])
    report = squat_fx.report(compiled)
    assert report.rewritten or report.skipped or report.notes
    assert isinstance(compiled.past_key, QuantizedKV), str(report)


def test_call_that_needs_gradients_runs_untouched_and_says_so() -> None:
    model = Own(head_major)
    step = squat_fx.compile(lambda x, cache: model(x, cache), **EXACT)
    x = randn(BATCH, 5, WIDTH)
    losses = []
    for call in (model, step):
        model.zero_grad()
        call(x, None)[0].square().mean().backward()
        losses.append(model.layers[0].key.weight.grad.clone())
    torch.testing.assert_close(*losses)
    assert "gradients are enabled" in str(squat_fx.report(step))
    assert squat_fx.report(step).rewritten == 0


@pytest.mark.parametrize("update", [head_major, token_major])
def test_exported_program_with_a_past(update: Any) -> None:
    model = Own(update)
    past = run(model, (7,))[1]
    length = torch.export.Dim("length", min=2, max=512)
    dims = {1 if update is token_major else 2: length}
    dynamic = tuple((dims, dims) for _ in model.layers)
    kept = check_exported(model, past, dynamic)
    assert all(isinstance(t, QuantizedKV) for t in leaves(kept))


def test_symbolic_trace_of_a_token_major_cache() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = Layer()

        def forward(self, x: Any, past_key: Any, past_value: Any) -> Any:
            query, key, value = self.layer.project(x)
            key, value = torch.cat([past_key, key], 1), torch.cat([past_value, value], 1)
            out = F.scaled_dot_product_attention(
                query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), enable_gqa=True
            )
            return out, key, value

    step = Step().eval()
    past = tuple(randn(BATCH, 7, KV_HEADS, HEAD_DIM, seed=s) for s in (1, 2))
    traced = torch.fx.symbolic_trace(step)
    config = squat_fx.Config(**EXACT)
    module, report = squat_fx.rewrite(traced, (randn(BATCH, 3, WIDTH), *past), config)
    assert report.rewritten == 1, str(report)
    kept: Any = past
    with torch.no_grad():
        for seed, tokens in enumerate((1, 3, 1, 1, 1, 3, 1, 1)):
            x = randn(BATCH, tokens, WIDTH, seed=seed)
            (found, *kept), (expected, *past) = module(x, *kept), step(x, *past)
            torch.testing.assert_close(found, expected)
    assert all(type(t) is TokenMajorKV for t in kept)
