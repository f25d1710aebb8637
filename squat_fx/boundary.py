"""The edge of a compiled callable: handles become plain tensors, and plain tensors become handles.

Before the inner callable runs, every carrier is made writable and large enough and the positions
are written. The ops inside write only where no reader of the old positions looks, so that nothing
has happened until the call returned; then the new extents are committed. A run that raises, or is
interrupted between layers, leaves every handle as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from squat_fx.head_start import Begun, HeadStart, Step
from squat_fx.joined import join_parts, parts_of
from squat_fx.lenses import Join
from squat_fx.packed import PackedTensor
from squat_fx.passes.records import (
    Beside,
    CacheEdge,
    InnerInput,
    InnerOutput,
    JoinedOutput,
    Rewriting,
)
from squat_fx.passes.spelling import size_of
from squat_fx.pool import POOL
from squat_fx.replay import Moving, Replayed, Whereabouts, is_number
from squat_fx.report import Report
from squat_fx.state import QuantizedKV
from squat_fx.storage import TOKENS, Storage, changes
from squat_fx.token_major import handle_type

NOTHING: Mapping[int, Tensor] = {}
Arguments = tuple[Any, ...] | Mapping[int, Any]  # of a call, all or some of them


class Size:
    """A size in terms of a call's arguments: a number, or an expression over their shapes."""

    def __init__(self, size: Any, examples: Sequence[Any]) -> None:
        expression: Any = sympy.sympify(size)
        self._number = int(expression) if expression.is_number else None
        self._terms: list[tuple[Any, int, int | None]] = []
        self._expression = expression
        if self._number is None:
            for symbol in sorted(expression.free_symbols, key=str):
                self._terms.append((symbol, *_find_symbol(symbol, examples)))
            if expression.is_symbol:
                self._expression = None

    @property
    def number(self) -> int | None:
        """None if it depends on the call."""
        return self._number

    def __call__(self, args: Arguments) -> int:
        if self._number is not None:
            return self._number
        values = [args[i] if dim is None else args[i].shape[dim] for _, i, dim in self._terms]
        if self._expression is None:
            return int(values[0])
        return int(self._expression.subs(zip((s for s, _, _ in self._terms), values, strict=True)))


def _find_symbol(symbol: sympy.Symbol, examples: Sequence[Any]) -> tuple[int, int | None]:
    """Which argument, or which dim of it, carries ``symbol``."""
    for index, example in enumerate(examples):
        if isinstance(example, torch.SymInt) and size_of(example) == symbol:
            return index, None
        if isinstance(example, Tensor):
            for dim, size in enumerate(example.shape):
                if isinstance(size, torch.SymInt) and size_of(size) == symbol:
                    return index, dim
    raise AssertionError(f"size symbol {symbol} is not bound to an input")


@dataclass(frozen=True)
class Carrier:
    """One handle argument: its index, and the edge that appends ``new_tokens`` to it (None: it is
    only read); if it is a window, how many tokens are kept.
    """

    index: int
    edge: CacheEdge | None
    new_tokens: Size | None
    kept: Size | None = None


@dataclass(frozen=True)
class Row:
    """A row of positions among those of the carriers: :class:`squat_fx.passes.records.Number` in
    terms of a call's arguments.
    """

    place: int
    size: Size
    carriers: tuple[int, ...]


