"""Settings measured by several processes, each result kept as it comes.

Compiling a model for a cache takes a processor several seconds, and the GPU waits; so processes
work side by side. Each measures the untouched model, then takes the next setting that none has
taken, each on one of the GPUs. What they have in common is a folder: ``3.taken`` says that a
process has taken setting 3, ``3.json`` is its row. A folder that is there already is gone on with:
what it has is not measured again.
"""

from __future__ import annotations

import itertools
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
Measure = Callable[[int], Row]

POLL = 0.25  # seconds
VISIBLE = "CUDA_VISIBLE_DEVICES"


class Kept:
    """The rows in a folder, by the number of their setting."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, number: int) -> bool:
        """Whether a setting is for the caller to measure: nobody has, and nobody else does."""
        if self._path(number, "json").exists():
            return False
        try:
            self._path(number, "taken").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def give_back(self, number: int | None = None) -> None:
        """Let others take a setting that was not measured; all, once nobody works on any."""
        for path in self._folder.glob("*.taken" if number is None else f"{number}.taken"):
            path.unlink()

    def put(self, number: int, row: Row) -> None:
        """Keep a row; a reader sees all of it or nothing."""
        unfinished = self._path(number, "unfinished")
        unfinished.write_text(json.dumps(row), encoding="utf-8")
        unfinished.rename(self._path(number, "json"))

    def row(self, number: int) -> Row | None:
        """What was found of a setting, if it was measured."""
        path = self._path(number, "json")
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _path(self, number: int, kind: str) -> Path:
        return self._folder / f"{number}.{kind}"


def work(start: Callable[[], Measure], count: int, folder: Path) -> None:
    """What a process does: settings from the first on, while there are any.

    An error is a row; but a process that finds no room on the GPU leaves it to the others.
    """
    kept = Kept(folder)
    measure: Measure | None = None
    for number in range(count):
        if not kept.take(number):
            continue
        try:
            measure = measure or start()
            kept.put(number, measure(number))
        except torch.OutOfMemoryError:
            kept.give_back(number)
            return
        except Exception as error:
            traceback.print_exc()
            kept.put(number, {"error": f"{type(error).__name__}: {error}"})


def devices() -> list[str]:
    """The names of the GPUs that this process sees, as ``CUDA_VISIBLE_DEVICES`` has them; one that
    means nothing if there are none.
    """
    chosen = os.environ.get(VISIBLE)
    return (
        chosen.split(",") if chosen else [str(i) for i in range(torch.cuda.device_count())] or [""]
    )


@contextmanager
def seeing(device: str) -> Iterator[None]:
    """Processes that are started meanwhile see one GPU."""
    before = os.environ.get(VISIBLE)
    os.environ[VISIBLE] = device
    try:
        yield
    finally:
        if before is None:
            del os.environ[VISIBLE]
        else:
            os.environ[VISIBLE] = before


def run(
    start: Callable[[], Measure],
    count: int,
    processes: int,
    folder: Path,
    seconds: float | None = None,
) -> Iterator[tuple[int, Row]]:
    """The rows of ``count`` settings by their numbers, as they come.

    Args:
        start: readies a process, which then measures settings by number; must be picklable.
        count: of settings.
        processes: how many work side by side.
        folder: where rows are kept.
        seconds: how long they may take; processes are ended then, and what they have is kept.
    """
    kept, missing = Kept(folder), set(range(count))
    kept.give_back()
    context = torch.multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=work, args=(start, count, folder), daemon=True)
        for _ in range(processes)
    ]
    for worker, device in zip(workers, itertools.cycle(devices()), strict=False):
        with seeing(device):
            worker.start()
    deadline = time.monotonic() + seconds if seconds else float("inf")
    try:
        while missing:
            is_last_look = not any(w.is_alive() for w in workers) or time.monotonic() > deadline
            for number in sorted(missing):
                if (row := kept.row(number)) is not None:
                    missing.remove(number)
                    yield number, row
            if is_last_look:
                return
            time.sleep(POLL)
    finally:
        for worker in workers:
            worker.terminate()
