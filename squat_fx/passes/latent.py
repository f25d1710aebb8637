"""Say where keys and values are rebuilt from a latent cache: multi-head latent attention.

    latent   = cat([past_latent, new_latent], 1)             # returned
    rotated  = cat([past_rotated, new_rotated], 2)           # returned, one head for all
    no_rope, value = linear(norm(latent)).unflatten(...).split(...)
    key      = cat([no_rope, rotated.expand(...)], -1)       # or written into a new tensor

What is cached there is neither keys nor values, and an attention that read it packed would have to
project it first. In the absorbed form queries are projected instead, and the attention reads
``latent`` as its keys and a part of it as its values.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from squat_fx.lenses import is_inside, origins
from squat_fx.passes.read_lenses import read_part
from squat_fx.passes.records import Attention
from squat_fx.passes.spelling import (
    describe,
    is_product,
    kind,
    parts_of,
    sizes_of,
    writers,
)

ABSORBED = (
    "key and value are parts of one latent cache (multi-head latent attention, its projections "
    "absorbed into the query), which is small already and stays as it is"
)
_MOST_NODES = 400


def latent_reason(attention: Attention, role: str, returned: dict[fx.Node, Any]) -> str | None:
    """Why keys or values that come from no cache themselves are not stored, if what is cached is
    what they are projected from.
    """
    if _is_absorbed(attention, returned):
        return ABSORBED
    node = attention.key if role == "key" else attention.value
    of_query = _cached_above(attention.query, returned)
    for cached, product in _cached_above(node, returned).items():
        if cached not in of_query or _grows(cached):
            return (
                f"{role} is rebuilt by {describe(product)} from a latent cache at every step "
                "(multi-head latent attention); what is cached is small already and stays as it is"
            )
    return None


def _cached_above(node: fx.Node, returned: dict[fx.Node, Any]) -> dict[fx.Node, fx.Node]:
    """What is returned and leads to ``node`` through one product of matrices, and that product."""
    found: dict[fx.Node, fx.Node] = {}
    seen: set[tuple[fx.Node, bool]] = set()
    stack: list[tuple[fx.Node, fx.Node | None]] = [(node, None)]
    while stack and len(seen) < _MOST_NODES:
        node, product = stack.pop()
        if (node, product is not None) in seen or kind(node) in ("softmax", "sdpa"):
            continue
        seen.add((node, product is not None))
        if product is not None and node in returned:
            found.setdefault(node, product)
            continue
        if is_product(node):
            if product is not None:
                continue
            product = node
        above = [*node.all_input_nodes, *(n for w in writers(node) for n in w.all_input_nodes)]
        stack.extend((n, product) for n in above)
    return found


def _grows(node: fx.Node) -> bool:
    return kind(node) == "cat" and len(parts_of(node)) == 2


def _is_absorbed(attention: Attention, returned: dict[fx.Node, Any]) -> bool:
    """Whether the values are a part of the keys."""
    key, value = (read_part(node, returned) for node in (attention.key, attention.value))
    if key is None or value is None or key[0] is not value[0] or key[1] == value[1]:
        return False
    sizes = sizes_of(key[0])
    dims = [origins(lens, len(sizes))[1] for lens in (key[1], value[1])]
    is_known = all(isinstance(sizes[d], int) for d in frozenset().union(*dims))
    return is_known and is_inside(value[1], key[1], sizes)
