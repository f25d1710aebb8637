"""How graphs change. ``PIPELINE`` is the order; each file is one pass and shows its graphs."""

from __future__ import annotations

from squat_fx.passes.base import GraphPass
from squat_fx.passes.canonicalize import Canonicalize
from squat_fx.passes.find_cache_edges import FindCacheEdges
from squat_fx.passes.fuse_appends import FuseAppends
from squat_fx.passes.quantize_kv_cache import QuantizeKVCache
from squat_fx.passes.record_rotations import RecordRotations
from squat_fx.passes.records import Attention, AttentionSite, CacheEdge, Rewriting, Skipped
from squat_fx.passes.serve_positions import ServePositions
from squat_fx.passes.set_masks_apart import SetMasksApart
from squat_fx.passes.spell_out_einsums import SpellOutEinsums
from squat_fx.passes.take_apart import PutBackTogether, TakeCachesApart
from squat_fx.passes.verify import Verify

PIPELINE: tuple[type[GraphPass], ...] = (
    SpellOutEinsums,
    Canonicalize,
    TakeCachesApart,
    FindCacheEdges,
    RecordRotations,
    PutBackTogether,
    ServePositions,
    QuantizeKVCache,
    FuseAppends,
    SetMasksApart,
    Verify,
)

__all__ = [
    "PIPELINE",
    "Attention",
    "AttentionSite",
    "CacheEdge",
    "GraphPass",
    "Rewriting",
    "Skipped",
    "find_attentions",
]


def find_attentions(rewriting: Rewriting) -> None:
    """Find the attentions and their cache edges; the graph still computes what it did."""
    for graph_pass in (SpellOutEinsums, Canonicalize, FindCacheEdges):
        graph_pass()(rewriting)


def run_pipeline(rewriting: Rewriting) -> None:
    """Run every pass in order."""
    for graph_pass in PIPELINE:
        graph_pass()(rewriting)
