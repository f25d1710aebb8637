"""Check what every rewritten graph promises.

Before and after: the same graph. Raises ``AssertionError`` where a promise is broken, which is a
fault of this package:

* no node reads a carrier's dense tensor unless the boundary dequantizes it;
* every op of ours that mutates is read by nobody, and follows every ``attend`` over those arenas;
* every flat output of the original graph is accounted for, and every placeholder is fed.

Notes, for the report, why a decode graph is not static.
"""

from __future__ import annotations

import torch
from torch import fx

from squat_fx.passes.base import GraphPass
from squat_fx.passes.one_mask import terms_of
from squat_fx.passes.records import Rewriting
from squat_fx.passes.spelling import describe, flat_outputs, shape_of, value_of


class Verify(GraphPass):
    """Assert the promises; count the checks."""

    name = "verify"

    def run(self, rewriting: Rewriting) -> int:
        """See the module's docstring."""
        placeholders = rewriting.graph.find_nodes(op="placeholder")
        assert len(placeholders) == len(rewriting.inputs), "a placeholder is not fed"
        self._check_outputs(rewriting)
        checks = 0
        appended: set[fx.Node] = set()
        for node in rewriting.graph.nodes:
            name = getattr(node.target, "_schema", None)
            op = getattr(name, "name", "")
            if op in ("squat_fx::append_", "squat_fx::append_both_"):
                assert not node.users, f"{node} has readers"
                appended.update(
                    a for a in node.args if isinstance(a, fx.Node) and a.op == "placeholder"
                )
                checks += 1
            elif op == "squat_fx::attend":
                assert not appended & set(node.args[3:]) & _arena_nodes(rewriting), (
                    f"{node} reads after an append"
                )
                checks += 1
        if rewriting.handles:
            self._note_symbols(rewriting)
        return checks + 2

    def _check_outputs(self, rewriting: Rewriting) -> None:
        """Every output of the inner graph is part of what the caller gets."""
        used = {
            made.first + i
            for made in rewriting.outputs
            if made.kind in ("value", "stored")
            for i in range(made.count if made.kind == "stored" else 1)
        }
        count = len(flat_outputs(rewriting.graph))
        if rewriting.watched:  # the errors are the last output
            count -= 1
        assert used == set(range(count)), f"{count} outputs, but the caller is given {sorted(used)}"

    def _note_symbols(self, rewriting: Rewriting) -> None:
        """Name the inputs whose sizes keep a decode graph from being static."""
        changing = []
        nodes = rewriting.graph.find_nodes(op="placeholder")
        for node, fed in zip(nodes, rewriting.inputs, strict=True):
            is_size = isinstance(value_of(node), torch.SymInt)
            sizes = shape_of(node) or ()
            only_asked_for_size = node in rewriting.carriers and fed.kind == "argument"
            changes = is_size or any(not isinstance(size, int) for size in sizes)
            if changes and fed.kind in ("argument", "dense") and not only_asked_for_size:
                changing.append(_readable(node))
        if changing:
            note = "the decode graph is dynamic, because sizes of its inputs change: "
            note += ", ".join(changing)
            if any(terms_of(site.attention) for site in rewriting.sites):
                note += (
                    "; an attention mask grows with the cache, so leave out one that is all ones"
                )
            rewriting.notes.append(note)


def _readable(node: fx.Node) -> str:
    """An input's name for a reader; for a bare size, the operation that reads it."""
    if isinstance(value_of(node), torch.SymInt):
        reader = next(iter(node.users))
        return f"a size read by {describe(reader)}"
    return node.name.removeprefix("l_kwargs_").removeprefix("l_").rstrip("_")


def _arena_nodes(rewriting: Rewriting) -> set[fx.Node]:
    nodes = rewriting.graph.find_nodes(op="placeholder")
    return {n for n, fed in zip(nodes, rewriting.inputs, strict=True) if fed.kind == "arena"}
