"""Left-padded batches under CUDA graphs: static graphs, counted recordings, the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import squat_fx
from squat_fx.codecs import Codec, Pruned
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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
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


@pytest.mark.parametrize("codec", ["squat", "kivi", Pruned(4)], ids=str)
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
