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
from torch._guards import TracingContext

from squat_fx.codecs import Format, Role
from squat_fx.layouts.kept import beneath
from squat_fx.passes.axes import Followed, follow_views
from squat_fx.passes.base import GraphPass
from squat_fx.passes.one_mask import terms_of
from squat_fx.passes.records import (
    Attention,
    AttentionSite,
    CacheEdge,
    Rewriting,
    Skipped,
    usual_order,
)
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

Sizes = tuple[Any, Any, Any, Any]
OTHER_AXES = (
    "reaches the attention with its axes in another order than [batch, heads, tokens, channels]"
)
ROLES: tuple[Role, Role] = ("key", "value")
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
            layer = layer_of(attention.output, ordinal, count)
            found = _site(attention, layer, count, returned, rewriting)
            if isinstance(found, AttentionSite):
                rewriting.sites.append(found)
            else:
                rewriting.skipped.append(Skipped(attention.output.name, found, layer))
        self._agree(rewriting)
        _find_lone_edges(rewriting, returned)
        _place_windows(rewriting)
        if not rewriting.attentions and not rewriting.skipped:
            rewriting.skipped.extend(_unread(rewriting, returned))
        return len(rewriting.sites)

    def _agree(self, rewriting: Rewriting) -> None:
        """Attentions that share a cache must agree on its format, and on the keys whose tokens
        values keep; the first one decides.
        """
        edges: dict[fx.Node, CacheEdge] = {}
        keys: dict[fx.Node, fx.Node] = {}
        for site in list(rewriting.sites):
            chosen_by = keys.setdefault(site.value.stored, site.key.stored)
            keeps_part = site.value.fmt.stored_layout.keeps_part
            other_keys = keeps_part and chosen_by is not site.key.stored
            for edge in (site.key, site.value):
                if edges.setdefault(edge.stored, edge) != edge or other_keys:
                    rewriting.sites.remove(site)
                    reason = "shares its cache with a layer that stores it differently"
                    rewriting.skipped.append(
                        Skipped(site.attention.output.name, reason, site.layer)
                    )
                    break


def layer_of(node: fx.Node, ordinal: int, count: int) -> int:
    """The layer's number: the innermost in the node's module path; in a graph of one attention,
    as where hooks break a model into pieces, that of the cache's layer; else its place among the
    ``count`` attentions of the graph.
    """
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        if match := re.search(r"(?:^|[._\[])(\d+)(?:[\]._']|$)", str(path)):
            return int(match.group(1))
    known = _layers_of_caches() if count == 1 else set()
    return known.pop() if len(known) == 1 else ordinal


def _layers_of_caches() -> set[int]:
    """The layers of caches that Dynamo looked into while it traced the graph at hand."""
    context = TracingContext.try_get()
    guards = [] if context is None else context.guards_context.dynamo_guards
    names: Any = (guard.name for guard in guards)
    found = (re.search(r"\.layers\[(\d+)\]", str(n() if callable(n) else n)) for n in names)
    return {int(match.group(1)) for match in found if match}


def _site(
    attention: Attention,
    layer: int,
    count: int,
    returned: Returned,
    rewriting: Rewriting,
) -> AttentionSite | str:
    followed: list[Followed] = []
    token_dims: list[int] = []
    for role, node in zip(ROLES, (attention.key, attention.value), strict=True):
        found = follow_views(node, lambda n: _is_cache_candidate(n, returned, rewriting))
        if isinstance(found, str):
            return f"{role} {found}"
        token_dim = _token_dim(found, role, attention)
        if reason := _source_reason(found.source, token_dim or 2, returned, rewriting):
            return f"{role} {reason}"
        if token_dim is None:
            return f"{role} {OTHER_AXES}"
        followed.append(found)
        token_dims.append(token_dim)
    key, value = followed
    sizes = [usual_order(sizes_of(f.source), d) for f, d in zip(followed, token_dims, strict=True)]
    if reason := _tiled_reason(attention, key, value):
        return reason
    queries = _queries_per_kv(attention, key, value, *sizes)
    if isinstance(queries, str):
        return queries
    for role, found, (_, _, tokens, _) in zip(ROLES, followed, sizes, strict=True):
        if reason := _buffer_reason(found.source, tokens, attention):
            return f"{role} {reason}"
    _, heads, _, key_dim = sizes[0]
    formats = rewriting.config.formats(layer, count, heads, key_dim, sizes[1][3])
    if isinstance(formats, str):
        return formats
    found_edges = [
        _edge(role, source, token_dim, fmt, returned, rewriting)
        for role, source, token_dim, fmt in zip(
            ROLES, (key.source, value.source), token_dims, formats, strict=True
        )
    ]
    key_edge, value_edge = (
        _settled(
            edge,
            edge.kind != "prefill" or _grows_with_the_query(attention, edge.sizes(edge.new)[2]),
        )
        for edge in found_edges
    )
    if key_edge.kind != value_edge.kind:
        return "keys arrive packed and values do not, or the other way round"
    basis = rewriting.config.basis(layer, key_edge.fmt, value_of(key.source).device)
    key_edge = replace(key_edge, given=basis)
    seen = None if key.source is key_edge.grown else key.source
    is_tiled = _is_tiled(key)
    return AttentionSite(attention, key_edge, value_edge, queries, layer, seen, is_tiled)


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


