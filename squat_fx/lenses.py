"""Where a cache lies inside of a larger tensor: views that lead to it, one after the other.

    keys of layer 3 in [layers, 2, B, H, T, D]     (select 0 at 3), (select 0 at 0)
    values in [B, T, 2 H D]                        (narrow 2 to H D from H D), (unflatten 2 to H, D)

A lens touches some dims of the larger tensor, whose sizes are part of it, and passes the others on:
the batch, and the tokens, of which there may be any number. Two lenses are the same if they lead to
the same numbers, however they are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Step = tuple[str, Any]
"""``("select", (dim, index))``, ``("narrow", (dim, start, length))``, ``("unflatten", (dim,
sizes))``, ``("unsqueeze", (dim,))`` or ``("permute", (dims,))``: methods that give views."""
Lens = tuple[Step, ...]


def view_through(lens: Lens, x: Tensor) -> Tensor:
    """The part of ``x``, as a view."""
    for name, arguments in lens:
        x = getattr(x, name)(*arguments)
    return x


def origins(lens: Lens, dims: int) -> tuple[tuple[int | None, ...], frozenset[int]]:
    """Of which dim of the larger tensor, which has so many, each dim of the part is; and which of
    its dims the lens touches.
    """
    now: list[int | None] = list(range(dims))
    touched: set[int | None] = set()
    for name, (dim, *rest) in lens:
        if name == "permute":
            now = [now[d] for d in dim]
        elif name == "unsqueeze":
            now.insert(dim, None)
        else:
            touched.add(now[dim])
            pieces = {"select": 0, "narrow": 1}.get(name)
            pieces = len(rest[0]) if pieces is None else pieces  # unflatten
            now[dim : dim + 1] = [now[dim]] * pieces
    return tuple(now), frozenset(d for d in touched if d is not None)


def _small(lenses: Sequence[Lens], sizes: Sequence[int | None]) -> list[int]:
    """Sizes of a larger tensor, of one where no lens touches a dim."""
    touched = frozenset().union(*(origins(lens, len(sizes))[1] for lens in lenses))
    return [int(sizes[d] or 1) if d in touched else 1 for d in range(len(sizes))]


def same_lens(a: Lens, b: Lens, sizes: Sequence[int | None]) -> bool:
    """Whether two lenses lead to the same numbers of a tensor of such ``sizes``, in the same
    order.
    """
    if a == b:
        return True
    small = tuple(_small((a, b), sizes))
    is_alike = origins(a, len(sizes))[0] == origins(b, len(sizes))[0]
    return is_alike and _place(a, small) == _place(b, small)


def is_inside(a: Lens, b: Lens, sizes: Sequence[int | None]) -> bool:
    """Whether all numbers that ``a`` leads to are among those of ``b``."""
    marked = torch.zeros(_small((a, b), sizes), dtype=torch.bool)
    view_through(b, marked).fill_(True)
    return bool(view_through(a, marked).all())


@lru_cache(maxsize=4096)
def _place(lens: Lens, sizes: tuple[int, ...]) -> Any:
    """Where the numbers behind a lens are in a contiguous tensor."""
    part = view_through(lens, torch.empty(sizes, device="meta"))
    steps = zip(part.shape, part.stride(), strict=True)
    return part.storage_offset(), tuple((n, step if n > 1 else 0) for n, step in steps)


def are_all_of_it(lenses: Sequence[Lens], sizes: Sequence[int | None]) -> bool:
    """Whether lenses lead to every number of a tensor of such ``sizes`` once."""
    if not lenses:
        return False
    counted = torch.zeros(_small(lenses, sizes), dtype=torch.int64)
    for lens in lenses:
        view_through(lens, counted).add_(1)
    return bool((counted == 1).all())


@dataclass(frozen=True)
class Join:
    """How one tensor is put together from caches, ``[batch, ...]`` each, and taken apart.

    Attributes:
        lenses: where each of them is.
        sizes: of the tensor; None where no lens touches a dim.
        token_dim: which dim of the tensor are the tokens.
    """

    lenses: tuple[Lens, ...]
    sizes: tuple[int | None, ...]
    token_dim: int

    @property
    def batch_dim(self) -> int:
        """Which dim of the tensor is the batch, the first one of every part."""
        batch = origins(self.lenses[0], len(self.sizes))[0][0]
        assert batch is not None, "a cache has a batch"
        return batch

    def part_dim(self, part: int, dim: int) -> int | None:
        """Which dim of a part the dim ``dim`` of the tensor is; None if a lens touches it."""
        if self.sizes[dim] is not None:
            return None
        return origins(self.lenses[part], len(self.sizes))[0].index(dim)

    def order_in(self, other: Join) -> tuple[int, ...] | None:
        """Which parts of a tensor that is put together as ``other`` says are the parts here, in
        their order; None if they are not the same.
        """
        return _order(self, other)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parts of such a tensor, as views."""
        return tuple(view_through(lens, x) for lens in self.lenses)

    def shape(self, parts: Sequence[Tensor]) -> tuple[Any, ...]:
        """The shape of the tensor that such parts make."""
        found: list[Any] = list(self.sizes)
        for part_dim, dim in enumerate(origins(self.lenses[0], len(found))[0]):
            if dim is not None and self.sizes[dim] is None:
                found[dim] = parts[0].shape[part_dim]
        return tuple(found)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The tensor that dense parts make."""
        whole = parts[0].new_empty(self.shape(parts))
        for place, part in zip(self.parts(whole), parts, strict=True):
            place.copy_(part)
        return whole

    def under(self, step: Step) -> tuple[Join | None, list[int]]:
        """The part of the tensor behind a ``select`` or ``narrow``: how it is put together, None if
        it is a part itself, and which parts are in it; an empty list if that is no whole number.
        """
        inside = [i for i, lens in enumerate(self.lenses) if lens[:1] == (step,)]
        first = {lens[0] for lens in self.lenses if lens}
        if not inside or {(n, a[0]) for n, a in first} != {(step[0], step[1][0])}:
            return None, []
        rest = tuple(self.lenses[i][1:] for i in inside)
        if rest == ((),):
            return None, inside
        name, (dim, *about) = step
        sizes = list(self.sizes)
        sizes[dim : dim + 1] = [] if name == "select" else [about[1]]
        touched = frozenset().union(*(origins(lens, len(sizes))[1] for lens in rest))
        sizes = [size if d in touched else None for d, size in enumerate(sizes)]
        token_dim = self.token_dim - (name == "select" and dim < self.token_dim)
        made = Join(rest, tuple(sizes), token_dim)
        return (made, inside) if are_all_of_it(rest, made.sizes) else (None, [])


@lru_cache(maxsize=64)
def _order(a: Join, b: Join) -> tuple[int, ...] | None:
    if a == b:
        return tuple(range(len(a.lenses)))
    if a.sizes != b.sizes or len(a.lenses) != len(b.lenses):
        return None
    found = [[i for i, x in enumerate(b.lenses) if same_lens(x, y, a.sizes)] for y in a.lenses]
    return tuple(i for (i,) in found) if all(len(f) == 1 for f in found) else None
