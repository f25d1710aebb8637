"""Take tensors that hold several caches apart, so that each is seen for itself.

Before (keys and values fused; ``past`` is ``[B, H, T, 2 D]``):
    both = cat([past, cat([new_key, new_value], -1)], 2)           # returned
    out  = attention(query, both[..., :D], both[..., D:])
After:
    key = cat([past_key, new_key], 2);  value = cat([past_value, new_value], 2)
    out = attention(query, key, value);  return out, key, value    # which the boundary joins

Before (stacked; ``past`` is ``[layers, 2, B, H, T, D]``):
    key = cat([past[0, 0], new_key], 2);  ...;  return stack([stack([key, value]), ...])
After:
    key = cat([past_0_0, new_key], 2);  ...;  return key, value, ...

Where a cache is inside of such a tensor says a lens (:mod:`squat_fx.lenses`): what an attention
reads of what is returned, or of what something returned was stacked from. An input that arrives
joined becomes one input for each of its caches.

Leaves alone: tensors of which attentions do not read all, each number in one place; caches that are
read in windows there. :class:`PutBackTogether` undoes what came of no use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from squat_fx.joined import JoinedKV
from squat_fx.lenses import Join, Lens, are_all_of_it, origins, same_lens, view_through
from squat_fx.passes.axes import follow_views, token_dim_of
from squat_fx.passes.base import GraphPass
from squat_fx.passes.head_blocks import HeadBlocks, head_blocks
from squat_fx.passes.read_lenses import (
    built_as,
    built_from,
    pieces_of,
    read_part,
    view_of,
    views_above,
    views_below,
    views_up,
)
from squat_fx.passes.records import Attention, Block, CacheEdge, JoinedOutput, Rewriting
from squat_fx.passes.spelling import (
    argument,
    dim_of,
    flat_outputs,
    is_product,
    kind,
    parts_of,
    returned_nodes,
    shape_of,
    sizes_of,
    value_of,
    writers,
)
from squat_fx.state import QuantizedKV


@dataclass
class _Part:
    """A cache inside of a larger tensor: where, and the node that is it."""

    lens: Lens
    node: fx.Node
    token_dim: int


class TakeCachesApart(GraphPass):
    """Return caches in the place of what was put together from them."""

    name = "take caches apart"

    def run(self, rewriting: Rewriting) -> int:
        """See the module's docstring."""
        self._rewriting = rewriting
        self._readers: dict[fx.Node, tuple[fx.Node, str, str]] = {}
        self._inputs: dict[fx.Node, tuple[Join, list[fx.Node]]] = {}
        for node, join in rewriting.joined.items():
            if join is not None:
                self._take_input_apart(node, join)
        returned = returned_nodes(rewriting.graph)
        reads = self._reads(returned)
        outputs: list[Any] = []
        made: list[int | JoinedOutput] = []
        count = 0
        for node in flat_outputs(rewriting.graph):
            found = self._taken_apart(node, reads) if isinstance(node, fx.Node) else None
            if found is None:
                made.append(len(outputs))
                outputs.append(node)
                continue
            join, parts = found
            made.append(JoinedOutput(len(outputs), join, node))
            outputs.extend(parts)
            count += 1
        if count:
            rewriting.graph.output_node().args = (tuple(outputs),)
            rewriting.returned_as = made
        return count

    def _reads(self, returned: dict[fx.Node, Any]) -> dict[fx.Node, list[_Part]]:
        """The parts that attentions read of what is returned; notes whatever they read."""
        found: dict[fx.Node, list[_Part]] = {}
        for attention in self._rewriting.attentions:
            blocks = head_blocks(attention, returned)
            if blocks is not None:
                self._read_in_blocks(attention, blocks, found)
                continue
            for role in ("key", "value"):
                node = getattr(attention, role)
                for above in views_above(node, returned):
                    self._readers.setdefault(above, (node, role, attention.spelling))
                read = read_part(node, returned)
                token_dim = None if read is None else self._token_dim(read[2])
                if read is None or token_dim is None:
                    continue
                root, lens, part = read
                parts = found.setdefault(root, [])
                if all(p.node is not part for p in parts):
                    parts.append(_Part(lens, part, token_dim))
        return found

    def _read_in_blocks(
        self, attention: Attention, blocks: HeadBlocks, found: dict[fx.Node, list[_Part]]
    ) -> None:
        """Note that an attention reads its keys head by head, and a part of its values."""
        values = found.setdefault(blocks.values, [])
        if all(part.node is not blocks.value for part in values):
            values.append(_Part(blocks.lens, blocks.value, 2))
        keys = found.setdefault(blocks.keys, [])
        noted: list[Block] = []
        for i in range(blocks.count):
            lens: Lens = (("narrow", (1, i * blocks.kv_heads, blocks.kv_heads)),)
            part = next((p for p in keys if p.lens == lens), None)
            if part is None:
                part = _Part(lens, _taken(blocks.keys, lens, blocks.keys, self._rewriting.made), 2)
                keys.append(part)
            heads = i * blocks.query_heads, blocks.query_heads
            noted.append(Block(heads, part.node, blocks.value))
        self._rewriting.blocks[attention.output] = noted

    def _token_dim(self, node: fx.Node) -> int | None:
        """The dim of tokens of what an attention reads views of."""
        if node not in self._readers or len(shape_of(node) or ()) != 4:
            return None
        read, role, spelling = self._readers[node]
        followed = follow_views(read, lambda n: n is node)
        return None if isinstance(followed, str) else token_dim_of(followed, role, spelling)

    def _leaves(self, node: fx.Node, lens: Lens = ()) -> list[_Part] | None:
        """The caches that something is put together from; None if there is something else."""
        token_dim = self._token_dim(node)
        if token_dim is not None:
            for built, where in views_up(node, lens):
                if kind(built) == "cat" and (dim := self._token_dim(built)) is not None:
                    return [_Part(where, built, dim)]
            return [_Part(lens, node, token_dim)]
        parts: list[_Part] = []
        for piece, where in pieces_of(node) or ():
            found = self._leaves(piece, (*lens, *where))
            if found is None:
                return None
            parts += found
        return parts or None

    def _taken_apart(
        self, node: fx.Node, reads: dict[fx.Node, list[_Part]]
    ) -> tuple[Join, list[fx.Node]] | None:
        """How a tensor that is returned is put together, and from which caches."""
        if writers(node):
            return None
        own = reads.get(node, [])
        if any(not part.lens for part in own):
            return None  # it is a cache itself
        parts = own or (self._leaves(node) if node not in self._readers else None)
        parts = parts or self._grown_beside(node)
        join = _join(parts, sizes_of(node)) if parts else None
        if parts is None or join is None or (own and _is_buffer(node, join)):
            return None
        if own:
            nodes = self._parts_of_one(node, own, join)
        else:
            nodes = [part.node for part in parts]
            for part in parts:
                self._name_past(part)
        for known, _ in self._inputs.values():  # so that caches that come and go look alike
            order = known.order_in(join)
            if order is not None:
                return known, [nodes[i] for i in order]
        return join, nodes

    def _grown_beside(self, node: fx.Node) -> list[_Part] | None:
        """The caches in a past and all that is new, where each attention reads its own past and its
        own new tokens.
        """
        if kind(node) != "cat" or len(parts_of(node)) != 2:
            return None
        past, new = parts_of(node)
        parts: list[_Part] = []
        for built, lens in built_from(new):
            for user in list(built.users):
                pair = parts_of(user) if kind(user) == "cat" else ()
                token_dim = self._token_dim(user)
                if len(pair) != 2 or pair[1] is not built or token_dim is None:
                    continue
                part = _Part(lens, user, token_dim)
                self._name_past(part)
                if self._is_part(parts_of(user)[0], past, lens):
                    parts.append(part)
        join = _join(parts, sizes_of(node)) if parts else None
        return parts if join is not None and _grows(node, join) else None

    def _is_part(self, node: fx.Node, whole: fx.Node, lens: Lens) -> bool:
        """Whether a node is the part of ``whole`` behind a lens."""
        join, parts = self._inputs.get(whole, (None, []))
        if join is not None and node in parts:
            return same_lens(join.lenses[parts.index(node)], lens, sizes_of(whole))
        found = (where for view, where in views_below(whole) if view is node)
        return any(same_lens(where, lens, sizes_of(whole)) for where in found)

    def _parts_of_one(self, node: fx.Node, parts: list[_Part], join: Join) -> list[fx.Node]:
        """The nodes that take the place of what attentions read of ``node``."""
        made = []
        for i, part in enumerate(parts):
            if _grows(node, join):
                taken = self._grown(node, join, i)
            else:
                taken = built_as(node, part.lens) or part.node
            if taken is not part.node:
                self._replace(part.node, taken)
            made.append(taken)
        return made

    def _grown(self, node: fx.Node, join: Join, part: int) -> fx.Node:
        """Part ``part`` of a past and new tokens: their parts, concatenated."""
        past, new = parts_of(node)
        lens = join.lenses[part]
        old, taken = self._past(past, join, part), _taken(new, lens, new, self._rewriting.made)
        with node.graph.inserting_after(max(node, old, taken)):
            target: Any = node.target
            cat = node.graph.call_function(
                target, ([old, taken], join.part_dim(part, join.token_dim))
            )
        cat.meta.update(node.meta, example_value=view_through(lens, value_of(node)))
        cat.meta.pop("val", None)
        self._rewriting.made.append(cat)
        return cat

    def _past(self, past: fx.Node, join: Join, part: int) -> fx.Node:
        """Part ``part`` of a past that is a tensor like what is returned."""
        if past in self._rewriting.joined and past not in self._inputs:
            self._take_input_apart(past, join)
        if past in self._inputs:
            known, nodes = self._inputs[past]
            for lens, node in zip(known.lenses, nodes, strict=True):
                if same_lens(lens, join.lenses[part], sizes_of(past)):
                    return node
        return _taken(past, join.lenses[part], _last_input(past.graph), self._rewriting.made)

    def _name_past(self, part: _Part) -> None:
        """An input of its own for the past of a cache, if that is a part of an input that may
        arrive joined.
        """
        past = next(iter(parts_of(part.node)), None) if kind(part.node) == "cat" else None
        source = past
        while isinstance(source, fx.Node) and (above := view_of(source)) is not None:
            source = above[0]
        rewriting = self._rewriting
        if not isinstance(source, fx.Node) or source not in rewriting.joined:
            return
        if source in self._inputs:
            return
        parts = [
            _Part(lens, node, _token_dim_below(node))
            for node, lens in views_below(source)
            if any(kind(u) == "cat" and parts_of(u)[0] is node for u in node.users)
        ]
        join = _join(parts, sizes_of(source)) if parts else None
        if join is not None:
            self._take_input_apart(source, join)

    def _take_input_apart(self, whole: fx.Node, join: Join) -> None:
        """An input for each cache in ``whole``, in the place of all views that lead to one."""
        rewriting, after, nodes = self._rewriting, whole, []
        value = value_of(whole)
        values = value.outlines() if isinstance(value, JoinedKV) else join.parts(value)
        for i, part in enumerate(values):
            with rewriting.graph.inserting_after(after):
                after = rewriting.graph.placeholder(f"{whole.name}_part_{i}")
            after.meta["example_value"] = part
            _give_source(after, whole, f"part_{i}")
            nodes.append(after)
            if rewriting.joined[whole] is None:
                rewriting.carriers[after] = None
            elif isinstance(part, QuantizedKV):
                rewriting.carriers[after] = part.format
            if after in rewriting.carriers:
                rewriting.rows.append(after)
        if whole in rewriting.carriers:
            del rewriting.carriers[whole]
            rewriting.rows = [row for row in rewriting.rows if row is not whole]
        rewriting.made += nodes
        rewriting.placeholders = (*rewriting.placeholders, *nodes)
        rewriting.joined[whole] = join
        rewriting.taken_apart[whole] = tuple(nodes)
        self._inputs[whole] = join, nodes
        for node, lens in views_below(whole):
            for part_lens, part in zip(join.lenses, nodes, strict=True):
                if same_lens(lens, part_lens, sizes_of(whole)):
                    self._replace(node, part)

    def _replace(self, old: fx.Node, new: fx.Node) -> None:
        rewriting = self._rewriting
        rewriting.attentions = [
            replace(
                attention,
                key=new if attention.key is old else attention.key,
                value=new if attention.value is old else attention.value,
            )
            for attention in rewriting.attentions
        ]
        for blocks in rewriting.blocks.values():
            blocks[:] = [
                replace(
                    block,
                    key=new if block.key is old else block.key,
                    value=new if block.value is old else block.value,
                )
                for block in blocks
            ]
        for user in list(old.users):
            if user is not new and user.op != "output":
                user.replace_input_with(old, new)
                rewriting.replaced.append((user, old, new))


