"""KVarN: rotated, and balanced on both sides of a tile before min-max rounding (Huawei CSL, 2026).

    y = x @ R                                       R a fixed Hadamard rotation
    keys:    y[t, c] = s[t] * (code * scale[c] + zero_point[c])
    values:  y[t, c] = s[c] * (code * scale[t] + zero_point[t])

A tile is ``group_size`` tokens and all channels of a head. Its factors ``s`` come from iterations
like Sinkhorn's, :mod:`squat_fx.codecs.balance`, that make tokens and channels vary alike; then
every channel (of keys) or token (of values) is rounded between its minimum and its maximum, as in
KIVI. The paper finds that it is wrong sizes of tokens, not their directions, that add up over a
long generation: a token of unusual size no longer stretches the levels of its whole tile.

The clamps are the published ones. They are absolute, so numbers that vary by less than 0.7 are
balanced less the smaller they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from squat_fx.codecs.balance import balancing_factors
from squat_fx.codecs.base import PerChannel, PerToken, Role
from squat_fx.codecs.kivi import Kivi

ALL_CHANNELS = 2**30


@dataclass(frozen=True)
class Kvarn(Kivi):
    """Min-max rounding of rotated tiles, with a factor for each token (keys) or channel (values).

    Attributes:
        group_size: tokens of a tile; 32, 64 or 128. Scales, zero points and factors add ``32 /
            group_size + 16 / head_dim`` bits to an element of a key and ``32 / head_dim + 16 /
            group_size`` to one of a value.
    """

    name: ClassVar[str] = "kvarn"
    layout: ClassVar[str] = "planes/dual"
    summary: ClassVar[str] = "rotated tiles, their tokens and channels balanced, min-max rounding"
    paper: ClassVar[str] = "Huawei CSL, KVarN, 2026"

    group_size: int = 128

    def granularity(self, role: Role) -> PerChannel | PerToken:
        """Keys share a scale along the tokens of a tile, values along all channels."""
        if role == "key":
            return PerChannel(self.group_size)
        return PerToken(ALL_CHANNELS, token_group=self.group_size)

    def balance(self, tiles: Tensor, keep: Tensor, of_tokens: bool) -> Tensor:
        """See :meth:`squat_fx.codecs.base.Codec.balance`."""
        return balancing_factors(tiles, keep, of_tokens)
