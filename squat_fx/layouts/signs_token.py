"""Keys as signs of projections and norms, outlier channels apart: ``signs/token``.

    x = x_in + x_out         x_out: the channels of largest norm among the tokens of a group
    signs of both            :mod:`squat_fx.layouts.sketch`; x' is the sum of both estimates, each
                             in its own channels, with |x_in|**2 = |x|**2 - |x_out|**2

``Format.widths`` is ``(sketch_dim, outlier sketch_dim, outliers)``, or ``(sketch_dim,)`` without
outliers.

| arena | |
|---|---|
| ``qdata`` | uint8 ``[batch, heads, tokens, signs / 8]``: of ``x_in``, then of ``x_out`` |
| ``norm`` | fp16 ``[batch, heads, tokens, 2 or 1]``: ``|x|``, then ``|x_out|`` |
| ``outliers`` | uint8 ``[batch, heads, groups, outliers]``: channels, ascending |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from squat_fx.layouts.base import Fixed, StoredLayout
from squat_fx.layouts.planes import LANES
from squat_fx.layouts.sketch import BYTE, directions, estimate, sign_bits

if TYPE_CHECKING:
    from squat_fx.codecs.base import Codec
    from squat_fx.layouts.format import Format

LARGEST_HALF = 65504.0
LARGEST_NUMBER = 2.0**48  # no norm reaches it by far, and sums of its squares fit fp32


class SignsPerToken(StoredLayout):
    """See the module."""

    name: ClassVar[str] = "signs/token"
    packed: ClassVar[tuple[str, ...]] = ("qdata", "norm", "outliers")
    values: ClassVar[str] = "planes/channel"
    whole_bits: ClassVar[bool] = True  # values have them

    def widths(self, head_dim: int, bits: float) -> tuple[int, ...]:
        """A sign for each bit of each channel, no outliers."""
        sketch_dim = round(bits * head_dim)
        if sketch_dim % LANES or sketch_dim != bits * head_dim:
            below = max(sketch_dim // LANES, 1) * LANES
            raise ValueError(
                f"the layout {self.name!r} takes a multiple of {LANES} signs, got {bits:g} for "
                f"each of {head_dim} channels; the nearest are {below} and {below + LANES} in all"
            )
        return (sketch_dim,)

    def last_dim(self, fmt: Format, name: str) -> int:
        """Bytes of the signs, norms, and outlier channels."""
        sketch_dim, outlier_dim, outliers = split_widths(fmt.widths)
        if name == "outliers":
            return outliers
        return 1 + bool(outliers) if name == "norm" else (sketch_dim + outlier_dim) // BYTE

    def tokens_per_slot(self, fmt: Format, name: str) -> int:
        """A group shares its outlier channels."""
        return fmt.token_group if name == "outliers" else 1

    def dtype(self, fmt: Format, name: str, dtype: torch.dtype) -> torch.dtype:
        """Norms are fp16, a channel is a byte."""
        return torch.float16 if name == "norm" else torch.uint8

    def bits(self, fmt: Format) -> float:
        """Signs per channel."""
        return BYTE * self.last_dim(fmt, "qdata") / fmt.head_dim

    def constant(self, head_dim: int, widths: tuple[int, ...], device: torch.device) -> Tensor:
        """The directions, fp16 ``[signs, head_dim]``."""
        sketch_dim, outlier_dim, _ = split_widths(widths)
        return directions(head_dim, max(sketch_dim, outlier_dim), device)

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
        """Padding is zeros: it is nobody's outlier."""
        sketch_dim, outlier_dim, outliers = split_widths(fmt.widths)
        x = x.float().clamp(-LARGEST_NUMBER, LARGEST_NUMBER)
        if valid is not None:
            x = x.masked_fill(~valid[:, None, :, None], 0.0)
        if not outliers:
            none = x.new_zeros((*x.shape[:3], 0), dtype=torch.uint8)
            return sign_bits(x, sketch_dim), norm_of(x), none
        channels = outlier_channels(x, fmt.token_group, outliers)
        apart = is_outlier(channels, fmt.head_dim, fmt.token_group)
        outside = x.masked_fill(~apart, 0.0)
        signs = sign_bits(x - outside, sketch_dim), sign_bits(outside, outlier_dim)
        return torch.cat(signs, -1), torch.cat([norm_of(x), norm_of(outside)], -1), channels

    def dequantize(
        self,
        packed: tuple[Tensor, ...],
        fmt: Format,
        fixed: Fixed,
        first_position: int | Tensor = 0,
    ) -> Tensor:
        """See :meth:`StoredLayout.dequantize`."""
        sketch_dim, outlier_dim, outliers = split_widths(fmt.widths)
        qdata, norm, channels = packed
        norm = norm.float()
        if not outliers:
            return estimate(qdata, norm, fmt.head_dim)
        inside, outside = qdata.split([sketch_dim // BYTE, outlier_dim // BYTE], -1)
        whole, norm_outside = norm.split(1, -1)
        norm_inside = (whole.square() - norm_outside.square()).clamp_min(0.0).sqrt()
        apart = is_outlier(channels, fmt.head_dim, fmt.token_group)
        return torch.where(
            apart,
            estimate(outside, norm_outside, fmt.head_dim),
            estimate(inside, norm_inside, fmt.head_dim),
        )


def split_widths(widths: tuple[int, ...]) -> tuple[int, int, int]:
    """Signs of a key, of its outliers, and how many channels those are."""
    return (widths[0], 0, 0) if len(widths) == 1 else (widths[0], widths[1], widths[2])


def outlier_channels(x: Tensor, token_group: int, count: int) -> Tensor:
    """The channels of largest norm of each token group, ascending, uint8 ``[batch, heads, groups,
    count]``.
    """
    squares = x.square().unflatten(2, (-1, token_group)).sum(3)
    return squares.topk(count, -1).indices.sort(-1).values.to(torch.uint8)


def is_outlier(channels: Tensor, head_dim: int, token_group: int) -> Tensor:
    """Which channels of each token :func:`outlier_channels` names, bool ``[batch, heads, tokens,
    head_dim]``.
    """
    apart = torch.zeros((*channels.shape[:3], head_dim), dtype=torch.bool, device=channels.device)
    apart.scatter_(3, channels.long(), True)
    return apart.repeat_interleave(token_group, 2)


def norm_of(x: Tensor) -> Tensor:
    """Of each token, fp16 ``[..., 1]``."""
    return x.norm(dim=-1, keepdim=True).clamp(max=LARGEST_HALF).half()
