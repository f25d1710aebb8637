"""Einsums of an attention become matrix products; others stay what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from squat_fx.passes.format import format_graph
from squat_fx.passes.spell_out_einsums import SpellOutEinsums
from tests.conftest import randn
from tests.passes.capture import analysed


class Weighing(nn.Module):
    """A softmax over what an einsum gives."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, a: Any, b: Any) -> Any:
        return torch.einsum(self.equation, a, b).softmax(-1)


@pytest.mark.parametrize(
    "equation", ["bthd,bshd->bhts", "bhtd,bhsd->bhts", "bthd,bshd->tbhs", "b h t d, b h d s->bhts"]
)
def test_product_is_the_einsum(equation: str) -> None:
    letters = equation.replace(" ", "").split("->")[0].split(",")
    sizes = {"b": 2, "h": 3, "t": 5, "s": 7, "d": 4}
    inputs = tuple(randn(*(sizes[x] for x in operand), seed=i) for i, operand in enumerate(letters))
    module = Weighing(equation)
    rewriting = analysed(module, inputs, SpellOutEinsums)
    assert "einsum" not in format_graph(rewriting.graph)
    rewriting.module.recompile()
    torch.testing.assert_close(rewriting.module(*inputs), module(*inputs))
    spell_out = SpellOutEinsums()
    spell_out(rewriting)
    assert spell_out.matched_count == 0


def test_what_it_becomes() -> None:
    inputs = randn(2, 5, 3, 4), randn(2, 7, 3, 4)
    rewriting = analysed(Weighing("bthd,bshd->bhts"), inputs, SpellOutEinsums)
    assert_expected_inline(
        format_graph(rewriting.graph),
        """\
inputs: a, b
permute = permute(a, [0, 2, 1, 3])
permute_1 = permute(b, [0, 2, 3, 1])
matmul = matmul(permute, permute_1)
softmax = softmax(matmul, -1)
return softmax""",
    )


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("...td,...sd->...ts", ((2, 5, 4), (2, 7, 4))),
        ("btd,bsd->bt", ((2, 5, 4), (2, 7, 4))),  # keys are summed as well
        ("btde,bsde->bts", ((2, 5, 4, 3), (2, 7, 4, 3))),  # two letters are summed
        ("btd,btd->btd", ((2, 5, 4), (2, 5, 4))),
        ("bbd,bsd->bs", ((2, 2, 4), (2, 7, 4))),
        ("btd,bsd->bts", ((1, 5, 4), (2, 7, 4))),  # the batch of one is broadcast
    ],
)
def test_einsum_that_is_no_batched_product(equation: str, shapes: Any) -> None:
    inputs = tuple(randn(*shape, seed=i) for i, shape in enumerate(shapes))
    rewriting = analysed(Weighing(equation), inputs, SpellOutEinsums)
    assert "einsum" in format_graph(rewriting.graph)


def test_einsum_beside_no_softmax() -> None:
    class Projecting(nn.Module):
        def forward(self, a: Any, b: Any) -> Any:
            return torch.einsum("btd,bsd->bts", a, b)

    rewriting = analysed(Projecting(), (randn(2, 5, 4), randn(2, 7, 4)), SpellOutEinsums)
    assert "einsum" in format_graph(rewriting.graph)
