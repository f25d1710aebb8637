"""The stored tokens as numbers.

    planes/channel:  x = code * scale + zero_point
    planes/token:    x = (scale * step * (code - zero)) @ inverse * factor + offset

where a token is packed, the exact number elsewhere, zero for padding.
``output`` is ``[batch, num_kv_heads, length, head_dim]``, contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squat_fx.kernels.triton_hadamard import rotate_back
from squat_fx.kernels.triton_planes import (
    any_plane,
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
TOKEN_BLOCK_T = 64  # planes/token


@triton.jit
def dequantize_kernel(
    stored, output, watermark, num_kv_heads, length, FORMAT: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Grid ``(batch * num_kv_heads, blocks of tokens)``."""
    head = tl.program_id(0).to(tl.int64)
    start = tl.load(stored.start + head // num_kv_heads)
    count = packed_tokens(watermark, start, FORMAT)
    lane = tl.arange(0, 16)[None, :]
    position = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]  # [T, 1]
    there = position < length
    keep = there & (position >= start)
    slot = position - start - FORMAT.sink_length
    packed = keep & (slot >= 0) & (slot < count)
    exact = exact_rows(stored, None, 0, 0, head, position, start, length, FORMAT)
    words = load_words(stored, head, slot, packed, lane, FORMAT)
    for j in tl.static_range(num_planes(FORMAT)):
        channel = 16 * j + lane
        x = any_plane(stored, words, exact, head, slot, packed, keep, lane, j, FORMAT)
        out = output + (head * length + position) * FORMAT.head_dim + channel
        tl.store(out, x.to(output.dtype.element_ty), mask=there & (channel < FORMAT.head_dim))


@triton.jit
def dequantize_token_kernel(
    stored, output, watermark, num_kv_heads, length, FORMAT: tl.constexpr, BLOCK_T: tl.constexpr
):
    """The same for ``planes/token``. Grid ``(batch * num_kv_heads, blocks of tokens)``."""
    head = tl.program_id(0).to(tl.int64)
    start = tl.load(stored.start + head // num_kv_heads)
    count = packed_tokens(watermark, start, FORMAT)
    lane = tl.arange(0, 16)[None, :]
    position = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]  # [T, 1]
    there = position < length
    keep = there & (position >= start)
    slot = position - start - FORMAT.sink_length
    packed = keep & (slot >= 0) & (slot < count)
    exact = exact_rows(stored, None, 0, 0, head, position, start, length, FORMAT)
    words = load_words(stored, head, slot, packed, lane, FORMAT)
    scale = tl.load(stored.scale + head * stored.capacity + slot, mask=packed, other=0.0)
    planes = ()
    for j in tl.static_range(num_planes(FORMAT)):
        # Odd integers about zero, so that half a step is a unit.
        levels = (unpack_plane(words, j, FORMAT) * 2 - largest_code(FORMAT, j)).to(tl.float32)
        planes += (tl.where(16 * j + lane < FORMAT.head_dim, levels * (step(FORMAT, j) / 2), 0.0),)
    if stored.basis is None:
        planes = rotate_back(planes, lane, FORMAT)
    else:
        planes = project_back(planes, stored, head % num_kv_heads, FORMAT)
    for j in tl.static_range(num_planes(FORMAT)):
        channel = 16 * j + lane
        inside = channel < FORMAT.head_dim
        y = planes[j] * scale.to(tl.float32)
        if FORMAT.affine:
            offset, factor = load_affine(stored, head, channel, inside, FORMAT)
            y = y * factor + offset
        unpacked = keep & (packed == 0) & inside
        x = tl.load(exact + channel, mask=unpacked, other=0.0).to(tl.float32)
        out = output + (head * length + position) * FORMAT.head_dim + channel
        x = tl.where(packed, y, x)
        tl.store(out, x.to(output.dtype.element_ty), mask=there & inside)


@triton.jit
def project_back(planes, stored, kv_head, fmt: tl.constexpr):
    """Plane groups out of a latent frame that has a matrix."""
    inverse = stored.basis + stored.inverse + kv_head * stored.basis_stride
    sums = ()
    for _ in tl.static_range(num_planes(fmt)):
        sums += (tl.zeros([planes[0].shape[0], 16], tl.float32),)
    for j in tl.static_range(num_planes(fmt)):
        row = 16 * j + tl.arange(0, 16)[:, None]
        added = ()
        for i in tl.static_range(num_planes(fmt)):
            channel = 16 * i + tl.arange(0, 16)[None, :]
            inside = (row < fmt.head_dim) & (channel < fmt.head_dim)
            matrix = tl.load(inverse + row * fmt.head_dim + channel, mask=inside, other=0.0)
            added += (dot_in_fp32(planes[j], matrix, sums[i], False),)
        sums = added
    return sums
