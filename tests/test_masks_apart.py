"""Left-padded batches under CUDA graphs: static graphs, counted recordings, the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import squat_fx
from squat_fx.codecs import Codec, Pruned
from tests.choose import full
from tests.host_recordings import record_on_the_host
from tests.models import build, left_padded_batch

OPTIONS: dict[str, Any] = {"residual_length": 8, "codec": "none", "cuda_graphs": True}


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    record_on_the_host(monkeypatch)


def replayed(family: str, **options: Any) -> Any:
    """A tiny model whose steps are replayed."""
    return squat_fx.compile(build(family), **{"inner": "eager", **OPTIONS, **options})


@pytest.mark.parametrize("family", ["llama", *full("gpt2")])
def test_a_left_padded_batch_is_replayed_and_recorded_again_when_it_grows(family: str) -> None:
    expected = left_padded_batch(build(family), 460)  # arenas grow once
    model = replayed(family)
    assert torch.equal(left_padded_batch(model, 460), expected)
    report = squat_fx.report(model)
    assert [(g.kind, g.static) for g in report.graphs] == [("prefill", True), ("decode", True)]
    assert report.recordings == 2
    assert report.replays >= 459 - 2 * report.recordings
    assert "dynamic" not in str(report)


def test_masks_of_windows_and_of_all_tokens_are_set_apart_side_by_side() -> None:
    expected = left_padded_batch(build("gemma2"), 60)
    model = replayed("gemma2")
    assert torch.equal(left_padded_batch(model, 60), expected)
    report = squat_fx.report(model)
    assert all(graph.static for graph in report.graphs)
    assert report.replays > 40


@pytest.mark.parametrize("codec", ["squat", Pruned(4), *full("kivi")], ids=str)
def test_pads_stay_out_of_what_is_stored(codec: str | Codec) -> None:
    plain = squat_fx.compile(build("llama"), inner="eager", residual_length=8, codec=codec)
    expected = left_padded_batch(plain, 60)
    model = replayed("llama", codec=codec)
    assert torch.equal(left_padded_batch(model, 60), expected)
    assert squat_fx.report(model).replays >= 57


def test_inductor_compiles_what_is_left() -> None:
    expected = left_padded_batch(build("llama"), 12)
    model = replayed("llama", inner="inductor")
    assert torch.equal(left_padded_batch(model, 12), expected)
    assert squat_fx.report(model).replays == 10


def plain(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A mask and something else that is returned."""
    return mask[:, None, None, :], x


def read_elsewhere(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return mask[:, None, None, :], x + mask.sum(-1)


def written_in_place(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    mask = mask[:, None, None, :].clone()
    mask.masked_fill_(mask < -10.0, -1e4)
    return mask, x


def of_hidden_states(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return mask[:, None, None, :] + (x @ x.mT).mean(), x


@pytest.mark.parametrize(
    ("masked", "is_static"),
    [(plain, True), (read_elsewhere, False), (written_in_place, False), (of_hidden_states, False)],
)
def test_only_masks_that_serve_attention_alone_are_set_apart(masked: Any, is_static: bool) -> None:
    def step(x: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        key, value = torch.cat([key, x], 2), torch.cat([value, x], 2)
        mask, other = masked(x, mask)
        out = torch.nn.functional.scaled_dot_product_attention(x, key, value, attn_mask=mask)
        return out + other, key, value

    def run(call: Any) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        key = value = torch.ones(1, 2, 5, 16)
        found = []
        with torch.no_grad():
            for tokens in range(6, 13):
                x, mask = (
                    torch.randn(s, generator=generator) for s in ((1, 2, 1, 16), (1, tokens))
                )
                out, key, value = call(x, key, value, mask)
                found.append(out)
        return found

    compiled = squat_fx.compile(step, inner="eager", **OPTIONS)
    for found, expected in zip(run(compiled), run(step), strict=True):
        torch.testing.assert_close(found, expected)
    report = squat_fx.report(compiled)
    assert report.graphs[-1].static == is_static
    assert (report.replays > 0) == is_static
