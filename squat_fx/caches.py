"""The caches of transformers among the arguments of a call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def caches_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """Each cache with a list of layers; of an encoder-decoder cache both of its two."""
    for candidate in (*args, *kwargs.values()):
        for cache in (
            candidate,
            getattr(candidate, "self_attention_cache", None),
            getattr(candidate, "cross_attention_cache", None),
        ):
            layers = getattr(cache, "layers", None)
            if isinstance(layers, list) and type(cache).__module__.startswith("transformers."):
                yield cache
