"""The text of a graph: one line per node, stable, readable."""

from __future__ import annotations

from typing import Any

import torch
from expecttest import assert_expected_inline
from torch import fx, nn

from squat_fx.passes.format import format_graph


class Everything(nn.Module):
    """One of each kind of node and argument."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Any, past_dense: Any) -> Any:
        y = self.linear(x)[..., None, 1:, :-1]
        y = torch.ops.aten.mul.Tensor(y * self.weight, 1 / 3).to(torch.float16)
        y.add_(2.0)
        return {"out": torch.sum(y, dim=(0, -1), keepdim=True), "none": None, "past": past_dense}


def test_every_kind_of_node() -> None:
    text = format_graph(fx.symbolic_trace(Everything()).graph)
    assert_expected_inline(
        text,
        """\
inputs: x, past_dense
linear = self.linear(x)
getitem = linear[..., None, 1:, :-1]
mul = mul(getitem, self.weight)
mul_tensor = aten.mul.Tensor(mul, 0.333333)
to = to(mul_tensor, float16)
add_(to, 2.0)
sum_1 = sum(to, dim=(0, -1), keepdim=True)
return sum_1, None, past_dense""",
    )
