"""What a node does, whichever way it is written.

Models reach the same operation as a function (``torch.cat``), a method (``x.reshape``), a Python
operator, a module (``nn.Dropout``) or an ATen overload (``aten.cat.default``), depending on who
traced them. A pass asks for the kind.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import sympy
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import fx
from torch.utils._sympy.functions import Max as TorchMax

aten = torch.ops.aten
prims = torch.ops.prims

# fmt: off
_SPELLINGS: dict[str, tuple[Any, ...]] = {
    "add": (
        operator.add, operator.iadd, torch.add, "add", "add_",
        aten.add.Tensor, aten.add_.Tensor, aten.add.Scalar,
    ),
    "sub": (operator.sub, operator.isub, torch.sub, "sub", aten.sub.Tensor),
    "mul": (
        operator.mul, operator.imul, torch.mul, "mul", "mul_",
        aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor,
    ),
    "div": (
        operator.truediv, operator.itruediv, torch.div, "div", "div_",
        aten.div.Tensor, aten.div.Scalar, aten.div_.Tensor,
    ),
    "matmul": (
        operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm",
        aten.matmul.default, aten.bmm.default,
    ),
    "baddbmm": (torch.baddbmm, "baddbmm", aten.baddbmm.default),
    "einsum": (torch.einsum, torch.functional.einsum, aten.einsum.default),
    "where": (torch.where, "where", aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf),
    "masked_fill": (
        torch.masked_fill, "masked_fill", "masked_fill_",
        aten.masked_fill.Scalar, aten.masked_fill.Tensor,
    ),
    "constant": (
        torch.tensor, torch.scalar_tensor, torch.full,
        aten.scalar_tensor.default, aten.full.default,
    ),
    "zeros": (
        torch.zeros, torch.zeros_like, "new_zeros",
        aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default,
    ),
    "logsumexp": (torch.logsumexp, "logsumexp", aten.logsumexp.default),
    "sigmoid": (torch.sigmoid, F.sigmoid, "sigmoid", aten.sigmoid.default),
    "tanh": (torch.tanh, F.tanh, "tanh", aten.tanh.default),
    "softmax": (F.softmax, torch.softmax, "softmax", aten.softmax.int, aten._softmax.default),
    "dropout": (F.dropout, torch.dropout, aten.dropout.default),
    "cast": (
        "to", "float", "half", "bfloat16", "type", "type_as", aten._to_copy.default, aten.to.dtype,
        aten.to.dtype_layout, prims.convert_element_type.default,
    ),
    "cat": (torch.cat, torch.concat, torch.concatenate, aten.cat.default),
    "stack": (torch.stack, aten.stack.default),
    "max": (torch.max, torch.amax, "max", "amax", aten.max.dim, aten.amax.default),
    "view": (
        torch.reshape, torch.flatten, torch.unflatten, torch.squeeze,
        "view", "reshape", "flatten", "unflatten", "squeeze",
        aten.view.default, aten.reshape.default, aten._unsafe_view.default,
        aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.dim, aten.squeeze.dims,
    ),
    "maximum": (torch.maximum, "maximum", aten.maximum.default),
    "clamp": (
        torch.clamp, torch.clamp_min, torch.clip, "clamp", "clamp_min", "clip",
        aten.clamp.default, aten.clamp_min.default,
    ),
    "unsqueeze": (torch.unsqueeze, "unsqueeze", aten.unsqueeze.default),
    "expand": ("expand", aten.expand.default, torch.broadcast_to, torch.Tensor.expand),
    "transpose": (torch.transpose, torch.swapaxes, "transpose", "swapaxes", aten.transpose.int),
    "permute": (torch.permute, "permute", aten.permute.default),
    "repeat_interleave": (
        torch.repeat_interleave, "repeat_interleave", aten.repeat_interleave.self_int,
    ),
    "repeat": (torch.tile, "repeat", "tile", aten.repeat.default, aten.tile.default),
    "getitem": (operator.getitem,),
    "slice": (aten.slice.Tensor,),
    "same": (
        "contiguous", "clone", "detach", "alias", torch.clone,
        aten.clone.default, aten.detach.default, aten.alias.default, aten.contiguous.default,
        aten.lift_fresh_copy.default,
    ),
    "arange": (torch.arange, aten.arange.default, aten.arange.start, aten.arange.start_step),
    "sdpa": (
        F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default,
    ),
    "sdpa_lowered": (
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    ),
}
# fmt: on
_KIND = {target: kind for kind, targets in _SPELLINGS.items() for target in targets}
_MODULES = {torch.nn.Softmax: "softmax", torch.nn.Dropout: "dropout", torch.nn.Identity: "same"}
_KEYWORDS = (("input", "self", "tensors"), ("other", "mat2"))  # torch's names for operands

VIEWS = frozenset(
    {
        "view",
        "unsqueeze",
        "expand",
        "transpose",
        "mT",
        "permute",
        "repeat_interleave",
        "repeat",
        "getitem",
        "slice",
        "same",
    }
)
_MAY_ALIAS = (VIEWS | {"cast"}) - {"repeat_interleave", "repeat"}
_OTHER_VIEWS = frozenset({"chunk", "split", "unbind", "select", "narrow", "view_as", "movedim"})
_PRODUCTS = frozenset(
    {"linear", "Linear", "Conv1D", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"}
)
_INPLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in dir(operator)
    if re.fullmatch(r"i(add|sub|mul|truediv|pow)", name)
) | {operator.setitem}


def kind(node: Any) -> str | None:
    """The kind of a node, or None for anything this package does not look into."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_module":
        return _MODULES.get(type(submodule_of(node)))
    if node.op == "call_function" and node.target is getattr and node.args[1] == "mT":
        return "mT"
    if node.op in ("call_function", "call_method"):
        try:
            return _KIND.get(node.target)
        except TypeError:  # an unhashable target
            return None
    return None


