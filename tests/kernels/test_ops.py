"""The ops as torch sees them: honest schemas, and fakes that agree with what runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import squat_fx.layouts
from squat_fx.codecs import (
    Codec,
    Format,
    Kivi,
    Kvarn,
    Lossless,
    Polar,
    PolarRope,
    Pruned,
    Qjl,
    Role,
    Squat,
    Svdq,
    Think,
    TurboQuant,
)
from squat_fx.kernels import judge, ops, reference
from squat_fx.kernels.reference import Arenas, Extent
from tests.choose import every, full
from tests.conftest import left_padding, randn, stored_format

BATCH, HEADS, TOKENS = 2, 2, 80
CODECS: dict[str, Codec] = {
    "planes/token": Squat(),
    "planes/channel": Kivi(),
    "planes/dual": Kvarn(32),
    "planes/pruned": Think(),
    "polar/token": Polar("online"),
    "polar/pairs": PolarRope(32),
    "levels/token": TurboQuant(),
    "signs/token": Qjl(sketch_dim=64, outliers=3, outlier_sketch_dim=32),
    "latent/rope": Svdq(),
    "latent/sparse": Svdq(budget=1024, outlier_chunks=2),
    "dense": Lossless(),
    "kept/planes/token": Pruned(16),
}
LAYOUTS = tuple(CODECS)
"""Of keys, and with the layout of values that goes with each."""
CODECS |= {
    f"kept/{name}": Pruned(32, codec)
    for name, codec in CODECS.items()
    if f"kept/{name}" in squat_fx.layouts.LAYOUTS and f"kept/{name}" not in CODECS
}


@dataclass(frozen=True)
class Stored:
    """A filled role, as ops take it."""

    fmt: Format
    tensors: tuple[Tensor, ...]
    length: int

    @property
    def extent(self) -> Extent:
        return Extent(0, 0).after(self.length, self.fmt)

    @property
    def codec(self) -> str:
        return self.fmt.codec

    def numbers(self) -> Tensor:
        return reference.dense_past(Arenas.of(self.fmt, self.tensors), self.extent, self.fmt)


def format_of(layout: str, role: Role, head_dim: int = 40, bits: int = 2) -> Format:
    codec = CODECS[layout]
    rounding = codec.codec if isinstance(codec, Pruned) else codec
    bits_on_average = 3.875 if isinstance(rounding, Polar) else bits
    return stored_format(codec, role, head_dim, bits_on_average, residual_length=8, sink_length=2)


def stored(
    fmt: Format,
    tokens: int = TOKENS,
    seed: int = 0,
    pads: list[int] | None = None,
    learn: bool = False,
) -> Stored:
    """Random tokens behind the op ``store``, with room for 64 more."""
    pads = pads or [0, 3]
    x = randn(len(pads), HEADS, tokens, fmt.head_dim, seed=seed)
    arenas = reference.empty_arenas(x, 256, fmt)
    valid = left_padding(pads, tokens)
    if learn:
        reference.learn(arenas, x, valid, None, fmt, "key")
    reference.write(arenas, x, valid, Extent(0, 0), fmt)
    return Stored(fmt, arenas.tensors(fmt), tokens)


def with_basis(fmt: Format, made: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What ``store`` returned as ops take it: with no basis but the fixed rotation."""
    by_name = dict(zip(fmt.stored_names, made, strict=True))
    for name in fmt.stored_layout.shared:
        by_name[name] = fmt.stored_layout.empty_fixed(fmt, name, by_name["dense"])
    return tuple(by_name[name] for name in fmt.arena_names)


def store(fmt: Format, x: Tensor, role: Role) -> tuple[Tensor, ...]:
    """What the op ``store`` makes of a prompt."""
    return ops.overload("store", fmt.layout)(x, None, None, None, role, fmt.codec, fmt.to_ints())


