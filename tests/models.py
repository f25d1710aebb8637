"""Tiny random models of six families, and the ways in which people generate with them."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

VOCABULARY = 96


def llama(attention: str) -> PreTrainedModel:
    """Grouped heads, rotary positions."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        attn_implementation=attention,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def qwen2_large_key_biases(attention: str) -> PreTrainedModel:
    """Key biases far larger than the keys, on which low-bit caches collapse."""
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        attn_implementation=attention,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=20.0)
    return model


def gpt2(attention: str) -> PreTrainedModel:
    """Learned positions, fused projections, no grouped heads."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=1024,
        attn_implementation=attention, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def gemma2(attention: str) -> PreTrainedModel:
    """Softcap (eager only), a scale of its own, sliding windows in every other layer."""
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=24,
        sliding_window=24, max_position_embeddings=4096, attn_implementation=attention,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config)


def opt(attention: str) -> PreTrainedModel:
    """Positions counted from the mask."""
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=64, ffn_dim=96, num_hidden_layers=2,
        num_attention_heads=4, word_embed_proj_dim=64, max_position_embeddings=1024,
        attn_implementation=attention,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def gpt_oss(attention: str) -> PreTrainedModel:
    """Attention sinks (eager only), key biases, mixture of experts, sliding windows in every other
    layer.
    """
    config = transformers.GptOssConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_local_experts=4,
        num_experts_per_tok=2, sliding_window=24, max_position_embeddings=4096,
        attn_implementation=attention,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
        torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=2.0)
    return model


FAMILIES: dict[str, Callable[[str], PreTrainedModel]] = {
    "llama": llama,
    "qwen2": qwen2_large_key_biases,
    "gpt2": gpt2,
    "gemma2": gemma2,
    "opt": opt,
    "gpt_oss": gpt_oss,
}
ATTENTION = {"gemma2": "eager", "gpt_oss": "eager"}
"""Families whose softcap or sinks ask for attention that is written out; the others use SDPA."""


def build(family: str, attention: str | None = None, seed: int = 0) -> PreTrainedModel:
    """A tiny model of ``family`` with random weights."""
    torch.manual_seed(seed)
    model = FAMILIES[family](attention or ATTENTION.get(family, "sdpa")).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    with (
        torch.no_grad()
    ):  # sharper attention than at initialization, so that a wrong cache changes the tokens
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "wte" not in name:
                parameter.mul_(4.0)
    return model


def prompt(batch: int, length: int, seed: int = 1) -> Tensor:
    """Random token ids that are no padding."""
    return torch.randint(
        3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


def greedy(model: PreTrainedModel, tokens: int = 64) -> Tensor:
    """64 greedy tokens for one prompt."""
    return model.generate(prompt(1, 20), max_new_tokens=tokens, do_sample=False)


def left_padded_batch(model: PreTrainedModel, tokens: int = 48, device: str = "cpu") -> Tensor:
    """Three prompts of 20, 13 and 5 tokens, padded on the left."""
    ids = prompt(3, 20).to(device)
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 7, 15)):
        mask[row, :pads] = 0
    return model.generate(ids * mask, attention_mask=mask, max_new_tokens=tokens, do_sample=False)


def beam(model: PreTrainedModel, tokens: int = 24) -> Tensor:
    """Three beams, reordered at every step."""
    return model.generate(prompt(2, 16), max_new_tokens=tokens, num_beams=3, do_sample=False)


def prompt_lookup(model: PreTrainedModel, tokens: int = 40) -> Tensor:
    """Assisted decoding: several tokens a step, cropped back every round."""
    repeated = prompt(1, 12).repeat(1, 4)
    return model.generate(
        repeated, max_new_tokens=tokens, prompt_lookup_num_tokens=4, do_sample=False
    )


def _step(model: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)


def interleaved(model: PreTrainedModel, tokens: int = 40) -> Tensor:
    """Two caches, one step each in turn."""
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    ids = [prompt(1, 17, seed=3), prompt(1, 9, seed=4)]
    out: list[Tensor] = []
    for _ in range(tokens):
        ids = [_step(model, i, c) for i, c in zip(ids, caches, strict=True)]
        out += ids
    return torch.cat(out, 1)


def chat(model: PreTrainedModel, tokens: int = 24) -> Tensor:
    """Three turns on one cache."""
    cache = DynamicCache(config=model.config)
    history = prompt(1, 15, seed=5)
    for turn in range(3):
        history = model.generate(
            history, past_key_values=cache, max_new_tokens=tokens, do_sample=False
        )
        history = torch.cat([history, prompt(1, 11, seed=6 + turn)], 1)
    return history


def chunked_prefill(model: PreTrainedModel, tokens: int = 32) -> Tensor:
    """A prompt of 90 tokens in chunks of 32, 32 and 26, then greedy steps."""
    cache = DynamicCache(config=model.config)
    ids = prompt(2, 90, seed=9)
    for chunk in ids.split(32, 1):
        token = _step(model, chunk, cache)
    out = [token]
    for _ in range(tokens):
        out.append(_step(model, out[-1], cache))
    return torch.cat(out, 1)


SCENARIOS: dict[str, Callable[[PreTrainedModel], Tensor]] = {
    "greedy": greedy,
    "left_padded_batch": left_padded_batch,
    "beam": beam,
    "prompt_lookup": prompt_lookup,
    "interleaved": interleaved,
    "chat": chat,
    "chunked_prefill": chunked_prefill,
}
