"""Heads that read their values in another order than their keys.

    first  = attention(query, key, value[:, :2].repeat(1, 2, 1, 1))     # four heads of keys
    second = attention(query, key, value[:, 2:].repeat(1, 2, 1, 1))

No cache of as many heads of keys as of values serves such an attention; for each block of heads in
which values are not repeated one does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from squat_fx.lenses import Lens
from squat_fx.passes.axes import follow_views
from squat_fx.passes.one_mask import terms_of
from squat_fx.passes.read_lenses import read_part
from squat_fx.passes.records import Attention
from squat_fx.passes.spelling import VIEWS, argument, kind, operand, shape_of, sizes_of


@dataclass
class HeadBlocks:
    """An attention of which the heads ``i`` and ``i + kv_heads`` read the same values: those of
    ``value``, a part of ``values``; and all of ``keys``. There are ``count`` times ``kv_heads``
    heads of keys, and for ``kv_heads`` of them ``query_heads`` of queries.
    """

    keys: fx.Node
    values: fx.Node
    value: fx.Node
    lens: Lens
    kv_heads: int
    count: int
    query_heads: int


def head_blocks(attention: Attention, returned: dict[fx.Node, Any]) -> HeadBlocks | None:
    """How the heads of an attention read their values, if that is a part of them, again and again
    (DiffLlama), while each has keys of its own.
    """
    key, value = (read_part(node, returned) for node in (attention.key, attention.value))
    query = shape_of(attention.query)
    if key is None or value is None or key[1] or not value[1] or len(query or ()) != 4:
        return None
    by_head = (term for term in terms_of(attention) if sizes_of(term.node)[-3:-2] not in ((), (1,)))
    if attention.sinks is not None or any(by_head):
        return None
    keys = follow_views(attention.key, lambda n: n is key[2])
    values = follow_views(attention.value, lambda n: n is value[2])
    if isinstance(keys, str) or isinstance(values, str):
        return None
    key_axes, value_axes = ([axis for axis in x.axes if axis] for x in (keys, values))
    if attention.spelling == "eager":
        key_axes[2:] = key_axes[:1:-1]
    kv_heads, key_heads = sizes_of(value[2])[1], sizes_of(key[2])[1]
    plain = [("batch",), ("heads",), ("tokens",), ("channels",)]
    named = [tuple(n for n in a if n != "repeat") for a in (*key_axes, *value_axes)]
    if named != plain * 2 or key_axes[1][0] != "heads" or value_axes[1][:2] != ("repeat", "heads"):
        return None
    query_heads = query[1] if query else None
    if not isinstance(query_heads, int) or not isinstance(key_heads, int) or key_heads % kv_heads:
        return None
    count = key_heads // kv_heads
    if _first_repeat(attention.value) != count or values.repeat != count * keys.repeat:
        return None
    if query_heads % key_heads:
        return None
    in_a_block = query_heads // count
    return HeadBlocks(key[0], value[0], value[2], value[1], kv_heads, count, in_a_block)


def _first_repeat(node: fx.Node) -> int | None:
    """How many times ``x.repeat(1, n, 1, 1)`` above a node repeats the heads."""
    while kind(node) != "repeat":
        source = operand(node)
        if not isinstance(source, fx.Node) or kind(node) not in VIEWS | {"cast"}:
            return None
        node = source
    given: Any = argument(node, 1, "repeats")
    repeats: Any = tuple(given) if isinstance(given, (tuple, list)) else node.args[1:]
    return repeats[1] if len(repeats) == 4 and repeats[:1] + repeats[2:] == (1, 1, 1) else None
