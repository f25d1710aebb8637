"""Attention over tokens of the layout ``planes/token``, exact tokens and new tokens at once.

    score = scale * (token_scale * (latent_query @ code.T) + query @ offset)
    latent_query = ((query * factor) @ inverse.T) * step

The codes are used as they are, as odd integers ``2 * code - largest``: rotation and steps are in
the query (``rotate_kernel``), the scale of a token is one factor of its score and of its
probability, and what was removed from all keys comes back as one number per query row, so that
scores are true ones before softcap, masks, sinks and the exact tokens. The output of packed values
is taken back from the latent frame once, by ``merge_kernel``.

A program owns one KV head of one sequence, ``BLOCK_M`` query rows and one share of the tokens, as
in ``triton_attend.py``. Keys and values of a layer are packed in step: the same tokens of both are
packed, and the others are exact: sinks, what follows the packed tokens, new tokens. Each share
leaves two unnormalised outputs, that of its packed tokens in the latent frame and that of its exact
ones.

| tensor | shape |
|---|---|
| ``latent_query`` | fp32 ``[batch * num_kv_heads * q_len * queries_per_kv, 16 * planes]`` |
| ``size, offset`` | fp32, what a row's scores are multiplied with, and ``query @ offset`` |
| ``query``, ``new_key``, ``new_value``, ``mask`` | as in ``triton_attend.py`` |
| ``partial`` | fp32 ``[batch * num_heads * q_len, 2 * shares, head_dim]``: latent, then exact |
| ``partial_max, partial_sum`` | fp32 ``[batch * num_heads * q_len, 2 * shares]`` |

Scores take fp16 (fp32 for fp32 models), with the query's rows brought to unit size; the sum of the
values takes the query's dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squat_fx.kernels.triton_attend import masked_scores
from squat_fx.kernels.triton_planes import (
    exact_rows,
    largest_code,
    load_affine,
    load_words,
    num_pieces,
    num_planes,
    packed_tokens,
    step,
    unpack_plane,
)

BLOCK_N = 64
NUM_STAGES = 3
MERGE_BLOCK_D = 64
ROTATE_BLOCK_M = 16
LARGEST_BLOCK_M = 64


def tile(rows: int, head_dim: int) -> tuple[int, int]:
    """``BLOCK_M`` and ``num_warps`` for ``rows`` query rows: a warp has 16 rows."""
    block_m = min(max(16, triton.next_power_of_2(rows)), LARGEST_BLOCK_M)
    return block_m, block_m // 16


@triton.jit
def levels(words, plane: tl.constexpr, fmt: tl.constexpr):
    """The codes of a plane group as odd integers about zero, int16 ``[N, 16]``."""
    return unpack_plane(words, plane, fmt) * 2 - largest_code(fmt, plane)


@triton.jit
def softmax_step(scores, running_max, running_sum):
    """Take ``scores`` ``[M, N]`` into the running softmax: probabilities and the old share."""
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp(scores - base[:, None])
    alpha = tl.exp(running_max - base)
    return p, alpha, new_max, running_sum * alpha + tl.sum(p, 1)


@triton.jit
def flush(
    acc, running_max, running_sum, partial, partial_max, partial_sum, out, keep_row, used, lane,
    LATENT: tl.constexpr, fmt: tl.constexpr,
):  # fmt: skip
    """Leave the output, maximum and sum of some tokens at ``out`` ``[M]``."""
    tl.store(partial_max + out, running_max, mask=keep_row)
    tl.store(partial_sum + out, running_sum, mask=keep_row)
    if used:
        for j in tl.static_range(num_planes(fmt)):
            channel = 16 * j + lane
            keep = keep_row[:, None] & (channel < fmt.head_dim)
            x = acc[j]
            if LATENT:
                x *= step(fmt, j) / 2
            tl.store(partial + out[:, None] * fmt.head_dim + channel, x, mask=keep)


@triton.jit(do_not_specialize=["key_row", "value_row"])
def attend_kernel(
    query, new_key, new_value, key, value, positions, key_row, value_row, mask,
    latent_query, size, offset, partial, partial_max, partial_sum,
    num_kv_heads, q_len, new_len, scale,
    query_strides, new_key_strides, new_value_strides, mask_strides,
    KEY: tl.constexpr, VALUE: tl.constexpr, QUERIES_PER_KV: tl.constexpr, CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid ``(batch * num_kv_heads, blocks of query rows, shares)``."""
    head = tl.program_id(0).to(tl.int64)
    share = tl.program_id(2)
    shares = tl.num_programs(2)
    batch = head // num_kv_heads
    kv_head = head % num_kv_heads

    length = tl.load(positions + 2 * key_row).to(tl.int32)
    watermark = tl.load(positions + 2 * key_row + 1).to(tl.int32)
    kv_len = length + new_len
    start = tl.load(key.start + batch)
    first = start + KEY.sink_length
    last = first + packed_tokens(watermark, start, KEY)
    num_sinks = tl.maximum(tl.minimum(first, length) - start, 0)
    tail = tl.minimum(last, length)
    num_exact = num_sinks + kv_len - tail
    packed_tiles = tl.cdiv(last - first, BLOCK_N)
    tiles = packed_tiles + tl.cdiv(num_exact, BLOCK_N)
    tiles_per_share = tl.cdiv(tiles, shares)
    tile_begin = share * tiles_per_share
    tile_end = tl.minimum(tile_begin + tiles_per_share, tiles)

    lane = tl.arange(0, 16)[None, :]
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    query_token = row // QUERIES_PER_KV
    query_head = kv_head * QUERIES_PER_KV + row % QUERIES_PER_KV
    keep_row = query_token < q_len
    query_rows = (
        query
        + batch * query_strides[0]
        + query_head * query_strides[1]
        + query_token * query_strides[2]
    )
    mask_row = (batch * mask_strides[0] + query_head * mask_strides[1])[:, None]
    mask_row += query_token.to(tl.int64)[:, None] * mask_strides[2]
    token = tl.arange(0, BLOCK_N)
    dtype = tl.float32 if query.dtype.element_ty == tl.float32 else tl.float16
    out = (
        ((batch * num_kv_heads * QUERIES_PER_KV + query_head) * q_len + query_token) * 2 * shares
        + share
    ).to(tl.int64)

    # packed tokens
    acc = ()
    for _ in tl.static_range(num_planes(VALUE)):
        acc += (tl.zeros([BLOCK_M, 16], tl.float32),)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    packed_end = tl.minimum(tile_end, packed_tiles)
    if tile_begin < packed_end:
        rotated = head * q_len * QUERIES_PER_KV + row
        latent = ()
        for j in tl.static_range(num_planes(KEY)):
            pointers = latent_query + rotated[:, None] * (16 * num_planes(KEY)) + (16 * j + lane)
            plane = tl.load(pointers, mask=keep_row[:, None], other=0.0) * (step(KEY, j) / 2)
            latent += (plane.to(dtype),)
        row_size = tl.load(size + rotated, mask=keep_row, other=0.0)
        row_offset = tl.zeros([BLOCK_M], tl.float32)
        if KEY.affine:
            row_offset = tl.load(offset + rotated, mask=keep_row, other=0.0)
        for i in range(tile_begin, packed_end):
            position = first + i * BLOCK_N + token
            there = (position < last)[:, None]
            slot = (position - first)[:, None]
            words = load_words(key, head, slot, there, lane, KEY)
            scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for j in tl.static_range(num_planes(KEY)):
                if num_pieces(KEY, j) > 0:
                    k = levels(words, j, KEY).to(latent[j].dtype)
                    scores = tl.dot(latent[j], tl.trans(k), scores, input_precision="ieee")
            token_scale = load_scale(key, head, slot, there)
            scores = scores * row_size[:, None] * tl.trans(token_scale) + row_offset[:, None]
            seen = keep_row[:, None] & (position < last)[None, :]
            scores = masked_scores(
                scores, mask, mask_row, mask_strides[3], position[None, :], seen,
                query_token[:, None], kv_len, q_len, scale, CAUSAL, SOFTCAP,
            )  # fmt: skip
            p, alpha, running_max, running_sum = softmax_step(scores, running_max, running_sum)
            words = load_words(value, head, slot, there, lane, VALUE)
            p *= tl.trans(load_scale(value, head, slot, there))
            p = p.to(query.dtype.element_ty)
            new_acc = ()
            for j in tl.static_range(num_planes(VALUE)):
                if num_pieces(VALUE, j) > 0:
                    v = levels(words, j, VALUE).to(p.dtype)
                    new_acc += (tl.dot(p, v, acc[j] * alpha[:, None], input_precision="ieee"),)
                else:
                    new_acc += (acc[j],)
            acc = new_acc
    flush(
        acc, running_max, running_sum, partial, partial_max, partial_sum, out, keep_row,
        tile_begin < packed_end, lane, True, VALUE,
    )  # fmt: skip

    # exact tokens
    acc = ()
    for _ in tl.static_range(num_planes(VALUE)):
        acc += (tl.zeros([BLOCK_M, 16], tl.float32),)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    exact_begin = tl.maximum(tile_begin, packed_tiles)
    if exact_begin < tile_end:
        q = ()
        for j in tl.static_range(num_planes(KEY)):
            channel = 16 * j + lane
            keep = keep_row[:, None] & (channel < KEY.head_dim)
            q += (tl.load(query_rows[:, None] + channel, mask=keep, other=0.0),)
        new_key_head = batch * new_key_strides[0] + kv_head * new_key_strides[1]
        new_value_head = batch * new_value_strides[0] + kv_head * new_value_strides[1]
        for i in range(exact_begin, tile_end):
            index = (i - packed_tiles) * BLOCK_N + token
            position = tl.where(index < num_sinks, start + index, tail + index - num_sinks)
            column = position[:, None]
            there = (index < num_exact)[:, None]
            rows = exact_rows(
                key, new_key, new_key_head, new_key_strides[2], head, column, start, length, KEY
            )
            scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for j in tl.static_range(num_planes(KEY)):
                k = exact_plane(rows, there, lane, j, KEY).to(q[j].dtype)
                scores = tl.dot(q[j], tl.trans(k), scores, input_precision="ieee")
            seen = keep_row[:, None] & (index < num_exact)[None, :]
            scores = masked_scores(
                scores, mask, mask_row, mask_strides[3], position[None, :], seen,
                query_token[:, None], kv_len, q_len, scale, CAUSAL, SOFTCAP,
            )  # fmt: skip
            p, alpha, running_max, running_sum = softmax_step(scores, running_max, running_sum)
            p = p.to(query.dtype.element_ty)
            rows = exact_rows(
                value, new_value, new_value_head, new_value_strides[2], head, column, start,
                length, VALUE,
            )  # fmt: skip
            new_acc = ()
            for j in tl.static_range(num_planes(VALUE)):
                v = exact_plane(rows, there, lane, j, VALUE).to(p.dtype)
                new_acc += (tl.dot(p, v, acc[j] * alpha[:, None], input_precision="ieee"),)
            acc = new_acc
    flush(
        acc, running_max, running_sum, partial, partial_max, partial_sum, out + shares, keep_row,
        exact_begin < tile_end, lane, False, VALUE,
    )  # fmt: skip


