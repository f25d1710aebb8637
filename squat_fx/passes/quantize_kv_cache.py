"""Rewrite the cache edges and attentions that were found.

Before (prefill):
    key = cat([empty, new_key], -2);  out = attention(query, key, value);  return out, key, value
After:
    arenas = squat_fx.store(key, valid, query);  out = attention(query, key, value)
    row, queries_at, keys_at, there = squat_fx.judged_tokens(key, valid)
    judged = query[row, :, queries_at], key[row, :, keys_at], value[row, :, keys_at]
    ...
    errors = squat_fx.attend_errors(*judged of all layers, *arenas of all layers, ...)
    return out, *arenas, ..., errors

Before (decode):
    key = cat([past_key, new_key], -2);  out = attention(query, key, value);  return out, key, value
After:
    out = squat_fx.attend(query, new_key, new_value, *key_arenas, *value_arenas, positions, ...)
    squat_fx.append_(*key_arenas, new_key, valid, positions, ..., after=[out]);  return out

Attention always sees the new tokens exactly, beside the packed past; then they are appended. What
the store of a prompt does to attention is measured unless ``guard="off"``.

Leaves alone: attention that was skipped. If it reads a carrier, it gets the dequantized tensor, and
the carrier still grows packed. Keeps: shapes, dtypes and metadata of every surviving node, and the
order of outputs.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from squat_fx.codecs import codec_from_spec
from squat_fx.kernels import ops
from squat_fx.layouts.kept import MOVED
from squat_fx.passes.base import GraphPass
from squat_fx.passes.canonicalize import dropout_is_active
from squat_fx.passes.judge_prompts import Chosen, Judged, errors_of, which
from squat_fx.passes.one_mask import one_mask, terms_of
from squat_fx.passes.records import (
    AttentionSite,
    CacheEdge,
    InnerInput,
    InnerOutput,
    Rewriting,
)
from squat_fx.passes.spelling import (
    describe,
    flat_outputs,
    kind,
    memory_of,
    reads_size,
    shape_of,
    size_of,
    sizes_of,
    source_of,
    symbols_of,
    value_of,
    writers,
    written_by,
)

SAME_SCALE = 1e-6


class QuantizeKVCache(GraphPass):
    """Insert the ops, replace the outputs, drop what nobody reads."""

    name = "quantize kv cache"

    def run(self, rewriting: Rewriting) -> int:
        """See the module's docstring."""
        edges = rewriting.edges()
        self._masks: dict[tuple[Any, ...], fx.Node | None] = {}
        self._valid: dict[tuple[fx.Node, Any], fx.Node] = {}
        self._arenas: dict[fx.Node, list[fx.Node]] = {}
        self._given: dict[fx.Node, fx.Node] = {}
        self._turned: dict[fx.Node, fx.Node] = {}
        self._results: dict[fx.Node, list[tuple[tuple[int, int] | None, fx.Node]]] = {}
        self._placed: dict[fx.Node, fx.Node] = {}  # the last op of ours that was put after a node
        readers: dict[fx.Node, list[fx.Node]] = {edge.stored: [] for edge in edges.values()}
        for site in rewriting.sites:
            if site.kind != "prefill":
                reader = self._attend(site, rewriting)
            else:
                reader = site.attention.output
            readers[site.key.stored].append(reader)
            readers[site.value.stored].append(reader)
        stored: dict[fx.Node, list[fx.Node]] = {}
        for edge in edges.values():
            if edge.kind == "read":
                continue
            if edge.kind == "decode":
                self._append(edge, readers[edge.stored], rewriting)
            else:
                guides = self._query_of(edge, rewriting), _keys_of(edge, stored, rewriting)
                stored[edge.stored] = self._store(edge, guides, readers[edge.stored], rewriting)
        _replace_outputs(rewriting, edges, stored, self._errors(stored, readers, rewriting))
        drop_dead(rewriting.graph)
        _settle_inputs(rewriting, self._arenas)
        return len(edges)

    def _carrier_arenas(self, edge: CacheEdge, rewriting: Rewriting) -> list[fx.Node]:
        """Placeholders for the arenas of the edge's carrier, made on first use."""
        carrier = edge.carrier
        if carrier not in self._arenas:
            graph, nodes = rewriting.graph, []
            after = carrier
            for name in edge.fmt.arena_names:
                with graph.inserting_after(after):
                    after = graph.placeholder(f"{carrier.name}_{name}")
                nodes.append(after)
            self._arenas[carrier] = nodes
        return self._arenas[carrier]

    def _attend(self, site: AttentionSite, rewriting: Rewriting) -> fx.Node:
        attention, graph = site.attention, rewriting.graph
        key, value = (
            self._carrier_arenas(site.key, rewriting),
            self._carrier_arenas(site.value, rewriting),
        )
        output = attention.output
        with graph.inserting_before(output):
            query = four_dim_query(site, graph)
            attend = graph.call_function(
                ops.overload("attend", site.key.fmt.layout, site.value.fmt.layout),
                (
                    query,
                    *(self._new(edge) for edge in (site.key, site.value)),
                    *key,
                    *value,
                    rewriting.positions(),
                    rewriting.row_of(site.key.carrier),
                    rewriting.row_of(site.value.carrier),
                    _first_row(site, rewriting),
                    self._mask(site, graph),
                    attention.sinks,
                    attention.scale,
                    attention.causal,
                    attention.softcap,
                    site.key.fmt.to_ints(),
                    site.value.fmt.to_ints(),
                ),
            )
            attend.meta["squat_layer"] = site.layer
            self._results.setdefault(output, []).append((site.heads, attend))
            result = self._all_heads(output)
            if result is None:
                return attend
            if value_of(site.key.new).dtype != value_of(output).dtype:
                result = graph.call_method("to", (attend, value_of(output).dtype))
            if site.tiled:
                result = _regrouped(result, site.key.sizes(site.key.new)[1], graph)
            replacement = result
            if len(sizes_of(output)) == 3:  # batch and heads are merged
                replacement = graph.call_method("flatten", (result, 0, 1))
            elif _is_token_major(output):
                replacement = _token_major(result, graph)
        replacement.meta.update(output.meta)
        output.replace_all_uses_with(replacement)
        graph.erase_node(output)
        return attend

    def _all_heads(self, output: fx.Node) -> fx.Node | None:
        """What the sites of an attention make of its query heads, once all of them are there."""
        made = self._results[output]
        if made[0][0] is None:
            return made[0][1]
        if sum(heads[1] for heads, _ in made if heads) < sizes_of(output)[1]:
            return None
        return output.graph.call_function(torch.cat, ([node for _, node in made], 1))

    def _append(self, edge: CacheEdge, readers: list[fx.Node], rewriting: Rewriting) -> None:
        graph = rewriting.graph
        arenas = self._carrier_arenas(edge, rewriting)
        new = self._usual(edge, edge.new)
        valid = self._valid_tokens(_site_of(edge, rewriting), new, readers)
        row = rewriting.row_of(edge.carrier)
        tail = (rewriting.positions(), row, edge.fmt.codec, edge.fmt.to_ints(), readers)
        place = _latest(*readers, new, valid)
        with graph.inserting_after(self._placed.get(place, place)):
            self._placed[place] = graph.call_function(
                ops.overload("append_", edge.fmt.layout), (*arenas, new, valid, *tail)
            )

    def _store(
        self,
        edge: CacheEdge,
        guides: tuple[fx.Node | None, fx.Node | None],
        readers: list[fx.Node],
        rewriting: Rewriting,
    ) -> list[fx.Node]:
        """``guides``: the queries of the prompt, and what says which tokens the keys keep."""
        graph, (query, keys) = rewriting.graph, guides
        stored = self._usual(edge, edge.stored)
        valid = self._valid_tokens(_site_of(edge, rewriting), stored, readers)
        given = edge.given
        if isinstance(given, Tensor):
            name = f"{edge.stored}_{edge.fmt.stored_layout.given}"
            given = _constant(given, name, rewriting)
        if given is not None and edge.fmt.stored_layout.shared:
            self._given[edge.stored] = given
        arguments = (
            stored,
            valid,
            query,
            given,
            edge.role,
            edge.fmt.codec,
            edge.fmt.to_ints(),
            *([] if keys is None else [keys]),
        )
        place = _latest(stored, valid, query, given, keys)
        with graph.inserting_after(self._placed.get(place, place)):
            store = graph.call_function(ops.overload("store", edge.fmt.layout), arguments)
        out: list[fx.Node] = []
        for index in range(len(edge.fmt.stored_names)):
            with graph.inserting_after(_latest(store, *out)):
                out.append(graph.call_function(operator.getitem, (store, index)))
        self._placed[place] = out[-1]
        return out

    def _errors(
        self,
        stored: dict[fx.Node, list[fx.Node]],
        readers: dict[fx.Node, list[fx.Node]],
        rewriting: Rewriting,
    ) -> fx.Node | None:
        """One tensor of the errors of all layers that lose something; notes which they are."""
        if rewriting.config.guard == "off":
            return None
        graph, chosen = rewriting.graph, {}
        alike: dict[Any, list[Judged]] = {}
        parts: dict[int, fx.Node] = {}
        for site in filter(_loses, rewriting.sites):
            if site.key.fmt.stored_layout.keeps_part:
                parts[site.layer] = self._error_of_a_part(site, stored, rewriting)
                continue
            judged = self._judged(site, stored, readers[site.key.stored], chosen, graph)
            alike.setdefault(judged.alike, []).append(judged)
        layers = [each.site.layer for group in alike.values() for each in group]
        rewriting.watched = (*layers, *parts)
        if not rewriting.watched:
            return None
        with torch.inference_mode(False):
            rewriting.due = torch.ones((), dtype=torch.int64)
        due = _constant(rewriting.due, "judge_this_prompt", rewriting) if alike else None
        with graph.inserting_before(graph.output_node()):
            errors = [errors_of(group, due, graph) for group in alike.values()]
            if parts:
                errors.append(graph.call_function(torch.stack, (list(parts.values()),)))
            devices = {value_of(site.key.stored).device for site in rewriting.sites}
            if len(devices) > 1:
                errors = [graph.call_method("cpu", (x,)) for x in errors]
            return errors[0] if len(errors) == 1 else graph.call_function(torch.cat, (errors,))

    def _error_of_a_part(
        self, site: AttentionSite, stored: dict[fx.Node, list[fx.Node]], rewriting: Rewriting
    ) -> fx.Node:
        """The error of a layer that does not store all tokens, of no dims: of the output itself."""
        attention, graph = site.attention, rewriting.graph
        arenas = [node for edge in (site.key, site.value) for node in stored[edge.stored]]
        with graph.inserting_before(attention.output):
            query = four_dim_query(site, graph)
            mask = self._mask(site, graph)
        place = _latest(attention.output, *arenas)
        with graph.inserting_before(self._placed.get(place, place).next):
            output = attention.output
            if len(sizes_of(output)) == 3:
                output = graph.call_method("unflatten", (output, 0, (-1, _num_heads(site))))
            if site.tiled:
                output = _regrouped(output, site.num_queries_per_kv, graph)
            if site.heads:
                output = graph.call_method("narrow", (output, 1, *site.heads))
            return graph.call_function(
                ops.overload("attend_error", site.key.fmt.layout, site.value.fmt.layout),
                (
                    query,
                    output,
                    *arenas,
                    self._given.get(site.key.stored),
                    mask,
                    attention.sinks,
                    attention.scale,
                    attention.causal,
                    attention.softcap,
                    site.key.fmt.to_ints(),
                    site.value.fmt.to_ints(),
                ),
            )

    def _judged(
        self,
        site: AttentionSite,
        stored: dict[fx.Node, list[fx.Node]],
        readers: list[fx.Node],
        chosen: dict[Any, Chosen],
        graph: fx.Graph,
    ) -> Judged:
        """Keep what a layer is judged by, as soon as it has been stored."""
        arenas = [node for edge in (site.key, site.value) for node in stored[edge.stored]]
        key, value = (self._usual(edge, edge.stored) for edge in (site.key, site.value))
        valid = self._valid_tokens(site, key, readers)
        with graph.inserting_before(site.attention.output):
            query = four_dim_query(site, graph)
            mask = self._mask(site, graph)
        same = which(key, valid, site)
        if same not in chosen:
            with graph.inserting_before(_latest(key, valid).next):
                chosen[same] = Chosen.of(key, valid, site, graph)
        tokens = chosen[same]
        kept = []
        for x, at in zip((query, key, value), tokens.places, strict=True):
            # At once, so that nothing else of a layer is alive when the next one begins.
            with graph.inserting_before(_latest(x, at, tokens.all[0]).next):
                kept.append(tokens.kept(x, at, graph))
        with graph.inserting_before(site.attention.output):
            mask = tokens.mask(mask, graph)
        given = self._given.get(site.key.stored)
        return Judged(site, tokens, tuple(kept), tuple(arenas), given, mask)

    def _query_of(self, edge: CacheEdge, rewriting: Rewriting) -> fx.Node | None:
        """The queries of the prompt, if the codec of an edge wants to see them."""
        taps = codec_from_spec(edge.fmt.codec).taps(edge.role)
        if "query" not in taps:
            return None
        for site in rewriting.sites:
            if edge.stored in (site.key.stored, site.value.stored):
                graph = rewriting.graph
                with graph.inserting_before(site.attention.output):
                    query = four_dim_query(site, graph)
                    scale = site.attention.scale * edge.fmt.head_dim**0.5
                    if "scores" in taps and abs(scale - 1.0) > SAME_SCALE:
                        query = graph.call_function(operator.mul, (query, scale))
                    return _newest_like(edge, query)
        return None

    def _new(self, edge: CacheEdge) -> fx.Node | None:
        """The new tokens of an edge, if there are any, as [batch, heads, tokens, channels]."""
        return self._usual(edge, edge.new) if edge.kind == "decode" else None

    def _usual(self, edge: CacheEdge, node: fx.Node) -> fx.Node:
        """A node of an edge as [batch, heads, tokens, channels]."""
        if edge.token_dim == 2:
            return node
        if node not in self._turned:
            with node.graph.inserting_after(node):
                turned = node.graph.call_function(torch.transpose, (node, 1, 2))
            turned.meta["val"] = value_of(node).transpose(1, 2)
            self._turned[node] = turned
        return self._turned[node]

    def _mask(self, site: AttentionSite, graph: fx.Graph, as_written: bool = True) -> Any:
        """One node for all that is added to a site's scores, shared by sites that add the same."""
        terms = terms_of(site.attention, as_written)
        heads = _num_heads(site)
        key = (heads, *terms)
        if key not in self._masks or any(writers(term.node) for term in terms):
            self._masks[key] = one_mask(terms, heads, graph)
        return self._masks[key]

    def _valid_tokens(
        self, site: AttentionSite | None, new: fx.Node, readers: list[fx.Node]
    ) -> fx.Node | None:
        """Which of the new tokens are no padding: one node per mask and number of tokens.

        It stands where the first attention reads the mask, which may be filled in place until then.
        """
        if site is None or not terms_of(site.attention):
            return None
        graph = new.graph
        with graph.inserting_before(min(readers)):
            mask = self._mask(site, graph, as_written=False)
            key = (mask, sizes_of(new)[2])
            if key not in self._valid:
                self._valid[key] = graph.call_function(
                    torch.ops.squat_fx.valid_tokens.default, (mask, new)
                )
        return self._valid[key]


