"""The packed tokens of ``triton_attend_token.py`` with tokens where tensor cores have 16 rows.

There, a tensor core's 16 rows are query rows, of which most decoding steps fill one to eight. Here
the operands change sides: keys and values, as they are stored, are the 16-row operand, and up to
eight query rows the other one. That halves the tensor core instructions, the numbers of a softmax
and the accumulators, for what is written in Gluon, Triton's language of explicit layouts: a
program is one warp, which copies its tiles asynchronously itself.

    scores [tokens, rows] = codes [tokens, 16] @ latent_query [16, rows], term by term
    output [16, rows]     = codes.T [16, tokens] @ weights [tokens, rows]     (``operands.py``)

It takes fp16 and bf16 models, up to 16 query rows of a KV head, and tokens whose rows an
asynchronous copy can take; ``launch.py`` chooses. Masks, windows, causality and softcap are as in
``triton_attend.py``; without them (``SIMPLE``) scores go into the softmax as they are. The exact
tokens, in the query's dtype, are programs of the same launch, and every share rotates its query
itself, so that ``prepare_kernel`` is launched only for keys whose latent frame has a matrix. What
comes out is that of ``triton_attend_token.py``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from squat_fx.kernels.gluon_query import latent_terms, loaded_rows, rotated_rows
from squat_fx.kernels.gluon_tiles import (
    CODES,
    COPIED_SCALES,
    ROWS,
    SCALES_IN_MEMORY,
    SCORES,
    TOKENS,
    WEIGHT_ROWS,
    WEIGHT_TOKENS,
    WEIGHTS,
    copy_scales,
    copy_tokens,
    key_words,
    num_terms,
    plane_output,
    term_codes,
    tile_memory,
    value_words,
)
from squat_fx.kernels.triton_attend import (
    NO_CAUSALITY,
    from_first,
    masked_scores,
    places_of_rows,
    rows_of_mask,
)
from squat_fx.kernels.triton_attend_token import LOG2_E, SCORE_FACTOR
from squat_fx.kernels.triton_planes import (
    StoredFormat,
    exact_rows,
    largest_code,
    num_planes,
    packed_tokens,
    step,
    wait_for_previous_launch,
)
from squat_fx.kernels.tuning import Choice

NARROW_BLOCK_M = 8  # query rows, of which tensor cores here take eight
LARGEST_BLOCK_M = 16
MOST_WIDE_TERMS = 8
CAPACITY_MULTIPLE = 16  # so that scales are copied 16 bytes at a time
EXACT_BLOCK_N = 16

LOADED = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [1, 1], [1, 0]))
LOADED_TOKENS = gl.constexpr(gl.SliceLayout(1, LOADED.value))
LOADED_CHANNELS = gl.constexpr(gl.SliceLayout(0, LOADED.value))


def tile(rows: int, key: StoredFormat, value: StoredFormat, chosen: Choice) -> tuple[int, Choice]:
    """``BLOCK_M``, and how tokens are cut for it.

    A warp has registers for the sums of 16 rows in few terms. Copies in small pieces take the
    registers of their addresses.
    """
    wide = rows > NARROW_BLOCK_M and max(len(key.terms), len(value.terms)) <= MOST_WIDE_TERMS
    in_pieces = min(fmt.token_row.together for fmt in (key, value)) < 8
    return LARGEST_BLOCK_M if wide else NARROW_BLOCK_M, chosen.halved(wide or in_pieces)


@gluon.constexpr_function
def nothing_is_masked(mask, causal, softcap, window):
    """Whether scores go into the softmax as they are."""
    return mask is None and causal == NO_CAUSALITY and softcap == 0 and not window


@gluon.jit
def copy_tile(
    memory, stage, key, value, first_row, KEY: gl.constexpr, VALUE: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Words and scales of keys and values; all tokens are there."""
    key_memory, value_memory, key_scales, value_scales = memory
    copy_tokens(key_memory, stage, key.qdata, first_row, None, KEY, BLOCK_N)
    copy_tokens(value_memory, stage, value.qdata, first_row, None, VALUE, BLOCK_N)
    copy_scales(key_scales, stage, key.scale, first_row, BLOCK_N)
    copy_scales(value_scales, stage, value.scale, first_row, BLOCK_N)


