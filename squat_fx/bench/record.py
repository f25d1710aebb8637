"""How a measurement is written down: small json with what the numbers depend on."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import squat_fx

PACKAGES = ("torch", "triton", "transformers", "optimum-quanto")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """What numbers and bugs depend on."""
    found = {"squat_fx": squat_fx.__version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def device_name() -> str:
    """What the numbers were measured on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def write_json(out: Path, result: dict[str, Any]) -> None:
    """Write ``result``; the folder is made if it is not there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
