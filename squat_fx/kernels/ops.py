"""The ops: schemas, fakes and dispatch. Needs only torch; ``reference`` says what each op means.

One overload per stored layout, or per pair of those of keys and values; flat tensors and ints. A
role's arenas come in the order of ``Format.arena_names``, its format as ``Format.to_ints()``;
``positions`` is int64 ``[rows, 2]``, a row ``(length, watermark)`` per handle, written by the
caller before each call and only read here. Where a reader sees a window only, ``first_row`` is the
row whose first number is the first token of it, and else -1.
Mutation is visible in the schema. ``append_`` takes the outputs of what must read the arenas first
as ``after``: it does not look at them, but a compiler that reorders functional graphs then keeps
the reads in front, and need not copy the arenas.

Formats are named after their layout: torch fails at exit if two overloads differ in nothing else.

| op | what it does |
|---|---|
| ``quantize`` | whole token groups to packed codes and parameters |
| ``store`` | a whole prompt to fresh arenas, just large enough; the codec learns from it |
| ``append_`` | new tokens into the ring; what leaves the ring is packed, in place |
| ``append_both_`` | the same for the keys and values of a layer at once |
| ``attend`` | attention over the packed past and exact new tokens |
| ``attend_error`` | how far attention over a prompt that is stored in part is from its output |
| ``judged_tokens`` | which tokens of a prompt its store is judged by |
| ``attend_errors`` | how far attention over a stored prompt is from exact, in alike layers |
| ``dequantize`` | the stored tokens as numbers |
| ``valid_tokens`` | which new tokens a mask lets any query see |

Where a layout keeps a part of a prompt, implementations see the layout beneath it
(:mod:`squat_fx.kernels.kept`).
CPU tensors run the reference; CUDA tensors run the Triton kernels, imported at the first call, and
the reference where one does not compile (:mod:`squat_fx.kernels.fallback`).
Under autocast ``attend`` takes its query in the dtype of autocast, as torch's attention does, and
nothing inside an op is cast.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from squat_fx.codecs import Fit, Role
from squat_fx.kernels import fallback, judge, kept, reference
from squat_fx.kernels.reference import Arenas, Extent
from squat_fx.layouts import LAYOUTS, PAIRS, Format, arena_names, stored_names
from squat_fx.layouts.kept import MOVED, beneath_fixed

logger = logging.getLogger(__name__)

LIBRARY = torch.library.Library("squat_fx", "DEF")  # kept alive: it owns the registrations


def _overload_name(*layouts: str) -> str:
    """``planes/token`` is the overload ``planes_token``; two layouts have both names."""
    return "_and_".join(dict.fromkeys(layout.replace("/", "_") for layout in layouts))


def overload(op: str, *layouts: str) -> torch._ops.OpOverload:
    """The overload of ``op`` for a layout, or for those of keys and values:
    ``overload("attend", "dense", "dense")`` is ``torch.ops.squat_fx.attend.dense``.
    """
    return getattr(getattr(torch.ops.squat_fx, op), _overload_name(*layouts))


def both(key: Any, value: Any) -> torch._ops.OpOverload | None:
    """The overload of ``append_both_`` for two of ``append_``, if there is one."""
    for pair in PAIRS:
        if (key, value) == tuple(overload("append_", layout) for layout in pair):
            return overload("append_both_", *pair)
    return None


@lru_cache(maxsize=1)
def _triton() -> ModuleType | None:
    """The launchers, or None with one warning where Triton cannot be imported."""
    try:
        from squat_fx.kernels import launch
    except ImportError as error:
        logger.warning(
            "Triton kernels are not available (%s): running the torch reference on the GPU", error
        )
        return None
    return launch


def _implementation(device: torch.device) -> ModuleType:
    """Who computes for tensors on ``device``."""
    if device.type != "cuda" or fallback.reference_only():
        return reference
    return _triton() or reference


def _learn(device: torch.device) -> Callable[..., Fit]:
    """What learns from a prompt on ``device``, as :func:`squat_fx.kernels.reference.learn`."""
    if _implementation(device) is reference:
        return reference.learn
    from squat_fx.kernels import fit

    return fit.learn


def _extent(implementation: ModuleType, positions: Tensor, row: int) -> Extent | tuple[Tensor, int]:
    """A row of positions: numbers for the reference, for kernels where to read them."""
    return Extent.at(positions, row) if implementation is reference else (positions, row)


def _first(implementation: ModuleType, positions: Tensor, row: int) -> int:
    """The first token of a window: a number for the reference, for kernels the row to read."""
    if implementation is not reference:
        return row
    return 0 if row < 0 else int(positions[row, 0])


def _declare(layout: str, prefix: str = "", mutable: bool = False, first: str = "a") -> str:
    """The arenas of a role as arguments of a schema."""
    names, fixed = arena_names(layout), LAYOUTS[layout].fixed
    written = [n for n in names if mutable and n not in fixed]
    alias = {n: f"({chr(ord(first) + i)}!)" for i, n in enumerate(written)}
    return ", ".join(f"Tensor{alias.get(n, '')} {prefix}{n}" for n in names)


def _declare_stored(layout: str, prefix: str) -> str:
    """What ``store`` makes of a role as arguments of a schema."""
    return ", ".join(f"Tensor {prefix}{name}" for name in stored_names(layout))


def _completed(tensors: Sequence[Tensor], given: Tensor | None, fmt: Format) -> tuple[Tensor, ...]:
    """All arenas of a role: those that ``store`` made and the one that all sequences share."""
    made = dict(zip(fmt.stored_names, tensors, strict=True))
    for name in fmt.stored_layout.shared:
        empty = fmt.stored_layout.empty_fixed(fmt, name, made["dense"])
        made[name] = empty if given is None else given
    return tuple(made[name] for name in fmt.arena_names)


def _stored(
    layout: str, codec: str, ints: list[int], tensors: Sequence[Tensor]
) -> tuple[Arenas, Format]:
    """The arenas of a role and their format as implementations take them."""
    fmt = Format.from_ints(layout, codec, ints)
    return kept.beneath(Arenas.of(fmt, tensors), fmt)


def _returns(n: int) -> str:
    return "(" + ", ".join(["Tensor"] * n) + ")" if n > 1 else "Tensor"


def nothing(*args: Any) -> None:
    """What tracing is told of an op that only writes."""


Op = tuple[str, str, Callable[..., Any], Callable[..., Any]]
"""Name and overload, schema, what runs, and what tracing is told."""


AUTOCAST = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda"}


def _without_autocast(name: str, device: str) -> Callable[..., Any]:
    """What runs where autocast is enabled on ``device``."""
    op, _, which = name.partition(".")
    keys = functools.reduce(
        operator.or_,
        (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in AUTOCAST),
    )

    def run(*args: Any) -> Any:
        first, *rest = args
        if op == "attend":
            first = first.to(torch.get_autocast_dtype(device))
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return getattr(getattr(torch.ops.squat_fx, op), which or "default")(first, *rest)

    return run


def _subject(schema: str) -> int | None:
    """The argument that says for which shape an op runs; None if it has no kernels."""
    names = [argument.split()[-1] for argument in schema.partition(") ->")[0].split(",")]
    return next(
        (names.index(n) for n in ("x", "query", "new", "new_key", "dense") if n in names), None
    )


def _register(ops: Sequence[Op]) -> None:
    for name, schema, run, fake in ops:
        LIBRARY.define(name + schema)
        subject = _subject(schema)
        if subject is not None:
            run = fallback.with_fallback(name, subject, run)
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"squat_fx::{name}", fake, lib=LIBRARY)
        for key, device in AUTOCAST.items():
            LIBRARY.impl(name, _without_autocast(name, device), key)


def _ops_of(layout: str) -> list[Op]:
    """The ops on one role."""
    name, stored = _overload_name(layout), LAYOUTS[layout]
    packed, fixed = stored.packed, stored.fixed
    names, made = arena_names(layout), stored_names(layout)
    count = len(names)

    def quantize(x: Tensor, valid: Tensor | None, *args: Any) -> Any:
        *learned, codec, format = args
        fmt = kept.beneath_format(Format.from_ints(layout, codec, format))
        arenas = beneath_fixed(dict(zip(fixed, learned, strict=True)))
        found = _implementation(x.device).quantize(x, valid, fmt, arenas)
        out = tuple(t.clone() if t is x else t for t in found)
        return out if len(packed) > 1 else out[0]

    def store(
        x: Tensor,
        valid: Tensor | None,
        query: Tensor | None,
        given: Tensor | None,
        role: Role,
        codec: str,
        format: list[int],
        keys: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        fmt = Format.from_ints(layout, codec, format)
        capacity = _room(x.shape[2], query, keys, fmt)
        whole = reference.empty_arenas(x, capacity, fmt, given)
        arenas, stored_as = kept.beneath(whole, fmt)
        fit = _learn(x.device)(arenas, x, valid, query, stored_as, role)
        prompt = kept.prompt_of(whole, x, valid, query, keys, fmt)
        extent = Extent(prompt.first, prompt.first)
        write = _implementation(x.device).write
        write(arenas, prompt.x, prompt.valid, extent, stored_as, fit.feedback)
        by_name = dict(zip(names, whole.tensors(fmt), strict=True))
        return tuple(by_name[n] for n in made)

    def append_(*args: Any) -> None:
        tensors, (new, valid, positions, row, codec, format) = args[:count], args[count : count + 6]
        arenas, fmt = _stored(layout, codec, format, tensors)
        implementation = _implementation(new.device)
        extent = _extent(implementation, positions, row)
        implementation.write(arenas, new, valid, extent, fmt)

    def dequantize(*args: Any) -> Tensor:
        tensors, (positions, row, first, length, format) = args[:count], args[count:]
        fmt = Format.from_ints(layout, "", format)
        kept.check_whole(Arenas.of(fmt, tensors), fmt)
        arenas, fmt = kept.beneath(Arenas.of(fmt, tensors), fmt)
        extent = Extent.at(positions, row)
        implementation = _implementation(tensors[0].device)
        dense = implementation.dense_past(arenas, extent, fmt, first=first)
        return dense[:, :, : length - first].contiguous()

    def fake_quantize(x: Tensor, valid: Tensor | None, *args: Any) -> Any:
        *_, codec, format = args
        out = _fake_packed(x, x.shape[2], Format.from_ints(layout, codec, format))
        return out if len(packed) > 1 else out[0]

    def fake_store(
        x: Tensor,
        valid: Tensor | None,
        query: Tensor | None,
        given: Tensor | None,
        role: Role,
        codec: str,
        format: list[int],
        keys: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        fmt = Format.from_ints(layout, codec, format)
        shapes = fmt.constant_shapes(*x.shape[:2])
        rest = (
            x.new_empty(shapes[n], dtype=fmt.arena_dtype(n, x.dtype)) for n in made[len(packed) :]
        )
        return (*_fake_packed(x, _room(x.shape[2], query, keys, fmt), fmt), *rest)

    def fake_dequantize(*args: Any) -> Tensor:
        dense, first, length = args[count - 2], *args[count + 2 : count + 4]
        return dense.new_empty((*dense.shape[:2], length - first, dense.shape[3]))

    learned = "".join(f"Tensor {n}, " for n in fixed)
    keys = f", Tensor? key_{MOVED}=None" if stored.keeps_part else ""
    return [
        (
            f"quantize.{name}",
            f"(Tensor x, Tensor? valid, {learned}str codec, int[] {name}_format) "
            f"-> {_returns(len(packed))}",
            quantize,
            fake_quantize,
        ),
        (
            f"store.{name}",
            "(Tensor x, Tensor? valid, Tensor? query, Tensor? given, str role, str codec, "
            f"int[] {name}_format{keys}) -> {_returns(len(made))}",
            store,
            fake_store,
        ),
        (
            f"append_.{name}",
            f"({_declare(layout, mutable=True)}, Tensor new, Tensor? valid, Tensor positions, "
            f"int row, str codec, int[] {name}_format, Tensor[]? after=None) -> ()",
            append_,
            nothing,
        ),
        (
            f"dequantize.{name}",
            f"({_declare(layout)}, Tensor positions, int row, SymInt first, SymInt length, "
            f"int[] {name}_format) -> Tensor",
            dequantize,
            fake_dequantize,
        ),
    ]


def _ops_of_pair(*layouts: str) -> list[Op]:
    """The ops on keys and values of such layouts."""
    name, (key_layout, value_layout) = _overload_name(*layouts), layouts
    keys = len(arena_names(key_layout))
    arenas = keys + len(arena_names(value_layout))
    made_keys = len(stored_names(key_layout))
    made = made_keys + len(stored_names(value_layout))

    def append_both_(*args: Any) -> None:
        new_key, new_value, valid, positions, key_row, value_row, codec, *formats = args[
            arenas : arenas + 9
        ]
        implementation = _implementation(new_key.device)
        writes = []
        for layout, tensors, new, row, ints in zip(
            layouts, (args[:keys], args[keys:arenas]), (new_key, new_value),
            (key_row, value_row), formats, strict=True,
        ):  # fmt: skip
            arenas_of, fmt = _stored(layout, codec, ints, tensors)
            writes.append((arenas_of, new, _extent(implementation, positions, row), fmt))
        implementation.write_both(*writes, valid)

    def attend(
        query: Tensor, new_key: Tensor | None, new_value: Tensor | None, *args: Any
    ) -> Tensor:
        (
            positions,
            key_row,
            value_row,
            first_row,
            mask,
            sinks,
            scale,
            causal,
            softcap,
            *formats,
        ) = args[arenas:]
        implementation = _implementation(query.device)
        if first_row < 0:  # a window has lost nothing
            key = Format.from_ints(key_layout, "", formats[0])
            mask, causal = kept.moved_mask(mask, causal, Arenas.of(key, args[:keys]), key, query)
        sides = []
        for layout, tensors, row, ints in zip(
            layouts, (args[:keys], args[keys:arenas]), (key_row, value_row), formats, strict=True
        ):
            arenas_of, fmt = _stored(layout, "", ints, tensors)
            sides.append((arenas_of, _extent(implementation, positions, row), fmt))
        return implementation.attend(
            query,
            new_key,
            new_value,
            *sides,
            first=_first(implementation, positions, first_row),
            mask=mask,
            sinks=sinks,
            scale=scale,
            causal=causal,
            softcap=softcap,
        ).contiguous()

    def attend_error(query: Tensor, output: Tensor, *args: Any) -> Tensor:
        given, mask, sinks, scale, causal, softcap, *formats = args[made:]
        implementation = _implementation(query.device)
        sides = []
        for layout, tensors, shared, ints in zip(
            layouts, (args[:made_keys], args[made_keys:made]), (given, None), formats, strict=True
        ):
            fmt = Format.from_ints(layout, "", ints)
            arenas = Arenas.of(fmt, _completed(tensors, shared, fmt))
            sides.append((arenas, Extent(0, 0).after(query.shape[2], fmt), fmt))
        if not any(extent.packed(0, fmt) for _, extent, fmt in sides):
            return query.new_zeros((), dtype=torch.float32)  # every token is exact
        positions = torch.tensor([(e.length, e.watermark) for _, e, _ in sides])
        positions = positions.to(query.device, non_blocking=True)
        tokens, newest = query.shape[2], slice(-reference.NEWEST_QUERIES, None)
        query = query[:, :, newest]
        mask = mask[:, :, newest] if mask is not None and mask.shape[2] > 1 else mask
        causal = reference.BOTTOM_RIGHT if causal else reference.NO_CAUSALITY
        arenas, _, fmt = sides[0]
        mask, causal = kept.moved_mask(mask, causal, arenas, fmt, query, tokens)
        stored = [kept.beneath(arenas, fmt) for arenas, _, fmt in sides]
        found = implementation.attend(
            query,
            None,
            None,
            *((a, _extent(implementation, positions, i), f) for i, (a, f) in enumerate(stored)),
            mask=mask,
            sinks=sinks,
            scale=scale,
            causal=causal,
            softcap=softcap,
        )
        return reference.relative_error(found, output[:, :, newest])

    def fake_attend_error(query: Tensor, *args: Any) -> Tensor:
        return query.new_empty((), dtype=torch.float32)

    def fake_attend(
        query: Tensor, new_key: Tensor | None, new_value: Tensor | None, *args: Any
    ) -> Tensor:
        value_dense = args[arenas - 2]
        return query.new_empty((*query.shape[:3], value_dense.shape[3]))

    key_name, value_name = map(_overload_name, layouts)
    formats = f"int[] key_{key_name}_format, int[] value_{value_name}_format"
    ops: list[Op] = [
        (
            f"append_both_.{name}",
            f"({_declare(key_layout, 'key_', mutable=True)}, "
            f"{_declare(value_layout, 'value_', mutable=True, first='n')}, Tensor new_key, "
            "Tensor new_value, Tensor? valid, Tensor positions, int key_row, int value_row, "
            f"str codec, {formats}, Tensor[]? after=None) -> ()",
            append_both_,
            nothing,
        ),
        (
            f"attend.{name}",
            "(Tensor query, Tensor? new_key, Tensor? new_value, "
            f"{_declare(key_layout, 'key_')}, {_declare(value_layout, 'value_')}, "
            "Tensor positions, int key_row, int value_row, int first_row, Tensor? mask, "
            "Tensor? sinks, "
            f"float scale, int causal, float softcap, {formats}) -> Tensor",
            attend,
            fake_attend,
        ),
    ]
    if LAYOUTS[key_layout].keeps_part:
        ops.append(
            (
                f"attend_error.{name}",
                "(Tensor query, Tensor output, "
                f"{_declare_stored(key_layout, 'key_')}, "
                f"{_declare_stored(value_layout, 'value_')}, "
                "Tensor? key_given, Tensor? mask, Tensor? sinks, float scale, "
                f"int causal, float softcap, {formats}) -> Tensor",
                attend_error,
                fake_attend_error,
            )
        )
    return ops


def _room(tokens: int, query: Tensor | None, keys: Tensor | None, fmt: Format) -> int:
    """For how many packed tokens of a prompt there must be room, in whole groups; free of branches,
    since ``tokens`` may be symbolic.
    """
    tokens = kept.most_packed(tokens, query, keys, fmt)
    return (tokens + fmt.token_group - 1) // fmt.token_group * fmt.token_group


def _fake_packed(x: Tensor, capacity: int, fmt: Format) -> tuple[Tensor, ...]:
    batch, heads = x.shape[:2]
    return tuple(
        x.new_empty(
            (batch, heads, capacity // fmt.tokens_per_slot(n), fmt.last_dim(n)),
            dtype=fmt.arena_dtype(n, x.dtype),
        )
        for n in fmt.packed_names
    )


def _valid_tokens(mask: Tensor, new: Tensor) -> Tensor:
    return reference.valid_tokens(mask, new.shape[2]).expand(new.shape[0], -1).clone()


def _fake_valid_tokens(mask: Tensor, new: Tensor) -> Tensor:
    return mask.new_empty((new.shape[0], new.shape[2]), dtype=torch.bool)


def _judged_tokens(
    stored: Tensor, valid: Tensor | None, layouts: list[str], *formats: list[int]
) -> tuple[Tensor, ...]:
    key, value = _formats(layouts, formats)
    return judge.judged_tokens(stored, valid, key, value)


def _fake_judged_tokens(
    stored: Tensor, valid: Tensor | None, layouts: list[str], *formats: list[int]
) -> tuple[Tensor, ...]:
    plan = judge.Plan.of(*_formats(layouts, formats))
    keys = plan.sampled + plan.sinks + plan.newest
    row, queries, positions = (
        stored.new_empty((1, count), dtype=torch.int64) for count in (1, judge.QUERIES, keys)
    )
    return row, queries, positions, stored.new_empty((1, keys), dtype=torch.bool)


def _attend_errors(
    queries: list[Tensor],
    keys: list[Tensor],
    values: list[Tensor],
    arenas: list[Tensor],
    given: Tensor | None,
    sinks: list[Tensor],
    mask: Tensor | None,
    judged: list[Tensor],
    *args: Any,
) -> Tensor:
    tokens, padded, scale, causal, softcap, layouts, *formats, due = args
    if due is not None and not due.item():
        return queries[0].new_zeros((len(queries),), dtype=torch.float32)
    row, query_at, key_at, there = judged
    key, value = _formats(layouts, formats)
    sides, per_layer = [], len(arenas) // len(queries)
    first = 0
    for fmt, exact, shared in ((key, keys, given), (value, values, None)):
        count = len(fmt.stored_names)
        stored = (arenas[at : at + count] for at in range(first, len(arenas), per_layer))
        made = [Arenas.of(fmt, _completed(tensors, shared, fmt)) for tensors in stored]
        sides.append(judge.Side(fmt, exact, made))
        first += count
    key_side, value_side = sides
    return judge.attend_errors(
        queries, key_side, value_side, (row, query_at, key_at, there), tokens, padded=padded,
        mask=mask, sinks=sinks, scale=scale, causal=bool(causal), softcap=softcap,
    )  # fmt: skip


def _fake_attend_errors(queries: list[Tensor], *args: Any) -> Tensor:
    return queries[0].new_empty((len(queries),), dtype=torch.float32)


def _formats(layouts: list[str], formats: Sequence[list[int]]) -> tuple[Format, Format]:
    """Those of keys and values; which codecs they are of does not matter."""
    key, value = (Format.from_ints(*each) for each in zip(layouts, ("", ""), formats, strict=True))
    return key, value


_register(
    [
        *(op for layout in LAYOUTS for op in _ops_of(layout)),
        *(op for pair in PAIRS for op in _ops_of_pair(*pair)),
        ("valid_tokens", "(Tensor mask, Tensor new) -> Tensor", _valid_tokens, _fake_valid_tokens),
        (
            "judged_tokens",
            "(Tensor stored, Tensor? valid, str[] layouts, int[] key_format, int[] value_format) "
            f"-> {_returns(4)}",
            _judged_tokens,
            _fake_judged_tokens,
        ),
        (
            "attend_errors",
            "(Tensor[] queries, Tensor[] keys, Tensor[] values, Tensor[] arenas, Tensor? given, "
            "Tensor[] sinks, Tensor? mask, Tensor[] judged, SymInt tokens, bool padded, "
            "float scale, int causal, float softcap, str[] layouts, int[] key_format, "
            "int[] value_format, Tensor? due) -> Tensor",
            _attend_errors,
            _fake_attend_errors,
        ),
    ]
)
