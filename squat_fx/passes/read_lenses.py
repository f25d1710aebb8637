"""What a node is a view of, and what it is put together from, as lenses.

x[0], x.chunk(2, -1)[1], x.unbind(2)[0], x.view(...).permute(...)   # views: up to ``x``
cat([a, b], -1), stack([a, b]).flatten(2)                           # pieces: back to ``a``
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from squat_fx.lenses import Lens, origins, same_lens
from squat_fx.passes.spelling import (
    VIEWS,
    argument,
    describe,
    dim_of,
    kind,
    operand,
    parts_of,
    same_size,
    shape_of,
    sizes_of,
    value_of,
    writers,
)


def built_as(x: fx.Node, lens: Lens) -> fx.Node | None:
    """What was stacked or concatenated to become the part of ``x`` behind a lens."""
    for built, where in built_from(x):
        if built is not x and same_lens(where, lens, sizes_of(x)):
            return built
    return None


def built_from(node: fx.Node, lens: Lens = ()) -> Iterator[tuple[fx.Node, Lens]]:
    """A tensor, and all that it is stacked and concatenated from, each with where it is in it."""
    yield node, lens
    for piece, where in pieces_of(node) or ():
        yield from built_from(piece, (*lens, *where))


def pieces_of(node: fx.Node) -> list[tuple[fx.Node, Lens]] | None:
    """What a node is stacked, concatenated or viewed from, and where that is in it."""
    shape, step = shape_of(node), kind(node)
    if shape is None or writers(node):
        return None
    if step == "stack":
        dim = dim_of(argument(node, 1, "dim", 0), shape)
        return [(part, (("select", (dim, i)),)) for i, part in enumerate(parts_of(node))]
    if step == "cat":
        dim, start = dim_of(argument(node, 1, "dim", 0), shape), 0
        pieces: list[tuple[fx.Node, Lens]] = []
        for part in parts_of(node):
            sizes = shape_of(part) or ()
            if len(sizes) != len(shape) or not isinstance(sizes[dim], int):
                return None
            size = sizes[dim]
            pieces.append((part, (("narrow", (dim, start, size)),)))
            start += size
        return pieces
    source = operand(node)
    if step in ("view", "same", "transpose", "permute", "unsqueeze"):
        undone = _undone(node, source) if isinstance(source, fx.Node) else None
        return None if undone is None else [(source, undone)]
    return None


def views_up(node: fx.Node, lens: Lens) -> Iterator[tuple[fx.Node, Lens]]:
    """A node and what it is a view of, of as many dims, each with where it is."""
    yield node, lens
    if kind(node) in ("same", "transpose", "permute"):
        for source, where in pieces_of(node) or ():
            yield from views_up(source, (*lens, *where))


def views_above(node: fx.Node, returned: dict[fx.Node, Any]) -> Iterator[fx.Node]:
    """A node and what it is a view of, up to what is returned."""
    while True:
        yield node
        above = view_of(node)
        source = operand(node) if above is None else above[0]
        is_view = above is not None or kind(node) in VIEWS or kind(node) == "cast"
        if node in returned or not is_view or not isinstance(source, fx.Node):
            return
        node = source


def views_below(node: Any, lens: Lens = ()) -> Iterator[tuple[fx.Node, Lens]]:
    """All views of a node, each with where it is."""
    for user in list(node.users):
        is_several = isinstance(value_of(user), (tuple, list))
        for view in list(user.users) if is_several else [user]:
            found = view_of(view) if isinstance(value_of(view), Tensor) else None
            if found is not None and found[0] is node:
                here = (*lens, *found[1])
                yield view, here
                yield from views_below(view, here)


def read_part(node: fx.Node, returned: dict[fx.Node, Any]) -> tuple[fx.Node, Lens, fx.Node] | None:
    """What is returned of which an attention reads a part, where that part is, and the
    four-dimensional node that is it.
    """
    chain = list(views_above(node, returned))
    root = chain.pop()
    if root not in returned:
        return None
    steps = [view_of(view) for view in chain]
    last = min((i for i, found in enumerate(steps) if _selects(found)), default=len(chain))
    lens, part = (), root
    for i in reversed(range(len(chain))):
        found = steps[i]
        if i < last and len(shape_of(part) or ()) == 4:
            break
        if found is None:
            return None
        lens, part = (*lens, *found[1]), chain[i]
    return root, lens, part


def _selects(found: tuple[fx.Node, Lens] | None) -> bool:
    return any(name in ("select", "narrow") for name, _ in (found or ((), ()))[1])


def _undone(node: fx.Node, source: fx.Node) -> Lens | None:
    """The steps that lead from a view back to its source."""
    before, after, step = shape_of(source), shape_of(node), kind(node)
    if before is None or after is None:
        return None
    if step == "same":
        return ()
    if step == "unsqueeze":
        return (("select", (argument(node, 1, "dim") % len(after), 0)),)
    if step == "view":
        return _split(after, before)
    order = _order(node, len(before))
    return (("permute", (tuple(order.index(d) for d in range(len(order))),)),)


def _split(merged: tuple[Any, ...], apart: tuple[Any, ...]) -> Lens | None:
    """How a shape becomes one in which some of its dims are several, of sizes that are numbers."""
    steps: list[Any] = []
    sizes = list(apart)
    for dim, size in reversed(list(enumerate(merged))):
        taken: list[Any] = []
        while not taken or not same_size(_product(taken), size):
            if not sizes or len(sizes) <= dim:
                return None
            taken.insert(0, sizes.pop())
        if len(taken) > 1:
            if not all(isinstance(s, int) for s in taken):
                return None
            steps.append(("unflatten", (dim, tuple(taken))))
    return None if sizes else tuple(steps)


def _product(sizes: list[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def _order(node: fx.Node, dims: int) -> list[int]:
    """The dims of its source in the order in which a transpose or permute has them."""
    if kind(node) == "permute":
        given: Any = argument(node, 1, "dims")
        given = given if isinstance(given, (tuple, list)) else node.args[1:]
        return [d % dims for d in given]
    a, b = (argument(node, i, f"dim{i - 1}") % dims for i in (1, 2))
    order = list(range(dims))
    order[a], order[b] = b, a
    return order


def view_of(node: fx.Node) -> tuple[fx.Node, Lens] | None:
    """What a node is a view of, and where it is in it; None for all that is no such view."""
    source = operand(node)
    if not isinstance(source, fx.Node) or node.op not in ("call_function", "call_method"):
        return None
    if isinstance(value_of(source), (tuple, list)):
        return _piece(node, source)
    before, after, step, name = shape_of(source), shape_of(node), kind(node), describe(node)
    if before is None or after is None:
        return None
    if step == "same" and name != "clone":
        return source, ()
    if step == "unsqueeze":
        return source, (("unsqueeze", (argument(node, 1, "dim") % len(after),)),)
    if step in ("transpose", "permute"):
        return source, (("permute", (tuple(_order(node, len(before))),)),)
    if step == "view":
        steps = _split(before, after)
        return None if steps is None else (source, steps)
    if name == "select":
        dim, index = argument(node, 1, "dim"), argument(node, 2, "index")
        return _with_steps(source, _one(before, dim, index))
    if step == "slice" or name in ("narrow", "slice"):
        dim, start = argument(node, 1, "dim", 0), argument(node, 2, "start")
        if name == "narrow":
            end: Any = start + argument(node, 3, "length") if isinstance(start, int) else None
            end = -1 if end is None else end
        else:
            end = argument(node, 3, "end")
        return _with_steps(
            source, _range(before, dim, slice(start, end, argument(node, 4, "step")))
        )
    if step == "getitem":
        return _with_steps(source, _index(node.args[1], before))
    return None


def _with_steps(source: fx.Node, steps: Lens | None) -> tuple[fx.Node, Lens] | None:
    return None if steps is None else (source, steps)


def _piece(node: fx.Node, pieces: fx.Node) -> tuple[fx.Node, Lens] | None:
    """``x.chunk(2, dim)[i]`` and the like."""
    source, name, index = operand(pieces), describe(pieces), None
    if kind(node) == "getitem" and isinstance(node.args[1], int):
        index = node.args[1]
    shape = shape_of(source)
    if index is None or shape is None:
        return None
    if name == "unbind":
        dim = argument(pieces, 1, "dim", 0)
        return _with_steps(source, _one(shape, dim, index))
    if name not in ("chunk", "split", "split_with_sizes", "tensor_split"):
        return None
    dim = dim_of(argument(pieces, 2, "dim", 0), shape)
    index %= len(value_of(pieces))
    lengths = [x.shape[dim] for x in value_of(pieces)]
    if not all(isinstance(n, int) for n in lengths):
        return None
    return source, (("narrow", (dim, sum(lengths[:index]), lengths[index])),)


def _one(shape: tuple[Any, ...], dim: Any, index: Any) -> Lens | None:
    if not isinstance(dim, int) or not isinstance(index, int):
        return None
    dim %= len(shape)
    if not isinstance(shape[dim], int):
        return None
    return (("select", (dim, index % shape[dim])),)


def _range(shape: tuple[Any, ...], dim: int, which: slice) -> Lens | None:
    dim %= len(shape)
    size = shape[dim]
    if which.start in (None, 0) and which.step in (None, 1) and _is_end(which.stop):
        return ()
    ends = (which.start, which.stop, which.step)
    if not isinstance(size, int) or not all(e is None or isinstance(e, int) for e in ends):
        return None
    first, last, step = which.indices(size)
    if step != 1 or last <= first:
        return None
    return () if (first, last) == (0, size) else (("narrow", (dim, first, last - first)),)


def _is_end(stop: Any) -> bool:
    return stop is None or (isinstance(stop, int) and stop >= 2**63 - 1)


def _index(index: Any, shape: tuple[Any, ...]) -> Lens | None:
    """``x[0, :, None, ..., :8]``."""
    items = index if isinstance(index, tuple) else (index,)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        named = sum(i is not None and i is not Ellipsis for i in items)
        items = (*items[:at], *[slice(None)] * (len(shape) - named), *items[at + 1 :])
    steps: list[Any] = []
    sizes, dim = list(shape), 0
    for item in items:
        if item is None:
            steps.append(("unsqueeze", (dim,)))
            sizes.insert(dim, 1)
            dim += 1
        elif isinstance(item, int) and not isinstance(item, bool):
            found = _one(tuple(sizes), dim, item)
            if found is None:
                return None
            steps.extend(found)
            del sizes[dim]
        elif isinstance(item, slice):
            found = _range(tuple(sizes), dim, item)
            if found is None:
                return None
            steps.extend(found)
            if found:
                sizes[dim] = found[0][1][2]
            dim += 1
        else:
            return None
    return tuple(steps)


def appended_dims(node: fx.Node) -> set[int]:
    """The dims on which a node, or a view of it, is concatenated to."""
    found: set[int] = set()
    for view, lens in [(node, ()), *views_below(node)]:
        origin = origins(lens, len(sizes_of(node)))[0]
        for user in view.users:
            if kind(user) == "cat" and parts_of(user)[:1] == (view,) and len(parts_of(user)) == 2:
                dim = origin[dim_of(argument(user, 1, "dim", 0), origin)]
                found |= set() if dim is None else {dim}
    return found
