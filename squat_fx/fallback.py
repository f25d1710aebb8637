"""Calls that ran eagerly: pack what they left dense.

Dynamo runs a model as it is once its recompile limit is reached, while it is disabled, or where
compiling failed. A decode step is then served by the handles themselves; a prefill leaves dense
keys and values, which are packed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from squat_fx.config import Config
from squat_fx.layouts.kept import beneath
from squat_fx.packed import PackedTensor
from squat_fx.report import Report
from squat_fx.state import QuantizedKV


def pack_dense_caches(
    args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, config: Config, report: Report
) -> bool:
    """Pack the dense layers of every Hugging Face cache among arguments and results; whether there
    was one.
    """
    found = False
    for cache, mask in _caches(args, kwargs, result):
        layers = cache.layers
        for index, layer in enumerate(layers):
            if _is_dense(layer):
                found |= _pack(layer, index, len(layers), mask, config, report)
            elif isinstance(getattr(layer, "keys", None), QuantizedKV):
                found = True
    return found


def _caches(
    args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> Iterator[tuple[Any, Any]]:
    """Each cache, with the mask over its tokens if there is one."""
    seen: set[int] = set()
    mask = kwargs.get("attention_mask")
    candidates: list[Any] = [*args, *kwargs.values(), getattr(result, "past_key_values", None)]
    for candidate in candidates:
        found = [(candidate, mask)]
        if hasattr(candidate, "cross_attention_cache"):
            decoder_mask = kwargs.get("decoder_attention_mask")
            found = [(candidate.self_attention_cache, decoder_mask)]
            found.append((candidate.cross_attention_cache, mask))
        for cache, its_mask in found:
            layers = getattr(cache, "layers", None)
            if (
                isinstance(layers, list)
                and id(cache) not in seen
                and all(hasattr(x, "keys") for x in layers)
            ):
                seen.add(id(cache))
                yield cache, its_mask


def _is_dense(layer: Any) -> bool:
    """Whether a cache layer holds growing dense keys and values, and no static buffer."""
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if getattr(layer, "is_compileable", False):
        return False
    if not (isinstance(keys, Tensor) and isinstance(values, Tensor)):
        return False
    if isinstance(keys, PackedTensor) or isinstance(values, PackedTensor):
        return False
    return (
        keys.dim() == values.dim() == 4 and keys.numel() > 0 and keys.shape[:3] == values.shape[:3]
    )


def _pack(layer: Any, index: int, layers: int, mask: Any, config: Config, report: Report) -> bool:
    keys, values = layer.keys, layer.values
    if keys.requires_grad or values.requires_grad:
        return False
    if "rotary" in config.resolved_codec.taps("key"):
        return False  # only a graph says how keys were turned
    formats = config.formats(index, layers, keys.shape[1], keys.shape[3], values.shape[3])
    if isinstance(formats, str):
        return False
    formats = tuple(map(beneath, formats))  # nobody says which tokens to keep
    valid, (batch, _, tokens, _) = None, keys.shape
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == batch:
        newest = mask[:, -tokens:].bool()  # all of them, unless the layer is a sliding window
        valid = None if newest.shape[1] < tokens or bool(newest.all()) else newest
    basis = config.basis(index, formats[0], keys.device)
    with torch.inference_mode(False), torch.no_grad():
        packed = QuantizedKV.from_dense(keys, formats[0], "key", valid, given=basis)
        layer.keys = report.track(packed)
        layer.values = report.track(QuantizedKV.from_dense(values, formats[1], "value", valid))
    return True
