"""Attention over tokens of the layout ``planes/token``, exact tokens and new tokens at once.

    score = scale * (token_scale * (latent_query @ code.T) + query @ offset)
    latent_query = ((query * factor) @ inverse.T) * step

The codes are used as they are, whole numbers from 0 on: rotation and steps are in the query
(``prepare_kernel``), the scale of a token is one factor of its score and of its probability, the
code of zero is a number per query row, times the scale, and what was removed from all keys comes
back as one more, so that scores are true ones before softcap, masks, sinks and the exact tokens.
The output of packed values is taken back from the latent frame once, by ``merge_kernel``.

The bits of a code are the mantissa of an fp16 subnormal, which tensor cores multiply exactly: a
mask is all that unpacking takes (``half_codes``). Powers of two put the products back, in the
query, in the scores and in what a share leaves.

A program owns one KV head of one sequence, ``BLOCK_M`` query rows and one share of the tokens, as
in ``triton_attend.py``. Keys and values of a layer are packed in step: the same tokens of both are
packed, and the others are exact: sinks, what follows the packed tokens, new tokens. Each share
leaves an unnormalised output of packed tokens, in the latent frame; the exact tokens leave one
more, which ``prepare_kernel`` makes beside the latent queries, so that the main loop keeps its
registers.

| tensor | shape |
|---|---|
| ``latent_query`` | fp32 ``[batch * num_kv_heads * q_len * queries_per_kv, 16 * planes]`` |
| ``size, offset`` | fp32, what a row's scores are multiplied with, and ``query @ offset`` |
| ``query``, ``new_key``, ``new_value``, ``mask`` | as in ``triton_attend.py`` |
| ``partial`` | fp32 ``[batch * num_heads * q_len, shares + 1, head_dim]``: latent, then exact |
| ``partial_max, partial_sum`` | fp32 ``[batch * num_heads * q_len, shares + 1]`` |

Scores and the sum of packed values take fp16 (fp32 for fp32 models), with the query's rows brought
to unit size; the exact tokens take the query's dtype. Maxima are in units of log 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squat_fx.kernels.triton_attend import (
    NO_CAUSALITY,
    first_seen,
    from_first,
    masked_scores,
    rows_of_block,
)
from squat_fx.kernels.triton_hadamard import dot_short, rotate_rows, rotate_rows_back
from squat_fx.kernels.triton_planes import (
    exact_rows,
    half_codes,
    largest_code,
    load_affine,
    load_or_zero,
    num_pieces,
    num_planes,
    packed_tokens,
    plane_exponent,
    step,
    wait_for_previous_launch,
    words_of_rows,
)

BLOCK_N = 64
EXACT_BLOCK_N = 64  # of 128 channels of 16 bits
PREPARE_WARPS = 4
MATRIX_CHANNELS = 64  # of the 128 of a matrix
ROTATED_ROWS = 16
NUM_STAGES = 3
MERGE_SHARES = 4  # so many at most leave room for 16 query rows
MERGED_CHANNELS = 128  # of more, a program adds one half after the other
LARGEST_BLOCK_M = 64
LOG2_E = tl.constexpr(1.4426950408889634)


def tile(rows: int) -> tuple[int, int]:
    """``BLOCK_M`` and ``num_warps`` for ``rows`` query rows: a warp has 16 rows."""
    block_m = min(max(16, triton.next_power_of_2(rows)), LARGEST_BLOCK_M)
    return block_m, block_m // 16


def exact_block_n(head_dim: int, itemsize: int) -> int:
    """How many exact tokens ``prepare_kernel`` takes at once."""
    return EXACT_BLOCK_N * 256 // (itemsize * max(128, triton.next_power_of_2(head_dim)))


def matrix_block(head_dim: int) -> int:
    """How many columns of a matrix of ``head_dim`` rows a program holds."""
    return MATRIX_CHANNELS * 128 // max(128, triton.next_power_of_2(head_dim))


def merge_tile(shares: int, head_dim: int, has_matrix: bool) -> tuple[int, int]:
    """Query rows of a program of ``merge_kernel``, and its warps.

    Few shares leave room for many rows. Of many, as many threads as there are maxima load one each,
    and an output of 128 channels takes 128 registers; with more threads than maxima Triton has each
    thread load every maximum that it needs.
    """
    if shares <= MERGE_SHARES:
        return ROTATED_ROWS, 4
    if has_matrix:
        return 1, 4
    padded = triton.next_power_of_2(shares)
    room = 32 * 128 // max(128, triton.next_power_of_2(head_dim))
    return max(room // padded, 1), max(padded // 32, 1)


@triton.constexpr_function
def code_factor(fmt, plane):
    """What ``plane_codes`` multiplies codes with."""
    return 2.0 ** (plane_exponent(fmt, plane) - 24)


@triton.constexpr_function
def query_factor(fmt, plane):
    """What rows of unit size are multiplied with: small numbers stay normal halves."""
    return 2.0 ** (4 - plane_exponent(fmt, plane))


@triton.constexpr_function
def zero_code(fmt, plane):
    """The code of zero as ``plane_codes`` would have it, times ``ZERO_FACTOR``: a normal half."""
    return (2 ** fmt.widths[plane] - 1) / 2 * 2.0 ** plane_exponent(fmt, plane)


SCORE_FACTOR = tl.constexpr(2.0**20)  # takes code_factor and query_factor back
ZERO_FACTOR = tl.constexpr(2.0**24)


@triton.jit
def plane_codes(words, plane: tl.constexpr, fmt: tl.constexpr, dtype, ASM: tl.constexpr):
    """The codes of a plane group, ``[N, 16]``, times ``code_factor``."""
    return half_codes(words, plane, fmt, ASM).to(dtype)


@triton.jit
def softmax_step(scores, running_max):
    """Take ``scores`` ``[M, N]`` into the running maximum: weights and what is left of old ones."""
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    return tl.exp2(scores - base[:, None]), tl.exp2(running_max - base), new_max


@triton.jit
def first_column(x):
    """The first column of ``[M, N]``."""
    column = tl.arange(0, x.shape[1])[None, :]
    return tl.sum(tl.where(column == 0, x, 0.0), 1)


@triton.jit
def attend_packed(
    latent, row_zero, row_offset, score_unit, acc, weights, total, running_max,
    key, value, first_row, token, keep, position, query_token, keep_row,
    mask, mask_row, mask_stride, kv_len, q_len, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    SIMPLE: tl.constexpr, ASM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Take the packed tokens at ``first_row + token`` ``[N]`` into the running softmax.

    ``keep`` is ``[N]``, or None if all are there. ``SIMPLE``: nothing is masked. ``acc`` sums codes
    of values, each column of ``weights`` ``[M, 8]`` what they are weighed with, and of ``total``
    what the softmax divides by.
    """
    lane = tl.arange(0, 16)[None, :]
    there = None if keep is None else keep[:, None]
    rows = key.qdata + first_row * KEY.row_size + (token * KEY.row_size)[:, None]
    words = words_of_rows(rows, there, lane, KEY)
    scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) - row_zero[:, None]
    for j in tl.static_range(num_planes(KEY)):
        if num_pieces(KEY, j) > 0:
            k = plane_codes(words, j, KEY, latent[0].dtype, ASM)
            scores = dot_short(latent[j], tl.trans(k), scores)
    key_scale = load_or_zero(key.scale + first_row + token, keep).to(tl.float32)
    scores *= (key_scale * score_unit)[None, :]
    if SIMPLE:
        if keep is not None:
            scores = tl.where(keep[None, :], scores, float("-inf"))
    else:
        seen = tl.broadcast_to(keep_row[:, None], [BLOCK_M, BLOCK_N])
        if keep is not None:
            seen = seen & keep[None, :]
        scores = masked_scores(
            scores + row_offset[:, None], mask, mask_row, mask_stride, position[None, :], seen,
            query_token[:, None], kv_len, q_len, scale, CAUSAL, SOFTCAP,
        )  # fmt: skip
        scores *= LOG2_E
    p, alpha, running_max = softmax_step(scores, running_max)
    p = p.to(latent[0].dtype)
    value_scale = load_or_zero(value.scale + first_row + token, keep).to(p.dtype)
    weight = p * value_scale[None, :]
    rows = value.qdata + first_row * VALUE.row_size + (token * VALUE.row_size)[:, None]
    words = words_of_rows(rows, there, lane, VALUE)
    # Of the very numbers that weigh the codes: the code of zero is up to four times their spread.
    ones = tl.full([BLOCK_N, 8], 1.0, p.dtype)
    weights = dot_short(weight, ones, weights * alpha[:, None])
    total = dot_short(p, ones, total * alpha[:, None])
    new_acc = ()
    for j in tl.static_range(num_planes(VALUE)):
        if num_pieces(VALUE, j) > 0:
            v = plane_codes(words, j, VALUE, latent[0].dtype, ASM)
            new_acc += (dot_short(weight, v, acc[j] * alpha[:, None]),)
        else:
            new_acc += (acc[j],)
    return new_acc, weights, total, running_max


