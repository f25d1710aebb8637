"""Runs a comparison with its progress, and shows what was found."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM

from squat_fx.demo import Steps
from squat_fx.evaluate.measure import Evaluation, Row, by_text
from squat_fx.evaluate.settings import Setting
from squat_fx.evaluate.tasks import Task
from squat_fx.evaluate.texts import Windows

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check(device: str, dtype: str) -> None:
    """Refuse what there is not, before anything is measured.

    Raises:
        ValueError: the dtype is unknown, or there is no such device.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA GPU here; use --device cpu")


def run(
    folder: Path,
    device: str,
    dtype: str,
    windows: Windows,
    batch: int,
    settings: Sequence[Setting],
    tasks: Sequence[Task],
    progress: Steps,
    log: Callable[[str], None],
) -> list[Row]:
    """Measure settings one after the other, the full cache first; ``log`` is told of each."""

    def load() -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], local_files_only=True
        )
        return model.eval().to(device)

    evaluation = Evaluation(load, windows, batch, tasks)
    rows = []
    for setting in settings:
        try:
            with progress(setting.name) as advance:
                rows.append(evaluation.run(setting, advance))
        except ValueError as error:
            if not setting.optional:
                raise
            log(f"{setting.name} is left out: {error}")
            continue
        log(f"{setting.name}: KL {rows[-1].kl.mean():.4f}, {rows[-1].seconds:.0f} s")
    return rows


def tables(rows: Sequence[Row], texts: Sequence[str], prompt: int) -> Iterator[Table]:
    """One table for each text, and one for the tasks if there are any."""
    for text, windows in by_text(texts).items():
        table = Table(
            "", "packed", "all bits", "MiB", "ppl", "KL to full", "KL p99", "top-1",
            "attention error", "ms a token", title=f"{text}, prompt {prompt}", box=None,
        )  # fmt: skip
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            scores, bits = row.scores(windows), row.held.packed_bits
            errors = list(row.layers.values())
            table.add_row(
                row.name,
                f"{bits:.3f}" if bits else "–",
                f"{row.held.all_bits:.2f}",
                f"{row.held.stored / 2**20:.2f}",
                f"{scores.ppl:.3f}",
                f"{scores.mean_kl:.4f} ± {scores.kl_error:.4f}",
                f"{scores.kl_p99:.3f}",
                f"{scores.agreement:.3f}",
                f"{sum(errors) / len(errors):.3f}" if errors else "–",
                f"{row.ms_per_token:.1f}",
            )
        yield table
    if tasks := {name: list(numbers) for name, numbers in rows[0].tasks.items()}:
        columns = [f"{name}: {number}" for name, numbers in tasks.items() for number in numbers]
        table = Table("", *columns, title="tasks", box=None)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            values = (x for numbers in row.tasks.values() for x in numbers.values())
            table.add_row(row.name, *(f"{x:.3f}" for x in values))
        yield table


def command(
    model: Path | None,
    texts: Sequence[Path],
    repeated: Mapping[str, Sequence[Any] | None],
    **options: Any,
) -> str:
    """The command line that repeats a run; file names are bare, options that are None left out."""
    parts = ["squat-fx", "eval"]
    if model is not None:
        parts += ["--model", model.name]
    for name, values in ({"text": [t.name for t in texts]} | dict(repeated)).items():
        for value in values or ():
            parts += [f"--{name}", str(value)]
    for name, value in options.items():
        if value is not None:
            shown = value.name if isinstance(value, Path) else str(value)
            parts += [f"--{name.replace('_', '-')}", shown]
    return shlex.join(parts)
