"""Packed tokens of the layout ``levels/token`` inside a kernel.

    x = (level(code) @ R.T) * scale

A level is chosen among the ``2**(bits - 1)`` positive ones of its width by selects, which are exact
and need no memory; the others mirror them. ``R`` is the fixed rotation (``triton_hadamard.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from squat_fx.kernels.triton_hadamard import rotate_back
from squat_fx.kernels.triton_planes import load_words, num_planes, unpack_plane
from squat_fx.layouts.levels import POSITIVE_LEVELS

LEVELS = tl.constexpr(POSITIVE_LEVELS)  # as such, kernels are compiled anew when it changes


@triton.constexpr_function
def num_positive(fmt, plane):
    return len(LEVELS.value[fmt.widths[plane] - 1])


@triton.constexpr_function
def positive_level(fmt, plane, index):
    return LEVELS.value[fmt.widths[plane] - 1][index]


@triton.jit
def level_of(codes, plane: tl.constexpr, fmt: tl.constexpr):
    """The levels of the codes of a plane group, fp32 ``[N, 16]``."""
    half: tl.constexpr = num_positive(fmt, plane)
    positive = codes >= half
    place = tl.where(positive, codes - half, half - 1 - codes)
    level = tl.full(codes.shape, positive_level(fmt, plane, 0), tl.float32)
    for i in tl.static_range(1, half):
        level = tl.where(place == i, positive_level(fmt, plane, i), level)
    return tl.where(positive, level, -level)


@triton.jit
def levels_planes(stored, head, slot, keep, lane, fmt: tl.constexpr):
    """Packed tokens at slot ``[N, 1]`` as numbers: a tuple of fp32 ``[N, 16]``, one for each plane
    group; finite where not ``keep``.
    """
    words = load_words(stored, head, slot, keep, lane, fmt)
    scale = tl.load(stored.scale + head * stored.capacity + slot, mask=keep, other=0.0)
    scale = scale.to(tl.float32)
    planes = ()
    for j in tl.static_range(num_planes(fmt)):
        inside = 16 * j + lane < fmt.head_dim
        planes += (tl.where(inside, level_of(unpack_plane(words, j, fmt), j, fmt), 0.0),)
    rotated = rotate_back(planes, lane, fmt)
    numbers = ()
    for j in tl.static_range(num_planes(fmt)):
        numbers += (rotated[j] * scale,)
    return numbers