@triton.jit(do_not_specialize=["key_row", "first_row"])
def attend_kernel(
    key, value, positions, key_row, first_row, mask, latent_query, size, offset,
    partial, partial_max, partial_sum, num_kv_heads, q_len, new_len, scale, mask_strides,
    KEY: tl.constexpr, VALUE: tl.constexpr, QUERIES_PER_KV: tl.constexpr, CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The packed tokens. Grid ``(batch * num_kv_heads, blocks of query rows, shares)``."""
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
    count = packed_tokens(watermark, start, KEY)
    oldest = first_seen(positions, first_row, WINDOW)
    tiles = tl.cdiv(count, BLOCK_N)
    hidden = tl.minimum(tl.maximum(oldest - first, 0) // BLOCK_N, tiles)
    tiles_per_share = tl.maximum(tl.cdiv(tiles - hidden, shares), TILES)
    tile_begin = hidden + share * tiles_per_share
    tile_end = tl.minimum(tile_begin + tiles_per_share, tiles)
    whole_end = tl.minimum(tile_end, count // BLOCK_N)

    lane = tl.arange(0, 16)[None, :]
    row, query_token, _, keep_row, mask_row, out = rows_of_block(
        tl.program_id(1), batch, kv_head, num_kv_heads, q_len, mask_strides, QUERIES_PER_KV, BLOCK_M
    )
    query_token, kv_len, mask_row = from_first(
        oldest, query_token, kv_len, mask_row, mask_strides[3]
    )
    token = tl.arange(0, BLOCK_N)
    dtype = tl.float16 if HALF else tl.float32
    out = out * (shares + 1) + share

    SIMPLE: tl.constexpr = mask is None and SOFTCAP == 0 and CAUSAL == NO_CAUSALITY
    acc = ()
    for _ in tl.static_range(num_planes(VALUE)):
        acc += (tl.zeros([BLOCK_M, 16], tl.float32),)
    weights = tl.zeros([BLOCK_M, 8], tl.float32)
    total = tl.zeros([BLOCK_M, 8], tl.float32)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_offset = tl.zeros([BLOCK_M], tl.float32)
    if tile_begin < tile_end:
        rotated = head * q_len * QUERIES_PER_KV + row
        row_scale = tl.load(size + rotated, mask=keep_row, other=0.0)
        if KEY.affine:
            row_offset = tl.load(offset + rotated, mask=keep_row, other=0.0)
        if SIMPLE:
            row_scale *= scale * LOG2_E
            row_offset *= scale * LOG2_E
        # The scale of a row goes into its query as far as fp16 has room; the rest is a power of
        # two that all rows share.
        score_unit = tl.exp2(tl.ceil(tl.maximum(tl.log2(tl.max(tl.abs(row_scale), 0) / 256), 0.0)))
        row_scale /= score_unit
        score_unit *= SCORE_FACTOR
        latent = ()
        zeros = tl.zeros([BLOCK_M, 8], tl.float32)
        for j in tl.static_range(num_planes(KEY)):
            pointers = latent_query + rotated[:, None] * (16 * num_planes(KEY)) + (16 * j + lane)
            plane = tl.load(pointers, mask=keep_row[:, None], other=0.0) * row_scale[:, None]
            plane = (plane * (step(KEY, j) * query_factor(KEY, j))).to(dtype)
            latent += (plane,)
            # A sum of the rows in any other form would move them between layouts in the main loop.
            zero = tl.full([16, 8], zero_code(KEY, j), dtype)
            zeros = dot_short(plane, zero, zeros)
        row_zero = first_column(zeros) / ZERO_FACTOR
        for i in range(tile_begin, whole_end):
            keep = None
            if WINDOW:
                keep = first + i * BLOCK_N + token >= oldest
            acc, weights, total, running_max = attend_packed(
                latent, row_zero, row_offset, score_unit, acc, weights, total, running_max,
                key, value, head * key.capacity + i * BLOCK_N, token, keep,
                first + i * BLOCK_N + token, query_token, keep_row,
                mask, mask_row, mask_strides[3], kv_len, q_len, scale,
                KEY, VALUE, CAUSAL, SOFTCAP, SIMPLE, ASM, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        if whole_end < tile_end:
            slot = whole_end * BLOCK_N + token
            acc, weights, total, running_max = attend_packed(
                latent, row_zero, row_offset, score_unit, acc, weights, total, running_max,
                key, value, head * key.capacity + whole_end * BLOCK_N, token,
                (slot < count) & (first + slot >= oldest),
                first + slot, query_token, keep_row,
                mask, mask_row, mask_strides[3], kv_len, q_len, scale,
                KEY, VALUE, CAUSAL, SOFTCAP, SIMPLE, ASM, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    weight = first_column(weights)
    tl.store(partial_sum + out, first_column(total), mask=keep_row)
    if SIMPLE:
        running_max += row_offset
    tl.store(partial_max + out, running_max, mask=keep_row)
    if tile_begin < tile_end:
        for j in tl.static_range(num_planes(VALUE)):
            x = acc[j] * (1.0 / code_factor(VALUE, j))
            x = (x - (weight * (largest_code(VALUE, j) / 2))[:, None]) * step(VALUE, j)
            channel = 16 * j + lane
            pointers = partial + out[:, None] * VALUE.head_dim + channel
            tl.store(pointers, x, mask=keep_row[:, None] & (channel < VALUE.head_dim))


@triton.jit(do_not_specialize=["key_row", "first_row"])
def prepare_kernel(
    query, new_key, new_value, key, value, positions, key_row, first_row, mask,
    latent_query, size, offset, partial, partial_max, partial_sum,
    num_kv_heads, q_len, new_len, scale, shares, rows, row_blocks, bases, heads,
    query_strides, new_key_strides, new_value_strides, mask_strides,
    KEY: tl.constexpr, VALUE: tl.constexpr, QUERIES_PER_KV: tl.constexpr, CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PADDED_D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What the packed tokens need, and the exact tokens, side by side.

    Grid ``row_blocks * bases * blocks of channels + heads * blocks of query rows``; ``heads`` is
    ``batch * num_kv_heads``. Rotated are ``BLOCK_R`` rows and ``BLOCK_D`` channels at once.
    """
    program = tl.program_id(0)
    rotations = row_blocks * bases * tl.cdiv(16 * num_planes(KEY), BLOCK_D)
    if program < rotations:
        rotate(
            query, key, latent_query, size, offset, program % row_blocks,
            program // row_blocks % bases, program // (row_blocks * bases),
            bases, rows, num_kv_heads, q_len, query_strides,
            KEY, QUERIES_PER_KV, BLOCK_R, BLOCK_D, PADDED_D,
        )  # fmt: skip
    else:
        program -= rotations
        attend_exact(
            query, new_key, new_value, key, value, positions, key_row, first_row, mask,
            partial, partial_max, partial_sum, (program % heads).to(tl.int64), program // heads,
            num_kv_heads, q_len, new_len, scale, shares,
            query_strides, new_key_strides, new_value_strides, mask_strides,
            KEY, VALUE, QUERIES_PER_KV, CAUSAL, SOFTCAP, WINDOW, BLOCK_M, BLOCK_N, PADDED_D,
        )  # fmt: skip


@triton.jit
def attend_exact(
    query, new_key, new_value, key, value, positions, key_row, first_row, mask,
    partial, partial_max, partial_sum, head, block, num_kv_heads, q_len, new_len, scale, shares,
    query_strides, new_key_strides, new_value_strides, mask_strides,
    KEY: tl.constexpr, VALUE: tl.constexpr, QUERIES_PER_KV: tl.constexpr, CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PADDED_D: tl.constexpr,
):  # fmt: skip
    """The exact tokens of a head: sinks, what follows the packed tokens, new tokens."""
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

    _, query_token, query_head, keep_row, mask_row, out = rows_of_block(
        block, batch, kv_head, num_kv_heads, q_len, mask_strides, QUERIES_PER_KV, BLOCK_M
    )
    out = out * (shares + 1) + shares
    query_rows = (
        query
        + batch * query_strides[0]
        + query_head * query_strides[1]
        + query_token * query_strides[2]
    )

    oldest = first_seen(positions, first_row, WINDOW)
    query_token, kv_len, mask_row = from_first(
        oldest, query_token, kv_len, mask_row, mask_strides[3]
    )
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PADDED_D], tl.float32)
    channel = tl.arange(0, PADDED_D)[None, :]
    keep = keep_row[:, None] & (channel < KEY.head_dim)
    q = tl.load(query_rows[:, None] + channel, mask=keep, other=0.0)
    new_key_head = batch * new_key_strides[0] + kv_head * new_key_strides[1]
    new_value_head = batch * new_value_strides[0] + kv_head * new_value_strides[1]
    for i in tl.range(0, tl.cdiv(num_exact, BLOCK_N), num_stages=1):
        index = i * BLOCK_N + tl.arange(0, BLOCK_N)
        position = tl.where(index < num_sinks, start + index, tail + index - num_sinks)
        column = position[:, None]
        visible = (index < num_exact) & (position >= oldest)
        there = visible[:, None]
        rows = exact_rows(
            key, new_key, new_key_head, new_key_strides[2], head, column, start, length, KEY
        )
        k = tl.load(rows + channel, mask=there & (channel < KEY.head_dim), other=0.0)
        rows = exact_rows(
            value, new_value, new_value_head, new_value_strides[2], head, column, start,
            length, VALUE,
        )  # fmt: skip
        v = tl.load(rows + channel, mask=there & (channel < VALUE.head_dim), other=0.0)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="tf32x3")
        seen = keep_row[:, None] & visible[None, :]
        scores = masked_scores(
            scores, mask, mask_row, mask_strides[3], position[None, :], seen,
            query_token[:, None], kv_len, q_len, scale, CAUSAL, SOFTCAP,
        )  # fmt: skip
        p, alpha, running_max = softmax_step(scores * LOG2_E, running_max)
        running_sum = running_sum * alpha + tl.sum(p, 1)
        p = p.to(q.dtype)
        acc = tl.dot(p, v.to(q.dtype), acc * alpha[:, None], input_precision="tf32x3")
    tl.store(partial_max + out, running_max, mask=keep_row)
    tl.store(partial_sum + out, running_sum, mask=keep_row)
    pointers = partial + out[:, None] * VALUE.head_dim + channel
    tl.store(pointers, acc, mask=keep_row[:, None] & (channel < VALUE.head_dim))


