"""Where the time of a first generation goes: cold, and with what an earlier process left on disk.

    python benchmarks/compile_time.py --layers 32
    python benchmarks/compile_time.py --shape llama-3.1-8b --device cuda --cuda-graphs

A model with random weights generates a few tokens in a process of its own, twice: with empty caches
of Inductor and Triton, and again. Each token is split into what torch itself times, in seconds:

    trace      Dynamo runs the model's Python on fake tensors
    rewrite    our passes
    aot        AOT autograd makes a graph of ATen operations
    inductor   lowering, scheduling, code for kernels and their calls
    kernels    waiting for compilers of kernels, and loading what they made
    guards     Dynamo builds the checks of the next call
    other      the rest of compiling, looking into caches among it
    run        the rest of the call; kernels of ours are compiled when they run for the first time

The first token needs the graph of a prompt, the second that of a step. ``cpu`` is what the process
computed meanwhile, on all its threads: a busy machine makes the others longer, but not that.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import command, write_result
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, StoppingCriteria

import squat_fx
from squat_fx import backend
from squat_fx.bench.generate import SHAPES
from squat_fx.bench.record import versions

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
NARROW = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": 96}  # fmt: skip
PHASES = ("trace", "rewrite", "aot", "inductor", "kernels", "guards", "other", "run")
TOKENS = 5


@dataclass(frozen=True)
class Settings:
    """What is compiled."""

    shape: str
    layers: int
    prompt: int
    device: str
    inner: str
    cuda_graphs: bool
    share_layers: bool


class Ticks(StoppingCriteria):
    """Notes for every token what it took; stops nothing."""

    def __init__(self) -> None:
        self.tokens: list[dict[str, float]] = []
        self.timed: list[dict[str, float]] = []
        self.rewriting = 0.0
        self._start()

    def _start(self) -> None:
        _metrics().clear()
        self.rewriting = 0.0
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._wall
        found = _phases(seconds, self.rewriting) | {"seconds": seconds}
        found["cpu"] = time.process_time() - self._cpu
        timed = {name: round(sum(values), 2) for name, values in _metrics().items()}
        self.timed.append({name: value for name, value in timed.items() if value >= 0.1})
        self.tokens.append({name: round(value, 2) for name, value in found.items()})
        self._start()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _metrics() -> dict[str, list[float]]:
    from torch._dynamo.utils import compilation_time_metrics

    return compilation_time_metrics


def _phases(seconds: float, rewriting: float) -> dict[str, float]:
    """What torch timed since it was last asked, by our names."""
    times = {name: sum(values) for name, values in _metrics().items()}

    def of(name: str) -> float:
        return times.get(name, 0.0)

    inductor, kernels = (
        of("compile_fx.<locals>.fw_compiler_base"),
        of("PyCodeCache.load_by_key_path"),
    )
    waited = kernels if inductor > kernels else 0.0  # loaded from a cache, Inductor does nothing
    found = {
        "trace": of("bytecode_tracing"),
        "rewrite": rewriting,
        "aot": of("create_aot_dispatcher_function") - inductor,
        "inductor": inductor - waited,
        "kernels": kernels,
        "guards": of("build_guards"),
    }
    compiling = of("_compile.compile_inner")
    found["other"] = compiling - sum(found.values())
    found["run"] = seconds - compiling
    return found


def _note_kernels() -> dict[str, float]:
    """Seconds that Triton takes for each kernel from now on."""
    found: dict[str, float] = {}

    def note(src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            stages = sum(seconds for _, seconds in times.lowering_stages)
            name = getattr(getattr(src, "fn", None), "__name__", "?")
            found[name] = round(found.get(name, 0.0) + stages / 1e6, 2)

    with contextlib.suppress(ImportError, AttributeError):
        from triton import knobs

        knobs.compilation.listener = note
    return found


def measure(settings: Settings) -> dict[str, Any]:
    """One generation, in this process."""
    kernels = _note_kernels()
    config = LlamaConfig(
        **{**(NARROW if settings.shape == "narrow" else SHAPES[settings.shape]),
           "num_hidden_layers": settings.layers, "max_position_embeddings": settings.prompt + 64}
    )  # fmt: skip
    dtype = torch.float16 if settings.device == "cuda" else torch.float32
    with torch.device(settings.device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        ids = torch.ones((1, settings.prompt), dtype=torch.int64)
    model.generation_config.eos_token_id = None
    squat_fx.compile(
        model, inner=settings.inner, cuda_graphs=settings.cuda_graphs,  # pyright: ignore
        share_layers=settings.share_layers,
    )  # fmt: skip
    ticks, original = Ticks(), backend.rewrite_graph

    def rewrite_graph(*args: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*args)
        finally:
            ticks.rewriting += time.perf_counter() - started

    backend.rewrite_graph = rewrite_graph
    ticks.__init__()
    options = {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS, "do_sample": False}
    with torch.no_grad():
        model.generate(ids, stopping_criteria=[ticks], pad_token_id=0, **options)
    return {
        "tokens": ticks.tokens,
        "timed": ticks.timed[:2],
        "seconds": round(sum(token["seconds"] for token in ticks.tokens), 2),
        "kernels": dict(sorted(kernels.items(), key=lambda item: -item[1])),
        "report": str(squat_fx.report(model)).splitlines(),
    }


def in_a_process(settings: Settings, folder: Path) -> dict[str, Any]:
    """:func:`measure` in a new process that has its caches in ``folder``."""
    environment = os.environ | {name: str(folder / name.lower()) for name in CACHES}
    done = subprocess.run(
        [sys.executable, __file__, "--only", json.dumps(asdict(settings))],
        env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def table(found: dict[str, Any]) -> Table:
    """Seconds of every token, cold and warm."""
    out = Table("caches", "token", *PHASES, "seconds", "cpu", box=None)
    for column in out.columns[1:]:
        column.justify = "right"
    for caches in ("cold", "warm"):
        for i, token in enumerate(found.get(caches, {}).get("tokens", ())):
            out.add_row(
                caches, str(i + 1), *(f"{token[name]:.2f}" for name in (*PHASES, "seconds", "cpu"))
            )
    return out


def main(
    shape: Annotated[str, typer.Option(help=f"narrow, or one of {', '.join(SHAPES)}.")] = "narrow",
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 32,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    inner: Annotated[str, typer.Option(help="What compiles the rewritten graph.")] = "inductor",
    cuda_graphs: Annotated[bool, typer.Option(help="Replay decoding steps.")] = False,
    share_layers: Annotated[bool, typer.Option(help="Compile layers that are alike once.")] = True,
    caches: Annotated[Path | None, typer.Option(help="Where to keep the caches.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the numbers here, as json.")] = None,
    only: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print a table, and write a json if asked to."""
    if only:
        print(json.dumps(measure(Settings(**json.loads(only)))))
        return
    settings = Settings(shape, layers, prompt, device, inner, cuda_graphs, share_layers)
    options = {"shape": shape, "layers": layers, "prompt": prompt, "device": device, "inner": inner}
    text = command("compile_time.py", None, out, **options)
    text += " --cuda-graphs" * cuda_graphs + " --no-share-layers" * (not share_layers)
    found: dict[str, Any] = {"command": text} | asdict(settings) | {"versions": versions()}
    with tempfile.TemporaryDirectory() as folder:
        for state in ("cold", "warm"):
            found[state] = in_a_process(settings, caches or Path(folder))
            print(state, found[state]["seconds"], "s", flush=True)
            write_result(out, found)
    Console().print(table(found))


if __name__ == "__main__":
    typer.run(main)
