"""Attention as people write it: ``attend(module, query, key, value, mask)``, one function each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tests.passes.capture import HEAD_DIM, HEADS, Attend, sdpa

QUERIES_PER_KV = 2


# Repeated heads


def repeat_kv(x: Any) -> Any:
    """As Hugging Face writes it."""
    batch, heads, length, dim = x.size(0), x.size(1), x.size(2), x.size(3)
    x = x[:, :, None, :, :].expand(batch, heads, QUERIES_PER_KV, length, dim)
    return x.reshape(batch, heads * QUERIES_PER_KV, length, dim)


def flattened(x: Any) -> Any:
    """``unsqueeze > expand > flatten``."""
    return x.unsqueeze(2).expand(-1, -1, QUERIES_PER_KV, -1, -1).flatten(1, 2)


def interleaved(x: Any) -> Any:
    """``repeat_interleave``."""
    return x.repeat_interleave(QUERIES_PER_KV, dim=1)


def sdpa_repeat_kv(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    return F.scaled_dot_product_attention(query, repeat_kv(key), repeat_kv(value))


def sdpa_flattened(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    return F.scaled_dot_product_attention(query, flattened(key), flattened(value))


def sdpa_interleaved(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    return F.scaled_dot_product_attention(query, interleaved(key), interleaved(value))


def sdpa_scaled(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    return F.scaled_dot_product_attention(query, key, value, scale=0.2, enable_gqa=True)


def sdpa_by_keyword(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    return F.scaled_dot_product_attention(value=value, key=key, query=query, enable_gqa=True)


def sdpa_masked(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


# Written out


def llama(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    weights = torch.matmul(query, repeat_kv(key).transpose(2, 3)) * 0.25
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=0.1, training=False)
    return torch.matmul(weights, repeat_kv(value)).transpose(1, 2).contiguous().transpose(1, 2)


def llama_masked(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    weights = torch.matmul(query, repeat_kv(key).transpose(2, 3)) * 0.25 + mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, repeat_kv(value))


def mask_first(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    weights = mask + torch.matmul(query, repeat_kv(key).transpose(2, 3)) / 3.0
    return F.softmax(weights, dim=-1) @ repeat_kv(value)


def bart(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    weights = torch.matmul(query * 0.3, flattened(key).transpose(2, 3))
    return torch.matmul(F.softmax(weights, dim=-1), flattened(value))


def gemma2(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    weights = torch.matmul(query, repeat_kv(key).transpose(2, 3)) * 0.5
    weights = torch.tanh(weights / 3.0) * 3.0 + mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, repeat_kv(value))


def gpt2(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    weights = torch.matmul(query, interleaved(key).transpose(-1, -2)) * 0.5
    weights = F.softmax(weights, dim=-1).type(value.dtype)
    return torch.matmul(weights, interleaved(value))


def gpt_oss(module: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    weights = torch.matmul(query, repeat_kv(key).transpose(2, 3)) * 0.25 + mask
    sinks = module.sinks.reshape(1, -1, 1, 1).expand(query.size(0), -1, query.size(2), -1)
    logits = torch.cat([weights, sinks], dim=-1)
    logits = logits - logits.max(dim=-1, keepdim=True).values
    probs = F.softmax(logits, dim=-1, dtype=logits.dtype)
    return torch.matmul(probs[..., :-1], repeat_kv(value))


def operators(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    return (query @ interleaved(key).mT / 4).softmax(-1) @ interleaved(value)


def methods(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    scores = query.matmul(interleaved(key).permute(0, 1, 3, 2)).mul(0.25)
    return scores.softmax(dim=-1).matmul(interleaved(value))


def functions(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    scores = torch.matmul(input=query, other=torch.transpose(interleaved(key), 2, 3))
    return torch.matmul(torch.softmax(torch.div(scores, 2.0), -1), interleaved(value))


def merged_heads(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    query, key, value = (x.flatten(0, 1) for x in (query, repeat_kv(key), repeat_kv(value)))
    weights = torch.softmax(torch.bmm(query * 0.25, key.transpose(1, 2)), -1)
    return torch.bmm(weights, value).unflatten(0, (-1, HEADS))


def modules(module: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    weights = module.softmax(query @ interleaved(key).transpose(2, 3) * HEAD_DIM**-0.5)
    return module.dropout(weights) @ interleaved(value)


def in_place(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    scores = query @ interleaved(key).transpose(2, 3)
    scores = scores.mul_(0.25).add_(mask)
    return scores.softmax(-1) @ interleaved(value)


PLAIN: dict[str, Attend] = {
    "sdpa": sdpa,
    "sdpa, repeat_kv": sdpa_repeat_kv,
    "sdpa, unsqueeze > expand > flatten": sdpa_flattened,
    "sdpa, repeat_interleave": sdpa_interleaved,
    "sdpa, scale": sdpa_scaled,
    "sdpa, keywords": sdpa_by_keyword,
    "llama": llama,
    "bart": bart,
    "gpt2": gpt2,
    "operators": operators,
    "methods": methods,
    "functions": functions,
    "merged heads": merged_heads,
    "modules": modules,
}
MASKED: dict[str, Attend] = {
    "sdpa": sdpa_masked,
    "llama": llama_masked,
    "mask first": mask_first,
    "gemma2": gemma2,
    "gpt_oss": gpt_oss,
    "in place": in_place,
}
