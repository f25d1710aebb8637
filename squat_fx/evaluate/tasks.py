"""What windows do not show: retrieval from far back, reasoning, and generation that runs freely.

Prompts attend exactly, so what is asked for must be decoded: the tokens of a question about the
prompt, of an answer, or of the model's own text go through the packed cache one by one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

import torch
from torch import Tensor

from squat_fx.demo import Advance
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


def decode_after(model: Any, cache: Any, prompt: Tensor, following: Tensor) -> Tensor:
    """Log-probabilities ``[following, vocabulary]`` of each token of ``following`` before it is
    seen: ``prompt`` goes in one call, what follows token by token.
    """
    ids = torch.cat([prompt, following])[None].to(model.device)
    start = len(prompt)
    out = model(ids[:, :start], past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits = [out.logits[0, -1]]
    for position in range(start, ids.shape[1] - 1):
        token = ids[:, position : position + 1]
        logits.append(model(token, past_key_values=out.past_key_values).logits[0, -1])
    return torch.stack(logits).double().log_softmax(-1).cpu()


@dataclass(frozen=True)
class Needles:
    """Numbers hidden at several depths of a text, each asked for once the cache is packed.

    Attributes:
        haystack: tokens of a text.
        encode: the tokenizer.
        leading: what it puts first.
        length: tokens of a prompt, the needle included.
        count: prompts; their needles lie at even depths.
    """

    haystack: Tensor
    encode: Encode
    leading: Tensor
    length: int
    count: int = 5

    @property
    def name(self) -> str:
        """With the length, since a text is asked at several."""
        return f"needle in {self.length} tokens"

    def case(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """The prompt, the question and its answer.

        Raises:
            ValueError: the text is too short.
        """
        name, number = NAMES[index % len(NAMES)], str(73_916 + 4_057 * index)
        needle = self.encode(NEEDLE.format(name=name, number=number))
        space = self.length - len(needle) - len(self.leading)
        if space < 1 or len(self.haystack) < space:
            raise ValueError(
                f"a needle in {self.length} tokens needs a text of {space} tokens, and there are "
                f"{len(self.haystack)}; ask for fewer"
            )
        depth = round(space * (index + 0.5) / self.count)
        text = self.haystack[:space]
        prompt = torch.cat([self.leading, text[:depth], needle, text[depth:]])
        question = QUESTION.format(name=name)
        whole = self.encode(f"{question} {number}")
        asked = self.encode(question)
        return prompt, asked, whole[len(asked) :]

    def run(self, model: Any, make_cache: MakeCache, advance: Advance) -> dict[str, float]:
        """``found``: how many answers are the most likely tokens; ``nll`` of their tokens."""
        found, nll = [], []
        for index in range(self.count):
            prompt, question, answer = self.case(index)
            log_probs = decode_after(model, make_cache(), prompt, torch.cat([question, answer]))
            of_answer = log_probs[len(question) :]
            found.append(float((of_answer.argmax(-1) == answer).all()))
            nll.append(-of_answer.gather(1, answer[:, None]).mean().item())
            advance((index + 1) / self.count)
        return {"found": mean(found), "nll": mean(nll)}


@dataclass(frozen=True)
class Answers:
    """How likely the written answers to questions are, token by token."""

    questions: Sequence[tuple[Tensor, Tensor]]
    name: str = "answers"

    @classmethod
    def read(cls, path: Path, encode: Encode, leading: Tensor, count: int) -> Answers:
        """The first ``count`` lines of a file of json with ``question`` and ``answer``.

        Raises:
            ValueError: a line is something else.
        """
        found = []
        with path.open(encoding="utf-8") as lines:
            for number, line in zip(range(1, count + 1), lines, strict=False):
                try:
                    fields = json.loads(line)
                    question, answer = str(fields["question"]), str(fields["answer"])
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path.name}, line {number}: expected json with question and answer, as "
                        f"in GSM8K: {error!r}"
                    ) from error
                prompt = encode(f"Question: {question}\nAnswer:")
                found.append((torch.cat([leading, prompt]), encode(f" {answer}")))
        return cls(found, path.name)

    def run(self, model: Any, make_cache: MakeCache, advance: Advance) -> dict[str, float]:
        """``nll`` of a token of an answer, the mean over questions."""
        nll = []
        for i, (prompt, answer) in enumerate(self.questions):
            log_probs = decode_after(model, make_cache(), prompt, answer)
            nll.append(-log_probs.gather(1, answer[:, None]).mean().item())
            advance((i + 1) / len(self.questions))
        return {"nll": mean(nll)}


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
        logits = self._judge(ids[:, :-1], use_cache=False, logits_to_keep=self._new_tokens).logits
        nll = -logits.double().log_softmax(-1).gather(2, tokens[:, :, None])
        return {"nll": nll.mean().item(), "same": same.double().mean().item()}

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
    questions: Path | None,
    num_questions: int,
    free_prompts: Tensor,
    free_tokens: int,
) -> list[Task]:
    """The tasks that were asked for.

    Raises:
        ValueError: a text is too short, or the questions are no such file.
    """
    encode, leading = encoder(folder), leading_tokens(folder)
    hidden = [Needles(haystack, encode, leading, length) for length in needles]
    for task in hidden:
        task.case(0)
    found: list[Task] = [*hidden]
    if questions is not None:
        found.append(Answers.read(questions, encode, leading, num_questions))
    if free_tokens:
        found.append(FreeRun(free_prompts, free_tokens))
    return found
