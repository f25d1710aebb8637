"""Attention over packed, dense and new tokens at once.

    output = softmax(softcap(scale * query @ key.T) + mask) @ value
    softcap(s) = softcap * tanh(s / softcap)

A program owns one KV head of one sequence, ``BLOCK_M`` query rows and one share of the tokens. Rows
are (query token, query head) pairs, heads first, so that all query heads of a KV head read its
codes once. The tokens of a sequence are put in this order, ``BLOCK_N`` at a time, and dealt out
evenly:

1. *packed*: keys and values both packed;
2. *mixed*: the rest, each packed, dense or new: sinks, what follows the packed tokens, new tokens.

Where ``gluon_attend_channel.py`` takes the whole groups of keys whose values are packed, only the
rest is left (``REST``), as one more share.

Of a ``WINDOW``, row ``first_row`` of ``positions`` says where it begins: older tokens are not
there, and mask and causality count from its first token (``from_first``).

Lengths are read from ``positions`` on the device; the grid depends on capacities alone. Each share
leaves an unnormalised output, its maximum and its sum; ``merge_kernel`` adds them up and lets the
sink logits take part.

| tensor | shape |
|---|---|
| ``query`` | ``[batch, num_heads, q_len, key head_dim]``, any strides but the last |
| ``new_key, new_value`` | ``[batch, num_kv_heads, new_len, head_dim]``, the same |
| ``mask`` | ``[batch, num_heads, q_len, kv_len]`` by zero strides; uint8 for bool, or float |
| ``partial`` | fp32 ``[batch * num_heads * q_len, lefts, value head_dim]`` |
| ``partial_max, partial_sum`` | fp32 ``[batch * num_heads * q_len, lefts]`` |

Dots take the query's dtype and add in fp32; softmax is fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squat_fx.kernels.triton_packed import any_plane, load_packed, packed_plane
from squat_fx.kernels.triton_planes import (
    exact_rows,
    num_planes,
    packed_tokens,
)

NO_CAUSALITY = tl.constexpr(0)
TOP_LEFT = tl.constexpr(1)

# Chosen from registers and spills (``aot.py``), not timed.
BLOCK_N = 32
LARGEST_BLOCK_M = 64
MERGE_BLOCK_D = 64
NUM_STAGES = 2


def tile(rows: int, head_dim: int) -> tuple[int, int]:
    """``BLOCK_M`` and ``num_warps`` for ``rows`` query rows: a warp has 16 rows of 64 channels."""
    block_m = min(max(16, triton.next_power_of_2(rows)), LARGEST_BLOCK_M)
    return block_m, max(block_m // 16, triton.next_power_of_2(triton.cdiv(head_dim, 64)))


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def masked_scores(
    scores, mask, mask_row, mask_stride, position, seen, query_token, kv_len, q_len, scale,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Raw dot products ``[M, N]`` to what the softmax takes; -inf where a query does not attend."""
    scores *= scale
    if SOFTCAP > 0:
        scores = SOFTCAP * tanh(scores / SOFTCAP)
    if CAUSAL == TOP_LEFT:
        seen = seen & (position <= query_token)
    elif CAUSAL != NO_CAUSALITY:
        seen = seen & (position <= query_token + (kv_len - q_len))
    if mask is not None:
        extra = tl.load(mask + mask_row + position.to(tl.int64) * mask_stride, mask=seen, other=0)
        if mask.dtype.element_ty == tl.uint8:
            seen = seen & (extra != 0)
        else:
            scores += extra.to(tl.float32)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def places_of_rows(row, batch, kv_head, num_kv_heads, q_len, QUERIES_PER_KV: tl.constexpr):
    """Of query rows of a KV head: token, head, whether there is one, output row."""
    query_token = row // QUERIES_PER_KV
    query_head = kv_head * QUERIES_PER_KV + row % QUERIES_PER_KV
    out = (batch * num_kv_heads * QUERIES_PER_KV + query_head) * q_len + query_token
    return query_token, query_head, query_token < q_len, out.to(tl.int64)


