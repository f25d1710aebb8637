"""Check what every rewritten graph promises.

Before and after: the same graph. Raises ``AssertionError`` where a promise is broken, which is a fault of this package:

* no node reads a carrier's dense tensor unless the boundary dequantizes it;
* every op of ours that mutates is read by nobody, and follows every ``attend`` over the same arenas;
* every flat output of the original graph is accounted for, and every placeholder is fed.

Notes, for the report, why a decode graph is not static.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from squat_fx.passes.base import GraphPass
from squat_fx.passes.records import Rewriting
from squat_fx.passes.spelling import shape_of


class Verify(GraphPass):
    """Assert the promises; count the checks."""

    name = "verify"

    def run(self, rewriting: Rewriting) -> int:
        """See the module's docstring."""
        checks = 0
        appended: set[fx.Node] = set()
        for node in rewriting.graph.nodes:
            name = getattr(node.target, "_schema", None)
            op = getattr(name, "name", "")
            if op == "squat_fx::append_":
                assert not node.users, f"{node} has readers"
                appended.update(a for a in node.args if isinstance(a, fx.Node) and a.op == "placeholder")
                checks += 1
            elif op == "squat_fx::attend":
                assert not appended & set(node.args[3:]) & _arena_nodes(rewriting), f"{node} reads after an append"
                checks += 1
        placeholders = rewriting.graph.find_nodes(op="placeholder")
        assert len(placeholders) == len(rewriting.inputs), "a placeholder is not fed"
        if rewriting.handles:
            self._note_symbols(rewriting)
        return checks + 1

    def _note_symbols(self, rewriting: Rewriting) -> None:
        lengths: dict[Any, fx.Node] = {}
        for carrier in rewriting.handles:
            shape = shape_of(carrier)
            if shape is not None and not isinstance(shape[2], int):
                lengths[shape[2]] = carrier
        for node in rewriting.graph.nodes:
            used = {s for size in (shape_of(node) or ()) for s in getattr(size, "free_symbols", ())}
            if node.op == "placeholder" and used & set(lengths) and not _asked_for_size(node, rewriting):
                rewriting.notes.append(
                    f"the decode graph is dynamic: input {node.name!r} grows with the cache "
                    "(leave out an all-ones attention mask to get a static graph)"
                )
                return


def _asked_for_size(node: fx.Node, rewriting: Rewriting) -> bool:
    """Whether an input is a packed cache that only its size is read from."""
    nodes = rewriting.graph.find_nodes(op="placeholder")
    return node in rewriting.carriers and rewriting.inputs[list(nodes).index(node)].kind == "argument"


def _arena_nodes(rewriting: Rewriting) -> set[fx.Node]:
    nodes = rewriting.graph.find_nodes(op="placeholder")
    return {n for n, fed in zip(nodes, rewriting.inputs, strict=True) if fed.kind == "arena"}