@gluon.jit
def places_in_mask(
    positions, first_row, kv_len, batch, kv_head, num_kv_heads, q_len, mask_strides,
    QUERIES_PER_KV: gl.constexpr, WINDOW: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """Of a block's query rows, ``[1, BLOCK_M]``: token, whether there is one, row of a mask, as
    they count from the first token that is seen; that token, and how many there are from it on.
    """
    row = gl.program_id(1) * BLOCK_M + gl.arange(0, BLOCK_M, ROWS)
    query_token, query_head, keep_row, _ = places_of_rows(
        row, batch, kv_head, num_kv_heads, q_len, QUERIES_PER_KV
    )
    mask_row = rows_of_mask(batch, query_head, query_token, mask_strides)
    oldest = 0
    if WINDOW:
        oldest = gl.load(positions + 2 * first_row).to(gl.int32)
        query_token, kv_len, mask_row = from_first(
            oldest, query_token, kv_len, mask_row, mask_strides[3]
        )
    return (query_token[None, :], keep_row[None, :], mask_row[None, :]), oldest, kv_len


@gluon.jit
def softmax_step(scores, running_max, SIMPLE: gl.constexpr):
    """Take ``scores`` ``[N, M]`` into the running maximum: weights and what is left of old ones.

    ``SIMPLE``: every row sees a token.
    """
    new_max = gl.maximum(running_max, gl.max(scores, 0))
    base = new_max
    if not SIMPLE:
        base = gl.where(new_max == float("-inf"), 0.0, new_max)
    return gl.exp2(scores - base[None, :]), gl.exp2(running_max - base)[None, :], new_max


@gluon.jit
def attend_tile(
    latent, row_zero, row_offset, acc, weight_sum, total, running_max, k_words, v_words,
    key_scale, value_scale, keep, position, places, mask, mask_stride, kv_len, q_len, scale,
    KEY: gl.constexpr, VALUE: gl.constexpr, CAUSAL: gl.constexpr, SOFTCAP: gl.constexpr,
    WINDOW: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Take a tile into the running softmax.

    ``key_scale`` is fp32 and has the factors of scores; ``keep`` is ``[BLOCK_N]``, or None if all
    tokens are there. Every row of ``weight_sum`` and ``total`` ``[16, BLOCK_M]`` is the sum.
    """
    SIMPLE: gl.constexpr = nothing_is_masked(mask, CAUSAL, SOFTCAP, WINDOW)
    scores = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, SCORES) - row_zero[None, :]
    for i in gl.static_range(num_terms(KEY)):
        scores = mma_v2(term_codes(k_words, i, 0, KEY), latent[i], scores)
    scores *= key_scale[:, None]
    if SIMPLE:
        if keep is not None:
            scores = gl.where(keep[:, None], scores, float("-inf"))
    else:
        query_token, seen, mask_row = places
        if keep is not None:
            seen = seen & keep[:, None]
        scores = masked_scores(
            scores + row_offset[None, :], mask, mask_row, mask_stride, position[:, None], seen,
            query_token, kv_len, q_len, scale, CAUSAL, SOFTCAP,
        )  # fmt: skip
        scores *= LOG2_E
    p, alpha, running_max = softmax_step(scores, running_max, SIMPLE)
    p = gl.convert_layout(p.to(gl.float16), WEIGHTS)
    weights = p * value_scale[:, None]
    ones = gl.full([16, BLOCK_N], 1.0, gl.float16, CODES)
    total = mma_v2(ones, p, total * alpha)
    weight_sum = mma_v2(ones, weights, weight_sum * alpha)
    new_acc = ()
    for i in gl.static_range(num_terms(VALUE)):
        new_acc += (mma_v2(term_codes(v_words, i, 1, VALUE), weights, acc[i] * alpha),)
    return new_acc, weight_sum, total, running_max


@gluon.jit
def attend_exact(
    query, new_key, new_value, key, value, positions, key_row, first_row, mask,
    partial, partial_max, partial_sum, head, num_kv_heads, q_len, new_len, scale, shares,
    query_strides, new_key_strides, new_value_strides, mask_strides,
    KEY: gl.constexpr, VALUE: gl.constexpr, QUERIES_PER_KV: gl.constexpr, CAUSAL: gl.constexpr,
    SOFTCAP: gl.constexpr, WINDOW: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    PADDED_D: gl.constexpr,
):  # fmt: skip
    """The exact tokens of a head, as ``triton_attend_token.attend_exact``."""
    SIMPLE: gl.constexpr = nothing_is_masked(mask, CAUSAL, SOFTCAP, WINDOW)
    batch = head // num_kv_heads
    kv_head = head % num_kv_heads
    dtype = query.dtype.element_ty
    row = gl.program_id(1) * BLOCK_M + gl.arange(0, BLOCK_M, WEIGHT_ROWS)
    query_token, query_head, keep_row, _ = places_of_rows(
        row, batch, kv_head, num_kv_heads, q_len, QUERIES_PER_KV
    )
    query_rows = query + batch * query_strides[0] + query_head * query_strides[1]
    query_rows += query_token * query_strides[2]
    inner = gl.arange(0, PADDED_D, WEIGHT_TOKENS)[:, None]
    keep = keep_row[None, :] & (inner < KEY.head_dim)
    q = gl.load(query_rows[None, :] + inner, mask=keep, other=0.0)  # [PADDED_D, BLOCK_M]

    length = gl.load(positions + 2 * key_row).to(gl.int32)
    watermark = gl.load(positions + 2 * key_row + 1).to(gl.int32)
    start = gl.load(key.start + batch)
    first = start + KEY.sink_length
    last = first + packed_tokens(watermark, start, KEY)
    num_sinks = gl.maximum(gl.minimum(first, length) - start, 0)
    tail = gl.minimum(last, length)
    kv_len = length + new_len
    num_exact = num_sinks + kv_len - tail
    new_key_head = batch * new_key_strides[0] + kv_head * new_key_strides[1]
    new_value_head = batch * new_value_strides[0] + kv_head * new_value_strides[1]

    places, oldest, kv_len = places_in_mask(
        positions, first_row, kv_len, batch, kv_head, num_kv_heads, q_len, mask_strides,
        QUERIES_PER_KV, WINDOW, BLOCK_M,
    )  # fmt: skip
    channel = gl.arange(0, PADDED_D, LOADED_CHANNELS)[None, :]
    acc = gl.zeros([PADDED_D, BLOCK_M], gl.float32, SCORES)
    total = gl.zeros([BLOCK_M], gl.float32, ROWS)
    running_max = gl.full([BLOCK_M], float("-inf"), gl.float32, ROWS)
    for first_index in range(0, num_exact, BLOCK_N):
        index = first_index + gl.arange(0, BLOCK_N, LOADED_TOKENS)
        position = gl.where(index < num_sinks, start + index, tail + index - num_sinks)[:, None]
        there = (index < num_exact)[:, None]
        rows = exact_rows(
            key, new_key, new_key_head, new_key_strides[2], head, position, start, length, KEY
        )
        k = gl.load(rows + channel, mask=there & (channel < KEY.head_dim), other=0.0).to(dtype)
        scores = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, SCORES)
        scores = mma_v2(gl.convert_layout(k, CODES), q, scores)
        nth = first_index + gl.arange(0, BLOCK_N, TOKENS)
        seen = (nth < num_exact)[:, None]
        if SIMPLE:
            scores = gl.where(seen, scores * (scale * LOG2_E), float("-inf"))
        else:
            place = gl.where(nth < num_sinks, start + nth, tail + nth - num_sinks)
            row_token, row_there, mask_row = places
            seen = row_there & seen & (place >= oldest)[:, None]
            scores = masked_scores(
                scores, mask, mask_row, mask_strides[3], place[:, None], seen,
                row_token, kv_len, q_len, scale, CAUSAL, SOFTCAP,
            )  # fmt: skip
            scores *= LOG2_E
        p, alpha, running_max = softmax_step(scores, running_max, SIMPLE)
        total = total * gl.max(alpha, 0) + gl.sum(p, 0)
        p = gl.convert_layout(p.to(dtype), WEIGHTS)
        rows = exact_rows(
            value, new_value, new_value_head, new_value_strides[2], head, position, start,
            length, VALUE,
        )  # fmt: skip
        v = gl.load(rows + channel, mask=there & (channel < VALUE.head_dim), other=0.0).to(dtype)
        v = gl.convert_layout(v.permute((1, 0)), CODES)
        acc = mma_v2(v, p, acc * alpha)

    row = gl.program_id(1) * BLOCK_M + gl.arange(0, BLOCK_M, ROWS)
    _, _, keep_out, out = places_of_rows(row, batch, kv_head, num_kv_heads, q_len, QUERIES_PER_KV)
    out = out * (shares + 1) + shares
    gl.store(partial_max + out, running_max, mask=keep_out)
    gl.store(partial_sum + out, total, mask=keep_out)
    inner = gl.arange(0, PADDED_D, TOKENS)[:, None]
    pointers = partial + out[None, :] * VALUE.head_dim + inner
    gl.store(pointers, acc, mask=keep_out[None, :] & (inner < VALUE.head_dim))


@gluon.jit
def attend_packed(
    query, key, value, positions, key_row, first_row, mask, latent_query, size, offset,
    partial, partial_max, partial_sum, head, share, shares, num_kv_heads, q_len, new_len, scale,
    query_strides, mask_strides,
    KEY: gl.constexpr, VALUE: gl.constexpr, QUERIES_PER_KV: gl.constexpr, CAUSAL: gl.constexpr,
    SOFTCAP: gl.constexpr, WINDOW: gl.constexpr, TILES: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """A share of the packed tokens of a head."""
    SIMPLE: gl.constexpr = nothing_is_masked(mask, CAUSAL, SOFTCAP, WINDOW)
    batch = head // num_kv_heads
    kv_head = head % num_kv_heads
    kv_len = gl.load(positions + 2 * key_row).to(gl.int32) + new_len
    watermark = gl.load(positions + 2 * key_row + 1).to(gl.int32)
    start = gl.load(key.start + batch)
    first = start + KEY.sink_length

    row = gl.program_id(1) * BLOCK_M + gl.arange(0, BLOCK_M, ROWS)
    _query_token, _query_head, keep_row, out = places_of_rows(
        row, batch, kv_head, num_kv_heads, q_len, QUERIES_PER_KV
    )
    out = out * (shares + 1) + share
    count = packed_tokens(watermark, start, KEY)
    places, oldest, kv_len = places_in_mask(
        positions, first_row, kv_len, batch, kv_head, num_kv_heads, q_len, mask_strides,
        QUERIES_PER_KV, WINDOW, BLOCK_M,
    )  # fmt: skip
    tiles = (count + BLOCK_N - 1) // BLOCK_N
    hidden = 0
    if WINDOW:
        hidden = gl.minimum(gl.maximum(oldest - first, 0) // BLOCK_N, tiles)
    tiles_per_share = gl.maximum((tiles - hidden + shares - 1) // shares, TILES)
    tile_begin = hidden + share * tiles_per_share
    tile_end = gl.minimum(tile_begin + tiles_per_share, tiles)
    whole_end = gl.minimum(tile_end, count // BLOCK_N)
    copied_end = gl.minimum(tile_end, key.capacity // BLOCK_N)  # an arena may end in a tile
    if tile_begin >= tile_end:
        gl.store(partial_max + out, gl.full([BLOCK_M], float("-inf"), gl.float32, ROWS), keep_row)
        gl.store(partial_sum + out, gl.zeros([BLOCK_M], gl.float32, ROWS), keep_row)
    else:
        key_memory = tile_memory(KEY, STAGES, BLOCK_N)
        value_memory = tile_memory(VALUE, STAGES, BLOCK_N)
        key_scales = gl.allocate_shared_memory(gl.float16, [STAGES, BLOCK_N], SCALES_IN_MEMORY)
        value_scales = gl.allocate_shared_memory(gl.float16, [STAGES, BLOCK_N], SCALES_IN_MEMORY)
        memory = (key_memory, value_memory, key_scales, value_scales)
        head_row = head * key.capacity
        for s in gl.static_range(STAGES - 1):
            tile = tile_begin + s
            if tile < copied_end:
                copy_tile(memory, s, key, value, head_row + tile * BLOCK_N, KEY, VALUE, BLOCK_N)
            async_copy.commit_group()

        row_factor = 1.0
        if SIMPLE:
            row_factor = scale * LOG2_E
        if key.basis is None:
            planes, largest, row_offset = rotated_rows(
                query, key, head, batch, kv_head, num_kv_heads, q_len, row_factor,
                query_strides, KEY, QUERIES_PER_KV, BLOCK_M,
            )  # fmt: skip
        else:
            if DEPENDENT:
                wait_for_previous_launch()
            planes, largest, row_offset = loaded_rows(
                latent_query, size, offset, head * q_len * QUERIES_PER_KV, q_len, row_factor,
                KEY, QUERIES_PER_KV, BLOCK_M,
            )  # fmt: skip
        # As far as fp16 has room for the rows; the rest is a power of two that all rows share.
        score_unit = gl.exp2(gl.ceil(gl.maximum(gl.log2(largest / 256), 0.0)))
        per_unit = 1.0 / score_unit
        score_unit *= SCORE_FACTOR
        latent, row_zero = latent_terms(planes, per_unit, KEY, BLOCK_M)

        acc = ()
        for _ in gl.static_range(num_terms(VALUE)):
            acc += (gl.zeros([16, BLOCK_M], gl.float32, SCORES),)
        weight_sum = gl.zeros([16, BLOCK_M], gl.float32, SCORES)
        total = gl.zeros([16, BLOCK_M], gl.float32, SCORES)
        running_max = gl.full([BLOCK_M], float("-inf"), gl.float32, ROWS)

        token = gl.arange(0, BLOCK_N, TOKENS)
        stage = 0
        for i in range(tile_begin, whole_end):
            async_copy.wait_group(STAGES - 2)
            k_words = key_words(key_memory, stage, KEY)
            v_words = value_words(value_memory, stage, VALUE)
            key_scale = key_scales.index(stage).load(TOKENS).to(gl.float32) * score_unit
            value_scale = value_scales.index(stage).load(WEIGHT_TOKENS)
            keep = None
            if WINDOW:
                keep = first + i * BLOCK_N + token >= oldest
            tile = i + STAGES - 1
            if tile < copied_end:
                free = stage - 1
                free = gl.where(free < 0, free + STAGES, free)
                copy_tile(memory, free, key, value, head_row + tile * BLOCK_N, KEY, VALUE, BLOCK_N)
            async_copy.commit_group()
            stage = gl.where(stage == STAGES - 1, 0, stage + 1)
            acc, weight_sum, total, running_max = attend_tile(
                latent, row_zero, row_offset, acc, weight_sum, total, running_max, k_words,
                v_words, key_scale, value_scale, keep, first + i * BLOCK_N + token, places,
                mask, mask_strides[3], kv_len, q_len, scale,
                KEY, VALUE, CAUSAL, SOFTCAP, WINDOW, BLOCK_M, BLOCK_N,
            )  # fmt: skip

        if whole_end < tile_end:
            left = count - whole_end * BLOCK_N
            tile_row = head_row + whole_end * BLOCK_N
            if copied_end <= whole_end:  # the arena ends inside the tile
                async_copy.wait_group(0)
                copy_tokens(key_memory, stage, key.qdata, tile_row, left - 1, KEY, BLOCK_N)
                copy_tokens(value_memory, stage, value.qdata, tile_row, left - 1, VALUE, BLOCK_N)
                async_copy.commit_group()
                nth = gl.arange(0, BLOCK_N, COPIED_SCALES)
                there = nth < left
                key_scales.index(stage).store(gl.load(key.scale + tile_row + nth, mask=there))
                value_scales.index(stage).store(gl.load(value.scale + tile_row + nth, mask=there))
            async_copy.wait_group(0)
            keep = token < left
            if WINDOW:
                keep = keep & (first + whole_end * BLOCK_N + token >= oldest)
            key_scale = key_scales.index(stage).load(TOKENS).to(gl.float32) * score_unit
            value_scale = value_scales.index(stage).load(WEIGHT_TOKENS)
            inner = gl.arange(0, BLOCK_N, WEIGHT_TOKENS)
            value_scale = gl.where(inner < left, value_scale, 0.0)
            acc, weight_sum, total, running_max = attend_tile(
                latent, row_zero, row_offset, acc, weight_sum, total, running_max,
                key_words(key_memory, stage, KEY), value_words(value_memory, stage, VALUE),
                key_scale, value_scale, keep, first + whole_end * BLOCK_N + token, places,
                mask, mask_strides[3], kv_len, q_len, scale,
                KEY, VALUE, CAUSAL, SOFTCAP, WINDOW, BLOCK_M, BLOCK_N,
            )  # fmt: skip

        gl.store(partial_sum + out, gl.max(total, 0), mask=keep_row)
        if SIMPLE:
            running_max += row_offset
        gl.store(partial_max + out, running_max, mask=keep_row)
        store_output(partial + out * VALUE.head_dim, acc, weight_sum, keep_row, VALUE)


@gluon.jit
def store_output(rows, acc, weight_sum, keep_row, VALUE: gl.constexpr):
    """The sums of codes as sums of values, to ``rows`` ``[BLOCK_M]``."""
    for j in gl.static_range(num_planes(VALUE)):
        x, channel = plane_output(acc, j, VALUE)
        x = (x - weight_sum * (largest_code(VALUE, j) / 2)) * step(VALUE, j)
        channel = channel[:, None]
        keep = keep_row[None, :] & (channel < VALUE.head_dim)
        gl.store(rows[None, :] + channel, x, mask=keep)


@gluon.jit(do_not_specialize=["key_row", "first_row"])
def swapped_attend_kernel(
    query, new_key, new_value, key, value, positions, key_row, first_row, mask,
    latent_query, size, offset, partial, partial_max, partial_sum,
    num_kv_heads, q_len, new_len, scale,
    query_strides, new_key_strides, new_value_strides, mask_strides,
    KEY: gl.constexpr, VALUE: gl.constexpr, QUERIES_PER_KV: gl.constexpr, CAUSAL: gl.constexpr,
    SOFTCAP: gl.constexpr, WINDOW: gl.constexpr, TILES: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, EXACT_BLOCK_N: gl.constexpr,
    PADDED_D: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """Grid ``(batch * num_kv_heads, blocks of query rows, 1 + shares)``; first the exact tokens.

    ``DEPENDENT``: it was launched while the launch before runs. That is ``prepare_kernel`` if keys
    have a matrix, and what made the query if not.
    """
    if DEPENDENT and key.basis is None:
        wait_for_previous_launch()
    head = gl.program_id(0).to(gl.int64)
    share = gl.program_id(2) - 1
    shares = gl.num_programs(2) - 1
    if share < 0:
        attend_exact(
            query, new_key, new_value, key, value, positions, key_row, first_row, mask,
            partial, partial_max, partial_sum, head, num_kv_heads, q_len, new_len, scale, shares,
            query_strides, new_key_strides, new_value_strides, mask_strides,
            KEY, VALUE, QUERIES_PER_KV, CAUSAL, SOFTCAP, WINDOW, BLOCK_M, EXACT_BLOCK_N, PADDED_D,
        )  # fmt: skip
    else:
        attend_packed(
            query, key, value, positions, key_row, first_row, mask, latent_query, size, offset,
            partial, partial_max, partial_sum, head, share, shares, num_kv_heads, q_len, new_len,
            scale, query_strides, mask_strides, KEY, VALUE, QUERIES_PER_KV, CAUSAL, SOFTCAP,
            WINDOW, TILES, BLOCK_M, BLOCK_N, STAGES, DEPENDENT,
        )  # fmt: skip
