"""Caches that move their layers off the device between calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

import squat_fx
from squat_fx import QuantizedKV, offloaded_caches
from squat_fx.caches import caches_among
from squat_fx.report import Report
from tests.models import prompt
from tests.uses import tiny


def offloading() -> Any:
    """A cache whose layers say when they move; torch has no streams without a GPU."""
    cache = DynamicCache()
    cache.offloading, cache.only_non_sliding = True, True
    return cache


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What layers did, in order."""
    from transformers.cache_utils import DynamicLayer

    seen: list[str] = []
    for name in ("prefetch", "offload"):
        monkeypatch.setattr(DynamicLayer, name, lambda _, name=name: seen.append(name))
    return seen


def test_layers_are_there_for_the_call_and_gone_after_it(moves: list[str]) -> None:
    model = squat_fx.compile(tiny(), residual_length=8, inner="eager")
    cache, ids = offloading(), prompt(1, 40)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        layers = len(cache.layers)
        assert moves == ["offload"] * layers
        moves.clear()
        model(ids[:, :1], past_key_values=cache, use_cache=True)
    assert moves == ["prefetch"] * layers + ["offload"] * layers
    assert cache.offloading
    assert all(isinstance(layer.keys, QuantizedKV) for layer in cache.layers)
    report = squat_fx.report(model)
    assert report.rewritten == 2 * layers
    assert offloaded_caches.MOVED in str(report)


def test_a_call_that_fails_leaves_the_cache_as_it_was(moves: list[str]) -> None:
    cache = offloading()

    def call() -> None:
        with offloaded_caches.on_their_device((), {"past_key_values": cache}, Report()):
            assert not cache.offloading
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        call()
    assert cache.offloading
    assert not moves


def test_a_cache_that_stays_is_not_moved(moves: list[str]) -> None:
    cache, report = DynamicCache(), Report()
    with offloaded_caches.on_their_device((cache,), {}, report):
        pass
    assert not moves
    assert not report.notes


def test_both_caches_of_an_encoder_decoder_cache_are_found() -> None:
    both = DynamicCache(), DynamicCache()
    found = list(caches_among((EncoderDecoderCache(*both), 3), {"cache": "none"}))
    assert [id(cache) for cache in found] == [id(cache) for cache in both]
