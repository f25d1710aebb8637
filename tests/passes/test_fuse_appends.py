"""New keys and new values of a layer go into the cache by one op, if they are stored alike."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, fx, nn

import squat_fx
from squat_fx import Config
from squat_fx.codecs import Codec, Kivi, Kvarn, Squat, Think
from tests.conftest import stored_format
from tests.passes.capture import Cached, assert_same_over_steps, examples, past, rewrite, tokens


def arena_names() -> tuple[str, ...]:
    """Of the default codec."""
    return stored_format(Squat()).arena_names


def appends(config: Config) -> list[str]:
    """The appends of a rewritten decode step."""
    module = Cached()
    rewritten, _ = squat_fx.rewrite(fx.symbolic_trace(module), examples(module), config)
    targets = (str(node.target) for node in rewritten.graph.nodes)
    return [target for target in targets if "append" in target]


@pytest.mark.parametrize(
    ("codec", "layout"),
    [
        (Squat(), "planes_token"),
        (Kivi(), "planes_channel"),
        (Kvarn(), "planes_dual"),
        (Think(), "planes_pruned_and_planes_channel"),
    ],
)
def test_a_layer_takes_one_append(codec: Codec, layout: str) -> None:
    assert appends(Config(codec=codec)) == [f"squat_fx.append_both_.{layout}"]


def test_widths_may_differ() -> None:
    assert appends(Config(key_bits=3, value_bits=2)) == ["squat_fx.append_both_.planes_token"]


class TwoLayers(nn.Module):
    """Two attentions of the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Cached(), Cached()

    def forward(self, x: Any, k0: Any, v0: Any, k1: Any, v1: Any) -> tuple[Tensor, ...]:
        first, k0, v0 = self.first(x, k0, v0)
        second, k1, v1 = self.second(x, k1, v1)
        return first + second, k0, v0, k1, v1


def test_keys_go_with_the_values_of_their_own_layer() -> None:
    inputs = (tokens(1), *past(), *past())
    rewritten, report = squat_fx.rewrite(fx.symbolic_trace(TwoLayers()), inputs, Config())
    assert report.rewritten == 2
    fused = [node for node in rewritten.graph.nodes if "append_both_" in str(node.target)]
    carriers = [[a.name[:2] for a in node.args if isinstance(a, fx.Node)] for node in fused]
    count = len(arena_names())
    assert sorted(names[0] + names[count] for names in carriers) == ["k0v0", "k1v1"]


def test_what_is_appended_at_once_is_read_at_the_next_step() -> None:
    module = Cached()
    rewritten, report = rewrite(module, *examples(module))
    assert report.rewritten == 1
    assert_same_over_steps(module, rewritten)
