"""One compiled model for a long time, in several threads, in a fork, and as a pickle.

Whatever it was asked before, it answers as a fresh one, and keeps nothing.
"""

from __future__ import annotations

import gc
import os
import pickle
import random
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import squat_fx
from squat_fx.api import RECOMPILE_LIMIT
from squat_fx.pool import POOL
from tests.choose import full
from tests.models import prompt
from tests.uses import generate, tiny

OPTIONS: dict[str, Any] = {"inner": "eager", "residual_length": 8}
MODES = ("greedy", "sampling", "beams", "prompt lookup", "chunked prefill", "two turns")


def generation(model: PreTrainedModel, seed: int) -> Tensor:
    """A generation of random batch, length, padding and mode; ``seed`` says which."""
    choose = random.Random(seed)
    mode = choose.choice(MODES)
    batch = 1 if mode in ("prompt lookup", "two turns") else choose.randint(1, 4)
    length, tokens = choose.randint(2, 120), choose.randint(2, 12)
    ids, mask = prompt(batch, length, seed=seed), torch.ones(batch, length, dtype=torch.long)
    if choose.random() < 0.4 and batch > 1:
        for row in range(1, batch):
            mask[row, : choose.randint(0, length - 1)] = 0
    options: dict[str, Any] = {
        "greedy": {},
        "sampling": {"do_sample": True},
        "beams": {"num_beams": 3},
        "prompt lookup": {"prompt_lookup_num_tokens": 4},
        "chunked prefill": {"prefill_chunk_size": 1 + length // 3},
        "two turns": {"past_key_values": DynamicCache(config=model.config)},
    }[mode]
    out = generate(model, ids * mask, tokens, attention_mask=mask, **options)
    if mode == "two turns":
        longer = torch.cat([out, prompt(1, 7, seed=seed)], 1)
        out = generate(model, longer, tokens, **options)
    return out


def alive() -> tuple[int, int]:
    """Tensors that are alive, and the bytes of arenas in use."""
    gc.collect()
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects()), POOL.live_bytes


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("generations", [12, *full(200)])
def test_many_generations_leave_nothing_behind(
    generations: int, record_property: Callable[[str, Any], None]
) -> None:
    torch._dynamo.reset()
    dense, model = tiny(), squat_fx.compile(tiny(), codec="none", **OPTIONS)
    report, seen = squat_fx.report(model), []
    for seed in range(generations):
        assert torch.equal(generation(model, seed), generation(dense, seed)), (seed, str(report))
        if seed % 20 == 19 or seed == generations - 1:
            rss = resident_bytes() if Path("/proc/self/statm").exists() else 0
            seen.append((seed + 1, *alive(), POOL.free_bytes, rss, len(report.graphs)))
    for at, tensors, live, free, rss, graphs in seen:
        record_property(f"after {at}", (tensors, live, free, rss, graphs))
        print(f"{at:4} generations: {tensors} tensors, {live} + {free} bytes of arenas, "
              f"{rss / 2**20:.1f} MiB resident, {graphs} graphs")  # fmt: skip
    assert report.eager_calls == 0, str(report)
    assert len(report.graphs) <= RECOMPILE_LIMIT
    assert [live for _, _, live, *_ in seen] == [0] * len(seen), "all arenas came back"
    if generations >= 200:  # by then all graphs are there; each keeps some tensors of its own
        (_, tensors, _, _, rss, graphs), (_, more_tensors, _, _, more_rss, more_graphs) = (
            next(entry for entry in seen if entry[0] > generations // 2), seen[-1],
        )  # fmt: skip
        grown = more_graphs - graphs
        assert grown <= 4
        assert more_tensors - tensors <= 16 + 150 * grown
        assert more_rss - rss < 2**20 * (16 + 8 * grown)


def test_a_model_that_served_long_answers_as_a_fresh_one() -> None:
    """With codes, too: nothing of one cache reaches the next through a reused arena."""
    served = squat_fx.compile(tiny(), bits=2, **OPTIONS)
    first = [generation(served, seed) for seed in range(4)]
    again = [generation(served, seed) for seed in range(4)]
    POOL.clear()
    fresh = squat_fx.compile(tiny(), bits=2, **OPTIONS)
    for seed, answers in enumerate(zip(first, again, strict=True)):
        expected = generation(fresh, seed)
        assert all(torch.equal(answer, expected) for answer in answers), seed


def test_two_threads_with_two_caches_on_one_model() -> None:
    """They compile, grow and give back arenas at the same time."""
    torch._dynamo.reset()
    dense, model = tiny(), squat_fx.compile(tiny(), codec="none", **OPTIONS)
    seeds = [range(100, 105), range(200, 205)]
    expected = [[_greedy(dense, seed) for seed in each] for each in seeds]
    with ThreadPoolExecutor(2) as threads:
        actual = list(threads.map(lambda each: [_greedy(model, seed) for seed in each], seeds))
    for mine, theirs in zip(actual, expected, strict=True):
        assert all(map(torch.equal, mine, theirs))
    assert squat_fx.report(model).eager_calls == 0
    assert alive()[1] == 0


def _greedy(model: PreTrainedModel, seed: int) -> Tensor:
    """Without the random state, which threads share."""
    ids = prompt(1 + seed % 3, 5 + seed % 60, seed=seed)
    return model.generate(ids, max_new_tokens=12, do_sample=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_goes_on_with_the_compiled_model() -> None:
    model = squat_fx.compile(tiny(), bits=2, **OPTIONS)
    expected = _greedy(model, 1)
    cache = DynamicCache(config=model.config)
    model.generate(prompt(1, 30), past_key_values=cache, max_new_tokens=4, do_sample=False)
    held = cache.layers[0].keys.dequantize()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        torch.set_num_threads(1)  # the others were not forked
        found = torch.equal(_greedy(model, 1), expected)
        found = found and torch.equal(cache.layers[0].keys.dequantize(), held)
        os.write(writing, b"equal" if found else b"different")
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "equal"
    assert torch.equal(_greedy(model, 1), expected)


def test_a_pickled_model_is_compiled_again_and_answers_the_same() -> None:
    model = squat_fx.compile(tiny(), bits=2, **OPTIONS)
    expected = _greedy(model, 2)
    copied = pickle.loads(pickle.dumps(model))
    assert "copies run uncompiled" in str(squat_fx.report(copied))
    assert torch.equal(_greedy(squat_fx.compile(copied, bits=2, **OPTIONS), 2), expected)