def _keys_of(
    edge: CacheEdge, stored: dict[fx.Node, list[fx.Node]], rewriting: Rewriting
) -> fx.Node | None:
    """What says which tokens the keys of some values keep, if these keep the same part."""
    if edge.role != "value" or not edge.fmt.stored_layout.keeps_part:
        return None
    key = next(site.key for site in rewriting.sites if site.value.stored is edge.stored)
    return stored[key.stored][key.fmt.stored_names.index(MOVED)]


def _newest_like(edge: CacheEdge, x: fx.Node) -> fx.Node:
    """As many of the newest tokens of ``x`` as are stored of a prompt, where the graph stands."""
    if not edge.is_window:
        return x
    return x.graph.node_copy(edge.stored, lambda node: x if node is edge.grown else node)


def _first_row(site: AttentionSite, rewriting: Rewriting) -> int:
    """The row that says where a window begins; -1 if all of the past is seen."""
    number = rewriting.window_of(site)
    return -1 if number is None else rewriting.row_of(number)


def four_dim_query(site: AttentionSite, graph: fx.Graph) -> fx.Node:
    """The query as [batch, heads, tokens, channels], in the dtype of the cache."""
    query = _in_dtype_of(site.attention.query, site.key.new, graph)
    if len(sizes_of(site.attention.query)) == 3:
        query = graph.call_method("unflatten", (query, 0, (-1, _num_heads(site))))
    if site.heads:
        return graph.call_method("narrow", (query, 1, *site.heads))
    return _regrouped(query, site.num_queries_per_kv, graph) if site.tiled else query


