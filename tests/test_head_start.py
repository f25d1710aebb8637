"""Replays that begin when the call comes in: never taken for another, never more than a guess."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import squat_fx
from squat_fx.head_start import MOST_FAILURES, Begun, HeadStart, Step
from tests.host_recordings import record_on_the_host
from tests.models import SCENARIOS, build, greedy, prompt

OPTIONS: dict[str, Any] = {"inner": "eager", "residual_length": 8, "codec": "none"}


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    record_on_the_host(monkeypatch)


def replayed() -> Any:
    """A tiny model whose steps are replayed."""
    return squat_fx.compile(build("llama"), cuda_graphs=True, **OPTIONS)


# whole models -------------------------------------------------------------------------------------


def test_every_replay_of_a_generation_but_the_first_is_begun_early() -> None:
    expected = greedy(build("llama"), 420)  # arenas grow once
    model = replayed()
    assert torch.equal(greedy(model, 420), expected)
    report = squat_fx.report(model)
    assert len(report.graphs) == 2
    assert report.recordings == 2
    assert report.begun >= report.replays - 2 * report.recordings
    assert f", {report.begun} of them begun" in str(report)


@pytest.mark.parametrize("scenario", ["beam", "prompt_lookup", "interleaved", "chat"])
def test_whatever_the_loop_does_the_tokens_are_the_same(scenario: str) -> None:
    expected = SCENARIOS[scenario](build("llama"))
    assert torch.equal(SCENARIOS[scenario](replayed()), expected)


def test_a_cache_that_was_cropped_is_not_what_was_guessed() -> None:
    def tokens(model: Any) -> list[Tensor]:
        cache, ids, found = DynamicCache(config=model.config), prompt(1, 20), []
        with torch.no_grad():
            for step in range(40):
                ids = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
                found.append(ids)
                if step % 3 == 2:  # forget the newest token, and say it again
                    cache.crop(-1)
                    ids = found[-2]
        return found

    expected, model = tokens(build("llama")), replayed()
    assert all(map(torch.equal, tokens(model), expected))
    assert squat_fx.report(model).begun > 8


def test_weights_that_moved_are_read_where_they_are() -> None:
    def tokens(model: Any) -> list[Tensor]:
        cache, ids, found = DynamicCache(config=model.config), prompt(1, 20), []
        with torch.no_grad():
            for step in range(12):
                ids = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
                found.append(ids)
                if step == 6:
                    weight = model.lm_head.weight
                    weight.data = weight.data.flip(0).contiguous()
        return found

    assert all(map(torch.equal, tokens(replayed()), tokens(build("llama"))))


def test_a_token_that_is_changed_in_place_is_read_as_it_is() -> None:
    model, plain = replayed(), build("llama")
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    token, found = prompt(1, 1), ([], [])
    with torch.no_grad():
        for step in range(12):
            token.fill_(3 + step)
            for out, one, cache in zip(found, (model, plain), caches, strict=True):
                out.append(one(token, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(found[0], found[1])


# the guess itself ---------------------------------------------------------------------------------


class Loop:
    """A caller that notes a step at every call, and what is launched."""

    def __init__(self) -> None:
        self.head_start = HeadStart()
        self.launched: list[float] = []

    def begin(self, given: Mapping[int, Tensor]) -> Begun:
        self.launched.append(given[0].item())
        return Begun(self, "key", dict(given), [given[0] + 1])

    def __call__(self, token: Tensor, key: str = "key", by: Any = None, **others: Any) -> Any:
        with self.head_start.of_call((), {"token": token, **others}):
            found = self.head_start.take(by or self, key, {0: token})
            self.head_start.note(Step(self.begin, {0: token}))
        return found


def token(number: float) -> Tensor:
    return torch.tensor([number])


def test_the_first_call_is_not_guessed_and_the_next_is() -> None:
    loop = Loop()
    assert loop(token(1)) is None
    (found,) = loop(token(2))
    assert found.item() == 3
    assert loop.launched == [2]
    assert (loop.head_start.right, loop.head_start.wrong) == (1, 0)


@pytest.mark.parametrize("unlike", [{"key": "other"}, {"by": "another graph"}])
def test_another_recording_or_graph_gets_nothing_of_it(unlike: dict[str, Any]) -> None:
    loop = Loop()
    loop(token(1))
    assert loop(token(2), **unlike) is None
    assert (loop.head_start.right, loop.head_start.wrong) == (0, 1)
    assert loop(token(3)) is not None


def test_a_call_that_looks_different_is_not_begun() -> None:
    loop, cache = Loop(), object()
    loop(token(1), cache=cache)
    calls: list[dict[str, Any]] = [{"cache": object()}, {}, {"cache": cache, "more": 1}]
    for call in calls:
        assert loop(token(2), **call) is None
    loop(token(1))
    assert loop(torch.ones(2)) is None
    assert loop.launched == []


def test_a_step_that_was_given_what_the_caller_did_not_pass_is_not_guessed() -> None:
    head_start, loop = HeadStart(), Loop()
    for _ in range(2):
        with head_start.of_call((), {"token": token(1)}):
            head_start.note(Step(loop.begin, {0: token(1)}))
    assert loop.launched == []


def test_two_steps_in_one_call_are_not_guessed() -> None:
    head_start, loop, given = HeadStart(), Loop(), token(1)
    for _ in range(2):
        with head_start.of_call((given,), {}):
            head_start.note(Step(loop.begin, {0: given}))
            head_start.note(Step(loop.begin, {0: given}))
    assert loop.launched == []


def test_no_guesses_are_made_after_many_wrong_ones() -> None:
    loop = Loop()
    for _ in range(MOST_FAILURES + 4):
        loop(token(1), key="other")
    assert len(loop.launched) == MOST_FAILURES


def test_a_call_that_raises_leaves_nothing_behind() -> None:
    loop = Loop()
    loop(token(1))
    with (
        pytest.raises(RuntimeError, match=r"^no$"),
        loop.head_start.of_call((), {"token": token(2)}),
    ):
        raise RuntimeError("no")
    assert loop.head_start.wrong == 1
    assert loop(token(3)) is None
    assert loop.launched == [2]


# what a graph writes to ---------------------------------------------------------------------------


class Counting(torch.nn.Module):
    """Attention over a past, and a state that every step writes to: one that the caller gives, or
    one of its own.
    """

    state: Tensor

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(4))
        self.own = own

    def forward(self, x: Tensor, key: Tensor, value: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        """``x`` is ``[batch, heads, tokens, channels]``."""
        changed = self.state if self.own else state
        changed.add_(1.0)
        key, value = torch.cat([key, x], 2), torch.cat([value, x], 2)
        out = torch.nn.functional.scaled_dot_product_attention(x, key, value)
        return out + changed.sum(), key, value


@pytest.mark.parametrize("own", [True, False], ids=["own", "given"])
def test_a_state_is_written_to_once_a_step(own: bool) -> None:
    def steps(model: Any) -> tuple[list[Tensor], float]:
        key = value = torch.ones(1, 2, 6, 16)
        state, found = torch.zeros(4), []
        with torch.no_grad():
            for step in range(8):
                x = torch.full((1, 2, 1, 16), float(step))
                out, key, value = model(x, key, value, state)
                found.append(out)
        return found, (model.state if own else state).sum().item()

    expected, model = steps(Counting(own)), Counting(own)
    found = steps(squat_fx.compile(model, cuda_graphs=True, **OPTIONS))
    torch.testing.assert_close(found[0], expected[0])
    assert found[1] == expected[1] == 8 * 4
    report = squat_fx.report(model)
    assert report.begun == 0
    assert (report.replays > 0) == own
    note = "a graph is not replayed, because it writes to its input l_state_, which may be"
    assert (note in str(report)) == (not own)
