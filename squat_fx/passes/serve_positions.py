"""Serve position arithmetic on the cache length from the device.

Before:
    position_ids = arange(q) + past_len           # past_len: a size of a packed cache
    cache_position = arange(past_len, past_len + 1)
After:
    position_ids = arange(q) + positions[row, 0]  # the positions tensor that the boundary writes
    cache_position = arange(1) + positions[row, 0]

So a decode step that was given no positions leaves no size symbol of the cache in its graph, and
the graph is static.

Leaves alone: sizes used as sizes (masks that grow, reshapes), and arithmetic that is no
``tensor + past_len``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from squat_fx.passes.base import GraphPass
from squat_fx.passes.records import Rewriting
from squat_fx.passes.spelling import (
    argument,
    is_plain,
    kind,
    operand,
    shape_of,
    size_of,
    value_of,
)


class ServePositions(GraphPass):
    """Replace scalar cache lengths in integer tensor arithmetic."""

    name = "serve positions"

    def run(self, rewriting: Rewriting) -> int:
        """See the module's docstring."""
        lengths = _cache_lengths(rewriting)
        if not lengths or rewriting.make_positions is None:
            return 0
        served = 0
        for node in list(rewriting.graph.nodes):
            replaced = _tensor_plus_length(node, lengths, rewriting.make_positions)
            replaced = replaced or _arange_from_length(node, lengths, rewriting.make_positions)
            if replaced is not None:
                replaced.meta.update(node.meta)
                node.replace_all_uses_with(replaced)
                rewriting.graph.erase_node(node)
                served += 1
        return served


def _cache_lengths(rewriting: Rewriting) -> dict[Any, int]:
    """Row of the positions tensor by the symbol of a carrier's length."""
    lengths: dict[Any, int] = {}
    for row, carrier in enumerate(rewriting.handles):
        shape = shape_of(carrier)
        if shape is not None and not isinstance(shape[2], int):
            lengths.setdefault(shape[2], row)
    return lengths


def _symbol(value: Any) -> Any:
    """The size a scalar node stands for, as an expression."""
    if not isinstance(value, fx.Node):
        return None
    example = value_of(value)
    return size_of(example) if isinstance(example, torch.SymInt) else None


def _is_integer(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dtype == torch.int64


def _tensor_plus_length(
    node: fx.Node, lengths: dict[Any, int], positions: Callable[[int], fx.Node]
) -> fx.Node | None:
    if kind(node) not in ("add", "sub") or not is_plain(node) or not _is_integer(node):
        return None
    tensor, scalar = operand(node), operand(node, 1)
    if _symbol(tensor) in lengths and kind(node) == "add":
        tensor, scalar = scalar, tensor
    row = lengths.get(_symbol(scalar))
    if row is None or not isinstance(tensor, fx.Node) or not _is_integer(tensor):
        return None
    graph = node.graph
    with graph.inserting_before(node):
        length = graph.call_function(torch.select, (positions(row), 0, 0))
        return graph.call_function(
            torch.add if kind(node) == "add" else torch.sub, (tensor, length)
        )


def _arange_from_length(
    node: fx.Node, lengths: dict[Any, int], positions: Callable[[int], fx.Node]
) -> fx.Node | None:
    """``arange(past_len, past_len + q)`` with a number ``q``."""
    if kind(node) != "arange" or not _is_integer(node) or argument(node, 2, "step", 1) != 1:
        return None
    if len(node.args) < 2 and "end" not in node.kwargs:
        return None
    row = lengths.get(_symbol(argument(node, 0, "start")))
    shape = shape_of(node)
    if row is None or shape is None or not isinstance(shape[0], int):
        return None
    graph = node.graph
    with graph.inserting_before(node):
        given = {k: v for k, v in node.kwargs.items() if k not in ("start", "end", "step")}
        counted = graph.call_function(torch.arange, (shape[0],), given)
        length = graph.call_function(torch.select, (positions(row), 0, 0))
        return graph.call_function(torch.add, (counted, length))
