"""Find what turned the keys that are to be turned back before they are packed.

Before:
    rotated = key * cos + rotate_half(key) * sin     # cos, sin of positions x inv_freq
    stored  = cat([past_key, rotated], dim=-2)
After:
    the same graph; the ``CacheEdge`` of the keys has a format that says which channels turn with
    which, and ``given``, the node of ``inv_freq``, which the op ``store`` is given.

Only codecs that ask for the rotary embedding (``taps``) are looked at, and only where a cache is
made: keys that arrive packed bring all that is needed along (:mod:`squat_fx.layouts.latent_rope`).

Leaves alone, with a reason: attention over keys whose rotary embedding is not found, or whose
angles are not one number a token times one a pair.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from squat_fx.codecs import codec_from_spec
from squat_fx.passes.base import GraphPass
from squat_fx.passes.find_rotary import find_rotary
from squat_fx.passes.records import CacheEdge, Rewriting, Skipped
from squat_fx.passes.spelling import VIEWS, kind


class RecordRotations(GraphPass):
    """Complete the edges of keys that are turned back; drop sites for which that cannot be done."""

    name = "record rotations"

    def run(self, rewriting: Rewriting) -> int:
        """See the module's docstring."""
        completed: dict[fx.Node, CacheEdge | str] = {}
        sites, count = rewriting.sites, 0
        rewriting.sites = []
        for site in sites:
            edge = site.key
            if edge.stored not in completed:
                completed[edge.stored] = _completed(edge, rewriting)
            found = completed[edge.stored]
            if isinstance(found, str):
                skipped = Skipped(site.attention.output.name, f"key: {found}", site.layer)
                rewriting.skipped.append(skipped)
            else:
                rewriting.sites.append(replace(site, key=found))
                count += found is not edge
        return count


def _completed(edge: CacheEdge, rewriting: Rewriting) -> CacheEdge | str:
    """``edge`` with its rotation if its codec asks for it, or why there is none."""
    arrives_packed = edge.past is not None and rewriting.carriers[edge.past] is not None
    if arrives_packed or "rotary" not in codec_from_spec(edge.fmt.codec).taps(edge.role):
        return edge
    found = find_rotary(edge)
    if isinstance(found, str):
        return found
    if found.angles is None or found.angles.inv_freq is None:
        return "the angles of its rotary embedding are not in the graph as positions x frequencies"
    sign, inv_freq = found.rotation.sign, found.angles.inv_freq
    fmt = edge.fmt.stored_layout.with_rotation(edge.fmt, found.rotation)
    if edge.kind == "decode":
        constant = _constant(inv_freq)
        if constant is None:
            return "the frequencies of its rotary embedding are no constant of the graph"
        return replace(edge, fmt=fmt, given=constant * sign)
    if sign < 0:
        with inv_freq.graph.inserting_after(inv_freq):
            negative = inv_freq.graph.call_function(torch.neg, (inv_freq,))
        negative.meta.update(inv_freq.meta)
        inv_freq = negative
    return replace(edge, fmt=fmt, given=inv_freq)


def _constant(node: fx.Node) -> Tensor | None:
    """The numbers of a node that is a buffer of the module, seen some way."""
    while kind(node) in VIEWS | {"cast"} and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    if node.op != "get_attr" or (module := node.graph.owning_module) is None:
        return None
    found = module
    for name in str(node.target).split("."):
        found = getattr(found, name)
    return found.detach() if isinstance(found, Tensor) else None
