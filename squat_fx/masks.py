"""Leave out an attention mask that hides nothing, as recent versions of ``generate()`` do.

A mask grows with the cache, and a decode graph that takes it is dynamic: no CUDA graphs, and masks
that are applied for nothing.
"""

from __future__ import annotations

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


def without_idle_mask(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` without a 2-D attention mask of ones; on a GPU it waits for the mask."""
    mask = kwargs.get(NAME)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or isinstance(mask, FakeTensor):
        return kwargs
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return kwargs
    return kwargs | {NAME: None} if bool((mask == 1).all()) else kwargs
