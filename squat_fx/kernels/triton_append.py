"""Put new tokens away: what leaves the ring is rounded and packed, the newest go into the ring.

Tokens that leave the ring come from its old part or from ``new``; what stays goes to a sink slot or
a ring slot. ``triton_round.py`` turns numbers into codes.

One new token takes one launch, ``append_kernel``, and the keys and values of a layer together take
one, ``append_both_kernel``: a ring holds one group more than the residual, so
that the token never lands on one that is being packed. More tokens may reuse ring slots, so they
take ``start_kernel`` (where rows begin, with ``valid``), ``pack_kernel``, ``ring_kernel``, in this
order.

| tensor | shape |
|---|---|
| ``new`` | ``[batch, num_kv_heads, new_len, head_dim]``, any strides but the last |
| ``valid`` | uint8 ``[batch, new_len]``, any strides; None: all |
| ``positions`` | int64 ``[handles, 2]``: length and watermark before the new tokens |
| ``feedback`` | fp32 ``[batch, num_kv_heads, head_dim, head_dim]``, contiguous; None: none |
"""

from __future__ import annotations

import triton
import triton.language as tl

from squat_fx.kernels.triton_planes import (
    dense_slot,
    exact_rows,
    num_planes,
    packed_tokens,
    wait_for_previous_launch,
)
from squat_fx.kernels.triton_round import (
    latent_planes,
    pack_groups,
    pack_groups_with_feedback,
    pack_tokens,
)

BLOCK_T = 32
WIDE_BLOCK_T = 64  # planes/token, more channels than WIDE
WIDE = 128


@triton.constexpr_function
def rows_per_program(fmt, block_t):
    """Tokens that one program packs: a token group, or ``block_t`` tokens that share nothing."""
    return fmt.token_group if fmt.token_group > 1 else block_t


@triton.constexpr_function
def padded_group(fmt):
    """Tokens of a token group, up to a power of two."""
    return 1 << (fmt.token_group - 1).bit_length()


@triton.jit
def load_rows(source, keep, lane, fmt: tl.constexpr):
    """The plane groups of the tokens at ``source`` ``[T, 1]``."""
    planes = ()
    for j in tl.static_range(num_planes(fmt)):
        channel = 16 * j + lane
        planes += (tl.load(source + channel, mask=keep & (channel < fmt.head_dim), other=0.0),)
    return planes


@triton.jit
def store_rows(target, planes, keep, lane, fmt: tl.constexpr):
    """Undo :func:`load_rows`."""
    for j in tl.static_range(num_planes(fmt)):
        channel = 16 * j + lane
        tl.store(target + channel, planes[j], mask=keep & (channel < fmt.head_dim))


@triton.jit
def pack_leaving(
    stored, new, new_head, new_stride, valid, valid_row, valid_stride, feedback,
    head, kv_head, block, start, length, before, after,
    fmt: tl.constexpr, BLOCK_T: tl.constexpr, PADDED_T: tl.constexpr,
):  # fmt: skip
    """Pack a block of the slots from ``before`` to ``after``."""
    lane = tl.arange(0, 16)[None, :]
    row = tl.arange(0, PADDED_T)[:, None]  # [T, 1]
    slot = before + block * rows_per_program(fmt, BLOCK_T) + row
    keep = (row < rows_per_program(fmt, BLOCK_T)) & (slot < after)
    position = slot + fmt.sink_length + start
    rows = exact_rows(stored, new, new_head, new_stride, head, position, start, length, fmt)
    if fmt.pieces is None:
        target = stored.qdata + head * stored.capacity * fmt.row_size + slot * fmt.row_size
        store_rows(target, load_rows(rows, keep, lane, fmt), keep, lane, fmt)
    elif fmt.per_token:
        planes = latent_planes(stored, head, kv_head, rows, keep, lane, fmt)
        pack_tokens(stored, head, slot, keep, planes, feedback, lane, fmt)
    else:
        usable = keep
        if valid is not None:
            pointers = valid + valid_row + (position - length).to(tl.int64) * valid_stride
            usable = keep & (tl.load(pointers, mask=keep & (position >= length), other=1) != 0)
        if feedback is None:
            pack_groups(stored, head, slot, keep, usable, rows, lane, fmt)
        else:
            pack_groups_with_feedback(stored, head, slot, keep, usable, rows, feedback, lane, fmt)


