"""Packed tokens of the layout ``polar/pairs`` inside a kernel.

    x_i, x_{i + d/2} = radius * cos(angle), radius * sin(angle)
    number           = min + (code + 1/2) * scale         of a radius and of an angle

The codes of 16 pairs are two plane groups of bit planes, one of radii and one of angles
(``layouts/polar_pairs.py``); pair ``i`` is lane ``i % 16``. Where ``head_dim / 2`` is whole plane
groups, each pair of those becomes two plane groups of numbers. Elsewhere the second half of the
head begins in the middle of a plane group: then lanes look up the pair that their channel belongs
to, and each plane group of numbers is put together for itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squat_fx.kernels.triton_planes import load_or_zero, num_planes, unpack_plane, words_of_rows


@triton.constexpr_function
def num_pairs(fmt):
    return fmt.head_dim // 2


@triton.constexpr_function
def pair_planes(fmt):
    """Plane groups of radii, and of angles."""
    return -(-(fmt.head_dim // 2) // 16)


@triton.constexpr_function
def in_step(fmt):
    """Whether channels lie in the lanes of their pairs."""
    return fmt.head_dim % 32 == 0


@triton.jit
def cosine_and_sine(angle):
    """Of angles of a few turns at most, to an ulp or two of 1.

    To the nearest quarter turn, then polynomials (Cephes): ``tl.cos`` and ``tl.sin`` also take huge
    angles, and with them attention had 100 instructions a code instead of 28 (head_dim 128, sm_80).
    """
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    rest = (angle - quarters * 1.5703125) - quarters * 4.838267948966e-4  # less than pi / 4
    square = rest * rest
    sine = (-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1
    sine = rest + rest * square * sine
    cosine = (2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2
    cosine = 1.0 - 0.5 * square + square * square * cosine
    turn = quarters.to(tl.int32)
    odd = turn % 2 != 0
    x, y = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where((turn + 1) & 2 != 0, -x, x), tl.where(turn & 2 != 0, -y, y)


@triton.jit
def pair_parameters(stored, head, slot, keep, pair, fmt: tl.constexpr):
    """Scales and smallest numbers of ``pair`` ``[1, 16]``: of radii, then of angles."""
    groups = head * (stored.capacity // fmt.token_group) + slot // fmt.token_group
    offsets = groups * fmt.head_dim + pair
    angles = offsets + num_pairs(fmt)
    return (
        load_or_zero(stored.scale + offsets, keep).to(tl.float32),
        load_or_zero(stored.zero_point + offsets, keep).to(tl.float32),
        load_or_zero(stored.scale + angles, keep).to(tl.float32),
        load_or_zero(stored.zero_point + angles, keep).to(tl.float32),
    )


@triton.jit
def radius_and_angle(stored, head, slot, keep, pair, radii, angles, fmt: tl.constexpr):
    """Codes ``[N, 16]`` of ``pair`` ``[1, 16]`` as numbers, fp32."""
    scale, low, angle_scale, angle_low = pair_parameters(stored, head, slot, keep, pair, fmt)
    radius = low + (radii.to(tl.float32) + 0.5) * scale
    angle = angle_low + (angles.to(tl.float32) + 0.5) * angle_scale
    return radius, angle


@triton.jit
def polar_pairs_planes(stored, head, slot, keep, lane, fmt: tl.constexpr):
    """Packed tokens at slot [N, 1] as numbers in the model's frame: a tuple of fp32 [N, 16], one
    per plane group of 16 channels; zeros where not ``keep``.
    """
    rows = stored.qdata + head * stored.capacity * fmt.row_size + slot * fmt.row_size
    planes = ()
    if in_step(fmt):
        words = words_of_rows(rows, keep, lane, fmt)
        second = ()
        for j in tl.static_range(pair_planes(fmt)):
            radii = unpack_plane(words, j, fmt)
            angles = unpack_plane(words, pair_planes(fmt) + j, fmt)
            radius, angle = radius_and_angle(
                stored, head, slot, keep, 16 * j + lane, radii, angles, fmt
            )
            cosine, sine = cosine_and_sine(angle)
            planes += (radius * cosine,)
            second += (radius * sine,)
        planes += second
    else:
        for j in tl.static_range(num_planes(fmt)):
            channel = tl.minimum(16 * j + lane, fmt.head_dim - 1)
            is_second = channel >= num_pairs(fmt)
            pair = tl.where(is_second, channel - num_pairs(fmt), channel)
            words = words_of_rows(rows, keep, pair % 16, fmt)
            radii = unpack_plane(words, 0, fmt)
            angles = unpack_plane(words, pair_planes(fmt), fmt)
            for k in tl.static_range(1, pair_planes(fmt)):
                here = pair // 16 == k
                radii = tl.where(here, unpack_plane(words, k, fmt), radii)
                angles = tl.where(here, unpack_plane(words, pair_planes(fmt) + k, fmt), angles)
            radius, angle = radius_and_angle(stored, head, slot, keep, pair, radii, angles, fmt)
            cosine, sine = cosine_and_sine(angle)
            planes += (radius * tl.where(is_second, sine, cosine),)
    return planes
