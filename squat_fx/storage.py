"""The arenas behind a handle: room for packed tokens, and how much of it is written.

A storage holds tokens ``[0, length)``, less those at the front that no handle reads any more.
Several handles may read a part of it each; a lease notes which one a living reader's is, so that an
append knows whom it would disturb, and growing knows what may be dropped instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from squat_fx.codecs import Format, Role
from squat_fx.kernels import kept, ops, reference
from squat_fx.kernels.reference import Arenas, Extent
from squat_fx.pool import GROWTH_SHARE, POOL, TOKENS, grown_capacity

_CHANGES = [0]
MANY_LEASES = 32  # dead ones are dropped when there are so many


def changes() -> int:
    """How often any storage has changed: what is written of it, where it is, or that it is gone.
    As long as that is the same, all are what they were.
    """
    return _CHANGES[0]


class Lease:
    """That a living handle reads the stored tokens ``first`` to ``length`` of a storage."""

    __slots__ = ("__weakref__", "first", "length")

    def __init__(self, length: int, first: int = 0) -> None:
        self.length = length
        self.first = first


class Storage:
    """The arenas of one role of one layer, and how much of them is written.

    Attributes:
        fmt: the stored format.
        role: ``"key"`` or ``"value"``.
        described: both of them.
        length, watermark: see :mod:`squat_fx.kernels.reference`.
        dropped: every row starts at this position or later.
        counted_by: the report that counts it among the live caches.
    """

    counted_by: Any = None

    def __init__(
        self, arenas: Arenas, extent: Extent, fmt: Format, role: Role, dropped: int = 0
    ) -> None:
        self.fmt = fmt
        self.role: Role = role
        self.described = (fmt, role)
        self.length = extent.length
        self.watermark = extent.watermark
        self.dropped = dropped
        self._arenas = dict(zip(fmt.arena_names, arenas.tensors(fmt), strict=True))
        self._leases: list[weakref.ref[Lease]] = []
        self._note_sizes()

    @classmethod
    def outline(cls, dense: Tensor, length: Any, fmt: Format, role: Role) -> Storage:
        """What tracing needs to know of a storage: its dense buffer."""
        storage = cls.__new__(cls)
        storage.fmt, storage.role, storage.length, storage.watermark = fmt, role, length, 0
        storage.dropped = 0
        storage.described = (fmt, role)
        storage._arenas, storage._leases = {"dense": dense}, []
        return storage

    @classmethod
    def pooled(
        cls,
        arenas: Arenas,
        extent: Extent,
        fmt: Format,
        role: Role,
        capacity: int,
        dropped: int = 0,
    ) -> Storage:
        """Copy ``arenas`` into pooled ones with room for ``capacity`` packed tokens."""
        storage = cls(arenas, extent, fmt, role, dropped)
        given, shared = dict(storage._arenas), fmt.stored_layout.shared
        try:
            storage._move_to_pool(capacity)
        except BaseException:
            moved = {n: a for n, a in storage._arenas.items() if a is not given[n]}
            _give_back(moved, shared)
            raise
        weakref.finalize(storage, _give_back, storage._arenas, shared).atexit = False
        return storage

    @property
    def arenas(self) -> Arenas:
        """The tensors, as ops take them."""
        return Arenas.of(self.fmt, self.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The arenas in the order of ``Format.arena_names``."""
        return tuple(self._arenas.values())

    def with_dense(self, dense: Tensor) -> tuple[Tensor, ...]:
        """The same with another buffer of exact tokens."""
        return tuple((self._arenas | {"dense": dense}).values())

    @property
    def extent(self) -> Extent:
        """What is written."""
        return Extent(self.length, self.watermark)

    @property
    def capacity(self) -> int:
        """Packed tokens that fit."""
        return self.capacity_of(self.fmt.packed_names[0])

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the arenas are, and the capacity: what a recorded CUDA graph depends on."""
        if self._addresses is None:
            self._addresses = (self.capacity, *(arena.data_ptr() for arena in self.tensors))
        return self._addresses

    @property
    def nbytes(self) -> int:
        """Bytes of all arenas, spare capacity included."""
        return sum(arena.nbytes for arena in self._arenas.values())

    @property
    def lost_tokens(self) -> bool:
        """Whether tokens of a prompt were left out, so that there is no dense form."""
        return self.fmt.stored_layout.keeps_part and self.dropped > 0

    def __getitem__(self, name: str) -> Tensor:
        return self._arenas[name]

    def __contains__(self, name: str) -> bool:
        return name in self._arenas

    def lease(self, length: int, first: int = 0) -> Lease:
        """Note a living reader of the tokens ``first`` to ``length``."""
        lease = Lease(length, first)
        if len(self._leases) >= MANY_LEASES:
            self._leases = [ref for ref in self._leases if ref() is not None]
        self._leases.append(weakref.ref(lease))
        return lease

    def longest_reader(self, besides: Lease) -> int:
        """Tokens that the other living handles read."""
        return max((lease.length for lease in self._living() if lease is not besides), default=0)

    @property
    def first_read(self) -> int:
        """The first token that a living handle reads."""
        return min((lease.first for lease in self._living()), default=self.dropped)

    def _living(self) -> list[Lease]:
        return [lease for ref in self._leases if (lease := ref()) is not None]

    def fits(self, new_tokens: int) -> bool:
        """Whether ``new_tokens`` more fit, wherever they come to lie."""
        return self.length + new_tokens - self.dropped <= self._room

    def can_drop(self, first: int) -> bool:
        """Whether enough comes before ``first`` to be worth moving what comes after it."""
        return (self._start_for(first) - self.dropped) * GROWTH_SHARE >= self.capacity

    def _start_for(self, first: int) -> int:
        """The latest position from which every row can hold its tokens from ``first`` on."""
        return first - self.fmt.sink_length - reference.drop_step(self.fmt) + 1

    def reserve(self, new_tokens: int) -> None:
        """Grow until ``new_tokens`` more fit: keys and values grow in the same step, whichever of
        them are exact. Where much of what is stored is no longer read, drop that instead.
        """
        if self.fits(new_tokens):
            return
        needed = self.length + new_tokens - self.dropped
        try:
            if self.can_drop(self.first_read):
                self._drop_front(self.first_read)
                needed = self.length + new_tokens - self.dropped
            if not self.fits(new_tokens):
                self._grow(needed)
        except torch.OutOfMemoryError as error:
            error.add_note(
                f"while a cache of {self.role}s with {self.length} tokens grew to hold {needed}; "
                "it is as it was, and may be read, cropped or dropped"
            )
            raise

    def _grow(self, needed: int) -> None:
        first, *others = self.fmt.packed_names
        with torch.inference_mode(False), torch.no_grad():
            if needed > self.capacity_of(first):
                capacity = grown_capacity(self.capacity_of(first), needed)
                self._replace(first, capacity, pooled=True)
            for name in others:
                # Each for itself: memory may have run out before it, and the caller tried again.
                if self.capacity_of(name) != self.capacity:
                    self._replace(name, self.capacity, pooled=True)

    def _drop_front(self, first: int) -> None:
        with torch.inference_mode(False), torch.no_grad():
            reference.drop_front(self.arenas, first, self.fmt)
        self.dropped = self._start_for(first)
        _CHANGES[0] += 1

    def capacity_of(self, name: str) -> int:
        """Tokens that fit into the packed arena ``name``."""
        return self._arenas[name].shape[TOKENS] * self.fmt.tokens_per_slot(name)

    def advance(self, new_tokens: int) -> None:
        """Count ``new_tokens`` more as written; the append itself has happened."""
        self.length, self.watermark = reference.advanced(
            self.length, self.watermark, new_tokens, self.fmt
        )
        _CHANGES[0] += 1

    def append(self, new: Tensor, valid: Tensor | None = None) -> None:
        """Write new tokens, ``[batch, heads, tokens, head_dim]``, and commit them; a write that
        raises changes nothing.
        """
        new_tokens = new.shape[TOKENS]
        self.reserve(new_tokens)
        positions = torch.tensor([[self.length, self.watermark]], device=new.device)
        with torch.inference_mode(False), torch.no_grad():
            dense = written = self["dense"]
            if new_tokens > 1:  # several tokens may reuse ring slots
                written = dense.clone()
            ops.overload("append_", self.fmt.layout)(
                *self.with_dense(written),
                new,
                valid,
                positions,
                0,
                self.fmt.codec,
                self.fmt.to_ints(),
            )
            if written is not dense:
                dense.copy_(written)
        self.advance(new_tokens)

    def check_crop(self, length: int) -> None:
        """Refuse to forget the tokens from ``length`` on.

        Raises:
            ValueError: tokens before it are lost, and not the same ones in all heads.
        """
        if self.lost_tokens:
            kept.check_crop(self.arenas, self.fmt, length)

    def truncate(self, length: int) -> None:
        """Forget all tokens from ``length`` on, in place; see :meth:`check_crop`."""
        self.check_crop(length)
        after = Extent(length, min(self.watermark, length))
        reference.truncate(self.arenas, self.extent, after, self.fmt)
        self.length, self.watermark = after.length, after.watermark
        _CHANGES[0] += 1

    def copy(self, batch: Callable[[Tensor], Tensor] = Tensor.clone) -> Storage:
        """A storage of its own with the same tokens; ``batch`` selects or repeats rows."""
        with torch.inference_mode(False), torch.no_grad():
            shared = self.fmt.stored_layout.shared
            selected = {n: a if n in shared else batch(a) for n, a in self._arenas.items()}
            for name in shared:
                selected[name] = selected[name].to(selected["dense"].device)
            arenas = Arenas.of(self.fmt, tuple(selected.values()))
            return Storage.pooled(
                arenas, self.extent, self.fmt, self.role, self.capacity, self.dropped
            )

    def used(self) -> dict[str, Tensor]:
        """Copies of the arenas by name, without room for more tokens."""
        tokens = max(self.watermark - self.dropped, 0)
        slots = -(-tokens // self.fmt.token_group) * self.fmt.token_group
        used = {}
        for name, arena in self._arenas.items():
            if name in self.fmt.packed_names:
                arena = arena[:, :, : slots // self.fmt.tokens_per_slot(name)]
            used[name] = arena.clone()
        return used

    def dequantize(self, length: int, first: int = 0) -> Tensor:
        """The tokens ``first`` to ``length`` as numbers."""
        positions = torch.tensor([[self.length, self.watermark]], device=self["start"].device)
        op = ops.overload("dequantize", self.fmt.layout)
        return op(*self.tensors, positions, 0, first, length, self.fmt.to_ints())

    def _note_sizes(self) -> None:
        """What follows from the arenas and is asked for at every step."""
        capacities = {self.capacity_of(name) for name in self.fmt.packed_names}
        self._room = capacities.pop() if len(capacities) == 1 else 0
        self._addresses: tuple[int, ...] | None = None
        _CHANGES[0] += 1

    def _move_to_pool(self, capacity: int) -> None:
        first, *others = self.fmt.packed_names
        self._replace(first, capacity, pooled=False)
        for name in others:
            self._replace(name, self.capacity, pooled=False)
        for name in self.fmt.stored_names[len(self.fmt.packed_names) :]:
            old = self._arenas[name]
            self._arenas[name] = POOL.take(tuple(old.shape), old.dtype, old.device)
            self._arenas[name].copy_(old)
        self._note_sizes()

    def _replace(self, name: str, capacity: int, pooled: bool) -> None:
        """Move a packed arena into one with room for ``capacity`` tokens, the first of them maybe
        for more; the old one is given up if it is ``pooled``.
        """
        old = self._arenas[name]
        shape = list(old.shape)
        shape[TOKENS] = capacity // self.fmt.tokens_per_slot(name)
        is_first = name == self.fmt.packed_names[0]
        new = POOL.take(tuple(shape), old.dtype, old.device, grows=is_first)
        kept = min(old.shape[TOKENS], new.shape[TOKENS])
        new[:, :, :kept].copy_(old[:, :, :kept])
        torch._dynamo.maybe_mark_dynamic(new, TOKENS)
        self._arenas[name] = new
        self._note_sizes()
        if pooled:
            POOL.give(old, outgrown=True)


def _give_back(arenas: dict[str, Tensor], shared: tuple[str, ...]) -> None:
    _CHANGES[0] += 1
    for name, arena in arenas.items():
        if name not in shared:
            POOL.give(arena)
