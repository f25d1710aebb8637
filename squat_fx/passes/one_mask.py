"""Put all that an attention adds to its scores into one mask.

Before:
    scores = where(visible, scale * query @ key.T, -1e9) + mask + slope * distance
After:
    scores = scale * query @ key.T + one_mask
    one_mask = (mask + slope * distance).masked_fill(~visible, -inf)

A mask on its own stays the node it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from squat_fx.passes.records import Attention, Term
from squat_fx.passes.spelling import shape_of, value_of


def one_mask(terms: Sequence[Term], heads: int, graph: fx.Graph) -> fx.Node | None:
    """The mask ``[batch | 1, heads | 1, queries | 1, keys]`` of an attention with ``heads`` query
    heads, made at the graph's insertion point; None if nothing is added or hidden.
    """
    added = [_scaled(t, heads, graph) for t in terms if t.means == "add"]
    visible = [_visible(t, heads, graph) for t in terms if t.means != "add"]
    total: fx.Node | None = None
    for node in added:
        total = node if total is None else graph.call_function(torch.add, (total, node))
    seen: fx.Node | None = None
    for node in visible:
        seen = node if seen is None else graph.call_function(torch.logical_and, (seen, node))
    if total is None or seen is None:
        return seen if total is None else total
    hidden = graph.call_function(torch.logical_not, (seen,))
    return graph.call_function(torch.masked_fill, (total, hidden, -torch.inf))


def terms_of(attention: Attention, as_written: bool = True) -> tuple[Term, ...]:
    """``mask`` and the other terms; without their factors unless ``as_written``."""
    mask = attention.mask
    is_bool = mask is not None and _is_bool(mask)
    first = () if mask is None else (Term(mask, "attend" if is_bool else "add"),)
    terms = (*first, *attention.terms)
    return terms if as_written else tuple(replace(t, factor=1.0) for t in terms)


def _is_bool(node: fx.Node) -> bool:
    return value_of(node).dtype == torch.bool


def _scaled(term: Term, heads: int, graph: fx.Graph) -> fx.Node:
    node = _four_dims(term, heads, graph)
    return node if term.factor == 1.0 else graph.call_function(torch.mul, (node, term.factor))


def _visible(term: Term, heads: int, graph: fx.Graph) -> fx.Node:
    node = _four_dims(term, heads, graph)
    return node if term.means == "attend" else graph.call_function(torch.logical_not, (node,))


def _four_dims(term: Term, heads: int, graph: fx.Graph) -> fx.Node:
    """The term with its leading dims told apart or added."""
    node = term.node
    if term.merged:
        return graph.call_method("unflatten", (node, 0, (-1, heads)))
    for _ in range(4 - len(shape_of(node) or ())):
        node = graph.call_method("unsqueeze", (node, 0))
    return node
