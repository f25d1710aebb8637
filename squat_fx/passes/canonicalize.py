"""Recognize every attention, however it is written.

Before:
    out = scaled_dot_product_attention(query, repeat_kv(key), repeat_kv(value), attn_mask=mask)
or
    scores = matmul(query, repeat_kv(key).transpose(2, 3)) * scale + mask
    out = matmul(softmax(scores, -1), repeat_kv(value))
After:
    the same graph, and one ``Attention`` record per attention: scale, mask, causality, softcap and
    sinks as numbers and nodes. A mask that only spells causality becomes causality.

Leaves alone: every node. What is not understood (dropout while training, a scale computed in the
graph, weights that are returned, scores written in place) is recorded as skipped with its reason,
because a rewrite that drops it would be silently wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from squat_fx.kernels.reference import NO_CAUSALITY, TOP_LEFT
from squat_fx.passes.base import GraphPass
from squat_fx.passes.causal_masks import read_causal_mask
from squat_fx.passes.records import Attention, Rewriting, Skipped
from squat_fx.passes.spelling import (
    argument,
    describe,
    is_last,
    is_plain,
    kind,
    operand,
    parts_of,
    reads_size,
    returned_nodes,
    same_size,
    shape_of,
    sizes_of,
    source_of,
    submodule_of,
    value_of,
    writers,
)

DROPOUT = "dropout is active; call model.eval()"
NO_SOFTCAP = "tanh is applied to the scores, but not as softcap * tanh(scores / softcap)"


class Canonicalize(GraphPass):
    """Fill ``rewriting.attentions`` and note what was not understood."""

    name = "canonicalize attention"

    def run(self, rewriting: Rewriting) -> int:
        """See the module's docstring."""
        for node in rewriting.graph.nodes:
            recognize = SPELLINGS.get(kind(node) or "")
            found = recognize(node) if recognize else None
            if isinstance(found, Attention):
                rewriting.attentions.append(read_causal_mask(found))
            elif isinstance(found, Skipped):
                rewriting.skipped.append(found)
        return len(rewriting.attentions)