@triton.jit
def rows_of_basis(
    block, basis, bases, rows, q_len, QUERIES_PER_KV: tl.constexpr, BLOCK_M: tl.constexpr
):
    """A block of the ``rows`` query rows that share a basis, of whichever sequence: KV head,
    query token, query head of the KV head, and whether there is one, ``[M]``.
    """
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    head = row // (q_len * QUERIES_PER_KV) * bases + basis
    query_token = row // QUERIES_PER_KV % q_len
    return head, query_token, row % QUERIES_PER_KV, row < rows


@triton.jit
def rotate(
    query, key, latent, size, offset, block, basis, channel_block, bases, rows, num_kv_heads, q_len,
    query_strides, FORMAT: tl.constexpr, QUERIES_PER_KV: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr, PADDED_D: tl.constexpr,
):  # fmt: skip
    """Query rows in the latent frame, brought to unit size: one block of channels.

    The fixed rotation takes them all: ``BLOCK_D`` is ``PADDED_D``.
    """
    head, query_token, query_head, keep_row = rows_of_basis(
        block, basis, bases, rows, q_len, QUERIES_PER_KV, BLOCK_R
    )
    out = (head * q_len + query_token) * QUERIES_PER_KV + query_head
    query_head += head % num_kv_heads * QUERIES_PER_KV
    query_rows = (
        query
        + (head // num_kv_heads).to(tl.int64) * query_strides[0]
        + query_head * query_strides[1]
        + query_token * query_strides[2]
    )
    channel = tl.arange(0, PADDED_D)
    inside = channel < FORMAT.head_dim
    keep = keep_row[:, None] & inside[None, :]
    latent_channel = channel_block * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    if key.basis is not None:
        pointers = key.basis + key.inverse + basis * key.basis_stride
        pointers += latent_channel * FORMAT.head_dim + channel[:, None]
        there = (latent_channel < FORMAT.head_dim) & inside[:, None]
        matrix = tl.load(pointers, mask=there, other=0.0)  # [PADDED_D, BLOCK_D]
    q = tl.load(query_rows[:, None] + channel[None, :], mask=keep, other=0.0).to(tl.float32)
    if FORMAT.affine:
        shift, factor = load_affine(key, head[:, None], channel[None, :], keep, FORMAT)
        if channel_block == 0:
            tl.store(offset + out, tl.sum(q * shift, 1), mask=keep_row)
        q *= factor
    largest = tl.maximum(tl.max(tl.abs(q), 1), 1e-30)
    if channel_block == 0:
        tl.store(size + out, largest, mask=keep_row)
    if key.basis is None:
        x = rotate_rows(q / largest[:, None], FORMAT)
    else:
        x = tl.dot(q / largest[:, None], matrix, input_precision="tf32x3")
    pointers = latent + out[:, None] * (16 * num_planes(FORMAT)) + latent_channel
    tl.store(pointers, x, mask=keep_row[:, None] & (latent_channel < 16 * num_planes(FORMAT)))


@triton.constexpr_function
def first_part(channels, shares):
    """How many channels of a head to load at first: registers have room for half of a wide one."""
    return channels // 2 if channels > MERGED_CHANNELS and shares > MERGE_SHARES else channels


@triton.jit
def load_shares(partial, left, there, channel, fmt: tl.constexpr):
    """The outputs ``left`` ``[M, S]``, ``channel`` ``[D]``: ``[M, S, D]``."""
    pointers = partial + left[:, :, None] * fmt.head_dim + channel[None, None, :]
    keep = there[:, :, None] & (channel < fmt.head_dim)[None, None, :]
    return tl.load(pointers, mask=keep, other=0.0)


@triton.jit
def add_shares(x, maximum, weight):
    """Their sum, ``[M, D]``; a share without a visible token may have left its output unwritten."""
    seen = (maximum > float("-inf"))[:, :, None]
    return tl.sum(tl.where(seen, x * weight[:, :, None], 0.0), 1)


@triton.jit
def merge_kernel(
    partial, partial_max, partial_sum, sinks, value, output, num_heads, q_len, shares,
    rows, row_blocks, bases,
    FORMAT: tl.constexpr, QUERIES_PER_KV: tl.constexpr, PADDED_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Add the shares of query rows. Grid ``(row_blocks * bases, blocks of channels)``; one block
    for the fixed rotation.

    ``DEPENDENT``: it was launched while the launch before runs, and waits for it here.
    """
    basis = tl.program_id(0) // row_blocks
    head, query_token, query_head, keep_row = rows_of_basis(
        tl.program_id(0) % row_blocks, basis, bases, rows, q_len, QUERIES_PER_KV, BLOCK_M
    )
    query_head += head * QUERIES_PER_KV  # of all sequences
    row = query_head.to(tl.int64) * q_len + query_token  # [M]
    share = tl.arange(0, BLOCK_S)  # [S]
    first = row * (shares + 1)
    left = first[:, None] + share[None, :]  # [M, S]
    there = keep_row[:, None] & (share < shares)[None, :]
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]  # [1, D]
    inside = channel < FORMAT.head_dim
    inner = tl.arange(0, PADDED_D)  # [L]
    if value.basis is not None:
        pointers = value.basis + value.inverse + basis * value.basis_stride
        pointers += inner[:, None] * FORMAT.head_dim + channel
        matrix = tl.load(pointers, mask=(inner < FORMAT.head_dim)[:, None] & inside, other=0.0)
    if DEPENDENT:
        wait_for_previous_launch()
    first_channels = tl.arange(0, first_part(PADDED_D, BLOCK_S))
    latent = load_shares(partial, left, there, first_channels, FORMAT)
    latent_max = tl.load(partial_max + left, mask=there, other=float("-inf"))
    latent_sum = tl.load(partial_sum + left, mask=there, other=0.0)
    exact_max = tl.load(partial_max + first + shares, mask=keep_row, other=float("-inf"))
    exact_sum = tl.load(partial_sum + first + shares, mask=keep_row, other=0.0)
    base = tl.maximum(tl.max(latent_max, 1), exact_max)
    if sinks is not None:
        pointers = sinks + query_head % num_heads
        sink = tl.load(pointers, mask=keep_row, other=0.0).to(tl.float32) * LOG2_E
        base = tl.maximum(base, sink)
    base = tl.where(base == float("-inf"), 0.0, base)
    latent_weight = tl.exp2(latent_max - base[:, None])
    exact_weight = tl.exp2(exact_max - base)
    latent_total = tl.sum(latent_sum * latent_weight, 1)
    total = latent_total + exact_sum * exact_weight
    if sinks is not None:
        total += tl.exp2(sink - base)

    latent = add_shares(latent, latent_max, latent_weight)
    if first_channels.shape[0] < PADDED_D:
        rest = first_channels + first_channels.shape[0]
        rest = load_shares(partial, left, there, rest, FORMAT)
        rest = add_shares(rest, latent_max, latent_weight)
        latent = tl.permute(tl.join(latent, rest), (0, 2, 1))
        latent = tl.reshape(latent, [BLOCK_M, PADDED_D])
    if value.basis is None:
        packed = rotate_rows_back(latent, FORMAT)
    elif BLOCK_M == 1:
        packed = tl.sum(matrix * tl.trans(latent), 0, keep_dims=True)
    else:
        packed = tl.dot(latent, matrix, input_precision="tf32x3")
    if FORMAT.affine:
        shift, factor = load_affine(
            value, head[:, None], channel, keep_row[:, None] & inside, FORMAT
        )
        packed = packed * factor + shift * latent_total[:, None]
    pointers = partial + (first + shares)[:, None] * FORMAT.head_dim + channel
    there = keep_row[:, None] & inside
    out = tl.load(pointers, mask=there, other=0.0) * exact_weight[:, None] + packed
    total = total[:, None]
    out = tl.where(total > 0, out / tl.where(total > 0, total, 1.0), 0.0)
    pointers = output + row[:, None] * FORMAT.head_dim + channel
    tl.store(pointers, out.to(output.dtype.element_ty), mask=there)