@triton.jit
def rows_of_mask(batch, query_head, query_token, mask_strides):
    """Where the rows of a mask begin."""
    heads = batch * mask_strides[0] + query_head * mask_strides[1]
    return heads + query_token.to(tl.int64) * mask_strides[2]


@triton.jit
def rows_of_block(
    block, batch, kv_head, num_kv_heads, q_len, mask_strides,
    QUERIES_PER_KV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Query rows ``[M]`` of a KV head: token, head, whether there is one, mask and output row."""
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query_token, query_head, keep, out = places_of_rows(
        row, batch, kv_head, num_kv_heads, q_len, QUERIES_PER_KV
    )
    mask_row = rows_of_mask(batch, query_head, query_token, mask_strides)[:, None]
    return row, query_token, query_head, keep, mask_row, out


@triton.jit
def first_seen(positions, first_row, WINDOW: tl.constexpr):
    """Where the window begins; 0 if there is none."""
    found = tl.full([], 0, tl.int32)
    if WINDOW:
        found = tl.load(positions + 2 * first_row).to(tl.int32)
    return found


@triton.jit
def from_first(first, query_token, kv_len, mask_row, mask_stride):
    """What ``masked_scores`` takes beside positions where mask and causality count from ``first``:
    query tokens, tokens and the mask's rows.
    """
    return query_token + first, kv_len - first, mask_row - first.to(tl.int64) * mask_stride


@triton.jit
def tile_groups(slot, keep, tile_token, BLOCK_N: tl.constexpr, fmt: tl.constexpr):
    """The token group of each slot of a packed tile and whether it exists.

    One number if the tile lies in one group: tiles begin at a multiple of ``BLOCK_N`` of key slots.
    """
    if fmt.token_group % BLOCK_N == 0:
        group = (tile_token - fmt.sink_length) // fmt.token_group
        keep_group = True
    else:
        group = slot // fmt.token_group
        keep_group = keep
    return group, keep_group


@triton.jit
def whole_groups(key_count, value_count, KEY: tl.constexpr):
    """Groups of packed keys whose values are packed too, of a row with so many of each."""
    return tl.minimum(key_count, value_count) // KEY.token_group


@triton.jit
def attend_tile(
    q, acc, running_max, running_sum, position, keep, tile_position,
    query_token, keep_row, head, length, q_len, kv_len, scale,
    key, key_start, key_count, new_key, new_key_head, new_key_stride,
    value, value_start, value_count, new_value, new_value_head, new_value_stride,
    mask, mask_row, mask_stride,
    KEY: tl.constexpr, VALUE: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    MIXED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Take the tokens at ``position`` ``[N]`` into the running softmax.

    The first token of a packed tile is at ``tile_position``.
    """
    lane = tl.arange(0, 16)[None, :]
    dtype = q[0].dtype
    column = position[:, None]  # [N, 1]
    there = keep[:, None]

    slot = column - key_start - KEY.sink_length
    packed = there
    if MIXED:
        packed = there & (slot >= 0) & (slot < key_count)
        exact = exact_rows(
            key, new_key, new_key_head, new_key_stride, head, column, key_start, length, KEY
        )
    else:
        group, keep_group = tile_groups(slot, packed, tile_position - key_start, BLOCK_N, KEY)
    words = load_packed(key, head, slot, column, packed, lane, KEY)
    scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for j in tl.static_range(num_planes(KEY)):
        if MIXED:
            k = any_plane(key, words, exact, head, slot, packed, there, lane, j, KEY)
        else:
            k = packed_plane(key, words, head, slot, packed, group, keep_group, lane, j, KEY)
        scores = tl.dot(q[j], tl.trans(k.to(dtype)), scores, input_precision="ieee")

    seen = keep_row[:, None] & keep[None, :]
    scores = masked_scores(
        scores, mask, mask_row, mask_stride, position[None, :], seen, query_token[:, None],
        kv_len, q_len, scale, CAUSAL, SOFTCAP,
    )  # fmt: skip
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp(scores - base[:, None])
    alpha = tl.exp(running_max - base)
    running_sum = running_sum * alpha + tl.sum(p, 1)
    p = p.to(dtype)

    slot = column - value_start - VALUE.sink_length
    if MIXED:
        packed = there & (slot >= 0) & (slot < value_count)
        exact = exact_rows(
            value,
            new_value,
            new_value_head,
            new_value_stride,
            head,
            column,
            value_start,
            length,
            VALUE,
        )
    else:
        group, keep_group = tile_groups(slot, packed, tile_position - value_start, BLOCK_N, VALUE)
    words = load_packed(value, head, slot, column, packed, lane, VALUE)
    new_acc = ()
    for j in tl.static_range(num_planes(VALUE)):
        if MIXED:
            v = any_plane(value, words, exact, head, slot, packed, there, lane, j, VALUE)
        else:
            v = packed_plane(value, words, head, slot, packed, group, keep_group, lane, j, VALUE)
        new_acc += (tl.dot(p, v.to(dtype), acc[j] * alpha[:, None], input_precision="ieee"),)
    return new_acc, new_max, running_sum


@triton.jit(do_not_specialize=["key_row", "value_row", "first_row"])
def attend_kernel(
    query, new_key, new_value, key, value, positions, key_row, value_row, first_row, mask,
    partial, partial_max, partial_sum,
    num_kv_heads, q_len, new_len, scale, lefts,
    query_strides, new_key_strides, new_value_strides, mask_strides,
    KEY: tl.constexpr, VALUE: tl.constexpr, QUERIES_PER_KV: tl.constexpr, CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr, REST: tl.constexpr, WINDOW: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid ``(batch * num_kv_heads, blocks of query rows, shares)``; these are the last of
    ``lefts`` that the merge finds.
    """
    head = tl.program_id(0).to(tl.int64)
    share = tl.program_id(2)
    shares = tl.num_programs(2)
    batch = head // num_kv_heads
    kv_head = head % num_kv_heads

    length = tl.load(positions + 2 * key_row).to(tl.int32)
    kv_len = length + new_len
    key_start = tl.load(key.start + batch)
    value_start = tl.load(value.start + batch)
    key_count = packed_tokens(tl.load(positions + 2 * key_row + 1).to(tl.int32), key_start, KEY)
    value_count = packed_tokens(
        tl.load(positions + 2 * value_row + 1).to(tl.int32), value_start, VALUE
    )

    # Packed are first <= t < last, in whole tiles of the key's slots; mixed ones lie on both sides.
    key_first = key_start + KEY.sink_length
    value_first = value_start + VALUE.sink_length
    first = key_first + tl.cdiv(tl.maximum(value_first - key_first, 0), BLOCK_N) * BLOCK_N
    if REST:
        first = key_first
        last = first + whole_groups(key_count, value_count, KEY) * KEY.token_group
    else:
        last = tl.minimum(key_first + key_count, value_first + value_count)
        last = tl.maximum(last, first)
    num_sinks = tl.maximum(tl.minimum(first, length) - key_start, 0)
    tail = tl.minimum(last, length)
    num_mixed = num_sinks + kv_len - tail
    oldest = first_seen(positions, first_row, WINDOW)
    if WINDOW:
        first += tl.maximum(tl.minimum(oldest, last) - first, 0) // BLOCK_N * BLOCK_N
    packed_tiles = 0 if REST else tl.cdiv(last - first, BLOCK_N)
    tiles = packed_tiles + tl.cdiv(num_mixed, BLOCK_N)
    tiles_per_share = tl.maximum(tl.cdiv(tiles, shares), TILES)
    tile_begin = share * tiles_per_share
    tile_end = tl.minimum(tile_begin + tiles_per_share, tiles)

    lane = tl.arange(0, 16)[None, :]
    _, query_token, query_head, keep_row, mask_row, out = rows_of_block(
        tl.program_id(1), batch, kv_head, num_kv_heads, q_len, mask_strides, QUERIES_PER_KV, BLOCK_M
    )
    out = out * lefts + (lefts - shares) + share
    query_rows = (
        query
        + batch * query_strides[0]
        + query_head * query_strides[1]
        + query_token * query_strides[2]
    )
    q = ()
    for j in tl.static_range(num_planes(KEY)):
        channel = 16 * j + lane
        keep = keep_row[:, None] & (channel < KEY.head_dim)
        q += (tl.load(query_rows[:, None] + channel, mask=keep, other=0.0),)
    query_token, kv_len, mask_row = from_first(
        oldest, query_token, kv_len, mask_row, mask_strides[3]
    )
    new_key_head = batch * new_key_strides[0] + kv_head * new_key_strides[1]
    new_value_head = batch * new_value_strides[0] + kv_head * new_value_strides[1]

    acc = ()
    for _ in tl.static_range(num_planes(VALUE)):
        acc += (tl.zeros([BLOCK_M, 16], tl.float32),)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    token = tl.arange(0, BLOCK_N)
    for i in range(tile_begin, tl.minimum(tile_end, packed_tiles)):
        tile_position = first + i * BLOCK_N
        position = tile_position + token
        acc, running_max, running_sum = attend_tile(
            q, acc, running_max, running_sum, position, (position >= oldest) & (position < last),
            tile_position,
            query_token, keep_row, head, length, q_len, kv_len, scale,
            key, key_start, key_count, new_key, new_key_head, new_key_strides[2],
            value, value_start, value_count, new_value, new_value_head, new_value_strides[2],
            mask, mask_row, mask_strides[3],
            KEY, VALUE, CAUSAL, SOFTCAP, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    for i in range(tl.maximum(tile_begin, packed_tiles), tile_end):
        index = (i - packed_tiles) * BLOCK_N + token
        position = tl.where(index < num_sinks, key_start + index, tail + index - num_sinks)
        acc, running_max, running_sum = attend_tile(
            q, acc, running_max, running_sum, position, (position >= oldest) & (index < num_mixed),
            0,
            query_token, keep_row, head, length, q_len, kv_len, scale,
            key, key_start, key_count, new_key, new_key_head, new_key_strides[2],
            value, value_start, value_count, new_value, new_value_head, new_value_strides[2],
            mask, mask_row, mask_strides[3],
            KEY, VALUE, CAUSAL, SOFTCAP, True, BLOCK_M, BLOCK_N,
        )  # fmt: skip

    tl.store(partial_max + out, running_max, mask=keep_row)
    tl.store(partial_sum + out, running_sum, mask=keep_row)
    if tile_begin < tile_end:
        for j in tl.static_range(num_planes(VALUE)):
            channel = 16 * j + lane
            keep = keep_row[:, None] & (channel < VALUE.head_dim)
            tl.store(partial + out[:, None] * VALUE.head_dim + channel, acc[j], mask=keep)


@triton.jit
def merge_kernel(
    partial, partial_max, partial_sum, sinks, output, num_heads, q_len, shares,
    HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the shares of one query row. Grid ``(batch * num_heads * q_len, blocks of channels)``."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [D]
    share = tl.arange(0, BLOCK_S)  # [S]
    maximum = tl.load(partial_max + row * shares + share, mask=share < shares, other=float("-inf"))
    total = tl.load(partial_sum + row * shares + share, mask=share < shares, other=0.0)
    base = tl.max(maximum, 0)
    if sinks is not None:
        sink = tl.load(sinks + row // q_len % num_heads).to(tl.float32)
        base = tl.maximum(base, sink)
    base = tl.where(base == float("-inf"), 0.0, base)
    weight = tl.exp(maximum - base)
    # A share without a visible token may have left its output unwritten.
    keep = (maximum > float("-inf"))[:, None] & (channel < HEAD_DIM)[None, :]
    pointers = partial + (row * shares + share)[:, None] * HEAD_DIM + channel[None, :]
    out = tl.sum(tl.load(pointers, mask=keep, other=0.0) * weight[:, None], 0)
    total = tl.sum(total * weight, 0)
    if sinks is not None:
        total += tl.exp(sink - base)
    out = tl.where(total > 0, out / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(
        output + row * HEAD_DIM + channel, out.to(output.dtype.element_ty), mask=channel < HEAD_DIM
    )
