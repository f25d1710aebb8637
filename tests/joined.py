"""Models that keep several caches in one tensor: keys and values fused, layers stacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.own import BATCH, HEAD_DIM, KV_HEADS, Layer, Own, attend, head_major, token_major


def grown(old: Tensor | None, new: Tensor, dim: int) -> tuple[Tensor, int]:
    """Past and new tokens, and how many are past."""
    return (new, 0) if old is None else (torch.cat([old, new], dim), old.shape[dim])


def attended(query: Tensor, key: Tensor, value: Tensor, past: int) -> Tensor:
    """Over ``[batch, tokens, heads, head_dim]``."""
    return (
        attend(*(x.transpose(1, 2) for x in (query, key, value)), past).transpose(1, 2).flatten(2)
    )


def on_channels(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """``[B, H, T, 2 D]``, by ``chunk``."""
    query, key, value = (p.transpose(1, 2) for p in layer.project(x))
    both, past = grown(cache and cache[index], torch.cat([key, value], -1), 2)
    return attend(query, *both.chunk(2, -1), past).transpose(1, 2).flatten(2), both


def on_heads(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """``[B, 2 H, T, D]``, by slices."""
    query, key, value = (p.transpose(1, 2) for p in layer.project(x))
    both, past = grown(cache and cache[index], torch.cat([key, value], 1), 2)
    key, value = both[:, :KV_HEADS], both[:, KV_HEADS:]
    return attend(query, key, value, past).transpose(1, 2).flatten(2), both


def on_a_dim_in_front(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """``[2, B, H, T, D]``, by index."""
    query, key, value = (p.transpose(1, 2) for p in layer.project(x))
    both, past = grown(cache and cache[index], torch.stack([key, value]), 3)
    return attend(query, both[0], both[1], past).transpose(1, 2).flatten(2), both


def on_a_dim_in_the_middle(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """``[B, T, 2, H, D]``, by ``unbind``."""
    query, key, value = layer.project(x)
    both, past = grown(cache and cache[index], torch.stack([key, value], 2), 1)
    return attended(query, *both.unbind(2), past), both


def flat(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """``[B, T, 2 H D]``, by ``split``."""
    query, key, value = layer.project(x)
    new = torch.cat([key.flatten(2), value.flatten(2)], -1)
    both, past = grown(cache and cache[index], new, 1)
    halves = both.split(KV_HEADS * HEAD_DIM, -1)
    key, value = (half.unflatten(-1, (KV_HEADS, HEAD_DIM)) for half in halves)
    return attended(query, key, value, past), both


def projected_at_once(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """``[B, T, 2 H D]`` as it comes from one projection, by ``view`` and ``permute``."""
    query = layer.project(x)[0]
    weight = torch.cat([layer.key.weight, layer.value.weight])
    bias = torch.cat([layer.key.bias, layer.value.bias])
    both, past = grown(cache and cache[index], F.linear(x, weight, bias), 1)
    key, value = both.view(BATCH, -1, 2, KV_HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
    return attend(query.transpose(1, 2), key, value, past).transpose(1, 2).flatten(2), both


def merged_heads(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """Keys and values apart, ``[B, T, H D]``."""
    query, *new = layer.project(x)
    made = [grown(cache and cache[index][i], n.flatten(2), 1) for i, n in enumerate(new)]
    key, value = (kept.view(BATCH, -1, KV_HEADS, HEAD_DIM) for kept, _ in made)
    return attended(query, key, value, made[0][1]), tuple(kept for kept, _ in made)


def one_head(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """One head for all queries, without a dim of its own: ``[B, T, 2 D]``."""
    query, key, value = layer.project(x)
    new = torch.cat([key[:, :, 0], value[:, :, 0]], -1)
    both, past = grown(cache and cache[index], new, 1)
    key, value = (half.unsqueeze(2) for half in both.split((HEAD_DIM, HEAD_DIM), -1))
    return attended(query, key, value, past), both


def of_all(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """A layer of ``[layers, 2, B, H, T, D]``."""
    old = None if cache is None else {index: (cache[index, 0], cache[index, 1])}
    out, kept = head_major(layer, x, old, index)
    return out, torch.stack(kept)


class Stacked(Own):
    """One tensor for all layers."""

    def gather(self, made: list[Any]) -> Any:
        return torch.stack(made)


def of_two(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """A layer of ``[layers, B, T, H, D]`` keys and ``[B, layers, T, H, D]`` values."""
    old = None if cache is None else {index: (cache[0][index], cache[1][:, index])}
    return token_major(layer, x, old, index)


class TwoStacks(Own):
    """One tensor for the keys of all layers, and one for the values."""

    def gather(self, made: list[Any]) -> Any:
        return torch.stack([kept[0] for kept in made]), torch.stack([kept[1] for kept in made], 1)


class AppendedAtLast(Own):
    """``[layers, 2, B, H, T, D]``, to which what is new of all layers is appended at once."""

    def __init__(self) -> None:
        super().__init__(of_all)

    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        made, past = [], 0 if cache is None else cache.shape[4]
        for index, layer in enumerate(self.layers):
            query, key, value = (p.transpose(1, 2) for p in layer.project(x))
            made.append(torch.stack([key, value]))
            if cache is not None:
                key = torch.cat([cache[index][0], key], 2)
                value = torch.cat([cache[index][1], value], 2)
            out = attend(query, key, value, past).transpose(1, 2).flatten(2)
            x = x + layer.out(out)
        new = torch.stack(made)
        return x, new if cache is None else torch.cat([cache, new], 4)


FUSED: tuple[Callable[..., Any], ...] = (
    on_channels, on_heads, on_a_dim_in_front, on_a_dim_in_the_middle, flat, projected_at_once,
    merged_heads, one_head,
)  # fmt: skip
MODELS: dict[str, Callable[[], Own]] = {
    update.__name__: lambda update=update: Own(update) for update in FUSED
} | {
    "stacked": lambda: Stacked(of_all),
    "two stacks": lambda: TwoStacks(of_two),
    "appended at last": AppendedAtLast,
}


def differential(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """DiffLlama's double read: every head has its keys, and half of the values, twice."""
    query, key, value, past = layer.grown(x, cache, index, token_dim=2)
    halves = (half.repeat(1, 2, 1, 1) for half in value.chunk(2, 1))
    first, second = (attend(query, key, half, past) for half in halves)
    return (first - 0.3 * second).transpose(1, 2).flatten(2), (key, value)


def differential_written_out(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """The same with repeated heads and a softmax each."""
    query, key, value, past = layer.grown(x, cache, index, token_dim=2)
    each = query.shape[1] // key.shape[1]
    made = []
    for half in value.chunk(2, 1):
        scores = query @ key.repeat_interleave(each, 1).transpose(2, 3) * HEAD_DIM**-0.5
        ahead = torch.arange(scores.shape[-1]) > torch.arange(scores.shape[-2])[:, None] + past
        probs = scores.masked_fill(ahead, float("-inf")).softmax(-1)
        made.append(probs @ half.repeat(1, 2, 1, 1).repeat_interleave(each, 1))
    first, second = made
    return (first - 0.3 * second).transpose(1, 2).flatten(2), (key, value)
