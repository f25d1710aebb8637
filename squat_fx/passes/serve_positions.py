"""Serve position arithmetic on the cache length from the device.

Before:
    position_ids = arange(q) + past_len           # past_len: a size of a packed cache, or an input
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

from typing import Any

import torch
from torch import fx

from squat_fx.passes.base import GraphPass
from squat_fx.passes.records import Number, Rewriting
from squat_fx.passes.spelling import (
    argument,
    is_plain,
    kind,
    operand,
    shape_of,
    size_of,
    symbols_of,
    value_of,
)


class ServePositions(GraphPass):
    """Replace scalar cache lengths in integer tensor arithmetic."""

    name = "serve positions"

    def run(self, rewriting: Rewriting) -> int:
        """See the module's docstring."""
        if not rewriting.handles or rewriting.make_positions is None:
            return 0
        rows = _Rows(rewriting)
        served = 0
        for node in list(rewriting.graph.nodes):
            replaced = _tensor_plus_length(node, rows)
            replaced = replaced or _arange_from_length(node, rows)
            if replaced is not None:
                replaced.meta.update(node.meta)
                node.replace_all_uses_with(replaced)
                rewriting.graph.erase_node(node)
                served += 1
        return served


class _Rows:
    """Rows of the positions tensor that begin with a scalar."""

    def __init__(self, rewriting: Rewriting) -> None:
        self._rewriting = rewriting
        windows = rewriting.windows()
        token_dims = {edge.past: edge.token_dim for edge in rewriting.edges().values()}
        self._lengths: dict[Any, int] = {}
        self._known: set[Any] = set()
        for carrier in rewriting.handles:
            shape, row = shape_of(carrier), rewriting.row_of(carrier)
            length = None if shape is None else shape[token_dims.get(carrier, 2)]
            if length is not None and not isinstance(length, int):
                self._known.add(length)
                if carrier not in windows:  # a window is shorter than what was appended
                    self._lengths.setdefault(length, row)
        for node in rewriting.placeholders:
            if isinstance(value_of(node), torch.SymInt):
                self._known |= symbols_of(size_of(value_of(node)))

    def __call__(self, scalar: Any) -> fx.Node | None:
        """The row's node of a scalar that is a length of a cache, or an input, or follows from
        those; None for anything else.
        """
        size, positions = _symbol(scalar), self._rewriting.make_positions
        assert positions is not None
        if size is None or isinstance(size, int) or not symbols_of(size) <= self._known:
            return None
        row = self._lengths.get(size)
        return positions(self._rewriting.row_of(Number(size)) if row is None else row)


def _symbol(value: Any) -> Any:
    """The size a scalar node stands for, as an expression."""
    if not isinstance(value, fx.Node):
        return None
    example = value_of(value)
    return size_of(example) if isinstance(example, torch.SymInt) else None


def _is_integer(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dtype == torch.int64


def _tensor_plus_length(node: fx.Node, rows: _Rows) -> fx.Node | None:
    if kind(node) not in ("add", "sub") or not is_plain(node) or not _is_integer(node):
        return None
    tensor, scalar = operand(node), operand(node, 1)
    if _symbol(tensor) is not None and kind(node) == "add":
        tensor, scalar = scalar, tensor
    if not isinstance(tensor, fx.Node) or not _is_integer(tensor):
        return None
    graph = node.graph
    with graph.inserting_before(node):
        row = rows(scalar)
        if row is None:
            return None
        length = graph.call_function(torch.select, (row, 0, 0))
        return graph.call_function(
            torch.add if kind(node) == "add" else torch.sub, (tensor, length)
        )


def _arange_from_length(node: fx.Node, rows: _Rows) -> fx.Node | None:
    """``arange(past_len, past_len + q)`` with a number ``q``."""
    if kind(node) != "arange" or not _is_integer(node) or argument(node, 2, "step", 1) != 1:
        return None
    if len(node.args) < 2 and "end" not in node.kwargs:
        return None
    shape = shape_of(node)
    if shape is None or not isinstance(shape[0], int):
        return None
    graph = node.graph
    with graph.inserting_before(node):
        row = rows(argument(node, 0, "start"))
        if row is None:
            return None
        given = {k: v for k, v in node.kwargs.items() if k not in ("start", "end", "step")}
        counted = graph.call_function(torch.arange, (shape[0],), given)
        length = graph.call_function(torch.select, (row, 0, 0))
        return graph.call_function(torch.add, (counted, length))
