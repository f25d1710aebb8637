"""One op for the new keys and the new values of a layer.

    append_(*key_arenas, new_key, valid, positions, 0, ..., after=readers)
    append_(*value_arenas, new_value, valid, positions, 1, ..., after=readers)
      ->
    append_both_(*key_arenas, *value_arenas, new_key, new_value, valid, positions, 0, 1, ...,
                 after=readers)

It stands where the later one stood: both wait for the same readers.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from squat_fx.kernels import ops
from squat_fx.passes.base import GraphPass
from squat_fx.passes.quantize_kv_cache import is_append
from squat_fx.passes.records import Rewriting

TAIL = 7  # new, valid, positions, row, codec, format, after


class FuseAppends(GraphPass):
    """Pair up appends that wait for the same attentions."""

    name = "fuse appends"

    def run(self, rewriting: Rewriting) -> int:
        """See the module's docstring."""
        graph, fused = rewriting.graph, 0
        waiting: dict[Any, fx.Node] = {}
        for node in [node for node in graph.nodes if is_append(node)]:
            _, valid, positions, _, codec, _, after = node.args[-TAIL:]
            like = (valid, positions, codec, tuple(after))  # pyright: ignore
            first = waiting.pop(like, None)
            both = None if first is None else ops.both(first.target, node.target)
            if first is None or both is None:
                waiting[like] = node
                continue
            with graph.inserting_before(node):
                graph.call_function(both, _arguments(first, node))
            graph.erase_node(first)
            graph.erase_node(node)
            fused += 1
        return fused


def _arguments(first: fx.Node, second: fx.Node) -> tuple[Any, ...]:
    arenas = (*first.args[:-TAIL], *second.args[:-TAIL])
    new, valid, positions, row, codec, fmt, after = first.args[-TAIL:]
    other_new, _, _, other_row, _, other_fmt, _ = second.args[-TAIL:]
    return (*arenas, new, other_new, valid, positions, row, other_row, codec, fmt, other_fmt, after)
