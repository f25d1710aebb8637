"""What windows do not show: retrieval from far back, reasoning, and generation that runs freely.

Prompts attend exactly, so what is asked for must be decoded: the tokens of a question about the
prompt, of an answer, or of the model's own text go through the packed cache one by one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from squat_fx.demo import Advance
from squat_fx.evaluate.numbers import standard_error
from squat_fx.evaluate.settings import MakeCache
from squat_fx.evaluate.texts import Encode, encoder, leading_tokens

NEEDLE = "\nThe secret number of the {name} is {number}.\n"
QUESTION = "\n\nQuestion: What is the secret number of the {name}?\nAnswer: It is"
NAMES = ("harbour", "library", "orchard", "lighthouse", "windmill", "chapel", "market", "mill")


class Task(Protocol):
    """Something to do with a model and its cache."""

    @property
    def name(self) -> str:
        """Its column in the table."""
        ...

    def run(self, model: Any, make_cache: MakeCache, advance: Advance) -> dict[str, float]:
        """Numbers by what they mean; the untouched model comes first."""
        ...


@dataclass(frozen=True)
class Case:
    """What is fed in one call, what is then fed token by token, and which of that is the answer.

    Attributes:
        prompt, asked, answer: int64 ``[tokens]``.
    """

    prompt: Tensor
    asked: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Scored:
    """The answer of a case: ``nll`` fp64 ``[tokens]``, and whether each was the most likely."""

    nll: Tensor
    best: Tensor


def decode_after(
    model: Any, make_cache: MakeCache, cases: Sequence[Case], batch: int
) -> Iterator[Scored]:
    """Answers, each token scored before it is seen.

    Prompts of one length go through together; shorter rests are padded behind their end, which
    nothing before it sees.
    """
    for first in range(0, len(cases), batch):
        group = cases[first : first + batch]
        rests = [torch.cat([case.asked, case.answer]) for case in group]
        rest = torch.nn.utils.rnn.pad_sequence(rests, batch_first=True).to(model.device)
        prompts = torch.stack([case.prompt for case in group]).to(model.device)
        out = model(prompts, past_key_values=make_cache(), use_cache=True, logits_to_keep=1)
        nll, best = [], []
        for position, token in enumerate(rest.split(1, dim=1)):
            log_probs = out.logits[:, -1].double().log_softmax(-1)
            nll.append(-log_probs.gather(1, token)[:, 0])
            best.append(log_probs.argmax(-1) == token[:, 0])
            if position + 1 < rest.shape[1]:
                out = model(token, past_key_values=out.past_key_values)
        all_nll, all_best = torch.stack(nll, 1).cpu(), torch.stack(best, 1).cpu()
        for row, case in enumerate(group):
            answer = slice(len(case.asked), len(case.asked) + len(case.answer))
            yield Scored(all_nll[row, answer], all_best[row, answer])


@dataclass(frozen=True)
class Needles:
    """Numbers hidden at several depths of a text, each asked for once the cache is packed.

    Attributes:
        cases: prompts of ``length`` tokens, the needle included; their needles lie at even depths.
        batch: how many go through together.
    """

    cases: Sequence[Case]
    length: int
    batch: int = 8

    @classmethod
    def hide(
        cls, haystack: Tensor, encode: Encode, leading: Tensor, length: int, count: int, batch: int
    ) -> Needles:
        """``count`` needles in the tokens of a text.

        Args:
            haystack: tokens of a text.
            encode: the tokenizer.
            leading: what it puts first.
            length, count, batch: see the class.

        Raises:
            ValueError: the text is too short.
        """
        cases = []
        for index in range(count):
            name, number = NAMES[index % len(NAMES)], str(73_916 + 4_057 * index)
            needle = encode(NEEDLE.format(name=name, number=number))
            space = length - len(needle) - len(leading)
            if space < 1 or len(haystack) < space:
                raise ValueError(
                    f"a needle in {length} tokens needs a text of {space} tokens, and there are "
                    f"{len(haystack)}; ask for fewer"
                )
            depth = round(space * (index + 0.5) / count)
            prompt = torch.cat([leading, haystack[:depth], needle, haystack[depth:space]])
            question = QUESTION.format(name=name)
            asked, whole = encode(question), encode(f"{question} {number}")
            cases.append(Case(prompt, asked, whole[len(asked) :]))
        return cls(cases, length, batch)

    @property
    def name(self) -> str:
        """With the length, since a text is asked at several."""
        return f"needle in {self.length} tokens"

    def run(self, model: Any, make_cache: MakeCache, advance: Advance) -> dict[str, float]:
        """``found``: how many answers are the most likely tokens; ``nll`` of their tokens."""
        found, nll = [], []
        for scored in decode_after(model, make_cache, self.cases, self.batch):
            found.append(float(scored.best.all()))
            nll.append(scored.nll.mean().item())
            advance(len(found) / len(self.cases))
        return {"found": mean(found), "nll": mean(nll)}


@dataclass(frozen=True)
class Answers:
    """How likely the written answers to questions are, token by token.

    A question comes after others with their answers, so that there is something to pack, and all
    prompts are equally long.
    """

    cases: Sequence[Case]
    batch: int = 8
    name: str = "answers"

    @classmethod
    def read(
        cls, path: Path, encode: Encode, leading: Tensor, count: int, length: int, batch: int
    ) -> Answers:
        """The first ``count`` lines of a file of json with ``question`` and ``answer``.

        Prompts have ``length`` tokens, or fewer if the lines that follow are too few to fill them.

        Raises:
            ValueError: a line is something else.
        """
        asked, answers = [], []
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    fields = json.loads(line)
                    question, answer = str(fields["question"]), str(fields["answer"])
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path.name}, line {number}: expected json with question and answer, as "
                        f"in GSM8K: {error!r}"
                    ) from error
                asked.append(encode(f"Question: {question}\nAnswer:"))
                answers.append(encode(f" {answer}"))
                if sum(map(len, asked[count:])) + sum(map(len, answers[count:])) > length:
                    break
        end = encode("\n\n")
        shots = [x for pair in zip(asked, answers, strict=True) for x in (*pair, end)]
        shown = torch.cat([leading[:0], *shots[3 * count :]])
        prompts = [torch.cat([shown, question]) for question in asked[:count]]
        space = min([length - len(leading), *map(len, prompts)])
        cases = [
            Case(torch.cat([leading, prompt[len(prompt) - space :]]), prompt[:0], answer)
            for prompt, answer in zip(prompts, answers, strict=False)
        ]
        return cls(cases, batch, path.name)

    def run(self, model: Any, make_cache: MakeCache, advance: Advance) -> dict[str, float]:
        """``nll`` of a token of an answer, the mean over questions, and its standard error."""
        nll = []
        for scored in decode_after(model, make_cache, self.cases, self.batch):
            nll.append(scored.nll.mean().item())
            advance(len(nll) / len(self.cases))
        return {"nll": mean(nll), "standard_error": standard_error(nll)}


class FreeRun:
    """Greedy tokens after short prompts, and how likely the untouched model finds them.

    Args:
        prompts: int64 ``[prompts, tokens]``.
        new_tokens: how many to generate.
    """

    def __init__(self, prompts: Tensor, new_tokens: int) -> None:
        self.name = f"{new_tokens} tokens of its own"
        self._prompts = prompts
        self._new_tokens = new_tokens
        self._judge: Any = None
        self._expected: Tensor | None = None

    def run(self, model: Any, make_cache: MakeCache, advance: Advance) -> dict[str, float]:
        """``nll`` of a generated token under the untouched model; ``same``: tokens before the first
        that it would not have chosen, the mean over prompts.
        """
        tokens = self._generate(model, make_cache(), advance)
        if self._expected is None:
            self._judge, self._expected = model, tokens
        differs = tokens != self._expected
        same = torch.where(differs.any(1), differs.int().argmax(1), self._new_tokens)
        ids = torch.cat([self._prompts.to(tokens.device), tokens], 1)
        nll = []
        for row in ids.split(1):  # all logits of all rows would be gigabytes
            logits = self._judge(row[:, :-1], use_cache=False, logits_to_keep=self._new_tokens)
            following = row[0, -self._new_tokens :]
            nll.append(F.cross_entropy(logits.logits[0].float(), following).item())
        return {"nll": mean(nll), "same": same.double().mean().item()}

    def _generate(self, model: Any, cache: Any, advance: Advance) -> Tensor:
        ids = self._prompts.to(model.device)
        found = []
        for step in range(self._new_tokens):
            out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            found.append(ids)
            advance((step + 1) / self._new_tokens)
        return torch.cat(found, 1)


def tasks_of(
    folder: Path,
    haystack: Tensor,
    needles: Sequence[int],
    num_needles: int,
    questions: Path | None,
    num_questions: int,
    question_length: int,
    free_prompts: Tensor,
    free_tokens: int,
    batch: int,
) -> list[Task]:
    """The tasks that were asked for.

    Raises:
        ValueError: a text is too short, or the questions are no such file.
    """
    encode, leading = encoder(folder), leading_tokens(folder)
    found: list[Task] = [
        Needles.hide(haystack, encode, leading, length, num_needles, batch) for length in needles
    ]
    if questions is not None:
        found.append(
            Answers.read(questions, encode, leading, num_questions, question_length, batch)
        )
    if free_tokens:
        found.append(FreeRun(free_prompts, free_tokens))
    return found