@triton.jit
def packed_before_and_after(length, watermark, start, new_len, fmt: tl.constexpr):
    """How many tokens of a row are packed before and after ``new_len`` more."""
    before = packed_tokens(watermark, start, fmt)
    after = packed_tokens(tl.maximum(watermark, length + new_len - fmt.residual_length), start, fmt)
    return before, after


@triton.jit
def append_token(
    stored, new, new_strides, valid, valid_strides, positions, row, num_kv_heads,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """One new token of the head ``program_id(0)``.

    What does not depend on where the row begins is loaded first, so that a program waits for memory
    twice: for the positions and the new token, and for the token that leaves.
    """
    batch = tl.program_id(0) // num_kv_heads
    kv_head = tl.program_id(0) % num_kv_heads
    head = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 16)[None, :]
    one = tl.zeros([1, 1], tl.int32)
    start = tl.load(stored.start + batch)
    length = tl.load(positions + 2 * row).to(tl.int32)
    watermark = tl.load(positions + 2 * row + 1).to(tl.int32)
    new_head = batch.to(tl.int64) * new_strides[0] + kv_head * new_strides[1]
    planes = load_rows(new + new_head + one, one == 0, lane, FORMAT)
    if valid is not None:
        # Every head of a row comes to the same start, whether or not another has written it.
        invalid = tl.load(valid + batch.to(tl.int64) * valid_strides[0]) == 0
        start = tl.where(start >= length, length + invalid.to(tl.int32), start)
        tl.store(stored.start + batch, start, mask=kv_head == 0)
    before, after = packed_before_and_after(length, watermark, start, 1, FORMAT)
    if after > before:
        pack_leaving(
            stored, new, new_head, 0, valid, batch.to(tl.int64) * valid_strides[0], 0, None,
            head, kv_head, 0, start, length, before, after, FORMAT, 1, padded_group(FORMAT),
        )  # fmt: skip
    token = length - start + one
    keep = (token >= 0) & ((token < FORMAT.sink_length) | (token - FORMAT.sink_length >= after))
    slot = head * FORMAT.dense_length + dense_slot(token, FORMAT)
    target = stored.dense + slot * FORMAT.head_dim
    store_rows(target, planes, keep, lane, FORMAT)


