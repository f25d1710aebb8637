"""What the quality guard costs a prompt: seconds with guard="off", "warn" and "raise_bits".

    python benchmarks/guard.py --tokens 4096 --layers 8 --device cuda

Models of Llama-3.1-8B's shape with a few of its layers and random weights, or with ``--model`` one
of a folder. One model for each setting, taking turns; what is reported is the median.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig

import squat_fx
from squat_fx.bench.generate import SHAPES
from squat_fx.bench.record import device_name, versions

GUARDS = ["off", "warn", "raise_bits"]


def make(model: Path | None, layers: int, longest: int, device: str) -> Any:
    dtype = torch.float16 if device == "cuda" else torch.float32
    if model is not None:
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval().to(device)
    shape: dict[str, Any] = SHAPES["llama-3.1-8b"] | {"num_hidden_layers": layers}
    torch.manual_seed(0)
    with torch.device(device):
        config = LlamaConfig(**shape, max_position_embeddings=longest)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def seconds(model: Any, ids: torch.Tensor) -> float:
    """Of one prompt, until its logits are there."""
    started = time.perf_counter() if ids.is_cuda else time.process_time()
    with torch.no_grad():
        model(ids, use_cache=True, logits_to_keep=1)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() if ids.is_cuda else time.process_time()) - started


def main(
    tokens: Annotated[list[int], typer.Option(help="Lengths of prompts.")],
    model: Annotated[Path | None, typer.Option(help="A folder instead of random weights.")] = None,
    layers: Annotated[int, typer.Option()] = 8,
    device: Annotated[str, typer.Option()] = "cpu",
    inner: Annotated[str, typer.Option()] = "inductor",
    turns: Annotated[int, typer.Option()] = 10,
    guard: Annotated[list[str], typer.Option(help="Settings; the first is the baseline.")] = GUARDS,
    codec: Annotated[str, typer.Option()] = "squat",
    cuda_graphs: Annotated[bool, typer.Option("--cuda-graphs")] = False,
    out: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Print a line for each length, and write all of them as json."""
    options: dict[str, Any] = {"inner": inner, "codec": codec, "cuda_graphs": cuda_graphs}
    models = {
        which: squat_fx.compile(make(model, layers, max(tokens), device), guard=which, **options)
        for which in guard
    }
    rows = []
    for count in tokens:
        generator = torch.Generator().manual_seed(count)
        ids = torch.randint(5, 30000, (1, count), generator=generator).to(device)
        for each in models.values():
            for _ in range(2):
                seconds(each, ids)
        found: dict[str, list[float]] = {which: [] for which in guard}
        for _ in range(turns):
            for which, each in models.items():
                found[which].append(seconds(each, ids))
        row: dict[str, Any] = {"tokens": count} | {g: median(found[g]) for g in guard}
        row["more"] = {g: round(row[g] / row[guard[0]] - 1, 4) for g in guard[1:]}
        errors = squat_fx.report(models[guard[-1]]).attention_errors
        row["errors"] = [round(errors[layer], 3) for layer in sorted(errors)]
        rows.append(row)
        print(row, flush=True)
        if out is not None:
            known = {"layers": layers, "inner": inner, "turns": turns, "device": device_name()}
            out.write_text(json.dumps(known | {"versions": versions(), "rows": rows}, indent=1))
    print(*(squat_fx.report(models[guard[-1]]).notes), sep="\n")


if __name__ == "__main__":
    typer.run(main)