class PutBackTogether(GraphPass):
    """Undo what was taken apart where no attention over its parts was rewritten."""

    name = "put back together"

    def run(self, rewriting: Rewriting) -> int:
        """See the class; returns how many tensors are as they were."""
        edges = rewriting.edges()
        undone = self._outputs(rewriting, edges) + self._inputs(rewriting, edges)
        for user, old, new in reversed(rewriting.replaced):
            if new in undone and new in user.all_input_nodes:
                user.replace_input_with(new, old)
        for node in sorted(rewriting.made, reverse=True):
            if not node.users and (node.op != "placeholder" or node in undone):
                rewriting.graph.erase_node(node)
        return len(undone)

    def _outputs(self, rewriting: Rewriting, edges: dict[fx.Node, CacheEdge]) -> list[fx.Node]:
        """Return what was returned before; gives the parts that are not."""
        outputs = flat_outputs(rewriting.graph)
        made: list[int | JoinedOutput] = []
        kept: list[Any] = []
        undone: list[fx.Node] = []
        for output in rewriting.returned_as:
            first = output if isinstance(output, int) else output.first
            count = 1 if isinstance(output, int) else len(output.join.lenses)
            parts = outputs[first : first + count]
            if isinstance(output, int):
                made.append(len(kept))
                kept += parts
            elif any(part in edges for part in parts):
                made.append(JoinedOutput(len(kept), output.join, output.whole))
                kept += parts
            else:
                made.append(len(kept))
                kept.append(output.whole)
                undone += parts
        if undone:
            rewriting.graph.output_node().args = (tuple(kept),)
            is_as_it_was = all(isinstance(output, int) for output in made)
            rewriting.returned_as = [] if is_as_it_was else made
        return undone

    def _inputs(self, rewriting: Rewriting, edges: dict[fx.Node, CacheEdge]) -> list[fx.Node]:
        """Take inputs whole that may, but do not, arrive packed; gives their parts."""
        pasts = {edge.past for edge in edges.values()}
        undone: list[fx.Node] = []
        for whole, parts in list(rewriting.taken_apart.items()):
            if not isinstance(value_of(whole), JoinedKV) and not pasts & set(parts):
                undone += parts
                del rewriting.taken_apart[whole]
                rewriting.joined[whole] = None
        for part in undone:
            del rewriting.carriers[part]
            rewriting.rows.remove(part)
        rewriting.placeholders = tuple(n for n in rewriting.placeholders if n not in undone)
        return undone


