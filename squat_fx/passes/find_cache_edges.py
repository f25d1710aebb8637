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
from squat_fx.passes.axes import Followed, follow_views, token_dim_of
from squat_fx.passes.base import GraphPass
from squat_fx.passes.latent import latent_reason
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
    is_product,
    kind,
    memory_of,
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
            found = _sites(attention, layer, count, returned, rewriting)
            if isinstance(found, str):
                rewriting.skipped.append(Skipped(attention.output.name, found, layer))
            else:
                rewriting.sites.extend(found)
        self._agree(rewriting)
        _find_lone_edges(rewriting, returned)
        _place_windows(rewriting)
        if not rewriting.attentions and not rewriting.skipped:
            rewriting.skipped.extend(_unread(rewriting, returned))
        return len(rewriting.sites)

    def _agree(self, rewriting: Rewriting) -> None:
        """Attentions that share a cache must agree on its format, and on the keys whose tokens
        values keep; the first one decides. A cache grows if the queries of one of them come with
        its keys.
        """
        edges: dict[fx.Node, CacheEdge] = {}
        keys: dict[fx.Node, fx.Node] = {}
        refused: dict[fx.Node, Skipped] = {}
        for site in rewriting.sites:
            pair, output = (site.key, site.value), site.attention.output
            chosen_by = keys.setdefault(site.value.stored, site.key.stored)
            keeps_part = site.value.fmt.stored_layout.keeps_part
            is_other = keeps_part and chosen_by is not site.key.stored
            known = [edges.get(e.stored, e) for e in pair]
            is_other |= any(
                k != replace(e, grows=k.grows) for k, e in zip(known, pair, strict=True)
            )
            if is_other:
                reason = "shares its cache with a layer that stores it differently"
                refused[output] = Skipped(output.name, reason, site.layer)
            elif output not in refused:
                edges |= {e.stored: e for e in pair if e.grows or e.stored not in edges}
        rewriting.skipped.extend(refused.values())
        rewriting.sites = [
            replace(site, key=edges[site.key.stored], value=edges[site.value.stored])
            for site in rewriting.sites
            if site.attention.output not in refused
        ]


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


def _sites(
    attention: Attention, layer: int, count: int, returned: Returned, rewriting: Rewriting
) -> list[AttentionSite] | str:
    """The site of an attention, or one for each block of its heads, or why there is none."""
    blocks = rewriting.blocks.get(attention.output)
    if blocks is None:
        found = _site(attention, None, layer, count, returned, rewriting)
        return found if isinstance(found, str) else [found]
    sites: list[AttentionSite] = []
    for block in blocks:  # its keys are read as they are, and not as an eager product reads them
        part = replace(attention, key=block.key, value=block.value, spelling="sdpa")
        found = _site(part, block.heads, layer, count, returned, rewriting)
        if isinstance(found, str):
            return found
        sites.append(found)
    return sites


