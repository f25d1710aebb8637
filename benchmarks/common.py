"""What the benchmarks share: the model, the text, a decoding loop, and how a result is written.

A result is one small json: the command, the versions, what was measured. File names in it are bare
names, so that two machines write the same command.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM

import squat_fx
from squat_fx.bench.record import write_json
from squat_fx.cli import late_progress, stay_offline
from squat_fx.demo import smollm2_folder
from squat_fx.evaluate import measure
from squat_fx.evaluate.measure import innermost as innermost
from squat_fx.evaluate.settings import new_cache as new_cache
from squat_fx.evaluate.texts import leading_tokens as leading_tokens
from squat_fx.evaluate.texts import text_record as text_record
from squat_fx.evaluate.texts import text_tokens as text_tokens


def model_folder(chosen: Path | None) -> Path:
    """The folder the user chose, else SmolLM2-135M-Instruct, downloaded the first time."""
    stay_offline()
    if chosen is None:
        return smollm2_folder(late_progress)
    if not chosen.is_dir():
        raise typer.BadParameter(f"there is no folder {chosen}; give a Hugging Face model folder")
    return chosen


def load_model(folder: Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    """A fresh causal language model on the CPU, untouched."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, local_files_only=True
    )
    return model.eval()


def prefill(model: Any, prompt: Tensor, cache: Any) -> Any:
    """Feed ``prompt`` ``[1, tokens]`` in one call; returns the cache the model hands back."""
    return model(prompt, past_key_values=cache, logits_to_keep=1).past_key_values


def decode(model: Any, tokens: Tensor, cache: Any) -> Iterator[Tensor]:
    """Feed ``tokens`` ``[1, tokens]`` one by one; yields the logits ``[vocabulary]`` after each."""
    for token in tokens.split(1, dim=1):
        yield model(token, past_key_values=cache).logits[0, -1]


def stored_bytes(cache: Any) -> squat_fx.CacheBytes:
    """:func:`squat_fx.cache_bytes`, looking also into tensors that other libraries wrap.

    To torch a wrapped tensor has the size of what it stands for; what counts is what it holds.
    """
    total = squat_fx.CacheBytes(0, 0)
    for layer in cache.layers:
        for tensor in (x for x in vars(layer).values() if isinstance(x, Tensor)):
            found = squat_fx.cache_bytes(tensor)
            total = total + squat_fx.CacheBytes(measure.stored_bytes(tensor), found.dense)
    return total


def command(
    script: str, model: Path | None, out: Path | None, texts: Sequence[Path] = (), **options: Any
) -> str:
    """The command line that repeats a run; options that are None are left out."""
    parts = ["python", f"benchmarks/{script}"]
    if model is not None:
        parts += ["--model", model.name]
    for text in texts:
        parts += ["--text", text.name]
    for name, value in options.items():
        if value is None:
            continue
        shown = value.name if isinstance(value, Path) else value
        parts += [f"--{name.replace('_', '-')}", str(shown)]
    if out is not None:
        parts += ["--out", f"benchmarks/results/{out.name}"]
    return " ".join(parts)


def write_result(out: Path | None, result: dict[str, Any]) -> None:
    """Write ``result`` as json, if a file was asked for."""
    if out is None:
        return
    write_json(out, result)
    typer.echo(f"wrote {out}", err=True)