def describe(node: Any) -> str:
    """The operation of a node for a reader: ``linear``, ``index_copy_``, ``a graph input``."""
    if not isinstance(node, fx.Node):
        return "a constant"
    if node.op == "placeholder":
        return "a graph input"
    if node.op == "call_module":
        return type(submodule_of(node)).__name__
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def submodule_of(node: fx.Node) -> torch.nn.Module:
    """The module that a ``call_module`` node calls."""
    owner = node.graph.owning_module
    assert owner is not None, "the graph belongs to no module"
    return owner.get_submodule(str(node.target))


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Argument ``index`` or keyword ``name`` of a call."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def operand(node: fx.Node, index: int = 0) -> Any:
    """Operand 0 or 1 of a call, by place or by torch's keyword; None if there is none."""
    if len(node.args) > index:
        return node.args[index]
    return next((node.kwargs[k] for k in _KEYWORDS[index] if k in node.kwargs), None)


def scalar_of(x: Any) -> float | None:
    """The number that ``x`` is, written out or as an input; None if it is none, or a tensor.

    Dynamo makes inputs of numbers that differed among models with the same code; what one of them
    is here is guarded from now on.
    """
    if not isinstance(x, fx.Node):
        is_number = isinstance(x, (int, float)) and not isinstance(x, bool)
        return float(x) if is_number else None
    value = value_of(x)
    return float(value) if isinstance(value, torch.SymFloat) and value.node.has_hint() else None


def number_of(x: Any) -> float | None:
    """The number that ``x`` is, as :func:`scalar_of` says or as a constant tensor, or None."""
    scalar = scalar_of(x)
    if scalar is not None or not isinstance(x, fx.Node):
        return scalar
    if kind(x) in ("same", "cast"):
        return number_of(operand(x))
    if x.op == "get_attr":
        tensor: Any = getattr(x.graph.owning_module, str(x.target), None)
        is_number = isinstance(tensor, torch.Tensor) and tensor.dim() == 0
        return float(tensor) if is_number else None
    if kind(x) != "constant":
        return None
    index, name = (1, "fill_value") if describe(x) == "full" else (0, "data")
    return number_of(argument(x, index, name))


