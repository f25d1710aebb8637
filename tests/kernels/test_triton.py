"""The Triton kernels under Triton's interpreter.

In processes of their own: Triton reads the switch when it is imported, and other tests import it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.choose import full

ROOT = Path(__file__).parents[2]
INTERPRETED = Path(__file__).parent / "interpreted"


def test_every_part_is_run() -> None:
    files = {path.stem for path in INTERPRETED.glob("*.py")}
    assert files - {"__init__", "cases"} == {"attending", "keeping", "learning", "writing"}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("chosen", ["not full", *full("full")])
@pytest.mark.parametrize("part", ["attending", "keeping", "learning", "writing"])
def test_the_laws_hold_in_the_interpreter(part: str, chosen: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(
        [*command, "-m", chosen, INTERPRETED / f"{part}.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
