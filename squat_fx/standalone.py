"""Rewriting a bare ``fx.GraphModule``: no Dynamo, no inner compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from squat_fx.backend import NotRewritten, rewrite_graph
from squat_fx.boundary import Boundary, joins_of, with_joined
from squat_fx.codecs import Format
from squat_fx.config import Config
from squat_fx.guard import Watch
from squat_fx.passes import Rewriting
from squat_fx.passes.find_cache_edges import part_returned
from squat_fx.passes.read_lenses import appended_dims
from squat_fx.passes.spelling import (
    argument,
    kind,
    parts_of,
    returned_nodes,
    shape_of,
    value_of,
)
from squat_fx.report import GraphReport, Report
from squat_fx.state import QuantizedKV
from squat_fx.token_major import handle_type


class RewrittenModule(nn.Module):
    """A rewritten graph, called as the original was, with ``QuantizedKV`` where the cache is."""

    def __init__(
        self,
        rewriting: Rewriting,
        call: Callable[..., Any],
        placeholders: Sequence[fx.Node],
        codegen: Any,
        spec: Any,
    ) -> None:
        super().__init__()
        self.module = rewriting.module
        self._rewriting = rewriting
        self._call = call
        self._codegen = codegen
        self._spec = spec
        self._placeholders = placeholders
        self._expected = [(node.name, shape_of(node)) for node in placeholders]

    @property
    def graph(self) -> fx.Graph:
        """The rewritten graph, in terms of plain tensors."""
        return self.module.graph

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the rewritten graph, without gradients.

        Raises:
            ValueError: an input does not have the shape the graph was captured for.
        """
        is_pytree = isinstance(self._codegen, _PyTreeCodeGen)
        flat = _flat_inputs(self._codegen, self._placeholders, args, kwargs)
        self._check(flat)
        with torch.no_grad():  # a packed cache is not differentiable
            out = self._call(*flat)
        if is_pytree:
            return self._codegen.process_outputs(out)
        return out if self._spec is None else pytree.tree_unflatten(list(out), self._spec)

    def _check(self, flat: Sequence[Any]) -> None:
        if len(flat) != len(self._expected):
            raise ValueError(f"expected {len(self._expected)} inputs, got {len(flat)}")
        for (name, shape), x in zip(self._expected, flat, strict=True):
            if shape is None or not isinstance(x, Tensor):
                continue
            fits = len(shape) == x.dim() and all(
                not isinstance(want, int) or want == have
                for want, have in zip(shape, x.shape, strict=True)
            )
            if not fits:
                wanted = ", ".join(str(s) if isinstance(s, int) else "?" for s in shape)
                raise ValueError(
                    f"input {name!r} has shape {tuple(x.shape)}, but the graph was captured for "
                    f"[{wanted}]; capture it with dynamic shapes, or with example inputs of "
                    "more than one token"
                )


def rewrite_module(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], config: Config, codegen: Any
) -> tuple[nn.Module, Report]:
    """See :func:`squat_fx.rewrite`.

    ``graph_module`` is a copy, ``codegen`` the original's calling convention.
    """
    if config.guard == "raise_bits":
        raise ValueError(
            "guard='raise_bits' stores a prompt again with more bits, which graphs that are "
            "rewritten one by one do not know of; use guard='warn' and layer_bits"
        )
    placeholders = tuple(graph_module.graph.find_nodes(op="placeholder"))
    examples = list(_flat_inputs(codegen, placeholders, tuple(example_inputs), {}))
    if len(examples) != len(placeholders):
        raise ValueError(
            f"the graph has {len(placeholders)} inputs, got {len(examples)} example inputs"
        )
    _drop_input_guards(graph_module.graph)
    if any(value_of(n) is None for n in placeholders):
        _propagate_shapes(graph_module, examples)
    rewriting = Rewriting(
        graph_module, config, _carriers(graph_module.graph), placeholders=placeholders
    )
    rewriting.joined = dict.fromkeys(placeholders)
    spec = rewrite_graph(rewriting)
    if config.strict and rewriting.skipped:
        raise NotRewritten("\n".join(f"{s.node}: {s.reason}" for s in rewriting.skipped))
    report = Report([GraphReport.of(rewriting, "eager", static=False)])
    inputs = rewriting.placeholders
    handles = [inputs.index(node) for node in rewriting.handles]
    values = [value_of(node) for node in inputs]
    numbers = [
        (row, number.size, tuple(inputs.index(node) for node in number.carriers))
        for row, number in rewriting.numbers
    ]
    watched, due = rewriting.watched, rewriting.due
    watch = Watch(watched, config, report, False, due) if watched else None
    boundary = Boundary(
        graph_module.forward, rewriting.inputs, rewriting.outputs, handles, values, report,
        numbers=numbers, watch=watch,
    )  # fmt: skip
    call = with_joined(_expecting(boundary, rewriting), joins_of(rewriting), rewriting.returned_as)
    return RewrittenModule(rewriting, call, placeholders, codegen, spec), report