def _join(parts: list[_Part], sizes: tuple[Any, ...]) -> Join | None:
    """How a tensor of such sizes is put together from ``parts``; None if that is not all of it, or
    not of caches that have their batch and their tokens in the same place.
    """
    found = [origins(part.lens, len(sizes)) for part in parts]
    touched = frozenset().union(*(dims for _, dims in found))
    fixed = tuple(size if d in touched else None for d, size in enumerate(sizes))
    if any(not isinstance(fixed[d], int) for d in touched):
        return None
    places = {(dims[0], dims[p.token_dim]) for p, (dims, _) in zip(parts, found, strict=True)}
    if len(places) != 1 or not are_all_of_it([p.lens for p in parts], fixed):
        return None
    batch, tokens = places.pop()
    if batch is None or tokens is None or {batch, tokens} & touched:
        return None
    return Join(tuple(part.lens for part in parts), fixed, tokens)


def _grows(node: fx.Node, join: Join) -> bool:
    """Whether a node is a past and new tokens."""
    if kind(node) != "cat" or len(parts_of(node)) != 2:
        return False
    shape = sizes_of(node)
    shapes = [shape_of(part) for part in parts_of(node)]
    is_alike = all(s is not None and len(s) == len(shape) for s in shapes)
    return is_alike and dim_of(argument(node, 1, "dim", 0), shape) == join.token_dim


