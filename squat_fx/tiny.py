"""Tiny random models of the causal-LM architectures of transformers, from their configs alone.

Config classes name their sizes by a few conventions (``hidden_size``, ``n_embd``, ``d_model``), so
a table of names makes most of them small, and a few lines make the others so. A tiny model has one
layer of each kind that the architecture has; it shows which graphs the architecture traces to, in
seconds and without any weights.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

WIDTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCABULARY, POSITIONS = 64, 4, 2, 16, 96, 256, 256
WINDOW = 10
LARGEST = 60_000_000  # parameters of what still counts as tiny

# fmt: off
_NAMES: dict[Any, str] = {
    WIDTH: "hidden_size d_model n_embd dim emb_dim embedding_size embed_dim word_embed_proj_dim "
           "input_size embedding_dim hidden_dim lru_width attention_hidden_size dim_model "
           "local_dim",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
       "num_decoder_layers num_encoder_layers num_blocks "
       "num_key_value_heads swa_num_key_value_heads num_global_key_value_heads "
       "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts moe_top_k "
       "zero_expert_num index_n_heads linear_num_key_heads n_mamba_heads altup_num_inputs o_groups",
    HEADS: "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
           "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads "
           "swa_num_attention_heads num_local_experts num_experts n_routed_experts moe_num_experts "
           "num_routed_experts linear_num_value_heads",
    HEAD_DIM: "head_dim attention_head_dim kv_channels d_head d_kv global_head_dim swa_head_dim "
              "dim_head qk_nope_head_dim v_head_dim index_head_dim o_lora_rank linear_key_head_dim "
              "linear_value_head_dim mamba_head_dim mamba_headdim mamba_d_head "
              "hidden_size_per_layer_input patch_size num_mel_bins",
    HIDDEN: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner d_inner dff d_ff "
            "ffn_hidden_size feed_forward_size dense_intermediate_size intermediate_size_mlp "
            "dim_ff block_ff_dim mlp_dim",
    32: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
        "expert_ffn_hidden_size moe_shared_expert_intermediate_size "
        "prefix_dense_intermediate_size q_lora_rank kv_lora_rank block_size image_size "
        "projection_dim",
    1: "n_group topk_group n_shared_experts moe_num_shared_experts num_shared_experts "
       "mamba_ngroups mamba_n_groups n_groups bos_token_id decoder_start_token_id",
    8: "qk_rope_head_dim state_size ssm_state_size mamba_d_state mamba_state_dim time_step_rank "
       "mamba_dt_rank mamba_num_heads mamba_n_heads mamba_chunk_size chunk_size laurel_rank",
    24: "qk_head_dim",
    128: "mamba_d_ssm",
    WINDOW: "sliding_window attention_chunk_size attention_window_size",
    VOCABULARY: "vocab_size vocab_size_per_layer_input max_position_embeddings n_positions n_ctx "
                "max_seq_len seq_length max_source_positions max_target_positions "
                "max_sequence_length",
    0: "pad_token_id num_kv_shared_layers",
}
_SPECIAL_TOKENS = {"eos_token_id": 2, "sep_token_id": 3, "mask_token_id": 4, "cls_token_id": 5}
_SIZES = {n: size for size, names in _NAMES.items() for n in names.split()} | _SPECIAL_TOKENS | {
    "index_topk": 4,
}
# By model type, after the table; None: the class's own default.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_hidden_layers": 4, "layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 16},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
        for kind in ("full_attention", "sliding_attention")
    }},
    "falcon": {"num_kv_heads": None},
    "gemma3n_text": {"num_kv_shared_layers": 2, "num_hidden_layers": 4,
                     "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_text": {"num_kv_shared_layers": 2, "num_hidden_layers": 4,
                    "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_bigcode": {"multi_query": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2,
                "window_size": WINDOW},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_d_head": 16},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
              "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "expand": 2},
    "nemotron_h": {"num_hidden_layers": None},
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 64,
                        "num_key_value_heads": 1},
    "xlstm": {"qk_dim_factor": 0.5},
    "zamba": {"num_hidden_layers": 4, "num_key_value_heads": 4, "attention_head_dim": 32,
              "attention_hidden_size": 2 * WIDTH,
              "layer_types": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": None, "num_mem_blocks": 1, "num_key_value_heads": 4,
               "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
}
for _hybrid in ("lfm3", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text",
                "olmo_hybrid"):
    _OVERRIDES[_hybrid] = {"num_hidden_layers": 4}
NOT_BUILT = {
    "blt": "bytes in patches, with inputs of its own",
    "gemma4_assistant": "a draft head",
    "gemma4_unified_assistant": "a draft head",
    "git": "needs a vision tower",
    "musicgen": "its tokens are codebooks",
    "musicgen_melody": "its tokens are codebooks",
    "reformer": "it hashes at random, so that no two runs are alike, and has no KV cache",
    "qwen4_exp_text": "its indexer loops over tokens, which Dynamo unrolls for many minutes",
} | dict.fromkeys(
    ("dots3_note", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "got_ocr2", "llama4",
     "moss_transcribe_diarize", "qwen3_5", "qwen3_5_moe", "qwen4_exp"),
    "a composite; its text model has a row of its own, or none",
)
"""Causal-LM architectures that are not built, and why."""
_DECODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie",
    "megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer",
    "xlm-roberta", "xlm-roberta-xl", "xmod", "bart", "bigbird_pegasus", "blenderbot",
    "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart", "whisper", "prophetnet",
    "trocr",
)
_TEXT_PARTS = ("emu3", "moshi")  # composites whose text config builds the causal LM
# fmt: on


def model_named(name: str, attention: str | None = None) -> nn.Module:
    """A tiny model of the architecture ``name``; with SDPA if it can and nothing else is asked for.

    Raises:
        ValueError: there is no such architecture, or it cannot be built like this.
    """
    architecture = architecture_named(name)
    return _built(architecture, lambda wanted: tiny_config(architecture, wanted), attention)


def model_of_config(path: Path, attention: str | None = None) -> nn.Module:
    """A narrow random model with the layers and heads of a ``config.json`` (or its folder).

    Raises:
        ValueError: the config is of no causal LM of transformers, or none can be built of it.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    config = config.get_text_config(decoder=True)
    architecture = architecture_named(config.model_type)
    return _built(architecture, lambda wanted: like_config(config, wanted), attention)


