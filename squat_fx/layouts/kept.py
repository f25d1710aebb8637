"""A layout in which only some tokens of a prompt are stored: ``kept/`` and the layout beneath it.

    lost = packed tokens of the prompt - budget      of a row; nothing is lost where this is not > 0
    start = first valid position + lost              the arena ``start``, which says a row is shorter
    true position of token i = start + i - moved     one number for all sinks, then one for each token

Each KV head keeps tokens of its own, and all heads of a row equally many. A row that lost tokens is
stored as a row without them would be that begins so much later: its first tokens (sinks), those
that were kept in their order, and all that follow, which are where they were. So whatever reads or
appends to the layout beneath does the same here, and knows nothing of it; only what depends on where
a token of the prompt stood, a mask, has to ask ``moved`` (:mod:`squat_fx.kernels.kept`). Keys and
values keep the same tokens.

What is lost cannot be read: a cache that lost tokens has no dense form, no window, and no shorter
prompt. What layouts need the position of a token for is rounding (``positional``); these cannot be
beneath. ``Format.details`` are the budget, the tokens that are packed at once by keys or by values,
and whether these are keys; then those of the layout beneath.

| arena | besides those beneath |
|---|---|
| ``moved`` | int32 ``[batch, heads, 1, 1 + budget]``: ``lost``, and by how much each kept token has moved; of values the first number alone |
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from squat_fx.layouts.base import Fixed, StoredLayout
from squat_fx.layouts.planes import PlaneLayout
from squat_fx.layouts.rotary import Rotation

if TYPE_CHECKING:
    from squat_fx.codecs.base import Codec
    from squat_fx.layouts.format import Format

PREFIX = "kept/"
MOVED = "moved"
OWN_DETAILS = 3


class Kept(StoredLayout):
    """See the module; a subclass for each layout that may be beneath."""

    beneath: ClassVar[StoredLayout]
    keeps_part: ClassVar[bool] = True

    def widths(self, head_dim: int, bits: float) -> tuple[int, ...]:
        """Those of the layout beneath, as all that is not said here."""
        return self.beneath.widths(head_dim, bits)

    def planes(self, fmt: Format) -> PlaneLayout | None:
        return self.beneath.planes(beneath(fmt))

    def last_dim(self, fmt: Format, name: str) -> int:
        return self.beneath.last_dim(beneath(fmt), name)

    def tokens_per_slot(self, fmt: Format, name: str) -> int:
        return self.beneath.tokens_per_slot(beneath(fmt), name)

    def dtype(self, fmt: Format, name: str, dtype: torch.dtype) -> torch.dtype:
        """``moved`` is int32."""
        return torch.int32 if name == MOVED else self.beneath.dtype(beneath(fmt), name, dtype)

    def fixed_shape(self, fmt: Format, name: str, batch: int, heads: int) -> tuple[int, ...]:
        """See the module."""
        if name == MOVED:
            return batch, heads, 1, 1 + budget(fmt) * is_key(fmt)
        return self.beneath.fixed_shape(beneath(fmt), name, batch, heads)

    def empty_fixed(self, fmt: Format, name: str, like: Tensor) -> Tensor:
        """Nothing has moved."""
        if name == MOVED:
            return super().empty_fixed(fmt, name, like)
        return self.beneath.empty_fixed(beneath(fmt), name, like)

    def place_given(self, fmt: Format, given: Tensor, like: Tensor) -> Tensor:
        return self.beneath.place_given(beneath(fmt), given, like)

    def with_rotation(self, fmt: Format, rotation: Rotation) -> Format:
        turned = self.beneath.with_rotation(beneath(fmt), rotation)
        return replace(fmt, details=fmt.details[:OWN_DETAILS] + turned.details)

    def to_frame(self, x: Tensor, fmt: Format, fixed: Fixed) -> Tensor:
        return self.beneath.to_frame(x, beneath(fmt), beneath_fixed(fixed))

    def learned(self, x: Tensor, first: Tensor, packed: Tensor, fmt: Format) -> Fixed:
        return self.beneath.learned(x, first, packed, beneath(fmt))

    def forget(self, fixed: Fixed, end: Tensor) -> None:
        self.beneath.forget(beneath_fixed(fixed), end)

    def bits(self, fmt: Format) -> float:
        return self.beneath.bits(beneath(fmt))

    def describe(self, fmt: Format) -> str:
        """With how many tokens of a prompt are kept."""
        return f"{self.beneath.describe(beneath(fmt))}, {budget(fmt)} tokens of a prompt kept"

    def quantize(
        self,
        x: Tensor,
        valid: Tensor | None,
        fmt: Format,
        codec: Codec,
        fixed: Fixed,
        feedback: Tensor | None = None,
        first_slot: int = 0,
        first_position: int | Tensor = 0,
    ) -> tuple[Tensor, ...]:
        place = first_slot, first_position
        fixed = beneath_fixed(fixed)
        return self.beneath.quantize(x, valid, beneath(fmt), codec, fixed, feedback, *place)

    def dequantize(
        self,
        packed: tuple[Tensor, ...],
        fmt: Format,
        fixed: Fixed,
        first_position: int | Tensor = 0,
    ) -> Tensor:
        return self.beneath.dequantize(packed, beneath(fmt), beneath_fixed(fixed), first_position)

    def dequantize_into(
        self,
        packed: tuple[Tensor, ...],
        fmt: Format,
        fixed: Fixed,
        out: Tensor,
        first_position: int | Tensor = 0,
    ) -> Tensor:
        place = out, first_position
        return self.beneath.dequantize_into(packed, beneath(fmt), beneath_fixed(fixed), *place)


def kept_over(layout: StoredLayout) -> StoredLayout:
    """The layout that keeps a part of a prompt in ``layout``."""
    assert not layout.positional, f"{layout.name} rounds by position"
    attributes = {
        "__doc__": f"See :class:`Kept`; over {layout.name}.",
        "beneath": layout,
        "name": PREFIX + layout.name,
        "packed": layout.packed,
        "fixed": (*layout.fixed, MOVED),
        "given": layout.given,
        "shared": layout.shared,
        "values": PREFIX + layout.values,
        "whole_bits": layout.whole_bits,
    }
    return type("KeptOver" + type(layout).__name__, (Kept,), attributes)()


@lru_cache(maxsize=64)
def beneath(fmt: Format) -> Format:
    """The format of what is stored, in the layout beneath; ``fmt`` itself if it keeps all."""
    if not fmt.stored_layout.keeps_part:
        return fmt
    layout, details = fmt.layout.removeprefix(PREFIX), fmt.details[OWN_DETAILS:]
    return replace(fmt, layout=layout, details=details)


def beneath_fixed(fixed: Fixed) -> Mapping[str, Tensor]:
    """The fixed arenas of the layout beneath."""
    return {name: arena for name, arena in fixed.items() if name != MOVED}


def budget(fmt: Format) -> int:
    """How many packed tokens of a prompt a head keeps, in whole groups."""
    return fmt.details[0]


def group(fmt: Format) -> int:
    """How many tokens are packed at once by keys or by values, whichever are more."""
    return fmt.details[1]


def is_key(fmt: Format) -> bool:
    """Whether these are keys."""
    return bool(fmt.details[2])