def _is_buffer(node: fx.Node, join: Join) -> bool:
    """Whether something is an input like it, changed other than by appending to it."""
    if _grows(node, join) or is_product(node):
        return False
    seen, stack = {node}, [node]
    while stack:
        for above in stack.pop().all_input_nodes:
            shape = shape_of(above)
            if above in seen or len(shape or ()) != len(join.sizes) or is_product(above):
                continue
            seen.add(above)
            stack.append(above)
            alike = (a == b for a, b in zip(shape or (), join.sizes, strict=True) if b is not None)
            if above.op == "placeholder" and all(alike):
                return True
    return False


def _taken(x: fx.Node, lens: Lens, after: fx.Node, made: list[fx.Node]) -> fx.Node:
    """The part of ``x`` behind a lens, which may be new views of it; notes those."""
    built = built_as(x, lens)
    if built is not None:
        return built
    value, after = value_of(x), max(x, after)
    for name, arguments in lens:
        value = getattr(value, name)(*arguments)
        with x.graph.inserting_after(after):
            after = x = x.graph.call_method(name, (x, *arguments))
        x.meta["example_value"] = value
        made.append(x)
    return x


def _token_dim_below(past: fx.Node) -> int:
    """The dim on which a past is concatenated to."""
    cat = next(u for u in past.users if kind(u) == "cat")
    return dim_of(argument(cat, 1, "dim", 0), sizes_of(cat))


def _last_input(graph: fx.Graph) -> fx.Node:
    return max(graph.find_nodes(op="placeholder"))


def _give_source(part: fx.Node, whole: fx.Node, name: str) -> None:
    from torch._dynamo.source import AttrSource

    source = getattr(whole, "_dynamo_source", None)
    if source is not None:
        part._dynamo_source = AttrSource(source, name)  # pyright: ignore[reportAttributeAccessIssue]