def _num_heads(site: AttentionSite) -> int:
    return site.num_queries_per_kv * site.key.sizes(site.key.stored)[1]


def _loses(site: AttentionSite) -> bool:
    """Whether a prompt's attention is over all tokens that are stored, and not all stay exact."""
    edges = site.key, site.value
    shapes = [shape_of(edge.stored) for edge in edges]
    is_exact = site.key.fmt.layout == site.value.fmt.layout == "dense"
    if site.kind != "prefill" or is_exact or any(0 in (shape or ()) for shape in shapes):
        return False
    tokens = {edge.sizes(edge.stored)[2] for edge in edges}
    tokens.add(sizes_of(site.attention.query)[-2])
    if len(tokens) == 1:
        return True
    # Where hooks break a model into pieces, one length has several symbols.
    examples = [value_of(edge.stored).shape[edge.token_dim] for edge in edges]
    examples.append(value_of(site.attention.query).shape[-2])
    lengths = {n if isinstance(n, int) else n.node.hint for n in examples}
    is_whole = not any(edge.is_window for edge in edges)
    return bool(site.attention.causal) and is_whole and len(lengths) == 1


def _regrouped(x: fx.Node, outer: int, graph: fx.Graph) -> fx.Node:
    """``x`` with its heads, ``outer`` groups of them, regrouped: the first of each come first."""
    apart = graph.call_method("unflatten", (x, 1, (outer, -1)))
    return graph.call_method("flatten", (graph.call_method("transpose", (apart, 1, 2)), 1, 2))


