"""A long prompt is read once; its packed cache waits in a file for other processes.

    python examples/keep_a_prompt.py

The first part could be a nightly job, the second one the server of the next day. With another
model, another codec or a damaged file ``load_cache`` raises and says which.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import squat_fx


def make_model(inner: str) -> LlamaForCausalLM:
    """The same in every process: random weights from a fixed seed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return squat_fx.compile(LlamaForCausalLM(config).eval(), bits=2, inner=inner)


def keep(path: Path, prompt: Tensor, inner: str) -> None:
    """Read the prompt, and keep what is cached of it."""
    model = make_model(inner)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt, past_key_values=cache, use_cache=True)
    squat_fx.save_cache(path, cache, model)


def answer(path: Path, prompt: Tensor, question: Tensor, inner: str) -> Tensor:
    """Go on after the prompt, which is not read again."""
    model = make_model(inner)
    cache = squat_fx.load_cache(path, model)
    ids = torch.cat([prompt, question], 1)
    return model.generate(ids, past_key_values=cache, max_new_tokens=16, do_sample=False)


def main(tokens: int = 2000, inner: str = "inductor") -> tuple[int, int]:
    """Bytes of the file, and of the dense cache that it stands for."""
    prompt, question = torch.randint(3, 256, (1, tokens)), torch.randint(3, 256, (1, 8))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompt.safetensors"
        keep(path, prompt, inner)
        size = path.stat().st_size
        dense = squat_fx.cache_bytes(squat_fx.load_cache(path)).dense
        out = answer(path, prompt, question, inner)
    print(f"{size} bytes for a prompt of {tokens} tokens, {dense} with a dense cache")
    print("went on with", out[0, -16:].tolist())
    return size, dense


if __name__ == "__main__":
    main()
