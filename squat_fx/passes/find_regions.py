"""Find where a graph repeats itself, so that layers that are alike need be compiled only once.

Before:
    one graph: embedding, layer 0, layer 1, ..., layer 31, norm and head
After (the graph is left as it is):
    regions of consecutive nodes: [embedding .. middle of layer 0], [.. middle of layer 1], ...,
    [.. middle of layer 31], [.. head]; regions 1 to 31 have the same key

Graphs are cut behind operations whose result lies in memory anyway, a matrix product or one of our
ops, so that a cut takes no fusion from the compiler. Of all such operations that occur once in
every layer, those are taken behind which the fewest tensors are alive.

The key of a region is all that it computes: operations, constants, and how they are connected,
inputs by their place. Which rows of the positions tensor it reads is no part of it: a region counts
them from its first one, and is given the rows from there on.

Leaves alone (with a reason): graphs without repetition, graphs that call other graphs, and cuts
between a tensor and an operation that writes to it in place, inside of a context, or through which
something else than tensors and sizes would be handed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from squat_fx.passes.spelling import (
    describe,
    kind,
    memory_of,
    shape_of,
    value_of,
    written_by,
)

# What something costs besides its nodes, in nodes to compile (about 10 ms each).
COST_OF_A_COMPILATION = 20
COST_OF_A_REGION = 4
_PRODUCTS = (F.linear, torch.addmm, torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
_ROWS = ("row", "key_row", "value_row", "first_row")  # arguments of our ops


@dataclass(frozen=True)
class Region:
    """Consecutive nodes of a graph.

    Attributes:
        nodes: in the order of the graph.
        inputs: what they read from before it, graph inputs included, in the order of first use.
        outputs: those of them that are read behind it.
        first_row, rows: which rows of the positions tensor they read; none if ``rows`` is 0.
        key: equal for regions that compute the same from their inputs.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    first_row: int
    rows: int
    key: Hashable


def find_regions(graph: fx.Graph, positions: fx.Node | None) -> list[Region] | str:
    """Regions that cover the graph, some of them alike; or why there are none.

    Args:
        graph: any graph of one level.
        positions: its positions tensor, of which the rows belong to layers.
    """
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    reason = _why_not(graph)
    if reason is not None:
        return reason
    cutter = _Cutter(nodes, positions)
    best: list[Region] = []
    least = len(nodes) + COST_OF_A_COMPILATION
    for places in cutter.candidates():
        regions = cutter.cut(places)
        cost = _cost(regions)
        if cost < least:
            least, best = cost, regions
    return best or "too little of the graph repeats"


def _cost(regions: Sequence[Region]) -> int:
    distinct = {region.key: len(region.nodes) + COST_OF_A_COMPILATION for region in regions}
    calls = (COST_OF_A_REGION + len(region.outputs) for region in regions)
    return sum(distinct.values()) + sum(calls)


def _why_not(graph: fx.Graph) -> str | None:
    """Why a graph cannot be cut at all."""
    for node in graph.nodes:
        if node.op == "call_module":
            return f"the graph calls the module {node.target}"
        if node.op == "get_attr" and not isinstance(attribute_of(node), Tensor):
            return f"the graph calls another graph, {node.target}"
    return None


def attribute_of(node: fx.Node) -> Any:
    """What a ``get_attr`` node gets."""
    found: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        found = getattr(found, name, None)
    return found


