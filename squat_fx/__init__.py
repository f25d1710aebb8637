"""squat_fx: a 2-bit KV cache for any traced model, with no change to the model's source."""

from __future__ import annotations

from squat_fx.api import compile, explain, report, rewrite
from squat_fx.backend import NotRewritten
from squat_fx.cache_file import load_cache, save_cache
from squat_fx.calibrate import calibrate
from squat_fx.calibration import Calibration
from squat_fx.codecs import list_codecs
from squat_fx.config import Config
from squat_fx.report import CacheBytes, GraphReport, Report, cache_bytes
from squat_fx.state import QuantizedKV

__version__ = "0.1.0"

__all__ = [
    "CacheBytes",
    "Calibration",
    "Config",
    "GraphReport",
    "NotRewritten",
    "QuantizedKV",
    "Report",
    "cache_bytes",
    "calibrate",
    "compile",
    "explain",
    "list_codecs",
    "load_cache",
    "report",
    "rewrite",
    "save_cache",
]
