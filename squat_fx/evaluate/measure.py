"""Windows through caches, teacher-forced, one token a call.

Each window is a prompt, fed in one call, and then tokens, fed one by one with ``model(token,
past_key_values=cache)``; the prediction after each is scored against the token that follows in the
text, and compared with that of the untouched model. Windows go through in batches; no row of a
batch depends on its neighbours. Windows of several lengths go through the same compiled model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

import squat_fx
from squat_fx.demo import Advance
from squat_fx.evaluate.attention import Queries, Seen, errors_by_layer
from squat_fx.evaluate.numbers import digits, standard_error
from squat_fx.evaluate.settings import Setting
from squat_fx.evaluate.tasks import Task
from squat_fx.evaluate.texts import Windows
from squat_fx.joined import caches_in


@dataclass(frozen=True)
class Held:
    """What a cache holds at the end of a window.

    Attributes:
        stored, dense: bytes of the layers that are packed, and what the same tokens take densely;
            of all layers if none is.
        effective_bits: bits per element of all tokens, exact ones among them and lost ones, which
            take none, and of what was learned from the prompt or in advance, in half precision and
            without spare capacity.
        packed_bits: bits per element of packed tokens: codes, padding, scales and zero points.
        left: layers that are not packed, if others are.
    """

    stored: int
    dense: int
    dense_bits: int
    effective_bits: float
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
        scores: of the windows of each set.
        held: of the last batch of the first set.
        layers: relative error of attention's output by layer.
        ms_per_token: of a decoding call with a batch of windows.
        tasks: the numbers of each task, by its name.
    """

    name: str
    scores: list[Scores]
    held: Held
    layers: dict[int, float] = field(default_factory=dict)
    ms_per_token: float = 0.0
    seconds: float = 0.0
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)

    def record(self, sets: Sequence[Windows]) -> dict[str, Any]:
        """This row for the json."""
        return {
            "name": self.name,
            "packed_bits": self.held.packed_bits and round(self.held.packed_bits, 4),
            "effective_bits": round(self.held.effective_bits, 3),
            "all_bits": round(self.held.all_bits, 3),
            "cache_bytes": self.held.stored,
            "dense_bytes": self.held.dense,
            "layers_left_alone": self.held.left,
            "ms_per_token": round(self.ms_per_token, 3),
            "seconds": round(self.seconds, 1),
            "attention_error": {str(k): round(v, 5) for k, v in self.layers.items()},
            "tasks": {n: {k: digits(v) for k, v in t.items()} for n, t in self.tasks.items()},
            "texts": records_by_text(self.scores, sets),
        }


@dataclass(frozen=True)
class Scores:
    """Some windows of one setting; standard errors are over windows.

    Attributes:
        nll, kl, top1: fp64 ``[windows, tokens]``, by scored token.
    """

    nll: Tensor
    kl: Tensor
    top1: Tensor

    def __getitem__(self, windows: Sequence[int]) -> Scores:
        chosen = list(windows)
        return Scores(self.nll[chosen], self.kl[chosen], self.top1[chosen])

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


def score(log_probs: Tensor, truth: Tensor, following: Tensor) -> Tensor:
    """Likelihood, divergence and agreement of predictions, fp64 ``[3, ...]``.

    Args:
        log_probs: fp64 ``[..., vocabulary]``.
        truth: likewise, of the untouched model.
        following: int64 ``[...]``, the tokens that came.
    """
    return torch.stack(
        (
            -log_probs.gather(-1, following[..., None])[..., 0],
            (truth.exp() * (truth - log_probs)).sum(-1),
            (truth.argmax(-1) == log_probs.argmax(-1)).double(),
        )
    )


def records_by_text(scores: Sequence[Scores], sets: Sequence[Windows]) -> dict[str, Any]:
    """What the json says of each text at each length of prompt."""
    return {
        windows.label(text): found[rows].record()
        for windows, found in zip(sets, scores, strict=True)
        for text, rows in by_text(windows.texts).items()
    }


def by_text(texts: Sequence[str]) -> dict[str, list[int]]:
    """The windows of each text."""
    return {name: [i for i, t in enumerate(texts) if t == name] for name in dict.fromkeys(texts)}


