"""Runs a comparison with its progress, and shows what was found."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM

from squat_fx.demo import Steps, silent
from squat_fx.evaluate import together
from squat_fx.evaluate.measure import Evaluation
from squat_fx.evaluate.settings import Setting
from squat_fx.evaluate.tasks import Task
from squat_fx.evaluate.texts import Windows

Row = dict[str, Any]

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


@dataclass(frozen=True)
class Comparison:
    """All that a process must know to measure settings; picklable.

    Attributes:
        folder: of a Hugging Face model.
        device, dtype: where and as what it runs.
        sets: windows; see :class:`Evaluation`.
        batch: windows that go through together.
        settings: what is compared, the untouched model first.
        tasks: what else is done.
    """

    folder: Path
    device: str
    dtype: str
    sets: Sequence[Windows]
    batch: int
    settings: Sequence[Setting]
    tasks: Sequence[Task] = ()

    def start(self, progress: Steps = silent) -> Callable[[int], dict[str, Any]]:
        """What measures settings by number; the untouched model is measured first in any case."""
        evaluation = Evaluation(self._load, self.sets, self.batch, self.tasks)

        @cache
        def measure(number: int) -> dict[str, Any]:
            if number:
                measure(0)
            setting = self.settings[number]
            with progress(setting.name) as advance:
                return evaluation.run(setting, advance).record(self.sets)

        return measure

    def _load(self) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=DTYPES[self.dtype], local_files_only=True
        )
        return model.eval().to(self.device)


def run(comparison: Comparison, progress: Steps, log: Callable[[str], None]) -> list[Row]:
    """Measure settings one after the other; ``log`` is told of each.

    Raises:
        ValueError: a setting that is not optional does not know the model.
    """
    measure, rows = comparison.start(progress), []
    for number, setting in enumerate(comparison.settings):
        try:
            rows.append(measure(number))
        except ValueError as error:
            if not setting.optional:
                raise
            log(f"{setting.name} is left out: {error}")
            continue
        log(in_short(rows[-1]))
    return rows


def run_together(
    comparison: Comparison,
    processes: int,
    folder: Path,
    seconds: float | None,
    log: Callable[[str], None],
) -> list[Row]:
    """The same by several processes; what failed, or was not reached in time, is left out.

    Args:
        comparison: what is measured.
        processes: how many.
        folder: where rows are kept as they come; those that are there are not measured again.
        seconds: how long all may take.
        log: is told of each.
    """
    found: dict[int, Row] = {}
    count = len(comparison.settings)
    for number, row in together.run(comparison.start, count, processes, folder, seconds):
        name = comparison.settings[number].name
        if "error" in row:
            log(f"{name} is left out: {row['error']}")
            continue
        found[number] = row
        log(in_short(row))
    for number in range(count):
        if number not in found:
            log(f"{comparison.settings[number].name} was not measured")
    return [row for _, row in sorted(found.items())]


def in_short(row: Row) -> str:
    """A line about a row."""
    kl = mean(scores["kl"] for scores in row["texts"].values())
    return f"{row['name']}: KL {kl:.4f}, {row['seconds']:.0f} s"


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """One table for each text and length, and one for the tasks if there are any."""
    for label in rows[0]["texts"]:
        table = Table(
            "", "packed", "effective", "all bits", "MiB", "ppl", "KL to full", "KL p99", "top-1",
            "attention error", "ms a token", title=label, box=None,
        )  # fmt: skip
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            scores, bits = row["texts"][label], row["packed_bits"]
            errors = list(row["attention_error"].values())
            table.add_row(
                row["name"],
                f"{bits:.3f}" if bits else "–",
                f"{row['effective_bits']:.2f}",
                f"{row['all_bits']:.2f}",
                f"{row['cache_bytes'] / 2**20:.2f}",
                f"{scores['ppl']:.3f}",
                f"{scores['kl']:.4f} ± {scores['kl_standard_error']:.4f}",
                f"{scores['kl_p99']:.3f}",
                f"{scores['top1']:.3f}",
                f"{mean(errors):.3f}" if errors else "–",
                f"{row['ms_per_token']:.1f}",
            )
        yield table
    if tasks := {name: list(numbers) for name, numbers in rows[0]["tasks"].items()}:
        columns = [f"{name}: {number}" for name, numbers in tasks.items() for number in numbers]
        table = Table("", *columns, title="tasks", box=None)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            values = (x for numbers in row["tasks"].values() for x in numbers.values())
            table.add_row(row["name"], *(f"{x:.3f}" for x in values))
        yield table


def command(
    model: Path | None,
    texts: Sequence[Path],
    repeated: Mapping[str, Sequence[Any] | None],
    **options: Any,
) -> str:
    """The command line that repeats a run; file names are bare, options that are None or
    False left out."""
    parts = ["squat-fx", "eval"]
    if model is not None:
        parts += ["--model", model.name]
    for name, values in ({"text": [t.name for t in texts]} | dict(repeated)).items():
        for value in values or ():
            parts += [f"--{name}", str(value)]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            parts.append(option)
        elif value is not None and value is not False:
            parts += [option, value.name if isinstance(value, Path) else str(value)]
    return shlex.join(parts)
