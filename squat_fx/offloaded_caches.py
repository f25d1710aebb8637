"""Offloaded caches of transformers: their layers are on the device while a call runs.

Such a cache moves a layer to the device and back around the layer's update, on a stream of its own.
That cuts a traced model apart at every layer, and with torch 2.11 ends the process: Dynamo takes a
weak reference to the stream, which has none to give. So a call finds all layers on their device,
packed, and they are moved off it when it is over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from squat_fx.caches import caches_among
from squat_fx.report import Report

MOVED = "an offloaded cache is moved as a whole, packed, before a call and after it"


@contextmanager
def on_their_device(
    args: tuple[Any, ...], kwargs: dict[str, Any], report: Report
) -> Iterator[None]:
    """The layers of every offloading cache among the arguments, while this lasts."""
    caches = [c for c in caches_among(args, kwargs) if getattr(c, "offloading", False)]
    for cache in caches:
        report.note(MOVED)
        cache.offloading = False
        for layer in cache.layers:
            if getattr(layer, "keys", None) is not None:
                layer.prefetch()
    try:
        yield
    finally:
        for cache in caches:
            cache.offloading = True
            for index, layer in enumerate(cache.layers):
                if getattr(layer, "keys", None) is not None:
                    cache.offload(index, cache.only_non_sliding)