def _source_reason(
    source: fx.Node, token_dim: int, returned: Returned, rewriting: Rewriting
) -> str | None:
    """Why ``source`` is no cache: an input, another concatenation, not returned as it is."""
    grown = _grown(source)
    if found := writers(grown):
        if grown.op == "placeholder":
            return f"is a buffer of fixed size, written in place by {describe(found[0])}; {GROW}"
        return f"is changed in place by {describe(found[0])} after it was made"
    if grown.op == "placeholder":
        if rewriting.carriers.get(grown) is None or source is not grown:
            return "is read from a graph input to which nothing is appended"
        if value_of(grown).token_dim != token_dim:
            return f"is packed with its tokens on dim {value_of(grown).token_dim}, not {token_dim}"
        return "is read and appended to" if any(kind(u) == "cat" for u in grown.users) else None
    if kind(grown) != "cat":
        return None
    parts, dim = parts_of(grown), argument(grown, 1, "dim", 0)
    if dim_of(dim, sizes_of(grown)) != token_dim:
        return f"is concatenated on dim {dim}, not on dim {'-2' if token_dim == 2 else '1'}"
    if len(parts) != 2:
        return f"is a concatenation of {len(parts)} tensors, not of past and new"
    if rewriting.carriers.get(parts[0]) and value_of(parts[0]).token_dim != token_dim:
        return f"is packed with its tokens on dim {value_of(parts[0]).token_dim}, not {token_dim}"
    if any(w > grown for part in parts for w in writers(part)):
        return "is concatenated from tensors that are changed in place later"
    arriving = rewriting.carriers.get(parts[0])
    is_window = source is not grown or part_returned(grown, returned) is not grown
    if arriving is not None and arriving.stored_layout.keeps_part and is_window:
        return "is a window of a cache of which only a part is kept"
    if part_returned(grown, returned) is None:
        sliced = any(kind(u) in ("getitem", "slice") and u in returned for u in grown.users)
        what = "only a part of it is, and not its newest tokens"
        what = what if sliced else "so the caller never gets it back"
        return f"is a past + new concatenation that is not returned; {what}"
    return None


def _buffer_reason(stored: fx.Node, tokens: Any, attention: Attention) -> str | None:
    """Whether what is returned is an input of the same shape with something written into it."""
    if kind(stored) == "cat" or _grows_with_the_query(attention, tokens):
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


def _token_dim(followed: Followed, role: str, attention: Attention) -> int | None:
    """The cache's dim of tokens, 2 or 1, that the attention reads as [batch, heads x repeat,
    tokens, channels] (an eager key: transposed); None if it reads the dims in another order.
    """
    axes = followed.axes
    if len(axes) == 3:
        axes = (("batch",), axes[0][1:], *axes[1:]) if axes[0][:1] == ("batch",) else axes
    last = axes[-2:]
    if role == "key" and attention.spelling == "eager":
        last = last[::-1]
    heads = tuple(name for name in axes[1] if name != "repeat")
    if len(axes) != 4 or axes[0] != ("batch",) or len(axes[1]) > 2:
        return None
    read = (heads, *last)
    if read == (("heads",), ("tokens",), ("channels",)):
        return 2
    return 1 if read == (("tokens",), ("heads",), ("channels",)) else None


def _is_tiled(followed: Followed) -> bool:
    """Whether all heads are there and then all of them again."""
    return any(len(axis) > 1 and "repeat" in axis[:-1] for axis in followed.axes)


def _tiled_reason(attention: Attention, key: Followed, value: Followed) -> str | None:
    """Why heads that are repeated as a whole are not understood."""
    if _is_tiled(key) != _is_tiled(value):
        return "keys and values are repeated in different orders"
    by_head = [sizes_of(term.node) for term in terms_of(attention)]
    by_head = [shape for shape in by_head if len(shape) > 2 and shape[-3] != 1]
    if _is_tiled(key) and (by_head or attention.sinks is not None):
        return "heads are repeated as a whole, and masks or sinks differ by head"
    return None


