"""Hugging Face ``generate()`` with a 2-bit cache: one line, and a look at what it did.

python examples/huggingface_generate.py                 a tiny random Llama, seconds
python examples/huggingface_generate.py --model FOLDER  a real model from disk
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import squat_fx
from squat_fx.config import Inner


def tiny_llama() -> PreTrainedModel:
    """Two layers with random weights; it says nothing sensible, but quickly."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def main(
    model: Annotated[str | None, typer.Option(help="A folder with a Hugging Face model.")] = None,
    tokens: Annotated[int, typer.Option(help="New tokens.")] = 64,
    inner: Annotated[str, typer.Option(help="inductor, aot_eager or eager.")] = "inductor",
) -> squat_fx.CacheBytes:
    """Generate greedily from a 2-bit cache and print the report."""
    network = AutoModelForCausalLM.from_pretrained(model).eval() if model else tiny_llama()
    prompt = torch.randint(3, network.config.vocab_size, (1, 600))

    chosen: Inner = inner  # pyright: ignore[reportAssignmentType]
    network = squat_fx.compile(network, bits=2, inner=chosen)
    out = network.generate(
        prompt, max_new_tokens=tokens, do_sample=False, pad_token_id=0, return_dict_in_generate=True
    )

    size = squat_fx.cache_bytes(out.past_key_values)
    print(squat_fx.report(network))
    print(f"cache of {out.sequences.shape[1] - 1} tokens: {size.stored} bytes, {size.ratio:.2f}x")
    return size


if __name__ == "__main__":
    typer.run(main)