def _built(architecture: str, config: Callable[[str], Any], attention: str | None) -> nn.Module:
    if attention is not None:
        return tiny_model(architecture, config(attention))
    try:
        return tiny_model(architecture, config("sdpa"))
    except ValueError:  # not every architecture has it
        return tiny_model(architecture, config("eager"))


def architectures() -> list[str]:
    """The model types for which a tiny causal LM may be built."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(NOT_BUILT))


def architecture_named(name: str) -> str:
    """The model type that ``name`` says: ``llama``, ``LlamaConfig`` or ``LlamaForCausalLM``.

    Raises:
        ValueError: there is none, with the nearest names.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = {alias.lower(): kind for kind in architectures() for alias in (
        kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind], CONFIG_MAPPING[kind].__name__
    )}  # fmt: skip
    if name.lower() in known:
        return known[name.lower()]
    near = difflib.get_close_matches(name.lower(), known, n=3)
    hint = f"; did you mean {' or '.join(sorted({known[n] for n in near}))}?" if near else ""
    raise ValueError(
        f"{name} is no causal-LM architecture of transformers that is built here{hint}"
    )


def tiny_config(architecture: str, attention: str) -> Any:
    """A config of one layer of each kind; ``attention`` is ``"sdpa"`` or ``"eager"``."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[architecture]
    given = _shrunk(config_class, _OVERRIDES.get(architecture, {}))
    if architecture in _DECODERS:
        given["is_decoder"] = True
    config = _with_every_kind_of_layer(config_class, given)
    if architecture in _TEXT_PARTS:
        config = config.get_text_config(decoder=True)
    if architecture == "dbrx":  # the default lacks rope_theta, which the model reads
        config.attn_config.rope_theta, config.attn_config.clip_qkv = 10000.0, 8.0
        config.attn_config.kv_n_heads = KV_HEADS
    config._attn_implementation = attention
    config.use_cache = True
    return config


def like_config(config: Any, attention: str) -> Any:
    """A config of the same architecture, layers and head counts as ``config``, but narrow."""
    given = {k: v for k, v in config.to_dict().items() if k in _fields(type(config))}
    depth = {n for n, size in _SIZES.items() if size == 2 and "layer" in n}
    heads = {n for n, size in _SIZES.items() if "heads" in n or "experts" in n}
    sizes = _shrunk(type(config), {})
    narrow = {k: v for k, v in sizes.items() if k not in depth | heads and given.get(k) is not None}
    shrunk = type(config)(**given | narrow)
    shrunk._attn_implementation, shrunk.use_cache = attention, True
    return shrunk


def tiny_model(architecture: str, config: Any, seed: int = 0) -> nn.Module:
    """A causal LM of ``config`` with random weights that are large enough for attention to matter.

    Raises:
        ValueError: the model would have more than 60 million parameters, or the architecture has no
            such attention implementation.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[architecture])
    attention = config._attn_implementation
    with torch.device("meta"):
        outline = model_class._from_config(config, attn_implementation=attention)
    count = sum(p.numel() for p in outline.parameters())
    if count > LARGEST:
        raise ValueError(f"a tiny {architecture} would have {count / 1e6:.0f} million parameters")
    torch.manual_seed(seed)
    model = model_class._from_config(config, attn_implementation=attention).eval()
    if architecture == "xmod":
        model.set_default_language("en_XX")
    _sharpen(model, seed)
    return model


