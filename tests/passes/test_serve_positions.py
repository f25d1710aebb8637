"""A decode step that counts its own positions leaves no size of the cache in its graph."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

import squat_fx
from squat_fx import Report
from tests.passes.capture import LOSSLESS, Cached, dense, past, tokens

TABLE = torch.arange(64.0)[:, None].expand(-1, 16)


class Counting(Cached):
    """Adds an embedding of ``positions(past_length, query_length)`` to what comes in."""

    def __init__(self, positions: Callable[[int, int], Tensor]) -> None:
        super().__init__()
        self.positions = positions

    def forward(self, x: Tensor, past_key: Tensor, past_value: Tensor, mask: Any = None) -> Any:
        embedded = TABLE[self.positions(past_key.shape[2], x.shape[1])]
        return super().forward(x + embedded, past_key, past_value)


def decode(positions: Callable[[int, int], Tensor], steps: int = 6) -> tuple[Report, list[Tensor]]:
    """The report and outputs of a packed loop, checked against the dense one."""
    torch._dynamo.reset()
    module = Counting(positions)
    step = squat_fx.compile(
        module.forward, codec=LOSSLESS.codec, residual_length=4, sink_length=2, inner="eager"
    )
    expected, actual = past(), past()
    for seed in range(steps):
        with torch.no_grad():
            out, *expected = module(tokens(1, seed), *expected)
            served, *actual = step(tokens(1, seed), *actual)
        torch.testing.assert_close(served, out)
    torch.testing.assert_close([dense(x) for x in actual], list(expected))
    return squat_fx.report(step), actual


def lines_of_positions(report: Report) -> str:
    """The lines of the decode graph that make the positions."""
    lines = [line.split(";")[0].strip() for line in report.graphs[-1].text.splitlines()]
    return "\n".join(x for x in lines if re.search(r"torch\.(arange|select|add)\(", x))


@pytest.mark.parametrize(
    "positions",
    [
        lambda past_length, length: torch.arange(length) + past_length,
        lambda past_length, length: past_length + torch.arange(length),
        lambda past_length, length: torch.arange(past_length, past_length + length),
        lambda past_length, length: torch.arange(start=past_length, end=past_length + length),
        lambda past_length, length: torch.full((length,), 0).add(past_length),
        lambda past_length, length: 40 - (torch.zeros(length, dtype=torch.long) + past_length),
    ],
)
def test_positions_are_served(positions: Callable[[int, int], Tensor]) -> None:
    report, _ = decode(positions)
    last = report.graphs[-1]
    assert last.kind == "decode", str(report)
    assert last.static, str(report)
    assert last.notes == ()
    assert "torch.select(positions" in last.text


def test_text_of_arange_plus_length() -> None:
    report, _ = decode(lambda past_length, length: torch.arange(length) + past_length, steps=3)
    assert_expected_inline(
        lines_of_positions(report),
        """\
arange = torch.arange(1)
select = torch.select(positions, 0, 0)
select_1 = torch.select(select, 0, 0)
add_2 = torch.add(arange, select_1)""",
    )


def test_text_of_arange_from_length() -> None:
    def positions(past_length: int, length: int) -> Tensor:
        return torch.arange(past_length, past_length + length)

    report, _ = decode(positions, steps=3)
    assert_expected_inline(
        lines_of_positions(report),
        """\
select = torch.select(positions, 0, 0)
arange_1 = torch.arange(1)
select_1 = torch.select(select, 0, 0)
add_2 = torch.add(arange_1, select_1)""",
    )


@pytest.mark.parametrize(
    "positions",
    [
        lambda past_length, length: torch.add(torch.arange(length), past_length, alpha=2),
        lambda past_length, length: torch.arange(length) * past_length,
        lambda past_length, length: (torch.arange(length) + past_length * 1.0).long(),
        lambda past_length, length: torch.arange(past_length)[-length:],
        lambda past_length, length: torch.arange(past_length, past_length + 2 * length, 2),
    ],
)
def test_other_arithmetic_is_left_alone_and_the_report_says_why(
    positions: Callable[[int, int], Tensor],
) -> None:
    report, _ = decode(positions)
    last = report.graphs[-1]
    assert not last.static
    assert "sizes of its inputs change: a size read by" in last.notes[0]