def _site(
    attention: Attention,
    heads: tuple[int, int] | None,
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
            return latent_reason(attention, role, returned) or f"{role} {found}"
        token_dim = token_dim_of(found, role, attention.spelling)
        if reason := _source_reason(found.source, token_dim or 2, returned, rewriting):
            return latent_reason(attention, role, returned) or f"{role} {reason}"
        if token_dim is None:
            return f"{role} {OTHER_AXES}"
        followed.append(found)
        token_dims.append(token_dim)
    key, value = followed
    sizes = [usual_order(sizes_of(f.source), d) for f, d in zip(followed, token_dims, strict=True)]
    if reason := _tiled_reason(attention, key, value):
        return reason
    queries = _queries_per_kv(attention, heads, key, value, *sizes)
    if isinstance(queries, str):
        return queries
    for role, found, (_, _, tokens, _) in zip(ROLES, followed, sizes, strict=True):
        if reason := _buffer_reason(found.source, tokens, attention, rewriting):
            return f"{role} {reason}"
    _, kv_heads, _, key_dim = sizes[0]
    formats = rewriting.config.formats(layer, count, kv_heads, key_dim, sizes[1][3])
    if isinstance(formats, str):
        return formats
    found_edges = [
        _edge(role, source, token_dim, fmt, returned, rewriting)
        for role, source, token_dim, fmt in zip(
            ROLES, (key.source, value.source), token_dims, formats, strict=True
        )
    ]
    is_window = any(found.source is not _grown(found.source) for found in followed)
    key_edge, value_edge = (
        _settled(
            edge,
            edge.kind != "prefill" or _grows_with_the_query(attention, edge.sizes(edge.new)[2]),
            is_window,
        )
        for edge in found_edges
    )
    if key_edge.kind != value_edge.kind:
        return "keys arrive packed and values do not, or the other way round"
    basis = rewriting.config.basis(layer, key_edge.fmt, value_of(key.source).device)
    key_edge = replace(key_edge, given=basis)
    seen = None if key.source is key_edge.grown else key.source
    is_tiled = _is_tiled(key)
    return AttentionSite(attention, key_edge, value_edge, queries, layer, seen, is_tiled, heads)


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
    past = memory_of(parts[0])
    if _is_input(past) and (found := writers(past)):
        return f"is appended to a past that is changed in place by {describe(found[0])}"
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


def _buffer_reason(
    stored: fx.Node, tokens: Any, attention: Attention, rewriting: Rewriting
) -> str | None:
    """Why what is returned is made of an input like it in another way than by appending to that:
    what was packed would be rounded again at every call.
    """
    if kind(stored) == "cat":
        past, new = parts_of(stored)
        source = memory_of(past)
        if _is_input(source) or len(sizes_of(past)) != len(sizes_of(stored)):
            return None
        if _is_input(memory_of(new)):
            return "is a concatenation of new tokens and of a past behind them"
        if _comes_from_cache(stored, [past], rewriting, argument(stored, 1, "dim", 0)):
            return (
                f"is appended to what {describe(source)} makes of a graph input, not to a past as "
                "it was returned"
            )
        return None
    if _grows_with_the_query(attention, tokens):
        return None
    if _comes_from_cache(stored, stored.all_input_nodes, rewriting):
        return f"is a buffer of fixed size, written by {describe(stored)}; {GROW}"
    return None


def _is_input(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "placeholder"


def _comes_from_cache(
    stored: fx.Node, above: list[fx.Node], rewriting: Rewriting, token_dim: int | None = None
) -> bool:
    """Whether nodes come, other than by a product of matrices, from an input that is packed, or is
    shaped as ``stored`` is, but for the batch, and for the tokens if their dim is given.
    """
    shape = sizes_of(stored)
    free = {0} if token_dim is None else {0, dim_of(token_dim, shape)}
    seen, stack = {stored}, list(above)
    while stack:
        node = stack.pop()
        own = shape_of(node)
        if node in seen or own is None or is_product(node):
            continue
        seen.add(node)
        stack.extend(node.all_input_nodes)
        if not _is_input(node):
            continue
        packed = rewriting.carriers.get(node) or rewriting.joined.get(node)
        is_like = len(own) == len(shape) and all(
            dim in free or same_size(*sizes)
            for dim, sizes in enumerate(zip(own, shape, strict=True))
        )
        if packed is not None or is_like:
            return True
    return False


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
    attention: Attention,
    block: tuple[int, int] | None,
    key: Followed,
    value: Followed,
    keys: Sizes,
    values: Sizes,
) -> int | str:
    """Query heads per KV head: the repeat in the graph, and what SDPA's ``enable_gqa`` leaves.

    ``keys`` and ``values``: sizes of the cache as batch, heads, tokens and channels. ``block``:
    which query heads are meant, if not all of them are.
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
    heads = leading[0][1] if block is None else block[1]
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


def _settled(edge: CacheEdge, grows: bool, is_window: bool) -> CacheEdge:
    """``edge``, all of whose tokens are kept if it is read as a window, which forgets by itself, or
    comes from elsewhere than the queries that could choose.
    """
    whole = is_window or edge.is_window or not grows
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
