"""What a codec learns from a prompt: ``codecs/squat.py`` in four kernels.

``statistics_kernel``, a program per KV head and chunk of tokens, reads keys and queries once:

    count, mean, sum((key - mean)**2)       of the kept keys of the chunk
    C = query.T @ query                     of the kept queries that share the KV head

``gather_kernel`` adds chunks up, in a fixed order, to offsets ``mean`` and factors ``f`` and to
``L @ (f * C * f)``, where ``L`` takes queries into the latent frame. ``latent_kernel`` multiplies
that with ``L.T``. Both have a program per KV head and plane group of rows. For ``squat_paper``,
which learns feedback alone and from however few tokens, ``L`` and ``f`` are one and keys not read.

``feedback_kernel``, a program per KV head, adds ``mean eigenvalue / strength`` to the diagonal,
which makes a multiple ``A`` of ``H`` (``codecs/feedback.py``), and turns it in place into the
feedback ``W[block, later] = -H[block, later] @ inv(H[later, later])``. From the last plane group to
the first, with ``K = A[before, block] @ inv(A[block, block])``,

    W[block, later] = A[block, later]
    A[before, :] -= K @ A[block, :]         A[before, block] = -K

What is left of ``A`` is the Schur complement of the plane groups that are done, and behind it the
feedback as far as it is known. fp32 does where ``1 + strength * head_dim``, which bounds the
condition of ``H``, is not large.

| tensor | shape |
|---|---|
| ``key`` | ``[batch, heads, tokens, head_dim]``, 16 bits, any strides but the last; or None |
| ``query`` | ``[batch, heads * QUERIES_PER_KV, tokens, head_dim]``, the same; or None |
| ``valid`` | uint8 ``[batch, tokens]``, any strides; None: all |
| ``moments`` | fp32 ``[batch * heads, chunks, 4, head_dim]``: count, mean, squares; of queries |
| ``grams`` | fp32 ``[batch * heads, chunks, head_dim, head_dim]`` |
| ``basis`` | fp32 ``[heads or 1, head_dim, head_dim]``: ``L``; None: one |
| ``affine`` | fp16 ``[batch * heads, 2, head_dim]``: offsets, factors; or None |
| ``feedback`` | fp32 ``[batch * heads, head_dim, head_dim]`` |
"""

from __future__ import annotations

import triton
import triton.language as tl

from squat_fx.codecs import smoothing
from squat_fx.kernels.triton_round import LARGEST_HALF, ROUND_TO_INTEGER, dot_in_fp32

BLOCK_D = 128  # channels on a side of the part of a Gram that a program sums
BLOCK_T = 64  # queries of a dot
KEY_BLOCK_T = 32
BLOCK_K = 32
BLOCK_R = 32  # rows of a matrix that are updated at a time; from 64 on sm_90 takes other dots

FLOOR = tl.constexpr(smoothing.FLOOR)
LARGEST_EXPONENT = tl.constexpr(smoothing.LARGEST_EXPONENT)
TINY = tl.constexpr(1e-30)
SMALLEST_RIDGE = tl.constexpr(1e-30)  # without queries there is no eigenvalue to go by
LARGEST_RIDGE = tl.constexpr(1e30)


# statistics --------------------------------------------------------------------------------------


@triton.jit
def first_valid(valid, stride, tokens):
    """The first valid token of a row; ``tokens`` if there is none."""
    first = tokens
    at = 0
    while at < first:
        token = at + tl.arange(0, 1024)
        pointers = valid + token.to(tl.int64) * stride
        seen = tl.load(pointers, mask=token < tokens, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(seen, token, tokens), 0))
        at += 1024
    return first


@triton.jit
def kept(valid, stride, token, first, last):
    """Which tokens are learned from: valid ones from ``first`` to ``last - 1``."""
    keep = (token >= first) & (token < last)
    if valid is not None:
        keep = keep & (tl.load(valid + token.to(tl.int64) * stride, mask=keep, other=0) != 0)
    return keep


@triton.jit
def bounded(x):
    """Zeros for NaN and what fp16 cannot hold."""
    return tl.where(tl.abs(x.to(tl.float32)) <= LARGEST_HALF, x, tl.zeros_like(x))