def recognize_sdpa(node: fx.Node) -> Attention | Skipped:
    """``scaled_dot_product_attention`` as a function or an ATen op."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    defaults = (None, None, None, None, 0.0, False, None)
    given = zip(names, defaults, strict=True)
    return _sdpa(node, node, *(argument(node, i, n, d) for i, (n, d) in enumerate(given)))


def recognize_lowered_sdpa(node: fx.Node) -> Attention | Skipped:
    """SDPA after a backend was chosen (``make_fx``): ``output, *statistics = _scaled_dot_...``."""
    used = {u.args[1]: u for u in node.users if kind(u) == "getitem" and u.users}
    if set(used) != {0}:
        return Skipped(node.name, "the attention's statistics are read as well as its output")
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = {a.name: (i, a) for i, a in enumerate(node.target._schema.arguments)}

    def get(name: str) -> Any:
        if name not in arguments:
            return None
        index, schema = arguments[name]
        return argument(node, index, name, schema.default_value)

    mask = get("attn_mask" if "attn_mask" in arguments else "attn_bias")
    tensors = (get("query"), get("key"), get("value"), mask)
    return _sdpa(node, used[0], *tensors, get("dropout_p"), get("is_causal"), get("scale"))


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
        reason = "the query is not four-dimensional [batch, heads, tokens, channels]"
        return Skipped(node.name, reason)
    if dropout != 0.0:
        return Skipped(node.name, DROPOUT)
    if not isinstance(causal, bool):
        return Skipped(node.name, "is_causal is computed in the graph")
    if scale is None:
        scale = shape[3] ** -0.5
    if not isinstance(scale, (int, float)):
        return Skipped(node.name, "the scale is computed in the graph")
    if reason := _mask_reason(mask):
        return Skipped(node.name, reason)
    causality = TOP_LEFT if causal else NO_CAUSALITY
    return Attention(output, query, key, value, float(scale), mask, causality, spelling="sdpa")


def _mask_reason(mask: Any) -> str | None:
    if mask is None:
        return None
    value = value_of(mask) if isinstance(mask, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return "the mask is not a tensor"
    if value.dtype != torch.bool and not value.dtype.is_floating_point:
        return f"the mask is {value.dtype}, neither bool nor floating point"
    return None if 2 <= value.dim() <= 4 else f"the mask has {value.dim()} dims, expected 2 to 4"


def recognize_eager(softmax: fx.Node) -> Attention | Skipped | None:
    """Attention written out around a softmax over the last dim."""
    scores, shape = operand(softmax), shape_of(operand(softmax))
    if shape is None or len(shape) not in (3, 4) or not is_last(_softmax_dim(softmax), shape):
        return None
    down = _weighted_sum(softmax)
    if down is None or not _comes_from_matmul(scores, shape):
        return None
    if isinstance(down, str):
        return Skipped(softmax.name, down)
    up = _Scores({softmax}).walk(scores, down.drops_sink_column)
    if isinstance(up, str):
        return Skipped(softmax.name, up)
    query, key = up.product
    output, value = down.output, operand(down.output, 1)
    found = (up.scale, up.mask, NO_CAUSALITY, up.softcap, up.sinks)
    return Attention(output, query, key, value, *found, spelling="eager")


def _softmax_dim(softmax: fx.Node) -> Any:
    if softmax.op == "call_module":
        return getattr(submodule_of(softmax), "dim", None)
    return argument(softmax, 1, "dim")


# Down from the softmax


@dataclass(frozen=True)
class _WeightedSum:
    """``matmul(weights, value)``, and whether a sink column was dropped from the weights before."""

    output: fx.Node
    drops_sink_column: bool


def _weighted_sum(softmax: fx.Node) -> _WeightedSum | str | None:
    """Down through casts, inactive dropout and a dropped sink column to ``matmul(weights, value)``.

    None where the softmax is no attention's.
    """
    node, dropped = softmax, False
    returned = returned_nodes(softmax.graph)
    while True:
        users = [u for u in node.users if u.op != "output" and not reads_size(u)]
        if node in returned or len(users) != 1:
            is_attention = any(_reaches_weighted_sum(u, node) for u in users)
            return "the attention weights have another reader" if is_attention else None
        user = users[0]
        step = kind(user)
        if step == "matmul" and operand(user) is node:
            return _WeightedSum(user, dropped)
        if step == "dropout":
            if dropout_is_active(user):
                return DROPOUT
        elif step in ("getitem", "slice") and _drops_last_column(user) and not dropped:
            dropped = True
        elif not _keeps_scores(user):
            if any(_reaches_weighted_sum(u, user) for u in user.users):
                return (
                    f"the attention weights pass through {describe(user)}, which is not understood"
                )
            return None
        node = user


def _reaches_weighted_sum(node: fx.Node, weights: fx.Node, steps: int = 4) -> bool:
    if kind(node) == "matmul":
        return operand(node) is weights
    return steps > 0 and any(_reaches_weighted_sum(u, node, steps - 1) for u in node.users)


def dropout_is_active(node: fx.Node) -> bool:
    """Whether a dropout changes anything: it is training, and its probability is not 0."""
    if node.op == "call_module":
        module = submodule_of(node)
        return module.training and getattr(module, "p", 0.0) > 0
    training = argument(node, 2, "training", argument(node, 2, "train", True))
    return bool(argument(node, 1, "p", 0.5)) and training is not False


def _drops_last_column(node: fx.Node) -> bool:
    before, after = shape_of(source_of(node)), shape_of(node)
    if before is None or after is None or len(before) != len(after):
        return False
    if not all(map(same_size, before[:-1], after[:-1])) or not same_size(after[-1], before[-1] - 1):
        return False
    if kind(node) == "slice":
        return is_last(argument(node, 1, "dim", 0), before) and not argument(node, 2, "start")
    index = node.args[1]
    return isinstance(index, tuple) and index[-1] in (slice(None, -1), slice(0, -1))


def _keeps_scores(node: fx.Node) -> bool:
    """Whether a cast or view leaves queries and keys the last two dims, merging batch and heads."""
    if kind(node) in ("cast", "same"):
        return True
    if kind(node) not in ("view", "expand"):
        return False
    before, after = shape_of(source_of(node)), shape_of(node)
    if before is None or after is None or len(after) < 3:
        return False
    return all(map(same_size, before[-2:], after[-2:]))


# Up from the softmax


@dataclass
class _Scores:
    """What stands between ``matmul(query, key.T)`` and the softmax, collected on the way up."""

    passed: set[fx.Node]
    scale: float = 1.0
    softcap: float = 0.0
    mask: fx.Node | None = None
    sinks: fx.Node | None = None
    product: tuple[Any, Any] = (None, None)

    def walk(self, node: fx.Node, drops_sink_column: bool) -> _Scores | str:
        """Go up to the matmul; returns a reason where a step is not understood."""
        if drops_sink_column:
            found = _with_sinks(node)
            if isinstance(found, str):
                return found
            node, self.sinks = found
        while True:
            self.passed.add(node)
            if in_place := [w for w in writers(node) if w not in self.passed]:
                return f"the scores are changed in place by {describe(in_place[0])}"
            if kind(node) == "matmul":
                break
            above = self._step(node)
            if isinstance(above, str):
                return above
            node = above
        self.product = operand(node), operand(node, 1)
        return self

    def _step(self, node: fx.Node) -> fx.Node | str:
        step = kind(node)
        if _keeps_scores(node):
            return source_of(node)
        if step == "tanh":
            return NO_SOFTCAP
        if step not in ("add", "mul", "div") or not is_plain(node):
            return f"the scores pass through {describe(node)}, which is not understood"
        scores, other = _scores_and_other(node)
        if scores is None:
            return f"the scores are on the other side of {describe(node)}"
        return self._masked(scores, other) if step == "add" else self._scaled(node, scores, other)

    def _masked(self, scores: fx.Node, mask: Any) -> fx.Node | str:
        if self.mask is not None:
            return "more than one term is added to the scores"
        if self.softcap or self.scale != 1.0:
            return "a term is added to the scores before they are scaled or capped"
        reason = _added_reason(scores, mask)
        self.mask = mask
        return reason or scores

    def _scaled(self, node: fx.Node, scores: fx.Node, factor: Any) -> fx.Node | str:
        if not isinstance(factor, (int, float)) or isinstance(factor, bool):
            return "the scale is computed in the graph"
        if kind(scores) == "tanh":
            inner = _softcap_argument(scores, float(factor)) if kind(node) == "mul" else None
            if inner is None or self.softcap or self.scale != 1.0:
                return NO_SOFTCAP
            self.softcap = float(factor)
            self.passed |= {scores, source_of(scores)}
            return inner
        self.scale *= factor if kind(node) == "mul" else 1.0 / factor
        return scores


def _added_reason(scores: fx.Node, mask: Any) -> str | None:
    """Why what is added to the scores is no mask."""
    if not isinstance(mask, fx.Node):
        return "a number is added to the scores"
    if reason := _mask_reason(mask):
        return reason
    if value_of(mask).dtype == torch.bool:
        return "a bool mask is added to the scores"
    shape = sizes_of(mask)
    if len(sizes_of(scores)) == 3 and len(shape) == 3 and shape[0] != 1:
        return "the mask has batch and heads merged"
    return None


def _scores_and_other(node: fx.Node) -> tuple[fx.Node | None, Any]:
    """Split ``scores op other`` (either order) by which side leads up to a matmul."""
    a, b = operand(node), operand(node, 1)
    like = sizes_of(node)
    if _comes_from_matmul(a, like):
        return a, b
    if kind(node) != "div" and _comes_from_matmul(b, like):
        return b, a
    return None, None


def _comes_from_matmul(node: Any, like: tuple[Any, ...], steps: int = 12) -> bool:
    """Whether a product of matrices leads to ``node`` through tensors [.., queries, keys]."""
    shape = shape_of(node)
    if shape is None or len(shape) < 3 or not steps or not same_size(shape[-2], like[-2]):
        return False
    if kind(node) == "cat" and parts_of(node):  # beside a sink column
        node = parts_of(node)[0]
        return _comes_from_matmul(node, shape_of(node) or (), steps - 1)
    if not same_size(shape[-1], like[-1]):
        return False
    if kind(node) == "matmul" or describe(node) in ("baddbmm", "einsum"):
        return True
    return any(_comes_from_matmul(n, like, steps - 1) for n in node.all_input_nodes)


def _softcap_argument(tanh: fx.Node, softcap: float) -> fx.Node | None:
    """``x`` of ``tanh(x / softcap)``."""
    inner = operand(tanh)
    if kind(inner) not in ("div", "mul") or not is_plain(inner):
        return None
    x, factor = operand(inner), operand(inner, 1)
    if not isinstance(x, fx.Node) or not isinstance(factor, (int, float)):
        return None
    expected = softcap if kind(inner) == "div" else 1.0 / softcap
    return x if math.isclose(factor, expected, rel_tol=1e-6) else None


def _with_sinks(node: fx.Node) -> tuple[fx.Node, fx.Node] | str:
    """``scores`` and ``sinks`` of ``x = cat([scores, sinks], -1); x - x.max(-1)``.

    The subtraction changes nothing in a softmax.
    """
    while kind(node) in ("sub", "cast", "same"):
        if kind(node) == "sub" and not _is_row_maximum(operand(node, 1), operand(node)):
            return "something else than its maximum is subtracted from the scores"
        node = source_of(node)
    shape = shape_of(node)
    parts = parts_of(node) if kind(node) == "cat" else ()
    if shape is None or len(parts) != 2 or not is_last(argument(node, 1, "dim", 0), shape):
        return "a column is dropped after the softmax, but no sink column was added before it"
    scores, column = parts
    sinks = _one_logit_per_head(column, sizes_of(scores))
    return "the sink column is not one logit per head" if sinks is None else (scores, sinks)


def _is_row_maximum(node: Any, scores: Any) -> bool:
    if kind(node) == "getitem" or (isinstance(node, fx.Node) and node.target is getattr):
        if node.args[1] not in (0, "values"):
            return False
        node = source_of(node)
    if kind(node) != "max" or operand(node) is not scores:
        return False
    dim = argument(node, 1, "dim")
    dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
    return is_last(dim, sizes_of(scores)) and argument(node, 2, "keepdim", False) is True


def _one_logit_per_head(column: fx.Node, scores: tuple[Any, ...]) -> fx.Node | None:
    """``sinks`` ``[heads]`` of ``sinks.reshape(1, -1, 1, 1).expand(batch, -1, q_len, 1)``."""
    node, per_head = column, False
    while kind(node) in ("expand", "view", "unsqueeze", "cast", "same"):
        shape = sizes_of(node)
        per_head |= len(shape) == 4 and all(map(same_size, shape, (1, scores[1], 1, 1)))
        node = source_of(node)
    sinks = shape_of(node)
    is_vector = sinks is not None and len(sinks) == 1 and same_size(sinks[0], scores[1])
    return node if per_head and is_vector else None


SPELLINGS: dict[str, Callable[[fx.Node], Attention | Skipped | None]] = {
    "sdpa": recognize_sdpa,
    "sdpa_lowered": recognize_lowered_sdpa,
    "softmax": recognize_eager,
}
