"""Recognize every attention, however it is written.

Before:
    out = scaled_dot_product_attention(query, repeat_kv(key), repeat_kv(value), attn_mask=mask)
or
    scores = matmul(query, repeat_kv(key).transpose(2, 3)) * scale + mask
    out = matmul(softmax(scores, -1), repeat_kv(value))
After:
    the same graph, and one ``Attention`` record per attention: scale, mask, causality, softcap and sinks as numbers and
    nodes.

Leaves alone: every node. What is not understood (dropout while training, a scale computed in the graph, weights that are
returned) is recorded as skipped with its reason, because a rewrite that drops it would be silently wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from squat_fx.kernels.reference import NO_CAUSALITY, TOP_LEFT
from squat_fx.passes.base import GraphPass
from squat_fx.passes.records import Attention, Rewriting, Skipped
from squat_fx.passes.spelling import argument, kind, returned_nodes, same_size, shape_of, value_of


class Canonicalize(GraphPass):
    """Fill ``rewriting.attentions`` and note what was not understood."""

    name = "canonicalize attention"

    def run(self, rewriting: Rewriting) -> int:
        """See the module's docstring."""
        for node in rewriting.graph.nodes:
            recognize = SPELLINGS.get(kind(node) or "")
            found = recognize(node) if recognize else None
            if isinstance(found, Attention):
                rewriting.attentions.append(found)
            elif isinstance(found, Skipped):
                rewriting.skipped.append(found)
        return len(rewriting.attentions)


# scaled_dot_product_attention --------------------------------------------------------------------------------------------


