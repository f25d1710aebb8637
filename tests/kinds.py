"""Tiny random models whose caches are not only growing keys and values of all tokens."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests.models import VOCABULARY, prompt

WINDOW = 24
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip


def decoder(name: str, **changes: Any) -> Callable[[str], PreTrainedModel]:
    """A maker of ``name + "ForCausalLM"``, of sizes that all decoders share."""

    def make(attention: str) -> PreTrainedModel:
        sizes = {**SMALL, "attn_implementation": attention, **changes}
        config = getattr(transformers, CONFIGS.get(name, f"{name}Config"))(**sizes)
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return make


def bart(attention: str) -> PreTrainedModel:
    """Cross attention, no rotary positions."""
    config = transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, max_position_embeddings=256, forced_eos_token_id=None,
        decoder_start_token_id=1, attn_implementation=attention,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def t5(attention: str) -> PreTrainedModel:
    """Cross attention, positions as a bias of the scores."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2,
        decoder_start_token_id=1, attn_implementation=attention,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def whisper(attention: str) -> PreTrainedModel:
    """Cross attention to sounds."""
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, max_source_positions=40, max_target_positions=128, num_mel_bins=8,
        decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        begin_suppress_tokens=None, attn_implementation=attention,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


CONFIGS = {
    "Gemma3": "Gemma3TextConfig",
    "Llama4": "Llama4TextConfig",
    "Gemma3n": "Gemma3nTextConfig",
}
SLIDING: dict[str, Callable[[str], PreTrainedModel]] = {
    "mistral": decoder("Mistral", sliding_window=WINDOW),
    "gemma3": decoder(
        "Gemma3", head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "llama4": decoder(
        "Llama4", head_dim=16, attention_chunk_size=WINDOW, intermediate_size_mlp=48,
        num_local_experts=2, num_experts_per_tok=1, layer_types=["chunked_attention"] * 2,
    ),
    "cohere2": decoder("Cohere2", sliding_window=WINDOW),
    "phi3": decoder("Phi3", sliding_window=WINDOW, pad_token_id=0),
}  # fmt: skip
CROSS: dict[str, Callable[[str], PreTrainedModel]] = {"bart": bart, "t5": t5, "whisper": whisper}
OTHER: dict[str, Callable[[str], PreTrainedModel]] = {
    "lfm2": decoder("Lfm2", layer_types=["conv", "full_attention"]),
    "qwen3_next": decoder(
        "Qwen3Next", head_dim=16, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "gemma3n": decoder(
        "Gemma3n", head_dim=16, num_hidden_layers=4, num_kv_shared_layers=2, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY, laurel_rank=4, altup_num_inputs=2,
        intermediate_size=[48] * 4, activation_sparsity_pattern=[0.0] * 4,
    ),
    "diffllama": decoder("DiffLlama", head_dim=8),
}  # fmt: skip


def build(kind: str, attention: str = "sdpa") -> PreTrainedModel:
    """A tiny model of ``kind`` with random weights, sharp enough that a wrong cache shows."""
    torch.manual_seed(0)
    model = (SLIDING | CROSS | OTHER)[kind](attention).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not any(x in name for x in ("embed", "shared", "router")):
                parameter.mul_(4.0)
    return model


def generate(
    model: PreTrainedModel, prompt_tokens: int = 20, tokens: int = 64, pads: int = 0
) -> Tensor:
    """Greedy tokens for two prompts, or the sounds that whisper takes; of one the first ``pads``
    tokens are padding (of what is encoded, the last).
    """
    options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False}
    if model.config.model_type == "whisper":
        sounds = torch.randn(2, 8, 80, generator=torch.Generator().manual_seed(1))
        return model.generate(input_features=sounds, **options)
    ids = prompt(2, prompt_tokens)
    mask = torch.ones_like(ids)
    mask[1, slice(-pads, None) if model.config.is_encoder_decoder else slice(pads)] = int(not pads)
    return model.generate(ids * mask, attention_mask=mask, **options)
