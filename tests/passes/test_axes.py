"""What a chain of views does to batch, heads, tokens and channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from squat_fx.passes.axes import Followed, follow_views
from tests.passes.capture import KV_HEADS, Cached, analysed, examples
from tests.passes.spellings import flattened, interleaved, repeat_kv


def followed(views: Callable[[Any], Any]) -> Followed | str:
    """The axes of ``views(key)``, key ``[2, 2, tokens, 8]``."""

    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        return views(key).abs()

    module = Cached(attend)
    graph = analysed(module, examples(module)).graph
    (end,) = graph.find_nodes(op="call_method", target="abs")
    return follow_views(end.args[0], lambda node: node.target is torch.cat)


BATCH, HEADS, TOKENS, CHANNELS = ("batch",), ("heads",), ("tokens",), ("channels",)
REPEATED = ("heads", "repeat")


@pytest.mark.parametrize(
    ("views", "axes"),
    [
        (lambda x: x.contiguous(), (BATCH, HEADS, TOKENS, CHANNELS)),
        (lambda x: x.transpose(-1, -2), (BATCH, HEADS, CHANNELS, TOKENS)),
        (lambda x: x.mT, (BATCH, HEADS, CHANNELS, TOKENS)),
        (lambda x: x.permute(0, 2, 1, 3), (BATCH, TOKENS, HEADS, CHANNELS)),
        (lambda x: x.permute([1, 0, -1, -2]), (HEADS, BATCH, CHANNELS, TOKENS)),
        (lambda x: x.flatten(0, 1), (("batch", "heads"), TOKENS, CHANNELS)),
        (lambda x: x.flatten(0, 1).unflatten(0, (-1, 2)), (BATCH, HEADS, TOKENS, CHANNELS)),
        (lambda x: x.flatten(2), (BATCH, HEADS, ("tokens", "channels"))),
        (lambda x: x[:, None], (BATCH, (), HEADS, TOKENS, CHANNELS)),
        (lambda x: x[..., None, :].squeeze(-2), (BATCH, HEADS, TOKENS, CHANNELS)),
        (lambda x: x.to(torch.float32), (BATCH, HEADS, TOKENS, CHANNELS)),
        (repeat_kv, (BATCH, REPEATED, TOKENS, CHANNELS)),
        (flattened, (BATCH, REPEATED, TOKENS, CHANNELS)),
        (interleaved, (BATCH, REPEATED, TOKENS, CHANNELS)),
        (lambda x: interleaved(x.mT), (BATCH, REPEATED, CHANNELS, TOKENS)),
        (lambda x: x.repeat(1, 2, 1, 1), (BATCH, ("repeat", "heads"), TOKENS, CHANNELS)),
    ],
)
def test_axes_after(views: Callable[[Any], Any], axes: tuple[tuple[str, ...], ...]) -> None:
    found = followed(views)
    assert isinstance(found, Followed), found
    assert found.axes == axes
    assert found.repeat == (2 if any("repeat" in axis for axis in axes) else 1)


def tiled(x: Any) -> Any:
    """Heads 0, 1, 0, 1: what ``repeat`` does, against 0, 0, 1, 1."""
    return x[:, None].expand(-1, 2, -1, -1, -1).flatten(1, 2)


def test_tile_order_is_told_from_repeat_interleave() -> None:
    found = followed(tiled)
    assert isinstance(found, Followed)
    assert found.axes[1] == ("repeat", "heads")


@pytest.mark.parametrize(
    ("views", "reason"),
    [
        (lambda x: x.repeat(x.size(0), 2, 1, 1), "passes through repeat"),
        (lambda x: x.flip(1), "comes from flip"),
        (lambda x: x * 2, "comes from mul"),
        (lambda x: x.to(torch.float16), "is cast from torch.float32 to torch.float16"),
        (lambda x: x[:, :1], "passes through getitem, which is no repeat"),
        (lambda x: x.reshape(x.size(0), KV_HEADS * 4, x.size(2), 2), "passes through reshape"),
        (lambda x: x.repeat_interleave(x.size(0), dim=1), "passes through repeat_interleave"),
    ],
)
def test_chains_that_are_not_followed(views: Callable[[Any], Any], reason: str) -> None:
    found = followed(views)
    assert isinstance(found, str)
    assert found.startswith(reason)
