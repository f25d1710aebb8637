"""An op whose kernel does not compile runs as the reference says, after one warning; or raises.

Triton compiles at the first call with new types and sizes, so that a GPU, or a version of Triton,
that lacks something shows it in the middle of a model. Kernels that were compiled before in the
same op have run by then: to run the whole op again gives the same arenas. Heads that are wider than
any that the kernels were run with are not tried at all.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)

DEVICE = "cuda"
WIDEST = 256  # channels of a head that kernels were run with

_RAISES: ContextVar[bool] = ContextVar("squat_fx_raises", default=False)
_REFERENCE: ContextVar[bool] = ContextVar("squat_fx_reference", default=False)
_FAILED: dict[Any, str] = {}  # what was said of each kind of call


class KernelNotCompiled(RuntimeError):
    """With ``strict=True``: a kernel does not compile; the message names the op and its shape."""


class HeadTooWide(RuntimeError):
    """The head has more channels than kernels are for."""


@contextmanager
def strictly() -> Iterator[None]:
    """Raise where a kernel does not compile."""
    token = _RAISES.set(True)
    try:
        yield
    finally:
        _RAISES.reset(token)


def reference_only() -> bool:
    """Whether the op that runs now has to do without its kernels."""
    return _REFERENCE.get()


def with_fallback(name: str, subject: int, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, the op ``name``, which runs again under :func:`reference_only` if one of its kernels
    does not compile.

    ``subject`` is the argument whose shape the warning names.
    """

    def call(*args: Any) -> Any:
        if _FAILED and _kind(name, args, subject) in _FAILED:
            return _as_reference(run, args)
        try:
            _check_width(args[subject])
            return run(*args)
        except Exception as error:
            if reference_only() or not _did_not_compile(error):
                raise
            text = _text(name, args[subject], error)
            if _RAISES.get():
                raise KernelNotCompiled(text) from error
            if text not in _FAILED.values():
                logger.warning("%s; the torch reference runs instead, which is slower", text)
            _FAILED[_kind(name, args, subject)] = text
            return _as_reference(run, args)

    return call


def _check_width(x: Tensor) -> None:
    if x.shape[-1] > WIDEST and x.device.type == DEVICE and not reference_only():
        raise HeadTooWide(f"head_dim {x.shape[-1]} is more than {WIDEST}")


def _as_reference(run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    token = _REFERENCE.set(True)
    try:
        return run(*args)
    finally:
        _REFERENCE.reset(token)


def _kind(name: str, args: tuple[Any, ...], subject: int) -> Any:
    """What calls have in common that compile the same kernels, more or less."""
    x: Tensor = args[subject]
    tokens = min(x.shape[2], 2) if x.dim() == 4 else 0
    formats = tuple(tuple(a) for a in args if isinstance(a, list) and all(map(_is_int, a)))
    return name, x.dtype, x.device, x.shape[1], tokens, x.shape[-1], formats


def _is_int(x: Any) -> bool:
    return isinstance(x, int)


def _did_not_compile(error: Exception) -> bool:
    if isinstance(error, HeadTooWide):
        return True
    if "triton" not in sys.modules:
        return False
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    if isinstance(error, (CompilationError, OutOfResources, PTXASError)):
        return True
    return isinstance(error, RuntimeError) and "PassManager::run failed" in str(error)


def _text(name: str, x: Tensor, error: Exception) -> str:
    lines = str(error).strip().splitlines()
    shape, dtype = list(x.shape), str(x.dtype).removeprefix("torch.")
    return (
        f"the Triton kernel of {name} for {dtype} {shape} does not compile "
        f"({type(error).__name__}: {lines[-1] if lines else 'no reason given'})"
    )