def _in_dtype_of(query: fx.Node, like: fx.Node, graph: fx.Graph) -> fx.Node:
    """The query in the dtype of the cache: before a cast if it was cast from that, else cast."""
    dtype = value_of(like).dtype
    while kind(query) == "cast" and value_of(query).dtype != dtype:
        query = source_of(query)
    return query if value_of(query).dtype == dtype else graph.call_method("to", (query, dtype))


def _constant(tensor: Tensor, name: str, rewriting: Rewriting) -> fx.Node:
    """A placeholder that is always fed ``tensor``."""
    with rewriting.graph.inserting_before(rewriting.placeholders[0]):
        node = rewriting.graph.placeholder(name)
    rewriting.constants[node] = tensor
    return node


def _is_token_major(output: fx.Node) -> bool:
    """Whether the output lies in memory as [batch, tokens, heads, channels], as fused SDPA's."""
    value = value_of(output)
    heads, tokens = (s.node.hint if isinstance(s, torch.SymInt) else s for s in value.stride()[1:3])
    return heads < tokens


def _token_major(node: fx.Node, graph: fx.Graph) -> fx.Node:
    """The same numbers in that order: what follows may be a ``view`` that only fits there."""
    swapped = graph.call_function(torch.transpose, (node, 1, 2))
    return graph.call_function(torch.transpose, (graph.call_method("contiguous", (swapped,)), 1, 2))


