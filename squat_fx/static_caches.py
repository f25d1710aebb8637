"""Static caches of transformers: let them grow.

A ``StaticCache`` allocates dense buffers for all tokens that may ever come, so that shapes do not
change. Packed caches have static graphs without that, so before a call the static layers of such a
cache are exchanged for growing ones with what they hold, and their buffers are free. The cache
stays the object it is; it is no longer ``is_compileable``, and may hold more tokens than was said.

Layers that hold a linear-attention state as well are left alone, with a note.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from squat_fx.caches import caches_among
from squat_fx.report import Report
from squat_fx.storage import TOKENS

GROWING = {"StaticLayer": "DynamicLayer", "StaticSlidingWindowLayer": "DynamicSlidingWindowLayer"}
GREW = (
    "a static cache grows instead: its layers were exchanged for growing ones, which are packed, "
    "and its dense buffers are free"
)


def with_growing_caches(
    args: tuple[Any, ...], kwargs: dict[str, Any], report: Report
) -> dict[str, Any]:
    """Exchange the static layers of every cache among the arguments; ``kwargs`` with masks that are
    as long as those caches are now.
    """
    held: dict[str, int] = {}
    for layers in (cache.layers for cache in caches_among(args, kwargs)):
        for index, layer in enumerate(layers):
            if not getattr(layer, "is_compileable", False) or not hasattr(layer, "max_cache_len"):
                continue
            if type(layer).__name__ not in GROWING:
                report.note(f"a layer {type(layer).__name__} is static and left alone")
                continue
            layers[index] = growing_layer(layer)
            report.note(GREW)
            keys = layers[index].keys
            tokens = 0 if keys is None else keys.shape[TOKENS]
            held.setdefault("sliding" if layer.is_sliding else "full", tokens)
    if not held:
        return kwargs
    masks = {name: x for name, x in kwargs.items() if name.endswith("attention_mask")}
    return kwargs | {name: _fitted(mask, held) for name, mask in masks.items()}


def _fitted(mask: Any, held: Mapping[str, int], kind: str = "") -> Any:
    """A mask that ``generate()`` made for a static cache, one for each kind of layer or one for
    all, without what comes after the new tokens.
    """
    if type(mask) is dict:
        return {name: _fitted(x, held, name) for name, x in mask.items()}
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return mask
    slides = kind in ("sliding_attention", "chunked_attention") or "full" not in held
    tokens = held.get("sliding" if slides else "full", 0)
    return mask[..., : tokens + mask.shape[-2]]


def growing_layer(layer: Any) -> Any:
    """A growing layer with the tokens of a static one."""
    make = getattr(sys.modules[type(layer).__module__], GROWING[type(layer).__name__])
    slides = bool(layer.is_sliding)
    grown = make(sliding_window=layer.max_cache_len) if slides else make()
    if not layer.is_initialized:
        return grown
    tokens = layer.cumulative_length_int if slides else int(layer.cumulative_length)
    if not tokens:
        return grown
    held = min(tokens, layer.max_cache_len)
    kept = slice(max(held - layer.max_cache_len + 1, 0) if slides else 0, held)
    grown.lazy_initialization(layer.keys, layer.values)
    grown.keys, grown.values = (x[:, :, kept].clone() for x in (layer.keys, layer.values))
    if slides:
        grown.cumulative_length = tokens
    return grown
