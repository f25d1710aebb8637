"""Seconds per decoded token on the CPU, dense against packed, at a given context.

    python benchmarks/decode_cpu.py --text wikitext2_test_raw.txt --out benchmarks/results/d.json

Four callables, each a model of its own in a process of its own: the untouched model, the same under
``torch.compile(dynamic=True)``, and ``squat_fx.compile`` with ``inner="eager"`` and
``"inductor"``. Processes, because graphs that Dynamo compiled for one model make it check more
guards for the next. They take turns, a few tokens each, so that a busy machine is unfair to none;
what is reported is the median over all steps after a few that warm up.
"""

from __future__ import annotations

import multiprocessing as mp
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import typer
from common import (
    command,
    decode,
    load_model,
    model_folder,
    new_cache,
    prefill,
    text_record,
    text_tokens,
    write_result,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor

import squat_fx
from squat_fx.bench.record import versions
from squat_fx.cli import late_progress

BAR = 2.0  # times the untouched model, at 1k context
WARMUP = 6  # steps: compiling, and what follows it
TURN = 5  # steps before the next model has its turn


@dataclass(frozen=True)
class Job:
    """What every process is told."""

    folder: Path
    ids: Tensor
    context: int
    bits: int
    threads: int


VARIANTS: dict[str, Callable[[Any, int], Any]] = {
    "untouched, eager": lambda model, bits: model,
    "untouched, torch.compile": lambda model, bits: torch.compile(model, dynamic=True),
    "squat_fx, inner eager": lambda model, bits: squat_fx.compile(model, bits, inner="eager"),
    "squat_fx, inner inductor": lambda model, bits: squat_fx.compile(model, bits),
}


def serve(name: str, job: Job, pipe: Connection) -> None:
    """Prefill, warm up, then time as many steps as each message asks for."""
    torch.set_num_threads(job.threads)
    with torch.no_grad():
        model = VARIANTS[name](load_model(job.folder), job.bits)
        cache = prefill(model, job.ids[:, : job.context], new_cache(model))
        steps = decode(model, job.ids[:, job.context :], cache)
        for _ in range(WARMUP):
            next(steps)
        pipe.send("ready")
        while count := pipe.recv():
            seconds = []
            for _ in range(count):
                started = time.perf_counter()
                next(steps)
                seconds.append(time.perf_counter() - started)
            pipe.send(seconds)


def take_turns(job: Job, steps: int) -> dict[str, list[float]]:
    """Seconds of each step, by variant."""
    context = mp.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    with late_progress("Prefill and compiling") as advance:
        for index, name in enumerate(VARIANTS):
            pipes[name], theirs = context.Pipe()
            process = context.Process(target=serve, args=(name, job, theirs), daemon=True)
            process.start()
            processes.append(process)
            theirs.close()
            pipes[name].recv()  # one after the other: they would slow each other down
            advance((index + 1) / len(VARIANTS))
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with late_progress("Decoding") as advance:
        for done in range(0, steps, TURN):
            for name, pipe in pipes.items():
                pipe.send(min(TURN, steps - done))
                seconds[name] += pipe.recv()
            advance(done / steps)
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(0)
        process.join()
    return seconds


def print_rows(seconds: dict[str, list[float]], console: Console) -> None:
    dense = median(seconds["untouched, eager"])
    compiled = median(seconds["untouched, torch.compile"])
    table = Table("", "ms a token", "quartiles", "× eager", "× torch.compile", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, times in seconds.items():
        low, middle, high = (1e3 * q for q in quantiles(times, n=4))
        ratios = f"{median(times) / dense:.2f}", f"{median(times) / compiled:.2f}"
        table.add_row(name, f"{middle:.1f}", f"{low:.1f} – {high:.1f}", *ratios)
    console.print(table)
    worst = median(seconds["squat_fx, inner inductor"]) / dense
    verdict = "holds" if worst <= BAR else "does not hold"
    console.print(
        f"At most {BAR:g} times the untouched model: {verdict} ({worst:.2f}).", highlight=False
    )


def main(
    text: Annotated[Path, typer.Option(help="UTF-8 text.", exists=True, dir_okay=False)],
    model: Annotated[
        Path | None, typer.Option(help="Hugging Face model folder; SmolLM2-135M when left out.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens in the cache at the start.", min=1)] = 1024,
    steps: Annotated[int, typer.Option(help="Steps to time, of each.", min=2)] = 60,
    bits: Annotated[int, typer.Option(help="Bits per cached number.", min=1, max=8)] = 2,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the json.")] = None,
) -> None:
    """Decoding speed of the packed and the dense cache."""
    folder = model_folder(model)
    ids = text_tokens(folder, text)[None, : context + WARMUP + steps]
    threads = threads or torch.get_num_threads()
    seconds = take_turns(Job(folder, ids, context, bits, threads), steps)
    print_rows(seconds, Console())
    options = {"context": context, "steps": steps, "bits": bits, "threads": threads}
    medians = {name: round(1e3 * median(times), 2) for name, times in seconds.items()}
    dense = medians["untouched, eager"]
    result = {
        "command": command("decode_cpu.py", model, out, text=text, **options),
        "versions": versions(),
        "model": folder.name,
        "dtype": "float32",
        "device": f"cpu, {threads} threads",
        "text": text_record(text),
        "milliseconds_per_token": medians,
        "times_untouched_eager": {name: round(ms / dense, 3) for name, ms in medians.items()},
    }
    write_result(out, result)


if __name__ == "__main__":
    typer.run(main)
