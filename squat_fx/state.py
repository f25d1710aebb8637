"""The carrier: keys or values between two calls, packed, and for everyone else a tensor.

A :class:`QuantizedKV` tells the truth about the dense tensor it stands for (``shape``, ``dtype``,
``device``), and every operation on it is right: appending, cropping, batch selection and attention
stay packed, everything else dequantizes, or raises where tokens of a prompt were left out. So a
cache object, a beam search or a piece of code that was never compiled can hold one without knowing
it.

Several handles may share one :class:`~squat_fx.storage.Storage`: each is a part of it, a prefix or
a window, and an append that would disturb another living handle copies first. Tokens appended
eagerly stay ``pending``, exact, until the handle is next appended to, which is what the compiled
path does with the tokens of a call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from squat_fx.codecs import Format, Role, codec_from_spec
from squat_fx.kernels import ops, reference
from squat_fx.kernels.kept import begins_at
from squat_fx.kernels.reference import Arenas, Extent
from squat_fx.layouts import PAIRS
from squat_fx.layouts.kept import MOVED, beneath
from squat_fx.packed import PackedTensor
from squat_fx.pool import grown_capacity
from squat_fx.storage import TOKENS, Lease, Storage

aten = torch.ops.aten


NOTHING_TO_ENTER = contextlib.nullcontext()


class QuantizedKV(PackedTensor):
    """Packed keys or values that look like the dense ``[batch, num_kv_heads, seq_len, head_dim]``.

    Made by a rewritten graph, by :meth:`from_dense`, or by operating on another one; never empty.
    """

    _storage: Storage
    _pending: Tensor | None
    _lease: Lease
    token_dim: ClassVar[int] = TOKENS

    @staticmethod
    def __new__(
        cls, storage: Storage, length: int, pending: Tensor | None = None, first: int = 0
    ) -> QuantizedKV:
        """The tokens ``first`` to ``length`` of ``storage``, the ``pending`` ones counted."""
        dense = storage["dense"]
        shape = [dense.shape[0], dense.shape[1], dense.shape[1], dense.shape[3]]
        shape[cls.token_dim] = length - first
        # An inference tensor is no base of views: autograd would make a crop hold on to the longer
        # handle, and mark it.
        is_fake = type(dense) is FakeTensor
        is_set = is_fake or torch.is_inference_mode_enabled()
        with NOTHING_TO_ENTER if is_set else torch.inference_mode():
            handle = Tensor._make_wrapper_subclass(
                cls, tuple(shape), dtype=dense.dtype, device=dense.device
            )
        handle._storage = storage
        handle._pending = pending
        if not is_fake:
            stored = length - (0 if pending is None else pending.shape[TOKENS])
            handle._lease = storage.lease(stored, first)
            mark_dynamic(handle, cls.token_dim)
        return handle

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def from_dense(
        cls,
        x: Tensor,
        fmt: Format,
        role: Role,
        valid: Tensor | None = None,
        query: Tensor | None = None,
        given: Tensor | None = None,
        keys: QuantizedKV | None = None,
    ) -> QuantizedKV:
        """Pack ``x`` ``[batch, heads, tokens, head_dim]``.

        Args:
            x, fmt, role: what to store, and how.
            valid: bool ``[batch, tokens]``, False for padding.
            query: ``[batch, num_heads, tokens, head_dim]``, for codecs that look at the queries of
                a prompt.
            given: what the layout is given. If ``fmt.latent``: the calibrated basis and its
                inverse, fp32 ``[2, heads, head_dim, head_dim]``. In ``latent/rope``: the angle by
                which each pair of channels turns from token to token, in radians.
            keys: for values of which a part is kept, their keys, which say which; without them, or
                for keys without ``query``, all tokens are kept.

        Raises:
            ValueError: ``x`` does not fit ``fmt``, or ``keys`` have nothing to say.
        """
        if x.dim() != 4 or x.shape[3] != fmt.head_dim:
            raise ValueError(
                f"expected [batch, heads, tokens, {fmt.head_dim}] to pack, got {tuple(x.shape)}"
            )
        with torch.inference_mode(False), torch.no_grad():
            kept = () if keys is None else (_choice_of(keys, fmt),)
            arenas = ops.overload("store", fmt.layout)(
                x, valid, query, given, role, fmt.codec, fmt.to_ints(), *kept
            )
            return cls.from_arenas(arenas, x.shape[TOKENS], fmt, role, given)

    @classmethod
    def from_arenas(
        cls,
        arenas: Sequence[Tensor],
        length: int,
        fmt: Format,
        role: Role,
        given: Tensor | None = None,
        grows: bool = True,
    ) -> QuantizedKV:
        """A handle over what the op ``store`` returned for ``length`` tokens; there is room for
        more if it ``grows``.
        """
        made = dict(zip(fmt.stored_names, arenas, strict=True))
        layout = fmt.stored_layout
        for name in layout.shared:
            made[name] = layout.empty_fixed(fmt, name, made["dense"]) if given is None else given
        extent = Extent(0, 0).after(length, fmt)
        stored = Arenas.of(fmt, tuple(made[name] for name in fmt.arena_names))
        first = fmt.packed_names[0]
        dropped = begins_at(made[first].shape[TOKENS] * fmt.tokens_per_slot(first), extent, fmt)
        room = length - dropped
        capacity = grown_capacity(room, 0) if grows else grown_capacity(0, room)
        return cls(Storage.pooled(stored, extent, fmt, role, capacity, dropped), length)

    # what the handle is ---------------------------------------------------------------------------

    @property
    def format(self) -> Format:
        """The stored format."""
        return self._storage.fmt

    @property
    def role(self) -> Role:
        """``"key"`` or ``"value"``."""
        return self._storage.role

    @property
    def storage_nbytes(self) -> int:
        """Bytes held: arenas with their spare capacity, exact tokens and tokens not yet written."""
        return self._storage.nbytes + (0 if self._pending is None else self._pending.nbytes)

    def dequantize(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The dense tensor, ``[batch, heads, seq_len, head_dim]``; zeros where padding was not
        stored.
        """
        stored = self._storage.dequantize(self._lease.length, self._lease.first)
        return stored if self._pending is None else torch.cat([stored, self._pending], TOKENS)

    @property
    def has_pending(self) -> bool:
        """Whether tokens that were appended eagerly are not yet written to the storage."""
        return self._pending is not None

    @property
    def first(self) -> int:
        """Where a window begins: the first of the storage's tokens that this handle reads."""
        return self._lease.first

    def from_its_first(self) -> QuantizedKV:
        """The same tokens in a storage that begins with them; what is packed is rounded again."""
        given = self.format.stored_layout.given
        kept = None if given is None else self._storage[given]
        return self.from_dense(self.dequantize(), self.format, self.role, given=kept)

    def writable_storage(self, new_tokens: int = 0) -> Storage:
        """The storage, with this handle as its newest reader and nothing pending: append in place
        the ``new_tokens`` for which there is room.

        Copies if another living handle reads tokens that this one does not have; truncates in place
        if none does.
        """
        storage = self._storage
        is_newest = self._pending is None and self._lease.length == storage.length
        if is_newest and storage.fits(new_tokens):
            return storage
        self._own(self._lease.length)
        if self._pending is not None:
            self._reserve(self._pending.shape[TOKENS])
            self._storage.append(self._pending)
            self._pending, self._lease.length = None, self._storage.length
        self._reserve(new_tokens)
        return self._storage

    def _own(self, length: int) -> None:
        storage = self._storage
        if storage.length == length:
            return
        if storage.longest_reader(besides=self._lease) > length:
            storage = self._move_to_copy()
        storage.truncate(length)

    def _reserve(self, new_tokens: int) -> None:
        storage = self._storage
        if storage.fits(new_tokens):
            return
        if storage.can_drop(self.first) and not storage.can_drop(storage.first_read):
            # Another reader holds on to what left this window, and that would never end.
            storage = self._move_to_copy()
        storage.reserve(new_tokens)

    def _move_to_copy(self) -> Storage:
        self._storage = storage = self._storage.copy()
        self._lease = storage.lease(self._lease.length, self._lease.first)
        return storage

    # the traceable wrapper protocol ---------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        # Dynamo guards on each tensor at every call, and what is packed never looks different.
        return ["dense"], self._storage.described

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: Any, size: Any, stride: Any
    ) -> QuantizedKV:
        length = size[cls.token_dim]
        return cls(Storage.outline(inner["dense"], length, *context), length)

    @property
    def dense(self) -> Tensor:
        """The exact tokens, which Dynamo asks for by this name.

        No ``__getattr__``: Dynamo's guards ask every handle at every call for four attributes that
        it does not have.
        """
        return self._storage["dense"]

    @classmethod
    def _outlined(cls, func: Any, *args: Any, **kwargs: Any) -> Any:
        return _fake_cat(*args, **kwargs) if func is aten.cat.default else NotImplemented

    @classmethod
    def _stay_packed(cls, func: Any, *args: Any, **kwargs: Any) -> Any:
        packed = PACKED_OPS.get(func)
        return NotImplemented if packed is None else packed(func, *args, **kwargs)

    def repeat_interleave(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, repeats: Any, dim: int | None = None, *, output_size: int | None = None
    ) -> Tensor:
        """``Tensor.repeat_interleave``; under autograd torch writes it with ``expand``, which would
        not stay packed.
        """
        if not _is_dim(dim, 0):
            return super().repeat_interleave(repeats, dim, output_size=output_size)
        rows = torch.arange(self.shape[0], device=self.device)
        return self.index_select(0, rows.repeat_interleave(repeats, output_size=output_size))

    # copies ---------------------------------------------------------------------------------------

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        fmt = self._storage.fmt
        return (
            f"QuantizedKV({self.role}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device={self.device}, codec={fmt.codec!r}, {self.storage_nbytes} bytes)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedKV:
        if id(self) not in memo:
            memo[id(self)] = self._copied()
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, self.to_state()

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything about it, for :meth:`from_state`: arenas by name without their spare
        capacity, and numbers and strings.
        """
        storage = self.writable_storage()
        fmt = storage.fmt
        state = {
            "layout": fmt.layout,
            "codec": fmt.codec,
            "format": fmt.to_ints(),
            "role": storage.role,
            "length": storage.length,
            "watermark": storage.watermark,
            "dropped": storage.dropped,
            "first": self.first,
            "token_dim": self.token_dim,
        }
        return storage.used(), state

    @classmethod
    def from_state(cls, arenas: Mapping[str, Tensor], state: Mapping[str, Any]) -> QuantizedKV:
        """Undo :meth:`to_state`, in memory of its own.

        Raises:
            ValueError: the codec is not known here, or arenas are missing or do not fit.
        """
        fmt = Format.from_ints(state["layout"], state["codec"], list(state["format"]))
        codec_from_spec(fmt.codec)
        if missing := [name for name in fmt.arena_names if name not in arenas]:
            raise ValueError(
                f"the arenas {', '.join(missing)} of layout {fmt.layout!r} are missing"
            )
        stored = Arenas.of(fmt, tuple(arenas[name] for name in fmt.arena_names))
        extent = Extent(state["length"], state["watermark"])
        dropped = state["dropped"]
        _check_arenas(stored, extent, dropped, fmt)
        first_kept = 0 if fmt.stored_layout.keeps_part else dropped  # lost tokens still count
        if not first_kept <= state["first"] < max(extent.length, 1):
            raise ValueError(f"a window begins at {state['first']} of {extent.length} tokens")
        capacity = grown_capacity(extent.length - dropped, 0)
        storage = Storage.pooled(stored, extent, fmt, state["role"], capacity, dropped)
        kind = HANDLE_TYPES[state["token_dim"]]
        return kind(storage, extent.length, first=state["first"])

    def _copied(self, batch: Callable[[Tensor], Tensor] = Tensor.clone) -> QuantizedKV:
        """A handle with a storage of its own; ``batch`` selects or repeats rows."""
        source = self.writable_storage()
        return type(self)(source.copy(batch), source.length, first=self.first)


HANDLE_TYPES: dict[int, type[QuantizedKV]] = {TOKENS: QuantizedKV}
"""The carriers by the dim of their tokens; :mod:`squat_fx.token_major` adds one."""


def _fake_cat(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    """The fake ``cat`` of a handle and new tokens; ``NotImplemented`` where that
    is for torch to judge.

    Torch compares sizes that are symbols one by one, which takes longer than all else that is
    traced of a cache.
    """
    first, *others = tensors
    if type(first) is not QuantizedKV or not _is_dim(dim, TOKENS) or len(others) != 1:
        return NotImplemented
    dense, new = first._storage["dense"], others[0]
    if new.dim() != 4 or new.dtype != dense.dtype or new.device != dense.device:
        return NotImplemented
    sizes = [(dense.shape[i], new.shape[i]) for i in (0, 1, 3)]
    if not all(type(a) is type(b) is int and a == b for a, b in sizes):
        return NotImplemented
    shape = list(first.shape)
    shape[TOKENS] = _common_size(first.shape[TOKENS]) + new.shape[TOKENS]
    return dense.new_empty(shape)


_SIZES: WeakKeyDictionary[Any, dict[int, Any]] = WeakKeyDictionary()


def _common_size(size: Any) -> Any:
    """A size that is a symbol, or another in the same trace that is as large, which is guarded.

    All layers of a cache are equally long. If each had a symbol of its own, torch would work out
    the shapes of every layer anew (of 32 layers, 3 of 7 seconds of tracing a step with torch 2.11),
    and hand over each at every step.
    """
    if not isinstance(size, torch.SymInt) or size.node.hint is None:
        return size
    common = _SIZES.setdefault(size.node.shape_env, {}).setdefault(size.node.hint, size)
    return common if common is size or common == size else size


def mark_dynamic(handle: Tensor, dim: int) -> None:
    """Let Dynamo know that the dim ``dim`` of a handle varies.

    ``maybe_mark_dynamic(handle)`` would mark every arena again at every step, also those that never
    grow.
    """
    marks, (dims, others) = vars(handle), _marks_of_a_tensor(dim)
    marks.update(others)
    for name in dims:
        marks[name] = {dim}


@lru_cache(maxsize=8)
def _marks_of_a_tensor(dim: int) -> tuple[tuple[str, ...], dict[str, Any]]:
    """What marks a dim of a tensor: attributes that are sets of dims, each tensor's own, and
    others.
    """
    marked = torch.empty((1,) * (dim + 1))
    torch._dynamo.maybe_mark_dynamic(marked, dim)
    found = vars(marked)
    dims = tuple(name for name, value in found.items() if isinstance(value, set))
    assert all(found[name] == {dim} for name in dims)
    return dims, {name: value for name, value in found.items() if name not in dims}


def _choice_of(keys: QuantizedKV, fmt: Format) -> Tensor:
    """What says which tokens ``keys`` keep, for values of ``fmt``."""
    if not (keys.format.stored_layout.keeps_part and fmt.stored_layout.keeps_part):
        raise ValueError(
            "keys say which tokens to keep where both layouts keep a part of a prompt, got "
            f"{keys.format.layout!r} and {fmt.layout!r}; leave keys out"
        )
    return keys._storage[MOVED]


def _check_arenas(stored: Arenas, extent: Extent, dropped: int, fmt: Format) -> None:
    """Kernels read where these numbers say, whoever wrote the file that they come from.

    Raises:
        ValueError: an arena is not what the format and the extent say.
    """
    (batch, heads), dense, layout = stored.dense.shape[:2], stored.dense, fmt.stored_layout
    wanted = fmt.constant_shapes(batch, heads)
    rooms = []
    for name, arena in zip(fmt.packed_names, stored.packed, strict=True):
        wanted[name] = (batch, heads, arena.shape[TOKENS], fmt.last_dim(name))
        rooms.append(arena.shape[TOKENS] * fmt.tokens_per_slot(name))
    for name, arena in zip(fmt.arena_names, stored.tensors(fmt), strict=True):
        dtype = fmt.arena_dtype(name, dense.dtype)
        if name != layout.given and (arena.shape, arena.dtype) != (wanted[name], dtype):
            raise ValueError(
                f"the arena {name} of layout {fmt.layout!r} is {arena.dtype} "
                f"{tuple(arena.shape)}, not {dtype} {tuple(wanted[name])}"
            )
    first, last = (int(stored.start.amin()), int(stored.start.amax())) if batch else (dropped, 0)
    if not 0 <= dropped <= first or max(last, extent.watermark) > extent.length:
        raise ValueError(f"rows of {extent.length} tokens begin at {first} to {last}")
    if extent.packed(first, fmt) > min(rooms):
        raise ValueError(f"{extent.packed(first, fmt)} packed tokens have room for {min(rooms)}")


def _rebuild(arenas: Mapping[str, Tensor], state: Mapping[str, Any]) -> QuantizedKV:
    return QuantizedKV.from_state(arenas, state)


torch.serialization.add_safe_globals([_rebuild])  # it takes tensors and plain values


def _is_dim(dim: int | None, which: int) -> bool:
    """Whether ``dim`` of a 4-D tensor means ``which``."""
    return dim in (which, which - 4)


# operations that stay packed ----------------------------------------------------------------------
# Each takes the op and its arguments, and returns NotImplemented to be dequantized after all.


def _cat(func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    first, *rest = tensors
    if not _is_dim(dim, TOKENS) or not isinstance(first, QuantizedKV) or not rest:
        return NotImplemented
    if any(isinstance(x, QuantizedKV) or not _appendable(x, first) for x in rest):
        return NotImplemented
    new = torch.cat(rest, TOKENS) if len(rest) > 1 else rest[0]
    if new.shape[TOKENS] == 0:
        return _alias(func, first)
    storage = first.writable_storage()
    with torch.inference_mode(False), torch.no_grad():
        new = new.to(first.dtype).clone()
        return QuantizedKV(storage, storage.length + new.shape[TOKENS], new, first.first)


def _appendable(new: Tensor, first: QuantizedKV) -> bool:
    """Whether ``cat([first, new])`` on the tokens exists and has the dtype of ``first``."""
    return (
        new.dim() == 4
        and (new.shape[0], new.shape[1], new.shape[3])
        == (first.shape[0], first.shape[1], first.shape[3])
        and new.device == first.device
        and torch.promote_types(new.dtype, first.dtype) == first.dtype
    )


def _alias(func: Any, x: QuantizedKV, *args: Any, **kwargs: Any) -> QuantizedKV:
    return QuantizedKV(x._storage, x.first + x.shape[TOKENS], x._pending, x.first)


def _slice(
    func: Any,
    x: QuantizedKV,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    size = x.shape[dim]
    first, last, stride = slice(start, end, step).indices(size)
    if stride == 1 and (first, last) == (0, size):
        return _alias(func, x)
    if dim % 4 == 0 and last > first:
        return x._copied(lambda arena: func(arena, 0, start, end, step).clone())
    if dim % 4 != TOKENS or stride != 1 or not first < last:
        return NotImplemented
    if first and x.format.stored_layout.keeps_part:
        return NotImplemented  # what lost tokens has no window
    if last == size:
        return _window(x, first)
    storage = x.writable_storage()
    storage.check_crop(x.first + last)
    return QuantizedKV(storage, x.first + last, first=x.first + first)


def _window(x: QuantizedKV, hidden: int) -> QuantizedKV:
    """``x`` without its first ``hidden`` tokens."""
    stored, first = x._lease.length, x.first + hidden
    if x._pending is None or first <= stored:
        return QuantizedKV(x._storage, x.first + x.shape[TOKENS], x._pending, first)
    pending = x._pending[:, :, first - stored :].clone()
    return QuantizedKV(x._storage, stored + pending.shape[TOKENS], pending, stored)


def _narrow(func: Any, x: QuantizedKV, dim: int, start: Any, length: int) -> Any:
    if not isinstance(start, int) or not 0 <= start <= start + length <= x.shape[dim]:
        return NotImplemented
    return _slice(aten.slice.Tensor, x, dim, start, start + length)


def _index_select(func: Any, x: QuantizedKV, dim: int, index: Tensor) -> Any:
    return x._copied(lambda arena: func(arena, 0, index)) if _is_dim(dim, 0) else NotImplemented


def _index(func: Any, x: QuantizedKV, indices: Sequence[Tensor | None]) -> Any:
    if (
        not isinstance(x, QuantizedKV)
        or indices[0] is None
        or any(i is not None for i in indices[1:])
    ):
        return NotImplemented
    if indices[0].dim() != 1:
        return NotImplemented
    return x._copied(lambda arena: func(arena, [indices[0]]))


def _repeat_interleave(
    func: Any, x: QuantizedKV, repeats: Any, dim: int | None = None, **kwargs: Any
) -> Any:
    if not _is_dim(dim, 0):
        return NotImplemented
    return x._copied(lambda arena: func(arena, repeats, 0, **kwargs))


def _clone(func: Any, x: QuantizedKV, **kwargs: Any) -> QuantizedKV:
    return x._copied()


def _to_copy(
    func: Any, x: QuantizedKV, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any
) -> Any:
    """``x.to(...)``: parameters keep their precision, the dense tokens take ``dtype``."""
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    source = x.writable_storage()
    old = x.dtype

    def convert(arena: Tensor) -> Tensor:
        is_dense = arena is source["dense"] or beneath(source.fmt).layout == "dense"
        target = dtype if is_dense and arena.dtype == old else None
        return arena.to(device=device, dtype=target, copy=True)

    return x._copied(convert)


def _to(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The overloads of ``to``, which arrive whole under inference mode."""
    if not isinstance(x, QuantizedKV):
        return NotImplemented
    given = dict(zip((a.name for a in func._schema.arguments[1:]), args, strict=False)) | kwargs
    like = given.get("other", x)
    dtype = given.get("dtype") or like.dtype
    device = torch.device(given.get("device") or like.device)
    if (dtype, device) == (x.dtype, x.device) and not given.get("copy"):
        return x
    return _to_copy(func, x, dtype, device)


def _sdpa(
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> Any:
    """Attend to packed keys and values, the pending tokens beside them."""
    if isinstance(query, QuantizedKV) or not (
        isinstance(key, QuantizedKV) and isinstance(value, QuantizedKV)
    ):
        return NotImplemented
    for handle in (key, value):
        if handle._storage.lost_tokens:
            handle.writable_storage()
        if handle._lease.length != handle._storage.length:
            return NotImplemented  # an older reader: its prefix is dequantized
    pair = key.format.layout, value.format.layout
    if pair not in PAIRS:
        return NotImplemented
    if key.first != value.first:
        return NotImplemented
    rows = [(h._storage.length, h._storage.watermark) for h in (key, value)]
    positions = torch.tensor([*rows, (key.first, 0)], device=query.device)
    return ops.overload("attend", *pair)(
        query,
        key._pending,
        value._pending,
        *key._storage.tensors,
        *value._storage.tensors,
        positions,
        0,
        1,
        2 if key.first else -1,
        mask,
        None,
        query.shape[-1] ** -0.5 if scale is None else scale,
        reference.TOP_LEFT if causal else reference.NO_CAUSALITY,
        0.0,
        key.format.to_ints(),
        value.format.to_ints(),
    )


def _sdpa_composite(
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if dropout_p or (query.shape[1] != key.shape[1] and not enable_gqa):
        return NotImplemented
    return _sdpa(func, query, key, value, attn_mask, is_causal, scale)


def _sdpa_cpu(
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    out = _sdpa(func, query, key, value, attn_mask, is_causal, scale)
    return (
        out
        if out is NotImplemented
        else (out, query.new_zeros(query.shape[:3], dtype=torch.float32))
    )


PACKED_OPS: dict[Any, Callable[..., Any]] = {
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.narrow.default: _narrow,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.repeat_interleave.self_Tensor: _repeat_interleave,
    aten.clone.default: _clone,
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.contiguous.default: _alias,
    aten.lift_fresh.default: _alias,
    aten._to_copy.default: _to_copy,
    aten.to.dtype: _to,
    aten.to.device: _to,
    aten.to.dtype_layout: _to,
    aten.to.other: _to,
    aten.scaled_dot_product_attention.default: _sdpa_composite,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _sdpa_cpu,
}
