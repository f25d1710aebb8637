"""What Python does between two steps: guards of the compiled call, and the boundary around a graph.

    python benchmarks/host_overhead.py --layers 32

A tiny model with as many layers decodes on the CPU, graphs run eagerly, and what they take is
subtracted from the time of the call. Printed are medians a step: of ``torch.compile`` on a dense
cache, and of ``squat_fx.compile``, split into the boundary (arenas and positions in, handles out)
and the rest (transformers' own wrappers, Dynamo's guards).
"""

from __future__ import annotations

import multiprocessing as mp
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from common import command, new_cache, write_result
from rich.console import Console
from rich.table import Table
from torch import fx
from transformers import LlamaConfig, LlamaForCausalLM

import squat_fx
from squat_fx.bench.record import versions
from squat_fx.boundary import Boundary

VOCABULARY, PROMPT = 96, 40
WARMUP = 6  # steps


class Clock:
    """Adds up the seconds that wrapped calls take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, timed."""

        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.seconds += time.perf_counter() - started

        return timed


def tiny_model(layers: int) -> Any:
    """A Llama that takes next to no time."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def outside(model: Any, steps: int, *clocks: Clock) -> list[float]:
    """Median milliseconds a step: of the call outside of the first clock, of the first outside of
    the second, and so on.
    """
    cache, ids = new_cache(model), torch.ones(1, PROMPT, dtype=torch.int64)
    taken: list[list[float]] = []
    for _ in range(steps):
        for clock in clocks:
            clock.seconds = 0.0
        started = time.perf_counter()
        with torch.no_grad():
            logits = model(ids, past_key_values=cache, use_cache=True).logits
        times = [time.perf_counter() - started, *(clock.seconds for clock in clocks)]
        taken.append([a - b for a, b in pairwise(times)])
        ids = logits[:, -1:].argmax(-1)
    return [1e3 * median(column) for column in zip(*taken[WARMUP:], strict=True)]


def dense(layers: int, steps: int) -> float:
    """``torch.compile`` on a dense cache."""
    graphs = Clock()

    def backend(module: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        return graphs.wrap(module.forward)

    model = tiny_model(layers)
    model.compile(backend=backend)
    return outside(model, steps, graphs)[0]


def packed(layers: int, steps: int) -> tuple[float, float]:
    """``squat_fx.compile``: everything but the boundary, and the boundary."""
    boundaries, graphs = Clock(), Clock()
    original = Boundary.__call__
    model = squat_fx.compile(tiny_model(layers), inner="eager")
    seen: set[int] = set()

    def call(self: Boundary, *args: Any) -> Any:
        if id(self) not in seen:
            seen.add(id(self))
            self._inner = graphs.wrap(self._inner)
        return boundaries.wrap(original)(self, *args)

    Boundary.__call__ = call
    try:
        rest, boundary = outside(model, steps, boundaries, graphs)
    finally:
        Boundary.__call__ = original
    return rest, boundary


def main(
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 32,
    steps: Annotated[int, typer.Option(help="Decoded tokens.")] = 60,
    out: Annotated[Path | None, typer.Option(help="Write the numbers here, as json.")] = None,
) -> None:
    """Print a table, and write a json if asked to."""
    # Each in a process of its own: what Dynamo compiled for one model slows the next one down.
    with mp.get_context("spawn").Pool(1, torch.set_num_threads, (1,), maxtasksperchild=1) as pool:
        baseline = pool.apply(dense, (layers, steps))
        rest, boundary = pool.apply(packed, (layers, steps))
    table = Table("ms a step", "guards and wrappers", "boundary", box=None)
    table.add_row("torch.compile, dense cache", f"{baseline:.2f}", "-")
    table.add_row("squat_fx.compile", f"{rest:.2f}", f"{boundary:.2f}")
    Console().print(table)
    head = {"command": command("host_overhead.py", None, out, layers=layers, steps=steps)}
    found = {"dense_ms": baseline, "guards_ms": rest, "boundary_ms": boundary}
    write_result(out, head | {"versions": versions()} | found)


if __name__ == "__main__":
    typer.run(main)
