"""What all tensors have in common that stand for a dense one and hold it packed.

An operation on one of them has its dense meaning: a class says which operations stay packed, and
everything else is computed from :meth:`PackedTensor.dequantize`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

IN_PLACE_ERROR = "a {} cannot be written in place ({}); build a new tensor from its dequantize()"


class PackedTensor(Tensor):
    """A tensor whose numbers are packed. Not differentiable, and not to be written in place
    (``ValueError``).

    Attributes:
        dense: a plain tensor that it holds; a fake one while Dynamo traces.
    """

    dense: Any

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @property
    def storage_nbytes(self) -> int:
        """Bytes held."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The dense tensor."""
        raise NotImplementedError

    def outline(self) -> Tensor:
        """While Dynamo traces, the dense tensor: nothing is stored then."""
        return self.dense.new_empty(self.shape)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packed = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, PackedTensor)]
        if func._schema.is_mutable:
            for x in _written(func, args, kwargs):
                if isinstance(x, PackedTensor):
                    raise ValueError(IN_PLACE_ERROR.format(type(x).__name__, func))
        kinds = {type(x.dense) for x in packed}
        if FakeTensor in kinds:
            outlined = cls._outlined(func, *args, **kwargs)
            if outlined is not NotImplemented:
                return outlined
            return _call_dense(func, args, kwargs, lambda x: x.outline())
        if kinds - {Tensor, torch.nn.Parameter}:
            raise ValueError(
                f"a {cls.__name__} reached a graph that was not compiled with backend='squat'; "
                "compile it with that backend, or pass cache.dequantize()"
            )
        result = cls._stay_packed(func, *args, **kwargs)
        if result is not NotImplemented:
            return result
        return _call_dense(func, args, kwargs, lambda x: x.dequantize())

    @classmethod
    def _outlined(cls, func: Any, *args: Any, **kwargs: Any) -> Any:
        """What ``func`` makes of outlines; ``NotImplemented`` where torch is to say."""
        return NotImplemented

    @classmethod
    def _stay_packed(cls, func: Any, *args: Any, **kwargs: Any) -> Any:
        """What ``func`` makes of packed tensors; ``NotImplemented`` where they must be dense."""
        return NotImplemented

    def __setitem__(self, index: Any, value: Any) -> None:
        # Python's indexing would write into a copy.
        raise ValueError(IN_PLACE_ERROR.format(type(self).__name__, "item assignment"))


def _call_dense(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dense: Callable[[PackedTensor], Tensor],
) -> Any:
    """Run ``func`` on the dense tensors that packed ones stand for."""

    def convert(x: Any) -> Any:
        return dense(x) if isinstance(x, PackedTensor) else x

    args, kwargs = pytree.tree_map(convert, (args, kwargs))
    return func(*args, **kwargs)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that ``func`` writes to."""
    written = {
        a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write
    }
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    return pytree.tree_leaves([x for name, x in given.items() if name in written])