class _Cutter:
    """The places where a sequence of nodes may be cut, and what lies between them."""

    def __init__(self, nodes: Sequence[fx.Node], positions: fx.Node | None) -> None:
        self._nodes = nodes
        self._positions = positions
        self._index = {node: i for i, node in enumerate(nodes)}
        self._last_use = [
            max((self._index.get(user, -1) for user in node.users), default=-1) for node in nodes
        ]
        self._alive = self._count_alive()

    def candidates(self) -> Iterable[list[int]]:
        """Places behind operations that look alike: of the sets with as many places, the one with
        the fewest tensors alive.
        """
        alike: dict[Hashable, list[int]] = defaultdict(list)
        for i, node in enumerate(self._nodes[:-1]):
            if _lies_in_memory(node) and self._alive[i] is not None:
                alike[node.target, shape_of(node)].append(i)
        best: dict[int, tuple[int, list[int]]] = {}
        for places in alike.values():
            alive = sum(self._alive[i] or 0 for i in places)
            if len(places) > 1 and (len(places) not in best or alive < best[len(places)][0]):
                best[len(places)] = alive, places
        return [places for _, places in best.values()]

    def cut(self, places: Sequence[int]) -> list[Region]:
        """The regions that end at such places, and the last one."""
        ends = [*(place + 1 for place in places), len(self._nodes)]
        return [self._region(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def _count_alive(self) -> list[int | None]:
        """How many tensors are alive behind each node; None where no cut may be."""
        changes = [0] * (len(self._nodes) + 1)
        blocked = [0] * (len(self._nodes) + 1)
        depth, modes = 0, 0
        for i, node in enumerate(self._nodes):
            value, last = value_of(node), self._last_use[i]
            changes[i] += 1
            changes[max(last, i)] -= 1
            if value is not None and not isinstance(value, (Tensor, torch.SymInt)):
                blocked[i] += 1
                blocked[max(last, i)] -= 1
            for memory in _memories_written(node):
                first = self._index.get(memory, 0)
                blocked[first] += 1
                blocked[i] -= 1
            name = describe(node)
            depth += name.startswith("_enter_") - name.startswith("_exit_")
            modes += name.startswith("_set_grad")
            if depth or modes % 2:
                blocked[i] += 1
                blocked[i + 1] -= 1
        out: list[int | None] = []
        alive = closed = 0
        for change, block in zip(changes[:-1], blocked[:-1], strict=True):
            alive, closed = alive + change, closed + block
            out.append(None if closed else alive)
        return out

    def _region(self, start: int, end: int) -> Region:
        nodes = tuple(self._nodes[start:end])
        rows = [row for node in nodes for row in rows_of(node, self._positions).values()]
        whole = any(
            self._positions in node.all_input_nodes and not rows_of(node, self._positions)
            for node in nodes
        )
        first_row = 0 if whole or not rows else min(rows)
        inputs: dict[fx.Node, int] = {}
        local = {node: i for i, node in enumerate(nodes)}
        outputs = tuple(
            node
            for i, node in enumerate(nodes, start)
            if self._last_use[i] >= end or any(user.op == "output" for user in node.users)
        )

        def place(node: fx.Node) -> Hashable:
            if node in local:
                return "node", local[node]
            return "input", inputs.setdefault(node, len(inputs))

        key = tuple(
            (
                node.op,
                node.target,
                _looks(node),
                _spelled(arguments_of(node, self._positions, first_row, local), place),
            )
            for node in nodes
        )
        return Region(
            nodes,
            tuple(inputs),
            outputs,
            first_row,
            0 if whole or not rows else max(rows) + 1 - first_row,
            (key, tuple(local[node] for node in outputs)),
        )


def arguments_of(
    node: fx.Node, positions: fx.Node | None, first_row: int, local: Iterable[fx.Node]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``args`` and ``kwargs`` of a node in a region whose positions start at ``first_row``.

    What an append must wait for is left out where it lies before the region.
    """
    args = list(node.args)
    for i, row in rows_of(node, positions).items():
        args[i] = row - first_row
    for i in _places(node, ("after",)):
        args[i] = [x for x in args[i] or () if x in local]  # pyright: ignore
    return tuple(args), dict(node.kwargs)


def rows_of(node: fx.Node, positions: fx.Node | None) -> dict[int, int]:
    """Which arguments of a node are rows of the positions tensor: ``{index: row}``."""
    if positions is None or positions not in node.all_input_nodes:
        return {}
    if node.target is torch.select and node.args[0] is positions and node.args[1] == 0:
        return {2: node.args[2]}  # pyright: ignore[reportReturnType]
    rows: dict[int, Any] = {i: node.args[i] for i in _places(node, _ROWS)}
    return {i: row for i, row in rows.items() if row >= 0}  # -1: there is no window


def _places(node: fx.Node, names: Sequence[str]) -> list[int]:
    """Where arguments of such names are in a call of one of our ops."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "squat_fx":
        return []
    found = (i for i, a in enumerate(target._schema.arguments) if a.name in names)
    return [i for i in found if i < len(node.args)]


def _lies_in_memory(node: fx.Node) -> bool:
    """Whether an operation writes its result to memory whatever compiles the graph."""
    target = node.target
    ours = isinstance(target, torch._ops.OpOverload) and target.namespace == "squat_fx"
    return ours or target in _PRODUCTS or kind(node) in ("matmul", "sdpa")


def _memories_written(node: fx.Node) -> list[fx.Node]:
    """What a node writes to in place; our own ops write to arenas, which are inputs."""
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "squat_fx":
        return []
    return [memory_of(written) for written in written_by(node)]


def _looks(node: fx.Node) -> Hashable:
    """Dtype and shape of what a node makes; symbols differ from layer to layer."""
    value = value_of(node)
    if not isinstance(value, Tensor):
        return None
    return value.dtype, tuple(s if isinstance(s, int) else None for s in value.shape)


def _spelled(x: Any, place: Callable[[fx.Node], Hashable]) -> Hashable:
    """An argument as something to compare; nodes by their place."""
    if isinstance(x, fx.Node):
        return place(x)
    if isinstance(x, (tuple, list)):
        return "sequence", *(_spelled(item, place) for item in x)
    if isinstance(x, dict):
        return "mapping", *((name, _spelled(value, place)) for name, value in x.items())
    if isinstance(x, slice):
        return "slice", *(_spelled(part, place) for part in (x.start, x.stop, x.step))
    return type(x), repr(x)
