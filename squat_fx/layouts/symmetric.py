"""Symmetric levels with one scale per token: the rounding of the layout ``planes/token``.

    size  = max(sqrt(mean(y**2)), max(|y| * reach / (step * zero)))
    scale = size, or -size in every other slot                              fp16, one per token
    zero  = (2**bits - 1) / 2
    code  = clamp(round(y / (scale * step) + zero), 0, 2**bits - 1)
    y'    = scale * step * (code - zero)

``step`` is the distance of ``2**bits`` evenly spaced levels about zero that rounds a standard
Gaussian with the least mean squared error; it depends on the width of the plane group alone, so
nothing but the scale is stored. After a rotation that mixes all channels the numbers of a token do
look like a Gaussian; where they do not, clipping costs more in attention than a wider step, since
it shortens the same few keys every time. So the levels reach at least ``reach`` of the largest
number of a token: all of it from 3 bits on, 3/4 of it at 2 bits.

Attention sums weights times scales times codes, which are not centred: with scales of one sign the
sum grows with the tokens, and tensor cores, which cut off what they add, lose a little of all of it
each time (at 8192 equal weights 0.4 % of what is left once the zeros are subtracted). Scales whose
signs alternate keep it small. A negative scale mirrors the codes and changes no number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from squat_fx.layouts.planes import LANES

# 0 bits have one level, zero, so that any step but 0 does.
STEP = (1.0, 1.5956, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
REACH = (0.0, 0.0, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
SMALLEST_SCALE = 2.0**-24  # the smallest fp16; a token of zeros gets it
LARGEST_HALF = 65504.0


def step_and_zero(
    widths: tuple[int, ...], head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Step and zero of each channel, fp32 ``[head_dim]``."""
    bits = torch.tensor(widths, device=device).repeat_interleave(LANES)[:head_dim]
    return torch.tensor(STEP, device=device)[bits], (2.0**bits - 1) / 2


def least_scale(bits: int) -> float:
    """What the scale of a token is at least, for each unit of a number in a plane of ``bits``."""
    return REACH[bits] / (STEP[bits] * (2**bits - 1) / 2) if bits else 0.0


def token_scale(y: Tensor, widths: tuple[int, ...]) -> Tensor:
    """The size of the scale of each token, fp16 ``[..., tokens, 1]``."""
    factor = torch.tensor([least_scale(bits) for bits in widths], device=y.device)
    factor = factor.repeat_interleave(LANES)[: y.shape[-1]]
    scale = y.square().mean(-1, keepdim=True).sqrt()
    scale = torch.maximum(scale, (y.abs() * factor).amax(-1, keepdim=True))
    return scale.clamp(SMALLEST_SCALE, LARGEST_HALF).half()


def alternating_signs(tokens: int, first_slot: int, device: torch.device) -> Tensor:
    """The signs of the scales of ``tokens`` slots, fp16 ``[tokens, 1]``: positive in even ones."""
    slot = torch.arange(first_slot, first_slot + tokens, device=device)
    return (1 - 2 * (slot % 2)).half()[:, None]


def quantize_tokens(
    y: Tensor, widths: tuple[int, ...], feedback: Tensor | None = None, first_slot: int = 0
) -> tuple[Tensor, Tensor]:
    """Codes (uint8, the shape of ``y``) and scales (fp16 ``[..., tokens, 1]``).

    Args:
        y: fp32 ``[batch, heads, tokens, head_dim]``.
        widths: bits of each plane group of 16 channels.
        feedback: see :class:`squat_fx.codecs.base.Fit`; the scale is that of ``y`` before it.
        first_slot: where the first token is stored.
    """
    head_dim = y.shape[-1]
    scale = token_scale(y, widths) * alternating_signs(y.shape[-2], first_slot, y.device)
    step, zero = step_and_zero(widths, head_dim, y.device)
    unit = scale.float() * step
    largest = 2 * zero
    if feedback is None:
        codes = (y / unit).add_(zero).round_().clamp_(min=0.0).minimum(largest)
        return codes.to(torch.uint8), scale
    y = y.clone()
    codes = torch.empty_like(y)
    for first in range(0, head_dim, LANES):
        block, later = slice(first, first + LANES), slice(first + LANES, head_dim)
        rounded = (y[..., block] / unit[..., block]).add_(zero[block]).round_().clamp_(min=0.0)
        codes[..., block] = rounded = rounded.minimum(largest[block])
        error = (rounded - zero[block]) * unit[..., block] - y[..., block]
        y[..., later] += error @ feedback[..., block, later]
    return codes.to(torch.uint8), scale


def dequantize_tokens(codes: Tensor, scale: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Undo :func:`quantize_tokens`, in fp32."""
    step, zero = step_and_zero(widths, codes.shape[-1], codes.device)
    return (codes.float() - zero) * (scale.float() * step)
