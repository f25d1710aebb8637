"""From scores to probabilities: softcap, mask, sinks."""

from __future__ import annotations

import torch
from torch import Tensor

NO_CAUSALITY, TOP_LEFT, BOTTOM_RIGHT = 0, 1, 2


def probabilities(
    scores: Tensor, mask: Tensor | None, sinks: Tensor | None, softcap: float
) -> Tensor:
    """Softmax of scaled scores ``[batch, num_heads, q_len, kv_len]``; zeros where all is masked.

    ``sinks`` are ``[num_heads]``, or ``[batch, num_heads]`` where they differ.
    """
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
    if sinks is not None:
        column = sinks.to(scores.dtype).reshape(-1, scores.shape[1], 1, 1)
        column = column.expand(*scores.shape[:3], 1)
        probs = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    else:
        probs = torch.softmax(scores, -1)
    nowhere = scores.amax(-1, keepdim=True) == -torch.inf  # NaN stays: the model's own
    return probs.masked_fill(nowhere, 0.0)
