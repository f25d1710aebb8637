"""What is asked for goes through the packed cache, and numbers are those of a plain model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import squat_fx
from squat_fx.evaluate.tasks import Answers, Case, FreeRun, Needles, decode_after
from tests.models import VOCABULARY, build, prompt

LEADING = torch.tensor([1])


def encode(text: str) -> Tensor:
    """A token a character."""
    return torch.tensor([ord(c) % (VOCABULARY - 3) + 3 for c in text], dtype=torch.int64)


def make_cache(model: Any) -> Any:
    return lambda: DynamicCache(config=model.config)


def needles(length: int = 300, count: int = 3, batch: int = 1) -> Needles:
    haystack = encode("nothing to see here " * 40)
    return Needles.hide(haystack, encode, LEADING, length, count, batch)


def ignore(_: float) -> None:
    pass


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def test_answers_are_scored_before_they_are_seen_whatever_the_batch() -> None:
    model, ids = build("llama"), prompt(3, 30)
    cases = [Case(row[:20], row[20 : 22 + i], row[22 + i : 27 + i]) for i, row in enumerate(ids)]
    for batch in (1, 2, 3):
        found = list(decode_after(model, make_cache(model), cases, batch))
        for i, scored in enumerate(found):
            logits = model(ids[i : i + 1, : 27 + i], use_cache=False).logits[0, 21 + i : -1]
            log_probs = logits.double().log_softmax(-1)
            expected = -log_probs.gather(1, cases[i].answer[:, None])[:, 0]
            torch.testing.assert_close(scored.nll, expected, rtol=1e-4, atol=1e-4)
            assert torch.equal(scored.best, log_probs.argmax(-1) == cases[i].answer)


def test_needles_lie_at_even_depths_in_prompts_of_one_length() -> None:
    task, depths = needles(), []
    for index in range(3):
        case = task.cases[index]
        text, question, answer = case.prompt, case.asked, case.answer
        assert len(text) == 300
        assert text[0] == 1
        needle = encode(f"number of the {('harbour', 'library', 'orchard')[index]} is")
        at = [i for i in range(300) if torch.equal(text[i : i + len(needle)], needle)]
        assert len(at) == 1
        depths.append(at[0])
        number = str(73_916 + 4_057 * index)
        assert torch.equal(answer, encode(f" {number}"))
        assert torch.equal(question[-6:], encode(" It is"))
    assert depths[0] < 100 < depths[1] < 200 < depths[2]


def test_a_text_too_short_for_a_needle_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a needle in 5000 tokens needs a text of \d+ tokens"):
        needles(5000)


class Copying(torch.nn.Module):
    """Says what followed the last occurrence of the newest two tokens, in what it has seen."""

    device = torch.device("cpu")

    def forward(self, ids: Tensor, past_key_values: list[int], **_: Any) -> Any:
        seen = past_key_values
        seen.extend(ids[0].tolist())
        logits = torch.zeros(1, 1, VOCABULARY)
        for i in range(len(seen) - 3, -1, -1):
            if seen[i : i + 2] == seen[-2:]:
                logits[0, 0, seen[i + 2]] = 50.0
                break

        class Out:
            pass

        out: Any = Out()
        out.logits, out.past_key_values = logits, seen
        return out


def test_what_is_asked_for_is_in_the_cache_and_nowhere_else() -> None:
    # " 73916": it copies all from the needle but the first digit, for which "s " has a later place.
    found = needles().run(Copying(), list, ignore)
    assert found["nll"] == pytest.approx(50 / 6, rel=1e-2)

    class Forgetful(list):
        def extend(self, tokens: Any) -> None:
            super().extend(tokens)
            del self[:-3]

    found = needles().run(Copying(), Forgetful, ignore)
    assert found["found"] == 0
    assert found["nll"] == pytest.approx(torch.tensor(VOCABULARY).log().item(), rel=1e-3)


def test_answers_are_as_likely_as_in_a_plain_forward_pass(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    lines = [{"question": f"What is {i}?", "answer": f"It is {i * i}."} for i in range(4)]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    task, model = Answers.read(path, encode, LEADING, 3, 60, 2), build("llama")
    before = encode("Question: What is 3?\nAnswer: It is 9.\n\nQuestion: What is 1?\nAnswer:")
    assert torch.equal(task.cases[1].prompt, torch.cat([LEADING, before[-59:]]))
    assert [case.answer.tolist() for case in task.cases] == [
        encode(f" It is {i * i}.").tolist() for i in range(3)
    ]
    expected = []
    for case in task.cases:
        ids = torch.cat([case.prompt, case.answer])[None]
        logits = model(ids, use_cache=False).logits[0, 59:-1].log_softmax(-1)
        expected.append(-logits.gather(1, case.answer[:, None]).mean())
    found = task.run(model, make_cache(model), ignore)
    assert found["nll"] == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)


@pytest.mark.parametrize("line", ["{", '{"question": "x"}', "[1]"])
def test_a_line_that_is_no_question_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "x", "answer": "y"}\n' + line, encoding="utf-8")
    with pytest.raises(ValueError, match=r"questions\.jsonl, line 2: expected json with question"):
        Answers.read(path, encode, LEADING, 5, 60, 2)


def test_free_tokens_are_judged_by_the_untouched_model() -> None:
    task = FreeRun(prompt(2, 20), 60)
    full: Any = build("llama")
    mine = task.run(full, make_cache(full), ignore)
    tokens = full.generate(prompt(2, 20), max_new_tokens=60, min_new_tokens=60, do_sample=False)
    logits = full(tokens[:, :-1], use_cache=False).logits[:, 19:].log_softmax(-1)
    expected = -logits.gather(2, tokens[:, 20:, None]).mean()
    assert mine["nll"] == pytest.approx(float(expected), rel=1e-3)
    assert mine["same"] == 60
    exact: Any = squat_fx.compile(build("llama"), codec="none", inner="eager")
    assert task.run(exact, make_cache(exact), ignore) == pytest.approx(mine, rel=1e-6)
    small: Any = squat_fx.compile(build("llama"), bits=1, inner="eager", residual_length=0)
    other = task.run(small, make_cache(small), ignore)
    assert other["same"] < 60
    assert other["nll"] > mine["nll"]
