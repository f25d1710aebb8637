"""Decoding over a KIVI cache, simulated in one forward pass of plain torch.

It imports nothing of squat_fx: where the two agree, both say the same thing. Queries of the prompt
attend exactly. The query at position ``t`` after it sees every key and value older than the
residual as it would be after rounding, and the others exactly:

    key   i is rounded if  sinks <= i < sinks + group * floor((t - residual - sinks) / group)
    value i is rounded if  sinks <= i < t - residual

because ``t`` tokens are stored when token ``t`` attends, keys leave the residual a group at a time
and values one by one. A rounded number never changes again, so one pass over all tokens sees what
each step would see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "kivi_simulation"


@dataclass(frozen=True)
class KiviSimulation:
    """An attention function for transformers, to be used with ``attn_implementation=NAME``.

    Attributes:
        prompt: tokens that attend exactly.
        bits, group_size: of the rounding; keys per channel, values per token.
        residual_length, sink_length: newest and first tokens that stay exact.
    """

    prompt: int
    bits: int = 2
    group_size: int = 32
    residual_length: int = 32
    sink_length: int = 4

    def register(self) -> None:
        """Make this what models with ``attn_implementation=NAME`` use."""
        ALL_ATTENTION_FUNCTIONS.register(NAME, self)

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """``query [1, heads, tokens, d]``, ``key, value [1, kv_heads, tokens, d]``, all exact."""
        queries_per_kv = query.shape[1] // key.shape[1]
        rounded_key, rounded_value = self.round_keys(key), self.round_values(value)
        key, value, rounded_key, rounded_value = (
            x.repeat_interleave(queries_per_kv, 1) for x in (key, value, rounded_key, rounded_value)
        )
        prompt = slice(0, self.prompt)
        of_prompt = F.scaled_dot_product_attention(
            query[:, :, prompt], key[:, :, prompt], value[:, :, prompt],
            is_causal=True, scale=scaling,
        )  # fmt: skip
        query = query[:, :, self.prompt :]
        key_is_packed, value_is_packed, visible = self.schedule(key.shape[2], key.device)
        exact = query @ key.transpose(-1, -2)
        rounded = query @ rounded_key.transpose(-1, -2)
        scores = torch.where(key_is_packed, rounded, exact) * scaling
        probs = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        of_steps = (probs * ~value_is_packed) @ value + (probs * value_is_packed) @ rounded_value
        return torch.cat([of_prompt, of_steps], 2).transpose(1, 2).contiguous(), None

    def schedule(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Bool ``[steps, tokens]``: which keys and values each step finds packed, and may see."""
        t = torch.arange(self.prompt, tokens, device=device)[:, None]
        i = torch.arange(tokens, device=device)[None]
        old = (t - self.residual_length - self.sink_length).clamp(min=0)
        whole_groups = old // self.group_size * self.group_size
        after_sinks = i >= self.sink_length
        key_is_packed = after_sinks & (i < self.sink_length + whole_groups)
        value_is_packed = after_sinks & (i < self.sink_length + old)
        return key_is_packed, value_is_packed, i <= t

    def round_keys(self, key: Tensor) -> Tensor:
        """Whole groups of tokens after the sinks, each channel in its own range."""
        first, tokens = self.sink_length, key.shape[2]
        end = first + (tokens - first) // self.group_size * self.group_size
        groups = key[:, :, first:end].unflatten(2, (-1, self.group_size))
        rounded = round_min_max(groups, 3, self.bits).flatten(2, 3)
        return torch.cat([key[:, :, :first], rounded, key[:, :, end:]], 2)

    def round_values(self, value: Tensor) -> Tensor:
        """Each token in its own ranges, one for each group of channels."""
        groups = value.unflatten(3, (-1, min(self.group_size, value.shape[3])))
        return round_min_max(groups, 4, self.bits).flatten(3, 4)


def round_min_max(x: Tensor, dim: int, bits: int) -> Tensor:
    """``x`` on ``2**bits`` even levels from its minimum along ``dim``; both parameters in fp16."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    levels = 2**bits - 1
    step = ((high - low) / levels).clamp(min=1e-6).half().float()
    low = low.half().float()
    return torch.round((x - low) / step).clamp(0, levels) * step + low
