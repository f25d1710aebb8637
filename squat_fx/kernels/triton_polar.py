"""Packed tokens of the layout ``polar/token`` inside a kernel.

    r_{2j}, r_{2j+1} = r_j * cos(angle_j), r_j * sin(angle_j)        levels 4 to 1, from the radius
    x = r @ R.T                                                      the fixed rotation

All blocks of 16 channels are decoded at once. At each level the codes of a block are one word of at
most 32 bits (``layouts/polar_tree.py``): a tile of ``N`` tokens loads ``[N, blocks]`` of them and
shifts the ``[N, blocks, angles]`` codes out. A level then doubles the last dim, ``[N, blocks, 1]``
to ``[N, blocks, 16]``, each radius beside its partner in the same thread.

Cosines and sines are gathered from the codebook's arena, fp16 ``[2, entries]`` for each head, which
stays in the multiprocessor's cache. To choose among constants would take a third more instructions,
and Triton would copy numbers of 32 bits to shared memory first, as if they were not used at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squat_fx.kernels.triton_hadamard import rotate_back
from squat_fx.kernels.triton_planes import num_planes

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
def padded_blocks(fmt):
    """Blocks of a tile: a power of two."""
    return 1 << (fmt.num_planes - 1).bit_length()


@triton.constexpr_function
def block_bits(fmt, level):
    """Bits of a block's codes."""
    return (16 >> level) * fmt.widths[level - 1]


@triton.constexpr_function
def first_bit(fmt, level):
    """Where the codes of all blocks begin in a token."""
    return fmt.num_planes * sum((16 >> i) * fmt.widths[i - 1] for i in range(1, level))


@triton.constexpr_function
def word_bytes(fmt, level):
    """How many bytes a block's codes touch at most."""
    here = (16 >> level) * fmt.widths[level - 1]
    below = fmt.num_planes * sum((16 >> i) * fmt.widths[i - 1] for i in range(1, level))
    return max(-(-((below + j * here) % 8 + here) // 8) for j in range(fmt.num_planes))


@triton.constexpr_function
def first_entry(fmt, level):
    """Centroids of the levels below."""
    return sum(2**bits for bits in fmt.widths[: level - 1])


@triton.constexpr_function
def num_entries(fmt):
    """Centroids of all levels."""
    return sum(2**bits for bits in fmt.widths)


@triton.jit
def load_codes(rows, keep, block, level: tl.constexpr, fmt: tl.constexpr):
    """The codes of ``block`` ``[1, blocks]``, int32 ``[N, blocks, angles]``."""
    bits: tl.constexpr = width_at(fmt, level)
    bit = first_bit(fmt, level) + block * block_bits(fmt, level)
    word = tl.load(rows + bit // 8, mask=keep, other=0).to(tl.int32)
    for i in tl.static_range(1, word_bytes(fmt, level)):
        inside = keep & (bit // 8 + i < fmt.row_size)
        byte = tl.load(rows + (bit // 8 + i), mask=inside, other=0)
        word |= byte.to(tl.int32) << (8 * i)
    place = bit[:, :, None] % 8 + bits * tl.arange(0, angles_at(level))[None, None, :]
    return (word[:, :, None] >> place) & (2**bits - 1)


@triton.jit
def cosine_and_sine(stored, head, codes, level: tl.constexpr, fmt: tl.constexpr):
    """Of the angles that ``codes`` stand for, fp32, the shape of ``codes``."""
    cosines = stored.fixed + head * (2 * num_entries(fmt)) + first_entry(fmt, level) + codes
    sines = cosines + num_entries(fmt)
    return tl.load(cosines).to(tl.float32), tl.load(sines).to(tl.float32)


@triton.jit
def split_radii(
    stored, head, rows, radii, keep, block, level: tl.constexpr, fmt: tl.constexpr
):  # fmt: skip
    """The radii above ``level``, ``[N, blocks, n]``, to those below it, ``[N, blocks, 2 n]``."""
    codes = load_codes(rows, keep, block, level, fmt)
    cosines, sines = cosine_and_sine(stored, head, codes, level, fmt)
    pairs = tl.join(radii * cosines, radii * sines)
    return tl.reshape(pairs, [pairs.shape[0], pairs.shape[1], 2 * pairs.shape[2]])


@triton.jit
def plane_groups(x, block, lane, fmt: tl.constexpr):
    """``[N, blocks, 16]`` as a tuple of ``[N, 16]``, one per plane group.

    A block is what is left of a sum when all others are zero: Triton 3.6 gives a tensor core the
    wrong numbers of what was permuted and split.
    """
    planes = ()
    for j in tl.static_range(num_planes(fmt)):
        plane = tl.sum(tl.where(block[:, :, None] == j, x, 0.0), 1)
        planes += (tl.where(16 * j + lane < fmt.head_dim, plane, 0.0),)
    return planes


@triton.jit
def polar_planes(stored, head, slot, keep, lane, fmt: tl.constexpr):
    """Packed tokens at slot [N, 1] as numbers in the model's frame: a tuple of fp32 [N, 16], one
    per plane group of 16 channels; zeros where not ``keep``.
    """
    token = head * stored.capacity + slot
    rows = stored.qdata + token * fmt.row_size
    block = tl.arange(0, padded_blocks(fmt))[None, :]
    keep = keep & (block < num_planes(fmt))
    radii = tl.load(stored.scale + token * num_planes(fmt) + block, mask=keep, other=0.0)
    radii = radii.to(tl.float32)[:, :, None]
    for i in tl.static_range(LEVELS):
        radii = split_radii(stored, head, rows, radii, keep, block, LEVELS - i, fmt)
    return rotate_back(plane_groups(radii, block, lane, fmt), lane, fmt)
