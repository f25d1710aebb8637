"""Several caches in one tensor: all layers stacked, keys and values fused.

Where a model keeps ``[layers, 2, B, H, T, D]`` or ``[B, T, 2 H D]``, each cache in it is packed for
itself, and a :class:`JoinedKV` stands for the whole: it knows where each of them is
(:mod:`squat_fx.lenses`). What selects one of them gives its handle; what appends, crops or selects
of the batch does so in each; everything else dequantizes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from squat_fx.lenses import Join, Step, view_through
from squat_fx.packed import PackedTensor
from squat_fx.state import QuantizedKV, mark_dynamic
from squat_fx.storage import Storage
from squat_fx.token_major import handle_type

aten = torch.ops.aten


class JoinedKV(PackedTensor):
    """One tensor that is put together from caches, at least one of them packed.

    Attributes:
        join: how.
        parts: the caches: handles, and dense tensors where one is not packed. Empty while Dynamo
            traces.
    """

    join: Join
    parts: tuple[Tensor, ...]
    _about: tuple[Any, ...]

    @staticmethod
    def __new__(cls, parts: Sequence[Tensor], join: Join) -> JoinedKV:
        """The tensor of which ``parts`` are the parts."""
        first = next(x for x in parts if isinstance(x, QuantizedKV))
        made = cls._of_shape(join.shape(parts), first.dense)
        made.join, made.parts, made.dense = join, tuple(parts), first.dense
        made._about = (join, *(_described(x) for x in parts))
        mark_dynamic(made, join.token_dim)
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def _of_shape(cls, shape: Sequence[Any], like: Tensor) -> JoinedKV:
        is_set = type(like) is FakeTensor or torch.is_inference_mode_enabled()
        with contextlib.nullcontext() if is_set else torch.inference_mode():
            return Tensor._make_wrapper_subclass(
                cls, tuple(shape), dtype=like.dtype, device=like.device
            )

    @property
    def storage_nbytes(self) -> int:
        """Bytes held by all parts."""
        return sum(
            x.storage_nbytes if isinstance(x, PackedTensor) else x.nbytes for x in self.parts
        )

    def dequantize(self) -> Tensor:
        """The dense tensor."""
        dense = [x.dequantize() if isinstance(x, PackedTensor) else x for x in self.parts]
        return self.join.joined(dense)

    def outlines(self) -> tuple[Tensor, ...]:
        """While Dynamo traces: outlines of the parts."""
        parts = self.join.parts(self.dense.new_empty(self.shape))
        return tuple(
            part if about is None else _outline(part, *about)
            for part, about in zip(parts, self._about[1:], strict=True)
        )

    # the traceable wrapper protocol

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["dense"], self._about

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: Any, size: Any, stride: Any
    ) -> JoinedKV:
        made = cls._of_shape(size, inner["dense"])
        made.join, made.parts, made.dense, made._about = context[0], (), inner["dense"], context
        return made

    @classmethod
    def _stay_packed(cls, func: Any, *args: Any, **kwargs: Any) -> Any:
        operation = _OPS.get(func)
        return NotImplemented if operation is None else operation(func, *args, **kwargs)

    def repeat_interleave(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, repeats: Any, dim: int | None = None, *, output_size: int | None = None
    ) -> Tensor:
        """``Tensor.repeat_interleave``; see :meth:`QuantizedKV.repeat_interleave`."""
        if dim is None or dim % self.dim() != self.join.batch_dim:
            return super().repeat_interleave(repeats, dim, output_size=output_size)
        rows = torch.arange(self.shape[dim], device=self.device)
        return self.index_select(dim, rows.repeat_interleave(repeats, output_size=output_size))

    # copies

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (
            f"JoinedKV(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"{len(self.parts)} caches, {self.storage_nbytes} bytes)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> JoinedKV:
        if id(self) not in memo:
            memo[id(self)] = JoinedKV([copy.deepcopy(x, memo) for x in self.parts], self.join)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        join = self.join
        return _rebuild, (self.parts, join.lenses, join.sizes, join.token_dim)


def _rebuild(parts: Sequence[Tensor], lenses: Any, sizes: Any, token_dim: int) -> JoinedKV:
    return JoinedKV(parts, Join(lenses, sizes, token_dim))


torch.serialization.add_safe_globals([_rebuild])


def join_parts(parts: Sequence[Tensor], join: Join) -> Tensor:
    """One tensor from caches: packed if one of them is."""
    if any(isinstance(x, QuantizedKV) for x in parts):
        return JoinedKV(parts, join)
    return join.joined(parts)


def parts_of(x: Tensor, join: Join) -> tuple[Tensor, ...]:
    """The caches in a tensor, packed or not."""
    if not isinstance(x, JoinedKV):
        return join.parts(x)
    order = join.order_in(x.join)
    return join.parts(x.dequantize()) if order is None else tuple(x.parts[i] for i in order)


def caches_in(x: Tensor) -> tuple[Tensor, ...]:
    """The caches that a tensor is put together from; the tensor itself if it is one."""
    return x.parts if isinstance(x, JoinedKV) else (x,)


def _described(part: Tensor) -> Any:
    """What tracing has to know of a part: format, role and dim of tokens of a handle."""
    return (*part._storage.described, part.token_dim) if isinstance(part, QuantizedKV) else None


def _outline(part: Tensor, fmt: Any, role: Any, token_dim: int) -> QuantizedKV:
    shape = list(part.shape)
    length = shape.pop(token_dim)
    shape.insert(2, 1)
    kind = handle_type(token_dim)
    return kind(Storage.outline(part.new_empty(shape), length, fmt, role), length)


# operations that stay packed ----------------------------------------------------------------------


def _each(func: Callable[..., Any], x: JoinedKV, *args: Any, **kwargs: Any) -> JoinedKV:
    """An operation on the whole of every part."""
    return JoinedKV([func(part, *args, **kwargs) for part in x.parts], x.join)


def _along(func: Any, x: Any, dim: int = 0, *args: Any, **kwargs: Any) -> Any:
    """An operation along a dim that is one of every part."""
    if not isinstance(x, JoinedKV):
        return NotImplemented
    dims = [x.join.part_dim(i, dim % x.dim()) for i in range(len(x.parts))]
    if None in dims:
        return NotImplemented
    made = [func(part, d, *args, **kwargs) for part, d in zip(x.parts, dims, strict=True)]
    return join_parts(made, x.join)


def _cat(func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    first, *rest = tensors
    if not isinstance(first, JoinedKV) or dim % first.dim() != first.join.token_dim:
        return NotImplemented
    shape = [s for d, s in enumerate(first.shape) if d != first.join.token_dim]
    for x in rest:
        own = [s for d, s in enumerate(x.shape) if d != first.join.token_dim]
        if isinstance(x, PackedTensor) or x.dim() != first.dim() or own != shape:
            return NotImplemented
    made = []
    for i, part in enumerate(first.parts):
        along = first.join.part_dim(i, first.join.token_dim)
        assert along is not None, "no lens touches the tokens"
        new = (view_through(first.join.lenses[i], x) for x in rest)
        made.append(torch.cat([part, *new], along))
    return join_parts(made, first.join)


def _repeat_interleave(func: Any, x: Any, repeats: Any, dim: int | None = None, **kw: Any) -> Any:
    if not isinstance(x, JoinedKV) or dim is None:
        return NotImplemented
    return _along(lambda part, d: torch.repeat_interleave(part, repeats, d, **kw), x, dim)


def _index(func: Any, x: Any, indices: Sequence[Tensor | None]) -> Any:
    given = [d for d, index in enumerate(indices) if index is not None]
    if not isinstance(x, JoinedKV) or given != [x.join.batch_dim]:
        return NotImplemented
    index = indices[given[0]]
    if index is None or index.dim() != 1 or index.dtype == torch.bool:
        return NotImplemented
    return _along(aten.index_select.default, x, given[0], index)


def _behind(x: JoinedKV, step: Step) -> Any:
    join, inside = x.join.under(step)
    if not inside:
        return NotImplemented
    parts = [x.parts[i] for i in inside]
    return aten.alias.default(parts[0]) if join is None else join_parts(parts, join)


def _select(func: Any, x: JoinedKV, dim: int, index: int) -> Any:
    dim %= x.dim()
    return _behind(x, ("select", (dim, index % x.shape[dim])))


def _slice(
    func: Any,
    x: Any,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    if not isinstance(x, JoinedKV):
        return NotImplemented
    dim %= x.dim()
    first, last, stride = slice(start, end, step).indices(x.shape[dim])
    if (first, last, stride) == (0, x.shape[dim], 1):
        return _each(aten.alias.default, x)
    if x.join.sizes[dim] is None:
        return _along(func, x, dim, start, end, step)
    return _behind(x, ("narrow", (dim, first, last - first))) if stride == 1 else NotImplemented


def _unbind(func: Any, x: JoinedKV, dim: int = 0) -> Any:
    found = [_select(func, x, dim, i) for i in range(x.shape[dim])]
    return NotImplemented if any(f is NotImplemented for f in found) else tuple(found)


def _split(func: Any, x: JoinedKV, sizes: Any, dim: int = 0) -> Any:
    size = x.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, size - start) for start in range(0, size, sizes)]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    found = [
        _slice(aten.slice.Tensor, x, dim, end - n, end) for n, end in zip(sizes, ends, strict=True)
    ]
    return NotImplemented if any(f is NotImplemented for f in found) else tuple(found)


def _chunk(func: Any, x: JoinedKV, chunks: int, dim: int = 0) -> Any:
    return _split(func, x, -(-x.shape[dim] // chunks), dim)


def _to(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    return _each(func, x, *args, **kwargs) if isinstance(x, JoinedKV) else NotImplemented


_OPS: dict[Any, Callable[..., Any]] = {
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.narrow.default: lambda func, x, dim, start, length: _slice(
        aten.slice.Tensor, x, dim, start, start + length
    ),
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _chunk,
    aten.index_select.default: _along,
    aten.index.Tensor: _index,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.repeat_interleave.self_Tensor: _repeat_interleave,
    aten.clone.default: _to,
    aten.detach.default: _to,
    aten.alias.default: _to,
    aten.contiguous.default: _to,
    aten.lift_fresh.default: _to,
    aten._to_copy.default: _to,
    aten.to.dtype: _to,
    aten.to.device: _to,
    aten.to.dtype_layout: _to,
    aten.to.other: _to,
}
