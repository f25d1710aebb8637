"""Follow attention scores up from the softmax to the product of queries and keys.

    scores = scale * query @ key.T                                # matmul, bmm or baddbmm
    scores = softcap * tanh(scores / softcap)
    scores = scores + mask + bias                                 # one term or many, scaled or not
    scores = where(visible, scores, -1e9)                         # or masked_fill
    scores = cat([scores, sinks], -1); scores - scores.max(-1)    # sinks

Each step is either understood exactly and noted, or the walk ends with a reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from squat_fx.passes.records import Term
from squat_fx.passes.spelling import (
    argument,
    describe,
    is_last,
    is_plain,
    kind,
    number_of,
    operand,
    parts_of,
    same_size,
    scalar_of,
    shape_of,
    sizes_of,
    source_of,
    value_of,
    writers,
)

NO_SOFTCAP = "tanh is applied to the scores, but not as softcap * tanh(scores / softcap)"
INSIDE_SOFTCAP = "a term is added to the scores before they are capped"
HIDDEN = -1e4  # a score that is filled in and no larger than this has weight zero


@dataclass
class Scores:
    """What stands between ``matmul(query, key.T)`` and the softmax, collected on the way up."""

    passed: set[fx.Node]
    scale: float = 1.0
    softcap: float = 0.0
    terms: list[Term] = field(default_factory=list)
    sinks: fx.Node | None = None
    product: tuple[Any, Any] = (None, None)

    def walk(self, node: fx.Node, drops_sink_column: bool) -> Scores | str:
        """Go up to the product; returns a reason where a step is not understood."""
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
                self.product = operand(node), operand(node, 1)
                return self
            if kind(node) == "baddbmm":
                return self._added_product(node)
            above = self._step(node)
            if isinstance(above, str):
                return above
            node = above

    @property
    def mask(self) -> fx.Node | None:
        """The term next to the softmax, if it is a mask as SDPA takes it."""
        is_mask = self.terms and self.terms[0].means != "hide" and not self.terms[0].merged
        return self.terms[0].node if is_mask and self.terms[0].factor == 1.0 else None

    @property
    def other_terms(self) -> tuple[Term, ...]:
        """The terms besides ``mask``."""
        return tuple(self.terms[self.mask is not None :])

    def _step(self, node: fx.Node) -> fx.Node | str:
        step = kind(node)
        if keeps_scores(node):
            return source_of(node)
        if step == "tanh":
            return NO_SOFTCAP
        if step == "sub" and _is_row_maximum(operand(node, 1), operand(node)):
            return source_of(node)  # which changes nothing in a softmax
        if step in ("where", "masked_fill"):
            return self._filled(node)
        if step in ("max", "maximum", "clamp"):
            return self._raised(node)
        if step not in ("add", "mul", "div") or not is_plain(node):
            return f"the scores pass through {describe(node)}, which is not understood"
        scores, other = _scores_and_other(node)
        if scores is None:
            return f"the scores are on the other side of {describe(node)}"
        return self._added(scores, other) if step == "add" else self._scaled(node, scores, other)

    def _added(self, scores: fx.Node, term: Any, factor: float = 1.0) -> fx.Node | str:
        """``scores + factor * term``, scaled by what was passed below."""
        if self.softcap:
            return INSIDE_SOFTCAP
        if reason := _added_reason(term, sizes_of(scores)):
            return reason
        self.terms.append(Term(term, "add", factor * self.scale, _is_merged(scores, term)))
        return scores

    def _filled(self, node: fx.Node) -> fx.Node | str:
        """``where(visible, scores, -1e9)``, or turned round, or ``masked_fill(hidden, -1e9)``."""
        condition: Any
        scores: Any
        fill: Any
        means: Literal["attend", "hide"] = "hide"
        if kind(node) == "masked_fill":
            condition, fill = argument(node, 1, "mask"), argument(node, 2, "value")
            scores = operand(node)
        else:
            condition, scores, fill = node.args if len(node.args) == 3 else (None, None, None)
            like, means = sizes_of(node), "attend"
            if comes_from_matmul(fill, like):
                scores, fill, means = fill, scores, "hide"
            if not comes_from_matmul(scores, like) or comes_from_matmul(fill, like):
                return f"the scores pass through {describe(node)}, which is not understood"
        number = number_of(fill)
        if self.softcap:
            return INSIDE_SOFTCAP
        if number is None or number * self.scale > HIDDEN:
            what = describe(fill) if number is None else f"{number:g}"
            return f"scores are replaced by {what} in {describe(node)}, which hides nothing"
        if not isinstance(condition, fx.Node) or value_of(condition).dtype != torch.bool:
            return f"the condition of {describe(node)} is no bool tensor"
        self.terms.append(Term(condition, means, merged=_is_merged(scores, condition)))
        return scores

    def _raised(self, node: fx.Node) -> fx.Node | str:
        """``maximum(scores, finfo.min)`` and the like: what is raised to it has weight zero."""
        if kind(node) == "clamp":
            least, most = argument(node, 1, "min"), argument(node, 2, "max")
            scores: Any = operand(node) if most is None else None
        else:
            scores, least = operand(node), operand(node, 1)
            if not comes_from_matmul(scores, sizes_of(node)):
                scores, least = least, scores
        number = number_of(least)
        if not comes_from_matmul(scores, sizes_of(node)) or number is None:
            return f"the scores pass through {describe(node)}, which is not understood"
        if self.softcap:
            return INSIDE_SOFTCAP
        if number * self.scale > HIDDEN:
            return f"scores below {number:g} are raised to it, where they still count"
        return scores

    def _added_product(self, node: fx.Node) -> Scores | str:
        """``baddbmm(term, query, key.T)``: ``beta * term + alpha * query @ key.T``."""
        term, query, key = (
            argument(node, i, name) for i, name in enumerate(("input", "batch1", "batch2"))
        )
        beta, alpha = (number_of(node.kwargs.get(name, 1)) for name in ("beta", "alpha"))
        if beta is None or alpha is None:
            return "the scale is computed in the graph"
        is_nothing = kind(term) == "zeros" and not writers(term)
        if beta and not is_nothing:
            added = self._added(node, term, beta)
            if isinstance(added, str):
                return added
        self.scale *= alpha
        self.product = query, key
        return self

    def _scaled(self, node: fx.Node, scores: fx.Node, factor: Any) -> fx.Node | str:
        number = scalar_of(factor)
        if number is None:
            return "the scale is computed in the graph"
        if kind(scores) == "tanh":
            inner = _softcap_argument(scores, number) if kind(node) == "mul" else None
            if inner is None or self.softcap or self.scale != 1.0:
                return NO_SOFTCAP
            self.softcap = number
            self.passed |= {scores, source_of(scores)}
            return inner
        self.scale *= number if kind(node) == "mul" else 1.0 / number
        return scores


def mask_reason(mask: Any) -> str | None:
    """Why ``mask`` is no mask that attention takes."""
    if mask is None:
        return None
    value = value_of(mask) if isinstance(mask, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return "the mask is not a tensor"
    if value.dtype != torch.bool and not value.dtype.is_floating_point:
        return f"the mask is {value.dtype}, neither bool nor floating point"
    return None if 2 <= value.dim() <= 4 else f"the mask has {value.dim()} dims, expected 2 to 4"


def keeps_scores(node: fx.Node) -> bool:
    """Whether a cast or view leaves queries and keys the last two dims, merging batch and heads."""
    if kind(node) in ("cast", "same"):
        return True
    if kind(node) not in ("view", "expand"):
        return False
    before, after = shape_of(source_of(node)), shape_of(node)
    if before is None or after is None or len(after) < 3:
        return False
    return all(map(same_size, before[-2:], after[-2:]))


def comes_from_matmul(node: Any, like: tuple[Any, ...], steps: int = 12) -> bool:
    """Whether a product of matrices leads to ``node`` through tensors [.., queries, keys]."""
    shape = shape_of(node)
    if shape is None or len(shape) < 3 or not steps or not same_size(shape[-2], like[-2]):
        return False
    if kind(node) == "cat" and parts_of(node):  # beside a sink column
        node = parts_of(node)[0]
        return comes_from_matmul(node, shape_of(node) or (), steps - 1)
    if not same_size(shape[-1], like[-1]):
        return False
    if kind(node) in ("matmul", "baddbmm", "einsum"):
        return True
    return any(comes_from_matmul(n, like, steps - 1) for n in node.all_input_nodes)


def sigmoid_sinks(output: fx.Node, scores: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """``output * sigmoid(logsumexp(scores) - sinks)`` and the sinks, if that is what reads it.

    That is attention with the sinks as logits that carry no value.
    """
    readers = [u for u in output.users if u.op != "output"]
    if len(readers) != 1 or kind(readers[0]) != "mul" or not is_plain(readers[0]):
        return None
    a, b = operand(readers[0]), operand(readers[0], 1)
    scale, shape = (b if a is output else a), shape_of(output) or ()
    like = shape_of(scale) or ()
    if len(like) != 4 or len(shape) != 4 or not all(map(same_size, like, (*shape[:3], 1))):
        return None
    sigmoid = _above(scale, ("cast", "same", "unsqueeze"))
    if kind(sigmoid) != "sigmoid":
        return None
    difference = _above(operand(sigmoid), ("cast", "same"))
    if kind(difference) != "sub" or not is_plain(difference):
        return None
    total, column = (_above(operand(difference, i), ("cast", "same")) for i in (0, 1))
    if kind(total) != "logsumexp" or not isinstance(column, fx.Node):
        return None
    is_over_keys = is_last(argument(total, 1, "dim"), sizes_of(scores))
    if _above(operand(total), ("cast", "same")) is not _above(scores, ("cast", "same")):
        return None
    sinks = one_logit_per_head(column, shape[1], len(sizes_of(total)))
    return (readers[0], sinks) if is_over_keys and sinks is not None else None


def _above(node: Any, steps: tuple[str, ...]) -> Any:
    while kind(node) in steps:
        node = source_of(node)
    return node


def _added_reason(term: Any, scores: tuple[Any, ...]) -> str | None:
    """Why what is added to the scores is no mask and no bias."""
    if not isinstance(term, fx.Node):
        return "a number is added to the scores"
    if reason := mask_reason(term):
        return reason
    if value_of(term).dtype == torch.bool:
        return "a bool mask is added to the scores"
    is_broadcast = sizes_of(term)[-1] == 1 != scores[-1]
    return "what is added to the scores is the same for all keys" if is_broadcast else None


def _is_merged(scores: fx.Node, term: fx.Node) -> bool:
    """Whether a term's first dim is batch and heads in one."""
    shape = sizes_of(term)
    return len(sizes_of(scores)) == 3 and len(shape) == 3 and shape[0] != 1


