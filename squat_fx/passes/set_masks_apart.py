"""Compute masks that grow with the cache beside a decode step, and not in it.

Before:
    mask  = attention_mask[:, None, None, :] & (arange(kv_len) <= positions[0, 0])
    valid = valid_tokens(mask, new)
    out   = attend(query, ..., mask)
After, a graph beside it that the boundary calls first:
    mask   = attention_mask[:, None, None, :] & (arange(kv_len) <= positions[0, 0])
    newest = mask[..., -1:]
After, in the graph itself, of which both are inputs:
    valid = valid_tokens(newest, new)
    out   = attend(query, ..., mask)

What is left has no size that grows with the cache, and can be replayed: the mask is handed in with
room for more columns, of which ``attend`` reads those that there are.

Leaves alone: graphs that are not to be replayed; masks that are computed from hidden states, by a
``vmap`` or in place; and graphs in which something else grows with the cache, too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from squat_fx.passes.base import GraphPass
from squat_fx.passes.quantize_kv_cache import drop_dead
from squat_fx.passes.records import Beside, InnerInput, Rewriting
from squat_fx.passes.spelling import (
    describe,
    kind,
    memory_of,
    shape_of,
    size_of,
    sizes_of,
    symbols_of,
    value_of,
    written_by,
)

_READERS = ("attend", "valid_tokens")
_OF_HIDDEN_STATES = ("matmul", "sdpa", "softmax", "dropout")
_OTHERS = ("linear", "embedding", "_batch_dim", "_nesting")  # ends of names


class SetMasksApart(GraphPass):
    """Move what computes masks into a graph of its own."""

    name = "set masks apart"

    def run(self, rewriting: Rewriting) -> int:
        """See the module's docstring."""
        if not rewriting.is_replayed or not rewriting.handles:
            return 0
        graph = rewriting.graph
        growing = _growing_inputs(rewriting)
        touched = _closure(growing, lambda n: [u for u in n.users if not _reads_mask(u, n)])
        readers = {u: n for n in touched for u in n.users if _reads_mask(u, n)}
        apart = _closure(readers.values(), lambda n: n.all_input_nodes)
        if not readers or not touched <= apart or not _may_be_set_apart(apart, rewriting):
            return 0
        if any(newest_tokens(n) is None for n in readers if describe(n) == "valid_tokens"):
            return 0
        feeds = dict(zip(graph.find_nodes(op="placeholder"), rewriting.inputs, strict=True))
        beside = _Beside(graph, apart, feeds)
        for reader, mask in readers.items():
            is_newest = describe(reader) == "valid_tokens"
            given = beside.given(mask, newest_tokens(reader) if is_newest else None)
            reader.replace_input_with(mask, given)
        rewriting.beside = beside.finish()
        drop_dead(graph)
        for node in growing:
            graph.erase_node(node)
        left = graph.find_nodes(op="placeholder")
        rewriting.inputs[:] = [(feeds | beside.feeds)[node] for node in left]
        return len(readers)


def _growing_inputs(rewriting: Rewriting) -> set[fx.Node]:
    """Inputs of which a size, or which as a size, depends on more than the batch."""
    batch = set().union(*(symbols_of(sizes_of(node)[0]) for node in rewriting.handles))
    nodes = rewriting.graph.find_nodes(op="placeholder")
    found = set()
    for node, fed in zip(nodes, rewriting.inputs, strict=True):
        sizes = shape_of(node) or (size_of(value_of(node)),)
        if fed.kind == "argument" and not set().union(*map(symbols_of, sizes)) <= batch:
            found.add(node)
    return found


def _closure(start: Iterable[fx.Node], following: Callable[[fx.Node], list[fx.Node]]) -> set:
    """Nodes, what follows them, what follows that, and so on."""
    found, stack = set(), list(start)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(following(node))
    return found


def _reads_mask(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` is an op of ours that takes ``node`` as a mask, and as nothing else."""
    if getattr(user.target, "namespace", "") != "squat_fx" or describe(user) not in _READERS:
        return False
    names = [a.name for a in user.target._schema.arguments]  # pyright: ignore
    return [names[i] for i, x in enumerate(user.args) if x is node] == ["mask"]


def newest_tokens(valid: fx.Node) -> int | None:
    """How many tokens are new where ``valid_tokens`` asks; None if that depends on the call."""
    tokens = sizes_of(valid.args[1])[2]  # pyright: ignore[reportArgumentType]
    return tokens if isinstance(tokens, int) else None


def _may_be_set_apart(nodes: set[fx.Node], rewriting: Rewriting) -> bool:
    """Whether nodes compute the same, at little cost, when they run before all others."""
    written = {memory_of(x) for node in rewriting.graph.nodes for x in written_by(node)}
    if not written.isdisjoint(nodes):
        return False
    fed = dict(zip(rewriting.graph.find_nodes(op="placeholder"), rewriting.inputs, strict=True))
    return all(
        fed[node].kind in ("argument", "positions") if node.op == "placeholder" else _is_light(node)
        for node in nodes
    )


def _is_light(node: fx.Node) -> bool:
    """Whether a node computes something from its operands alone, and no hidden states."""
    if node.op not in ("call_function", "call_method") or node.is_impure():
        return False
    is_ours = getattr(node.target, "namespace", "") == "squat_fx"
    is_heavy = kind(node) in _OF_HIDDEN_STATES or describe(node).endswith(_OTHERS)
    return not is_ours and not is_heavy


class _Beside:
    """A graph in the making, and what it hands to the one that it was taken from."""

    def __init__(
        self, graph: fx.Graph, nodes: set[fx.Node], feeds: dict[fx.Node, InnerInput]
    ) -> None:
        self._from = graph
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        self._given: dict[tuple[fx.Node, int | None], fx.Node] = {}
        self._outputs: list[fx.Node] = []
        self._inputs: list[InnerInput] = []
        self.feeds: dict[fx.Node, InnerInput] = {}
        for node in graph.nodes:
            if node in nodes:
                self._copies[node] = self._graph.node_copy(node, self._copies.__getitem__)
                if node.op == "placeholder":
                    self._inputs.append(feeds[node])

    def given(self, mask: fx.Node, newest: int | None) -> fx.Node:
        """An input that is fed a mask, or as many of its ``newest`` columns."""
        key = mask, newest
        if key not in self._given:
            made = self._copies[mask]
            if newest is not None:
                columns: Any = (Ellipsis, slice(-newest, None))
                made = self._graph.call_function(operator.getitem, (made, columns))
            made = self._graph.call_method("contiguous", (made,))
            index = len(self._outputs)
            last = self._from.find_nodes(op="placeholder")[-1]
            with self._from.inserting_after(last):
                node = self._from.placeholder(f"squat_fx_beside_{index}")
            self._outputs.append(made)
            self.feeds[node] = InnerInput("beside", index)
            self._given[key] = node
        return self._given[key]

    def finish(self) -> Beside:
        """The graph with its output."""
        self._graph.output(tuple(self._outputs))
        widths = tuple(newest is None for _, newest in self._given)
        return Beside(fx.GraphModule({}, self._graph), tuple(self._inputs), widths)
