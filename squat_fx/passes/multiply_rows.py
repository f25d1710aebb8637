"""Read weights at the speed of memory where a step has one row.

Before:
    query = linear(x, query_weight)          # x: [1, 1, channels]
    key   = linear(x, key_weight)
    value = linear(x, value_weight)
After:
    found = squat_fx.products(x, [query_weight, key_weight, value_weight])
    query, key, value = narrow(found, -1, 0, ...), narrow(found, -1, ...), narrow(found, -1, ...)

A step of batch 1 does little else than read the weights. A matrix product is made for more rows:
cuBLAS reads the weights of a layer of Llama-3.1-8B at 3.3 TB/s on an H200 that copies 4.2, in
kernels that are reduced by another launch each. ``products`` is one launch for up to three weights.

Leaves alone: graphs that take no packed cache, more rows than one, products with a bias, weights
that are computed or not contiguous, dtypes of more than 16 bits, and everything that is not on a
GPU.
Keeps: shapes, dtypes and metadata of what the products were; sums are in fp32.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from squat_fx.kernels.reference import MOST_PRODUCTS
from squat_fx.passes.base import GraphPass
from squat_fx.passes.records import Rewriting
from squat_fx.passes.spelling import argument, operand, shape_of, value_of

DEVICE = "cuda"
DTYPES = (torch.float16, torch.bfloat16)


class MultiplyRows(GraphPass):
    """Exchange products of one row, those of the same row together."""

    name = "multiply rows"

    def run(self, rewriting: Rewriting) -> int:
        """See the module's docstring."""
        if not rewriting.handles:
            return 0
        of_row: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in rewriting.graph.find_nodes(op="call_function", target=F.linear):
            if _is_product_of_a_row(node):
                of_row[operand(node)].append(node)
        for products in of_row.values():
            for first in range(0, len(products), MOST_PRODUCTS):
                _exchange(products[first : first + MOST_PRODUCTS])
        return sum(map(len, of_row.values()))


def _is_product_of_a_row(node: fx.Node) -> bool:
    row, weight, bias = operand(node), argument(node, 1, "weight"), argument(node, 2, "bias")
    shape, sizes = shape_of(row), shape_of(weight)
    if shape is None or sizes is None or bias is not None or len(shape) < 2:
        return False
    if not all(isinstance(size, int) for size in (*shape, *sizes)) or math.prod(shape[:-1]) != 1:
        return False
    values = [value_of(x) for x in (node, row, weight)]
    return (
        weight.op in ("placeholder", "get_attr")
        and {x.device.type for x in values} == {DEVICE}
        and len({x.dtype for x in values}) == 1
        and values[0].dtype in DTYPES
        and values[2].is_contiguous()
    )


def _exchange(products: Sequence[fx.Node]) -> None:
    """Compute all of them where the first one was."""
    first, graph = products[0], products[0].graph
    row, like = operand(first), value_of(first)
    sizes = [value_of(node).shape[-1] for node in products]
    with graph.inserting_before(first):
        found = graph.call_function(
            torch.ops.squat_fx.products.default,
            (row, [argument(node, 1, "weight") for node in products]),
        )
        found.meta.update(first.meta)
        found.meta[_name_of_value(first)] = like.new_empty((*like.shape[:-1], sum(sizes)))
        parts = [found]
        if len(products) > 1:
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            parts = [
                graph.call_function(torch.narrow, (found, -1, start, size))
                for start, size in zip(starts, sizes, strict=True)
            ]
    for node, part in zip(products, parts, strict=True):
        if part is not found:
            part.meta.update(node.meta)
        node.replace_all_uses_with(part)
        graph.erase_node(node)


def _name_of_value(node: fx.Node) -> Any:
    """Where tracing left the node's example."""
    return "example_value" if "example_value" in node.meta else "val"
