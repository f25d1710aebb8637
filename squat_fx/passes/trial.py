"""Compute a piece of a graph on small random tensors, to see what function it is.

What a piece computes says more than how it is written: two polynomials that agree on random numbers
are the same. Sizes that are symbols become small primes, and a batch or a prompt that tracing
made a large constant becomes small, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from squat_fx.passes.spelling import kind, sizes_of, source_of, submodule_of, value_of

_PRIMES = (5, 7, 3, 11, 13, 17, 19, 23, 29, 31)
_LARGE = 64
_REGROUPED = ("view", "expand")  # views whose arguments are sizes


class Trial:
    """Random inputs and small sizes for the nodes around ``like``, ``[batch, heads, tokens, d]``.

    All arithmetic is fp64: casts between floating dtypes of 16 bits and more are left out.
    """

    def __init__(self, like: fx.Node) -> None:
        self._generator = torch.Generator("cpu").manual_seed(0)
        self._random: dict[fx.Node, Tensor] = {}
        batch, heads, tokens, channels = sizes_of(like)
        free = {symbol for size in (batch, tokens) for symbol in getattr(size, "free_symbols", ())}
        self._symbols = dict(zip(sorted(free, key=str), _PRIMES, strict=False))
        least = max(s for s in (_LARGE, channels) if isinstance(s, int))  # no part of a head
        large = {s for s in (batch, tokens) if isinstance(s, int) and s > least}
        self._small = {s: _PRIMES[-1 - i] for i, s in enumerate(sorted(large - {heads}))}

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The node's shape in this trial."""
        return tuple(map(self._size, value_of(node).shape))

    def random(self, node: fx.Node) -> Tensor:
        """Random numbers in place of the node's tensor, the same at every call."""
        if node not in self._random:
            numbers = torch.randn(
                self.shape(node), generator=self._generator, dtype=torch.float64, device="cpu"
            )
            self._random[node] = numbers
        return self._random[node]

    def run(self, node: fx.Node, given: Sequence[fx.Node]) -> Tensor | None:
        """What ``node`` is when ``given`` nodes are random; None if that cannot be computed."""
        values: dict[fx.Node, Any] = {n: self.random(n).clone() for n in given}
        try:
            with torch.no_grad():
                found = self._value(node, values)
        except Exception:  # an operation does not accept other sizes or dtypes: no evidence
            return None
        return found if isinstance(found, Tensor) else None

    def _value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node not in values:
            values[node] = self._compute(node, values)
            if isinstance(values[node], Tensor) and values[node].shape != self.shape(node):
                raise ValueError(f"{node} depends on the sizes")  # as the first 100 tokens do
        return values[node]

    def _compute(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        example = value_of(node)
        if isinstance(example, (int, float, torch.SymInt, torch.SymFloat)):
            return self._size(example)
        if isinstance(example, torch.Size):
            return torch.Size(map(self._size, example))
        if kind(node) == "cast":
            if not _keeps_numbers(example):
                raise ValueError(f"{node} rounds")
            return self._value(source_of(node), values)
        args: Any = fx.map_arg(node.args, lambda n: self._value(n, values))
        kwargs: Any = fx.map_arg(node.kwargs, lambda n: self._value(n, values))
        if kind(node) in _REGROUPED:
            args, kwargs = self._shrunk(args), self._shrunk(kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_module":
            return submodule_of(node)(*args, **kwargs)
        if node.op == "call_function" and callable(node.target):
            return node.target(*args, **kwargs)
        raise ValueError(f"{node} is not computed from what is given")

    def _size(self, size: Any) -> Any:
        """A number of the graph as it is here: other sizes than batch and tokens are as traced."""
        if not isinstance(size, (torch.SymInt, torch.SymFloat)):
            return self._small.get(size, size)
        expression = size.node.expr
        if expression.free_symbols.isdisjoint(self._symbols) and size.node.has_hint():
            return size.node.hint
        others = sorted(expression.free_symbols - self._symbols.keys(), key=str)
        self._symbols |= dict.fromkeys(others, _PRIMES[len(self._symbols) % len(_PRIMES)])
        number = expression.subs(self._symbols)
        return int(number) if number.is_integer else float(number)

    def _shrunk(self, arguments: Any) -> Any:
        """The arguments of a ``view`` or an ``expand`` with this trial's sizes."""
        if isinstance(arguments, Mapping):
            return {name: self._shrunk(value) for name, value in arguments.items()}
        if isinstance(arguments, (tuple, list)):
            return type(arguments)(self._shrunk(value) for value in arguments)
        return self._small.get(arguments, arguments) if isinstance(arguments, int) else arguments


def _keeps_numbers(cast: Any) -> bool:
    """Whether a cast gives a floating dtype that people compute in."""
    return isinstance(cast, Tensor) and cast.is_floating_point() and cast.element_size() > 1
