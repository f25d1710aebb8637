"""Whole models on a GPU: prefill, step time and peak memory, with full-precision and packed caches.

    squat-fx bench generate --case llama-3.1-8b:64:8192:64 --case llama-2-7b:256:160:338

Unmodified transformers models of published shapes with random weights in fp16, greedy
``generate()``. A case is ``shape:batch:prompt tokens:new tokens``. Every cache runs in a process of
its own:

    eager         DynamicCache, nothing compiled
    compiled      StaticCache, and decoding steps that generate() compiles with
                  mode="reduce-overhead": the best fp16 a user can get
    squat         squat_fx.compile(model, bits=2)
    squat graphs  the same with cuda_graphs=True

Compiling takes most of the time, and memory is plenty for small cases: with ``together``, processes
compile side by side, and measure one after the other once all are ready.

A step is the median time between two tokens, by events on the GPU's own clock, without the first
three; throughput counts the whole generation after the first token. Peaks are the allocator's, of
the prefill and of all. The floor of a step is the time in which the GPU reads the weights once, at
the speed at which it copies memory in the same process.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, StoppingCriteria

import squat_fx

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
CACHES = ("eager", "compiled", "squat", "squat graphs")
WARM_STEPS = 3
FIRST_TOKENS = 8  # of the generation that compiles
GIB = 2.0**30


@dataclass(frozen=True)
class Case:
    """What is generated."""

    shape: str
    batch: int
    prompt: int
    new: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """``shape:batch:prompt:new``.

        Raises:
            ValueError: the text is something else, or no such shape is known.
        """
        try:
            shape, *numbers = text.split(":")
            batch, prompt, new = map(int, numbers)
        except ValueError:
            raise ValueError(
                f"a case is shape:batch:prompt tokens:new tokens, as llama-2-7b:32:160:338; "
                f"got {text!r}"
            ) from None
        if shape not in SHAPES:
            raise ValueError(f"there is no shape {shape!r}; choose one of {', '.join(SHAPES)}")
        if min(batch, prompt) < 1 or new < 2:
            raise ValueError(f"a case needs a batch, a prompt and 2 new tokens; got {text!r}")
        return cls(shape, batch, prompt, new)

    def __str__(self) -> str:
        return f"{self.shape}:{self.batch}:{self.prompt}:{self.new}"


class Ticks(StoppingCriteria):
    """Notes when each token is there; stops nothing."""

    def __init__(self) -> None:
        self.ticks: list[Any] = []
        self.prefill_peak = 0

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        if torch.cuda.is_available():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            if not self.ticks:
                self.prefill_peak = torch.cuda.max_memory_allocated()
            self.ticks.append(event)
        else:
            self.ticks.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def milliseconds(self) -> list[float]:
        """Between one token and the next."""
        pairs = list(zip(self.ticks, self.ticks[1:], strict=False))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in pairs]
        return [1e3 * (b - a) for a, b in pairs]


def make_model(shape: str, longest: int, device: str) -> Any:
    """A model with normal weights, made where it runs."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=longest)
    dtype = torch.float16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def copy_bandwidth() -> float:
    """Bytes a second that the GPU reads and writes in a copy."""
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        y.copy_(x)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * x.nbytes / median(times)


@dataclass(frozen=True)
class Settings:
    """What holds for every case.

    Attributes:
        bits: of the packed caches.
        prefill_chunk: tokens of a prompt that the model takes at once; 0: all.
        together: how many processes compile side by side.
    """

    bits: int = 2
    prefill_chunk: int = 0
    together: int = 1


