"""What a node does, whichever way it is written.

Models reach the same operation as a function (``torch.cat``), a method (``x.reshape``), a Python operator, a module
(``nn.Dropout``) or an ATen overload (``aten.cat.default``), depending on who traced them. A pass asks for the kind.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

aten = torch.ops.aten
prims = torch.ops.prims

_SPELLINGS: dict[str, tuple[Any, ...]] = {
    "add": (operator.add, operator.iadd, torch.add, "add", "add_", aten.add.Tensor, aten.add_.Tensor, aten.add.Scalar),
    "sub": (operator.sub, operator.isub, torch.sub, "sub", aten.sub.Tensor),
    "mul": (operator.mul, operator.imul, torch.mul, "mul", "mul_", aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor),
    "div": (operator.truediv, operator.itruediv, torch.div, "div", "div_", aten.div.Tensor, aten.div.Scalar),
    "matmul": (operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm", aten.matmul.default, aten.bmm.default),
    "tanh": (torch.tanh, F.tanh, "tanh", aten.tanh.default),
    "softmax": (F.softmax, torch.softmax, "softmax", aten.softmax.int, aten._softmax.default),
    "dropout": (F.dropout, torch.dropout, aten.dropout.default),
    "cast": (
        "to", "float", "half", "bfloat16", "type", "type_as", aten._to_copy.default, aten.to.dtype,
        aten.to.dtype_layout, prims.convert_element_type.default,
    ),
    "cat": (torch.cat, torch.concat, torch.concatenate, aten.cat.default),
    "max": (torch.max, torch.amax, "max", "amax", aten.max.dim, aten.amax.default),
    "view": (
        torch.reshape, "view", "reshape", "flatten", torch.flatten, "unflatten", aten.view.default,
        aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, "squeeze", aten.squeeze.dim,
    ),
    "unsqueeze": (torch.unsqueeze, "unsqueeze", aten.unsqueeze.default),
    "expand": ("expand", aten.expand.default, torch.broadcast_to, torch.Tensor.expand),
    "transpose": (torch.transpose, torch.swapaxes, "transpose", "swapaxes", aten.transpose.int),
    "permute": (torch.permute, "permute", aten.permute.default),
    "repeat_interleave": (torch.repeat_interleave, "repeat_interleave", aten.repeat_interleave.self_int),
    "getitem": (operator.getitem,),
    "slice": (aten.slice.Tensor,),
    "same": (
        "contiguous", "clone", "detach", "alias", torch.clone, aten.clone.default, aten.detach.default,
        aten.alias.default, aten.contiguous.default, aten.lift_fresh_copy.default,
    ),
    "arange": (torch.arange, aten.arange.default, aten.arange.start, aten.arange.start_step),
    "sdpa": (
        F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention,
        aten.scaled_dot_product_attention.default,
    ),
    "sdpa_lowered": (
        aten._scaled_dot_product_flash_attention_for_cpu.default, aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default, aten._scaled_dot_product_cudnn_attention.default,
    ),
}  # fmt: skip
_KIND = {target: kind for kind, targets in _SPELLINGS.items() for target in targets}
_MODULES = {torch.nn.Softmax: "softmax", torch.nn.Dropout: "dropout", torch.nn.Identity: "same"}

VIEWS = frozenset(
    {"view", "unsqueeze", "expand", "transpose", "permute", "repeat_interleave", "getitem", "slice", "same"}
)


def kind(node: Any) -> str | None:
    """The kind of a node, or None for anything this package does not look into."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_module":
        return _MODULES.get(type(node.graph.owning_module.get_submodule(str(node.target))))
    if node.op in ("call_function", "call_method"):
        try:
            return _KIND.get(node.target)
        except TypeError:  # an unhashable target
            return None
    return None


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Argument ``index`` or keyword ``name`` of a call."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def value_of(node: fx.Node) -> Any:
    """The example (fake) value that tracing left on a node."""
    return node.meta.get("example_value", node.meta.get("val"))


def shape_of(node: Any) -> tuple[Any, ...] | None:
    """The node's shape, sizes as ints or sympy expressions; None if it is no tensor."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    return tuple(size_of(s) for s in value.shape) if isinstance(value, torch.Tensor) else None


def size_of(size: Any) -> Any:
    """A size as an int or a sympy expression; comparing those adds no guard, comparing ``SymInt`` would."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_number else expression
    return size


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal whatever the symbols are."""
    return sympy.simplify(sympy.sympify(a) - sympy.sympify(b)) == 0 if a is not b else True


def dim_of(dim: int, shape: Sequence[Any]) -> int:
    """``dim`` counted from the front."""
    return dim % len(shape) if shape else dim


def returned_nodes(graph: fx.Graph) -> dict[fx.Node, tuple[int, ...]]:
    """Which flat outputs of the graph each node is."""
    found: dict[fx.Node, tuple[int, ...]] = {}
    for index, node in enumerate(flat_outputs(graph)):
        if isinstance(node, fx.Node):
            found[node] = (*found.get(node, ()), index)
    return found


def flat_outputs(graph: fx.Graph) -> list[Any]:
    """The leaves of the graph's output."""
    return torch.utils._pytree.tree_leaves(graph.output_node().args[0], is_leaf=lambda x: x is None)
