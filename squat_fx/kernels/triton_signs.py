"""Packed tokens of the layout ``signs/token`` inside a kernel.

    x[c] = sqrt(pi / 2) / sketch_dim * norm * (signs @ P)[c]

with signs and norm of the outliers where ``c`` is one of them, of the rest elsewhere. A tensor core
multiplies ones and minus ones with ``P``, both fp16, so products are exact and sums fp32. ``P`` is
read from memory, ``BLOCK_K`` directions at a time; all programs read the same.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from squat_fx.kernels.triton_planes import num_planes

BLOCK_K = tl.constexpr(16)  # of a dot; with more of them, 128 channels take 255 registers and spill
FACTOR = tl.constexpr(math.sqrt(math.pi / 2))
INSIDE = tl.constexpr(0)
OUTSIDE = tl.constexpr(1)
COUNT = tl.constexpr(2)


@triton.constexpr_function
def part(fmt, index):
    """Signs of the keys, signs of their outliers, or how many outliers there are."""
    return (*fmt.widths, 0, 0)[index]


@triton.jit
def load_signs(rows, first, keep):
    """``BLOCK_K`` signs of the tokens at ``rows`` ``[N, 1]``, from sign ``first`` on, fp16."""
    place = tl.arange(0, BLOCK_K)[None, :]
    byte = tl.load(rows + (first + place) // 8, mask=keep, other=0).to(tl.int32)
    return (((byte >> (place % 8)) & 1) * 2 - 1).to(tl.float16)


@triton.jit
def backwards(stored, rows, first, keep, lane, SIGNS: tl.constexpr, fmt: tl.constexpr):
    """``signs @ P`` of the signs from ``first`` on: a tuple of fp32 ``[N, 16]``."""
    sums = ()
    for _ in tl.static_range(num_planes(fmt)):
        sums += (tl.zeros([rows.shape[0], 16], tl.float32),)
    for k in range(0, SIGNS, BLOCK_K):
        signs = load_signs(rows, first + k, keep)
        direction = stored.fixed + (k + tl.arange(0, BLOCK_K)[:, None]) * fmt.head_dim
        longer = ()
        for j in tl.static_range(num_planes(fmt)):
            channel = 16 * j + lane
            matrix = tl.load(direction + channel, mask=channel < fmt.head_dim, other=0.0)
            longer += (tl.dot(signs, matrix, sums[j]),)
        sums = longer
    return sums


@triton.jit
def signs_planes(stored, head, slot, keep, lane, fmt: tl.constexpr):
    """Packed tokens at slot ``[N, 1]``, ``N`` at least 16, as numbers: a tuple of fp32 ``[N, 16]``,
    one for each plane group; finite where not ``keep``.

    ``stored.scale`` are the norms, ``stored.zero_point`` the outlier channels, ``stored.fixed`` the
    directions.
    """
    INSIDE_SIGNS: tl.constexpr = part(fmt, INSIDE)
    OUTSIDE_SIGNS: tl.constexpr = part(fmt, OUTSIDE)
    OUTLIERS: tl.constexpr = part(fmt, COUNT)
    token = head * stored.capacity + slot
    rows = stored.qdata + token * fmt.row_size
    numbers = ()
    inside = backwards(stored, rows, 0, keep, lane, INSIDE_SIGNS, fmt)
    if OUTLIERS == 0:
        norm = tl.load(stored.scale + token, mask=keep, other=0.0).to(tl.float32)
        norm *= FACTOR / INSIDE_SIGNS
        for j in tl.static_range(num_planes(fmt)):
            numbers += (inside[j] * norm,)
    else:
        outside = backwards(stored, rows, INSIDE_SIGNS, keep, lane, OUTSIDE_SIGNS, fmt)
        norm = tl.load(stored.scale + 2 * token, mask=keep, other=0.0).to(tl.float32)
        apart = tl.load(stored.scale + 2 * token + 1, mask=keep, other=0.0).to(tl.float32)
        norm = tl.sqrt(tl.maximum(norm * norm - apart * apart, 0.0)) * (FACTOR / INSIDE_SIGNS)
        apart *= FACTOR / OUTSIDE_SIGNS
        group = head * (stored.capacity // fmt.token_group) + slot // fmt.token_group
        for j in tl.static_range(num_planes(fmt)):
            is_outlier = tl.zeros([rows.shape[0], 16], tl.int1)
            for i in tl.static_range(OUTLIERS):
                channel = tl.load(stored.zero_point + group * OUTLIERS + i, mask=keep, other=0)
                is_outlier |= channel.to(tl.int32) == 16 * j + lane
            numbers += (tl.where(is_outlier, outside[j] * apart, inside[j] * norm),)
    return numbers