def same_computation(a: Any, b: Any) -> bool:
    """Whether two nodes are the same operations on the same nodes, nothing being written."""
    if a is b:
        return True
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        is_alike = (a.op, a.target) == (b.op, b.target) and a.op != "placeholder"
        return (
            is_alike
            and not writers(a)
            and not writers(b)
            and same_computation(
                (*a.args, *sorted(a.kwargs.items())), (*b.args, *sorted(b.kwargs.items()))
            )
        )
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(same_computation, a, b))
    is_plain = not isinstance(a, (fx.Node, tuple, list)) and type(a) is type(b)
    return is_plain and bool(a == b)


def source_of(node: fx.Node) -> fx.Node:
    """The node that a view, a cast or another operation on one tensor starts from."""
    source = operand(node)
    assert isinstance(source, fx.Node), f"{node} starts from {source!r}"
    return source


def parts_of(cat: fx.Node) -> tuple[Any, ...]:
    """What a ``cat`` concatenates; empty if that is not written out in the graph."""
    parts = operand(cat)
    return tuple(parts) if isinstance(parts, (list, tuple)) else ()


def is_plain(node: fx.Node) -> bool:
    """Whether binary arithmetic has no modifier, such as ``alpha`` or ``rounding_mode``."""
    return len(node.args) <= 2 and set(node.kwargs) <= {
        name for names in _KEYWORDS for name in names
    }


def reads_size(node: fx.Node) -> bool:
    """Whether a node only asks for its operand's size or type."""
    if node.target is getattr:
        return node.args[1] in ("shape", "dtype", "device", "ndim")
    names = ("size", "dim", "numel", "sym_size", "sym_numel", "sym_stride")
    return describe(node) in (*names, "_assert_tensor_metadata")


def is_product(node: fx.Node) -> bool:
    """Whether a node is a product of matrices, such as a projection."""
    return describe(node) in _PRODUCTS


def newest_of(node: Any) -> fx.Node | None:
    """``x`` of ``x[:, :, -n:]``: the newest of its tokens, or all of them."""
    if kind(node) == "slice":
        is_newest = argument(node, 1, "dim", 0) in (2, -2) and argument(node, 4, "step", 1) == 1
        is_newest &= _reaches_the_end(argument(node, 3, "end"))
        return source_of(node) if is_newest else None
    if kind(node) != "getitem" or not isinstance(node.args[1], tuple):
        return None
    before, after = shape_of(source_of(node)), shape_of(node)
    items = node.args[1]
    if before is None or after is None or len(before) != 4 or len(after) != 4:
        return None
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items = (*items[:at], *[slice(None)] * (5 - len(items)), *items[at + 1 :])
    items = (*items, *[slice(None)] * (4 - len(items)))
    others = (item for dim, item in enumerate(items) if dim != 2)
    if any(item != slice(None) for item in others) or not isinstance(items[2], slice):
        return None
    is_newest = _reaches_the_end(items[2].stop) and items[2].step in (None, 1)
    return source_of(node) if is_newest else None


def _reaches_the_end(stop: Any) -> bool:
    return stop is None or (isinstance(stop, int) and stop >= 2**63 - 1)


def writers(node: fx.Node) -> list[fx.Node]:
    """Operations that write to the node's memory in place, through its views too."""
    found: list[fx.Node] = []
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        for user in current.users:
            is_writer = current in written_by(user)
            if is_writer and user not in found:
                found.append(user)
            if user not in seen and (is_writer or may_alias(user)):
                seen.add(user)
                stack.append(user)
    return found


def may_alias(node: fx.Node) -> bool:
    name = describe(node)
    return (kind(node) in _MAY_ALIAS and name != "clone") or name in _OTHER_VIEWS


