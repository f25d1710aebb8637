"""What turned keys is recorded where a codec asks for it, and where it cannot be, nothing moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import squat_fx
from squat_fx import Config, QuantizedKV
from squat_fx.codecs import Codec, Kivi, Svdq
from squat_fx.layouts.latent_rope import is_interleaved, rotary_dim
from squat_fx.passes import Canonicalize, FindCacheEdges, RecordRotations, Rewriting
from squat_fx.standalone import _carriers, _propagate_shapes
from tests.codecs.round_trip import relative_error
from tests.passes.capture import HEAD_DIM, Cached, past, sdpa, tokens

NOT_PRODUCTS = (
    "key: the angles of its rotary embedding are not in the graph as positions x frequencies"
)
NO_ROTARY = "key: no rotary embedding before the cache"


class Rotated(Cached):
    """One attention with a rotary embedding whose frequencies are a buffer."""

    def __init__(self, sign: int = 1, interleaved: bool = False) -> None:
        super().__init__(sdpa)
        self.sign, self.interleaved = sign, interleaved
        pairs = torch.arange(0, HEAD_DIM, 2)
        self.register_buffer("inv_freq", 10.0 ** (-pairs / HEAD_DIM))

    def angles(self, positions: Any) -> Any:
        return positions.unsqueeze(-1) * self.inv_freq

    def turned(self, key: Any, positions: Any) -> Any:
        angles = self.angles(positions)
        cos, sin = angles.cos(), angles.sin()
        first, second = (key[..., ::2], key[..., 1::2]) if self.interleaved else key.chunk(2, -1)
        if self.sign > 0:
            both = (first * cos - second * sin, second * cos + first * sin)
        else:
            both = (first * cos + second * sin, second * cos - first * sin)
        return torch.stack(both, -1).flatten(-2) if self.interleaved else torch.cat(both, -1)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Any, past_key: Any, past_value: Any, positions: Any
    ) -> Any:
        key = torch.cat([past_key, self.turned(self.heads(self.key, x), positions)], -2)
        value = torch.cat([past_value, self.heads(self.value, x)], -2)
        return sdpa(self, self.heads(self.query, x), key, value, None), key, value


class RotatedPrefill(Rotated):
    """The same without a past."""

    def forward(self, x: Any, positions: Any) -> Any:  # pyright: ignore
        key = self.turned(self.heads(self.key, x), positions)
        value = self.heads(self.value, x)
        key, value = (torch.cat([t[:, :, :0], t], -2) for t in (key, value))
        return sdpa(self, self.heads(self.query, x), key, value, None), key, value


class FromTable(Rotated):
    """Cosines and sines are read from somewhere; ``positions`` has both."""

    def turned(self, key: Any, positions: Any) -> Any:
        cos, sin = positions.unbind()
        first, second = key.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class MadeAnew(Rotated):
    """The frequencies are made in every call."""

    def angles(self, positions: Any) -> Any:
        return positions.unsqueeze(-1) * (self.inv_freq + 0 * positions.sum()).exp()


def recorded(module: nn.Module, inputs: tuple[Any, ...], codec: Codec) -> Rewriting:
    graph_module = fx.symbolic_trace(module)
    placeholders = tuple(graph_module.graph.find_nodes(op="placeholder"))
    missing = [None] * (len(placeholders) - len(inputs))
    _propagate_shapes(graph_module, [*inputs, *missing])
    config = Config(codec=codec, inner="eager")
    carriers = _carriers(graph_module.graph)
    rewriting = Rewriting(graph_module, config, carriers, placeholders=placeholders)
    for graph_pass in (Canonicalize, FindCacheEdges, RecordRotations):
        graph_pass()(rewriting)
    return rewriting


def positions(first: int, count: int) -> Tensor:
    return torch.arange(first, first + count, dtype=torch.float32)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_prompts_edge_has_the_frequencies(sign: int, interleaved: bool) -> None:
    module = RotatedPrefill(sign, interleaved)
    rewriting = recorded(module, (tokens(5), positions(0, 5)), Svdq())
    (site,) = rewriting.sites
    assert rotary_dim(site.key.fmt) == HEAD_DIM
    assert is_interleaved(site.key.fmt) == interleaved
    given = site.key.given
    assert isinstance(given, fx.Node)
    assert given.target == ("inv_freq" if sign > 0 else torch.neg)
    assert site.value.given is None


def test_an_edge_with_a_dense_past_has_the_numbers() -> None:
    rewriting = recorded(Rotated(-1), (tokens(3), *past(), positions(7, 3)), Svdq())
    (site,) = rewriting.sites
    assert site.key.constant is not None
    assert torch.equal(site.key.constant, -Rotated().inv_freq)


@pytest.mark.parametrize("codec", [Kivi(), Svdq(pre_rope=False)], ids=lambda c: c.name)
def test_other_codecs_are_not_asked(codec: Codec) -> None:
    rewriting = recorded(RotatedPrefill(), (tokens(5), positions(0, 5)), codec)
    (site,) = rewriting.sites
    assert site.key.given is None
    assert not site.key.fmt.details


@pytest.mark.parametrize(
    ("module", "inputs", "reason"),
    [
        (Cached(), (tokens(3), *past()), NO_ROTARY),
        (FromTable(), (tokens(3), *past(), torch.rand(2, 3, HEAD_DIM // 2)), NOT_PRODUCTS),
        (
            MadeAnew(),
            (tokens(3), *past(), positions(7, 3)),
            "key: the frequencies of its rotary embedding are no constant of the graph",
        ),
    ],
    ids=["none", "table", "computed"],
)
def test_without_frequencies_an_attention_is_left_alone(
    module: Cached, inputs: tuple[Any, ...], reason: str
) -> None:
    rewriting = recorded(module, inputs, Svdq())
    assert not rewriting.sites
    assert [skipped.reason for skipped in rewriting.skipped] == [reason]
    with pytest.raises(squat_fx.NotRewritten, match="rotary embedding"):
        squat_fx.rewrite(fx.symbolic_trace(module), inputs, Config(codec=Svdq(), strict=True))


def test_a_rewritten_prompt_and_step_share_a_cache() -> None:
    """And the step, which never sees how keys were turned, packs them as the prompt's were."""
    config = Config(codec=Svdq(), bits=8, residual_length=4, sink_length=2, inner="eager")
    prompt, step = RotatedPrefill(), Rotated()
    x = tokens(60)
    graph = fx.symbolic_trace(prompt)
    module, report = squat_fx.rewrite(graph, (x[:, :40], positions(0, 40)), config)
    assert report.rewritten == 1, str(report)
    _, key, value = module(x[:, :40], positions(0, 40))
    graph = fx.symbolic_trace(step)
    module, report = squat_fx.rewrite(graph, (x[:, 40:41], *past(), positions(7, 1)), config)
    assert report.rewritten == 1, str(report)
    for at in range(40, 60):
        out, key, value = module(x[:, at : at + 1], key, value, positions(at, 1))
    assert isinstance(key, QuantizedKV)
    assert rotary_dim(key.format) == HEAD_DIM
    with torch.no_grad():
        expected, dense, _ = prompt(x, positions(0, 60))
    # Later tokens may lie outside the ranges of the prompt.
    assert relative_error(key.dequantize()[:, :, :40], dense[:, :, :40]) < 1e-4
    assert relative_error(key.dequantize(), dense) < 0.02
    assert relative_error(out, expected[:, :, -1:]) < 0.02


def test_a_dense_past_that_meets_a_rewritten_step_is_packed_with_its_rotation() -> None:
    config = Config(codec=Svdq(), bits=8, residual_length=4, sink_length=2, inner="eager")
    x, (_, dense_key, dense_value) = tokens(60), RotatedPrefill()(tokens(60), positions(0, 60))
    inputs = x[:, :1], dense_key, dense_value, positions(60, 1)
    module, _ = squat_fx.rewrite(fx.symbolic_trace(Rotated()), inputs, config)
    _, key, _ = module(*inputs)
    assert torch.equal(key._storage["frequency"][0, 0, 0], Rotated().inv_freq)
