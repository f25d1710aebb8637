"""What a small cache costs in quality: perplexity and KL, teacher-forced through the real cache.

    python benchmarks/quality.py --text wikitext2_test_raw.txt --out benchmarks/results/quality.json

Each window of the text is a prompt, fed in one call, and then tokens, fed one by one with
``model(token, past_key_values=cache)``; the prediction after each such token is scored against the
token that follows in the text. Every row sees the same windows:

    full                the untouched model with a DynamicCache; the others are compared with it
    squat_fx            squat_fx.compile(model), its packed cache
    simulation          the same rounding in one pass of plain torch (simulation.py); no cache
    HF quanto ...       transformers' QuantizedCache; needs `pip install optimum-quanto`

``KL`` is KL(full || row) in nats, averaged over the tokens of a window; its standard error is over
windows. Bytes are measured at the end of a window, all layers, everything counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
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
    stored_bytes,
    text_record,
    text_tokens,
    versions,
    write_result,
)
from rich.console import Console
from rich.table import Table
from simulation import NAME, KiviSimulation
from torch import Tensor
from transformers import QuantizedCache

import squat_fx
from squat_fx.cli import late_progress
from squat_fx.demo import Advance

GROUP_SIZE, RESIDUAL_LENGTH, SINK_LENGTH = 32, 32, 4


@dataclass(frozen=True)
class Setup:
    """What is the same for every row."""

    folder: Path
    windows: tuple[Tensor, ...]  # int64 [1, prompt + tokens + 1] each
    prompt: int
    tokens: int
    bits: int
    inner: str


@dataclass
class Row:
    """The results of one way to keep the cache; lists have an entry per window."""

    name: str
    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    cache_bytes: int | None = None
    dense_bytes: int | None = None
    seconds: float = 0.0
    note: str = ""

    @property
    def ppl(self) -> float:
        return math.exp(mean(self.nll))

    def record(self) -> dict[str, Any]:
        """This row for the json."""
        ratio = self.dense_bytes / self.cache_bytes if self.cache_bytes else None
        return {
            "name": self.name,
            "ppl": round(self.ppl, 3),
            "kl": round(mean(self.kl), 6),
            "kl_standard_error": round(standard_error(self.kl), 6),
            "top1": round(mean(self.top1), 4),
            "cache_bytes": self.cache_bytes,
            "ratio": ratio and round(ratio, 2),
            "seconds": round(self.seconds, 1),
            "kl_by_window": [round(kl, 5) for kl in self.kl],
            **({"note": self.note} if self.note else {}),
        }


Run = Iterator[Tensor]  # logits [vocabulary], one per scored token
Method = Callable[[Setup, Row], Callable[[Tensor], Run]]


def through_cache(setup: Setup, model: Any, make_cache: Callable[[], Any], row: Row) -> Any:
    """Windows through a cache of the model, one token a call."""

    def run(window: Tensor) -> Run:
        cache = prefill(model, window[:, : setup.prompt], make_cache())
        yield from decode(model, window[:, setup.prompt : -1], cache)
        measured = stored_bytes(cache)
        row.cache_bytes, row.dense_bytes = measured.stored, measured.dense

    return run


def full(setup: Setup, row: Row) -> Callable[[Tensor], Run]:
    model = load_model(setup.folder)
    return through_cache(setup, model, lambda: new_cache(model), row)


def packed(setup: Setup, row: Row) -> Callable[[Tensor], Run]:
    model = squat_fx.compile(
        load_model(setup.folder),
        bits=setup.bits,
        codec="kivi",
        residual_length=RESIDUAL_LENGTH,
        sink_length=SINK_LENGTH,
        inner=setup.inner,  # pyright: ignore[reportArgumentType]
        strict=True,
    )
    inner = through_cache(setup, model, lambda: new_cache(model), row)

    def run(window: Tensor) -> Run:
        yield from inner(window)
        report = squat_fx.report(model)
        graphs = [graph.kind for graph in report.graphs]
        row.note = f"graphs: {', '.join(graphs)} ({setup.inner}); eager calls: {report.eager_calls}"

    return run


def simulation(setup: Setup, row: Row) -> Callable[[Tensor], Run]:
    rounding = KiviSimulation(setup.prompt, setup.bits, GROUP_SIZE, RESIDUAL_LENGTH, SINK_LENGTH)
    rounding.register()
    model = load_model(setup.folder, attention=NAME)

    def run(window: Tensor) -> Run:
        result = model(window[:, :-1], use_cache=False, logits_to_keep=setup.tokens)
        yield from result.logits[0]

    return run


def quanto(**options: Any) -> Method:
    def method(setup: Setup, row: Row) -> Callable[[Tensor], Run]:
        model = load_model(setup.folder)

        def make_cache() -> QuantizedCache:
            return QuantizedCache("quanto", model.config, nbits=setup.bits, **options)

        return through_cache(setup, model, make_cache, row)

    return method


def methods(bits: int) -> dict[str, Method]:
    """The rows, by name; ``full`` is the first because the others are compared with it."""
    found: dict[str, Method] = {
        "full": full,
        f"squat_fx kivi G={GROUP_SIZE} {bits} bits": packed,
        "simulation": simulation,
    }
    if bits not in (2, 4) or versions()["optimum-quanto"] == "not installed":
        typer.echo("no HF quanto rows: they need optimum-quanto, and 2 or 4 bits", err=True)
        return found
    per_channel = {"axis_key": -1, "q_group_size": GROUP_SIZE, "residual_length": RESIDUAL_LENGTH}
    return found | {
        f"HF quanto {bits}-bit default": quanto(),
        f"HF quanto {bits}-bit per-channel keys, g={GROUP_SIZE}": quanto(**per_channel),
    }


def measure(
    name: str, method: Method, setup: Setup, reference: list[Tensor], advance: Advance
) -> Row:
    """Run one row over all windows; fills ``reference`` with log-probabilities if it is empty."""
    row = Row(name)
    run = method(setup, row)
    is_reference = not reference
    total = len(setup.windows) * setup.tokens
    for index, window in enumerate(setup.windows):
        started = time.perf_counter()
        logits = []
        for step in run(window):
            logits.append(step)
            advance((index * setup.tokens + len(logits)) / total)
        row.seconds += time.perf_counter() - started
        log_probs = torch.stack(logits).log_softmax(-1)
        if is_reference:
            reference.append(log_probs)
        truth, log_probs = reference[index].double(), log_probs.double()
        following = window[0, setup.prompt + 1 :, None]
        row.nll.append(-log_probs.gather(1, following).mean().item())
        row.kl.append((truth.exp() * (truth - log_probs)).sum(-1).mean().item())
        row.top1.append((truth.argmax(-1) == log_probs.argmax(-1)).double().mean().item())
    return row


def spread_windows(ids: Tensor, count: int, length: int) -> tuple[list[int], tuple[Tensor, ...]]:
    """``count`` windows whose offsets are multiples of the same stride, from the first token on."""
    stride = len(ids) // count
    if stride < length:
        raise typer.BadParameter(
            f"{count} windows of {length} tokens need {count * length} tokens, "
            f"the text has {len(ids)}; ask for fewer"
        )
    offsets = [index * stride for index in range(count)]
    return offsets, tuple(ids[offset : offset + length][None] for offset in offsets)


def standard_error(numbers: list[float]) -> float:
    return stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else 0.0


def agreement(rows: list[Row]) -> dict[str, Any] | None:
    """How far the packed cache is from the simulation, window by window."""
    by_kind = {row.name.split(" ")[0]: row for row in rows}
    if not {"squat_fx", "simulation"} <= by_kind.keys():
        return None
    real, simulated = by_kind["squat_fx"], by_kind["simulation"]
    differences = [a - b for a, b in zip(real.kl, simulated.kl, strict=True)]
    return {
        "kl_difference": round(mean(differences), 6),
        "kl_difference_standard_error": round(standard_error(differences), 6),
        "largest_window_difference": round(max(map(abs, differences)), 6),
        "ppl_difference": round(real.ppl - simulated.ppl, 4),
    }


def print_rows(rows: list[Row], console: Console) -> None:
    table = Table("", "ppl", "KL to full", "top-1", "cache", "ratio", "seconds", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        size = ratio = "–"
        if row.cache_bytes and row.dense_bytes:
            size, ratio = (
                f"{row.cache_bytes / 1e6:.2f} MB",
                f"{row.dense_bytes / row.cache_bytes:.2f}",
            )
        kl = f"{mean(row.kl):.4f} ± {standard_error(row.kl):.4f}"
        table.add_row(
            row.name,
            f"{row.ppl:.3f}",
            kl,
            f"{mean(row.top1):.3f}",
            size,
            ratio,
            f"{row.seconds:.0f}",
        )
    console.print(table)
    if found := agreement(rows):
        console.print(
            f"squat_fx minus simulation: KL {found['kl_difference']:+.5f} ± "
            f"{found['kl_difference_standard_error']:.5f}, in any window at most "
            f"{found['largest_window_difference']:.5f}; ppl {found['ppl_difference']:+.4f}",
            highlight=False,
        )


def main(
    text: Annotated[Path, typer.Option(help="UTF-8 text.", exists=True, dir_okay=False)],
    model: Annotated[
        Path | None, typer.Option(help="Hugging Face model folder; SmolLM2-135M when left out.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows, spread over the text.", min=1)] = 8,
    prompt: Annotated[int, typer.Option(help="Tokens fed in one call.", min=1)] = 1024,
    tokens: Annotated[int, typer.Option(help="Tokens then fed one by one.", min=1)] = 256,
    bits: Annotated[int, typer.Option(help="Bits per cached number.", min=1, max=8)] = 2,
    inner: Annotated[str, typer.Option(help="What compiles the rewritten graph.")] = "inductor",
    only: Annotated[
        list[str] | None, typer.Option(help="Start of a row's name besides full; repeat.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the json.")] = None,
) -> None:
    """Perplexity, KL and bytes of the packed cache, its simulation and its peers."""
    if threads:
        torch.set_num_threads(threads)
    folder = model_folder(model)
    ids = text_tokens(folder, text)
    offsets, cut = spread_windows(ids, windows, prompt + tokens + 1)
    setup = Setup(folder, cut, prompt, tokens, bits, inner)
    reference: list[Tensor] = []
    rows: list[Row] = []
    for name, method in methods(bits).items():
        if only and name != "full" and not name.startswith(tuple(only)):
            continue
        with torch.no_grad(), late_progress(name) as advance:
            row = measure(name, method, setup, reference, advance)
        rows.append(row)
        typer.echo(f"{name}: KL {mean(row.kl):.4f}, {row.seconds:.0f} s", err=True)
    print_rows(rows, Console())
    options = {"windows": windows, "prompt": prompt, "tokens": tokens, "bits": bits, "inner": inner}
    options["threads"] = torch.get_num_threads()
    result = {
        "command": command("quality.py", model, out, text=text, **options),
        "versions": versions(),
        "model": folder.name,
        "dtype": "float32",
        "device": f"cpu, {torch.get_num_threads()} threads",
        "text": text_record(text) | {"tokens": len(ids)},
        "window_offsets": offsets,
        "rows": [row.record() for row in rows],
        "squat_fx_minus_simulation": agreement(rows),
    }
    write_result(out, result)


if __name__ == "__main__":
    typer.run(main)
