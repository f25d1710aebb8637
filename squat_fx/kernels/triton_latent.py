"""Packed tokens of the layouts ``latent/rope`` and ``latent/sparse`` inside a kernel.

    latent = code * scale + zero_point
    x      = latent @ basis + center
    x'     = x * cos(angle) + partner * sin(angle)        angle = position * frequency of the pair

A tile is multiplied by the basis 16 latent channels at a time; the basis is fp16, so two products
of tensor cores are as good as fp32. ``partner`` is the other channel of a pair, negative for the
first one: a plane group of its own where half of the rotated channels are whole plane groups, and
elsewhere a second product, with the columns of the basis in the order of the partners. All programs
of a head read the same basis. The exact keys of outliers (``layouts/latent_sparse.py``) take the
place of what was decoded.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from squat_fx.kernels.triton_hadamard import dot_short
from squat_fx.kernels.triton_planes import load_words, num_planes, unpack_plane
from squat_fx.kernels.triton_polar_pairs import cosine_and_sine

TURN = tl.constexpr(2 * math.pi)
CHUNK = tl.constexpr(8)  # tokens of an outlier


@triton.constexpr_function
def num_latent_planes(fmt):
    """Plane groups of latent channels that are stored."""
    return sum(1 for bits in fmt.widths if bits)


@triton.constexpr_function
def num_latent(fmt):
    """Latent channels that are stored."""
    return min(16 * sum(1 for bits in fmt.widths if bits), fmt.head_dim)


@triton.constexpr_function
def rotary_dim(fmt):
    """Channels that turn."""
    return fmt.details[0] if fmt.details else 0


@triton.constexpr_function
def is_interleaved(fmt):
    """Whether pairs are neighbours."""
    return bool(fmt.details and fmt.details[1])


@triton.constexpr_function
def num_outliers(fmt):
    """Chunks of tokens that are kept exactly."""
    return fmt.details[3] if len(fmt.details) > 3 else 0


@triton.constexpr_function
def partner_plane(fmt, plane):
    """The plane group with the partners of another, in the same lanes; -1: there is none."""
    half = fmt.details[0] // 2
    if fmt.details[1] or half % 16:
        return -1
    return plane + half // 16 if 16 * plane < half else plane - half // 16


@triton.jit
def from_latent(stored, head, latent, channel, inside, fmt: tl.constexpr):
    """The numbers of ``channel`` ``[1, 16]``, of latent plane groups; fp32 ``[N, 16]``."""
    center = tl.load(stored.center + head * fmt.head_dim + channel, mask=inside, other=0.0)
    x = tl.zeros([latent[0].shape[0], 16], tl.float32) + center
    for i in tl.static_range(num_latent_planes(fmt)):
        index = 16 * i + tl.arange(0, 16)[:, None]  # [16 latent, 1]
        rows = stored.basis + (head * num_latent(fmt) + index) * fmt.head_dim
        basis = tl.load(rows + channel, mask=inside & (index < num_latent(fmt)), other=0.0)
        x = dot_short(latent[i], basis.to(tl.float32), x)
    return x


@triton.jit
def latent_planes(stored, head, slot, position, keep, lane, fmt: tl.constexpr):
    """Packed tokens at slot ``[N, 1]``, ``N`` at least 16, and ``position``, as numbers: a tuple of
    fp32 ``[N, 16]``, one for each plane group; finite where not ``keep``.
    """
    words = load_words(stored, head, slot, keep, lane, fmt)
    latent = ()
    for i in tl.static_range(num_latent_planes(fmt)):
        index = 16 * i + lane  # [1, 16]
        offsets = head * num_latent(fmt) + index
        inside = index < num_latent(fmt)
        scale = tl.load(stored.scale + offsets, mask=inside, other=0.0)
        zero_point = tl.load(stored.zero_point + offsets, mask=inside, other=0.0)
        latent += (unpack_plane(words, i, fmt).to(tl.float32) * scale + zero_point,)
    planes = ()
    for j in tl.static_range(num_planes(fmt)):
        channel = 16 * j + lane
        planes += (from_latent(stored, head, latent, channel, channel < fmt.head_dim, fmt),)
    if rotary_dim(fmt) > 0:
        planes = turn(stored, head, position, latent, planes, lane, fmt)
    if num_outliers(fmt) > 0:
        planes = with_outliers(stored, head, position, keep, planes, lane, fmt)
    return planes


@triton.jit
def with_outliers(stored, head, position, keep, planes, lane, fmt: tl.constexpr):
    """``planes`` with the exact keys where ``position`` ``[N, 1]`` is in a chunk of outliers."""
    place = tl.full(position.shape, -1, tl.int32)
    for i in range(num_outliers(fmt)):
        first = tl.load(stored.outlier + head * num_outliers(fmt) + i)
        inside = (first >= 0) & (position >= first) & (position < first + CHUNK)
        place = tl.where(inside, CHUNK * i + position - first, place)
    is_outlier = keep & (place >= 0)
    rows = stored.outlier_key + (head * num_outliers(fmt) * CHUNK + place) * fmt.head_dim
    found = ()
    for j in tl.static_range(num_planes(fmt)):
        channel = 16 * j + lane
        x = tl.load(rows + channel, mask=is_outlier & (channel < fmt.head_dim), other=0.0)
        found += (tl.where(is_outlier, x.to(tl.float32), planes[j]),)
    return found


@triton.jit
def turn(stored, head, position, latent, planes, lane, fmt: tl.constexpr):
    """``planes`` turned by the angles of their positions."""
    HALF: tl.constexpr = rotary_dim(fmt) // 2
    turned = ()
    for j in tl.static_range(num_planes(fmt)):
        x = planes[j]
        if 16 * j < rotary_dim(fmt):
            channel = 16 * j + lane
            turns = channel < rotary_dim(fmt)
            if is_interleaved(fmt):
                is_second = channel % 2 == 1
                pair = channel // 2
                partner = tl.where(is_second, channel - 1, channel + 1)
            else:
                is_second = channel >= HALF
                pair = tl.where(is_second, channel - HALF, channel)
                partner = tl.where(is_second, channel - HALF, channel + HALF)
            if partner_plane(fmt, j) >= 0:
                other = planes[partner_plane(fmt, j)]
            else:
                other = from_latent(stored, head, latent, partner, turns, fmt)
            pointers = stored.frequency + head * HALF + pair
            frequency = tl.load(pointers, mask=turns, other=0.0) * (1 / TURN)
            angle = position.to(tl.float32) * frequency
            angle = (angle - tl.floor(angle + 0.5)) * TURN
            cosine, sine = cosine_and_sine(angle)
            y = x * cosine + tl.where(is_second, other, -other) * sine
            x = tl.where(turns, y, x)
        turned += (x,)
    return turned
