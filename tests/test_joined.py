"""Several caches in one tensor: each is packed for itself, and the tensor is what it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import squat_fx
from squat_fx import QuantizedKV
from squat_fx.joined import JoinedKV
from squat_fx.lenses import Join, are_all_of_it, origins, same_lens, view_through
from squat_fx.passes.format import format_graph
from tests.choose import full
from tests.conftest import randn
from tests.joined import (
    MODELS,
    Stacked,
    differential,
    differential_written_out,
    of_all,
    on_channels,
)
from tests.own import (
    BATCH,
    EXACT,
    HEAD_DIM,
    KV_HEADS,
    WIDTH,
    Layer,
    Own,
    attend,
    check,
    check_exported,
    head_major,
    leaves,
    run,
)

TWO_BITS: dict[str, Any] = EXACT | {"codec": "kivi", "bits": 2, "guard": "off"}


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()  # code is shared by models, and so would be their graphs
    return squat_fx.compile(lambda x, cache: model(x, cache), **(EXACT | options))


# The law: the same numbers


SAMPLE = (
    "on_channels", "on_a_dim_in_the_middle", "projected_at_once", "one_head", "stacked",
    "appended at last",
)  # fmt: skip


@pytest.mark.parametrize("name", [*SAMPLE, *full(*(set(MODELS) - set(SAMPLE)))])
def test_each_cache_in_a_tensor_is_packed(name: str) -> None:
    step = compiled(MODELS[name]())
    cache, report = check(MODELS[name](), step)
    assert not report.skipped, str(report)
    assert {graph.kind for graph in report.graphs} == {"prefill", "decode"}
    for kept in leaves(cache):
        assert isinstance(kept, JoinedKV)
        assert all(isinstance(part, QuantizedKV) for part in kept.parts)


@pytest.mark.parametrize("name", ["stacked", *full("on_channels", "projected_at_once")])
def test_two_bits_are_those_of_separate_tensors(name: str) -> None:
    expected, separate = run(compiled(Own(head_major), **TWO_BITS), (40, 1, 1, 3, 1, 1))
    found, joined = run(compiled(MODELS[name](), **TWO_BITS), (40, 1, 1, 3, 1, 1))
    torch.testing.assert_close(found, expected)
    apart = squat_fx.cache_bytes(separate)
    together = squat_fx.cache_bytes(list(leaves(joined)))
    assert together == apart


@pytest.mark.parametrize(
    ("update", "kv_heads"),
    [
        (differential, 4),
        (differential_written_out, 4),
        *full((differential, 2), (differential_written_out, 2)),
    ],
)
def test_values_of_which_each_half_is_read_twice(update: Any, kv_heads: int) -> None:
    plain, packed = (_with_heads(Own(update), kv_heads) for _ in range(2))
    cache, report = check(plain, compiled(packed))
    assert not report.skipped, str(report)
    for kept in leaves(cache):
        assert isinstance(kept, JoinedKV)
        assert [p.shape[1] for p in kept.parts] == [kv_heads // 2] * 2


def _with_heads(model: Own, kv_heads: int) -> Own:
    torch.manual_seed(1)
    for layer in model.layers:
        layer.query = nn.Linear(WIDTH, 8 * HEAD_DIM)
        layer.key = nn.Linear(WIDTH, kv_heads * HEAD_DIM)
        layer.value = nn.Linear(WIDTH, kv_heads * HEAD_DIM)
        layer.out = nn.Linear(8 * HEAD_DIM, WIDTH)
    return model


def test_differential_attention_at_two_bits_is_near() -> None:
    plain, packed = (_with_heads(Own(differential), 4) for _ in range(2))
    expected = run(plain, (64, 1, 1, 1))[0]
    found, cache = run(compiled(packed, **TWO_BITS | {"bits": 4}), (64, 1, 1, 1))
    assert (found - expected).norm() < 0.1 * expected.norm()
    assert squat_fx.cache_bytes(list(leaves(cache))).stored > 0


def test_layers_that_are_skipped_stay_dense_in_the_same_tensor() -> None:
    step = compiled(Stacked(of_all), skip_layers=(1,))
    cache, report = check(Stacked(of_all), step)
    assert {s.reason for s in report.skipped} == {"the layer is in skip_layers"}
    assert [isinstance(part, QuantizedKV) for part in cache.parts] == [True, True, False, False]


# The carrier


@pytest.fixture(scope="module")
def fused() -> tuple[JoinedKV, Tensor]:
    """``[B, H, T, 2 D]``, packed and dense."""
    torch._dynamo.reset()
    model = Own(on_channels)
    found, wanted = run(compiled(model))[1][0], run(model)[1][0]
    assert isinstance(found, JoinedKV)
    return found, wanted


NEW = randn(BATCH, KV_HEADS, 2, 2 * HEAD_DIM)
ROWS = torch.tensor([1, 0, 1])
STAYS_PACKED: dict[str, Callable[[Tensor], Tensor]] = {
    "cat": lambda x: torch.cat([x, NEW], 2),
    "crop": lambda x: x[:, :, :5],
    "crop, dots": lambda x: x[..., :-3, :],
    "newest": lambda x: x[:, :, -6:],
    "narrow": lambda x: x.narrow(2, 0, 4),
    "rows": lambda x: x[ROWS],
    "rows, dots": lambda x: x[ROWS, ...],
    "index_select": lambda x: x.index_select(0, ROWS),
    "repeat": lambda x: x.repeat_interleave(2, dim=0),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "to": lambda x: x.to(torch.float64),
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}
GIVES_HANDLES: dict[str, Callable[[Tensor], Tensor]] = {
    "chunk": lambda x: x.chunk(2, -1)[1],
    "split": lambda x: x.split(HEAD_DIM, 3)[0],
    "sizes": lambda x: x.split((HEAD_DIM, HEAD_DIM), 3)[1],
    "slice": lambda x: x[..., HEAD_DIM:],
}
BECOMES_DENSE: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda x: x * 2,
    "overlap": lambda x: x[..., 3:11],
    "one token": lambda x: x[:, :, 3],
    "heads": lambda x: x[:, :1],
    "turned": lambda x: x.transpose(1, 2),
    "mask": lambda x: x[torch.tensor([True, False])],
}


@pytest.mark.parametrize("name", STAYS_PACKED)
def test_operations_on_all_parts_stay_packed(name: str, fused: tuple[JoinedKV, Tensor]) -> None:
    found, wanted = (STAYS_PACKED[name](x) for x in fused)
    assert isinstance(found, JoinedKV)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.dequantize(), wanted)


@pytest.mark.parametrize("name", GIVES_HANDLES)
def test_selecting_one_part_gives_its_handle(name: str, fused: tuple[JoinedKV, Tensor]) -> None:
    found, wanted = (GIVES_HANDLES[name](x) for x in fused)
    assert isinstance(found, QuantizedKV)
    torch.testing.assert_close(found.dequantize(), wanted)


@pytest.mark.parametrize("name", BECOMES_DENSE)
def test_all_else_is_right_and_dense(name: str, fused: tuple[JoinedKV, Tensor]) -> None:
    found, wanted = (BECOMES_DENSE[name](x) for x in fused)
    assert not isinstance(found, (JoinedKV, QuantizedKV))
    torch.testing.assert_close(found, wanted)


def test_layers_of_a_stack_are_selected_one_after_the_other() -> None:
    stack, dense = run(compiled(Stacked(of_all)))[1], run(Stacked(of_all))[1]
    assert isinstance(stack[1], JoinedKV)
    assert isinstance(stack[1, 0], QuantizedKV)
    key, value = stack[0].unbind(0)
    assert isinstance(key, QuantizedKV)
    for found, wanted in ((stack[1], dense[1]), (key, dense[0, 0]), (value, dense[0, 1])):
        torch.testing.assert_close(found.dequantize(), wanted)


def test_it_is_not_written_in_place(fused: tuple[JoinedKV, Tensor]) -> None:
    with pytest.raises(ValueError, match="a JoinedKV cannot be written in place"):
        fused[0].add_(1)
    with pytest.raises(ValueError, match="a JoinedKV cannot be written in place"):
        fused[0][0] = 1


def test_it_is_saved_and_loaded(tmp_path: Path, fused: tuple[JoinedKV, Tensor]) -> None:
    squat_fx.save_cache(tmp_path / "cache.safetensors", {"layer": fused[0]})
    loaded = squat_fx.load_cache(tmp_path / "cache.safetensors")["layer"]
    assert loaded.join == fused[0].join
    torch.testing.assert_close(loaded.dequantize(), fused[1])
    torch.save(fused[0], tmp_path / "cache.pt")
    loaded = torch.load(tmp_path / "cache.pt", weights_only=True)
    torch.testing.assert_close(loaded.dequantize(), fused[1])


@pytest.mark.parametrize("name", ["appended at last", *full("on_channels", "stacked")])
def test_steps_that_are_not_compiled(name: str) -> None:
    """In between, and then compiled again: as dense, whether the cache stays packed or not."""
    model, step = MODELS[name](), compiled(MODELS[name]())
    expected, found = run(model)[1], run(step)[1]
    with torch.no_grad():
        for call in (model, step, model, model, step):
            x = randn(BATCH, 1, WIDTH, seed=77)
            (out, found), (wanted, expected) = call(x, found), model(x, expected)
            torch.testing.assert_close(out, wanted)


def test_cache_that_needs_gradients_runs_untouched() -> None:
    model = Own(on_channels)
    step = compiled(model)
    cache = run(step)[1]
    out, _ = step(randn(BATCH, 1, WIDTH), cache)
    wanted, _ = model(randn(BATCH, 1, WIDTH), run(model)[1])
    torch.testing.assert_close(out, wanted)
    assert "gradients are enabled" in str(squat_fx.report(step))


# Graphs that are not Dynamo's


@pytest.mark.parametrize(
    ("name", "token_dim"),
    [("on_channels", 2), ("merged_heads", 1), ("stacked", 4),
     *full(("on_a_dim_in_front", 3), ("flat", 1), ("appended at last", 4))],
)  # fmt: skip
def test_exported_programs(name: str, token_dim: int) -> None:
    model = MODELS[name]()
    past = run(model, (7,))[1]
    length = torch.export.Dim("length", min=2, max=512)
    dims = torch.utils._pytree.tree_map(lambda _: {token_dim: length}, past)
    kept = check_exported(model, past, dims)
    assert all(isinstance(t, JoinedKV) for t in leaves(kept))


class Step(nn.Module):
    """One step over a past of keys and values in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = Layer()
        self.eval()

    def forward(self, x: Any, past: Any) -> Any:
        query, *new = (p.transpose(1, 2) for p in self.layer.project(x))
        key, value, kept = self.update(past, *new)
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True), kept

    def update(self, past: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
        raise NotImplementedError


class OnChannels(Step):
    def update(self, past: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
        both = torch.cat([past, torch.cat([key, value], -1)], 2)
        return both[..., :HEAD_DIM], both[..., HEAD_DIM:], both


class InFront(Step):
    def update(self, past: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
        key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        return key, value, torch.stack([key, value])


ON_CHANNELS, IN_FRONT = (BATCH, KV_HEADS, 7, 2 * HEAD_DIM), (2, BATCH, KV_HEADS, 7, HEAD_DIM)


@pytest.mark.parametrize(("step", "shape"), [(OnChannels, ON_CHANNELS), (InFront, IN_FRONT)])
def test_symbolic_traces(step: type[Step], shape: tuple[int, ...]) -> None:
    past, module = randn(*shape, seed=1), step()
    traced = torch.fx.symbolic_trace(module)
    inputs = randn(BATCH, 3, WIDTH), past
    rewritten, report = squat_fx.rewrite(traced, inputs, squat_fx.Config(**EXACT))
    assert report.rewritten == 1, str(report)
    kept: Any = past
    with torch.no_grad():
        for seed, tokens in enumerate((1, 3, 1, 1, 1, 3, 1, 1)):
            x = randn(BATCH, tokens, WIDTH, seed=seed)
            (found, kept), (expected, past) = rewritten(x, kept), module(x, past)
            torch.testing.assert_close(found, expected)
    assert isinstance(kept, JoinedKV)


# Near misses


class OneThirdUnread(Step):
    """A third of the tensor is something else."""

    def update(self, past: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
        both = torch.cat([past, torch.cat([key, value, value], -1)], 2)
        return both[..., :HEAD_DIM], both[..., HEAD_DIM : 2 * HEAD_DIM], both


class Overlapping(Step):
    """Keys and values share channels."""

    def update(self, past: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
        both = torch.cat([past, torch.cat([key, value], -1)], 2)
        return both[..., :HEAD_DIM], both[..., 4 : 4 + HEAD_DIM], both


class Written(Step):
    """The tensor is written in place after it was put together."""

    def update(self, past: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
        both = torch.cat([past, torch.cat([key, value], -1)], 2)
        both[:, :, :1].mul_(2.0)
        return both[..., :HEAD_DIM], both[..., HEAD_DIM:], both


class AppendedOnHeads(Step):
    """It grows on another dim than the tokens."""

    def update(self, past: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
        both = torch.cat([past[:, :, : key.size(2)], torch.cat([key, value], -1)], 1)
        return both[..., :HEAD_DIM], both[..., HEAD_DIM:], both


class Static(Step):
    """A buffer of fixed size."""

    def update(self, past: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
        both = past.index_copy(2, torch.arange(3), torch.cat([key, value], -1))
        return both[..., :HEAD_DIM], both[..., HEAD_DIM:], both


class Swapped(Step):
    """What is new comes first."""

    def update(self, past: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
        both = torch.cat([torch.cat([key, value], -1), past], 2)
        return both[..., :HEAD_DIM], both[..., HEAD_DIM:], both


class OtherPast(Step):
    """Keys are appended to the old values, and values to the old keys."""

    def update(self, past: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
        key, value = torch.cat([past[1], key], 2), torch.cat([past[0], value], 2)
        return key, value, torch.stack([key, value])


THIRDS = (BATCH, KV_HEADS, 7, 3 * HEAD_DIM)


@pytest.mark.parametrize(
    ("step", "shape"),
    [(OneThirdUnread, THIRDS), (Overlapping, ON_CHANNELS), (Written, ON_CHANNELS),
     (AppendedOnHeads, (BATCH, KV_HEADS, 3, 2 * HEAD_DIM)), (Static, ON_CHANNELS)],
)  # fmt: skip
def test_what_is_not_all_of_it_is_left_alone(step: type[Step], shape: tuple[int, ...]) -> None:
    module, inputs = step(), (randn(BATCH, 3, WIDTH), randn(*shape, seed=1))
    traced = torch.fx.symbolic_trace(module)
    before = format_graph(traced.graph)
    rewritten, report = squat_fx.rewrite(traced, inputs, squat_fx.Config(**EXACT))
    assert report.rewritten == 0
    assert report.skipped
    assert format_graph(rewritten.graph) == before
    with torch.no_grad():
        torch.testing.assert_close(rewritten(*inputs), module(*inputs))


@pytest.mark.parametrize(("step", "shape"), [(Swapped, ON_CHANNELS), (OtherPast, IN_FRONT)])
def test_caches_that_do_not_go_back_to_where_they_came_from(
    step: type[Step], shape: tuple[int, ...]
) -> None:
    module, past = step(), randn(*shape, seed=1)
    inputs = randn(BATCH, 3, WIDTH), past
    traced = torch.fx.symbolic_trace(module)
    rewritten, _ = squat_fx.rewrite(traced, inputs, squat_fx.Config(**EXACT))
    kept: Any = past
    with torch.no_grad():
        for seed, tokens in enumerate((3, 1, 1, 3)):
            x = randn(BATCH, tokens, WIDTH, seed=seed)
            (found, kept), (expected, past) = rewritten(x, kept), module(x, past)
            torch.testing.assert_close(found, expected)
            whole = kept.dequantize() if isinstance(kept, JoinedKV) else kept
            torch.testing.assert_close(whole, past)


def test_values_that_are_read_by_other_heads_than_they_repeat_for() -> None:
    """A mask that differs by head, and a tile beside keys that are repeated as a whole."""

    def by_head(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
        query, key, value = (p.transpose(1, 2) for p in layer.project(x))
        if cache is not None:
            key, value = (torch.cat(p, 2) for p in zip(cache[index], (key, value), strict=True))
        past = key.shape[2] - query.shape[2]
        ahead = torch.arange(key.shape[2]) > torch.arange(query.shape[2])[:, None] + past
        slope = torch.arange(query.shape[1])[:, None, None] * -0.1 * torch.arange(key.shape[2])
        mask = slope.masked_fill(ahead, float("-inf"))
        tiled = value.chunk(2, 1)[0].repeat(1, 2, 1, 1)
        out = F.scaled_dot_product_attention(query, key, tiled, attn_mask=mask, enable_gqa=True)
        other = F.scaled_dot_product_attention(
            query, key, value.chunk(2, 1)[1].repeat(1, 2, 1, 1), attn_mask=mask, enable_gqa=True
        )
        return (out + other).transpose(1, 2).flatten(2), (key, value)

    plain, packed = (_with_heads(Own(by_head), 4) for _ in range(2))
    _, report = check(plain, compiled(packed))
    assert report.rewritten == 0
    assert report.skipped


def test_both_halves_tiled_the_same_way_are_no_double_read() -> None:
    """Keys are tiled as the values are: then each head reads one of each."""

    def tiled(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
        query, key, value = (p.transpose(1, 2) for p in layer.project(x))
        past = 0 if cache is None else cache[index][0].shape[2]
        if cache is not None:
            key, value = (torch.cat(p, 2) for p in zip(cache[index], (key, value), strict=True))
        keys, values = key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1)
        return attend(query, keys, values, past).transpose(1, 2).flatten(2), (key, value)

    plain, packed = (_with_heads(Own(tiled), 4) for _ in range(2))
    cache, report = check(plain, compiled(packed))
    assert not report.skipped, str(report)
    assert all(isinstance(kept, QuantizedKV) for kept in leaves(cache))


# Lenses


def test_two_spellings_of_a_lens() -> None:
    by_slices = (("narrow", (2, 16, 16)), ("unflatten", (2, (2, 8))))
    by_views = (("unflatten", (2, (2, 2, 8))), ("select", (2, 1)))
    other = (("unflatten", (2, (2, 2, 8))), ("select", (3, 1)))
    assert same_lens(by_slices, by_views, (None, None, 32))
    assert not same_lens(by_slices, other, (None, None, 32))
    assert origins(by_slices, 3) == ((0, 1, 2, 2), {2})


@settings(deadline=None, max_examples=30)
@given(
    parts=st.integers(1, 4), heads=st.integers(1, 3), dim=st.integers(1, 4),
    tokens=st.integers(1, 5), stacked=st.booleans(),
)  # fmt: skip
def test_joining_undoes_taking_apart(
    parts: int, heads: int, dim: int, tokens: int, stacked: bool
) -> None:
    if stacked:
        lenses: Any = tuple((("select", (1, i)),) for i in range(parts))
        sizes: Any = (None, parts, None, None, None)
        shape = (2, parts, heads, tokens, dim)
    else:
        width = heads * dim
        lenses = tuple(
            (("narrow", (2, i * width, width)), ("unflatten", (2, (heads, dim))))
            for i in range(parts)
        )
        sizes, shape = (None, None, parts * width), (2, tokens, parts * width)
    assert are_all_of_it(lenses, sizes)
    assert are_all_of_it(lenses[1:], sizes) == (parts == 0)
    join = Join(lenses, sizes, 3 if stacked else 1)
    whole = randn(*shape)
    assert torch.equal(join.joined(join.parts(whole)), whole)
    assert join.shape(join.parts(whole)) == shape
    for lens, part in zip(lenses, join.parts(whole), strict=True):
        assert torch.equal(view_through(lens, whole), part)
