"""The ops: schemas, fakes and dispatch. Needs only torch; ``reference`` says what each op means.

One overload per stored layout, flat tensors and ints. A role's arenas come in the order of
``Format.arena_names``, its format as ``Format.to_ints()``; ``positions`` is int64 ``[handles, 2]``,
a row ``(length, watermark)`` per handle, written by the caller before each call and only read here.
Mutation is visible in the schema. ``append_`` takes the outputs of what must read the arenas first
as ``after``: it does not look at them, but a compiler that reorders functional graphs then keeps
the reads in front, and need not copy the arenas.

| op | what it does |
|---|---|
| ``quantize`` | whole token groups to packed codes and parameters |
| ``store`` | a whole prompt to fresh arenas, just large enough; the codec learns from it |
| ``append_`` | new tokens into the ring; what leaves the ring is packed, in place |
| ``append_both_`` | the same for the keys and values of a layer at once |
| ``attend`` | attention over the packed past and exact new tokens |
| ``dequantize`` | the stored tokens as numbers |
| ``valid_tokens`` | which new tokens a mask lets any query see |

CPU tensors run the reference; CUDA tensors run the Triton kernels, imported at the first call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from squat_fx.codecs import FIXED_ARENAS, PACKED_ARENAS, Fit, Format, Layout, Role
from squat_fx.kernels import reference
from squat_fx.kernels.reference import Arenas, Extent

logger = logging.getLogger(__name__)

LIBRARY = torch.library.Library("squat_fx", "DEF")  # kept alive: it owns the registrations

_OVERLOAD: dict[Layout, str] = {
    "planes/channel": "planes_channel",
    "dense": "dense",
    "planes/token": "planes_token",
}


def overload(op: str, layout: Layout) -> torch._ops.OpOverload:
    """The overload of ``op`` for ``layout``: ``overload("attend", "dense")`` is
    ``torch.ops.squat_fx.attend.dense``.
    """
    return getattr(getattr(torch.ops.squat_fx, op), _OVERLOAD[layout])


def both(append: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """The overload of ``append_both_`` for the layout of an overload of ``append_``."""
    return getattr(torch.ops.squat_fx.append_both_, append._schema.overload_name)


@lru_cache(maxsize=1)
def _triton() -> ModuleType | None:
    """The launchers, or None with one warning where Triton cannot be imported."""
    try:
        from squat_fx.kernels import launch
    except ImportError as error:
        logger.warning(
            "Triton kernels are not available (%s): running the torch reference on the GPU", error
        )
        return None
    return launch


def _implementation(device: torch.device) -> ModuleType:
    """Who computes for tensors on ``device``."""
    return (_triton() or reference) if device.type == "cuda" else reference


def _learn(device: torch.device) -> Callable[..., Fit]:
    """What learns from a prompt on ``device``, as :func:`squat_fx.kernels.reference.learn`."""
    if _implementation(device) is reference:
        return reference.learn
    from squat_fx.kernels import fit

    return fit.learn


def _extent(implementation: ModuleType, positions: Tensor, row: int) -> Extent | tuple[Tensor, int]:
    """A row of positions: numbers for the reference, for kernels where to read them."""
    return Extent.at(positions, row) if implementation is reference else (positions, row)


def _define(layout: Layout) -> None:
    """Register the five ops of one layout."""
    name = _OVERLOAD[layout]
    packed, fixed = PACKED_ARENAS[layout], FIXED_ARENAS[layout]
    names = (*packed, *fixed, "dense", "start")
    count = len(names)

    def declare(prefix: str = "", mutable: bool = False, first: str = "a") -> str:
        written = [n for n in names if mutable and n not in fixed]
        alias = {n: f"({chr(ord(first) + i)}!)" for i, n in enumerate(written)}
        return ", ".join(f"Tensor{alias.get(n, '')} {prefix}{n}" for n in names)

    def returns(n: int) -> str:
        return "(" + ", ".join(["Tensor"] * n) + ")" if n > 1 else "Tensor"

    learned = "".join(f"Tensor {n}, " for n in fixed)
    LIBRARY.define(
        f"quantize.{name}(Tensor x, Tensor? valid, {learned}str codec, int[] format) "
        f"-> {returns(len(packed))}"
    )
    LIBRARY.define(
        f"store.{name}(Tensor x, Tensor? valid, Tensor? query, Tensor? basis, str role, "
        f"str codec, int[] format) -> {returns(count - ('basis' in fixed))}"
    )
    LIBRARY.define(
        f"append_.{name}({declare(mutable=True)}, Tensor new, Tensor? valid, Tensor positions, "
        "int row, str codec, int[] format, Tensor[]? after=None) -> ()"
    )
    LIBRARY.define(
        f"append_both_.{name}({declare('key_', mutable=True)}, "
        f"{declare('value_', mutable=True, first='n')}, Tensor new_key, Tensor new_value, "
        "Tensor? valid, Tensor positions, int key_row, int value_row, str codec, "
        "int[] key_format, int[] value_format, Tensor[]? after=None) -> ()"
    )
    LIBRARY.define(
        f"attend.{name}(Tensor query, Tensor? new_key, Tensor? new_value, "
        f"{declare('key_')}, {declare('value_')}, "
        "Tensor positions, int key_row, int value_row, Tensor? mask, Tensor? sinks, "
        "float scale, int causal, float softcap, int[] key_format, int[] value_format) -> Tensor"
    )
    LIBRARY.define(
        f"dequantize.{name}({declare()}, Tensor positions, int row, SymInt length, int[] format) "
        "-> Tensor"
    )

    def quantize(x: Tensor, valid: Tensor | None, *args):
        *learned, codec, format = args
        fmt = Format.from_ints(layout, codec, format)
        affine, basis = learned or (None, None)
        found = _implementation(x.device).quantize(x, valid, fmt, Fit(affine), basis)
        out = tuple(t.clone() if t is x else t for t in found)
        return out if len(packed) > 1 else out[0]

    def store(
        x: Tensor,
        valid: Tensor | None,
        query: Tensor | None,
        basis: Tensor | None,
        role: Role,
        codec: str,
        format: list[int],
    ):
        fmt = Format.from_ints(layout, codec, format)
        arenas = reference.empty_arenas(x, _rounded_up(x.shape[2], fmt), fmt, basis)
        fit = _learn(x.device)(arenas, x, valid, query, fmt, role)
        _implementation(x.device).write(arenas, x, valid, Extent(0, 0), fmt, fit.feedback)
        by_name = dict(zip(names, arenas.tensors(fmt), strict=True))
        return tuple(by_name[n] for n in fmt.stored_names)

    def append_(*args) -> None:
        tensors, (new, valid, positions, row, codec, format) = args[:count], args[count : count + 6]
        fmt = Format.from_ints(layout, codec, format)
        implementation = _implementation(new.device)
        extent = _extent(implementation, positions, row)
        implementation.write(Arenas.of(fmt, tensors), new, valid, extent, fmt)

    def append_both_(*args) -> None:
        arenas, rest = (args[:count], args[count : 2 * count]), args[2 * count :]
        new_key, new_value, valid, positions, key_row, value_row, codec, *formats = rest[:9]
        implementation = _implementation(new_key.device)
        writes = []
        for tensors, new, row, ints in zip(
            arenas, (new_key, new_value), (key_row, value_row), formats, strict=True
        ):
            fmt = Format.from_ints(layout, codec, ints)
            extent = _extent(implementation, positions, row)
            writes.append((Arenas.of(fmt, tensors), new, extent, fmt))
        implementation.write_both(*writes, valid)

    def attend(query: Tensor, new_key: Tensor | None, new_value: Tensor | None, *args) -> Tensor:
        key, value, rest = args[:count], args[count : 2 * count], args[2 * count :]
        (
            positions,
            key_row,
            value_row,
            mask,
            sinks,
            scale,
            causal,
            softcap,
            key_format,
            value_format,
        ) = rest
        implementation = _implementation(query.device)
        sides = []
        for tensors, row, ints in ((key, key_row, key_format), (value, value_row, value_format)):
            extent = _extent(implementation, positions, row)
            fmt = Format.from_ints(layout, "", ints)
            sides.append((Arenas.of(fmt, tensors), extent, fmt))
        return implementation.attend(
            query,
            new_key,
            new_value,
            *sides,
            mask=mask,
            sinks=sinks,
            scale=scale,
            causal=causal,
            softcap=softcap,
        ).contiguous()

    def dequantize(*args) -> Tensor:
        tensors, (positions, row, length, format) = args[:count], args[count:]
        fmt = Format.from_ints(layout, "", format)
        extent = Extent.at(positions, row)
        dense = _implementation(tensors[0].device).dense_past(Arenas.of(fmt, tensors), extent, fmt)
        return dense[:, :, :length].contiguous()

    def fake_quantize(x: Tensor, valid: Tensor | None, *args):
        *_, codec, format = args
        out = _fake_packed(x, x.shape[2], Format.from_ints(layout, codec, format))
        return out if len(packed) > 1 else out[0]

    def fake_store(x: Tensor, valid: Tensor | None, *args):
        *_, codec, format = args
        fmt = Format.from_ints(layout, codec, format)
        batch, heads = x.shape[:2]
        made = {
            "affine": x.new_empty(reference.affine_shape(batch, heads, fmt), dtype=torch.float16),
            "dense": x.new_empty((batch, heads, fmt.dense_length, fmt.head_dim)),
            "start": x.new_empty((batch,), dtype=torch.int32),
        }
        rest = (made[n] for n in fmt.stored_names[len(packed) :])
        return (*_fake_packed(x, _rounded_up(x.shape[2], fmt), fmt), *rest)

    def fake_append_(*args) -> None:
        return None

    def fake_attend(
        query: Tensor, new_key: Tensor | None, new_value: Tensor | None, *args
    ) -> Tensor:
        value_dense = args[2 * count - 2]
        return query.new_empty((*query.shape[:3], value_dense.shape[3]))

    def fake_dequantize(*args) -> Tensor:
        dense, length = args[count - 2], args[count + 2]
        return dense.new_empty((*dense.shape[:2], length, dense.shape[3]))

    for op, run, fake in (
        ("quantize", quantize, fake_quantize),
        ("store", store, fake_store),
        ("append_", append_, fake_append_),
        ("append_both_", append_both_, fake_append_),
        ("attend", attend, fake_attend),
        ("dequantize", dequantize, fake_dequantize),
    ):
        LIBRARY.impl(f"{op}.{name}", run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"squat_fx::{op}.{name}", fake, lib=LIBRARY)


def _rounded_up(tokens: int, fmt: Format) -> int:
    """``tokens`` up to whole groups; free of branches, since ``tokens`` may be symbolic."""
    return (tokens + fmt.token_group - 1) // fmt.token_group * fmt.token_group


def _fake_packed(x: Tensor, capacity: int, fmt: Format) -> tuple[Tensor, ...]:
    batch, heads = x.shape[:2]
    return tuple(
        x.new_empty(
            (batch, heads, capacity // fmt.tokens_per_slot(n), fmt.last_dim(n)),
            dtype=reference.arena_dtype(n, fmt, x.dtype),
        )
        for n in fmt.packed_names
    )


for _layout in _OVERLOAD:
    _define(_layout)

LIBRARY.define("valid_tokens(Tensor mask, Tensor new) -> Tensor")


def _valid_tokens(mask: Tensor, new: Tensor) -> Tensor:
    return reference.valid_tokens(mask, new.shape[2]).expand(new.shape[0], -1).clone()


def _fake_valid_tokens(mask: Tensor, new: Tensor) -> Tensor:
    return mask.new_empty((new.shape[0], new.shape[2]), dtype=torch.bool)


LIBRARY.impl("valid_tokens", _valid_tokens, "CompositeExplicitAutograd")
torch.library.register_fake("squat_fx::valid_tokens", _fake_valid_tokens, lib=LIBRARY)
