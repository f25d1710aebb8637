"""Exact storage: the numbers themselves, in the cache's dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from squat_fx.layouts.base import Fixed, StoredLayout

if TYPE_CHECKING:
    from squat_fx.codecs.base import Codec
    from squat_fx.layouts.format import Format


class Dense(StoredLayout):
    """``qdata [batch, heads, tokens, head_dim]``."""

    name: ClassVar[str] = "dense"
    packed: ClassVar[tuple[str, ...]] = ("qdata",)
    values: ClassVar[str] = "dense"
    whole_bits: ClassVar[bool] = True

    def widths(self, head_dim: int, bits: float) -> tuple[int, ...]:
        """None: there are no codes."""
        return ()

    def last_dim(self, fmt: Format, name: str) -> int:
        """The head's channels."""
        return fmt.head_dim

    def dtype(self, fmt: Format, name: str, dtype: torch.dtype) -> torch.dtype:
        """The cache's."""
        return dtype

    def bits(self, fmt: Format) -> float:
        """Those of fp16."""
        return 16.0

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
        """``x`` as it is."""
        return (x.contiguous(),)

    def dequantize(
        self,
        packed: tuple[Tensor, ...],
        fmt: Format,
        fixed: Fixed,
        first_position: int | Tensor = 0,
    ) -> Tensor:
        """The numbers as they are."""
        return packed[0]
