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


def sdpa_tiled(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    """All KV heads, and then all of them again (JetMoe)."""
    tiled = (x.repeat(1, QUERIES_PER_KV, 1, 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, *tiled)


def merged_query(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    """Batch and heads are merged for the scores, and apart for the output."""
    merged = torch.bmm(query.flatten(0, 1) * 0.25, interleaved(key).flatten(0, 1).transpose(1, 2))
    return torch.matmul(torch.softmax(merged.unflatten(0, (-1, HEADS)), -1), interleaved(value))


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


def mimo(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    """The maximum is subtracted, which a softmax does itself."""
    scores = torch.matmul(query, repeat_kv(key).transpose(2, 3)) * 0.25 + mask
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return torch.matmul(F.softmax(scores, dim=-1), repeat_kv(value))


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


def einsum(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    scores = torch.einsum("bhqd,bhkd->bhqk", query, interleaved(key)) / 4.0
    return torch.einsum("bhqk, bhkd -> bhqd", scores.softmax(-1), interleaved(value))


def modules(module: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    weights = module.softmax(query @ interleaved(key).transpose(2, 3) * HEAD_DIM**-0.5)
    return module.dropout(weights) @ interleaved(value)


def in_place(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    scores = query @ interleaved(key).transpose(2, 3)
    scores = scores.mul_(0.25).add_(mask)
    return scores.softmax(-1) @ interleaved(value)


def falcon(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    """``/=``, and heads that are there once (MQA) broadcast."""
    scores = query @ interleaved(key).transpose(-1, -2)
    scores /= 2.0
    return F.softmax(scores + mask, dim=-1) @ interleaved(value)


def bloom(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    """A bias per head that is added by ``baddbmm``, batch and heads being merged; then the mask."""
    batch, bias = query.size(0), distances(query, key).repeat(query.size(0), 1, 1)
    query, key, value = (x.flatten(0, 1) for x in (query, interleaved(key), interleaved(value)))
    scores = bias.baddbmm(batch1=query, batch2=key.transpose(-1, -2), beta=0.5, alpha=0.25)
    probs = F.softmax(scores.view(batch, HEADS, scores.size(1), -1) + mask, -1)
    return torch.bmm(probs.flatten(0, 1), value).unflatten(0, (-1, HEADS))


def distances(query: Any, key: Any) -> Any:
    """A slope per head times how far away a key is, ``[heads, queries, keys]``."""
    ahead = key.size(2) - query.size(2)
    apart = torch.arange(query.size(2))[:, None] + ahead - torch.arange(key.size(2))
    return torch.arange(1, HEADS + 1)[:, None, None] * -0.1 * apart


def gpt_neox_japanese(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    """``baddbmm`` that adds zeros."""
    batch, length = query.size(0), key.size(2)
    query, key, value = (x.flatten(0, 1) for x in (query, interleaved(key), interleaved(value)))
    zeros = query.new_zeros(query.size(0), query.size(1), length)
    scores = torch.baddbmm(zeros, query, key.transpose(1, 2), beta=1.0, alpha=0.3)
    probs = F.softmax(scores.unflatten(0, (batch, HEADS)) + mask, -1).flatten(0, 1)
    return torch.bmm(probs, value).unflatten(0, (-1, HEADS))


def mvp(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    """The mask is added between two views."""
    batch, queries = query.size(0), query.size(2)
    query, key, value = (x.flatten(0, 1) for x in (query, interleaved(key), interleaved(value)))
    scores = torch.bmm(query * 0.3, key.transpose(1, 2))
    scores = scores.view(batch, HEADS, queries, -1) + mask
    probs = F.softmax(scores.flatten(0, 1), -1)
    return torch.bmm(probs, value).unflatten(0, (-1, HEADS))


def mpt(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    """A position bias per head, then hidden scores are filled in."""
    scores = torch.matmul(query, interleaved(key).transpose(-1, -2)) * 0.4
    scores = scores + distances(query, key)
    scores = scores.masked_fill(mask < -1, torch.finfo(torch.float32).min)
    return torch.matmul(F.softmax(scores.float(), -1).to(value.dtype), interleaved(value))


def gpt_neo(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    """In fp32, a window by ``where``, the mask beside it."""
    scores = torch.matmul(query.float(), interleaved(key).float().transpose(-1, -2))
    window = distances(query, key)[:1] > -0.5
    lowest = torch.tensor(torch.finfo(torch.float32).min, dtype=torch.float32)
    scores = torch.where(window, scores, lowest) + mask
    return torch.matmul(F.softmax(scores, -1).to(value.dtype), interleaved(value))


def cpmant(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    """What was hidden is set to zero once more."""
    scores = torch.matmul(query, interleaved(key).transpose(-1, -2)) / 3.0 + distances(query, key)
    lowest, zero = torch.scalar_tensor(float("-inf")), torch.scalar_tensor(0)
    scores = torch.masked_fill(scores, mask < -1, lowest)
    probs = torch.masked_fill(scores.softmax(-1), mask < -1, zero)
    return torch.matmul(probs, interleaved(value))


def where_hidden(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    """``where`` with the scores last."""
    scores = torch.where(mask < -1, -1e9, query @ interleaved(key).mT)
    return scores.softmax(-1) @ interleaved(value)


def codegen(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    """The mask is scaled with the scores."""
    scores = torch.matmul(query, interleaved(key).transpose(-1, -2)) + mask
    return torch.matmul(torch.nn.functional.softmax(scores / 4.0, -1), interleaved(value))


def granite_swa(module: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    """Sinks as a scale of the output."""
    scores = torch.matmul(query, repeat_kv(key).transpose(2, 3)) * 0.25 + mask
    total = torch.logsumexp(scores, dim=-1)
    scale = (total - module.sinks.view(1, -1, 1)).to(torch.float32).sigmoid()
    probs = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(probs, repeat_kv(value)) * scale.unsqueeze(-1).to(query.dtype)


def flint(module: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    """Sinks in fp32, from which no maximum is subtracted."""
    scores = torch.matmul(query.float(), repeat_kv(key).float().transpose(2, 3)) * 0.25 + mask
    sinks = module.sinks.reshape(1, -1, 1, 1).expand(query.size(0), -1, query.size(2), 1)
    probs = F.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1].to(value.dtype)
    return torch.matmul(probs, repeat_kv(value))


def xglm(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    """What is hidden is raised to the smallest number."""
    scores = torch.matmul(query, interleaved(key).transpose(-1, -2)) * 0.3 + mask
    scores = torch.max(scores, torch.full((), torch.finfo(torch.float32).min))
    return torch.matmul(scores.clamp(min=-1e30).softmax(-1), interleaved(value))


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
    "einsum": einsum,
    "modules": modules,
    "sdpa, tiled": sdpa_tiled,
    "merged query": merged_query,
}
MASKED: dict[str, Attend] = {
    "sdpa": sdpa_masked,
    "llama": llama_masked,
    "mask first": mask_first,
    "gemma2": gemma2,
    "gpt_oss": gpt_oss,
    "in place": in_place,
    "falcon": falcon,
    "bloom": bloom,
    "gpt_neox_japanese": gpt_neox_japanese,
    "mvp": mvp,
    "mpt": mpt,
    "gpt_neo": gpt_neo,
    "cpmant": cpmant,
    "where, hidden": where_hidden,
    "codegen": codegen,
    "granite_swa": granite_swa,
    "mimo": mimo,
    "flint": flint,
    "xglm": xglm,
}
