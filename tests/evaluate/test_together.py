"""Several processes measure every setting once, and what was found is kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from squat_fx.evaluate.together import VISIBLE, Kept, devices, run, seeing, work

Measure = Callable[[int], dict[str, Any]]


def start(log: Path) -> Measure:
    """Squares; the third setting fails."""

    def measure(number: int) -> dict[str, Any]:
        with log.open("a") as file:
            file.write(f"{number}\n")
        if number == 2:
            raise RuntimeError("no room")
        return {"square": number * number}

    return measure


def test_every_setting_is_measured_once(tmp_path: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / "rows"
    found = dict(run(partial(start, log), 6, 2, folder))
    assert found == {n: {"square": n * n} if n != 2 else {"error": "RuntimeError: no room"}
                     for n in range(6)}  # fmt: skip
    assert sorted(log.read_text().split()) == list("012345")


def test_what_a_folder_has_is_not_measured_again(tmp_path: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / "rows"
    kept = Kept(folder)
    kept.put(1, {"square": 1})
    assert not kept.take(1)
    assert kept.take(3)  # as by a process that was ended
    work(partial(start, log), 4, folder)
    assert log.read_text().split() == ["0", "2"]
    kept.give_back()
    work(partial(start, log), 4, folder)
    assert log.read_text().split() == ["0", "2", "3"]
    assert kept.row(3) == {"square": 9}


def test_a_process_without_room_leaves_its_setting_to_others(tmp_path: Path) -> None:
    def full() -> Measure:
        raise torch.OutOfMemoryError

    work(full, 2, tmp_path)
    assert Kept(tmp_path).take(0)


def test_time_that_is_up_ends_the_work(tmp_path: Path) -> None:
    assert dict(run(partial(start, tmp_path / "log"), 3, 1, tmp_path / "rows", seconds=0.01)) == {}


def test_processes_are_spread_over_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "2,5")
    assert devices() == ["2", "5"]
    with seeing("5"):
        assert os.environ[VISIBLE] == "5"
    assert os.environ[VISIBLE] == "2,5"
    monkeypatch.delenv(VISIBLE)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices() == ["0", "1", "2"]
    with seeing("1"):
        assert os.environ[VISIBLE] == "1"
    assert VISIBLE not in os.environ
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert devices() == [""]
