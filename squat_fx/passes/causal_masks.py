"""Read a mask that the graph computes from positions alone: often it says only "causal".

    mask = arange(kv_len)[None, None, None, :] <= (arange(q_len) + past_len)[None, None, :, None]

is torch's bottom-right causality, and says nothing at all for a single query. Kept as a tensor it
would grow with the cache and keep a decode graph from being static.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from squat_fx.kernels.reference import BOTTOM_RIGHT, NO_CAUSALITY, TOP_LEFT
from squat_fx.passes.records import Attention
from squat_fx.passes.spelling import (
    argument,
    kind,
    operand,
    same_size,
    shape_of,
    size_of,
    sizes_of,
    value_of,
    writers,
)

_AT_MOST = (operator.le, torch.le, "le", torch.ops.aten.le.Tensor)
_AT_LEAST = (operator.ge, torch.ge, "ge", torch.ops.aten.ge.Tensor)


@dataclass(frozen=True)
class _Range:
    """Consecutive integers from ``first`` along one dim, counted from the last."""

    first: Any
    size: Any
    dim: int


def read_causal_mask(attention: Attention) -> Attention:
    """``attention`` with its mask as causality, if that is all the mask says; else unchanged."""
    compared = _comparison(attention.mask) if attention.mask is not None else None
    query, key = shape_of(attention.query), shape_of(attention.key)
    if compared is None or attention.causal != NO_CAUSALITY or query is None or key is None:
        return attention
    keys, queries = (_range(node) for node in compared)
    if keys is None or queries is None or (keys.dim, queries.dim) != (-1, -2):
        return attention
    q_len, kv_len = query[-2], key[-2]
    if not (same_size(keys.size, kv_len) and same_size(queries.size, q_len)):
        return attention
    ahead = queries.first - keys.first  # query i sees keys up to i + ahead
    if same_size(ahead, kv_len - q_len):
        causal = NO_CAUSALITY if q_len == 1 else BOTTOM_RIGHT
    elif same_size(ahead, 0):
        causal = TOP_LEFT
    else:
        return attention
    return replace(attention, mask=None, causal=causal)


def _comparison(mask: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """``(keys, queries)`` of ``keys <= queries``, below expansions that only broadcast."""
    node = mask
    while kind(node) in ("expand", "same") and not writers(node):
        node = operand(node)
    if not isinstance(node, fx.Node) or writers(node) or len(node.args) != 2:
        return None
    a, b = node.args
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    if node.target in _AT_MOST:
        return a, b
    return (b, a) if node.target in _AT_LEAST else None


def _range(node: Any) -> _Range | None:
    """The range that ``node`` is, through shifts by sizes and new axes."""
    if not isinstance(node, fx.Node) or writers(node):
        return None
    step = kind(node)
    if step == "arange":
        return _arange(node)
    if step == "add" and not node.kwargs:
        left, right = (operand(node, i) for i in (0, 1))
        if _scalar(left) is not None:
            left, right = right, left
        found, shift = _range(left), _scalar(right)
        return replace(found, first=found.first + shift) if found and shift is not None else None
    if step in ("unsqueeze", "getitem", "same"):
        found = _range(operand(node))
        before, after = shape_of(operand(node)), shape_of(node)
        if found is None or before is None or after is None:
            return None
        return _with_new_axes(node, found, before, after)
    return None


def _arange(node: fx.Node) -> _Range | None:
    bounds = [_scalar(bound) for bound in node.args]
    if len(bounds) not in (1, 2) or any(bound is None for bound in bounds):
        return None
    if argument(node, 2, "step", 1) != 1 or {"start", "end"} & set(node.kwargs):
        return None
    first = bounds[0] if len(bounds) == 2 else 0
    return _Range(first, sizes_of(node)[0], -1)


def _with_new_axes(node: fx.Node, found: _Range, before: Any, after: Any) -> _Range | None:
    """Where the range lies after axes of size one were added, and nothing was cut or moved."""
    if kind(node) == "same":
        return found
    position = len(before) + found.dim  # the old dim, counted from the front
    if kind(node) == "unsqueeze":
        added = argument(node, 1, "dim") % len(after)
        position += added <= position
    else:
        index = argument(node, 1, "index")
        items = index if isinstance(index, tuple) else (index,)
        if any(item is not None and item != slice(None) for item in items):
            return None
        kept = [i for i, item in enumerate(items) if item is not None]
        position = kept[position] if position < len(kept) else position + items.count(None)
    return replace(found, dim=position - len(after))


def _scalar(value: Any) -> Any:
    """A number or a size as an expression; None for a tensor."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    example = value_of(value) if isinstance(value, fx.Node) else None
    return size_of(example) if isinstance(example, (int, torch.SymInt)) else None
