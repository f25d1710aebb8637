"""The carrier of models that keep tokens before heads, ``[batch, tokens, heads, channels]``.

What is packed is packed as ever; only the order of the dims that the handle tells is another. So a
transpose of tokens and heads turns one kind of handle into the other, and an operation on this kind
is the one on the other kind with its dims exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from squat_fx.codecs import Format, Role
from squat_fx.state import HANDLE_TYPES, PACKED_OPS, QuantizedKV

aten = torch.ops.aten
HEADS_AND_TOKENS = {1, 2}


class TokenMajorKV(QuantizedKV):
    """Packed keys or values that look like ``[batch, seq_len, num_kv_heads, head_dim]``."""

    token_dim = 1

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
        """Pack ``x`` ``[batch, tokens, heads, head_dim]``; see :meth:`QuantizedKV.from_dense`."""
        return super().from_dense(x.transpose(1, 2), fmt, role, valid, query, given, keys)

    def dequantize(self) -> Tensor:
        """The dense tensor, ``[batch, seq_len, heads, head_dim]``; zeros where padding was not
        stored.
        """
        return super().dequantize().transpose(1, 2)

    @classmethod
    def _stay_packed(cls, func: Any, *args: Any, **kwargs: Any) -> Any:
        operation = _OPS.get(func)
        return NotImplemented if operation is None else operation(func, *args, **kwargs)


def handle_type(token_dim: int) -> type[QuantizedKV]:
    """The carrier whose tokens are dim ``token_dim``."""
    return HANDLE_TYPES[token_dim]


def exchanged(x: QuantizedKV) -> QuantizedKV:
    """The same tokens with the dims of tokens and heads exchanged; nothing is copied."""
    other = handle_type(3 - x.token_dim)
    return other(x._storage, x.first + x.shape[x.token_dim], x._pending, x.first)


def _usual(func: Any, *args: Any, **kwargs: Any) -> Any:
    """``func`` on the usual handles; what it gives is exchanged back."""
    args, kwargs = pytree.tree_map(
        lambda x: exchanged(x) if isinstance(x, TokenMajorKV) else x, (args, kwargs)
    )
    result = PACKED_OPS[func](func, *args, **kwargs)
    return exchanged(result) if isinstance(result, QuantizedKV) else result


def _cat(func: Any, tensors: Any, dim: int = 0) -> Any:
    if dim % 4 not in HEADS_AND_TOKENS or any(x.dim() != 4 for x in tensors):
        return NotImplemented
    if not all(isinstance(x, TokenMajorKV) for x in tensors if isinstance(x, QuantizedKV)):
        return NotImplemented
    turned = [x if isinstance(x, TokenMajorKV) else x.transpose(1, 2) for x in tensors]
    return _usual(func, turned, 3 - dim % 4)


def _slice(func: Any, x: QuantizedKV, dim: int = 0, *args: Any, **kwargs: Any) -> Any:
    return _usual(func, x, _exchanged_dim(dim), *args, **kwargs)


def _select(func: Any, x: QuantizedKV, dim: int, index: Tensor) -> Any:
    return _usual(func, x, _exchanged_dim(dim), index)


def _exchanged_dim(dim: int) -> int:
    dim %= 4
    return 3 - dim if dim in HEADS_AND_TOKENS else dim


def _transpose(func: Any, x: QuantizedKV, first: int, second: int) -> Any:
    """``x.transpose(1, 2)`` of either kind of handle."""
    return exchanged(x) if {first % 4, second % 4} == HEADS_AND_TOKENS else NotImplemented


def _permute(func: Any, x: QuantizedKV, dims: Any) -> Any:
    return exchanged(x) if [d % 4 for d in dims] == [0, 2, 1, 3] else NotImplemented


_TRANSPOSES = {aten.transpose.int: _transpose, aten.permute.default: _permute}
_WITH_DIMS = {
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.narrow.default: _slice,
    aten.index_select.default: _select,
}
_OF_BATCH_OR_WHOLE = (
    aten.index.Tensor,
    aten.repeat_interleave.self_int,
    aten.repeat_interleave.self_Tensor,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.lift_fresh.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
)
_OPS: dict[Any, Callable[..., Any]] = (
    dict.fromkeys(_OF_BATCH_OR_WHOLE, _usual) | _WITH_DIMS | _TRANSPOSES
)
PACKED_OPS.update(_TRANSPOSES)
HANDLE_TYPES[TokenMajorKV.token_dim] = TokenMajorKV