def learned_of(fmt: Format, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The fixed arenas among ``tensors``, as the op ``quantize`` takes them."""
    return tuple(Arenas.of(fmt, tensors).fixed.values())


def pair_overload(op: str, layout: str) -> torch._ops.OpOverload:
    """The overload for keys in ``layout`` and the values that go with them."""
    return ops.overload(op, *(format_of(layout, role).layout for role in ("key", "value")))


def positions(*rows: Stored) -> Tensor:
    return torch.tensor([[s.extent.length, s.extent.watermark] for s in rows])


@dataclass(frozen=True)
class Call:
    """An overload with arguments for it."""

    name: str
    args: tuple[Any, ...]

    @property
    def op(self) -> Callable[..., Any]:
        name, _, overload = self.name.partition(".")
        return getattr(getattr(torch.ops.squat_fx, name), overload or "default")


def calls(layout: str) -> list[Call]:
    """Every overload of a layout, with and without what is optional."""
    name = layout.replace("/", "_")
    key, value = (stored(format_of(layout, role)) for role in ("key", "value"))
    fmt, pair = key.fmt, pair_overload("attend", layout)._schema.overload_name
    x = randn(BATCH, HEADS, 64, fmt.head_dim, seed=1)
    new = randn(BATCH, HEADS, 40, fmt.head_dim, seed=2)
    valid = left_padding([0, 5], 64)
    where = positions(key), 0
    ints = fmt.to_ints()
    learned = learned_of(fmt, key.tensors)
    queries = randn(BATCH, 2 * HEADS, 64, fmt.head_dim, seed=7)
    permuted = (x.transpose(1, 2).contiguous().transpose(1, 2),)
    numbers = [
        Call(f"quantize.{name}", (x, None, *learned, fmt.codec, ints)),
        Call(f"quantize.{name}", (x, valid, *learned, fmt.codec, ints)),
        Call(f"store.{name}", (x[:, :, :50], None, None, None, "key", fmt.codec, ints)),
        Call(
            f"store.{name}",
            (*permuted, valid, queries, None, "key", fmt.codec, ints),
        ),
        Call(f"append_.{name}", (*key.tensors, new[:, :, :1], None, *where, fmt.codec, ints)),
        Call(f"append_.{name}", (*key.tensors, new, valid[:, :40], *where, fmt.codec, ints, [x])),
        Call(f"dequantize.{name}", (*key.tensors, *where, 0, TOKENS, ints)),
        Call(f"dequantize.{name}", (*key.tensors, *where, 2, 7, ints)),
    ]
    if fmt.stored_layout.keeps_part:
        values = value.fmt.layout, value.fmt.codec, value.fmt.to_ints()
        made = ops.overload("store", layout)(x, valid, queries, None, "key", fmt.codec, ints)
        moved = made[fmt.stored_names.index("moved")]
        store_values = f"store.{values[0].replace('/', '_')}"
        numbers.append(Call(store_values, (x, valid, None, None, "value", *values[1:], moved)))
    tail = (key.fmt.to_ints(), value.fmt.to_ints())
    query = randn(BATCH, 2 * HEADS, 3, 40, seed=3)
    new_key, new_value = (randn(BATCH, HEADS, 3, 40, seed=s) for s in (4, 5))
    mask = left_padding([0, 3], TOKENS + 3)[:, None, None, :]
    sinks = randn(2 * HEADS, seed=6)
    both = (*key.tensors, *value.tensors)
    sides = (*both, positions(key, value), 0, 1)
    for tokens, after in ((1, None), (3, [x])):
        news = (new[:, :, :tokens], new[:, :, -tokens:], None, *sides[len(both) :], fmt.codec)
        numbers.append(Call(f"append_both_.{pair}", (*both, *news, *tail, after)))
    news, options = (query, new_key, new_value), (mask, None, 0.2, 2, 0.0)
    attention = [
        Call(f"attend.{pair}", (*news, *sides, -1, *options, *tail)),
        Call(f"attend.{pair}", (query, None, None, *sides, -1, None, sinks, 0.2, 0, 30.0, *tail)),
    ]
    if not key.fmt.stored_layout.keeps_part:
        return numbers + attention
    made = tuple(
        tensor for role in ("key", "value") for tensor in store(format_of(layout, role), x, role)
    )
    prompts, outputs = randn(2, BATCH, 2 * HEADS, 64, fmt.head_dim, seed=8)
    causal = left_padding([0, 3], 64)[:, None, None].expand(-1, -1, 64, -1).tril()
    errors = [
        Call(
            f"attend_error.{pair}",
            (prompts, outputs, *made, None, mask, sinks, 0.2, causality, 0.0, *tail),
        )
        for mask, sinks, causality in ((None, sinks, 1), (causal, None, 0))
    ]
    return numbers + attention + errors


VALID_TOKENS = Call(
    "valid_tokens", (left_padding([0, 3], 9)[:, None, None, :], randn(BATCH, HEADS, 4, 16))
)


def judging() -> list[Call]:
    """Two layers that are alike, and one with padding, after a prompt of 90 tokens."""
    formats = [format_of("planes/token", role) for role in ("key", "value")]
    query, key, value = (randn(BATCH, n * HEADS, 90, 40, seed=n) for n in (2, 1, 1))
    numbers = [fmt.layout for fmt in formats], *(fmt.to_ints() for fmt in formats)
    out = []
    for valid, sinks, layers in ((None, [randn(2 * HEADS)], 2), (left_padding([0, 3], 90), [], 1)):
        arenas = [
            t
            for fmt, x, role in zip(formats, (key, value), ("key", "value"), strict=True)
            for t in ops.overload("store", fmt.layout)(
                x, valid, None, None, role, fmt.codec, fmt.to_ints()
            )
        ]
        chosen = torch.ops.squat_fx.judged_tokens(key, valid, *numbers)
        row, queries, keys, _ = chosen
        sample = keys[:, : judge.Plan.of(*formats).sampled]
        kept = query[row, :, queries], key[row, :, keys], value[row, :, sample]
        mask = None
        if valid is not None:
            seen = valid[:, None, None].expand(-1, -1, 90, -1).tril()
            mask = seen[row[..., None], :, queries[:, :, None], keys[:, None]]
        out += [
            Call("judged_tokens", (key, valid, *numbers)),
            Call(
                "attend_errors",
                (
                    *([x] * layers for x in kept),
                    arenas * layers,
                    None,
                    sinks * layers,
                    mask,
                    list(chosen),
                    90,
                    valid is not None,
                    0.2,
                    int(valid is None),
                    0.0,
                    *numbers,
                    None,
                ),
            ),
        ]
    return out


CALLS = [VALID_TOKENS, *judging(), *(call for layout in LAYOUTS for call in calls(layout))]
OTHER_CALLS = [call for layout in CODECS if layout not in LAYOUTS for call in calls(layout)]
"""Of layouts that only say what others say already."""
IDS = [f"{call.name}-{i}" for i, call in enumerate(CALLS + OTHER_CALLS)]


def test_every_overload_is_called_here() -> None:
    registered = {
        name.removeprefix("squat_fx::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("squat_fx::")
    }
    assert registered == {call.name for call in CALLS + OTHER_CALLS}


@pytest.mark.parametrize("call", CALLS + full(*OTHER_CALLS), ids=IDS)
def test_opcheck(call: Call) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(call.op, call.args, test_utils=checks)


@pytest.mark.parametrize("call", every(5, CALLS) + full(*OTHER_CALLS), ids=IDS)
def test_opcheck_of_what_is_traced_with_symbolic_sizes(call: Call) -> None:
    torch.library.opcheck(call.op, call.args, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("call", CALLS + full(*OTHER_CALLS), ids=IDS)
def test_only_what_the_schema_marks_is_written(call: Call) -> None:
    before = [a.clone() if isinstance(a, Tensor) else a for a in call.args]
    args = [a.clone() if isinstance(a, Tensor) else a for a in call.args]
    call.op(*args)
    for argument, a, b in zip(call.op._schema.arguments, args, before, strict=False):
        if isinstance(a, Tensor) and not (argument.alias_info and argument.alias_info.is_write):
            assert torch.equal(a, b), f"{argument.name} was written"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_append_marks_every_arena_it_may_write(layout: str) -> None:
    schema = ops.overload("append_", layout)._schema
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    key, value = (
        [n for n in fmt.arena_names if n not in fmt.stored_layout.fixed]
        for fmt in (format_of(layout, "key"), format_of(layout, "value"))
    )
    assert written == key
    assert not schema.returns
    schema = pair_overload("append_both_", layout)._schema
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert written == [f"key_{name}" for name in key] + [f"value_{name}" for name in value]
    assert not schema.returns


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_append_both_is_an_append_of_each(layout: str, tokens: int) -> None:
    formats = [format_of(layout, role) for role in ("key", "value")]
    each, both = ([stored(fmt, seed=i) for i, fmt in enumerate(formats)] for _ in range(2))
    new = [randn(BATCH, HEADS, tokens, 40, seed=s) for s in (1, 2)]
    valid, where = left_padding([0, 0], tokens), positions(*each)
    appends = [ops.overload("append_", fmt.layout) for fmt in formats]
    for row, (append, side, x) in enumerate(zip(appends, each, new, strict=True)):
        append(*side.tensors, x, valid, where, row, side.fmt.codec, side.fmt.to_ints())
    arenas = (*both[0].tensors, *both[1].tensors)
    codec, ints = formats[0].codec, [fmt.to_ints() for fmt in formats]
    both_of = ops.both(*appends)
    assert both_of is not None
    both_of(*arenas, *new, valid, where, 0, 1, codec, *ints)
    for one, other in zip(each, both, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))


def laid_out(result: Any) -> list[tuple[tuple[int, ...], torch.dtype, tuple[int, ...]]]:
    tensors = (result,) if isinstance(result, Tensor) else result or ()
    return [(tuple(t.shape), t.dtype, t.stride()) for t in tensors]


@given(
    layout=st.sampled_from(LAYOUTS),
    head_dim=st.sampled_from([16, 20, 64, 80, 128, 256]),
    bits=st.sampled_from([1, 2, 3, 4]),
    tokens=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_a_fake_has_the_shapes_and_dtypes_of_what_runs(
    layout: str, head_dim: int, bits: int, tokens: int, dtype: torch.dtype
) -> None:
    roles: tuple[Role, ...] = ("key", "value")
    formats = {role: format_of(layout, role, head_dim, bits) for role in roles}
    x = randn(1, 2, tokens, head_dim, dtype=dtype)

    def store_and_read(x: Tensor) -> list[Any]:
        results, sides, where = [], [], torch.tensor([[tokens, max(0, tokens - 8)]])
        for role, fmt in formats.items():
            codec, ints = fmt.codec, fmt.to_ints()
            made = ops.overload("store", fmt.layout)(x, None, x, None, role, codec, ints)
            arenas = with_basis(fmt, made)
            read = ops.overload("dequantize", fmt.layout)(*arenas, where, 0, 0, tokens, ints)
            whole, learned = x.repeat(1, 1, fmt.token_group, 1), learned_of(fmt, arenas)
            packed = ops.overload("quantize", fmt.layout)(whole, None, *learned, codec, ints)
            results += [made, read, packed]
            sides += arenas
        query, ints = x[:, :, :1].repeat(1, 2, 1, 1), (fmt.to_ints() for fmt in formats.values())
        attend = pair_overload("attend", layout)
        out = attend(query, None, None, *sides, where, 0, 0, -1, None, None, 0.1, 0, 0.0, *ints)
        return [*results, out]

    real = [laid_out(result) for result in store_and_read(x)]
    with FakeTensorMode() as mode:
        fake = [laid_out(result) for result in store_and_read(mode.from_tensor(x))]
    assert fake == real


# what the ops mean ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_store_is_just_large_enough(layout: str) -> None:
    fmt = format_of(layout, "key")
    x = randn(BATCH, HEADS, 50, 40)
    made = ops.overload("store", layout)(x, None, None, None, "key", fmt.codec, fmt.to_ints())
    assert made[0].shape[2] == -(-50 // fmt.token_group) * fmt.token_group
    assert torch.equal(
        Stored(fmt, with_basis(fmt, made), 50).numbers(),
        stored(fmt, 50, pads=[0, 0], learn=True).numbers(),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_op_reads_its_own_row_of_positions(layout: str) -> None:
    side = stored(format_of(layout, "key"))
    wrong = torch.tensor([[3, 0]])
    where = torch.cat([wrong, positions(side), wrong])
    dequantize, ints = ops.overload("dequantize", layout), side.fmt.to_ints()
    assert torch.equal(dequantize(*side.tensors, where, 1, 0, TOKENS, ints), side.numbers())
    out = dequantize(*side.tensors, where, 1, 7, TOKENS, ints)
    assert torch.equal(out, side.numbers()[:, :, 7:])

    new = randn(BATCH, HEADS, 1, 40, seed=9)
    append = ops.overload("append_", layout)
    append(*side.tensors, new, None, where, 1, side.codec, side.fmt.to_ints())
    longer = Stored(side.fmt, side.tensors, TOKENS + 1)
    assert torch.equal(longer.numbers()[:, :, -1:], new)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_append_does_not_look_at_what_it_comes_after(layout: str) -> None:
    fmt, new = format_of(layout, "key"), randn(BATCH, HEADS, 3, 40, seed=9)
    one, other = stored(fmt), stored(fmt)
    append = ops.overload("append_", layout)
    append(*one.tensors, new, None, positions(one), 0, fmt.codec, fmt.to_ints())
    nan = [torch.full((1,), torch.nan)]
    append(*other.tensors, new, None, positions(one), 0, fmt.codec, fmt.to_ints(), nan)
    assert all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attend_reads_a_row_of_positions_for_each_side(layout: str) -> None:
    """The two sides have different residuals, so that a swapped row would show."""
    key, value = (
        stored(format_of(layout, role), seed=i) for i, role in enumerate(("key", "value"))
    )
    query = randn(BATCH, HEADS, 1, 40, seed=3)
    where = torch.cat([positions(value), torch.tensor([[5, 0]]), positions(key)])
    out = pair_overload("attend", layout)(
        query, None, None, *key.tensors, *value.tensors, where, 2, 0, -1, None, None, 0.2, 0, 0.0,
        key.fmt.to_ints(), value.fmt.to_ints(),
    )  # fmt: skip
    seen = left_padding([0, 3], TOKENS)[:, None, None, :]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.numbers(), value.numbers(), attn_mask=seen, scale=0.2
    )
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attend_reads_where_a_window_begins_from_a_row_of_positions(layout: str) -> None:
    key, value = (
        stored(format_of(layout, role), seed=i) for i, role in enumerate(("key", "value"))
    )
    query, first = randn(BATCH, HEADS, 1, 40, seed=3), TOKENS // 2
    where = torch.cat([positions(key), torch.tensor([[first, 0]]), positions(value)])
    mask = (torch.arange(TOKENS - first) % 3 > 0)[None]
    out = pair_overload("attend", layout)(
        query, None, None, *key.tensors, *value.tensors, where, 0, 2, 1, mask, None, 0.2, 0, 0.0,
        key.fmt.to_ints(), value.fmt.to_ints(),
    )  # fmt: skip
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, *(x.numbers()[:, :, first:] for x in (key, value)), attn_mask=mask, scale=0.2
    )
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantize_returns_fresh_memory(layout: str) -> None:
    fmt = format_of(layout, "key")
    x = randn(1, 1, 32, 40)
    learned = reference.empty_arenas(x, 0, fmt).fixed.values()
    packed = ops.overload("quantize", layout)(x, None, *learned, fmt.codec, fmt.to_ints())
    for tensor in (packed,) if isinstance(packed, Tensor) else packed:
        tensor.zero_()
    assert torch.equal(x, randn(1, 1, 32, 40))


def test_valid_tokens_expands_a_broadcast_mask() -> None:
    mask = torch.tensor([True, True, False, True]).reshape(1, 1, 1, 4)
    out = torch.ops.squat_fx.valid_tokens(mask, randn(3, 1, 2, 16))
    assert out.tolist() == [[False, True]] * 3
    out.fill_(True)
    assert mask.tolist() == [[[[True, True, False, True]]]]


@pytest.mark.parametrize("layout", ["dense", "planes/token", "planes/channel"])
def test_nothing_inside_an_op_is_cast_under_autocast(layout: str) -> None:
    """Except for the query of an attention, as in torch's own."""
    codec = {"dense": Lossless(), "planes/token": Squat(), "planes/channel": Kivi()}[layout]
    fmt = stored_format(codec, head_dim=32)
    x, query = randn(2, 2, 80, 32), randn(2, 4, 1, 32, seed=2)

    def run() -> tuple[list[torch.Tensor], torch.Tensor]:
        store, attend = ops.overload("store", layout), ops.overload("attend", layout, layout)
        arenas = list(store(x, None, None, None, "value", fmt.codec, fmt.to_ints()))
        made = dict(zip(fmt.stored_names, arenas, strict=True))
        for name in fmt.stored_layout.shared:
            made[name] = fmt.stored_layout.empty_fixed(fmt, name, x)
        both = [made[name] for name in fmt.arena_names] * 2
        positions = torch.tensor([[80, 72], [80, 72]])
        tail = (None, None, 0.2, reference.NO_CAUSALITY, 0.0, fmt.to_ints(), fmt.to_ints())
        return arenas, attend(query, None, None, *both, positions, 0, 1, -1, *tail)

    expected_arenas, expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        arenas, actual = run()
        seen = torch.ops.squat_fx.valid_tokens(torch.ones(2, 1, 1, 80, dtype=torch.bool), x)
    assert all(map(torch.equal, arenas, expected_arenas))
    assert actual.dtype == torch.bfloat16
    assert bool(seen.all())
    torch.testing.assert_close(actual.float(), expected, rtol=0.02, atol=0.02)
