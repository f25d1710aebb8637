"""Find the rotary embedding in front of a key's cache.

Before:
    rotated = key * cos + rotate_half(key) * sin
    stored  = cat([past_key, rotated], dim=-2)
After:
    the same graph, and a ``Rotary`` record: the key before its rotation, ``cos``, ``sin``, which
    channels are pairs, and the angles.

Models write rotations in many ways, so no spelling is looked for. From the cache the walk goes up
through operations that move or multiply numbers; every tensor on the way that is shaped like the
key may be the key before its rotation, if just two other tensors come in below it. What lies
between is then computed on random numbers (``Trial``): it is a rotation if the result is one.

Leaves alone, with a reason: keys without a rotation, keys that are changed again after it, keys of
which a part is rotated and the rest comes from elsewhere, rotations by complex numbers or written
in place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, fx

from squat_fx.layouts.rotary import Pairing, Rotation, rearranged
from squat_fx.passes.records import Angles, CacheEdge, Rotary
from squat_fx.passes.spelling import (
    VIEWS,
    describe,
    kind,
    memory_of,
    operand,
    source_of,
    value_of,
    writers,
)
from squat_fx.passes.trial import Trial

_JOINS = frozenset({"cat", "concat", "concatenate", "stack", "roll", "flip", "view_as_real"})
_MOVES = frozenset({
    "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "select", "narrow", "movedim",
    "squeeze", "t", "view_as", "reshape_as", "expand_as", "repeat", "index_select", "real", "imag",
})  # fmt: skip
_ARITHMETIC = frozenset({"neg", "addcmul", "complex", "view_as_complex", "rsub"})
_OF_ROTATIONS = _JOINS | _MOVES | _ARITHMETIC
_OF_ANGLES = _OF_ROTATIONS | {"cos", "sin", "outer", "einsum", "matmul"}
_KINDS = VIEWS | {"cast", "cat", "add", "sub", "mul"}

Dims = tuple[int | None, ...]


def find_rotary(edge: CacheEdge) -> Rotary | str:
    """The rotary embedding before ``edge``, a cache edge of keys, or why there is none to use."""
    if edge.token_dim != 2:
        return "the tokens of the keys come before their heads"
    rotated, trial = edge.new, Trial(edge.new)
    above = _Above(rotated, _OF_ROTATIONS)
    found = _rotation_to(rotated, above, trial)
    if found is None:
        return _reason(rotated, above, trial)
    if written := above.written(found.key, found.cos, found.sin):
        return f"the key or its rotation is changed in place, by {describe(written)}"
    key = _before_casts(found)
    rotation = replace(found.rotation, dtype=_widest(above.depending(key) - {key}))
    return replace(found, key=key, rotation=rotation, angles=_angles(found, trial))


class _Above:
    """The nodes above ``root``, up to operations that are none of ``names``; nearest first."""

    def __init__(self, root: fx.Node, names: frozenset[str]) -> None:
        self.root = root
        self._inputs: dict[fx.Node, list[fx.Node]] = {}
        stack = [root]
        while stack:
            node = stack.pop()
            if node not in self._inputs:
                above = [n for n in node.all_input_nodes if _holds_tensors(n)]
                self._inputs[node] = above if _is_one_of(node, names) else []
                stack += self._inputs[node]
        self.nodes = sorted(self._inputs, reverse=True)

    def depending(self, key: fx.Node) -> set[fx.Node]:
        """The nodes that are computed from ``key``, itself included."""
        found = {key}
        for node in reversed(self.nodes):
            if not found.isdisjoint(self._inputs[node]):
                found.add(node)
        return found

    def besides(self, key: fx.Node, root: fx.Node | None = None) -> list[fx.Node] | None:
        """The tensors of which ``root`` is made besides ``key``; None if it is not made of it."""
        depending, root = self.depending(key), root or self.root
        if root not in depending or root is key:
            return None
        found: list[fx.Node] = []
        stack, seen = [root], {key, root}
        while stack:
            for node in self._inputs[stack.pop()]:
                if node not in seen:
                    seen.add(node)
                    (stack if node in depending else found).append(node)
        return found

    def written(self, *ends: fx.Node) -> fx.Node | None:
        """The first operation that writes in place to ``ends``, the root or what is between, after
        they were made.
        """
        between = self.depending(ends[0]) | set(ends)
        nodes = [node for node in self.nodes if node in between]
        return next((w for n in nodes for w in writers(memory_of(n)) if w > n), None)


def _is_one_of(node: fx.Node, names: frozenset[str]) -> bool:
    if node.op not in ("call_function", "call_method", "call_module"):
        return False
    return kind(node) in _KINDS or describe(node) in names


def _holds_tensors(node: fx.Node) -> bool:
    value = value_of(node)
    if isinstance(value, (tuple, list)):
        return any(isinstance(v, Tensor) for v in value)
    return isinstance(value, Tensor)


# the rotation -------------------------------------------------------------------------------------


def _rotation_to(root: fx.Node, above: _Above, trial: Trial) -> Rotary | None:
    """The rotation whose result is ``root``, without its angles."""
    shape = trial.shape(root)
    for key in above.nodes:
        orders = _key_orders(key, shape, trial)
        besides = above.besides(key, root) if orders else None
        factors = _merged(besides) if besides else []
        if len(factors) != 2 or not all(map(_is_real, factors)):
            continue
        result = trial.run(root, [key, *factors])
        if result is not None and (found := _read(root, key, orders, factors, result, trial)):
            return found
    return None


def _key_orders(key: fx.Node, shape: tuple[int, ...], trial: Trial) -> list[tuple[int, ...]]:
    """The orders of ``key``'s dims that make it batch, heads, tokens and channels."""
    if not isinstance(value_of(key), Tensor) or len(sizes := trial.shape(key)) != 4:
        return []
    orders = [(*order, 3) for order in permutations(range(3))]
    return [order for order in orders if tuple(sizes[d] for d in order) == shape]