def _queries_per_kv(
    attention: Attention, key: Followed, value: Followed, keys: Sizes, values: Sizes
) -> int | str:
    """Query heads per KV head: the repeat in the graph, and what SDPA's ``enable_gqa`` leaves.

    ``keys`` and ``values``: sizes of the cache as batch, heads, tokens and channels.
    """
    if key.source is value.source:
        return "keys and values are the same tensor"
    if key.repeat != value.repeat:
        return "keys and values are repeated a different number of times"
    query, output = shape_of(attention.query), shape_of(attention.output)
    if not isinstance(keys[1], int) or not isinstance(values[1], int):
        return "the number of key heads is symbolic; capture the graph with a fixed number of heads"
    if keys[1] != values[1]:
        return "keys and values have different numbers of heads"
    if query is None or output is None:
        return "the shape of the attention's output is not known"
    if len(query) == 4 and not same_size(query[0], keys[0]):
        return "queries and keys have different batch sizes"
    leading = [_leading(shape, keys[0], keys[1] * key.repeat) for shape in (query, output)]
    if not all(map(same_size, *leading)):
        return "the attention's output has other leading dims than its query"
    heads = leading[0][1]
    if not isinstance(heads, int) or heads % keys[1]:
        return "the number of query heads is not a multiple of the number of key heads"
    return heads // keys[1]


def _leading(shape: tuple[Any, ...], batch: Any, heads: int) -> tuple[Any, Any, Any]:
    """Batch, heads and tokens of a query or an output, whose batch and heads may be merged; only a
    repeat in the graph can then have matched the ``heads``.
    """
    if len(shape) == 4:
        return shape[0], shape[1], shape[2]
    return batch, heads if same_size(shape[0], batch * heads) else None, shape[1]


def _edge(
    role: Role,
    source: fx.Node,
    token_dim: int,
    fmt: Format,
    returned: Returned,
    rewriting: Rewriting,
) -> CacheEdge:
    """The cache edge that an attention over ``source`` reads."""
    grown = _grown(source)
    if grown in rewriting.carriers and grown.op == "placeholder":
        arriving = rewriting.carriers[grown]
        assert arriving is not None, f"{grown} does not arrive packed"
        tail = {"grown": grown, "token_dim": token_dim}
        return CacheEdge(role, "read", grown, grown, grown, arriving, **tail)
    stored = part_returned(grown, returned)
    assert stored is not None, f"{source} is not returned"
    tail = {"grown": grown, "token_dim": token_dim}
    past, new = parts_of(grown) if kind(grown) == "cat" else (None, grown)
    if past in rewriting.carriers:
        arriving = rewriting.carriers[past]
        fmt = fmt if arriving is None else arriving
        return CacheEdge(role, "decode", stored, new, past, fmt, **tail)
    return CacheEdge(role, "prefill", stored, new, None, fmt, **tail)


def _settled(edge: CacheEdge, grows: bool) -> CacheEdge:
    """``edge``, all of whose tokens are kept if it is a window, which forgets by itself, or comes
    from elsewhere than the queries that could choose.
    """
    whole = edge.kind == "prefill" and (edge.is_window or not grows)
    return replace(edge, grows=grows, fmt=beneath(edge.fmt) if whole else edge.fmt)


def _unread(rewriting: Rewriting, returned: Returned) -> list[Skipped]:
    """What looks like caches that grow, in a graph where no attention was seen."""
    grown = (n for n in rewriting.graph.nodes if kind(n) == "cat" and n in returned)
    return [
        Skipped(node.name, "grows like a cache, but no attention that reads it was recognized")
        for node in grown
        if len(shape_of(node) or ()) == 4
        and dim_of(argument(node, 1, "dim", 0), sizes_of(node)) in (1, 2)
        and len(parts_of(node)) == 2
        and getattr(parts_of(node)[0], "op", "") == "placeholder"
    ]


def _grows_with_the_query(attention: Attention, tokens: Any) -> bool:
    return same_size(sizes_of(attention.query)[-2], tokens)


def _find_lone_edges(rewriting: Rewriting, returned: Returned) -> None:
    """Carriers that grow although no attention over them was understood: still appended, packed."""
    known = {edge.grown for edge in rewriting.edges().values()}
    for carrier, fmt in rewriting.carriers.items():
        for user in carrier.users:
            if fmt is None or user in known or kind(user) != "cat":
                continue
            role, token_dim = value_of(carrier).role, value_of(carrier).token_dim
            if _source_reason(user, token_dim, returned, rewriting) is None:
                edge = _edge(role, user, token_dim, fmt, returned, rewriting)
                if edge.past is carrier:
                    rewriting.lone_edges.append(edge)


def _place_windows(rewriting: Rewriting) -> None:
    """A row for where each window begins, behind those of its carriers."""
    for site in rewriting.sites:
        number = rewriting.window_of(site)
        if number is not None and number not in rewriting.rows:
            last = max(rewriting.row_of(carrier) for carrier in number.carriers)
            rewriting.rows.insert(last + 1, number)