class Turns:
    """Processes that wait for each other: first until all are ready, then for their turn.

    A file in ``folder`` says that one is ready, or gone; one more is locked by whose turn it is.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        self._count = count

    def ready(self, name: str) -> None:
        """Process ``name`` is ready, or gone."""
        (self._folder / f"{name}.ready").touch()

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Alone, once all are ready."""
        self.ready(name)
        while len(list(self._folder.glob("*.ready"))) < self._count:
            time.sleep(0.1)
        with (self._folder / "turn").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def run_one(
    case: Case, cache: str, settings: Settings, alone: Callable[[], AbstractContextManager]
) -> dict[str, Any]:
    """One case with one cache, in this process; what is measured runs in ``alone()``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(case.shape, case.prompt + case.new, device)
    weights = sum(p.nbytes for p in model.parameters())
    options: dict[str, Any] = {}
    if cache == "compiled":
        options = {"cache_implementation": "static", "compile_config": CompileConfig()}
    elif cache.startswith("squat"):
        squat_fx.compile(model, settings.bits, cuda_graphs=cache == "squat graphs")
    ids = torch.randint(1, model.config.vocab_size, (case.batch, case.prompt), device=device)
    options |= {"do_sample": False, "prefill_chunk_size": settings.prefill_chunk or None}

    def generate(new_tokens: int) -> tuple[Ticks, float]:
        ticks = Ticks()
        options.update(min_new_tokens=new_tokens, max_new_tokens=new_tokens)
        started = time.perf_counter()
        with torch.no_grad():
            model.generate(ids, stopping_criteria=[ticks], **options)
        if device == "cuda":
            torch.cuda.synchronize()
        return ticks, time.perf_counter() - started

    # Compiles; a static cache has the size of what will be generated.
    _, first_seconds = generate(case.new if cache == "compiled" else min(case.new, FIRST_TOKENS))
    with alone():
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        ticks, seconds = generate(case.new)
    steps = ticks.milliseconds()
    decoding = sum(steps) / 1e3
    found: dict[str, Any] = {
        "step_ms": round(median(steps[WARM_STEPS:] or steps), 3),
        "tokens_per_second": round(case.batch * len(steps) / decoding, 1),
        "seconds_to_first_token": round(seconds - decoding, 3),
        "first_generation_seconds": round(first_seconds, 1),
    }
    if device == "cuda":
        found |= {
            "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
            "prefill_peak_gib": round(ticks.prefill_peak / GIB, 2),
            "weight_floor_ms": round(1e3 * weights / copy_bandwidth(), 3),
        }
    if cache.startswith("squat"):
        found["report"] = str(squat_fx.report(model)).splitlines()
    return found


def run_together(
    rows: Sequence[tuple[Case, str]], settings: Settings
) -> Iterator[tuple[Case, str, dict[str, Any]]]:
    """Cases in processes that start with nothing allocated; what went wrong as ``error``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        turns, running = Turns(folder, len(rows)), {}
        for i, (case, cache) in enumerate(rows):
            arguments = [
                str(case),
                cache,
                json.dumps(asdict(settings)),
                name,
                str(len(rows)),
                str(i),
            ]
            with (folder / f"{i}.out").open("w") as out, (folder / f"{i}.err").open("w") as err:
                command = [sys.executable, "-m", __name__, *arguments]
                running[i] = subprocess.Popen(command, stdout=out, stderr=err)
        while running:
            time.sleep(0.05)
            for i in [i for i, process in running.items() if process.poll() is not None]:
                turns.ready(str(i))  # or the others would wait for one that is gone
                status = running.pop(i).returncode
                output, errors = ((folder / f"{i}.{end}").read_text() for end in ("out", "err"))
                yield *rows[i], _result(status, output, errors)


def _result(status: int, output: str, errors: str) -> dict[str, Any]:
    """What a process printed; if it found nothing, its last words."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    lines = [line for line in errors.splitlines() if line.strip()]
    return {"error": lines[-1][:300] if lines else f"exit status {status}"}


def measure(
    cases: Sequence[Case], caches: Sequence[str], settings: Settings, log: Callable[[str], None]
) -> dict[str, Any]:
    """Every case with every cache, as json takes it; ``log`` is told of each."""
    todo = [(case, cache) for case in cases for cache in caches]
    found = {}
    for first in range(0, len(todo), settings.together):
        group = todo[first : first + settings.together]
        for case, cache, result in run_together(group, settings):
            found[case, cache] = asdict(case) | {"cache": cache} | result
            log(f"{case} {cache}: {result}"[:300])
    return asdict(settings) | {"rows": [found[row] for row in dict.fromkeys(todo)]}


def table(result: dict[str, Any]) -> Table:
    """What :func:`measure` found."""
    table = Table("case", "cache", "ms a step", "tokens/s", "first token s", "peak GiB",
                  "in prefill", "× floor", "compile s", box=None)  # fmt: skip
    for column in table.columns[2:]:
        column.justify = "right"
    for row in result["rows"]:
        name = ":".join(str(row[key]) for key in ("shape", "batch", "prompt", "new"))
        if "error" in row:
            table.add_row(name, row["cache"], row["error"])
            continue
        floor = row.get("weight_floor_ms")
        table.add_row(
            name, row["cache"], f"{row['step_ms']:.2f}", f"{row['tokens_per_second']:,.0f}",
            f"{row['seconds_to_first_token']:.2f}", str(row.get("peak_gib", "-")),
            str(row.get("prefill_peak_gib", "-")),
            f"{row['step_ms'] / floor:.2f}" if floor else "-",
            f"{row['first_generation_seconds']:.0f}",
        )  # fmt: skip
    return table


def main(case: str, cache: str, settings: str, folder: str, count: str, name: str) -> None:
    """What a process of :func:`run_together` does."""
    turns = Turns(Path(folder), int(count))
    parsed = Settings(**json.loads(settings))
    print(json.dumps(run_one(Case.parse(case), cache, parsed, lambda: turns.turn(name))))


if __name__ == "__main__":
    main(*sys.argv[1:])
