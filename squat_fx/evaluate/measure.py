"""Windows through caches, teacher-forced, one token a call.

Each window is a prompt, fed in one call, and then tokens, fed one by one with ``model(token,
past_key_values=cache)``; the prediction after each is scored against the token that follows in the
text, and compared with that of the untouched model. Windows go through in batches; no row of a
batch depends on its neighbours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean, median, stdev
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

import squat_fx
from squat_fx.demo import Advance
from squat_fx.evaluate.attention import Queries, Seen, errors_by_layer
from squat_fx.evaluate.settings import MakeCache, Setting
from squat_fx.evaluate.tasks import Task
from squat_fx.evaluate.texts import Windows


@dataclass(frozen=True)
class Held:
    """What a cache holds at the end of a window.

    Attributes:
        stored, dense: bytes of the layers that are packed, and what the same tokens take densely;
            of all layers if none is.
        packed_bits: bits per element of packed tokens: codes, padding, scales and zero points.
        left: layers that are not packed, if others are.
    """

    stored: int
    dense: int
    dense_bits: int
    packed_bits: float | None = None
    left: int = 0

    @property
    def all_bits(self) -> float:
        """Bits per element with everything counted: exact tokens, offsets, spare capacity."""
        return self.dense_bits * self.stored / self.dense if self.dense else math.nan


@dataclass
class Row:
    """The results of one setting.

    Attributes:
        nll, kl, top1: fp64 ``[windows, tokens]``, by scored token.
        held: of the last batch of windows.
        layers: relative error of attention's output by layer.
        ms_per_token: of a decoding call with a batch of windows.
        tasks: the numbers of each task, by its name.
    """

    name: str
    nll: Tensor
    kl: Tensor
    top1: Tensor
    held: Held
    layers: dict[int, float] = field(default_factory=dict)
    ms_per_token: float = 0.0
    seconds: float = 0.0
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)

    def scores(self, rows: Sequence[int]) -> Scores:
        """Of some windows."""
        chosen = list(rows)
        return Scores(self.nll[chosen], self.kl[chosen], self.top1[chosen])

    def record(self, texts: Sequence[str]) -> dict[str, Any]:
        """This row for the json."""
        return {
            "name": self.name,
            "packed_bits": self.held.packed_bits and round(self.held.packed_bits, 4),
            "all_bits": round(self.held.all_bits, 3),
            "cache_bytes": self.held.stored,
            "dense_bytes": self.held.dense,
            "layers_left_alone": self.held.left,
            "ms_per_token": round(self.ms_per_token, 3),
            "seconds": round(self.seconds, 1),
            "attention_error": {str(k): round(v, 5) for k, v in self.layers.items()},
            "tasks": {n: {k: digits(v) for k, v in t.items()} for n, t in self.tasks.items()},
            "texts": {
                text: self.scores(windows).record() for text, windows in by_text(texts).items()
            },
        }


@dataclass(frozen=True)
class Scores:
    """Some windows of one setting; standard errors are over windows."""

    nll: Tensor
    kl: Tensor
    top1: Tensor

    @property
    def ppl(self) -> float:
        """Perplexity over all tokens."""
        return math.exp(self.nll.mean().item())

    @property
    def mean_kl(self) -> float:
        """KL(full || setting), nats a token."""
        return self.kl.mean().item()

    @property
    def kl_error(self) -> float:
        """Its standard error."""
        return standard_error(self.kl.mean(1).tolist())

    @property
    def kl_p99(self) -> float:
        """The KL that one token in a hundred exceeds."""
        return self.kl.flatten().quantile(0.99).item()

    @property
    def agreement(self) -> float:
        """How often the most likely token is the same."""
        return self.top1.mean().item()

    def record(self) -> dict[str, Any]:
        """For the json; the error of the perplexity is that of the mean log likelihood."""
        return {
            "ppl": round(self.ppl, 3),
            "ppl_standard_error": round(self.ppl * standard_error(self.nll.mean(1).tolist()), 3),
            "kl": digits(self.mean_kl),
            "kl_standard_error": digits(self.kl_error),
            "kl_p99": digits(self.kl_p99),
            "top1": round(self.agreement, 4),
            "kl_by_window": [digits(kl) for kl in self.kl.mean(1).tolist()],
        }


def digits(x: float) -> float:
    """``x`` with four digits that mean something."""
    return float(f"{x:.4g}")


def by_text(texts: Sequence[str]) -> dict[str, list[int]]:
    """The windows of each text."""
    return {name: [i for i, t in enumerate(texts) if t == name] for name in dict.fromkeys(texts)}


def standard_error(numbers: Sequence[float]) -> float:
    """Of a mean; 0 for one number."""
    return stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else 0.0


class Evaluation:
    """Runs settings over the same windows; the first must be the untouched model.

    Args:
        load: makes a fresh model on its device.
        windows: what is fed.
        batch: windows that go through together.
        tasks: what else is done.
    """

    def __init__(
        self, load: Callable[[], Any], windows: Windows, batch: int, tasks: Sequence[Task] = ()
    ) -> None:
        self._load = load
        self._tasks = tasks
        self._windows = windows
        self._batch = batch
        self._reference: list[Tensor] = []  # log-probabilities [batch, vocabulary], by step
        self._seen: dict[int, Seen] = {}
        self._dense: dict[int, Held] = {}  # the full cache, by windows in a batch

    @torch.no_grad()
    def run(self, setting: Setting, advance: Advance) -> Row:
        """Measure one setting; ``advance`` is told the share of it that is done."""
        model = self._load()
        make_cache = setting.prepare(model)
        is_reference = not self._reference
        windows = self._windows
        scores = torch.zeros(3, len(windows.ids), windows.tokens, dtype=torch.float64)
        times: list[float] = []
        queries, held, layers = Queries(), None, {}
        started = time.perf_counter()
        for first in range(0, len(windows.ids), self._batch):
            ids = windows.ids[first : first + self._batch].to(model.device)
            with queries.of(model if is_reference and not first else None):
                cache = self._decode(model, make_cache, ids, first, scores, times, advance)
            if is_reference and not first:
                self._seen = queries.seen(cache)
            if not first:
                layers = {} if is_reference else errors_by_layer(self._seen, cache)
            held = hold(cache, self._dense.get(len(ids)))
            if is_reference:
                self._dense[len(ids)] = held
        assert held is not None
        seconds = time.perf_counter() - started
        nll, kl, top1 = scores
        tasks = {task.name: task.run(model, make_cache, advance) for task in self._tasks}
        return Row(setting.name, nll, kl, top1, held, layers, 1e3 * median(times), seconds, tasks)

    def _decode(
        self,
        model: Any,
        make_cache: MakeCache,
        ids: Tensor,
        first: int,
        scores: Tensor,
        times: list[float],
        advance: Advance,
    ) -> Any:
        """Feed the windows from number ``first`` on; returns their cache."""
        prompt, tokens = self._windows.prompt, self._windows.tokens
        cache = model(
            ids[:, :prompt], past_key_values=make_cache(), use_cache=True, logits_to_keep=1
        ).past_key_values
        step_of_reference = first // self._batch * tokens
        for step, token in enumerate(ids[:, prompt:-1].split(1, dim=1)):
            _settle(ids.device)
            started = time.perf_counter()
            logits = model(token, past_key_values=cache).logits[:, -1]
            _settle(ids.device)
            times.append(time.perf_counter() - started)
            rounded = logits.double().log_softmax(-1).float()  # as the reference is kept
            if len(self._reference) == step_of_reference + step:
                self._reference.append(rounded)
            log_probs = rounded.double()
            truth = self._reference[step_of_reference + step].double()
            following = ids[:, prompt + 1 + step, None]
            found = (
                -log_probs.gather(1, following)[:, 0],
                (truth.exp() * (truth - log_probs)).sum(-1),
                (truth.argmax(-1) == log_probs.argmax(-1)).double(),
            )
            scores[:, first : first + len(ids), step] = torch.stack(found).cpu()
            done = first * tokens + (step + 1) * len(ids)
            advance(done / (len(self._windows.ids) * tokens))
        return cache


def hold(cache: Any, dense: Held | None = None) -> Held:
    """What a cache holds; of a tensor that wraps others, what those take.

    Args:
        cache: of transformers.
        dense: what the full cache held of the same tokens; another library's may not tell. None:
            this is the full cache.
    """
    layers = [_distinct_tensors(vars(layer)) for layer in cache.layers]
    packed = [x for tensors in layers for x in tensors if isinstance(x, squat_fx.QuantizedKV)]
    if not packed:
        stored = sum(stored_bytes(x) for tensors in layers for x in tensors)
        if dense is not None:
            return Held(stored, dense.dense, dense.dense_bits)
        sizes = [x.element_size() for tensors in layers for x in tensors]
        return Held(stored, stored, 8 * max(sizes, default=2))
    return Held(
        stored=sum(stored_bytes(x) for x in packed),
        dense=sum(x.numel() * x.element_size() for x in packed),
        dense_bits=8 * packed[0].element_size(),
        packed_bits=mean(x.format.packed_bits_per_element() for x in packed),
        left=sum(not any(isinstance(x, squat_fx.QuantizedKV) for x in t) for t in layers),
    )


def _distinct_tensors(nested: Any) -> list[Tensor]:
    found = {id(x): x for x in pytree.tree_leaves(nested) if isinstance(x, Tensor)}
    return list(found.values())


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor holds, also one that wraps others."""
    if isinstance(tensor, squat_fx.QuantizedKV):
        return tensor.storage_nbytes
    return sum(inner.nbytes for inner in innermost(tensor))


def innermost(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a traceable wrapper is made of; a plain tensor is made of itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:  # pyright: ignore[reportAttributeAccessIssue]
        yield from innermost(getattr(tensor, name))


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
