"""Which cases of a law run everywhere, and which only under ``pytest -m full``."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def full(*cases: Any) -> list[Any]:
    """Cases that run under ``pytest -m full`` alone; a tuple is a case of several parameters."""
    return [
        pytest.param(*(case if type(case) is tuple else (case,)), marks=pytest.mark.full)
        for case in cases
    ]


def every(step: int, cases: Iterable[Any]) -> list[Any]:
    """Each ``step``-th case, the first among them; the others are :func:`full`."""
    return [case if i % step == 0 else full(case)[0] for i, case in enumerate(cases)]


def diagonal(*axes: Sequence[Any]) -> list[Any]:
    """The product of ``axes``, of which as few run everywhere as have every value in them: the
    ``n``-th of each axis together, shorter ones over again. The others are :func:`full`.
    """
    longest = max(map(len, axes))
    chosen = {tuple(n % len(axis) for axis in axes) for n in range(longest)}
    return [
        case if at in chosen else full(case)[0]
        for at, case in zip(
            itertools.product(*(range(len(axis)) for axis in axes)),
            itertools.product(*axes),
            strict=True,
        )
    ]
