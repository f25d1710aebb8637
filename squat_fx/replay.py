"""Decode steps replayed as CUDA graphs.

A CUDA graph works at the addresses it was recorded with. Arenas and weights stay where they are, so
a recording belongs to a set of their addresses; a cache that grew, or another one, gets a recording
of its own. Other inputs, such as token ids, are copied to where a recording reads them, and what it
returns is copied out, since the next replay writes there.

Inductor could record the graphs it compiles. It looks at every input at every step, and a cache
alone has hundreds; it keeps all recordings for ever; and after some number of recordings it gives
up. Here the caller knows what is where, and old recordings go.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import RLock
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from squat_fx.report import Report

logger = logging.getLogger(__name__)

Copied = dict[int, Tensor]
MOST_RECORDINGS = 8
DEVICE = "cuda"  # where there are such graphs


@dataclass(frozen=True)
class Moving:
    """Which inputs of a call may be elsewhere every time.

    Attributes:
        arguments: those that the caller of the boundary passes, as ``{input: argument}``.
        positions: those that are told what is written.
        others: arguments that are weights, buffers or numbers.
    """

    arguments: Mapping[int, int]
    positions: Sequence[int]
    others: Sequence[int]


def is_number(x: Any) -> bool:
    """Whether something is a number of the host; Dynamo makes tensors of Python's."""
    return not isinstance(x, Tensor) or (x.device.type == "cpu" and x.dim() == 0)


class Whereabouts:
    """Notices if a weight moved, or a number changed."""

    def __init__(self, indices: Sequence[int]) -> None:
        self._indices = list(indices)
        self._tensors: list[int] = []
        self._numbers: list[int] = []
        self._addresses: list[int] = []
        self._weights: list[ref[Tensor]] = []
        self._places: list[int] = []
        self._version = 0

    def key(self, args: Sequence[Any]) -> tuple[Hashable, ...]:
        """Equal to that of an earlier call only if all is where it was then, and as it was."""
        if not self._version:
            self._numbers = [i for i in self._indices if is_number(args[i])]
            self._tensors = [i for i in self._indices if not is_number(args[i])]
        if not self._version or not self._same_addresses(args):
            self._addresses = [0] * len(args)
            for i in self._tensors:
                self._addresses[i] = args[i].data_ptr()
            self._weights = [ref(args[i]) for i in self._tensors]
            self._places = [self._addresses[i] for i in self._tensors]
            self._version += 1
        numbers = (args[i] for i in self._numbers)
        return self._version, *(x.item() if isinstance(x, Tensor) else x for x in numbers)

    def are_where_they_were(self) -> bool:
        """Whether the weights of the last call still exist, where they were."""
        weights = [weight() for weight in self._weights]
        if any(weight is None for weight in weights):
            return False
        return _same_addresses(weights, self._places, list(range(len(weights))))

    def _same_addresses(self, args: Sequence[Any]) -> bool:
        return _same_addresses(args, self._addresses, self._tensors)


def _same_addresses(
    tensors: Sequence[Any], addresses: Sequence[int], indices: Sequence[int]
) -> bool:
    """Whether the tensors at such places are at those of the addresses."""
    # Hundreds of weights; CUDA builds of torch look at them in C++ for their own recordings.
    equal = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
    if equal is not None:
        return equal(list(tensors), addresses, indices)
    return all(tensors[i].data_ptr() == addresses[i] for i in indices)


class Recording:
    """One CUDA graph of a call, with the memory of its copied inputs and of its outputs."""

    def __init__(
        self, call: Callable[[Copied], list[Any]], copied: Mapping[int, Tensor], pool: Any
    ):
        device = torch.device("cuda", torch.cuda.current_device())
        self._inputs = {i: x.to(device, copy=True) for i, x in copied.items()}
        self._graph = torch.cuda.CUDAGraph()
        stream = _recording_stream(device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                self._outputs = call(self._inputs)
            finally:
                self._graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def __call__(self, copied: Mapping[int, Tensor]) -> list[Any]:
        """Replay it on the current stream; the outputs are the caller's."""
        for i, x in copied.items():
            self._inputs[i].copy_(x, non_blocking=True)
        self._graph.replay()
        return [x.clone() if isinstance(x, Tensor) else x for x in self._outputs]


class Replayed:
    """A call that is replayed from the second time on at which it finds everything where it was.

    The first time it runs as it is, which compiles what is not compiled yet and may not happen
    while a graph is recorded; the second time it is recorded before.

    Args:
        report: counts recordings and replays.
        most: recordings that are kept.
    """

    def __init__(self, report: Report, most: int = MOST_RECORDINGS) -> None:
        self._report = report
        self._most = most
        self._found: OrderedDict[Hashable, Recording | None] = OrderedDict()
        self._pool: Any = None
        self._works = True
        self._lock = RLock()

    def __call__(
        self, key: Hashable, copied: Mapping[int, Tensor], call: Callable[[Copied], list[Any]]
    ) -> list[Any]:
        """``call`` on its copied inputs.

        Args:
            key: see :meth:`key`.
            copied: inputs that may be anywhere, by a number.
            call: takes such inputs on the GPU, and returns outputs.
        """
        with self._lock:
            if not self._works or key not in self._found:
                outputs = call(_on_gpu(copied))
                self._remember(key, None)
                return outputs
            recording = self._found[key]
            if recording is None:
                recording = self._record(copied, call)
                if recording is None:
                    return call(_on_gpu(copied))
                self._remember(key, recording)
                self._report.recordings += 1
            self.count(key)
            return recording(copied)

    def key(self, where: Hashable) -> tuple[Any, Hashable]:
        """Of a call on the current stream, which comes first.

        Args:
            where: equal if and only if all that is taken where it is has the same addresses and
                sizes.
        """
        return torch.cuda.current_stream(), where

    def recording(self, key: Hashable) -> Recording | None:
        """What was recorded for calls with such a key."""
        return self._found.get(key)

    def begin(self, recording: Recording, copied: Mapping[int, Tensor]) -> list[Any]:
        """Replay what was recorded; it is not counted before it is asked for."""
        with self._lock:
            return recording(copied)

    def count(self, key: Hashable, begun: bool = False) -> None:
        """Count a replay, which may have ``begun`` early, and keep its recording longest."""
        with self._lock:
            self._report.replays += 1
            self._report.begun += begun
            if key in self._found:
                self._found.move_to_end(key)

    def _record(
        self, copied: Mapping[int, Tensor], call: Callable[[Copied], list[Any]]
    ) -> Recording | None:
        """None if that fails; nothing of it has run then."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            return Recording(call, copied, self._pool)
        except Exception as error:
            self._works = False
            self._found.clear()
            logger.warning(
                "a decode graph runs without CUDA graphs, because recording it failed: %s", error,
                exc_info=True,
            )  # fmt: skip
            return None

    def _remember(self, key: Hashable, recording: Recording | None) -> None:
        if self._works:
            self._found[key] = recording
            while len(self._found) > self._most:
                self._found.popitem(last=False)


@lru_cache(maxsize=16)
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings, since cuBLAS has a workspace for every stream."""
    return torch.cuda.Stream(device)


def _on_gpu(copied: Mapping[int, Tensor]) -> Copied:
    device = torch.device("cuda", torch.cuda.current_device())
    return {i: x.to(device, non_blocking=True) for i, x in copied.items()}
