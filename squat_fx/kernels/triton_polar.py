"""Packed tokens of the layouts ``polar/token`` and ``polar/fitted`` inside a kernel.

    r_{2j}, r_{2j+1} = r_j * cos(angle_j), r_j * sin(angle_j)        levels 4 to 1, from the radius
    x = r @ R.T                                                      the fixed rotation

The codes of a block of 16 channels are one word of at most 32 bits at each level, at a bit that is
known when the kernel is compiled (``layouts/polar_tree.py``): a tile of ``N`` tokens loads ``[N,
1]``, and the ``[N, angles]`` codes are shifted out of it. A level then doubles the columns, ``[N,
1]`` to ``[N, 16]``, each radius beside its partner in the same thread.

Cosines and sines of the codebook of all prompts are constants of the kernel; those of a prompt's
own codebook come from its arena, fp32 ``[2, entries]`` for each head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squat_fx.kernels.triton_hadamard import rotate_back
from squat_fx.kernels.triton_planes import load_or_zero, num_planes

LEVELS = tl.constexpr(4)


@triton.constexpr_function
def angles_at(level):
    """Angles of a block."""
    return 16 >> level


@triton.constexpr_function
def width_at(fmt, level):
    """Bits of an angle."""
    return fmt.widths[level - 1]


@triton.constexpr_function
def first_bit(fmt, block, level):
    """Where the codes of a block begin in a token."""
    below = sum((16 >> i) * fmt.widths[i - 1] for i in range(1, level))
    return fmt.num_planes * below + block * (16 >> level) * fmt.widths[level - 1]


@triton.constexpr_function
def first_entry(fmt, level):
    """Centroids of the levels below."""
    return sum(2**bits for bits in fmt.widths[: level - 1])


@triton.constexpr_function
def num_entries(fmt):
    """Centroids of all levels."""
    return sum(2**bits for bits in fmt.widths)


@triton.constexpr_function
def cosine(fmt, level, code):
    """The cosine of a centroid of the codebook of all prompts."""
    return fmt.tables[level - 1][code]


@triton.jit
def load_bits(rows, keep, first: tl.constexpr, count: tl.constexpr):
    """``count`` bits of each token from bit ``first`` on, int32 ``[N, 1]``; what is above them is
    not cleared.
    """
    bits = load_or_zero(rows + first // 8, keep).to(tl.int32) >> (first % 8)
    for i in tl.static_range(1, (first % 8 + count + 7) // 8):
        bits |= load_or_zero(rows + (first // 8 + i), keep).to(tl.int32) << (8 * i - first % 8)
    return bits


@triton.jit
def steep_cosine(codes, level: tl.constexpr, fmt: tl.constexpr):
    """The cosine of each code's centroid in the first quarter of the circle."""
    found = tl.full(codes.shape, cosine(fmt, level, 0), tl.float32)
    for code in tl.static_range(1, 2 ** width_at(fmt, level)):
        found = tl.where(codes == code, cosine(fmt, level, code), found)
    return found


@triton.jit
def round_cosine(codes, fmt: tl.constexpr):
    """The cosine of each code's centroid on the whole circle, which has a quarter of them in each
    quarter. Codes may be negative or too large: they go round; they have 2 bits or more.
    """
    quarter: tl.constexpr = 2 ** width_at(fmt, 1) // 4
    found = tl.full(codes.shape, cosine(fmt, 1, 0), tl.float32)
    # Odd quarters run backwards.
    place = tl.where(codes & quarter != 0, quarter - 1 - codes, codes) & (quarter - 1)
    for code in tl.static_range(1, quarter):
        found = tl.where(place == code, cosine(fmt, 1, code), found)
    left = (codes + quarter) & (2 * quarter) != 0
    return tl.where(left, -found, found)


@triton.jit
def cosine_and_sine(stored, head, codes, level: tl.constexpr, fmt: tl.constexpr):
    """Of the angles that ``codes`` stand for, fp32, the shape of ``codes``."""
    bits: tl.constexpr = width_at(fmt, level)
    if stored.fixed is not None:
        table = stored.fixed + head * (2 * num_entries(fmt)) + first_entry(fmt, level)
        cosines = tl.load(table + codes)
        sines = tl.load(table + num_entries(fmt) + codes)
    elif level > 1:  # even about pi / 4
        cosines = steep_cosine(codes, level, fmt)
        sines = steep_cosine(2**bits - 1 - codes, level, fmt)
    elif bits == 1:  # pi / 2 and 3 pi / 2
        cosines = tl.zeros(codes.shape, tl.float32)
        sines = (1 - 2 * codes).to(tl.float32)
    else:  # a quarter turn is a quarter of the codes
        cosines = round_cosine(codes, fmt)
        sines = round_cosine(codes - 2**bits // 4, fmt)
    return cosines, sines


@triton.jit
def split_radii(
    stored, head, rows, radii, keep, block: tl.constexpr, level: tl.constexpr, fmt: tl.constexpr
):
    """The radii above ``level``, ``[N, n]``, to those below it, ``[N, 2 n]``."""
    bits: tl.constexpr = width_at(fmt, level)
    count: tl.constexpr = angles_at(level)
    word = load_bits(rows, keep, first_bit(fmt, block, level), bits * count)
    codes = (word >> (bits * tl.arange(0, count)[None, :])) & (2**bits - 1)
    cosines, sines = cosine_and_sine(stored, head, codes, level, fmt)
    pairs = tl.join(radii * cosines, radii * sines)
    return tl.reshape(pairs, [pairs.shape[0], 2 * count])


@triton.jit
def polar_planes(stored, head, slot, keep, lane, fmt: tl.constexpr):
    """Packed tokens at slot [N, 1] as numbers in the model's frame: a tuple of fp32 [N, 16], one
    per plane group of 16 channels; zeros where not ``keep``.
    """
    token = head * stored.capacity + slot
    rows = stored.qdata + token * fmt.row_size
    radius = stored.scale + token * num_planes(fmt)
    planes = ()
    for j in tl.static_range(num_planes(fmt)):
        x = load_or_zero(radius + j, keep).to(tl.float32)
        for i in tl.static_range(LEVELS):
            x = split_radii(stored, head, rows, x, keep, j, LEVELS - i, fmt)
        planes += (tl.where(16 * j + lane < fmt.head_dim, x, 0.0),)
    return rotate_back(planes, lane, fmt)