def written_by(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node writes to in place."""
    if node.op not in ("call_function", "call_method"):
        return []
    if describe(node) == "triton_kernel_wrapper_mutation":  # a kernel of the model's own
        return node.all_input_nodes
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = enumerate(node.target._schema.arguments)
        written = [
            argument(node, i, a.name)
            for i, a in arguments
            if a.alias_info and a.alias_info.is_write
        ]
    else:
        name = describe(node)
        in_place = name.endswith("_") and not name.endswith("__")
        in_place &= node.target not in (operator.and_, operator.or_, operator.not_)
        in_place |= node.op == "call_function" and node.target in _INPLACE_OPERATORS
        written = [operand(node) if in_place else None, node.kwargs.get("out")]
    return [x for x in written if isinstance(x, fx.Node)]


def memory_of(node: fx.Node) -> fx.Node:
    """The node whose memory ``node`` may be a view of."""
    while may_alias(node) or written_by(node):
        source = operand(node)
        if not isinstance(source, fx.Node):
            break
        node = source
    return node


def value_of(node: fx.Node) -> Any:
    """The example (fake) value that tracing left on a node."""
    return node.meta.get("example_value", node.meta.get("val"))


def shape_of(node: Any) -> tuple[Any, ...] | None:
    """The node's shape, sizes as ints or sympy expressions; None if it is no tensor."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    return tuple(size_of(s) for s in value.shape) if isinstance(value, torch.Tensor) else None


def sizes_of(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a node that is known to be a tensor."""
    shape = shape_of(node)
    assert shape is not None, f"{node} is no tensor"
    return shape


def size_of(size: Any) -> Any:
    """A size as an int or a sympy expression; comparing those adds no guard, ``SymInt`` would."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_number else expression
    return size


def symbols_of(size: Any) -> AbstractSet[Any]:
    """The symbols in a size as :func:`size_of` gives it; none in a number."""
    return getattr(size, "free_symbols", frozenset())


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal whatever the symbols are."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return a is b or a == b or sympy.expand(a - b) == 0


def is_at_least(size: Any, least: Any, graph: fx.Graph) -> bool:
    """Whether ``size >= least`` whatever the symbols are, given the ranges that were guarded on;
    adds no guard.
    """
    difference = sympy.expand(size - least)
    if difference.is_number:
        return bool(difference >= 0)
    shapes = _shape_env(graph)
    if shapes is None:
        return False
    ranges = {symbol: shapes.bound_sympy(symbol) for symbol in difference.free_symbols}
    for choice in difference.atoms(TorchMax, sympy.Max):
        bound = shapes.bound_sympy(choice)
        if bound.lower == bound.upper:
            difference = difference.xreplace({choice: bound.lower})
    above = {
        symbol: bound.lower + sympy.Dummy(integer=True, nonnegative=True)
        for symbol, bound in ranges.items()
        if bound.lower.is_finite
    }
    return bool(
        shapes.bound_sympy(difference).lower >= 0
        or sympy.expand(difference.subs(above)).is_nonnegative
    )


def _shape_env(graph: fx.Graph) -> Any:
    """What is known of the symbols in a graph; None if there are none."""
    for node in graph.find_nodes(op="placeholder"):
        value = value_of(node)
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        for size in sizes:
            if isinstance(size, torch.SymInt):
                return size.node.shape_env
    return None


def dim_of(dim: int, shape: Sequence[Any]) -> int:
    """``dim`` counted from the front."""
    return dim % len(shape) if shape else dim


def is_last(dim: Any, shape: Sequence[Any]) -> bool:
    """Whether ``dim`` is the last one."""
    return dim in (-1, len(shape) - 1)


def returned_nodes(graph: fx.Graph) -> dict[fx.Node, tuple[int, ...]]:
    """Which flat outputs of the graph each node is."""
    found: dict[fx.Node, tuple[int, ...]] = {}
    for index, node in enumerate(flat_outputs(graph)):
        if isinstance(node, fx.Node):
            found[node] = (*found.get(node, ()), index)
    return found


def flat_outputs(graph: fx.Graph) -> list[Any]:
    """The leaves of the graph's output."""
    return pytree.tree_leaves(graph.output_node().args[0], is_leaf=lambda x: x is None)
