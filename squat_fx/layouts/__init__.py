"""How packed tokens lie in memory. One layout is one file and one row of ``LAYOUTS``."""

from __future__ import annotations

from squat_fx.layouts.base import Fixed, StoredLayout
from squat_fx.layouts.format import Format, arena_names, stored_names
from squat_fx.layouts.table import LAYOUTS, PAIRS

__all__ = [
    "LAYOUTS",
    "PAIRS",
    "Fixed",
    "Format",
    "StoredLayout",
    "arena_names",
    "stored_names",
]
