"""The tables of docs/codecs.md, in markdown, from what ``squat-fx eval`` and ``study.py`` wrote.

python benchmarks/tables.py benchmarks/results/eval_smollm2.json
python benchmarks/tables.py benchmarks/results/codecs_gemma.json --label 1024 --plot gemma.png
python benchmarks/tables.py --study benchmarks/results/study_smollm2.json
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from study import BASE, against

from squat_fx.bench.plot import plot_eval

Row = dict[str, Any]


def eval_tables(rows: list[Row], labels: list[str]) -> list[str]:
    """Codecs by their KL on each text, and what tasks found."""
    shown = [_short(label) for label in labels]
    lines = _head(["cache", "packed", "effective", *shown, "p99", "top-1", "ppl", "attention"])
    for row in rows:
        if not row["effective_bits"]:
            continue  # a variant that nobody stores
        scores = [row["texts"][label] for label in labels]
        errors = list(row["attention_error"].values())
        kls = [_with_error(s["kl"], s["kl_standard_error"]) for s in scores]
        lines.append(
            _line(
                _name(row),
                f"{row['packed_bits']:.2f}" if row["packed_bits"] else "–",
                f"{scores[0].get('effective_bits', row['effective_bits']):.2f}",
                *kls,
                f"{mean(s['kl_p99'] for s in scores):.2g}",
                f"{mean(s['top1'] for s in scores):.3f}",
                f"{scores[0]['ppl']:.2f}",
                f"{mean(errors):.3f}" if errors else "–",
            )
        )
    tasks = {name: list(numbers) for name, numbers in rows[0].get("tasks", {}).items()}
    if tasks:
        names = [f"{task}: {n.replace('_', ' ')}" for task, found in tasks.items() for n in found]
        lines += ["", *_head(["cache", *names])]
        for row in rows:
            numbers = [x for task in tasks for x in row["tasks"].get(task, {}).values()]
            lines.append(_line(row["name"], *(f"{x:.3f}" for x in numbers)))
    return lines


def study_table(rows: list[Row], labels: list[str]) -> list[str]:
    """Variants by the ratio of their KL to that of squat, and standard errors."""
    base = next(row for row in rows if row["name"] == BASE)
    lines = _head(["variant", *map(_short, labels)])
    for row in rows:
        cells = []
        for label in labels:
            ratio, errors = against(row, base, label)
            shown = f"{row['texts'][label]['kl']:.4f}"
            cells.append(shown if row is base else f"{shown}: {ratio:.2f} ({errors:+.1f})")
        lines.append(_line(row["name"], *cells))
    return lines


def turned_table(rows: list[Row], labels: list[str]) -> list[str]:
    """A row for each text and length of prompt, a column for each cache: KLs."""
    rows = [row for row in rows if row["packed_bits"]]
    lines = _head(["", *(_name(row) for row in rows)])
    for label in labels:
        scores = [row["texts"].get(label) for row in rows]
        kls = [_with_error(s["kl"], s["kl_standard_error"]) if s else "–" for s in scores]
        lines.append(_line(_short(label), *kls))
    return lines


def same_bits_table(rows: list[Row], labels: list[str]) -> list[str]:
    """The KL that squat has at the effective bits of kivi, over kivi's; between two widths the
    logarithm is interpolated.
    """
    own = [r for r in rows if r["name"].startswith(f"{BASE}, ") and "calibrated" not in r["name"]]
    lines = _head(["cache", *map(_short, labels)])
    for row in (r for r in rows if r["name"].startswith("kivi") and "/" not in r["name"]):
        cells = []
        for label in labels:
            bits, kl = (row["texts"][label][name] for name in ("effective_bits", "kl"))
            scores = [other["texts"][label] for other in own]
            points = sorted((s["effective_bits"], math.log(s["kl"])) for s in scores)
            found = "beyond"
            for (a, x), (b, y) in itertools.pairwise(points):
                if a <= bits <= b:
                    found = f"{math.exp(x + (y - x) * (bits - a) / (b - a)) / kl:.2f}"
            cells.append(f"{bits:.2f}: {found}")
        lines.append(_line(_name(row), *cells))
    return lines


def _name(row: Row) -> str:
    return row["name"].replace('"', "").replace("group_size: ", "G=")


def _short(label: str) -> str:
    """A label without what says nothing."""
    for word in ("second half of ", "book_", "essays_", "_test_raw", "_test", ".txt", ".jsonl"):
        label = label.replace(word, "")
    return label.replace("_", " ")


def _with_error(number: float, error: float) -> str:
    """Both with the digits that the error leaves."""
    places = 4 if number >= 0.01 else 5
    return f"{number:.{places}f} ± {error:.{places}f}"


def _head(names: list[str]) -> list[str]:
    return [_line(*names), "|" + "---|" * len(names)]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main(
    results: Annotated[list[Path], typer.Argument(help="json; rows of several are joined.")],
    study: Annotated[bool, typer.Option(help="Variants against squat.")] = False,
    turned: Annotated[bool, typer.Option(help="Texts in rows, caches in columns.")] = False,
    same_bits: Annotated[bool, typer.Option(help="squat at the bits of kivi.")] = False,
    label: Annotated[
        list[str] | None, typer.Option(help="Part of the texts and prompts to show; repeat.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to draw a PNG of them.")] = None,
) -> None:
    """Print markdown."""
    rows: dict[str, Row] = {}
    for path in results:
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            rows.setdefault(row["name"], row)
    found = list(rows.values())
    labels = [x for x in found[0]["texts"] if not label or any(part in x for part in label)]
    if plot is not None:
        shown = [row | {"texts": {x: row["texts"][x] for x in labels}} for row in found]
        plot_eval(shown, plot)
    table = study_table if study else turned_table if turned else eval_tables
    table = same_bits_table if same_bits else table
    typer.echo("\n".join(table(found, labels)))


if __name__ == "__main__":
    typer.run(main)