class Boundary:
    """Calls the inner graph with plain tensors; called by whoever called the original graph.

    ``watch`` takes the inner graph's last output, before anything is committed; it may raise.

    ``moving`` says that the inner graph is to be replayed as a CUDA graph, and which of its inputs
    may be elsewhere at every call.
    """

    def __init__(
        self,
        inner: Callable[..., Any],
        inputs: Sequence[InnerInput],
        outputs: Sequence[InnerOutput],
        handles: Sequence[int],
        examples: Sequence[Any],
        report: Report,
        moving: Moving | None = None,
        numbers: Sequence[tuple[int, Any, tuple[int, ...]]] = (),
        watch: Callable[[Tensor], None] | None = None,
        head_start: HeadStart | None = None,
        beside: Beside | None = None,
    ) -> None:
        self._inner = inner
        self._watch = watch
        self._moving = moving
        if moving is not None:
            self._replayed = Replayed(report)
            self._whereabouts = Whereabouts(moving.others)
        self._inputs = tuple(inputs)
        self._fed = _by_carrier(inputs)
        self._outputs = tuple(outputs)
        self._report = report
        appended = {o.argument: o for o in outputs if o.kind == "appended"}
        self._carriers = tuple(
            Carrier(
                i,
                o.edge,
                Size(o.tokens, examples),
                None if o.kept is None else Size(o.kept, examples),
            )
            if (o := appended.get(i))
            else Carrier(i, None, None)
            for i in handles
        )
        self._sizes = {
            i: Size(o.tokens, examples)
            for i, o in enumerate(outputs)
            if o.kind in ("stored", "number")
        }
        self._stores = any(o.kind == "stored" for o in outputs)
        self._rows = tuple(
            Row(place, Size(size, examples), carriers) for place, size, carriers in numbers
        )
        self._windows = {i for row in self._rows for i in row.carriers}
        self._windows |= {c.index for c in self._carriers if c.kept is not None}
        packed = {fed.index for fed in inputs if fed.kind == "arena"}
        self._read = tuple(c.index for c in self._carriers if c.edge is None and c.index in packed)
        grow_alike = all(c.new_tokens is None or c.new_tokens.number for c in self._carriers)
        self._head_start = None if self._rows or beside or not grow_alike else head_start
        self._beside = beside

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        args = self._packed_arguments(args)
        staged = self._stage(args)
        dense = self._copied_rings(staged)
        if self._stores:
            POOL.make_room(next((x.device for x in args if not is_number(x)), None))
        beside = self._run_beside(args, staged)
        if self._moving is None or dense:
            results = list(self._inner(*self._gather(args, staged, dense, beside)))
            return self._finish(args, self._watched(results), staged, dense)
        copied = {i: args[index] for i, index in self._moving.arguments.items()}
        for i in self._moving.positions:
            copied[i] = self._positions(args, staged)
        copied |= self._with_room(beside, staged)
        with torch.cuda.device(self._device(args)):
            key = self._replayed.key(self._key(args, copied, staged))
            results = self._replay(key, args, staged, copied)
        out = self._finish(args, self._watched(results), staged, dense)
        if self._head_start is not None:
            self._head_start.note(self._next_step(self._moving, key, args, staged))
        return out

    def _run_beside(
        self, args: tuple[Any, ...], staged: dict[int, tuple[Storage, int]]
    ) -> Sequence[Tensor]:
        """What the graph beside the inner one gives."""
        if self._beside is None:
            return ()
        given = [
            args[fed.index]
            if fed.kind == "argument"
            else self._positions(args, staged).to(self._device(args), non_blocking=True)
            for fed in self._beside.inputs
        ]
        with torch.no_grad():
            return self._beside.module(*given)

    def _with_room(
        self, beside: Sequence[Tensor], staged: dict[int, tuple[Storage, int]]
    ) -> dict[int, Tensor]:
        """The same by the number of the input, wide enough for all tokens for which arenas have
        room: a recording serves until they grow.
        """
        if self._beside is None:
            return {}
        room = max(storage.capacity + new_tokens for storage, new_tokens in staged.values())
        grow = self._beside.grow
        return {
            i: F.pad(x, (0, max(0, room - x.shape[-1]))) if grow[fed.index] else x
            for i, fed in enumerate(self._inputs)
            if fed.kind == "beside"
            for x in (beside[fed.index],)
        }

    def _watched(self, results: list[Any]) -> list[Any]:
        """``results`` without what is watched, which was looked at."""
        if self._watch is not None:
            self._watch(results.pop())
        return results

    def _replay(
        self,
        key: Hashable,
        args: tuple[Any, ...],
        staged: dict[int, tuple[Storage, int]],
        copied: Mapping[int, Tensor],
    ) -> list[Any]:
        """The results of a CUDA graph that was recorded where storages and weights are now."""
        begun = None if self._head_start is None else self._head_start.take(self, key, copied)
        if begun is not None:
            self._replayed.count(key, begun=True)
            return begun
        return self._replayed(
            key, copied, lambda found: self._inner(*self._gather(args, staged, {}, (), found))
        )

    def _key(
        self,
        args: tuple[Any, ...],
        copied: Mapping[int, Tensor],
        staged: dict[int, tuple[Storage, int]],
    ) -> tuple[Hashable, ...]:
        """Equal for calls of which one's recording can be replayed for the other."""
        sizes = (x.shape for x in copied.values())
        addresses = (s.addresses for s, _ in staged.values())
        return (*self._whereabouts.key(args), *sizes, *addresses)

    def _next_step(
        self,
        moving: Moving,
        key: tuple[Any, Hashable],
        args: tuple[Any, ...],
        staged: dict[int, tuple[Storage, int]],
    ) -> Step:
        """The step behind this one, if that finds all as this one leaves it."""
        given = {i: args[index] for i, index in moving.arguments.items()}
        recording = self._replayed.recording(key)
        if recording is None or not all(s.fits(new_tokens) for s, new_tokens in staged.values()):
            return Step(lambda _: None, given)
        positions = self._positions(args, staged)
        copied = dict.fromkeys(moving.positions, positions)
        device, now = self._device(args), changes()

        def begin(given: Mapping[int, Tensor]) -> Begun | None:
            if changes() != now or not self._whereabouts.are_where_they_were():
                return None
            with torch.cuda.device(device):
                if torch.cuda.current_stream() != key[0]:
                    return None
                inputs = {**given, **copied}
                return Begun(self, key, inputs, self._replayed.begin(recording, inputs))

        return Step(begin, given)

    def _device(self, args: Arguments) -> torch.device:
        """Where the caches are."""
        return args[self._carriers[0].index].device

    def _packed_arguments(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Pack a cache that arrives dense where a carrier was expected, and one that begins where
        the graph does not expect it.
        """
        out = list(args)
        for carrier in self._carriers:
            x, edge = out[carrier.index], carrier.edge
            if not isinstance(x, QuantizedKV):
                if edge is not None:
                    kind = handle_type(edge.token_dim)
                    packed = kind.from_dense(x, edge.fmt, edge.role, given=edge.constant)
                    out[carrier.index] = packed
            elif x.first and carrier.index not in self._windows:
                out[carrier.index] = x.from_its_first()
        for row in self._rows:
            if len({out[i].first for i in row.carriers}) > 1:  # appended to a different past
                for i in row.carriers:
                    out[i] = out[i].from_its_first()
        return tuple(out)

    def _stage(self, args: tuple[Any, ...]) -> dict[int, tuple[Storage, int]]:
        """For each carrier that grows: a storage of its own with room, and how many tokens come.
        Those whose arenas are only read are there too, with no tokens.
        """
        staged: dict[int, tuple[Storage, int]] = {}
        taken: set[int] = set()
        for carrier in self._carriers:
            handle = args[carrier.index]
            if isinstance(handle, QuantizedKV) and handle.has_pending:
                # Before any length is taken: another carrier may be a shorter one of this storage.
                handle.writable_storage()
        for carrier in self._carriers:
            if carrier.new_tokens is None:
                continue
            new_tokens = carrier.new_tokens(args)
            storage = args[carrier.index].writable_storage(new_tokens)
            if id(storage) in taken:  # the same handle twice: each appends to its own
                storage = storage.copy()
            taken.add(id(storage))
            staged[carrier.index] = storage, new_tokens
        for index in self._read:
            staged[index] = args[index].writable_storage(), 0
        return staged

    def _copied_rings(self, staged: dict[int, tuple[Storage, int]]) -> dict[int, Tensor]:
        """Copies of the dense buffers that more than one token goes to: such an append may reuse
        ring slots.
        """
        several = [(i, storage) for i, (storage, n) in staged.items() if n > 1]
        if not several:
            return {}
        with torch.inference_mode(False), torch.no_grad():
            return {i: storage["dense"].clone() for i, storage in several}

    def _gather(
        self,
        args: tuple[Any, ...],
        staged: dict[int, tuple[Storage, int]],
        dense: dict[int, Tensor],
        beside: Sequence[Tensor],
        copied: Mapping[int, Tensor] = NOTHING,
    ) -> list[Any]:
        gathered = []
        for i, fed in self._fed:
            if i in copied:
                gathered.append(copied[i])
            elif fed.kind == "argument":
                gathered.append(args[fed.index])
            elif fed.kind == "arena":
                storage, ring = staged[fed.index][0], dense.get(fed.index)
                gathered += storage.tensors if ring is None else storage.with_dense(ring)
            elif fed.kind == "constant":
                gathered.append(fed.tensor)
            elif fed.kind == "beside":
                gathered.append(beside[fed.index])
            elif fed.kind == "dense":
                x = args[fed.index]
                gathered.append(x.dequantize() if isinstance(x, PackedTensor) else x)
            else:
                positions = self._positions(args, staged)
                gathered.append(positions.to(self._device(args), non_blocking=True))
        return gathered

    def _positions(self, args: Arguments, staged: dict[int, tuple[Storage, int]]) -> Tensor:
        """What is written of each carrier, other numbers in their places; int64 ``[rows, 2]`` on
        the CPU.
        """
        rows = []
        for carrier in self._carriers:
            storage = staged[carrier.index][0] if carrier.index in staged else None
            if storage is not None:
                rows.append((storage.length, storage.watermark))
            else:
                x = args[carrier.index]  # dense where no attention over it was understood
                rows.append((x.shape[x.token_dim if isinstance(x, QuantizedKV) else TOKENS], 0))
        for row in self._rows:
            number = row.size(args)
            if row.carriers:
                number = staged[row.carriers[0]][0].length - number
            rows.insert(row.place, (number, 0))
        return torch.tensor(rows, dtype=torch.int64)

    def _finish(
        self,
        args: tuple[Any, ...],
        results: list[Any],
        staged: dict[int, tuple[Storage, int]],
        dense: dict[int, Tensor],
    ) -> tuple[Any, ...]:
        """Commit what was appended, and put together what the caller expects.

        Takes arenas out of ``results``, so that no two layers are held twice.
        """
        appended: dict[int, QuantizedKV] = {}
        with torch.inference_mode():  # entered once, and not for every handle
            for carrier in self._carriers:
                if carrier.new_tokens is None:
                    continue
                storage, new_tokens = staged[carrier.index]
                if carrier.index in dense:
                    storage["dense"].copy_(dense[carrier.index])
                storage.advance(new_tokens)
                first = args[carrier.index].first
                if carrier.kept is not None:
                    first = storage.length - carrier.kept(args)
                kind = type(args[carrier.index])
                handle = kind(storage, storage.length, first=first)
                appended[carrier.index] = self._report.track(handle)
        stored: dict[int, QuantizedKV] = {}
        out: list[Any] = []
        for position, made in enumerate(self._outputs):
            if made.kind == "value":
                out.append(results[made.first])
            elif made.kind == "argument":
                out.append(args[made.argument])
            elif made.kind == "number":
                out.append(self._sizes[position](args))
            elif made.kind == "appended":
                out.append(appended[made.argument])
            else:
                if made.first not in stored:
                    assert made.edge is not None
                    arenas = results[made.first : made.first + made.count]
                    results[made.first : made.first + made.count] = [None] * made.count
                    length = self._sizes[position](args)
                    handle = handle_type(made.edge.token_dim).from_arenas(
                        arenas, length, made.edge.fmt, made.edge.role, made.edge.constant,
                        made.edge.grows,
                    )  # fmt: skip
                    stored[made.first] = self._report.track(handle)
                    del arenas
                out.append(stored[made.first])
        return tuple(out)


def _by_carrier(inputs: Sequence[InnerInput]) -> list[tuple[int, InnerInput]]:
    """What feeds the inputs, by the number of the first of them: all arenas of a carrier, which
    follow each other, at once.
    """
    found: list[tuple[int, InnerInput]] = []
    for i, fed in enumerate(inputs):
        before = found[-1][1] if found else None
        if (
            fed.kind != "arena"
            or before is None
            or (before.kind, before.index) != ("arena", fed.index)
        ):
            found.append((i, fed))
    return found


def joins_of(rewriting: Rewriting) -> list[tuple[int, Join]]:
    """Which inputs of a graph are taken apart, and how, in the order of their parts."""
    indices = {node: i for i, node in enumerate(rewriting.placeholders)}
    found = ((indices[node], rewriting.joined[node]) for node in rewriting.taken_apart)
    return [(index, join) for index, join in found if join is not None]


def with_joined(
    call: Callable[..., Any],
    taken: Sequence[tuple[int, Join]],
    returned_as: Sequence[int | JoinedOutput],
) -> Callable[..., Any]:
    """``call``, given the parts of some arguments behind all of them; its results put together."""
    if not taken and not returned_as:
        return call
    made = [m if isinstance(m, int) else (m.first, m.join) for m in returned_as]

    def run(*args: Any) -> Any:
        parts = [part for index, join in taken for part in parts_of(args[index], join)]
        results = call(*args, *parts)
        return tuple(_output(results, m) for m in made) if made else results

    return run


def _output(results: Sequence[Any], made: int | tuple[int, Join]) -> Any:
    if isinstance(made, int):
        return results[made]
    first, join = made
    return join_parts(results[first : first + len(join.lenses)], join)
