"""Which Python functions take the time of a first generation, and of the host between two replays.

    python benchmarks/probes/first_steps.py OUT.json SHAPE PROMPT [--profile]

The first two tokens are sampled (every 4 ms, where the main thread is): functions by the time below
them, and by their own. Then 40 steps with marks between what the host does in turn, medians in
microseconds; with ``--profile`` the kernels of four replays.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import StoppingCriteria

import squat_fx
from squat_fx import api, replay
from squat_fx.bench.generate import make_model
from squat_fx.boundary import Boundary

STEPS = 40


class Sampler:
    """Where the main thread is, every few milliseconds."""

    def __init__(self, seconds: float = 0.004) -> None:
        self.own: Counter[str] = Counter()
        self.below: Counter[str] = Counter()
        self._seconds, self._main, self._on = seconds, threading.get_ident(), True
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        last = time.perf_counter()
        while self._on:
            time.sleep(self._seconds)
            now = time.perf_counter()
            frame, seen = sys._current_frames()[self._main], set()
            passed, last = now - last, now
            own = True
            while frame is not None:
                code = frame.f_code
                where = code.co_filename.split("site-packages/")[-1]
                name = f"{where[-48:]}:{code.co_name}"
                if own:
                    self.own[f"{name}:{frame.f_lineno}"] += passed
                if name not in seen:
                    seen.add(name)
                    self.below[name] += passed
                own, frame = False, frame.f_back

    def stop(self, most: int = 110) -> dict[str, Any]:
        """Seconds of the functions that took the most."""
        self._on = False
        self._thread.join()
        return {
            "below": {k: round(v, 2) for k, v in self.below.most_common(most)},
            "own": {k: round(v, 2) for k, v in self.own.most_common(50)},
        }


class Ticks(StoppingCriteria):
    """Calls ``note`` after every token."""

    def __init__(self, note: Any) -> None:
        self.note = note

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.note("logits processed")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def main(out: str, shape: str, prompt: int, *flags: str) -> None:
    """See above."""
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    found: dict[str, Any] = {}
    model = make_model(shape, prompt + 128, device)
    squat_fx.compile(model, cuda_graphs=cuda)
    ids = torch.randint(1, model.config.vocab_size, (1, prompt), device=device)

    def generate(tokens: int, note: Any) -> None:
        options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
        with torch.no_grad():
            model.generate(ids, stopping_criteria=[Ticks(note)], **options)
        if cuda:
            torch.cuda.synchronize()

    tokens: list[float] = []
    started = time.perf_counter()
    sampler = [Sampler()]

    def first(_: str) -> None:
        nonlocal started
        if cuda:
            torch.cuda.synchronize()
        tokens.append(round(time.perf_counter() - started, 2))
        if len(tokens) <= 2:
            found[f"token {len(tokens)}"] = sampler[0].stop()
        if len(tokens) == 1:
            sampler[0] = Sampler()
        started = time.perf_counter()

    generate(5, first)
    found["seconds"] = tokens
    print(tokens, flush=True)

    rows: list[list[tuple[str, float]]] = [[]]

    def mark(name: str) -> None:
        rows[-1].append((name, time.perf_counter()))

    def marked(owner: Any, name: str, before: str, after: str = "") -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if before == "waited":
                rows.append([])
            mark(before)
            result = original(*args, **kwargs)
            if after:
                mark(after)
            return result

        setattr(owner, name, call)

    marked(model, "prepare_inputs_for_generation", "waited", "prepared")
    marked(api, "without_idle_mask", "called")
    compiled: Any = api.compiled_of(model)
    marked(compiled, "_compiled", "to Dynamo", "Dynamo returned")
    marked(Boundary, "__call__", "guarded", "committed")
    marked(replay.Recording, "__call__", "staged", "outputs cloned")
    if cuda:
        marked(torch.cuda.CUDAGraph, "replay", "inputs copied", "launched")
    generate(STEPS, mark)
    table: dict[str, list[float]] = {}
    for row, following in pairwise(rows[4:]):
        for (before, a), (after, b) in pairwise([*row, following[0]]):
            table.setdefault(f"{before} -> {after}", []).append(1e6 * (b - a))
    found["host_us"] = {name: round(median(times), 1) for name, times in table.items()}
    whole = [1e3 * (b[0][1] - a[0][1]) for a, b in pairwise(rows[4:])]
    found["step_ms"] = round(median(whole), 3)
    print(json.dumps(found["host_us"], indent=1), found["step_ms"], flush=True)
    Path(out).write_text(json.dumps(found, indent=1))
    if "--profile" in flags and cuda:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as traced:
            generate(6, lambda _: None)
        events = [e for e in traced.events() if e.device_type.name == "CUDA"]
        events.sort(key=lambda e: e.time_range.start)
        last = events[-len(events) // 6 :]
        names: dict[str, list[float]] = {}
        for event in events:
            names.setdefault(event.name[:100], []).append(event.time_range.elapsed_us())
        found["kernels"] = {
            name: {
                "calls": len(times),
                "median_us": round(median(times), 2),
                "us": round(sum(times)),
            }
            for name, times in sorted(names.items(), key=lambda item: -sum(item[1]))[:40]
        }
        found["last"] = [
            [round(e.time_range.start - last[0].time_range.start, 1),
             round(e.time_range.elapsed_us(), 1), e.name[:48]] for e in last[-700:]
        ]  # fmt: skip
        Path(out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
