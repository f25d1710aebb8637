"""When a call is recorded and when replayed; a recording that fails costs nothing but time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from squat_fx import replay
from squat_fx.replay import Replayed, Whereabouts
from squat_fx.report import Report


class Steps:
    """A call that notes what runs: at once, or in a replay of what was recorded."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def __call__(self, copied: dict[int, Tensor]) -> list[Any]:
        self.ran.append("direct")
        return [copied[0] + 1, None]


class FakeRecording:
    """Replays on the host; recording runs nothing."""

    def __init__(
        self, call: Callable[[dict[int, Tensor]], list[Any]], _: Mapping[int, Tensor], __: Any
    ) -> None:
        assert isinstance(call, Steps)
        self.steps = call

    def __call__(self, copied: Mapping[int, Tensor]) -> list[Any]:
        self.steps.ran.append("replay")
        return [copied[0] + 1, None]


class BrokenRecording:
    def __init__(self, *_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "Recording", FakeRecording)
    monkeypatch.setattr(replay, "_on_gpu", dict)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "stream")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")


def run(replayed: Replayed, key: str, steps: Steps, number: float = 1.0) -> float:
    first, second = replayed(replayed.key(key), {0: torch.tensor(number)}, steps)
    assert second is None
    return first.item()


def test_a_call_is_replayed_from_the_second_time_on_at_the_same_addresses() -> None:
    report, steps = Report(), Steps()
    replayed = Replayed(report)
    assert [run(replayed, "a", steps, n) for n in range(4)] == [1, 2, 3, 4]
    assert steps.ran == ["direct", "replay", "replay", "replay"]
    assert (report.recordings, report.replays) == (1, 3)
    report.runs, report.eager_calls = 4, 1
    assert "CUDA graphs: 3 of 4 calls were replays of 1 recordings" in str(report)


def test_other_addresses_get_a_recording_of_their_own() -> None:
    report, steps = Report(), Steps()
    replayed = Replayed(report)
    for key in "ababab":
        run(replayed, key, steps)
    assert steps.ran == ["direct"] * 2 + ["replay"] * 4
    assert report.recordings == 2


def test_another_stream_gets_a_recording_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    report, steps = Report(), Steps()
    replayed = Replayed(report)
    for stream in "xxyy":
        monkeypatch.setattr(torch.cuda, "current_stream", lambda stream=stream: stream)
        run(replayed, "a", steps)
    assert steps.ran == ["direct", "replay"] * 2


def test_the_recording_that_was_not_used_longest_goes_first() -> None:
    report, steps = Report(), Steps()
    replayed = Replayed(report, most=2)
    for key in "aabbacc":  # c pushes b out
        run(replayed, key, steps)
    assert report.recordings == 3
    steps.ran.clear()
    for key in "acb":
        run(replayed, key, steps)
    assert steps.ran == ["replay", "replay", "direct"]


def test_a_recording_that_fails_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(replay, "Recording", BrokenRecording)
    report, steps = Report(), Steps()
    replayed = Replayed(report)
    with caplog.at_level(logging.WARNING):
        assert [run(replayed, "a", steps, n) for n in range(4)] == [1, 2, 3, 4]
    assert steps.ran == ["direct"] * 4
    assert (report.recordings, report.replays) == (0, 0)
    (record,) = caplog.records
    assert record.message == (
        "a decode graph runs without CUDA graphs, because recording it failed: "
        "operation not permitted when stream is capturing"
    )


def test_a_call_that_raises_is_not_recorded_next_time() -> None:
    replayed = Replayed(Report())

    def failing(_: dict[int, Tensor]) -> list[Any]:
        raise ValueError("no")

    with pytest.raises(ValueError, match=r"^no$"):
        replayed(replayed.key("a"), {0: torch.tensor(1.0)}, failing)
    steps = Steps()
    run(replayed, "a", steps)
    assert steps.ran == ["direct"]


def test_a_weight_that_moved_and_a_number_that_changed_are_noticed() -> None:
    weight, ids, scale = torch.ones(3), torch.ones(2), torch.tensor(0.5)
    whereabouts = Whereabouts([0, 2, 3])
    first = whereabouts.key([weight, ids, scale, 7])
    assert whereabouts.key([weight, ids + 1, scale.clone(), 7]) == first
    keys = [first]
    for args in (
        [weight.clone(), ids, scale, 7],
        [weight, ids, scale, 7],
        [weight, ids, scale + 1, 7],
        [weight, ids, scale + 1, 8],
    ):
        keys.append(whereabouts.key(args))
    assert len(set(keys)) == 5
    assert whereabouts.key([weight, ids, scale, 7]) == keys[2]  # a number that is what it was
    weight.data = weight.clone()
    assert whereabouts.key([weight, ids, scale + 1, 8]) not in keys
