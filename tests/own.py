"""Models that are not from transformers, each of which keeps its cache in a way of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import squat_fx
from squat_fx import QuantizedKV, Report
from squat_fx.codecs import Lossless
from tests.conftest import randn

WIDTH, HEADS, KV_HEADS, HEAD_DIM, BATCH = 32, 4, 2, 8, 2
STEPS = (9, 1, 1, 3, 1, 1, 1, 1, 1, 1)
EXACT: dict[str, Any] = {
    "codec": Lossless(group_size=4), "residual_length": 4, "sink_length": 2, "inner": "eager",
}  # fmt: skip


class Layer(nn.Module):
    """Projections of one attention layer, ``[batch, tokens, heads, head_dim]``."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, HEADS * HEAD_DIM)
        self.key = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM)
        self.value = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(p(x).unflatten(-1, (-1, HEAD_DIM)) for p in (self.query, self.key, self.value))

    def grown(
        self, x: Tensor, cache: Any, index: int, token_dim: int
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Queries, keys and values with tokens on ``token_dim``, keys and values behind those of
        pairs in a cache, and how many these are.
        """
        query, *new = (p if token_dim == 1 else p.transpose(1, 2) for p in self.project(x))
        if cache is None:
            return query, *new, 0  # pyright: ignore[reportReturnType]
        key, value = (
            torch.cat([old, x], token_dim) for old, x in zip(cache[index], new, strict=True)
        )
        return query, key, value, cache[index][0].shape[token_dim]


def attend(query: Tensor, key: Tensor, value: Tensor, past: int) -> Tensor:
    """Causal attention over ``[batch, heads, tokens, head_dim]``."""
    tokens = query.shape[2]
    mask = torch.arange(past + tokens) <= torch.arange(tokens)[:, None] + past
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


class Own(nn.Module):
    """Two layers; ``update`` says how a cache is kept."""

    def __init__(self, update: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.update = update
        self.eval()

    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        made = []
        for index, layer in enumerate(self.layers):
            out, kept = self.update(layer, x, cache, index)
            x = x + layer.out(out)
            made.append(kept)
        return x, self.gather(made)

    def gather(self, made: list[Any]) -> Any:
        return tuple(made)


def head_major(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """Tuples of keys and values, ``[B, H, T, D]``; no cache at first."""
    query, key, value, past = layer.grown(x, cache, index, token_dim=2)
    return attend(query, key, value, past).transpose(1, 2).flatten(2), (key, value)


def token_major(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """Tuples of keys and values, ``[B, T, H, D]``."""
    query, key, value, past = layer.grown(x, cache, index, token_dim=1)
    turned = (t.transpose(1, 2) for t in (query, key, value))
    return attend(*turned, past).transpose(1, 2).flatten(2), (key, value)


def token_major_written_out(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """The same with repeated heads, permutes and a softmax."""
    query, key, value, past = layer.grown(x, cache, index, token_dim=1)
    repeated = key.repeat_interleave(2, dim=2), value.repeat_interleave(2, dim=2)
    scores = query.transpose(1, 2) @ repeated[0].permute(0, 2, 3, 1) / HEAD_DIM**0.5
    ahead = torch.arange(scores.shape[-1]) > torch.arange(scores.shape[-2])[:, None] + past
    probs = scores.masked_fill(ahead, float("-inf")).softmax(-1)
    return (probs @ repeated[1].transpose(1, 2)).transpose(1, 2).flatten(2), (key, value)


def mask_by_vmap(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """Tuples, and a mask that is made entry by entry."""
    query, key, value, past = layer.grown(x, cache, index, token_dim=2)
    rows, columns = torch.arange(query.shape[2]) + past, torch.arange(key.shape[2])
    mask = torch.vmap(torch.vmap(torch.ge, (None, 0)), (0, None))(rows, columns)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).flatten(2), (key, value)


def einsums(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """The same with einsums, ``[B, T, H, D]`` in and out."""
    query, key, value, past = layer.grown(x, cache, index, token_dim=1)
    repeated = key.repeat_interleave(2, dim=2), value.repeat_interleave(2, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", query, repeated[0]) * HEAD_DIM**-0.5
    ahead = torch.arange(scores.shape[-1]) > torch.arange(scores.shape[-2])[:, None] + past
    probs = torch.softmax(scores.masked_fill(ahead, float("-inf")), dim=-1)
    return torch.einsum("bhts,bshd->bthd", probs, repeated[1]).flatten(2), (key, value)


def in_a_dict(layer: Layer, x: Tensor, cache: Any, index: int) -> tuple[Tensor, Any]:
    """A dict of names per layer."""
    old = None if cache is None else {index: (cache[index]["k"], cache[index]["v"])}
    out, (key, value) = head_major(layer, x, old, index)
    return out, {"k": key, "v": value}


def run(step: Callable[..., Any], steps: tuple[int, ...] = STEPS) -> tuple[Tensor, Any]:
    """All outputs of a loop, and the last cache."""
    outputs, cache = [], None
    with torch.no_grad():
        for seed, tokens in enumerate(steps):
            out, cache = step(randn(BATCH, tokens, WIDTH, seed=seed), cache)
            outputs.append(out)
    return torch.cat(outputs, 1), cache


def leaves(cache: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(cache)


def check(model: Callable[..., Any], step: Callable[..., Any]) -> tuple[Any, Report]:
    """The law: the same outputs and the same cache."""
    expected, dense = run(model)
    found, cache = run(step)
    torch.testing.assert_close(found, expected)
    for kept, wanted in zip(leaves(cache), leaves(dense), strict=True):
        kept = kept.dequantize() if isinstance(kept, QuantizedKV) else kept
        torch.testing.assert_close(kept, wanted)
    return cache, squat_fx.report(step)


def check_exported(model: Own, past: Any, dynamic: Any) -> Any:
    """The law for a step that was exported and rewritten; gives the last cache.

    ``dynamic`` says which dims of ``past`` vary.
    """
    x = randn(BATCH, 1, WIDTH)
    with torch.no_grad():
        exported = torch.export.export(model, (x, past), dynamic_shapes=({}, dynamic))
        module, report = squat_fx.rewrite(exported.module(), (x, past), squat_fx.Config(**EXACT))
        assert report.rewritten == len(model.layers), str(report)
        kept = past
        for seed in range(9):
            x = randn(BATCH, 1, WIDTH, seed=seed)
            (found, kept), (expected, past) = module(x, kept), model(x, past)
            torch.testing.assert_close(found, expected)
    return kept