@triton.jit(do_not_specialize=["row"])
def append_kernel(
    stored, new, new_strides, valid, valid_strides, positions, row, num_kv_heads,
    FORMAT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One new token. Grid ``(batch * num_kv_heads,)``."""
    if DEPENDENT:
        wait_for_previous_launch()
    append_token(
        stored, new, new_strides, valid, valid_strides, positions, row, num_kv_heads, FORMAT
    )


@triton.jit(do_not_specialize=["key_row", "value_row"])
def append_both_kernel(
    key, value, new_key, new_value, new_key_strides, new_value_strides, valid, valid_strides,
    positions, key_row, value_row, num_kv_heads, KEY: tl.constexpr, VALUE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One new token of keys and of values. Grid ``(batch * num_kv_heads, 2)``."""
    if DEPENDENT:
        wait_for_previous_launch()
    if tl.program_id(1) == 0:
        append_token(
            key, new_key, new_key_strides, valid, valid_strides, positions, key_row, num_kv_heads,
            KEY,
        )  # fmt: skip
    else:
        append_token(
            value, new_value, new_value_strides, valid, valid_strides, positions, value_row,
            num_kv_heads, VALUE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["row"])
def start_kernel(start, valid, valid_strides, positions, row, new_len, BLOCK_T: tl.constexpr):
    """Rows without a token start at their first valid new one. Grid ``(batch,)``."""
    batch = tl.program_id(0).to(tl.int64)
    length = tl.load(positions + 2 * row).to(tl.int32)
    old = tl.load(start + batch)
    if old >= length:
        first = new_len
        for i in range(0, new_len, BLOCK_T):
            column = i + tl.arange(0, BLOCK_T)
            pointers = valid + batch * valid_strides[0] + column.to(tl.int64) * valid_strides[1]
            is_valid = tl.load(pointers, mask=column < new_len, other=0) != 0
            first = tl.minimum(first, tl.min(tl.where(is_valid, column, new_len), 0))
        tl.store(start + batch, length + first)


@triton.jit(do_not_specialize=["row"])
def pack_kernel(
    stored, new, new_strides, valid, valid_strides, feedback, positions, row, num_kv_heads, new_len,
    FORMAT: tl.constexpr, BLOCK_T: tl.constexpr, PADDED_T: tl.constexpr,
):  # fmt: skip
    """Pack what leaves the ring. Grid ``(batch * num_kv_heads * blocks of packed tokens,)``.

    Neighbours share a head, and its matrices in the first cache.
    """
    blocks = tl.cdiv(new_len, rows_per_program(FORMAT, BLOCK_T))
    head = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    batch = (tl.program_id(0) // blocks // num_kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) // blocks % num_kv_heads
    new_head = batch * new_strides[0] + kv_head * new_strides[1]
    start = tl.load(stored.start + batch)
    length = tl.load(positions + 2 * row).to(tl.int32)
    watermark = tl.load(positions + 2 * row + 1).to(tl.int32)
    before, after = packed_before_and_after(length, watermark, start, new_len, FORMAT)
    if feedback is not None:
        feedback += head * FORMAT.head_dim * FORMAT.head_dim
    if before + block * rows_per_program(FORMAT, BLOCK_T) < after:
        pack_leaving(
            stored, new, new_head, new_strides[2],
            valid, batch * valid_strides[0], valid_strides[1], feedback,
            head, kv_head, block, start, length, before, after, FORMAT, BLOCK_T, PADDED_T,
        )  # fmt: skip


@triton.jit(do_not_specialize=["row"])
def ring_kernel(
    stored, new, new_strides, positions, row, num_kv_heads, new_len,
    FORMAT: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Copy new tokens that stay exact. Grid ``(batch * num_kv_heads, blocks of dense slots)``."""
    head = tl.program_id(0).to(tl.int64)
    batch = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % num_kv_heads
    start = tl.load(stored.start + batch)
    length = tl.load(positions + 2 * row).to(tl.int32)
    watermark = tl.load(positions + 2 * row + 1).to(tl.int32)
    _, after = packed_before_and_after(length, watermark, start, new_len, FORMAT)
    slot = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]  # [T, 1]
    is_sink = slot < FORMAT.sink_length
    # The newest token that a ring slot could hold, counted from the first after the sinks.
    newest = length + new_len - 1 - start - FORMAT.sink_length
    recent = newest - (newest - (slot - FORMAT.sink_length)) % FORMAT.ring_length
    column = tl.where(is_sink, slot, recent + FORMAT.sink_length) + start - length
    keep = (slot < FORMAT.dense_length) & (is_sink | (recent >= after))
    keep = keep & (column >= 0) & (column < new_len)
    lane = tl.arange(0, 16)[None, :]
    source = new + batch * new_strides[0] + kv_head * new_strides[1]
    planes = load_rows(source + column.to(tl.int64) * new_strides[2], keep, lane, FORMAT)
    target = stored.dense + (head * FORMAT.dense_length + slot) * FORMAT.head_dim
    store_rows(target, planes, keep, lane, FORMAT)