@triton.jit
def rotate_kernel(
    query, key, latent, size, offset, num_kv_heads, q_len, query_strides,
    FORMAT: tl.constexpr, QUERIES_PER_KV: tl.constexpr, BLOCK_M: tl.constexpr,
    PADDED_D: tl.constexpr,
):  # fmt: skip
    """The query's rows in the latent frame, brought to unit size. Grid ``(batch * num_kv_heads,
    blocks of query rows)``.
    """
    head = tl.program_id(0).to(tl.int64)
    batch = head // num_kv_heads
    kv_head = head % num_kv_heads
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    query_token = row // QUERIES_PER_KV
    query_head = kv_head * QUERIES_PER_KV + row % QUERIES_PER_KV
    keep_row = query_token < q_len
    rows = (
        query
        + batch * query_strides[0]
        + query_head * query_strides[1]
        + query_token * query_strides[2]
    )
    out = head * q_len * QUERIES_PER_KV + row
    channel = tl.arange(0, PADDED_D)
    inside = channel < FORMAT.head_dim
    keep = keep_row[:, None] & inside[None, :]
    q = tl.load(rows[:, None] + channel[None, :], mask=keep, other=0.0).to(tl.float32)
    if FORMAT.affine:
        shift, factor = load_affine(key, head, channel, inside, FORMAT)
        tl.store(offset + out, tl.sum(q * shift[None, :], 1), mask=keep_row)
        q *= factor[None, :]
    largest = tl.maximum(tl.max(tl.abs(q), 1), 1e-30)
    tl.store(size + out, largest, mask=keep_row)
    q = q / largest[:, None]
    inverse = key.basis + key.inverse + kv_head * key.basis_stride
    lane = tl.arange(0, 16)
    for j in range(num_planes(FORMAT)):
        plane = 16 * j + lane
        there = (plane < FORMAT.head_dim)[None, :] & inside[:, None]
        pointers = inverse + plane[None, :] * FORMAT.head_dim + channel[:, None]
        matrix = tl.load(pointers, mask=there, other=0.0)  # [PADDED_D, 16]
        x = tl.dot(q, matrix, input_precision="tf32x3")
        pointers = latent + out[:, None] * (16 * num_planes(FORMAT)) + plane[None, :]
        tl.store(pointers, x, mask=keep_row[:, None])


