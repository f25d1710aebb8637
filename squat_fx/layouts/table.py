"""The table of stored layouts: a new one is one file and one row."""

from __future__ import annotations

from squat_fx.layouts.base import StoredLayout
from squat_fx.layouts.dense import Dense
from squat_fx.layouts.kept import kept_over
from squat_fx.layouts.latent_rope import LatentRope
from squat_fx.layouts.latent_sparse import LatentSparse
from squat_fx.layouts.levels_token import LevelsPerToken
from squat_fx.layouts.planes_channel import PlanesPerChannel
from squat_fx.layouts.planes_dual import PlanesDual
from squat_fx.layouts.planes_pruned import PlanesPruned
from squat_fx.layouts.planes_token import PlanesPerToken
from squat_fx.layouts.polar_pairs import PolarPairs
from squat_fx.layouts.polar_token import PolarPerToken
from squat_fx.layouts.signs_token import SignsPerToken

LAYOUTS: dict[str, StoredLayout] = {
    layout.name: layout
    for layout in (
        PlanesPerToken(),
        PlanesPerChannel(),
        PlanesDual(),
        PlanesPruned(),
        PolarPerToken(),
        PolarPairs(),
        LevelsPerToken(),
        SignsPerToken(),
        LatentRope(),
        LatentSparse(),
        Dense(),
    )
}
LAYOUTS |= {
    kept.name: kept
    for kept in (kept_over(layout) for layout in LAYOUTS.values() if not layout.positional)
}

PAIRS: tuple[tuple[str, str], ...] = tuple(
    dict.fromkeys(
        pair
        for name, layout in LAYOUTS.items()
        for pair in ((name, layout.values), (layout.values, layout.values))
    )
)
"""Layouts of keys and values that one attention reads."""
