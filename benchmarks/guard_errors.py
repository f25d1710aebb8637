"""What the guard measures, for models and codecs that work and for some that do not.

    python benchmarks/guard_errors.py FOLDER --text wikitext2_test_raw.txt --text book_moby_dick.txt
    python benchmarks/guard_errors.py FOLDER --text wikitext2_test_raw.txt --key-bias 20

Prints, for each codec and length of prompt, the error of the layer that loses most and that of the
middle one. With ``--key-bias`` keys get random biases of that size, as those of Qwen2.5 have.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

import squat_fx

FIRST_CHARACTER = 20000  # of a text, behind what books begin with


def biased(model: Any, size: float) -> Any:
    """Give all keys biases, normal of standard deviation ``size``."""
    torch.manual_seed(0)
    for name, module in model.named_modules():
        if name.endswith("k_proj"):
            module.bias = torch.nn.Parameter(size * torch.randn(module.out_features))
    return model


def main(
    model: Annotated[Path, typer.Argument(help="A folder.")],
    text: Annotated[list[Path], typer.Option()],
    codec: Annotated[list[str] | None, typer.Option()] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Lengths of prompts.")] = None,
    key_bias: Annotated[float, typer.Option()] = 0.0,
    bits: Annotated[float, typer.Option()] = 2,
) -> None:
    """Print a line for each text, codec and length."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    for name in codec or ["squat", "kivi"]:
        torch._dynamo.reset()
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        compiled = squat_fx.compile(
            biased(loaded, key_bias) if key_bias else loaded,
            bits=bits, codec=name, inner="eager", guard_threshold=100.0,
        )  # fmt: skip
        errors = squat_fx.report(compiled).attention_errors
        for path in text:
            start = path.read_text()[FIRST_CHARACTER : 2 * FIRST_CHARACTER]
            ids = tokenizer(start, return_tensors="pt").input_ids
            for count in tokens or [60, 80, 150, 300, 1024]:
                errors.clear()
                with torch.no_grad():
                    compiled(ids[:, :count], use_cache=True, logits_to_keep=1)
                found = list(errors.values())
                row = f"{name:12} {path.stem[:20]:20} {count:5} tokens"
                print(f"{row}: worst {max(found):.2f}, middle {median(found):.2f}", flush=True)


if __name__ == "__main__":
    typer.run(main)