def _merged(nodes: list[fx.Node]) -> list[fx.Node]:
    """The nodes; where they are more than two, views of the same tensor are replaced by it."""
    if len(nodes) <= 2:
        return nodes
    chains = [_view_chain(node) for node in nodes]
    found: list[fx.Node] = []
    for i, chain in enumerate(chains):
        others = {node for j, other in enumerate(chains) if j != i for node in other}
        found.append(next((node for node in chain if node in others), chain[0]))
    return list(dict.fromkeys(found))


def _view_chain(node: fx.Node) -> list[fx.Node]:
    chain = [node]
    while kind(chain[-1]) in VIEWS | {"cast"} and isinstance(operand(chain[-1]), fx.Node):
        chain.append(chain[-1].all_input_nodes[0])
    return [n for n in chain if isinstance(value_of(n), Tensor)]


def _is_real(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and not value.is_complex()


def _read(
    root: fx.Node,
    key: fx.Node,
    orders: Sequence[tuple[int, ...]],
    factors: Sequence[fx.Node],
    result: Tensor,
    trial: Trial,
) -> Rotary | None:
    """The rotation by ``factors`` that makes ``result`` of random numbers in place of ``key``."""
    for order in orders:
        before = rearranged(trial.random(key), order)
        for cos, sin in (tuple(factors), tuple(reversed(factors))):
            if trial.shape(cos) != trial.shape(sin):
                return None
            for dims in _layouts(trial.shape(cos), result.shape, order):
                numbers = [rearranged(trial.random(node), dims) for node in (cos, sin)]
                for rotation in _rotations(numbers[0].shape[-1], result.shape[-1]):
                    if _agree(rotation.apply(before, *numbers), result):
                        return Rotary(root, key, order, cos, sin, dims, rotation)
    return None


def _layouts(shape: Sequence[int], sizes: Sequence[int], first: Sequence[int]) -> Iterator[Dims]:
    """Ways to see a tensor as ``[batch, heads, tokens, numbers]``, where other dims have size one.

    The likeliest come first, which decides where a single token leaves the choice: the order
    ``first`` of the tensor it meets, and ``[batch, tokens, numbers]``.
    """
    likely: dict[int, Dims] = {4: tuple(first), 3: (0, None, 1, 2)}
    dims = likely.get(len(shape), (None,) * 4)
    if dims[-1] is not None and all(
        d is None or shape[d] in (1, size) for d, size in zip(dims[:3], sizes, strict=False)
    ):
        yield dims
    wide = [d for d, size in enumerate(shape) if size != 1]
    if not wide or len(wide) > 4:
        return
    *leading, last = wide
    for axes in permutations(range(3), len(leading)):
        if all(shape[d] == sizes[axis] for d, axis in zip(leading, axes, strict=True)):
            placed = dict(zip(axes, leading, strict=True))
            yield (placed.get(0), placed.get(1), placed.get(2), last)


def _rotations(numbers: int, channels: int) -> Iterator[Rotation]:
    """Rotations by so many cosines: one for each channel that turns, or one for each pair."""
    pairings: tuple[Pairing, ...] = ("halves", "interleaved")
    for rotary_dim in (numbers, 2 * numbers):
        if rotary_dim <= channels and rotary_dim % 2 == 0:
            for pairing in pairings:
                yield from (Rotation(rotary_dim, pairing, sign) for sign in (1, -1))


def _agree(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-8)


def _before_casts(rotary: Rotary) -> fx.Node:
    """The key in the dtype of the cache, if it was only cast for its rotation."""
    key, dtype = rotary.key, value_of(rotary.rotated).dtype
    while kind(key) == "cast" and value_of(key).dtype != dtype:
        key = source_of(key)
    return key if value_of(key).dtype == dtype else rotary.key


def _widest(nodes: Iterable[fx.Node]) -> torch.dtype:
    """The dtype that holds all numbers of ``nodes``."""
    dtypes = [value_of(n).dtype for n in nodes if isinstance(value_of(n), Tensor)]
    return functools.reduce(torch.promote_types, dtypes)


# the angles ---------------------------------------------------------------------------------------


def _angles(rotary: Rotary, trial: Trial) -> Angles | None:
    """What ``cos`` and ``sin`` are the cosine and sine of, where one tensor makes them both."""
    cos, sin = (_Above(node, _OF_ANGLES) for node in (rotary.cos, rotary.sin))
    batch, heads, tokens, _ = trial.shape(rotary.rotated)
    sizes = (batch, heads, tokens, rotary.rotation.rotary_dim // 2)
    for node in cos.nodes:
        if not _is_real(node) or cos.besides(node) != [] or sin.besides(node) != []:
            continue
        shape = trial.shape(node)
        for dims in _layouts(shape, sizes, range(4)):
            if dims[-1] is None or shape[dims[-1]] != sizes[-1]:
                continue
            results = [trial.run(above.root, [node]) for above in (cos, sin)]
            scaling = _scaling(rotary, rearranged(trial.random(node), dims), results)
            if scaling is not None:
                factors = _positions_and_frequencies(node, dims, sizes, trial)
                return Angles(node, dims, scaling, *factors)
    return None


def _scaling(rotary: Rotary, angles: Tensor, results: Sequence[Tensor | None]) -> float | None:
    """The factor between results and the cosines and sines of ``angles``; None if there is none."""
    functions: tuple[Callable[[Tensor], Tensor], ...] = (torch.cos, torch.sin)
    ratios: list[Tensor] = []
    for result, function in zip(results, functions, strict=True):
        if result is None:
            return None
        given = rotary.rotation.per_channel(rearranged(result, rotary.cos_dims))
        expected = rotary.rotation.per_channel(function(angles))
        if given.shape != expected.shape:
            return None
        ratios.append(given / expected)
    scaling = ratios[0].flatten()[0]
    return scaling.item() if all(_agree(r, scaling.expand(r.shape)) for r in ratios) else None


def _positions_and_frequencies(
    node: fx.Node, dims: Dims, sizes: Sequence[int], trial: Trial
) -> tuple[fx.Node, fx.Node] | tuple[None, None]:
    """The two tensors of which the angles in ``node`` are the outer product."""
    above = _Above(node, _OF_ANGLES - {"cos", "sin"})
    for inv_freq in above.nodes:
        if not _is_real(inv_freq) or math.prod(trial.shape(inv_freq)) != sizes[-1]:
            continue
        besides = above.besides(inv_freq) or []
        result = trial.run(node, [inv_freq, *besides]) if len(besides) == 1 else None
        if result is None:
            continue
        result = rearranged(result, dims)
        positions = trial.random(besides[0])
        if positions.numel() == result[..., 0].numel():
            product = positions.reshape(*result.shape[:-1], 1) * trial.random(inv_freq).flatten()
            if _agree(product, result):
                return besides[0], inv_freq
    return None, None


# reasons ------------------------------------------------------------------------------------------


def _reason(rotated: fx.Node, above: _Above, trial: Trial) -> str:
    """Why no rotation makes ``rotated``."""
    names = {describe(node) for node in above.nodes}
    if written := next((w for node in above.nodes for w in writers(node)), None):
        return f"the key is written in place, by {describe(written)}"
    if any(value_of(n).is_complex() for n in above.nodes if isinstance(value_of(n), Tensor)):
        return "the rotation is a multiplication of complex numbers, which is not read"
    if not names & _JOINS or not any(kind(node) == "mul" for node in above.nodes):
        return "no rotary embedding before the cache"
    shape = trial.shape(rotated)
    for root in above.nodes[1:]:
        part = root if isinstance(value_of(root), Tensor) and value_of(root).dim() == 4 else None
        if part is None or _rotation_to(part, above, trial) is None:
            continue
        if _key_orders(part, shape, trial):
            return "the key is changed again between its rotation and the cache, as by a norm"
        channels: Any = trial.shape(part)[-1]
        return (
            f"only {channels} of the key's {shape[-1]} channels come from a rotation, "
            "and the others from elsewhere"
        )
    return "what makes the key is not understood as a rotary embedding"
