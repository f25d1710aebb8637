"""Write the einsums of an attention as matrix products.

Before:
    scores = einsum("bthd,bshd->bhts", query, key)
    output = einsum("bhts,bshd->bthd", softmax(scores), value)
After:
    scores = matmul(query.permute(0, 2, 1, 3), key.permute(0, 2, 3, 1))
    output = matmul(softmax(scores), value.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)

Leaves alone: einsums near no softmax, of other than two operands, with repeated letters, ellipses,
or that are no batched product of two matrices.
Keeps: the numbers; torch computes such an einsum in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from squat_fx.passes.base import GraphPass
from squat_fx.passes.records import Rewriting
from squat_fx.passes.spelling import kind, shape_of, value_of

STEPS = 8  # between an einsum and the softmax before or after it


class SpellOutEinsums(GraphPass):
    """Replace einsums that lead to a softmax or come from one."""

    name = "spell out einsums"

    def run(self, rewriting: Rewriting) -> int:
        """See the module's docstring."""
        count = 0
        for node in list(rewriting.graph.nodes):
            if kind(node) != "einsum" or not _is_beside_softmax(node):
                continue
            product = _as_product(node)
            if product is not None:
                product.meta.update(node.meta)
                node.replace_all_uses_with(product)
                rewriting.graph.erase_node(node)
                count += 1
        return count


def _is_beside_softmax(node: fx.Node) -> bool:
    return _reaches_softmax([node], "users") or _reaches_softmax([node], "all_input_nodes")


def _reaches_softmax(nodes: Iterable[fx.Node], direction: str) -> bool:
    for _ in range(STEPS):
        nodes = {other for node in nodes for other in getattr(node, direction)}
        if any(kind(node) == "softmax" for node in nodes):
            return True
    return False


def _as_product(node: fx.Node) -> fx.Node | None:
    """The einsum as permutes and one ``matmul``, put in front of it; None if it is no such."""
    read = _equation(node)
    if read is None:
        return None
    left, right, result, (a, b) = read
    shared = [x for x in left if x in right]
    batch = [x for x in result if x in shared]
    summed = [x for x in shared if x not in result]
    rows, columns = ([x for x in one if x not in shared] for one in (left, right))
    if [len(x) for x in (summed, rows, columns)] != [1, 1, 1]:
        return None
    if sorted(result) != sorted([*batch, *rows, *columns]):
        return None
    graph = node.graph
    with graph.inserting_before(node):
        a = _permuted(a, left, [*batch, *rows, *summed])
        b = _permuted(b, right, [*batch, *summed, *columns])
        product = graph.call_function(torch.matmul, (a, b))
        product.meta["val"] = torch.matmul(value_of(a), value_of(b))
        return _permuted(product, [*batch, *rows, *columns], list(result))


def _equation(node: fx.Node) -> tuple[str, str, str, tuple[fx.Node, fx.Node]] | None:
    """The letters of both operands and of the result, and the operands."""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or equation.count(",") != 1 or "->" not in equation:
        return None
    given, result = equation.replace(" ", "").split("->")
    left, right = given.split(",")
    is_plain = all(x.isalpha() and len(set(x)) == len(x) for x in (left, right, result))
    if not is_plain or len(operands) != 2:
        return None
    shapes = [shape_of(x) for x in operands]
    if [len(s or ()) for s in shapes] != [len(left), len(right)]:
        return None
    sizes: dict[str, Any] = {}
    for letters, shape in zip((left, right), shapes, strict=True):
        for letter, size in zip(letters, shape or (), strict=True):
            if sizes.setdefault(letter, size) != size:  # one of them is broadcast
                return None
    return left, right, result, (operands[0], operands[1])  # pyright: ignore[reportReturnType]


def _permuted(x: fx.Node, letters: str | list[str], wanted: list[str]) -> fx.Node:
    order = [list(letters).index(letter) for letter in wanted]
    if order == sorted(order):
        return x
    turned = x.graph.call_method("permute", (x, order))
    turned.meta["val"] = value_of(x).permute(order)
    return turned
