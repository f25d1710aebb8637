"""Read a mask that the graph computes from positions alone: often it says only "causal".

    mask = arange(kv_len)[None, None, None, :] <= (arange(q_len) + past_len)[None, None, :, None]

is torch's bottom-right causality, and says nothing at all for a single query; nor does ``keys >
queries - window`` where no more than a window is there. Kept as a tensor it would grow with the
cache and keep a decode graph from being static. A mask that is added, ``where(mask, 0, -3.4e38)``,
says the same as what it was made from.
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
    describe,
    is_at_least,
    kind,
    operand,
    same_size,
    shape_of,
    size_of,
    sizes_of,
    value_of,
    writers,
)

_COMPARISONS = {
    target: (swapped, strict)
    for (swapped, strict), targets in {
        (False, 0): (operator.le, torch.le, "le", torch.ops.aten.le.Tensor),
        (False, 1): (operator.lt, torch.lt, "lt", torch.ops.aten.lt.Tensor),
        (True, 0): (operator.ge, torch.ge, "ge", torch.ops.aten.ge.Tensor),
        (True, 1): (operator.gt, torch.gt, "gt", torch.ops.aten.gt.Tensor),
    }.items()
    for target in targets
}
"""Whether ``a op b`` is ``b <= a``, and how much less than the other side the smaller one is."""
_AND = (operator.and_, torch.logical_and, torch.bitwise_and, "logical_and", "bitwise_and",
        torch.ops.aten.logical_and.default, torch.ops.aten.bitwise_and.Tensor)  # fmt: skip


@dataclass(frozen=True)
class _Range:
    """Consecutive integers from ``first`` along one dim, counted from the last."""

    first: Any
    size: Any
    dim: int


def read_causal_mask(attention: Attention) -> Attention:
    """``attention`` with its mask as causality, or without one, if that is all the mask says; else
    unchanged.
    """
    conditions = _conditions(attention.mask) if attention.mask is not None else None
    if conditions is None or attention.causal != NO_CAUSALITY:
        return attention
    told = [condition for condition in conditions if not condition.is_always_true]
    if not told:
        return replace(attention, mask=None)
    query, key = shape_of(attention.query), shape_of(attention.key)
    if attention.spelling == "eager" and key is not None:
        key = (*key[:-2], key[-1], key[-2])  # transposed for the product
    if len(told) > 1 or query is None or key is None:
        return attention
    keys, queries = told[0].low, told[0].high
    q_len, kv_len = query[-2], key[-2]
    if (keys.dim, queries.dim) != (-1, -2):
        return attention
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


@dataclass(frozen=True)
class _AtMost:
    """``low <= high``, one range along the keys and one along the queries."""

    low: _Range
    high: _Range
    graph: fx.Graph

    @property
    def is_always_true(self) -> bool:
        """Whether it hides nothing, as the window of a single query over no more than a window."""
        return is_at_least(self.high.first, self.low.first + self.low.size - 1, self.graph)


def _conditions(mask: Any) -> list[_AtMost] | None:
    """What must hold where a mask lets a query attend; None if it is not understood."""
    if not isinstance(mask, fx.Node) or writers(mask):
        return None
    if kind(mask) in ("expand", "same", "cast"):
        return _conditions(operand(mask))
    if mask.target in _COMPARISONS and len(mask.args) == 2:
        swapped, strict = _COMPARISONS[mask.target]
        low, high = (_range(node) for node in (reversed(mask.args) if swapped else mask.args))
        if low is None or high is None:
            return None
        return [_AtMost(low, replace(high, first=high.first - strict), mask.graph)]
    if mask.target in _AND and len(mask.args) == 2:
        both = [_conditions(part) for part in mask.args]
        return None if None in both else [c for part in both for c in part or ()]
    if describe(mask) == "new_ones" and value_of(mask).dtype == torch.bool:
        return []
    if describe(mask) == "where" and len(mask.args) == 3 and _is_added_mask(*mask.args[1:]):
        return _conditions(mask.args[0])
    return None


def _is_added_mask(seen: Any, hidden: Any) -> bool:
    """Whether these are added to scores: nothing, and next to minus infinity."""
    nothing = seen == 0 if isinstance(seen, (int, float)) else describe(seen) == "zeros"
    if not nothing or isinstance(hidden, bool) or not isinstance(hidden, (int, float)):
        return False
    return hidden <= torch.finfo(torch.float16).min


def _range(node: Any) -> _Range | None:
    """The range that ``node`` is, through shifts by sizes and new axes."""
    if not isinstance(node, fx.Node) or writers(node):
        return None
    step = kind(node)
    if step == "arange":
        return _arange(node)
    if step in ("add", "sub") and not node.kwargs:
        left, right = (operand(node, i) for i in (0, 1))
        if _scalar(left) is not None and step == "add":
            left, right = right, left
        found, shift = _range(left), _scalar(right)
        if found is None or shift is None:
            return None
        return replace(found, first=found.first + (shift if step == "add" else -shift))
    if step == "cast":
        return _range(operand(node)) if value_of(node).dtype == torch.int64 else None
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
