"""What is compiled ahead is what graphs call later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import squat_fx
from squat_fx import backend
from squat_fx.kernels import ahead, reference
from tests.models import build, prompt


def looks(x: Any) -> Any:
    """What a kernel is compiled for: dtypes, shapes, constants; of strides whether they are 1."""
    if isinstance(x, Tensor):
        return x.dtype, tuple(x.shape), x.stride(-1) if x.dim() else 1
    if isinstance(x, (tuple, list)):
        return tuple(map(looks, x))
    if isinstance(x, reference.Arenas):
        return looks((x.packed, x.dense, x.start)), sorted(x.fixed)
    if isinstance(x, reference.Extent):
        return "extent"
    return x if isinstance(x, (int, float, str, type(None))) else repr(x)


@pytest.mark.parametrize(("family", "guard"), [("llama", "warn"), ("gpt2", "off")])
def test_ops_are_called_ahead_with_what_graphs_give_them(
    monkeypatch: pytest.MonkeyPatch, family: str, guard: Any
) -> None:
    torch._dynamo.reset()
    called: dict[str, list[Any]] = {"learn": [], "attend": [], "write_both": []}
    for name, calls in called.items():
        original = getattr(reference, name)

        def note(*args: Any, _run: Any = original, _calls: list[Any] = calls, **kwargs: Any) -> Any:
            _calls.append(looks(args))
            return _run(*args, **kwargs)

        monkeypatch.setattr(reference, name, note)
    found: list[ahead.Prompt] = []
    original_rewrite = backend.rewrite_graph

    def rewrite_graph(rewriting: Any) -> Any:
        spec = original_rewrite(rewriting)
        found.extend(backend._prompts(rewriting, "cpu"))
        return spec

    monkeypatch.setattr(backend, "rewrite_graph", rewrite_graph)
    model = squat_fx.compile(build(family), inner="eager", residual_length=8, guard=guard)
    with torch.no_grad():
        out = model(prompt(2, 50), use_cache=True)
        model(prompt(2, 1), past_key_values=out.past_key_values)
    expected = {name: set(map(repr, calls)) for name, calls in called.items()}
    for calls in called.values():
        calls.clear()
    monkeypatch.setattr(ahead, "_started", set())
    ahead.start(found)()
    assert len(set(found)) == 1
    assert {name: set(map(repr, calls)) for name, calls in called.items()} == expected
