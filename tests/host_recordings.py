"""CUDA graphs replayed on the host: what was recorded runs again, on inputs that stay in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from squat_fx import replay


class HostRecording:
    """A recording that calls what was recorded, on copies of what it is given."""

    def __init__(
        self, call: Callable[[dict[int, Tensor]], list[Any]], copied: Mapping[int, Tensor], _: Any
    ) -> None:
        self._call = call
        self._inputs = {i: x.clone() for i, x in copied.items()}

    def __call__(self, copied: Mapping[int, Tensor]) -> list[Any]:
        """See :class:`squat_fx.replay.Recording`."""
        for i, x in copied.items():
            self._inputs[i].copy_(x)
        with torch.no_grad():
            outputs = self._call(self._inputs)
        return [x.clone() if isinstance(x, Tensor) else x for x in outputs]


def record_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``cuda_graphs=True`` work without a GPU."""
    monkeypatch.setattr(replay, "Recording", HostRecording)
    monkeypatch.setattr(replay, "DEVICE", "cpu")
    monkeypatch.setattr(replay, "_on_gpu", dict)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "stream")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