def drop_dead(graph: fx.Graph) -> None:
    """Erase what nothing needs; an in-place write is needed where its memory is.

    ``Graph.eliminate_dead_code`` drops a ``mask.masked_fill_(...)`` whose result nobody names, and
    keeps what is left of an attention, which counts as random.
    """
    live: set[fx.Node] = set()
    stack = [node for node in graph.nodes if _is_root(node)]
    followers = [(node, of) for node in graph.nodes if (of := _follows(node))]
    while stack:
        while stack:
            node = stack.pop()
            if node not in live:
                live.add(node)
                stack.extend(node.all_input_nodes)
        stack = [n for n, of in followers if n not in live and not live.isdisjoint(of)]
    for node in reversed(list(graph.nodes)):
        if node not in live:
            graph.erase_node(node)


def _is_root(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    if _follows(node) or kind(node) == "sdpa_lowered":
        return False
    if kind(node) == "dropout" and not dropout_is_active(node):
        return False
    return is_append(node) or _changes_levels(node) or node.is_impure()


def _changes_levels(node: fx.Node) -> bool:
    """Whether a node begins or ends a ``vmap`` or another transform, which masks are made by."""
    name = describe(node)
    return name.endswith("_nesting") or name == "lazy_load_decompositions"


def _follows(node: fx.Node) -> list[fx.Node]:
    """What must be live for a node without readers to be: the memory it writes to or asks about."""
    if is_append(node):
        return []
    if describe(node) == "_assert_tensor_metadata":
        return [
            memory for n in node.all_input_nodes if (memory := memory_of(n)).op != "placeholder"
        ]
    return [memory_of(written) for written in written_by(node)]


def is_append(node: fx.Node) -> bool:
    """Whether a node is our op ``append_``."""
    return describe(node) == "append_" and getattr(node.target, "namespace", "") == "squat_fx"


def _latest(*nodes: fx.Node | None) -> fx.Node:
    """The last of some nodes in the order of their graph."""
    return max(node for node in nodes if node is not None)


def _site_of(edge: CacheEdge, rewriting: Rewriting) -> AttentionSite | None:
    """The first attention over an edge; all over one cache see the same padding."""
    for site in rewriting.sites:
        if edge.stored in (site.key.stored, site.value.stored):
            return site
    return None


def _replace_outputs(
    rewriting: Rewriting,
    edges: dict[fx.Node, CacheEdge],
    stored: dict[fx.Node, list[fx.Node]],
    errors: fx.Node | None,
) -> None:
    """Return arenas where a cache was returned, and note how each flat output is made."""
    inner: list[Any] = []
    first: dict[fx.Node, int] = {}
    for node in flat_outputs(rewriting.graph):
        edge = edges.get(node)
        if edge is not None and edge.kind == "read":
            argument = rewriting.placeholders.index(edge.carrier)
            rewriting.outputs.append(InnerOutput("argument", argument=argument))
            continue
        if isinstance(node, fx.Node) and _is_known_size(value_of(node), rewriting):
            rewriting.outputs.append(InnerOutput("number", tokens=size_of(value_of(node))))
            continue
        if edge is None:
            rewriting.outputs.append(InnerOutput("value", first=len(inner)))
            inner.append(node)
            continue
        if edge.kind == "decode":
            argument = rewriting.placeholders.index(edge.carrier)
            tokens = edge.sizes(edge.new)[2]
            kept = edge.sizes(node)[2] if edge.is_window else None
            made = InnerOutput("appended", argument=argument, tokens=tokens, edge=edge, kept=kept)
            rewriting.outputs.append(made)
            continue
        if node not in first:
            first[node] = len(inner)
            inner.extend(stored[node])
        tokens, count = edge.sizes(node)[2], len(stored[node])
        made = InnerOutput("stored", first[node], count, tokens=tokens, edge=edge)
        rewriting.outputs.append(made)
    if errors is not None:
        inner.append(errors)
    rewriting.graph.output_node().args = (tuple(inner),)


def _is_known_size(value: Any, rewriting: Rewriting) -> bool:
    """Whether a scalar follows from the sizes of the inputs, so that no graph need compute it."""
    if not isinstance(value, torch.SymInt) or not rewriting.handles:
        return False
    inputs = (value_of(node) for node in rewriting.placeholders)
    known = {size_of(x) for x in inputs if isinstance(x, torch.SymInt)}
    for node in rewriting.placeholders:
        known |= set(shape_of(node) or ())
    return symbols_of(size_of(value)) <= known


def _settle_inputs(rewriting: Rewriting, arenas: dict[fx.Node, list[fx.Node]]) -> None:
    """Drop dead placeholders and note what feeds the others."""
    indices = {node: i for i, node in enumerate(rewriting.placeholders)}
    formats = {edge.past: edge.fmt for edge in rewriting.edges().values()}
    names = {
        node: (indices[carrier], name)
        for carrier, nodes in arenas.items()
        for node, name in zip(nodes, formats[carrier].arena_names, strict=True)
    }
    for node in rewriting.graph.find_nodes(op="placeholder"):
        if node in names:
            index, name = names[node]
            rewriting.inputs.append(InnerInput("arena", index, name))
        elif node in rewriting.constants:
            rewriting.inputs.append(InnerInput("constant", tensor=rewriting.constants[node]))
        elif node not in indices:
            rewriting.inputs.append(InnerInput("positions"))
        elif not node.users and (
            node in rewriting.carriers
            or rewriting.joined.get(node) is not None
            or isinstance(value_of(node), torch.SymInt)
        ):
            rewriting.graph.erase_node(node)
        else:
            is_packed = node in rewriting.carriers or rewriting.joined.get(node) is not None
            is_dense = is_packed and not all(reads_size(u) for u in node.users)
            rewriting.inputs.append(InnerInput("dense" if is_dense else "argument", indices[node]))