def _expecting(call: Callable[..., Any], rewriting: Rewriting) -> Callable[..., Any]:
    """``call``, given handles of the formats that it was made for: others are packed anew. Nobody
    guards here what a caller passes where.
    """
    indices = {node: i for i, node in enumerate(rewriting.placeholders)}
    edges = {indices[e.carrier]: e for e in rewriting.edges().values() if e.kind == "decode"}

    def run(*args: Any) -> Any:
        flat = list(args)
        for index, edge in edges.items():
            x, kind = flat[index], handle_type(edge.token_dim)
            is_other = isinstance(x, QuantizedKV) and (
                type(x) is not kind or x._storage.described != (edge.fmt, edge.role)
            )
            if is_other:
                dense = x.dequantize()
                flat[index] = kind.from_dense(dense, edge.fmt, edge.role, given=edge.constant)
        return call(*flat)

    return run


def _flat_inputs(
    codegen: Any, placeholders: Sequence[fx.Node], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Sequence[Any]:
    """One value per placeholder, as the original's signature binds them."""
    if isinstance(codegen, _PyTreeCodeGen):
        return codegen.process_inputs(*args, **kwargs)
    names = [str(node.target) for node in placeholders]
    if unknown := [name for name in kwargs if name not in names[len(args) :]]:
        raise ValueError(f"unexpected input {unknown[0]!r}; the inputs are {', '.join(names)}")
    given = dict(zip(names, args, strict=False)) | kwargs
    defaults = {str(node.target): node.args[0] for node in placeholders if node.args}
    if missing := [name for name in names if name not in given and name not in defaults]:
        raise ValueError(f"input {missing[0]!r} is missing; the inputs are {', '.join(names)}")
    return (*(given.get(n, defaults.get(n)) for n in names), *args[len(names) :])


def _drop_input_guards(graph: fx.Graph) -> None:
    """Remove ``torch.export``'s check of the inputs; ours knows that a cache may be packed."""
    for node in graph.find_nodes(op="call_module"):
        if str(node.target) == "_guards_fn":
            graph.erase_node(node)


def _propagate_shapes(graph_module: fx.GraphModule, examples: Sequence[Any]) -> None:
    """Give every node a fake value.

    Every input dim is symbolic until the graph fixes it, except heads and channels of a past.
    """
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    token_dims = _token_dims(graph_module, placeholders, examples)
    mode = _fake_mode()

    def fake(node: fx.Node, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        dims = token_dims[node]
        static: set[int] = set()
        if x.dim() == 4 and dims & {1, 2}:
            static = {3, *(3 - d for d in dims & {1, 2})}
        elif x.dim() != 4 and dims:
            static = set(range(x.dim())) - dims
        sizes = [DimDynamic.STATIC if d in static else DimDynamic.DYNAMIC for d in range(x.dim())]
        return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    fakes = [fake(node, x) for node, x in zip(placeholders, examples, strict=True)]
    _propagate(graph_module, mode, fakes, examples)


def _token_dims(
    graph_module: fx.GraphModule, placeholders: Sequence[fx.Node], examples: Sequence[Any]
) -> dict[fx.Node, set[int]]:
    """The dims on which inputs, or parts of them, are concatenated to; seen with sizes that are
    numbers, since views of an input say what they are by their sizes.
    """
    mode = _fake_mode()
    fixed = [
        mode.from_tensor(x, static_shapes=True) if isinstance(x, Tensor) else x for x in examples
    ]
    _propagate(graph_module, mode, fixed, examples)
    is_tensor = {n: isinstance(x, Tensor) for n, x in zip(placeholders, examples, strict=True)}
    return {n: appended_dims(n) if is_tensor[n] else set() for n in placeholders}


def _fake_mode() -> FakeTensorMode:
    shapes = ShapeEnv(duck_shape=False, specialize_zero_one=False)
    return FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)


def _propagate(
    graph_module: fx.GraphModule, mode: FakeTensorMode, fakes: list[Any], examples: Sequence[Any]
) -> None:
    try:
        with torch.no_grad():
            FakeTensorProp(graph_module, mode).propagate_dont_convert_inputs(*fakes)
    except Exception as error:
        given = ", ".join(str(list(x.shape)) for x in examples if isinstance(x, Tensor))
        raise ValueError(
            f"the graph does not run on example inputs of shape {given}: {error}"
        ) from error


def _appended_dim(past: fx.Node, node: fx.Node) -> int | None:
    """The dim of tokens, 1 or 2, if ``node`` is ``cat([past, new])`` on it."""
    parts = parts_of(node) if kind(node) == "cat" else ()
    if len(parts) != 2 or parts[0] is not past:
        return None
    return {1: 1, 2: 2, -2: 2, -3: 1}.get(argument(node, 1, "dim", 0))


def _carriers(graph: fx.Graph) -> dict[fx.Node, Format | None]:
    """Inputs that are a past: concatenated to on the dim of tokens, and the result is returned, or
    the newest tokens of it.
    """
    pasts = graph.find_nodes(op="placeholder")
    returned = returned_nodes(graph)
    return {
        past: None
        for past in pasts
        if len(shape_of(past) or ()) == 4
        and any(
            _appended_dim(past, user) is not None and part_returned(user, returned)
            for user in past.users
        )
    }
