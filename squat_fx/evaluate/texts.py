"""Windows of texts, as tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

Encode = Callable[[str], Tensor]


@dataclass(frozen=True)
class Windows:
    """What every setting sees.

    Attributes:
        ids: int64 ``[windows of all texts, prompt + tokens + 1]``.
        texts: the name of the text of each window.
        prompt: tokens that are fed in one call.
        tokens: tokens that are then fed one by one, each scored by the one that follows.
    """

    ids: Tensor
    texts: tuple[str, ...]
    prompt: int
    tokens: int

    @property
    def shape(self) -> tuple[int, int]:
        """Windows, and the scored tokens of each."""
        return len(self.ids), self.tokens

    def label(self, text: str) -> str:
        """The windows of one text, for people."""
        return f"{text}, prompt {self.prompt}"

    def drifting(self) -> Windows:
        """Each prompt with the tokens that follow a prompt of the text after its own.

        Raises:
            ValueError: there is one text only.
        """
        names = list(dict.fromkeys(self.texts))
        if len(names) < 2:
            raise ValueError("prompts and continuations of different texts need two texts")
        count = len(self.ids) // len(names)
        others = torch.cat([self.ids[count:], self.ids[:count]])[:, self.prompt :]
        after = dict(zip(names, [*names[1:], names[0]], strict=True))
        texts = tuple(f"{name} then {after[name]}" for name in self.texts)
        return replace(self, ids=torch.cat([self.ids[:, : self.prompt], others], 1), texts=texts)

    @classmethod
    def cut(
        cls, texts: dict[str, Tensor], leading: Tensor, count: int, prompt: int, tokens: int
    ) -> Windows:
        """``count`` windows of each text, spread over it.

        Args:
            texts: tokens ``[tokens]`` by name.
            leading: what the tokenizer puts before every text; the first of the prompt.
            count, prompt, tokens: see the class.

        Raises:
            ValueError: a text is too short.
        """
        found = []
        for name, ids in texts.items():
            windows = spread(ids, count, prompt + tokens + 1 - len(leading), name)
            found.append(torch.cat([leading.expand(count, -1), windows], 1))
        names = tuple(name for name in texts for _ in range(count))
        return cls(torch.cat(found), names, prompt, tokens)


def spread(ids: Tensor, count: int, length: int, name: str) -> Tensor:
    """``count`` windows whose offsets are multiples of the same stride, from the first token on.

    Raises:
        ValueError: they would overlap.
    """
    stride = len(ids) // count
    if stride < length:
        raise ValueError(
            f"{count} windows of {length} tokens need {count * length} tokens, {name} has "
            f"{len(ids)}; ask for fewer or shorter ones"
        )
    return torch.stack([ids[i * stride : i * stride + length] for i in range(count)])


def encoder(folder: Path) -> Encode:
    """Text as the model's tokens, int64 ``[tokens]``, without special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def encode(text: str) -> Tensor:
        encoded = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)
        return encoded.input_ids[0]

    return encode


def text_tokens(folder: Path, text: Path) -> Tensor:
    """The whole of a text, likewise."""
    return encoder(folder)(text.read_text(encoding="utf-8"))


def leading_tokens(folder: Path) -> Tensor:
    """What the model's tokenizer puts before every text, int64 ``[0 or 1]``."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return torch.tensor([tokenizer.bos_token_id] if begins else [], dtype=torch.int64)


def text_record(text: Path) -> dict[str, str]:
    """Which text it was."""
    return {"name": text.name, "sha256": hashlib.sha256(text.read_bytes()).hexdigest()}


def tokens_by_name(folder: Path, texts: Sequence[Path]) -> dict[str, Tensor]:
    """The tokens of files by their names.

    Raises:
        ValueError: two have the same name.
    """
    found = {text.name: text_tokens(folder, text) for text in texts}
    if len(found) < len(texts):
        raise ValueError("two texts have the same file name; rename one")
    return found
