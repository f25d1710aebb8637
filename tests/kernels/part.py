"""The law of prompts that are kept in part, for the interpreter and for the GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from squat_fx import QuantizedKV
from squat_fx.codecs import Codec, Pruned, Role
from squat_fx.layouts.kept import MOVED
from tests.conftest import left_padding, randn, stored_format

HEADS, QUERIES_PER_KV, PADS = 2, 2, (0, 9)
ROLES: tuple[Role, ...] = ("key", "value")


def keeping_a_part_agrees_with_the_reference(
    codec: Pruned, dtype: torch.dtype, head_dim: int, tokens: int, device: str,
    kernels: Callable[[], AbstractContextManager[Any]],
) -> None:  # fmt: skip
    """Under ``kernels``, on ``device``, a prompt keeps the same tokens, and what is appended to it
    and attends to it, with masks and without, finds the same as on the CPU.
    """
    x = [randn(len(PADS), HEADS, tokens, head_dim, seed=i, dtype=dtype) for i in range(2)]
    query = randn(len(PADS), HEADS * QUERIES_PER_KV, tokens, head_dim, seed=2, dtype=dtype)
    valid = left_padding(list(PADS), tokens)
    expected = _stored(codec, *x, query, valid)
    with kernels():
        found = _stored(codec, *(t.to(device) for t in (*x, query, valid)))
    for one, other in zip(found, expected, strict=True):
        assert one._storage.lost_tokens
        for name in (MOVED, "start", "dense"):
            assert torch.equal(one._storage[name].cpu(), other._storage[name]), name
    _compare(found, expected, tokens, device, kernels, 2e-2)  # a code may be its neighbour
    placed = [handle.to(device, copy=True) for handle in expected]
    for step, count in enumerate((1, 1, 3, 1)):
        new = [randn(len(PADS), HEADS, count, head_dim, seed=10 + step, dtype=dtype)] * 2
        expected = [torch.cat([h, n], 2) for h, n in zip(expected, new, strict=True)]
        with kernels():
            placed = [
                torch.cat([h, n.to(device)], 2).clone() for h, n in zip(placed, new, strict=True)
            ]
        tokens += count
        _compare(placed, expected, tokens, device, kernels, 2e-2 if step else 5e-3)


def _stored(codec: Codec, key: Tensor, value: Tensor, query: Tensor, valid: Tensor) -> list[Any]:
    formats = [stored_format(codec, role, key.shape[3], 2, 8, 2) for role in ROLES]
    keys = QuantizedKV.from_dense(key, formats[0], "key", valid, query)
    return [keys, QuantizedKV.from_dense(value, formats[1], "value", valid, keys=keys)]


def _compare(
    found: list[Any], expected: list[Any], tokens: int, device: str,
    kernels: Callable[[], AbstractContextManager[Any]], most: float,
) -> None:  # fmt: skip
    rows, head_dim, dtype = len(PADS), expected[0].shape[3], expected[0].dtype
    heads = HEADS * QUERIES_PER_KV
    for q_len, seed in ((1, 20), (3, 21)):
        query = randn(rows, heads, q_len, head_dim, seed=seed, dtype=dtype)
        boolean = randn(rows, 1, q_len, tokens, seed=seed) > -1.0
        additive = randn(1, heads, 1, tokens, seed=seed, dtype=dtype)
        for mask in (None, boolean, additive):
            placed = None if mask is None else mask.to(device)
            with torch.inference_mode():
                options: Any = {"enable_gqa": True}
                wanted = F.scaled_dot_product_attention(
                    query, *expected, attn_mask=mask, **options
                ).float()
                with kernels():
                    out = F.scaled_dot_product_attention(
                        query.to(device), *found, attn_mask=placed, **options
                    )
            error = (out.cpu().float() - wanted).norm() / wanted.norm()
            assert error <= most, (q_len, None if mask is None else mask.dtype, error)
