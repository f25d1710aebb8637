"""The lossless codec: exact storage under the whole machinery.

It separates plumbing faults from quantization error: a model rewritten with it must answer token
for token as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from squat_fx.codecs.base import Codec, PerChannel, PerToken, Role


@dataclass(frozen=True)
class Lossless(Codec):
    """Keep every number as it is, in groups that move like a quantized cache's.

    Attributes:
        group_size: tokens of a key group, which leave the residual together; no number is shared.
    """

    name: ClassVar[str] = "none"
    layout: ClassVar[str] = "dense"
    summary: ClassVar[str] = "exact storage, for telling plumbing from quantization"
    paper: ClassVar[str] = "-"

    group_size: int = 32

    def granularity(self, role: Role) -> PerChannel | PerToken:
        """Keys move in groups of tokens and values one by one, as they do under ``kivi``."""
        return PerChannel(self.group_size) if role == "key" else PerToken(self.group_size)

    def quantize(
        self, groups: Tensor, valid: Tensor | None, bits: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Never called: the ``dense`` layout stores the numbers themselves."""
        raise AssertionError("the dense layout has no codes")
