"""Replayed decode graphs: the same tokens, few recordings, outputs that stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import squat_fx
from squat_fx.codecs import Codec, Pruned
from squat_fx.pool import POOL
from tests.models import build, prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GROWTHS = 3


def compiled(**options: Any) -> Any:
    """A tiny model on the GPU."""
    torch._dynamo.reset()
    POOL.clear()
    model: Any = build("llama")
    return squat_fx.compile(model.cuda(), residual_length=8, **options)


def generate(model: Any, tokens: int, batch: int = 1) -> Tensor:
    """Greedy tokens; the arenas of 20 prompt tokens grow by 256 at a time."""
    return model.generate(prompt(batch, 20).cuda(), max_new_tokens=tokens, do_sample=False)


@pytest.mark.parametrize("codec", ["squat", "kivi", Pruned(4)], ids=str)
def test_growth_records_anew_and_answers_the_same(codec: str | Codec) -> None:
    expected = generate(compiled(codec=codec), 256 * GROWTHS)
    model = compiled(codec=codec, cuda_graphs=True)
    report = squat_fx.report(model)
    assert torch.equal(generate(model, 256 * GROWTHS), expected)
    assert 1 <= report.recordings <= GROWTHS
    assert report.replays >= 256 * GROWTHS - 2 * GROWTHS - 2
    # The pool hands the grown arenas out, maybe to other layers, and then the same to each.
    first = report.recordings
    assert torch.equal(generate(model, 256 * GROWTHS), expected)
    second = report.recordings
    assert second <= first + 1
    assert torch.equal(generate(model, 256 * GROWTHS), expected)
    assert report.recordings == second
    assert report.eager_calls == 0
    assert len(report.graphs) == 2


def test_other_batches_and_caches_are_recorded_for_themselves() -> None:
    plain, model = compiled(codec="squat"), None
    expected = {batch: generate(plain, 40, batch) for batch in (1, 3)}
    model = compiled(codec="squat", cuda_graphs=True)
    for batch in (1, 3, 1, 3, 3):
        assert torch.equal(generate(model, 40, batch), expected[batch])
    assert squat_fx.report(model).recordings >= 2


def test_a_prompt_finds_memory_that_a_generation_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled(codec="squat", cuda_graphs=True)
    expected = generate(model, 300)
    monkeypatch.setattr("squat_fx.pool.KEPT_SHARE", 2**60)
    assert POOL.free_bytes > 0
    kept = []
    original = POOL.make_room

    def make_room(device: torch.device | None) -> None:
        original(device)
        kept.append(POOL.free_bytes)

    monkeypatch.setattr(POOL, "make_room", make_room)
    assert torch.equal(generate(model, 300), expected)
    assert kept[0] == 0


def test_outputs_stay_what_they_were() -> None:
    def logits(model: Any) -> list[Tensor]:
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        ids = [prompt(1, 30, seed=s).cuda() for s in (3, 4)]
        found = []
        with torch.no_grad():
            for _ in range(40):
                for i, cache in enumerate(caches):
                    out = model(ids[i], past_key_values=cache, use_cache=True).logits
                    ids[i] = out[:, -1:].argmax(-1)
                    found.append(out)
        return found

    expected = logits(compiled())
    found = logits(compiled(cuda_graphs=True))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