def _scores_and_other(node: fx.Node) -> tuple[fx.Node | None, Any]:
    """Split ``scores op other`` (either order) by which side leads up to a matmul."""
    a, b = operand(node), operand(node, 1)
    like = sizes_of(node)
    if comes_from_matmul(a, like):
        return a, b
    if kind(node) != "div" and comes_from_matmul(b, like):
        return b, a
    return None, None


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
    sinks = one_logit_per_head(column, sizes_of(scores)[1], 4)
    if sinks is None:
        return "the sink column is not one logit per head, the same for all queries"
    return scores, sinks


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


def one_logit_per_head(column: fx.Node, heads: Any, dims: int) -> fx.Node | None:
    """``sinks`` ``[heads]`` of ``sinks.reshape(1, -1, 1, 1).expand(batch, -1, q_len, 1)``, or of a
    tensor of fewer ``dims`` that begins likewise.
    """
    node, per_head = column, False
    while kind(node) in ("expand", "view", "unsqueeze", "cast", "same"):
        per_head |= _begins_per_head(sizes_of(node), heads, dims)
        node = source_of(node)
    sinks = shape_of(node)
    is_vector = sinks is not None and len(sinks) == 1 and same_size(sinks[0], heads)
    return node if per_head and is_vector else None


def _begins_per_head(shape: tuple[Any, ...], heads: Any, dims: int) -> bool:
    return len(shape) == dims and all(map(same_size, shape, (1, heads, 1, 1)))
