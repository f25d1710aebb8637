"""How results are summed up and written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import stdev


def standard_error(numbers: Sequence[float]) -> float:
    """Of a mean; 0 for one number."""
    return stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else 0.0


def digits(x: float) -> float:
    """``x`` with four digits that mean something."""
    return float(f"{x:.4g}")
