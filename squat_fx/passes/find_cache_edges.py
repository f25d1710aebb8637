"""Find where each attention's keys and values come from the cache and go back to it.

Before:
    key = cat([past_key, new_key], dim=-2)    # returned to the caller, or key[:, :, -window:]
    out = attention(query, repeat_kv(key), repeat_kv(value))
After:
    the same graph, and one ``AttentionSite`` per attention: its record, and a ``CacheEdge`` for its
    keys and its values.

The walk starts at the attention and goes up through views; ``cat`` is no anchor, since rotary
embeddings are full of them.

What is returned may be the newest tokens of the concatenation only (a sliding window), and so may
what the attention reads. Keys and values that come from elsewhere than the query (cross attention)
are stored where they are returned, and where they arrive packed they are read.

Leaves alone, with a reason: keys or values that are not returned, concatenations on another dim or
of more than two tensors, static caches, tensors written in place, layers the config skips.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import fx

from squat_fx.codecs import Format, Role
from squat_fx.passes.axes import Followed, follow_views
from squat_fx.passes.base import GraphPass
from squat_fx.passes.records import Attention, AttentionSite, CacheEdge, Rewriting, Skipped
from squat_fx.passes.spelling import (
    argument,
    describe,
    dim_of,
    kind,
    newest_of,
    parts_of,
    returned_nodes,
    same_size,
    shape_of,
    sizes_of,
    source_of,
    value_of,
    writers,
)

ROLES: tuple[Role, Role] = ("key", "value")
_HEADS = {("heads",), ("heads", "repeat")}
Returned = dict[fx.Node, Any]
GROW = "use a cache that grows by concatenation, such as DynamicCache"


class FindCacheEdges(GraphPass):
    """Fill ``rewriting.sites`` from ``rewriting.attentions``."""

    name = "find cache edges"

    def run(self, rewriting: Rewriting) -> int:
        """See the module's docstring."""
        returned = returned_nodes(rewriting.graph)
        count = len(rewriting.attentions)
        for ordinal, attention in enumerate(rewriting.attentions):
            layer = layer_of(attention.output, ordinal)
            found = _site(attention, layer, count, returned, rewriting)
            if isinstance(found, AttentionSite):
                rewriting.sites.append(found)
            else:
                rewriting.skipped.append(Skipped(attention.output.name, found, layer))
        self._agree(rewriting)
        _find_lone_edges(rewriting, returned)
        return len(rewriting.sites)

    def _agree(self, rewriting: Rewriting) -> None:
        """Attentions that share a cache must agree on its format; the first one decides."""
        edges: dict[fx.Node, CacheEdge] = {}
        for site in list(rewriting.sites):
            for edge in (site.key, site.value):
                if edges.setdefault(edge.stored, edge) != edge:
                    rewriting.sites.remove(site)
                    reason = "shares its cache with a layer that stores it differently"
                    rewriting.skipped.append(
                        Skipped(site.attention.output.name, reason, site.layer)
                    )
                    break


