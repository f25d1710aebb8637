"""Symmetric levels with one scale per token: the rounding of the layout ``planes/token``.

    size  = max(sqrt(mean(y**2)), max(|y| * reach / (step * zero)))
    zero  = (2**bits - 1) / 2
    code  = clamp(round(y / (size * step) + zero), 0, 2**bits - 1)
    y'    = scale * step * (code - zero)             scale: fp16, negative in every other slot

``step`` is the distance of ``2**bits`` evenly spaced levels about zero that rounds a standard
Gaussian with the least mean squared error; it depends on the width of the plane group alone, so
nothing but the scale is stored. After a rotation that mixes all channels the numbers of a token do
look like a Gaussian. From 4 bits on the levels reach the largest number of a token wherever it is.

Rounding to the nearest of few levels shortens a token, most where its numbers look least like a
Gaussian, and the same tokens are then attended too little by every query. The scale gives it back
what it lost. Keys come back as long as they were, ``|y'| = |y|``; values, of which attention takes
means, come back ``unbiased``, ``y' @ y = y @ y``. The scale of least error, ``y' @ y = y' @ y'``,
shortens all tokens and is worse than none mended.

Where plane groups have different widths levels reach three quarters of the largest number at 2 bits
and all of it from 3 bits on. In a rotated frame all channels are worth the same, and so they count
alike in what the scale keeps. In a calibrated basis the narrow plane groups are narrow because they
are worth little; what they lose must not be made up for in the wide ones. There a plane group
counts as much as its width says that it is worth: one over the error that the width leaves, since
bits were given so that what is left is worth the same everywhere.

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
REACH = (0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0)
REACH_OF_MIXED = (0.0, 0.0, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
DISTORTION = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.00349, 0.00104, 0.00031, 9e-5)
"""Relative mean squared error of rounding a Gaussian with 0 to 8 bits."""

SMALLEST_SCALE = 2.0**-24  # the smallest fp16; a token of zeros gets it
LARGEST_HALF = 65504.0


def step_and_zero(
    widths: tuple[int, ...], head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Step and zero of each channel, fp32 ``[head_dim]``."""
    bits = torch.tensor(widths, device=device).repeat_interleave(LANES)[:head_dim]
    return torch.tensor(STEP, device=device)[bits], (2.0**bits - 1) / 2


def are_mixed(widths: tuple[int, ...]) -> bool:
    """Whether plane groups have different widths."""
    return len(set(widths)) > 1


def least_scales(widths: tuple[int, ...]) -> tuple[float, ...]:
    """What the size of a token is at least, for each unit of a number, by plane group."""
    reach = REACH_OF_MIXED if are_mixed(widths) else REACH
    return tuple(reach[b] / (STEP[b] * (2**b - 1) / 2) if b else 0.0 for b in widths)


def token_size(y: Tensor, widths: tuple[int, ...]) -> Tensor:
    """What the numbers of each token are measured with, fp32 ``[..., tokens, 1]``."""
    factor = torch.tensor(least_scales(widths), device=y.device)
    factor = factor.repeat_interleave(LANES)[: y.shape[-1]]
    size = y.square().mean(-1, keepdim=True).sqrt()
    size = torch.maximum(size, (y.abs() * factor).amax(-1, keepdim=True))
    return size.clamp(SMALLEST_SCALE, LARGEST_HALF)


def worths(widths: tuple[int, ...], latent: bool) -> tuple[float, ...]:
    """What the numbers of each plane group count in what a scale keeps, relative to those of the
    widest; nothing without bits. ``latent``: the frame is a calibrated basis.
    """
    least = DISTORTION[max(widths)]
    return tuple((least / DISTORTION[b] if latent else 1.0) if b else 0.0 for b in widths)


def alternating_signs(tokens: int, first_slot: int, device: torch.device) -> Tensor:
    """The signs of the scales of ``tokens`` slots, fp16 ``[tokens, 1]``: positive in even ones."""
    slot = torch.arange(first_slot, first_slot + tokens, device=device)
    return (1 - 2 * (slot % 2)).half()[:, None]


def quantize_tokens(
    y: Tensor,
    widths: tuple[int, ...],
    feedback: Tensor | None = None,
    first_slot: int = 0,
    unbiased: bool = False,
    latent: bool = False,
) -> tuple[Tensor, Tensor]:
    """Codes (uint8, the shape of ``y``) and scales (fp16 ``[..., tokens, 1]``).

    Args:
        y: fp32 ``[batch, heads, tokens, head_dim]``.
        widths: bits of each plane group of 16 channels.
        feedback: see :class:`squat_fx.codecs.base.Fit`; size and length are those before it.
        first_slot: where the first token is stored.
        unbiased: see the module.
        latent: whether the frame is a calibrated basis.
    """
    head_dim = y.shape[-1]
    sign = alternating_signs(y.shape[-2], first_slot, y.device)
    step, zero = step_and_zero(widths, head_dim, y.device)
    size = token_size(y, widths)
    unit = size * sign * step
    codes = torch.empty_like(y)
    rest = y if feedback is None else y.clone()
    for first in range(0, head_dim, LANES if feedback is not None else head_dim):
        block = slice(first, None if feedback is None else first + LANES)
        rounded = (rest[..., block] / unit[..., block]).add_(zero[block]).round_().clamp_(min=0.0)
        codes[..., block] = rounded = rounded.minimum(2 * zero[block])
        if feedback is not None:
            later = slice(first + LANES, head_dim)
            error = (rounded - zero[block]) * unit[..., block] - rest[..., block]
            rest[..., later] += error @ feedback[..., block, later]
    size = size * _mending(
        y / (size * sign), (codes - zero) * step, worths(widths, latent), unbiased
    )
    scale = size.clamp(SMALLEST_SCALE, LARGEST_HALF).half() * sign
    return codes.to(torch.uint8), scale


def _mending(units: Tensor, levels: Tensor, of_groups: tuple[float, ...], unbiased: bool) -> Tensor:
    """What to multiply ``levels`` with for the length or the product of ``units``, in which plane
    groups count as :func:`worths` says.
    """
    worth = torch.tensor(of_groups, device=units.device)
    worth = worth.repeat_interleave(LANES)[: units.shape[-1]]
    units = units.masked_fill(worth == 0, 0.0)
    total = (worth * units.square()).sum(-1, keepdim=True)
    kept = (worth * levels * (units if unbiased else levels)).sum(-1, keepdim=True)
    ratio = total / kept.clamp_min(SMALLEST_SCALE)
    return ratio if unbiased else ratio.sqrt()


def dequantize_tokens(codes: Tensor, scale: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Undo :func:`quantize_tokens`, in fp32."""
    step, zero = step_and_zero(widths, codes.shape[-1], codes.device)
    return (codes.float() - zero) * (scale.float() * step)
