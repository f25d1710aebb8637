"""Follow views and know, at each step, which axis is which.

A chain such as ``cat > getitem(None) > expand > reshape > transpose`` is not compared with
patterns: the axes of its source get names, and each view moves, splits, merges or repeats them.
What comes out says whether the chain is a ``repeat_kv``, a transpose, both or something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from squat_fx.passes.spelling import (
    VIEWS,
    argument,
    describe,
    dim_of,
    kind,
    operand,
    same_size,
    shape_of,
    source_of,
    value_of,
)

Atom = tuple[str, Any]  # (name, size)
Axis = tuple[Atom, ...]  # outermost first; () has size 1


@dataclass(frozen=True)
class Followed:
    """Where a chain of views started, and its axes at the end: ``(("heads", "repeat"), ...)``."""

    source: fx.Node
    axes: tuple[tuple[str, ...], ...]
    repeat: int = 1


def follow_views(node: fx.Node, stop: Callable[[fx.Node], bool]) -> Followed | str:
    """Walk up from ``node`` to the first node that ``stop`` names, tracking its axes.

    Returns a reason, as a sentence without subject, where a step is no view or cannot be tracked.
    """
    chain: list[fx.Node] = []
    while not stop(node):
        if reason := _no_view(node):
            return reason
        chain.append(node)
        source = operand(node)
        if not isinstance(source, fx.Node):
            return "is a constant"
        node = source
    shape = shape_of(node)
    if shape is None or len(shape) != 4:
        return "is not four-dimensional [batch, heads, tokens, channels]"
    names = ("batch", "heads", "tokens", "channels")
    axes: list[Axis] | None = [((name, size),) for name, size in zip(names, shape, strict=True)]
    for view in reversed(chain):
        axes = _apply(view, axes)
        if axes is None:
            return (
                f"passes through {describe(view)}, which is no repeat, transpose or merge of heads"
            )
    repeats = [size for axis in axes for name, size in axis if name == "repeat"]
    if any(not isinstance(r, int) for r in repeats):
        return "is repeated a symbolic number of times"
    named = tuple(tuple(name for name, _ in axis) for axis in axes)
    return Followed(node, named, math.prod(repeats))


def token_dim_of(followed: Followed, role: str, spelling: str) -> int | None:
    """The dim of tokens, 2 or 1, of what an attention reads as [batch, heads x repeat, tokens,
    channels] (an eager key: transposed); None if it reads the dims in another order.
    """
    axes = followed.axes
    if len(axes) == 3:
        axes = (("batch",), axes[0][1:], *axes[1:]) if axes[0][:1] == ("batch",) else axes
    last = axes[-2:]
    if role == "key" and spelling == "eager":
        last = last[::-1]
    heads = tuple(name for name in axes[1] if name != "repeat")
    if len(axes) != 4 or axes[0] != ("batch",) or len(axes[1]) > 2:
        return None
    read = (heads, *last)
    if read == (("heads",), ("tokens",), ("channels",)):
        return 2
    return 1 if read == (("tokens",), ("heads",), ("channels",)) else None


def _no_view(node: fx.Node) -> str | None:
    step = kind(node)
    if step == "cast":
        before, after = _dtype(operand(node)), _dtype(node)
        if before == after or torch.promote_types(before, after) == after:
            return None  # attention computes in fp32 anyway
        return f"is cast from {before} to {after} before the attention"
    if step not in VIEWS:
        return (
            f"comes from {describe(node)}, not from a past + new concatenation on dim -2 "
            "that is returned"
        )
    return None


def _dtype(node: Any) -> Any:
    return getattr(value_of(node) if isinstance(node, fx.Node) else None, "dtype", None)


def _apply(node: fx.Node, axes: list[Axis]) -> list[Axis] | None:
    """The axes after one view."""
    step = kind(node)
    if step in ("same", "cast"):
        return axes
    if step == "unsqueeze":
        dim = argument(node, 1, "dim")
        return _inserted(axes, dim % (len(axes) + 1))
    if step == "transpose":
        a, b = (dim_of(argument(node, i, f"dim{i - 1}"), axes) for i in (1, 2))
        moved = list(axes)
        moved[a], moved[b] = moved[b], moved[a]
        return moved
    if step == "mT":
        return [*axes[:-2], axes[-1], axes[-2]]
    if step == "permute":
        dims: Any = argument(node, 1, "dims")
        order = dims if isinstance(dims, (tuple, list)) else node.args[1:]
        return [axes[dim_of(cast(int, d), axes)] for d in order]
    if step == "getitem":
        return _getitem(node.args[1], axes)
    if step == "slice":
        return axes if _is_whole(node, argument(node, 1, "dim", 0)) else None
    if step == "repeat_interleave":
        return _repeat_interleave(node, axes)
    if step == "repeat":
        return _tiled(node, axes)
    after = shape_of(node)
    if after is None:
        return None
    return _expanded(axes, after) if step == "expand" else _regrouped(axes, after)


def _inserted(axes: list[Axis], dim: int) -> list[Axis]:
    return [*axes[:dim], (), *axes[dim:]]


def _getitem(index: Any, axes: list[Axis]) -> list[Axis] | None:
    """``x[:, :, None, :, :]``: new axes only."""
    items = index if isinstance(index, tuple) else (index,)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        named = sum(i is not None and i is not Ellipsis for i in items)
        items = (*items[:at], *[slice(None)] * (len(axes) - named), *items[at + 1 :])
    out, rest = [], list(axes)
    for item in items:
        if item is None:
            out.append(())
        elif item == slice(None) and rest:
            out.append(rest.pop(0))
        else:
            return None
    return out + rest


def _is_whole(node: fx.Node, dim: int) -> bool:
    before, after = shape_of(source_of(node)), shape_of(node)
    return before is not None and after is not None and same_size(before[dim], after[dim])


def _repeat_interleave(node: fx.Node, axes: list[Axis]) -> list[Axis] | None:
    repeats, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
    if not isinstance(repeats, int) or dim is None:
        return None
    dim = dim_of(dim, axes)
    return [(*a, ("repeat", repeats)) if i == dim else a for i, a in enumerate(axes)]


def _tiled(node: fx.Node, axes: list[Axis]) -> list[Axis] | None:
    """``x.repeat(1, 2, 1, 1)``: all heads, and then all of them again."""
    given: Any = argument(node, 1, "repeats")
    repeats = given if isinstance(given, (tuple, list)) else node.args[1:]
    if len(repeats) != len(axes) or not all(isinstance(r, int) for r in repeats):
        return None
    return [a if r == 1 else (("repeat", r), *a) for a, r in zip(axes, repeats, strict=True)]


def _expanded(axes: list[Axis], after: tuple[Any, ...]) -> list[Axis] | None:
    out: list[Axis] = []
    for axis, size in zip(axes, after, strict=True) if len(axes) == len(after) else ():
        if same_size(_size(axis), size):
            out.append(axis)
        elif _size(axis) == 1:
            out.append((*axis, ("repeat", size)))
        else:
            return None
    return out if len(out) == len(axes) else None


def _regrouped(axes: list[Axis], after: tuple[Any, ...]) -> list[Axis] | None:
    """Axes of a reshape: every new dim must be a run of whole old atoms."""
    atoms = [atom for axis in axes for atom in axis]
    out: list[Axis] = []
    for size in after:
        run: list[Atom] = []
        while not run or not same_size(_size(tuple(run)), size):
            if not run and size == 1 and (not atoms or atoms[0][1] != 1):
                break
            if not atoms:
                return None
            run.append(atoms.pop(0))
        out.append(tuple(run))
    return out if all(size == 1 for _, size in atoms) else None


def _size(axis: Axis) -> Any:
    size: Any = 1
    for _, s in axis:
        size = size * s
    return size
