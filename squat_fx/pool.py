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

GROWTH_SHARE = 8  # an arena grows by 1/8: doubling would cost the peak memory that packing saves
SMALLEST_GROWTH = 256  # tokens
CAPACITY_MULTIPLE = 128  # tokens; whole groups of every group size


def grown_capacity(capacity: int, needed: int) -> int:
    """The next capacity, in tokens, for an arena of ``capacity`` that must hold ``needed``."""
    target = max(needed, capacity + max(capacity // GROWTH_SHARE, SMALLEST_GROWTH))
    return -(-target // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE


class ArenaPool:
    """Freed arenas by shape, dtype and device; holds no more bytes than ``slack`` times the live
    ones at their peak.
    """

    def __init__(self, slack: float = 1.25) -> None:
        self.slack = slack
        self._live_bytes = 0
        self._peak_bytes = 0
        self._free: OrderedDict[int, Tensor] = OrderedDict()
        self._returned: deque[Tensor] = deque()
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
        with self._lock:
            self._settle()
            return sum(arena.nbytes for arena in self._free.values())

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A zeroed tensor that may be written under any grad or inference mode."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._settle()
            for address, arena in self._free.items():
                if arena.shape == shape and arena.dtype == dtype and arena.device == device:
                    del self._free[address]
                    arena.zero_()
                    break
            else:
                arena = torch.zeros(shape, dtype=dtype, device=device)
            self._live_bytes += arena.nbytes
            self._peak_bytes = max(self._peak_bytes, self._live_bytes)
            self._evict()
        return arena

    def give(self, arena: Tensor) -> None:
        """Take back an arena that nobody reads any more.

        The garbage collector may call this at any moment, also in the middle of ``take``: it only
        leaves a note.
        """
        self._returned.append(arena)

    def clear(self) -> None:
        """Free everything that is not in use."""
        with self._lock:
            self._settle()
            self._free.clear()
            self._peak_bytes = self._live_bytes

    def _settle(self) -> None:
        """Move what came back to what is free."""
        with self._lock:
            while self._returned:
                arena = self._returned.popleft()
                self._live_bytes -= arena.nbytes
                self._free[id(arena)] = arena

    def _evict(self) -> None:
        while self._free and self.free_bytes + self._live_bytes > self.slack * self._peak_bytes:
            self._free.popitem(last=False)


POOL = ArenaPool()
