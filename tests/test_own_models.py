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
from squat_fx import QuantizedKV, Report
from squat_fx.codecs import Lossless
from squat_fx.token_major import TokenMajorKV
from tests.conftest import randn

WIDTH, HEADS, KV_HEADS, HEAD_DIM, BATCH = 32, 4, 2, 8, 2
STEPS = (9, 1, 1, 3, 1, 1, 1, 1, 1, 1)
EXACT: dict[str, Any] = {
    "codec": Lossless(group_size=4), "residual_length": 4, "sink_length": 2, "inner": "eager",
}  # fmt: skip


class Layer(nn.Module):
    """Projections of one attention layer, ``[batch, tokens, heads, head_dim]``."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, HEADS * HEAD_DIM)
        self.key = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM)
        self.value = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(p(x).unflatten(-1, (-1, HEAD_DIM)) for p in (self.query, self.key, self.value))

    def grown(
        self, x: Tensor, cache: Any, index: int, token_dim: int
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Queries, keys and values with tokens on ``token_dim``, keys and values behind those of
        pairs in a cache, and how many these are.
        """
        query, *new = (p if token_dim == 1 else p.transpose(1, 2) for p in self.project(x))
        if cache is None:
            return query, *new, 0  # pyright: ignore[reportReturnType]
        key, value = (
            torch.cat([old, x], token_dim) for old, x in zip(cache[index], new, strict=True)
        )
        return query, key, value, cache[index][0].shape[token_dim]


def attend(query: Tensor, key: Tensor, value: Tensor, past: int) -> Tensor:
    """Causal attention over ``[batch, heads, tokens, head_dim]``."""
    tokens = query.shape[2]
    mask = torch.arange(past + tokens) <= torch.arange(tokens)[:, None] + past
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