class Evaluation:
    """Runs settings over the same windows; the first must be the untouched model.

    Args:
        load: makes a fresh model on its device.
        sets: what is fed; bits, bytes and errors by layer are those of the first.
        batch: windows that go through together.
        tasks: what else is done.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        sets: Sequence[Windows],
        batch: int,
        tasks: Sequence[Task] = (),
    ) -> None:
        self._load = load
        self._tasks = tasks
        self._sets = sets
        self._batch = batch
        # Log-probabilities [batch, vocabulary] by step, of each batch of each set.
        self._reference: list[list[list[Tensor]]] = [[] for _ in sets]
        self._is_known = False
        self._seen: dict[int, Seen] = {}
        self._dense: Held | None = None  # the full cache

    @torch.no_grad()
    def run(self, setting: Setting, advance: Advance) -> Row:
        """Measure one setting; ``advance`` is told the share of it that is done.

        Raises:
            ValueError: a setting that packs left every layer alone.
        """
        model = self._load()
        make_cache = setting.prepare(model)
        times: list[float] = []
        started = time.perf_counter()
        held, layers, scores = None, {}, []
        is_reference = not self._is_known
        if is_reference:
            self._reference = [[] for _ in self._sets]
        for windows, reference in zip(self._sets, self._reference, strict=True):
            found = torch.zeros(3, *windows.shape, dtype=torch.float64)
            for number, ids in enumerate(windows.ids.split(self._batch)):
                is_first = held is None
                queries = Queries()
                with queries.of(model if is_reference and is_first else None):
                    if is_reference:
                        reference.append([])
                    decoding = _Decoding(model, make_cache(), ids.to(model.device), times)
                    rows = slice(number * self._batch, number * self._batch + len(ids))
                    for step, log_probs in enumerate(decoding.steps(windows.prompt)):
                        if is_reference:
                            reference[number].append(log_probs)
                        truth = reference[number][step].double()
                        following = decoding.ids[:, windows.prompt + 1 + step]
                        found[:, rows, step] = score(log_probs.double(), truth, following).cpu()
                        done = rows.start * windows.tokens + (step + 1) * len(ids)
                        advance(done / found[0].numel())
                if not is_first:
                    continue
                if is_reference:
                    self._seen = queries.seen(decoding.cache)
                else:
                    layers = errors_by_layer(self._seen, decoding.cache)
                held = hold(decoding.cache, self._dense)
                if setting.packs and held.packed_bits is None:
                    why = "; ".join(str(squat_fx.report(model)).splitlines())
                    raise ValueError(f"no layer of {setting.name} is packed: {why}")
                self._dense = self._dense or held
            scores.append(Scores(*found))
        assert held is not None
        self._is_known = True
        seconds = time.perf_counter() - started
        tasks = {task.name: task.run(model, make_cache, advance) for task in self._tasks}
        ms = 1e3 * median(times)
        return Row(setting.name, scores, held, layers, ms, seconds, tasks)


class _Decoding:
    """Windows ``ids`` through a cache, token by token; ``times`` gets the seconds of each step."""

    def __init__(self, model: Any, cache: Any, ids: Tensor, times: list[float]) -> None:
        self.ids = ids
        self.cache = cache
        self._model = model
        self._times = times

    def steps(self, prompt: int) -> Iterator[Tensor]:
        """Log-probabilities after each token behind the prompt, fp32 ``[batch, vocabulary]``."""
        self.cache = self._model(
            self.ids[:, :prompt], past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).past_key_values
        for token in self.ids[:, prompt:-1].split(1, dim=1):
            _settle(self.ids.device)
            started = time.perf_counter()
            logits = self._model(token, past_key_values=self.cache).logits[:, -1]
            _settle(self.ids.device)
            self._times.append(time.perf_counter() - started)
            yield logits.double().log_softmax(-1).float()


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
        held = [x for tensors in layers for x in tensors]
        stored = sum(map(stored_bytes, held))
        halves = sum(8 * min(x.itemsize, 2) * x.numel() for y in held for x in innermost(y))
        if dense is not None:
            elements = dense.dense * 8 / dense.dense_bits
            return Held(stored, dense.dense, dense.dense_bits, halves / elements)
        return Held(stored, stored, 8 * max((x.itemsize for x in held), default=2), 16)
    return Held(
        stored=sum(stored_bytes(x) for x in packed),
        dense=sum(x.numel() * x.element_size() for x in packed),
        dense_bits=8 * packed[0].element_size(),
        effective_bits=effective_bits(packed),
        packed_bits=mean(x.format.packed_bits_per_element() for x in packed),
        left=sum(not any(isinstance(x, squat_fx.QuantizedKV) for x in t) for t in layers),
    )


def effective_bits(handles: Sequence[squat_fx.QuantizedKV]) -> float:
    """See :class:`Held`."""
    bits, elements = 0.0, 0
    for handle in handles:
        storage, fmt = handle._storage, handle.format
        tokens = handle.shape[2]  # a sliding window has forgotten the first ones
        numbers = handle.numel() // tokens  # of a token
        start = int(storage["start"].min())
        sinks = start + fmt.sink_length
        end = sinks + storage.extent.packed(start, fmt)
        # Where tokens are lost, they come before the start; the sinks are there.
        first = start if storage.lost_tokens else storage.length - tokens
        exact = storage.length - end + max(sinks - first, 0)
        bits += numbers * (storage.length - first - exact) * fmt.packed_bits_per_element()
        bits += numbers * 16 * exact
        bits += sum(8 * storage[name].nbytes for name in fmt.stored_layout.fixed)
        elements += handle.numel()
    return bits / elements


def _distinct_tensors(nested: Any) -> list[Tensor]:
    tensors = (x for x in pytree.tree_leaves(nested) if isinstance(x, Tensor))
    return list({id(part): part for x in tensors for part in caches_in(x)}.values())


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