def layer_of(node: fx.Node, ordinal: int) -> int:
    """The layer's number: the innermost in the node's module path, else its place in the graph."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        if match := re.search(r"(?:^|[._\[])(\d+)(?:[\]._']|$)", str(path)):
            return int(match.group(1))
    return ordinal


def _site(
    attention: Attention,
    layer: int,
    count: int,
    returned: Returned,
    rewriting: Rewriting,
) -> AttentionSite | str:
    followed: list[Followed] = []
    for role, node in zip(ROLES, (attention.key, attention.value), strict=True):
        found = follow_views(node, lambda n: _is_cache_candidate(n, returned, rewriting))
        if isinstance(found, str):
            return f"{role} {found}"
        reason = _source_reason(found.source, returned, rewriting)
        if reason := reason or _axes_reason(found, role, attention):
            return f"{role} {reason}"
        followed.append(found)
    key, value = followed
    queries = _queries_per_kv(attention, key, value)
    if isinstance(queries, str):
        return queries
    for role, found in zip(ROLES, followed, strict=True):
        if reason := _buffer_reason(found.source, attention):
            return f"{role} {reason}"
    _, heads, _, key_dim = sizes_of(key.source)
    formats = rewriting.config.formats(layer, count, heads, key_dim, sizes_of(value.source)[3])
    if isinstance(formats, str):
        return formats
    edges = [
        _edge(role, source, fmt, returned, rewriting)
        for role, source, fmt in zip(ROLES, (key.source, value.source), formats, strict=True)
    ]
    key_edge, value_edge = (
        replace(edge, grows=edge.kind != "prefill" or _grows_with_the_query(attention, edge.new))
        for edge in edges
    )
    if key_edge.kind != value_edge.kind:
        return "keys arrive packed and values do not, or the other way round"
    basis = rewriting.config.basis(layer, key_edge.fmt, value_of(key.source).device)
    key_edge = replace(key_edge, basis=basis)
    seen = None if key.source is key_edge.grown else key.source
    return AttentionSite(attention, key_edge, value_edge, queries, layer, seen)


def _is_cache_candidate(node: fx.Node, returned: Returned, rewriting: Rewriting) -> bool:
    """Whether a cache may end in ``node``, or the attention reads the newest tokens of one."""
    if node in returned or kind(node) == "cat" or node.op == "placeholder":
        return True
    if newest_of(node) is not None:
        return _is_cache_candidate(source_of(node), returned, rewriting)
    return part_returned(node, returned) is not None


def part_returned(grown: fx.Node, returned: Returned) -> fx.Node | None:
    """What of ``grown`` goes back to the caller: all of it, or its newest tokens."""
    if grown in returned:
        return grown
    newest = (user for user in grown.users if user in returned and newest_of(user) is grown)
    return next(newest, None)


def _grown(source: fx.Node) -> fx.Node:
    """What an attention that reads ``source`` reads, or reads the newest tokens of."""
    return newest_of(source) or source


def _source_reason(source: fx.Node, returned: Returned, rewriting: Rewriting) -> str | None:
    """Why ``source`` is no cache: an input, another concatenation, not returned as it is."""
    grown = _grown(source)
    if found := writers(grown):
        if grown.op == "placeholder":
            return f"is a buffer of fixed size, written in place by {describe(found[0])}; {GROW}"
        return f"is changed in place by {describe(found[0])} after it was made"
    if grown.op == "placeholder":
        if rewriting.carriers.get(grown) is None or source is not grown:
            return "is read from a graph input to which nothing is appended"
        return "is read and appended to" if any(kind(u) == "cat" for u in grown.users) else None
    if kind(grown) != "cat":
        return None
    parts, dim = parts_of(grown), argument(grown, 1, "dim", 0)
    if dim_of(dim, sizes_of(grown)) != 2:
        return f"is concatenated on dim {dim}, not on dim -2"
    if len(parts) != 2:
        return f"is a concatenation of {len(parts)} tensors, not of past and new"
    if any(w > grown for part in parts for w in writers(part)):
        return "is concatenated from tensors that are changed in place later"
    if part_returned(grown, returned) is None:
        sliced = any(kind(u) in ("getitem", "slice") and u in returned for u in grown.users)
        what = "only a part of it is, and not its newest tokens"
        what = what if sliced else "so the caller never gets it back"
        return f"is a past + new concatenation that is not returned; {what}"
    return None


def _buffer_reason(stored: fx.Node, attention: Attention) -> str | None:
    """Whether what is returned is an input of the same shape with something written into it."""
    if kind(stored) == "cat" or _grows_with_the_query(attention, stored):
        return None
    seen, stack = {stored}, [stored]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node.op == "placeholder" and shape_of(node) == shape_of(stored):
                return f"is a buffer of fixed size, written by {describe(stored)}; {GROW}"
            if node not in seen and len(shape_of(node) or ()) == 4:
                seen.add(node)
                stack.append(node)
    return None


def _axes_reason(followed: Followed, role: str, attention: Attention) -> str | None:
    """Whether the axes are not [batch, heads x repeat, tokens, channels] (an eager key's: .T)."""
    axes = followed.axes
    if len(axes) == 3:
        axes = (("batch",), axes[0][1:], *axes[1:]) if axes[0][:1] == ("batch",) else axes
    last = axes[-2:]
    if role == "key" and attention.spelling == "eager":
        last = last[::-1]
    is_batched = len(axes) == 4 and axes[0] == ("batch",) and axes[1] in _HEADS
    if is_batched and last == (("tokens",), ("channels",)):
        return None
    return (
        "reaches the attention with its axes in another order than [batch, heads, tokens, channels]"
    )


def _queries_per_kv(attention: Attention, key: Followed, value: Followed) -> int | str:
    """Query heads per KV head: the repeat in the graph, and what SDPA's ``enable_gqa`` leaves."""
    if key.source is value.source:
        return "keys and values are the same tensor"
    if key.repeat != value.repeat:
        return "keys and values are repeated a different number of times"
    query, output = shape_of(attention.query), shape_of(attention.output)
    keys, values = sizes_of(key.source), sizes_of(value.source)
    if not isinstance(keys[1], int) or not isinstance(values[1], int):
        return "the number of key heads is symbolic; capture the graph with a fixed number of heads"
    if keys[1] != values[1]:
        return "keys and values have different numbers of heads"
    if query is None or output is None or not all(map(same_size, query[:-1], output[:-1])):
        return "the attention's output has other leading dims than its query"
    if len(query) == 3:  # batch and heads merged, which only a repeat in the graph can have matched
        return key.repeat
    if not same_size(query[0], keys[0]):
        return "queries and keys have different batch sizes"
    if not isinstance(query[1], int) or query[1] % keys[1]:
        return "the number of query heads is not a multiple of the number of key heads"
    return query[1] // keys[1]


def _edge(
    role: Role, source: fx.Node, fmt: Format, returned: Returned, rewriting: Rewriting
) -> CacheEdge:
    """The cache edge that an attention over ``source`` reads."""
    grown = _grown(source)
    if grown in rewriting.carriers and grown.op == "placeholder":
        arriving = rewriting.carriers[grown]
        assert arriving is not None, f"{grown} does not arrive packed"
        return CacheEdge(role, "read", grown, grown, grown, arriving, grown=grown)
    stored = part_returned(grown, returned)
    assert stored is not None, f"{source} is not returned"
    past, new = parts_of(grown) if kind(grown) == "cat" else (None, grown)
    if past in rewriting.carriers:
        arriving = rewriting.carriers[past]
        fmt = fmt if arriving is None else arriving
        return CacheEdge(role, "decode", stored, new, past, fmt, grown=grown)
    return CacheEdge(role, "prefill", stored, new, None, fmt, grown=grown)


def _grows_with_the_query(attention: Attention, new: fx.Node) -> bool:
    return same_size(sizes_of(attention.query)[-2], sizes_of(new)[2])


def _find_lone_edges(rewriting: Rewriting, returned: Returned) -> None:
    """Carriers that grow although no attention over them was understood: still appended, packed."""
    known = {edge.grown for edge in rewriting.edges().values()}
    for carrier, fmt in rewriting.carriers.items():
        for user in carrier.users:
            if fmt is None or user in known or kind(user) != "cat":
                continue
            if _source_reason(user, returned, rewriting) is None and parts_of(user)[0] is carrier:
                role = value_of(carrier).role
                rewriting.lone_edges.append(_edge(role, user, fmt, returned, rewriting))