class Own(nn.Module):
    """Two layers; ``update`` says how a cache is kept."""

    def __init__(self, update: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.update = update
        self.eval()

    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        made = []
        for index, layer in enumerate(self.layers):
            out, kept = self.update(layer, x, cache, index)
            x = x + layer.out(out)
            made.append(kept)
        return x, self.gather(made)

    def gather(self, made: list[Any]) -> Any:
        return tuple(made)


def head_major(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """Tuples of keys and values, ``[B, H, T, D]``; no cache at first."""
    query, key, value, past = layer.grown(x, cache, index, token_dim=2)
    return attend(query, key, value, past).transpose(1, 2).flatten(2), (key, value)


def token_major(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """Tuples of keys and values, ``[B, T, H, D]``."""
    query, key, value, past = layer.grown(x, cache, index, token_dim=1)
    turned = (t.transpose(1, 2) for t in (query, key, value))
    return attend(*turned, past).transpose(1, 2).flatten(2), (key, value)


def token_major_written_out(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """The same with repeated heads, permutes and a softmax."""
    query, key, value, past = layer.grown(x, cache, index, token_dim=1)
    repeated = key.repeat_interleave(2, dim=2), value.repeat_interleave(2, dim=2)
    scores = query.transpose(1, 2) @ repeated[0].permute(0, 2, 3, 1) / HEAD_DIM**0.5
    ahead = torch.arange(scores.shape[-1]) > torch.arange(scores.shape[-2])[:, None] + past
    probs = scores.masked_fill(ahead, float("-inf")).softmax(-1)
    return (probs @ repeated[1].transpose(1, 2)).transpose(1, 2).flatten(2), (key, value)


def mask_by_vmap(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """Tuples, and a mask that is made entry by entry."""
    query, key, value, past = layer.grown(x, cache, index, token_dim=2)
    rows, columns = torch.arange(query.shape[2]) + past, torch.arange(key.shape[2])
    mask = torch.vmap(torch.vmap(torch.ge, (None, 0)), (0, None))(rows, columns)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).flatten(2), (key, value)


def einsums(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """The same with einsums, ``[B, T, H, D]`` in and out."""
    query, key, value, past = layer.grown(x, cache, index, token_dim=1)
    repeated = key.repeat_interleave(2, dim=2), value.repeat_interleave(2, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", query, repeated[0]) * HEAD_DIM**-0.5
    ahead = torch.arange(scores.shape[-1]) > torch.arange(scores.shape[-2])[:, None] + past
    probs = torch.softmax(scores.masked_fill(ahead, float("-inf")), dim=-1)
    return torch.einsum("bhts,bshd->bthd", probs, repeated[1]).flatten(2), (key, value)


def in_a_dict(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """A dict of names per layer."""
    old = None if cache is None else {index: (cache[index]["k"], cache[index]["v"])}
    out, (key, value) = head_major(layer, x, old, index)
    return out, {"k": key, "v": value}


def stacked(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """One tensor for all layers, ``[layers, 2, B, H, T, D]``."""
    old = None if cache is None else {index: (cache[index, 0], cache[index, 1])}
    out, kept = head_major(layer, x, old, index)
    return out, torch.stack(kept)


def fused(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """Keys and values of a layer in one tensor, ``[B, H, T, 2 D]``."""
    query, key, value = (p.transpose(1, 2) for p in layer.project(x))
    both = torch.cat([key, value], -1)
    past = 0 if cache is None else cache[index].shape[2]
    if cache is not None:
        both = torch.cat([cache[index], both], 2)
    key, value = both.chunk(2, -1)
    return attend(query, key, value, past).transpose(1, 2).flatten(2), both


class Stacked(Own):
    def gather(self, made: list[Any]) -> Any:
        return torch.stack(made)


def run(step: Callable[..., Any], steps: tuple[int, ...] = STEPS) -> tuple[Tensor, Any]:
    """All outputs of a loop, and the last cache."""
    outputs, cache = [], None
    with torch.no_grad():
        for seed, tokens in enumerate(steps):
            out, cache = step(randn(BATCH, tokens, WIDTH, seed=seed), cache)
            outputs.append(out)
    return torch.cat(outputs, 1), cache


def leaves(cache: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(cache)


def check(model: Callable[..., Any], step: Callable[..., Any]) -> tuple[Any, Report]:
    """The law: the same outputs and the same cache."""
    expected, dense = run(model)
    found, cache = run(step)
    torch.testing.assert_close(found, expected)
    for kept, wanted in zip(leaves(cache), leaves(dense), strict=True):
        kept = kept.dequantize() if isinstance(kept, QuantizedKV) else kept
        torch.testing.assert_close(kept, wanted)
    return cache, squat_fx.report(step)


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


REASONS = {
    stacked: "a past + new concatenation that is not returned",
    fused: "comes from chunk, not from a past + new concatenation",
}


@pytest.mark.parametrize("update", REASONS)
def test_cache_of_tensors_that_hold_more_than_keys_is_left_alone(update: Any) -> None:
    model = (Stacked if update is stacked else Own)(update)
    step = squat_fx.compile(lambda x, cache: model(x, cache), **EXACT)
    cache, report = check(model, step)
    assert not any(isinstance(kept, QuantizedKV) for kept in leaves(cache))
    assert report.skipped
    assert any(REASONS[update] in s.reason for s in report.skipped), str(report)


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
    dynamic = ({}, tuple((dims, dims) for _ in model.layers))
    x = randn(BATCH, 1, WIDTH)
    with torch.no_grad():
        exported = torch.export.export(model, (x, past), dynamic_shapes=dynamic)
        module, report = squat_fx.rewrite(exported.module(), (x, past), squat_fx.Config(**EXACT))
        assert report.rewritten == len(model.layers), str(report)
        kept = past
        for seed in range(9):
            x = randn(BATCH, 1, WIDTH, seed=seed)
            (found, kept), (expected, past) = module(x, kept), model(x, past)
            torch.testing.assert_close(found, expected)
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