def _sharpen(model: nn.Module, seed: int) -> None:
    """Scale weights up and fill zeros: at initialization attention is nearly uniform, and a wrong
    cache would hardly be seen.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif parameter.dim() == 2 and not any(n in name for n in ("emb", "wte", "wpe", "gate")):
                parameter.mul_(4.0)


def _fields(config_class: type) -> set[str]:
    if dataclasses.is_dataclass(config_class):
        return {f.name for f in dataclasses.fields(config_class)}
    return set(inspect.signature(config_class.__init__).parameters)


def _shrunk(config_class: Any, overrides: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """Small values for the fields of a config class and of the configs in it."""
    names = _fields(config_class)
    given = {name: _SIZES[name] for name in names if name in _SIZES}
    if "kv_lora_rank" in names and "num_key_value_heads" in given:
        given["num_key_value_heads"] = HEADS
    for name, value in overrides.items():
        given.pop(name, None)
        if value is not None:
            given[name] = value
    for name, part in (getattr(config_class, "sub_configs", None) or {}).items():
        if name not in given and depth <= 2 and part.__name__ != "AutoConfig":
            given[name] = part(**_shrunk(part, {}, depth + 1))
    return given


def _with_every_kind_of_layer(config_class: Any, given: dict[str, Any]) -> Any:
    """The config, with one layer of each kind that the class has by default where it lacks some."""
    config = config_class(**given)
    kinds = list(dict.fromkeys(getattr(config_class(), "layer_types", None) or ()))
    found = getattr(config, "layer_types", None) or ()
    is_complete = set(kinds) <= set(found) and len(found) <= 4
    if not kinds or is_complete or "layer_types" in given:
        return config
    kinds = kinds if len(kinds) > 1 else kinds * 2
    try:
        return config_class(**given | {"layer_types": kinds, "num_hidden_layers": len(kinds)})
    except Exception:  # the kinds are derived from something else
        return config