@triton.jit
def load_scale(stored, head, slot, there):
    """The scales of packed tokens, fp32 ``[N, 1]``."""
    pointers = stored.scale + head * stored.capacity + slot
    return tl.load(pointers, mask=there, other=0.0).to(tl.float32)


@triton.jit
def exact_plane(rows, there, lane, plane: tl.constexpr, fmt: tl.constexpr):
    """One plane group of exact tokens, ``[N, 16]``."""
    channel = 16 * plane + lane
    return tl.load(rows + channel, mask=there & (channel < fmt.head_dim), other=0.0)


@triton.jit
def merge_kernel(
    partial, partial_max, partial_sum, sinks, value, output, num_heads, q_len, shares,
    FORMAT: tl.constexpr, QUERIES_PER_KV: tl.constexpr, PADDED_D: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the shares of one query row. Grid ``(batch * num_heads * q_len, blocks of channels)``."""
    row = tl.program_id(0).to(tl.int64)
    query_head = row // q_len
    head = query_head // QUERIES_PER_KV
    share = tl.arange(0, BLOCK_S)  # [S]
    there = share < shares
    first = row * 2 * shares
    latent_max = tl.load(partial_max + first + share, mask=there, other=float("-inf"))
    exact_max = tl.load(partial_max + first + shares + share, mask=there, other=float("-inf"))
    latent_sum = tl.load(partial_sum + first + share, mask=there, other=0.0)
    exact_sum = tl.load(partial_sum + first + shares + share, mask=there, other=0.0)
    base = tl.maximum(tl.max(latent_max, 0), tl.max(exact_max, 0))
    if sinks is not None:
        sink = tl.load(sinks + query_head % num_heads).to(tl.float32)
        base = tl.maximum(base, sink)
    base = tl.where(base == float("-inf"), 0.0, base)
    latent_weight = tl.exp(latent_max - base)
    exact_weight = tl.exp(exact_max - base)
    total = tl.sum(latent_sum * latent_weight, 0) + tl.sum(exact_sum * exact_weight, 0)
    if sinks is not None:
        total += tl.exp(sink - base)

    # A share without a visible token may have left its output unwritten.
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [D]
    pointers = partial + (first + shares + share)[:, None] * FORMAT.head_dim + channel[None, :]
    keep = (exact_max > float("-inf"))[:, None] & (channel < FORMAT.head_dim)[None, :]
    out = tl.sum(tl.load(pointers, mask=keep, other=0.0) * exact_weight[:, None], 0)

    inner = tl.arange(0, PADDED_D)  # [L]
    pointers = partial + (first + share)[:, None] * FORMAT.head_dim + inner[None, :]
    keep = (latent_max > float("-inf"))[:, None] & (inner < FORMAT.head_dim)[None, :]
    latent = tl.sum(tl.load(pointers, mask=keep, other=0.0) * latent_weight[:, None], 0)
    matrix = value.basis + value.inverse + head % (num_heads // QUERIES_PER_KV) * value.basis_stride
    pointers = matrix + inner[:, None] * FORMAT.head_dim + channel[None, :]
    keep = (inner < FORMAT.head_dim)[:, None] & (channel < FORMAT.head_dim)[None, :]
    packed = tl.sum(tl.load(pointers, mask=keep, other=0.0) * latent[:, None], 0)
    if FORMAT.affine:
        shift, factor = load_affine(value, head, channel, channel < FORMAT.head_dim, FORMAT)
        packed = packed * factor + shift * tl.sum(latent_sum * latent_weight, 0)
    out += packed
    out = tl.where(total > 0, out / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(
        output + row * FORMAT.head_dim + channel,
        out.to(output.dtype.element_ty),
        mask=channel < FORMAT.head_dim,
    )