def recognize_sdpa(node: fx.Node) -> Attention | Skipped | None:
    """``scaled_dot_product_attention`` as a function or an ATen op."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    defaults = (None, None, None, None, 0.0, False, None)
    values = [argument(node, i, n, d) for i, (n, d) in enumerate(zip(names, defaults, strict=True))]
    return _sdpa(node, node, *values)


def recognize_lowered_sdpa(node: fx.Node) -> Attention | Skipped | None:
    """SDPA after a backend was chosen (``make_fx``): ``output, *statistics = _scaled_dot_product_..._attention``."""
    used = {u.args[1]: u for u in node.users if kind(u) == "getitem" and u.users}
    if set(used) != {0}:
        return Skipped(node.name, "the attention's statistics are read as well as its output")
    names = [a.name for a in node.target._schema.arguments]  # pyright: ignore[reportFunctionMemberAccess]
    defaults = {a.name: a.default_value for a in node.target._schema.arguments}  # pyright: ignore[reportFunctionMemberAccess]

    def get(name: str) -> Any:
        return argument(node, names.index(name), name, defaults[name]) if name in names else None

    mask = get("attn_mask") if "attn_mask" in names else get("attn_bias")
    return _sdpa(
        node, used[0], get("query"), get("key"), get("value"), mask, get("dropout_p"), get("is_causal"), get("scale")
    )


def _sdpa(
    node: fx.Node,
    output: fx.Node,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    dropout: Any,
    causal: Any,
    scale: Any,
) -> Attention | Skipped:
    shape = shape_of(query)
    if shape is None or len(shape) != 4:
        return Skipped(node.name, "the query is not four-dimensional [batch, heads, tokens, channels]")
    if dropout != 0.0:
        return Skipped(node.name, "dropout is active; call model.eval()")
    if not isinstance(causal, bool):
        return Skipped(node.name, "is_causal is computed in the graph")
    if scale is None:
        scale = shape[3] ** -0.5
    if not isinstance(scale, (int, float)):
        return Skipped(node.name, "the scale is computed in the graph")
    if reason := _mask_reason(mask):
        return Skipped(node.name, reason)
    return Attention(
        output, query, key, value, float(scale), mask, TOP_LEFT if causal else NO_CAUSALITY, spelling="sdpa"
    )


def _mask_reason(mask: Any) -> str | None:
    if mask is None:
        return None
    value = value_of(mask) if isinstance(mask, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return "the mask is not a tensor"
    if value.dtype != torch.bool and not value.dtype.is_floating_point:
        return f"the mask is {value.dtype}, neither bool nor floating point"
    return None if 2 <= value.dim() <= 4 else f"the mask has {value.dim()} dims, expected 2 to 4"


# eager attention: matmul, scale, softcap, mask, softmax, matmul ----------------------------------------------------------


def recognize_eager(softmax: fx.Node) -> Attention | Skipped | None:
    """Attention written out around a softmax over the last dim."""
    shape = shape_of(softmax.args[0])
    dim = argument(softmax, 1, "dim")
    if softmax.op == "call_module":
        dim = softmax.graph.owning_module.get_submodule(str(softmax.target)).dim  # pyright: ignore[reportAttributeAccessIssue]
    if shape is None or len(shape) not in (3, 4) or dim not in (-1, len(shape) - 1):
        return None
    down = _weighted_sum(softmax)
    if down is None:
        return None
    if isinstance(down, str):
        return Skipped(softmax.name, down)
    output, drops_sink_column = down
    scores = _scores(softmax.args[0], drops_sink_column)  # pyright: ignore[reportArgumentType]
    if scores is None:
        return None
    if isinstance(scores, str):
        return Skipped(softmax.name, scores)
    return replace(scores, output=output, value=output.args[1])


def _weighted_sum(softmax: fx.Node) -> tuple[fx.Node, bool] | str | None:
    """Down from the softmax through casts, inactive dropout and a dropped sink column to ``matmul(weights, value)``."""
    node, dropped = softmax, False
    returned = returned_nodes(softmax.graph)
    while True:
        users = [u for u in node.users if u.op != "output"]
        if node in returned or len(users) > 1:
            matmuls = [u for u in users if kind(u) == "matmul" and u.args[0] is node]
            return "the attention weights have another reader" if matmuls or len(users) > 1 else None
        if not users:
            return None
        user = users[0]
        step = kind(user)
        if step == "matmul" and user.args[0] is node:
            return user, dropped
        if step == "dropout":
            if _dropout_is_active(user):
                return "dropout is active; call model.eval()"
        elif step in ("getitem", "slice") and _drops_last_column(user):
            dropped = True
        elif step not in ("cast", "same", "view", "expand") or not _keeps_scores(node, user):
            return None
        node = user


def _dropout_is_active(node: fx.Node) -> bool:
    if node.op == "call_module":
        module = node.graph.owning_module.get_submodule(str(node.target))
        return module.training and module.p > 0  # pyright: ignore[reportOperatorIssue, reportReturnType]
    training = argument(node, 2, "training", argument(node, 2, "train", True))
    return bool(argument(node, 1, "p", 0.5)) and training is not False


def _drops_last_column(node: fx.Node) -> bool:
    before, after = shape_of(node.args[0]), shape_of(node)
    if before is None or after is None or len(before) != len(after):
        return False
    if kind(node) == "slice":
        return argument(node, 1, "dim", 0) in (-1, len(before) - 1) and argument(node, 2, "start") in (0, None) and (
            same_size(after[-1], before[-1] - 1)
        )
    return isinstance(node.args[1], tuple) and node.args[1][-1] == slice(None, -1, None)


def _keeps_scores(before: fx.Node, after: fx.Node) -> bool:
    """Whether queries and keys stay the last two dims, so that only batch and heads were merged or split."""
    a, b = shape_of(before), shape_of(after)
    return a is not None and b is not None and len(b) > 2 and all(map(same_size, a[-2:], b[-2:]))


def _scores(node: fx.Node, expects_sinks: bool) -> Attention | str | None:
    """Up from the softmax's input to ``matmul(query, key.T)``; ``output`` and ``value`` are filled in by the caller."""
    scale, softcap, mask, sinks = 1.0, 0.0, None, None
    if expects_sinks:
        found = _with_sinks(node)
        if found is None:
            return "a column is dropped after the softmax, but no sink column was added before it"
        node, sinks = found
    while True:
        step = kind(node)
        if step == "matmul":
            query, key = node.args[:2]
            out = Attention(node, query, key, key, scale, mask, NO_CAUSALITY, softcap, sinks, "eager")  # pyright: ignore[reportArgumentType]
            return out
        if step in ("cast", "same") or (step in ("view", "expand") and _keeps_scores(node.args[0], node)):  # pyright: ignore[reportArgumentType]
            node = node.args[0]  # pyright: ignore[reportAssignmentType]
            continue
        if step == "add":
            chain, added = _scores_and_other(node)
            if chain is None:
                return None
            if mask is not None or softcap or scale != 1.0:
                return "a term is added to the scores before they are scaled or capped"
            reason = _mask_reason(added) if isinstance(added, fx.Node) else "a number is added to the scores"
            if reason is None and value_of(added).dtype == torch.bool:  # pyright: ignore[reportOptionalMemberAccess]
                reason = "a bool mask is added to the scores"
            shape = shape_of(added)
            if reason is None and len(shape_of(node) or ()) == 3 and len(shape or ()) == 3 and shape[0] != 1:  # pyright: ignore[reportOptionalSubscript]
                reason = "the mask has batch and heads merged"
            if reason:
                return reason
            mask, node = added, chain
            continue
        if step in ("mul", "div"):
            chain, factor = _scores_and_other(node)
            if chain is None:
                return None
            if not isinstance(factor, (int, float)) or isinstance(factor, bool):
                return "the scale is computed in the graph"
            if step == "mul" and kind(chain) == "tanh" and not softcap and scale == 1.0:
                inner = _softcap_argument(chain, float(factor))
                if inner is None:
                    return "tanh is applied to the scores, but not as softcap * tanh(scores / softcap)"
                softcap, node = float(factor), inner
                continue
            scale, node = scale * (factor if step == "mul" else 1.0 / factor), chain
            continue
        return "tanh is applied to the scores, but not as softcap * tanh(scores / softcap)" if step == "tanh" else None


