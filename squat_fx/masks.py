"""Leave out an attention mask that hides nothing, as recent versions of ``generate()`` do.

A mask grows with the cache, and a decode graph that takes it is dynamic: no CUDA graphs, and masks
that are applied for nothing.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

NAME = "attention_mask"


def may_be_left_out(model: Any) -> bool:
    """Whether ``model`` means "no padding" by no mask: a decoder of transformers does."""
    config = getattr(model, "config", None)
    return (
        isinstance(model, nn.Module)
        and any(c.__module__.startswith("transformers.") for c in type(model).__mro__)
        and not getattr(config, "is_encoder_decoder", True)
    )


def when_made(kwargs: dict[str, Any]) -> torch.cuda.Event | None:
    """When a mask on a GPU is there; None if there is none, or it is on the host."""
    mask = kwargs.get(NAME)
    if not isinstance(mask, Tensor) or not mask.is_cuda or torch.cuda.is_current_stream_capturing():
        return None
    with torch.cuda.device(mask.device):
        made = torch.cuda.Event()
        made.record()
    return made


def without_idle_mask(
    kwargs: dict[str, Any], made: torch.cuda.Event | None = None
) -> dict[str, Any]:
    """``kwargs`` without a 2-D attention mask of ones; on a GPU it waits for the mask, and not for
    what was launched after it was ``made``.
    """
    mask = kwargs.get(NAME)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or isinstance(mask, FakeTensor):
        return kwargs
    if torch.compiler.is_compiling():
        return kwargs
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return kwargs
    if made is None:
        return kwargs | {NAME: None} if bool((mask == 1).all()) else kwargs
    stream = _stream_beside(mask.device)
    stream.wait_event(made)
    with torch.cuda.stream(stream):
        return kwargs | {NAME: None} if bool((mask == 1).all()) else kwargs


@lru_cache(maxsize=16)
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)
