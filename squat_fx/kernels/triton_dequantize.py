"""The stored tokens as numbers.

    x = code * scale + zero_point

where a token is packed, the exact number elsewhere, zero for padding.
``output`` is ``[batch, num_kv_heads, length, head_dim]``, contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squat_fx.kernels.triton_planes import (
    any_plane,
    exact_rows,
    load_words,
    num_planes,
    packed_tokens,
)

BLOCK_T = 32


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