def _scores_and_other(node: fx.Node) -> tuple[fx.Node | None, Any]:
    """Split ``scores op other`` (either order) by which side leads up to a matmul."""
    a, b = node.args[:2]
    if isinstance(a, fx.Node) and _leads_to_matmul(a):
        return a, b
    if kind(node) != "div" and isinstance(b, fx.Node) and _leads_to_matmul(b):
        return b, a
    return None, None


def _leads_to_matmul(node: Any, steps: int = 12) -> bool:
    for _ in range(steps):
        step = kind(node)
        if step == "matmul":
            return True
        if step not in ("cast", "same", "view", "expand", "mul", "div", "add", "tanh"):
            return False
        if step in ("mul", "div", "add") and not isinstance(node.args[0], fx.Node):
            node = node.args[1]
        else:
            node = node.args[0]
    return False


def _softcap_argument(tanh: fx.Node, softcap: float) -> fx.Node | None:
    """``x`` of ``tanh(x / softcap)``."""
    inner = tanh.args[0]
    if kind(inner) not in ("div", "mul"):
        return None
    x, factor = inner.args[:2]  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    if not isinstance(x, fx.Node) or not isinstance(factor, (int, float)):
        return None
    expected = softcap if kind(inner) == "div" else 1.0 / softcap
    return x if math.isclose(factor, expected, rel_tol=1e-6) else None


def _with_sinks(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """``scores`` and ``sinks`` of ``x = cat([scores, sinks], -1); x - x.max(-1)`` (the subtraction changes nothing)."""
    while kind(node) in ("sub", "cast", "same"):
        node = node.args[0]  # pyright: ignore[reportAssignmentType]
    if kind(node) != "cat":
        return None
    tensors, dim = node.args[0], argument(node, 1, "dim", 0)
    shape = shape_of(node)
    if not isinstance(tensors, (list, tuple)) or len(tensors) != 2 or shape is None or dim not in (-1, len(shape) - 1):
        return None
    scores, column = tensors
    source = column
    while kind(source) in ("expand", "view", "unsqueeze", "cast", "same"):
        source = source.args[0]  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    sinks, heads = shape_of(source), shape_of(scores)
    if sinks is None or heads is None or len(sinks) != 1 or not same_size(sinks[0], heads[1]):
        return None
    return scores, source  # pyright: ignore[reportReturnType]


SPELLINGS: dict[str, Callable[[fx.Node], Attention | Skipped | None]] = {
    "sdpa": recognize_sdpa,
    "sdpa_lowered": recognize_lowered_sdpa,
    "softmax": recognize_eager,
}
