"""Products of one row: exchanged where that is all a step computes, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import squat_fx
from squat_fx.kernels import reference
from squat_fx.passes import multiply_rows
from tests.models import build, prompt

OPTIONS: dict[str, Any] = {"codec": "none", "inner": "eager"}


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(multiply_rows, "DEVICE", "cpu")


def logits(model: Any, batch: int = 1) -> Tensor:
    """Of a prompt and two steps."""
    cache, ids = DynamicCache(config=model.config), prompt(batch, 20)
    found = []
    with torch.no_grad():
        for _ in range(3):
            found.append(model(ids, past_key_values=cache, use_cache=True).logits[:, -1])
            ids = prompt(batch, 1)
    return torch.stack(found)


def step_of(model: Any) -> str:
    """The graph of a step."""
    return squat_fx.report(model).graphs[-1].text


def test_queries_keys_and_values_of_a_row_are_one_launch() -> None:
    expected = logits(build("llama").half())
    model = squat_fx.compile(build("llama").half(), **OPTIONS)
    torch.testing.assert_close(logits(model), expected, rtol=0.02, atol=0.02)
    prefill, step = (graph.text for graph in squat_fx.report(model).graphs)
    assert "products" not in prefill
    assert step.count("squat_fx.products") == 2 * 4 + 1  # 2 layers, and the head
    assert "linear(" not in step.replace("_linear", "")


@pytest.mark.parametrize("leave", ["rows", "dtype", "bias", "device"])
def test_other_products_stay(leave: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if leave == "device":
        monkeypatch.setattr(multiply_rows, "DEVICE", "cuda")
    model = build("qwen2" if leave == "bias" else "llama")
    model = squat_fx.compile(model if leave == "dtype" else model.half(), **OPTIONS)
    logits(model, batch=2 if leave == "rows" else 1)
    # Queries, keys and values of qwen2 have a bias; what follows them has none.
    assert step_of(model).count("squat_fx.products") == (2 * 3 + 1 if leave == "bias" else 0)


@pytest.mark.parametrize("sizes", [(5,), (4, 2), (6, 2, 3)])
def test_the_op_is_the_products_one_after_another(sizes: tuple[int, ...]) -> None:
    row = torch.randn(1, 1, 24, dtype=torch.float16)
    weights = [torch.randn(size, 24, dtype=torch.float16) for size in sizes]
    found = torch.ops.squat_fx.products(row, weights)
    expected = torch.cat([row.double() @ w.double().mT for w in weights], -1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=2e-3)
    assert found.dtype == torch.float16
    assert torch.equal(found, reference.products(row, weights))
