"""What a packed cache does to the outputs of attention, layer by layer.

The queries of the last tokens are taken from the untouched model, as transformers hands them to its
attention functions; what they find in its own cache is compared with what they find in another.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from squat_fx import QuantizedKV
from squat_fx.kernels import ops, reference

NEWEST = 8  # queries


@dataclass(frozen=True)
class Seen:
    """The newest queries of one layer: ``query`` ``[heads, queries, head_dim]``, and how they were
    used; ``output`` likewise is what they found in the full cache.
    """

    query: Tensor
    scale: float
    softcap: float
    sinks: Tensor | None
    output: Tensor


class Queries:
    """Collects the queries of single tokens of the first row of a batch, by layer."""

    def __init__(self) -> None:
        self._found: dict[int, list[Tensor]] = {}
        self._options: dict[int, tuple[float, float, Tensor | None]] = {}

    @contextmanager
    def of(self, model: Any) -> Iterator[None]:
        """Collect those of a model of transformers while the context lasts; others have none."""
        config = getattr(model, "config", None)
        name = getattr(config, "_attn_implementation", None)
        if name != "eager" and name not in ALL_ATTENTION_FUNCTIONS:
            yield
            return
        original = ALL_ATTENTION_FUNCTIONS.get(name)

        def seeing(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            layer = getattr(module, "layer_idx", None)
            if layer is not None and query.shape[2] == 1:
                kept = [*self._found.get(layer, ()), query[0].detach().float().cpu()]
                self._found[layer] = kept[-NEWEST:]
                scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
                softcap, sinks = kwargs.get("softcap") or 0.0, kwargs.get("s_aux")
                self._options[layer] = (scale, softcap, sinks)
            # A model's own attention is no entry of the table, but one of its module's functions.
            own = original or sys.modules[type(module).__module__].eager_attention_forward
            return own(module, query, *args, **kwargs)

        ALL_ATTENTION_FUNCTIONS[name] = seeing
        try:
            yield
        finally:
            if original is None:
                del ALL_ATTENTION_FUNCTIONS[name]
            else:
                ALL_ATTENTION_FUNCTIONS[name] = original

    def seen(self, cache: Any) -> dict[int, Seen]:
        """What the queries found in ``cache``, the one they attended to."""
        found = {}
        for layer, queries in self._found.items():
            key, value = _first_row(cache, layer)
            if key is None or value is None:
                continue
            scale, softcap, sinks = self._options[layer]
            sinks = None if sinks is None else sinks.detach().float().cpu()
            query = torch.cat(queries, 1)
            output = attend(query, key, value, scale, softcap, sinks)
            found[layer] = Seen(query, scale, softcap, sinks, output)
        return found


def errors_by_layer(seen: dict[int, Seen], cache: Any) -> dict[int, float]:
    """Root of the squared error of attention's outputs over that of the outputs, of the layers
    that ``cache`` holds as tensors of all tokens.
    """
    errors = {}
    for layer, of in seen.items():
        packed = _part_of_row(cache, layer)
        key, value = (None, None) if packed else _first_row(cache, layer)
        if packed is not None:
            output = attend_packed(of, *packed)
        elif key is None or value is None or key.shape[-1] != of.query.shape[-1]:
            continue
        else:
            output = attend(of.query, key, value, of.scale, of.softcap, of.sinks)
        errors[layer] = float((output - of.output).norm() / of.output.norm())
    return errors


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """Attention of the newest tokens.

    Args:
        query: fp32 ``[heads, queries, head_dim]``, of the last of the tokens.
        key, value: fp32 ``[kv_heads, tokens, head_dim]``.
        scale, softcap: of scores; 0: no cap.
        sinks: logits ``[heads]`` that take part in the softmax and have no value.
    """
    options: Any = {"sinks": sinks, "scale": scale, "softcap": softcap}
    one_row = (x[None] for x in (query, key, value))
    return reference.attention(*one_row, mask=None, causal=reference.BOTTOM_RIGHT, **options)[0]


def attend_packed(of: Seen, key: QuantizedKV, value: QuantizedKV) -> Tensor:
    """The same over packed keys and values, ``[1, kv_heads, tokens, head_dim]``."""
    storages = [handle.writable_storage() for handle in (key, value)]
    positions = torch.tensor([[s.length, s.watermark] for s in storages], device=key.device)
    count, tokens = of.query.shape[1], key.shape[2]
    seen = torch.ones(count, tokens, dtype=torch.bool, device=key.device).tril(tokens - count)
    sinks = None if of.sinks is None else of.sinks.to(key.device)
    out = ops.overload("attend", key.format.layout, value.format.layout)(
        of.query[None].to(key.device, key.dtype), None, None,
        *storages[0].tensors, *storages[1].tensors, positions, 0, 1, -1, seen, sinks, of.scale,
        reference.NO_CAUSALITY, of.softcap, key.format.to_ints(), value.format.to_ints(),
    )  # fmt: skip
    return out[0].float().cpu()


def _part_of_row(cache: Any, layer: int) -> tuple[QuantizedKV, QuantizedKV] | None:
    """Keys and values of the first row, if they lost tokens and so have no dense form."""
    layers = getattr(cache, "layers", ())
    found = layers[layer] if layer < len(layers) else None
    key, value = getattr(found, "keys", None), getattr(found, "values", None)
    if not isinstance(key, QuantizedKV) or not isinstance(value, QuantizedKV):
        return None
    return (key[:1], value[:1]) if key._storage.lost_tokens else None  # pyright: ignore


def _first_row(cache: Any, layer: int) -> tuple[Tensor | None, Tensor | None]:
    """Keys and values of the first row, fp32 on the CPU; None if they are not all tokens."""
    layers = getattr(cache, "layers", ())
    if layer >= len(layers) or getattr(layers[layer], "is_sliding", False):
        return None, None
    key, value = getattr(layers[layer], "keys", None), getattr(layers[layer], "values", None)
    if not isinstance(key, Tensor) or not isinstance(value, Tensor):
        return None, None
    if key.dim() != 4 or key.shape[2] != cache.get_seq_length(layer):
        return None, None  # a quantized cache of transformers keeps the newest tokens there
    return key[:1].clone()[0].float().cpu(), value[:1].clone()[0].float().cpu()
