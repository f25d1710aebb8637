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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from squat_fx.kernels.reference import NO_CAUSALITY, TOP_LEFT
from squat_fx.passes.base import GraphPass
from squat_fx.passes.causal_masks import read_causal_mask
from squat_fx.passes.records import Attention, Rewriting, Skipped
from squat_fx.passes.scores import (
    Scores,
    comes_from_matmul,
    keeps_scores,
    mask_reason,
    sigmoid_sinks,
)
from squat_fx.passes.spelling import (
    argument,
    describe,
    is_last,
    kind,
    number_of,
    operand,
    reads_size,
    returned_nodes,
    same_computation,
    same_size,
    scalar_of,
    shape_of,
    source_of,
    submodule_of,
)

RETURNED_WEIGHTS = (
    "the attention weights leave the graph as well (output_attentions, or code behind the "
    "attention that Dynamo cannot trace and that is handed them)"
)
DROPOUT = "dropout is active; call model.eval()"


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
    scale = shape[3] ** -0.5 if scale is None else scalar_of(scale)
    if not isinstance(scale, (int, float)):
        return Skipped(node.name, "the scale is computed in the graph")
    if reason := mask_reason(mask):
        return Skipped(node.name, reason)
    causality = TOP_LEFT if causal else NO_CAUSALITY
    return Attention(output, query, key, value, float(scale), mask, causality, spelling="sdpa")


def recognize_eager(softmax: fx.Node) -> Attention | Skipped | None:
    """Attention written out around a softmax over the last dim."""
    scores, shape = operand(softmax), shape_of(operand(softmax))
    if shape is None or len(shape) not in (3, 4) or not is_last(_softmax_dim(softmax), shape):
        return None
    down = _weighted_sum(softmax)
    if down is None or not comes_from_matmul(scores, shape):
        return None
    if isinstance(down, str):
        return Skipped(softmax.name, down)
    up = Scores({softmax}).walk(scores, down.drops_sink_column)
    if isinstance(up, str):
        return Skipped(softmax.name, up)
    for hidden in down.zeros:  # what was hidden from the softmax is zero anyway
        if not any(t.means == "hide" and same_computation(t.node, hidden) for t in up.terms):
            return Skipped(softmax.name, "attention weights are set to zero that may be others")
    query, key = up.product
    output, value = down.output, operand(down.output, 1)
    if (found := sigmoid_sinks(output, scores)) and up.sinks is None:
        output, up.sinks = found
    found = (up.scale, up.mask, NO_CAUSALITY, up.softcap, up.sinks, "eager", up.other_terms)
    return Attention(output, query, key, value, *found)


def _softmax_dim(softmax: fx.Node) -> Any:
    if softmax.op == "call_module":
        return getattr(submodule_of(softmax), "dim", None)
    return argument(softmax, 1, "dim")


# Down from the softmax


@dataclass(frozen=True)
class _WeightedSum:
    """``matmul(weights, value)``, whether a sink column was dropped from the weights before, and
    where they were set to zero.
    """

    output: fx.Node
    drops_sink_column: bool
    zeros: tuple[fx.Node, ...] = ()


def _weighted_sum(softmax: fx.Node) -> _WeightedSum | str | None:
    """Down through casts, inactive dropout and a dropped sink column to ``matmul(weights, value)``.

    None where the softmax is no attention's.
    """
    node, dropped, zeros = softmax, False, ()
    returned = returned_nodes(softmax.graph)
    while True:
        users = [u for u in node.users if u.op != "output" and not reads_size(u)]
        if node in returned or len(users) != 1:
            if not any(_reaches_weighted_sum(u, node) for u in users):
                return None
            return (
                RETURNED_WEIGHTS
                if node in returned
                else "the attention weights have another reader"
            )
        user = users[0]
        step = kind(user)
        if step == "matmul" and operand(user) is node:
            return _WeightedSum(user, dropped, zeros)
        if step == "dropout":
            if dropout_is_active(user):
                return DROPOUT
        elif step in ("getitem", "slice") and _drops_last_column(user) and not dropped:
            dropped = True
        elif step == "masked_fill" and number_of(argument(user, 2, "value")) == 0.0:
            zeros = (*zeros, argument(user, 1, "mask"))
        elif not keeps_scores(user):
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


SPELLINGS: dict[str, Callable[[fx.Node], Attention | Skipped | None]] = {
    "sdpa": recognize_sdpa,
    "sdpa_lowered": recognize_lowered_sdpa,
    "softmax": recognize_eager,
}
