"""The stored tokens as numbers.

    planes/channel:  x = code * scale + zero_point
    planes/token:    x = (scale * step * (code - zero)) @ inverse * factor + offset

where a token is packed, the exact number elsewhere, zero for padding; from token ``first`` on.
``output`` is ``[batch, num_kv_heads, length - first, head_dim]``, contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squat_fx.kernels.triton_hadamard import rotate_back
from squat_fx.kernels.triton_packed import any_plane, load_packed
from squat_fx.kernels.triton_planes import (
    exact_rows,
    largest_code,
    load_affine,
    load_words,
    num_planes,
    packed_tokens,
    step,
    unpack_plane,
)
from squat_fx.kernels.triton_round import dot_in_fp32

BLOCK_T = 32
TOKEN_BLOCK_T = 32  # planes/token
MATRIX_BLOCK_T = 64  # with a matrix, of which a program takes this many columns:
MATRIX_CHANNELS = 64


@triton.jit
def dequantize_kernel(
    stored,
    output,
    watermark,
    num_kv_heads,
    first,
    length,
    FORMAT: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Grid ``(batch * num_kv_heads, blocks of tokens)``."""
    head = tl.program_id(0).to(tl.int64)
    start = tl.load(stored.start + head // num_kv_heads)
    count = packed_tokens(watermark, start, FORMAT)
    lane = tl.arange(0, 16)[None, :]
    position = first + tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]  # [T, 1]
    there = position < length
    keep = there & (position >= start)
    slot = position - start - FORMAT.sink_length
    packed = keep & (slot >= 0) & (slot < count)
    exact = exact_rows(stored, None, 0, 0, head, position, start, length, FORMAT)
    words = load_packed(stored, head, slot, position, packed, lane, FORMAT)
    for j in tl.static_range(num_planes(FORMAT)):
        channel = 16 * j + lane
        x = any_plane(stored, words, exact, head, slot, packed, keep, lane, j, FORMAT)
        row = head * (length - first) + position - first
        out = output + row * FORMAT.head_dim + channel
        tl.store(out, x.to(output.dtype.element_ty), mask=there & (channel < FORMAT.head_dim))


@triton.jit
def dequantize_token_kernel(
    stored, output, watermark, num_kv_heads, first, length, FORMAT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The same for ``planes/token``. Grid ``(batch * num_kv_heads, blocks of tokens, blocks of
    channels)``; the fixed rotation takes one block of channels.
    """
    head = tl.program_id(0).to(tl.int64)
    start = tl.load(stored.start + head // num_kv_heads)
    count = packed_tokens(watermark, start, FORMAT)
    lane = tl.arange(0, 16)[None, :]
    position = first + tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]  # [T, 1]
    there = position < length
    keep = there & (position >= start)
    slot = position - start - FORMAT.sink_length
    packed = keep & (slot >= 0) & (slot < count)
    exact = exact_rows(stored, None, 0, 0, head, position, start, length, FORMAT)
    words = load_words(stored, head, slot, packed, lane, FORMAT)
    scale = tl.load(stored.scale + head * stored.capacity + slot, mask=packed, other=0.0)
    scale = scale.to(tl.float32)
    rows = output + (head * (length - first) + position - first) * FORMAT.head_dim
    if stored.basis is None:
        planes = ()
        for j in tl.static_range(num_planes(FORMAT)):
            inside = 16 * j + lane < FORMAT.head_dim
            planes += (tl.where(inside, half_steps(words, j, FORMAT) * (step(FORMAT, j) / 2), 0.0),)
        planes = rotate_back(planes, lane, FORMAT)
        for j in tl.static_range(num_planes(FORMAT)):
            store_numbers(
                rows, planes[j] * scale, stored, exact, head, 16 * j + lane, there, keep, packed,
                FORMAT,
            )  # fmt: skip
    else:
        inverse = stored.basis + stored.inverse + head % num_kv_heads * stored.basis_stride
        channel = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        y = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for j in tl.static_range(num_planes(FORMAT)):
            if largest_code(FORMAT, j) > 0:
                inner = 16 * j + tl.arange(0, 16)[:, None]
                inside = (inner < FORMAT.head_dim) & (channel < FORMAT.head_dim)
                pointers = inverse + inner * FORMAT.head_dim + channel
                matrix = tl.load(pointers, mask=inside, other=0.0) * (step(FORMAT, j) / 2)
                y = dot_in_fp32(half_steps(words, j, FORMAT), matrix, y, True)
        store_numbers(
            rows, y * scale, stored, exact, head, channel, there, keep, packed, FORMAT
        )  # fmt: skip


@triton.jit
def half_steps(words, plane: tl.constexpr, fmt: tl.constexpr):
    """The codes of a plane group as odd integers about zero, fp32: half a step is a unit."""
    return (unpack_plane(words, plane, fmt) * 2 - largest_code(fmt, plane)).to(tl.float32)


@triton.jit
def store_numbers(
    rows, y, stored, exact, head, channel, there, keep, packed, fmt: tl.constexpr
):  # fmt: skip
    """Packed numbers, which factors and offsets have not reached yet, and exact ones."""
    inside = channel < fmt.head_dim
    if fmt.affine:
        offset, factor = load_affine(stored, head, channel, inside, fmt)
        y = y * factor + offset
    x = tl.load(exact + channel, mask=keep & (packed == 0) & inside, other=0.0).to(tl.float32)
    x = tl.where(packed, y, x)
    tl.store(rows + channel, x.to(rows.dtype.element_ty), mask=there & inside)