@triton.jit
def key_moments(
    key, stride, valid, valid_stride, begin, first, last,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Count, and mean and sum of squares about it of each channel ``[CHANNELS]``.

    Welford's update in every row of a tile, whose rows are merged at the end: nothing cancels.
    """
    channel = tl.arange(0, CHANNELS)[None, :]
    count = tl.zeros([BLOCK_T, 1], tl.float32)
    mean = tl.zeros([BLOCK_T, CHANNELS], tl.float32)
    squares = tl.zeros([BLOCK_T, CHANNELS], tl.float32)
    for at in tl.range(begin, last, BLOCK_T, num_stages=4):
        token = at + tl.arange(0, BLOCK_T)[:, None]
        keep = kept(valid, valid_stride, token, first, last)
        pointers = key + token.to(tl.int64) * stride + channel
        x = tl.load(pointers, mask=keep & (channel < HEAD_DIM), other=0.0).to(tl.float32)
        unusable = tl.where(tl.abs(x) <= LARGEST_HALF, 0, 1)
        x = tl.where(tl.sum(unusable, 1, keep_dims=True) == 0, x, 0.0)
        count += tl.where(keep, 1.0, 0.0)
        change = tl.where(keep, x - mean, 0.0)
        mean += change * (1.0 / tl.maximum(count, 1.0))
        squares += change * (x - mean)
    total = tl.sum(count, 0, keep_dims=True)
    merged = tl.sum(mean * (count / tl.maximum(total, 1.0)), 0, keep_dims=True)
    away = mean - merged
    squares = tl.sum(squares + count * away * away, 0)
    return total, merged, squares[None, :]


@triton.jit
def statistics_kernel(
    key, key_strides, query, query_strides, valid, valid_strides, moments, grams,
    heads, tokens, sink_length, chunk_tokens,
    QUERIES_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, KEY_BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid: ``[batch * heads, chunks, blocks of the Gram]``."""
    head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, kv_head = head // heads, head % heads
    part = head * tl.num_programs(1) + chunk
    moments += part * 4 * HEAD_DIM
    begin = chunk * chunk_tokens
    last = tl.minimum(begin + chunk_tokens, tokens)
    first = sink_length
    if valid is not None:
        valid += row * valid_strides[0]
        first += first_valid(valid, valid_strides[1], tokens)

    if query is not None:
        blocks: tl.constexpr = CHANNELS // BLOCK_D
        left = tl.program_id(2) // blocks * BLOCK_D + tl.arange(0, BLOCK_D)
        right = tl.program_id(2) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
        query += row * query_strides[0] + kv_head * QUERIES_PER_KV * query_strides[1]
        gram = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
        tiles = tl.cdiv(last - begin, BLOCK_T)
        for i in range(tiles * QUERIES_PER_KV):
            token = begin + i // QUERIES_PER_KV * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
            keep = kept(valid, valid_strides[1], token, first, last)
            rows = query + token.to(tl.int64) * query_strides[2]
            rows += (i % QUERIES_PER_KV) * query_strides[1]
            b = tl.load(rows + right[None, :], mask=keep & (right[None, :] < HEAD_DIM), other=0.0)
            b = bounded(b)
            if blocks == 1:
                a = b
            else:
                a = tl.load(rows + left[None, :], mask=keep & (left[None, :] < HEAD_DIM), other=0.0)
                a = bounded(a)
            gram = tl.dot(tl.trans(a), b, gram)
        inside = (left[:, None] < HEAD_DIM) & (right[None, :] < HEAD_DIM)
        grams += part * HEAD_DIM * HEAD_DIM
        tl.store(grams + left[:, None] * HEAD_DIM + right[None, :], gram, mask=inside)
        # The diagonal once more, where it is read without strides.
        if tl.program_id(2) // blocks == tl.program_id(2) % blocks:
            own = tl.sum(tl.where(left[:, None] == right[None, :], gram, 0.0), 0)
            tl.store(moments + 3 * HEAD_DIM + right, own, mask=right < HEAD_DIM)

    if key is not None and tl.program_id(2) == 0:
        key += row * key_strides[0] + kv_head * key_strides[1]
        count, mean, squares = key_moments(
            key, key_strides[2], valid, valid_strides[1], begin, first, last,
            HEAD_DIM, CHANNELS, KEY_BLOCK_T,
        )  # fmt: skip
        channel = tl.arange(0, CHANNELS)[None, :]
        there = channel < HEAD_DIM
        tl.store(moments + channel, tl.broadcast_to(count, mean.shape), mask=there)
        tl.store(moments + HEAD_DIM + channel, mean, mask=there)
        tl.store(moments + 2 * HEAD_DIM + channel, squares, mask=there)


# offsets, factors, and the queries' Gram in the latent frame -------------------------------------


@triton.jit
def floored_log(moment, there, HEAD_DIM: tl.constexpr):
    """``log2`` of ``smoothing_factors``' floored moment ``[C]``."""
    mean = tl.sum(tl.where(there, moment, 0.0), 0) / HEAD_DIM
    return tl.log2(moment + FLOOR * mean + TINY)


@triton.jit
def smoothing_exponents(key_moment, query_moment, there, HEAD_DIM: tl.constexpr):
    """Whole numbers ``[C]`` whose powers of two are the factors."""
    ratio = floored_log(key_moment, there, HEAD_DIM) - floored_log(query_moment, there, HEAD_DIM)
    ratio = ratio / 4
    ratio -= tl.sum(tl.where(there, ratio, 0.0), 0) / HEAD_DIM
    ratio = tl.where(tl.abs(ratio) < float("inf"), ratio, 0.0)
    ratio = tl.minimum(tl.maximum(ratio, -LARGEST_EXPONENT), LARGEST_EXPONENT)
    return (ratio + ROUND_TO_INTEGER) - ROUND_TO_INTEGER


@triton.jit
def power_of_two(exponent):
    """Exactly, of whole numbers in fp32."""
    return ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def times_transposed(rows, row, basis, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
                     BLOCK_K: tl.constexpr):  # fmt: skip
    """``rows @ basis.T``, fp32 ``[16, C]``, of rows in memory; ``row`` are their numbers."""
    channel = tl.arange(0, CHANNELS)[:, None]
    product = tl.zeros([16, CHANNELS], tl.float32)
    for first in tl.range(0, HEAD_DIM, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(rows + k, mask=(row < HEAD_DIM) & (k < HEAD_DIM), other=0.0)
        mask = (channel < HEAD_DIM) & (k < HEAD_DIM)
        y = tl.load(basis + channel * HEAD_DIM + k, mask=mask, other=0.0)
        product = dot_in_fp32(x, tl.trans(y), product, False)
    return product


@triton.jit
def offset_and_factor(
    moments, chunks, CENTER: tl.constexpr, SMOOTH: tl.constexpr, SMALLEST_PROMPT: tl.constexpr,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """fp16 and fp32 ``[C]``, and whether there are tokens enough to learn from."""
    channel = tl.arange(0, CHANNELS)
    there = channel < HEAD_DIM
    chunk = tl.arange(0, CHUNKS)[:, None]
    pointers = moments + chunk * 4 * HEAD_DIM + channel[None, :]
    mask = (chunk < chunks) & there[None, :]
    count = tl.load(pointers, mask=mask, other=0.0)
    means = tl.load(pointers + HEAD_DIM, mask=mask, other=0.0)
    total = tl.sum(count, 0)
    learned = total >= SMALLEST_PROMPT
    total = tl.maximum(total, 1.0)
    offset = tl.zeros([CHANNELS], tl.float16)
    factor = tl.full([CHANNELS], 1.0, tl.float32)
    if CENTER:
        mean = tl.sum(count * means, 0) / total
        offset = tl.minimum(tl.maximum(mean, -LARGEST_HALF), LARGEST_HALF).to(tl.float16)
        offset = tl.where(learned, offset, 0.0).to(tl.float16)
    if SMOOTH:
        squares = tl.load(pointers + 2 * HEAD_DIM, mask=mask, other=0.0)
        of_queries = tl.sum(tl.load(pointers + 3 * HEAD_DIM, mask=mask, other=0.0), 0)
        away = means - offset.to(tl.float32)[None, :]
        squares = tl.sum(squares + count * away * away, 0) / total
        exponent = smoothing_exponents(squares, of_queries, there, HEAD_DIM)
        factor = tl.where(learned, power_of_two(exponent), 1.0)
    return offset, factor, learned


@triton.jit
def gather_kernel(
    moments, grams, basis, basis_stride, affine, feedback, heads, chunks,
    CENTER: tl.constexpr, SMOOTH: tl.constexpr, SMALLEST_PROMPT: tl.constexpr,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: ``[batch * heads, plane groups]``; one plane group will do without feedback.

    A program leaves its rows of ``f * C * f`` in the first chunk of ``grams``, where only it has
    read, and the columns of ``L @ (f * C * f)`` that they give in ``feedback``.
    """
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, CHANNELS)
    there = channel < HEAD_DIM
    scale = tl.full([CHANNELS], 1.0, tl.float32)
    if SMALLEST_PROMPT > 0:
        offset, factor, learned = offset_and_factor(
            moments + head * chunks * 4 * HEAD_DIM, chunks, CENTER, SMOOTH, SMALLEST_PROMPT,
            HEAD_DIM, CHANNELS, CHUNKS,
        )  # fmt: skip
        scale = tl.where(learned, factor, 0.0)
        if affine is not None and block == 0:
            affine += head * 2 * HEAD_DIM
            tl.store(affine + channel, offset, mask=there)
            tl.store(affine + HEAD_DIM + channel, factor.to(tl.float16), mask=there)

    if feedback is not None:
        matrix = HEAD_DIM * HEAD_DIM
        row = block * 16 + tl.arange(0, 16)[:, None]
        rows = grams + head * chunks * matrix + row * HEAD_DIM
        inside = (row < HEAD_DIM) & there[None, :]
        gram = tl.zeros([16, CHANNELS], tl.float32)
        for i in tl.range(0, chunks, num_stages=4):
            gram += tl.load(rows + i * matrix + channel[None, :], mask=inside, other=0.0)
        scale = scale[None, :]
        gram *= tl.sum(tl.where(row == channel[None, :], scale, 0.0), 1, keep_dims=True) * scale
        columns = feedback + head * matrix + channel[None, :] * HEAD_DIM + row
        if basis is None:
            tl.store(columns, gram, mask=inside)
        else:
            tl.debug_barrier()
            tl.store(rows + channel[None, :], gram, mask=inside)
            tl.debug_barrier()
            basis += (head % heads) * basis_stride
            product = times_transposed(rows, row, basis, HEAD_DIM, CHANNELS, BLOCK_K)
            tl.store(columns, product, mask=inside)


@triton.jit
def latent_kernel(
    basis, basis_stride, feedback, heads,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``feedback @ L.T`` in place. Grid: ``[batch * heads, plane groups]``."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * 16 + tl.arange(0, 16)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    rows = feedback + head * HEAD_DIM * HEAD_DIM + row * HEAD_DIM
    basis += (head % heads) * basis_stride
    product = times_transposed(rows, row, basis, HEAD_DIM, CHANNELS, BLOCK_K)
    tl.debug_barrier()
    tl.store(rows + channel, product, mask=(row < HEAD_DIM) & (channel < HEAD_DIM))


# feedback ----------------------------------------------------------------------------------------


@triton.jit
def inverse(x, row, column):
    """The inverse of a positive definite matrix ``[16, 16]``, by symmetric elimination.

    Pivots have their own vector, which is a step ahead of ``x``: their sums hide behind its own.
    """
    pivots = tl.sum(tl.where(row == column, x, 0.0), 0, keep_dims=True)
    for k in range(16):
        factor = 1.0 / tl.sum(tl.where(column == k, pivots, 0.0), 1, keep_dims=True)
        down = tl.sum(tl.where(column == k, x, 0.0), 1, keep_dims=True)
        across = tl.trans(down)
        scaled = across * factor
        pivots -= across * scaled
        x = tl.where(row == k, scaled, x - down * scaled)
        x = tl.where(column == k, tl.where(row == k, -factor, down * factor), x)
    return -x


@triton.jit
def eliminate(
    matrix, pivot, across, begin,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Update the rows before a plane group, which begins at channel ``begin``, from its rows
    ``across``.
    """
    own, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    channel = tl.arange(0, CHANNELS)[None, :]
    inverted = inverse(pivot, own, column)
    within = (channel >= begin) & (channel < begin + 16)
    across = tl.where(within, tl.where(begin + own == channel, 1.0, 0.0), across)
    for top in range(0, begin, BLOCK_R):
        row = top + tl.arange(0, BLOCK_R)[:, None]
        rows = matrix + row * HEAD_DIM
        mask = (row < begin) & (channel < HEAD_DIM)
        x = tl.load(rows + channel, mask=mask, other=0.0)
        inside = (row < begin) & (begin + column < HEAD_DIM)
        weights = tl.load(rows + begin + column, mask=inside, other=0.0)
        weights = dot_in_fp32(weights, inverted, tl.zeros([BLOCK_R, 16], tl.float32), False)
        x = dot_in_fp32(-weights, across, tl.where(within, 0.0, x), False)
        tl.debug_barrier()
        tl.store(rows + channel, x, mask=mask)


@triton.jit
def feedback_kernel(
    feedback, strength,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid: ``[batch * heads]``. Loads must not be pipelined: they read what was just stored."""
    feedback += tl.program_id(0).to(tl.int64) * HEAD_DIM * HEAD_DIM
    channel = tl.arange(0, CHANNELS)
    diagonal = feedback + channel * (HEAD_DIM + 1)
    trace = tl.sum(tl.load(diagonal, mask=channel < HEAD_DIM, other=0.0), 0)
    ridge = tl.minimum(tl.maximum(trace / HEAD_DIM / strength, SMALLEST_RIDGE), LARGEST_RIDGE)
    channel = channel[None, :]
    own, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    blocks = tl.cdiv(HEAD_DIM, 16)
    for i in range(blocks):
        begin = (blocks - 1 - i) * 16
        rows = feedback + (begin + own) * HEAD_DIM
        mask = (begin + own < HEAD_DIM) & (channel < HEAD_DIM)
        across = tl.load(rows + channel, mask=mask, other=0.0)
        inside = (begin + own < HEAD_DIM) & (begin + column < HEAD_DIM)
        pivot = tl.load(rows + begin + column, mask=inside, other=0.0)
        pivot = tl.where(own == column, pivot + ridge, pivot)
        tl.debug_barrier()
        tl.store(rows + channel, tl.where(channel >= begin + 16, across, 0.0), mask=mask)
        if begin > 0:
            eliminate(feedback, pivot, across, begin, HEAD_DIM, CHANNELS, BLOCK_R)
        tl.debug_barrier()
