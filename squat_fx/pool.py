"""Arena memory, reused between generations.

The pool is memory and has no meaning: it hands out zeroed tensors and takes them back when the storage that held them is
gone. Stable addresses are what a replayed CUDA graph needs; a bounded pool is what a full GPU needs.
"""

from __future__ import annotations

from collections import OrderedDict

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
    """Freed arenas by shape, dtype and device; holds no more bytes than ``slack`` times the live ones at their peak."""

    def __init__(self, slack: float = 1.25) -> None:
        self.slack = slack
        self.live_bytes = 0
        self.peak_bytes = 0
        self._free: OrderedDict[int, Tensor] = OrderedDict()

    @property
    def free_bytes(self) -> int:
        """Bytes kept for the next generation."""
        return sum(arena.nbytes for arena in self._free.values())

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A zeroed tensor that may be written under any grad or inference mode."""
        with torch.inference_mode(False), torch.no_grad():
            # A copy, and pop: the garbage collector may run here and give or evict arenas.
            for address, arena in list(self._free.items()):
                fits = arena.shape == shape and arena.dtype == dtype and arena.device == device
                if fits and self._free.pop(address, None) is not None:
                    arena.zero_()
                    break
            else:
                arena = torch.zeros(shape, dtype=dtype, device=device)
        self.live_bytes += arena.nbytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self._evict()
        return arena

    def give(self, arena: Tensor) -> None:
        """Take back an arena that nobody reads any more."""
        self.live_bytes -= arena.nbytes
        self._free[id(arena)] = arena
        self._evict()

    def clear(self) -> None:
        """Free everything that is not in use."""
        self._free.clear()
        self.peak_bytes = self.live_bytes

    def _evict(self) -> None:
        while self._free and self.live_bytes + self.free_bytes > self.slack * self.peak_bytes:
            self._free.popitem(last=False)


POOL = ArenaPool()
