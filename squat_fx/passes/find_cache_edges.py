"""Find where each attention's keys and values come from the cache and go back to it.

Before:
    key = cat([past_key, new_key], dim=-2)          # returned to the caller
    out = attention(query, repeat_kv(key), repeat_kv(value))
After:
    the same graph, and one ``AttentionSite`` per attention: its record, and a ``CacheEdge`` for its keys and its values.

The walk starts at the attention and goes up through views; ``cat`` is no anchor, since rotary embeddings are full of them.

Leaves alone, with a reason: keys or values that are not returned (cross attention over an encoder, sliding windows that
return a slice), concatenations on another dim or of more than two tensors, static caches, layers the config skips.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import fx

from squat_fx.codecs import Format, Role
from squat_fx.passes.axes import Followed, follow_views
from squat_fx.passes.base import GraphPass
from squat_fx.passes.records import Attention, AttentionSite, CacheEdge, Rewriting, Skipped
from squat_fx.passes.spelling import argument, dim_of, kind, returned_nodes, same_size, shape_of, value_of

_HEADS = {("batch",), ("heads",), ("heads", "repeat")}


@dataclass(frozen=True)
class _Unreturned:
    """A concatenation that fits but is not an output; the reason says what is returned instead."""

    reason: str


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
                    rewriting.skipped.append(Skipped(site.attention.output.name, reason, site.layer))
                    break


def layer_of(node: fx.Node, ordinal: int) -> int:
    """The layer's number: the first one in the node's module path, else its place among the graph's attentions."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        if match := re.search(r"(?:^|[._\[])(\d+)(?:[\]._']|$)", str(path)):
            return int(match.group(1))
    return ordinal


def _site(
    attention: Attention, layer: int, count: int, returned: dict[fx.Node, Any], rewriting: Rewriting
) -> AttentionSite | str:
    followed: dict[str, Followed] = {}
    for role, node in (("key", attention.key), ("value", attention.value)):
        found = follow_views(node, lambda n: _is_cache_candidate(n, returned))
        if isinstance(found, str):
            return f"{role} {found}"
        if reason := _axes_reason(found, role, attention):
            return f"{role} {reason}"
        followed[role] = found
    key, value = followed["key"], followed["value"]
    if key.repeat != value.repeat:
        return "keys and values are repeated a different number of times"
    queries = _queries_per_kv(attention, key)
    if queries is None:
        return "the number of query heads is not a multiple of the number of key heads"
    formats = rewriting.config.formats(layer, count, shape_of(key.source)[3], shape_of(value.source)[3])  # pyright: ignore[reportOptionalSubscript]
    if isinstance(formats, str):
        return formats
    edges = []
    for role, source, fmt in (("key", key.source, formats[0]), ("value", value.source, formats[1])):
        edge = _edge(role, source, fmt, attention, returned, rewriting)
        if isinstance(edge, str):
            return f"{role} {edge}"
        edges.append(edge)
    if edges[0].kind != edges[1].kind:
        return "keys arrive packed and values do not, or the other way round"
    return AttentionSite(attention, *edges, queries, layer)


def _is_cache_candidate(node: fx.Node, returned: dict[fx.Node, Any]) -> bool:
    return node in returned or kind(node) == "cat" or node.op == "placeholder"


def _axes_reason(followed: Followed, role: str, attention: Attention) -> str | None:
    """Check that what the attention reads is [batch, heads x repeat, tokens, channels], transposed for an eager key."""
    axes = followed.axes
    if len(axes) == 3:
        axes = (("batch",), axes[0][1:], *axes[1:]) if axes[0][:1] == ("batch",) else axes
    last = axes[-2:]
    if role == "key" and attention.spelling == "eager":
        last = last[::-1]
    if len(axes) == 4 and set(axes[:2]) <= _HEADS and axes[0] == ("batch",) and last == (("tokens",), ("channels",)):
        return None
    return "reaches the attention with its axes in another order than [batch, heads, tokens, channels]"


def _queries_per_kv(attention: Attention, key: Followed) -> int | None:
    """Query heads per KV head: the repeat in the graph, and what SDPA's ``enable_gqa`` leaves to the op."""
    query, source = shape_of(attention.query), shape_of(key.source)
    if query is None or source is None or not isinstance(source[1], int):
        return None
    if len(query) == 3:  # batch and heads merged, which only a repeat in the graph can have matched
        return key.repeat
    if not isinstance(query[1], int) or query[1] % source[1]:
        return None
    return query[1] // source[1]


def _edge(
    role: Role,
    source: fx.Node,
    fmt: Format,
    attention: Attention,
    returned: dict[fx.Node, Any],
    rewriting: Rewriting,
) -> CacheEdge | str:
    """The cache edge that ends in ``source``, or why there is none."""
    is_cat = kind(source) == "cat"
    if not is_cat:
        if source.op == "placeholder":
            return "is read from a graph input to which nothing is appended"
        if _grows_with_the_query(attention, source):
            return CacheEdge(role, "prefill", source, source, None, fmt)
        return "is returned but does not grow with the query, as in cross attention"
    parts, dim = source.args[0], argument(source, 1, "dim", 0)
    if dim_of(dim, shape_of(source)) != 2:  # pyright: ignore[reportArgumentType]
        return f"is concatenated on dim {dim}, not on dim -2"
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        return f"is a concatenation of {len(parts)} tensors, not of past and new"  # pyright: ignore[reportArgumentType]
    if source not in returned:
        sliced = any(kind(u) in ("getitem", "slice") and u in returned for u in source.users)
        what = "only a slice of it is, as in a sliding window" if sliced else "so the caller never gets it back"
        return f"is a past + new concatenation that is not returned; {what}"
    past, new = parts
    if past in rewriting.carriers:
        arriving = rewriting.carriers[past]
        return CacheEdge(role, "decode", source, new, past, fmt if arriving is None else arriving)
    return CacheEdge(role, "prefill", source, new, None, fmt)


def _grows_with_the_query(attention: Attention, source: fx.Node) -> bool:
    query, key = shape_of(attention.query), shape_of(source)
    return query is not None and key is not None and same_size(query[-2], key[2])


def _find_lone_edges(rewriting: Rewriting, returned: dict[fx.Node, Any]) -> None:
    """Carriers that grow although no attention over them was understood: still appended to, packed."""
    known = rewriting.edges()
    for carrier, fmt in rewriting.carriers.items():
        for user in carrier.users:
            if user in known or fmt is None or kind(user) != "cat" or user not in returned:
                continue
            parts, dim = user.args[0], argument(user, 1, "dim", 0)
            if len(parts) == 2 and parts[0] is carrier and dim_of(dim, (0,) * 4) == 2:  # pyright: ignore[reportArgumentType, reportIndexIssue, reportOptionalSubscript]
                role = value_of(carrier).role
                rewriting.lone_edges.append(CacheEdge(role, "decode", user, parts[1], carrier, fmt))  # pyright: ignore[reportArgumentType, reportIndexIssue, reportOptionalSubscript]
