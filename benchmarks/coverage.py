"""Which architectures of transformers get a packed cache: the full sweep.

    python benchmarks/coverage.py --jobs 4

Writes ``benchmarks/results/supported_models.json`` and ``docs/supported-models.md``; about 25
minutes of one core. ``--only llama --only gemma2`` prints the rows of these and writes nothing.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Annotated

import typer

from squat_fx import coverage
from squat_fx.bench.record import versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "supported_models.json"
DOCUMENT = ROOT / "docs" / "supported-models.md"


def main(
    only: Annotated[list[str] | None, typer.Option(help="An architecture.")] = None,
    attention: Annotated[list[str] | None, typer.Option(help="sdpa or eager.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes at a time.")] = 1,
    out: Annotated[Path, typer.Option(help="The json.")] = RESULTS,
) -> None:
    """Measure and write down."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is first imported
    warnings.filterwarnings("ignore")
    rows: list[coverage.Row] = []
    for row in coverage.sweep(only, attention or coverage.ATTENTIONS, jobs):
        rows.append(row)
        print(coverage.line(row) + row.not_run, flush=True)
        if not only:  # a sweep that is cut short leaves what it has
            write(rows, out)
    rows.sort(key=lambda row: (row.architecture, coverage.ATTENTIONS.index(row.attention)))
    print("\n".join(coverage.summary(rows)))
    if not only:
        write(rows, out)
        document = coverage.document(*coverage.from_json(json.loads(out.read_text())))
        (DOCUMENT if out == RESULTS else out.with_suffix(".md")).write_text(document)


def write(rows: list[coverage.Row], out: Path) -> None:
    """The json of the rows."""
    kept = coverage.to_json(rows, versions(("torch", "transformers")))
    out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
