"""Arena memory, reused between generations.

The pool is memory and has no meaning: it hands out zeroed tensors and takes them back when the
storage that held them is gone. Stable addresses are what a replayed CUDA graph needs; a bounded
pool is what a full GPU needs.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from threading import RLock

import torch
from torch import Tensor

TOKENS = 2  # the dim of an arena that grows
GROWTH_SHARE = 8  # an arena grows by 1/8: doubling would cost the peak memory that packing saves
SMALLEST_GROWTH = 256  # tokens
KEPT_SHARE = 128  # of a GPU's memory, 1/128 may wait for the next generation while a prompt runs
CAPACITY_MULTIPLE = 128  # tokens; whole groups of every group size


def grown_capacity(capacity: int, needed: int) -> int:
    """The next capacity, in tokens, for an arena of ``capacity`` that must hold ``needed``."""
    target = max(needed, capacity + max(capacity // GROWTH_SHARE, SMALLEST_GROWTH))
    return -(-target // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE


Kind = tuple[tuple[int, ...], torch.dtype, torch.device]


def _kind(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Kind:
    """What arenas have in common of which one may stand for another."""
    return (*shape[:TOKENS], *shape[TOKENS + 1 :]), dtype, device


def _kind_of(arena: Tensor) -> Kind:
    return _kind(tuple(arena.shape), arena.dtype, arena.device)


class ArenaPool:
    """Freed arenas by shape, dtype and device; holds no more bytes than ``slack`` times the live
    ones at their peak.

    The same arenas are handed out again in the same order, however they came back: a CUDA graph
    that was recorded on them can be replayed.
    """

    def __init__(self, slack: float = 1.25) -> None:
        self.slack = slack
        self._live_bytes = 0
        self._free_bytes = 0
        self._peak_bytes = 0
        self._made = 0
        self._numbers: dict[int, int] = {}  # of arenas by identity, in the order they were made
        self._free: OrderedDict[int, Tensor] = OrderedDict()  # by identity, the oldest first
        self._kinds: dict[Kind, dict[int, Tensor]] = {}
        self._returned: deque[tuple[Tensor, bool]] = deque()
        self._lock = RLock()

    @property
    def live_bytes(self) -> int:
        """Bytes handed out."""
        self._settle()
        return self._live_bytes

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were handed out at once."""
        return self._peak_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes kept for the next generation."""
        self._settle()
        return self._free_bytes

    def take(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        grows: bool = False,
    ) -> Tensor:
        """A zeroed tensor that may be written under any grad or inference mode.

        One that ``grows`` may have room for more tokens than asked for, if such an arena is free:
        the memory is held anyway, and what grew to that size once is likely to do so again.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._settle()
            same_kind = self._kinds.get(_kind(shape, dtype, device), {})
            fitting = [
                arena
                for arena in same_kind.values()
                if arena.shape == shape or (grows and arena.shape[TOKENS] > shape[TOKENS])
            ]
            if fitting:
                arena = min(fitting, key=self._preference)
                self._remove(arena)
                arena.zero_()
            else:
                arena = self._zeros(shape, dtype, device)
                self._made += 1
                self._numbers[id(arena)] = self._made
            self._live_bytes += arena.nbytes
            self._peak_bytes = max(self._peak_bytes, self._live_bytes)
            self._evict()
        return arena

    def give(self, arena: Tensor, outgrown: bool = False) -> None:
        """Take back an arena that nobody reads any more; one that was ``outgrown`` is freed, since
        the next cache gets the larger one.

        The garbage collector may call this at any moment, also in the middle of ``take``: it only
        leaves a note.
        """
        self._returned.append((arena, outgrown))

    def make_room(self, device: torch.device | None) -> None:
        """Keep little for what may come again on a GPU, because a prompt needs memory now."""
        if device is not None and device.type == "cuda":
            with self._lock:
                self._settle()
                total = torch.cuda.get_device_properties(device).total_memory
                self._shrink_to(total // KEPT_SHARE)

    def clear(self) -> None:
        """Free everything that is not in use."""
        with self._lock:
            self._settle()
            self._shrink_to(0)
            self._peak_bytes = self._live_bytes

    def _preference(self, arena: Tensor) -> tuple[int, int]:
        return arena.nbytes, self._numbers[id(arena)]

    def _settle(self) -> None:
        """Move what came back to what is free."""
        with self._lock:
            while self._returned:
                arena, outgrown = self._returned.popleft()
                self._live_bytes -= arena.nbytes
                if outgrown:
                    del self._numbers[id(arena)]
                    continue
                self._free_bytes += arena.nbytes
                self._free[id(arena)] = arena
                self._kinds.setdefault(_kind_of(arena), {})[id(arena)] = arena

    def _remove(self, arena: Tensor) -> None:
        """Take an arena from what is free."""
        self._free_bytes -= arena.nbytes
        del self._free[id(arena)]
        same = self._kinds[_kind_of(arena)]
        del same[id(arena)]
        if not same:
            del self._kinds[_kind_of(arena)]

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        try:
            return torch.zeros(shape, dtype=dtype, device=device)
        except torch.OutOfMemoryError:
            self._shrink_to(0)
            return torch.zeros(shape, dtype=dtype, device=device)

    def _shrink_to(self, most: int) -> None:
        """Free the oldest until no more than so many bytes are free."""
        while self._free and self._free_bytes > most:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        oldest = next(iter(self._free.values()))
        self._remove(oldest)
        del self._numbers[id(oldest)]

    def _evict(self) -> None:
        self._shrink_to(int(self.slack * self._peak_bytes) - self._live_bytes)


POOL = ArenaPool()
