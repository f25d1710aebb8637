"""The packed tokens of ``triton_attend_token.py`` with tokens where tensor cores have 16 rows.

There, a tensor core's 16 rows are query rows, of which most decoding steps fill one to eight. Here
the operands change sides: keys and values, as they are stored, are the 16-row operand, and up to
eight query rows the other one. That halves the tensor core instructions, the numbers of a softmax
and the accumulators, for what is written in Gluon, Triton's language of explicit layouts: a
program is one warp, which copies its tiles asynchronously itself.

    scores [tokens, rows] = codes [tokens, 16] @ latent_query [16, rows], plane group by plane group
    output [16, rows]     = codes.T [16, tokens] @ weights [tokens, rows]

It takes fp16 and bf16 models without mask, causality and softcap, from formats of whole 16-bit
words; ``launch.py`` chooses. The exact tokens, in the query's dtype, are programs of the same
launch, and every share rotates its query itself, so that ``prepare_kernel`` is launched only for
keys whose latent frame has a matrix. Results are those of ``triton_attend_token.py``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from squat_fx.kernels.triton_attend import places_of_rows
from squat_fx.kernels.triton_attend_token import (
    LOG2_E,
    SCORE_FACTOR,
    code_factor,
    query_factor,
    zero_code,
)
from squat_fx.kernels.triton_hadamard import (
    channel_signs,
    lane_stages,
    mix_planes,
    normalization,
    plane_stages,
)
from squat_fx.kernels.triton_planes import (
    StoredFormat,
    exact_rows,
    half_codes,
    largest_code,
    load_affine,
    num_pieces,
    num_planes,
    num_words,
    packed_tokens,
    step,
    wait_for_previous_launch,
)

BLOCK_M = 8  # query rows
CAPACITY_MULTIPLE = 16  # so that scales are copied 16 bytes at a time
EXACT_BLOCK_N = 16

# Triton 3.9 has renamed it.
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


def takes(fmt: StoredFormat) -> bool:
    """Whether the tokens of ``fmt`` are rows of whole 16-bit words."""
    return fmt.whole_bytes > 0 and fmt.whole_bytes % 2 == 0 and not fmt.sections


# layouts -----------------------------------------------------------------------------------------

SCORES = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8]))
CODES = gl.constexpr(gl.DotOperandLayout(0, SCORES.value, 2))
WEIGHTS = gl.constexpr(gl.DotOperandLayout(1, SCORES.value, 2))
ROWS = gl.constexpr(gl.SliceLayout(0, SCORES.value))
TOKENS = gl.constexpr(gl.SliceLayout(1, SCORES.value))
WEIGHT_ROWS = gl.constexpr(gl.SliceLayout(0, WEIGHTS.value))
WEIGHT_TOKENS = gl.constexpr(gl.SliceLayout(1, WEIGHTS.value))
COPIED = gl.constexpr(gl.BlockedLayout([1, 8], [16, 2], [1, 1], [1, 0]))
COPIED_TOKENS = gl.constexpr(gl.SliceLayout(1, COPIED.value))
COPIED_LANES = gl.constexpr(gl.SliceLayout(0, COPIED.value))
COPIED_SCALES = gl.constexpr(gl.BlockedLayout([8], [32], [1], [0]))
LOADED = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [1, 1], [1, 0]))
LOADED_TOKENS = gl.constexpr(gl.SliceLayout(1, LOADED.value))
LOADED_CHANNELS = gl.constexpr(gl.SliceLayout(0, LOADED.value))
WORDS_IN_MEMORY = gl.constexpr(gl.SwizzledSharedLayout(8, 4, 2, [1, 0]))
SCALES_IN_MEMORY = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


# tiles -------------------------------------------------------------------------------------------


@gluon.jit
def word_memory(fmt: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr):
    """Room for the words of tiles."""
    memory = ()
    for _ in gl.static_range(num_words(fmt)):
        memory += (gl.allocate_shared_memory(gl.int16, [STAGES, BLOCK_N, 16], WORDS_IN_MEMORY),)
    return memory


@gluon.jit
def copy_words(memory, stage, qdata, first_row, last, fmt: gl.constexpr, BLOCK_N: gl.constexpr):
    """Begin to copy the words of the tokens ``first_row + [0, BLOCK_N)``, of which ``last`` is the
    last there is.
    """
    token = gl.minimum(gl.arange(0, BLOCK_N, COPIED_TOKENS), last)
    lane = gl.arange(0, 16, COPIED_LANES)
    rows = (qdata + first_row * fmt.row_size).to(gl.pointer_type(gl.int16))
    rows = rows + (token * (fmt.row_size // 2))[:, None]
    for w in gl.static_range(num_words(fmt)):
        copy_to_shared(memory[w].index(stage), rows + (16 * w + lane)[None, :])


@gluon.jit
def copy_scales(memory, stage, scale, first_row, BLOCK_N: gl.constexpr):
    """The same of scales; all tokens are there."""
    token = gl.arange(0, BLOCK_N, COPIED_SCALES)
    copy_to_shared(memory.index(stage), scale + first_row + token)


@gluon.jit
def copy_tile(
    memory, stage, key, value, first_row, KEY: gl.constexpr, VALUE: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Words and scales of keys and values; all tokens are there."""
    key_memory, value_memory, key_scales, value_scales = memory
    copy_words(key_memory, stage, key.qdata, first_row, BLOCK_N - 1, KEY, BLOCK_N)
    copy_words(value_memory, stage, value.qdata, first_row, BLOCK_N - 1, VALUE, BLOCK_N)
    copy_scales(key_scales, stage, key.scale, first_row, BLOCK_N)
    copy_scales(value_scales, stage, value.scale, first_row, BLOCK_N)


@gluon.jit
def key_words(memory, stage, fmt: gl.constexpr):
    """Keys as the 16-row operand."""
    words = ()
    for w in gl.static_range(num_words(fmt)):
        words += (memory[w].index(stage).load(CODES),)
    return words


@gluon.jit
def value_words(memory, stage, fmt: gl.constexpr):
    """Values as the 16-row operand, channels first."""
    words = ()
    for w in gl.static_range(num_words(fmt)):
        words += (memory[w].index(stage).permute((1, 0)).load(CODES),)
    return words


@gluon.jit
def attend_tile(
    latent, row_zero, acc, weight_sum, total, running_max, k_words, v_words, key_scale,
    value_scale, keep, KEY: gl.constexpr, VALUE: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Take a tile into the running softmax.

    ``key_scale`` is fp32 and has the factors of scores; ``keep`` is ``[BLOCK_N]``, or None if all
    tokens are there. Every row of ``weight_sum`` and ``total`` ``[16, BLOCK_M]`` is the sum.
    """
    scores = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, SCORES) - row_zero[None, :]
    for j in gl.static_range(num_planes(KEY)):
        if num_pieces(KEY, j) > 0:
            scores = mma_v2(half_codes(k_words, j, KEY, True), latent[j], scores)
    scores *= key_scale[:, None]
    if keep is not None:
        scores = gl.where(keep[:, None], scores, float("-inf"))
    new_max = gl.maximum(running_max, gl.max(scores, 0))
    alpha = gl.exp2(running_max - new_max)[None, :]
    p = gl.exp2(scores - new_max[None, :]).to(gl.float16)
    p = gl.convert_layout(p, WEIGHTS)
    weights = p * value_scale[:, None]
    ones = gl.full([16, BLOCK_N], 1.0, gl.float16, CODES)
    total = mma_v2(ones, p, total * alpha)
    weight_sum = mma_v2(ones, weights, weight_sum * alpha)
    new_acc = ()
    for j in gl.static_range(num_planes(VALUE)):
        if num_pieces(VALUE, j) > 0:
            new_acc += (mma_v2(half_codes(v_words, j, VALUE, True), weights, acc[j] * alpha),)
        else:
            new_acc += (acc[j],)
    return new_acc, weight_sum, total, new_max


@gluon.jit
def attend_exact(
    query, new_key, new_value, key, value, positions, key_row,
    partial, partial_max, partial_sum, head, num_kv_heads, q_len, new_len, scale, shares,
    query_strides, new_key_strides, new_value_strides,
    KEY: gl.constexpr, VALUE: gl.constexpr, QUERIES_PER_KV: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, PADDED_D: gl.constexpr,
):  # fmt: skip
    """The exact tokens of a head, as ``triton_attend_token.attend_exact``."""
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
    num_exact = num_sinks + length + new_len - tail
    new_key_head = batch * new_key_strides[0] + kv_head * new_key_strides[1]
    new_value_head = batch * new_value_strides[0] + kv_head * new_value_strides[1]

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
        scores = mma_v2(gl.convert_layout(k, CODES), q, scores) * (scale * LOG2_E)
        seen = first_index + gl.arange(0, BLOCK_N, TOKENS) < num_exact
        scores = gl.where(seen[:, None], scores, float("-inf"))
        new_max = gl.maximum(running_max, gl.max(scores, 0))
        alpha = gl.exp2(running_max - new_max)
        p = gl.exp2(scores - new_max[None, :])
        total = total * alpha + gl.sum(p, 0)
        p = gl.convert_layout(p.to(dtype), WEIGHTS)
        rows = exact_rows(
            value, new_value, new_value_head, new_value_strides[2], head, position, start,
            length, VALUE,
        )  # fmt: skip
        v = gl.load(rows + channel, mask=there & (channel < VALUE.head_dim), other=0.0).to(dtype)
        v = gl.convert_layout(v.permute((1, 0)), CODES)
        acc = mma_v2(v, p, acc * alpha[None, :])
        running_max = new_max

    row = gl.program_id(1) * BLOCK_M + gl.arange(0, BLOCK_M, ROWS)
    _, _, keep_out, out = places_of_rows(row, batch, kv_head, num_kv_heads, q_len, QUERIES_PER_KV)
    out = out * (shares + 1) + shares
    gl.store(partial_max + out, running_max, mask=keep_out)
    gl.store(partial_sum + out, total, mask=keep_out)
    inner = gl.arange(0, PADDED_D, TOKENS)[:, None]
    pointers = partial + out[None, :] * VALUE.head_dim + inner
    gl.store(pointers, acc, mask=keep_out[None, :] & (inner < VALUE.head_dim))


@gluon.jit
def mix_neighbours(x, stage: gl.constexpr):
    """Sum and difference of the channels of a plane group whose indices differ in one bit."""
    pairs = gl.reshape(x, [8 >> stage, 2, 1 << stage, x.shape[1]])
    total = gl.sum(pairs, 1, keep_dims=True) + gl.zeros_like(pairs)
    total = gl.convert_layout(gl.reshape(total, x.shape), WEIGHTS)
    twice = (gl.arange(0, 16, WEIGHT_TOKENS) >> stage & 1).to(gl.float32) * 2.0
    return total - x * twice[:, None]  # a + b - 2 * b is a - b


@gluon.jit
def rotate(planes, fmt: gl.constexpr):
    """``triton_hadamard.rotate`` of fp32 plane groups ``[16, BLOCK_M]``."""
    lane = gl.arange(0, 16, WEIGHT_TOKENS)
    mixed = ()
    for j in gl.static_range(num_planes(fmt)):
        x = planes[j] * (channel_signs(lane, j) * normalization(fmt))[:, None]
        for stage in gl.static_range(lane_stages(fmt)):
            x = mix_neighbours(x, stage)
        mixed += (x,)
    for stage in gl.static_range(plane_stages(fmt)):
        mixed = mix_planes(mixed, stage, fmt)
    return mixed


@gluon.jit
def rotated_rows(
    query, key, head, batch, kv_head, num_kv_heads, q_len, scale, query_strides,
    KEY: gl.constexpr, QUERIES_PER_KV: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """The same of the query itself, times ``scale``, with the largest number and the offsets."""
    row = gl.program_id(1) * BLOCK_M + gl.arange(0, BLOCK_M, WEIGHT_ROWS)
    lane = gl.arange(0, 16, WEIGHT_TOKENS)
    query_token, query_head, keep_row, _ = places_of_rows(
        row, batch, kv_head, num_kv_heads, q_len, QUERIES_PER_KV
    )
    rows = query + batch * query_strides[0] + query_head * query_strides[1]
    rows += query_token * query_strides[2]
    planes = ()
    largest = gl.zeros([16, BLOCK_M], gl.float32, WEIGHTS)
    offset = gl.zeros([16, BLOCK_M], gl.float32, WEIGHTS)
    for j in gl.static_range(num_planes(KEY)):
        channel = 16 * j + lane
        inside = channel < KEY.head_dim
        keep = inside[:, None] & keep_row[None, :]
        x = gl.load(rows[None, :] + channel[:, None], mask=keep, other=0.0).to(gl.float32) * scale
        if KEY.affine:
            shift, factor = load_affine(key, head, channel, inside, KEY)
            offset += x * shift[:, None]
            x *= factor[:, None]
        largest = gl.maximum(largest, gl.abs(x))
        planes += (x,)
    largest = gl.max(gl.max(largest, 0), 0)
    return rotate(planes, KEY), largest, gl.convert_layout(gl.sum(offset, 0), ROWS)


@gluon.jit
def loaded_rows(
    latent_query, size, offset, first, q_len, scale, fmt: gl.constexpr,
    QUERIES_PER_KV: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """What ``prepare_kernel`` left: latent queries times ``scale``, fp32 ``[16, BLOCK_M]`` for each
    plane group, the largest number of the queries, and what rows add to scores.
    """
    row = gl.program_id(1) * BLOCK_M + gl.arange(0, BLOCK_M, WEIGHT_ROWS)
    lane = gl.arange(0, 16, WEIGHT_TOKENS)
    keep = row // QUERIES_PER_KV < q_len
    row_size = gl.load(size + first + row, mask=keep, other=0.0) * scale
    pointers = latent_query + (first + row)[None, :] * (16 * num_planes(fmt)) + lane[:, None]
    planes = ()
    for j in gl.static_range(num_planes(fmt)):
        x = gl.load(pointers + 16 * j, mask=keep[None, :], other=0.0)
        planes += (x * row_size[None, :],)
    row_offset = gl.zeros([BLOCK_M], gl.float32, ROWS)
    if fmt.affine:
        shift = gl.load(offset + first + row, mask=keep, other=0.0) * scale
        row_offset = gl.convert_layout(shift, ROWS)
    return planes, gl.max(gl.abs(row_size), 0), row_offset


@gluon.jit
def attend_packed(
    query, key, value, positions, key_row, latent_query, size, offset,
    partial, partial_max, partial_sum, head, share, shares, num_kv_heads, q_len, scale,
    query_strides,
    KEY: gl.constexpr, VALUE: gl.constexpr, QUERIES_PER_KV: gl.constexpr, TILES: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    DEPENDENT: gl.constexpr,
):  # fmt: skip
    """A share of the packed tokens of a head."""
    batch = head // num_kv_heads
    kv_head = head % num_kv_heads
    watermark = gl.load(positions + 2 * key_row + 1).to(gl.int32)
    start = gl.load(key.start + batch)

    row = gl.program_id(1) * BLOCK_M + gl.arange(0, BLOCK_M, ROWS)
    _query_token, _query_head, keep_row, out = places_of_rows(
        row, batch, kv_head, num_kv_heads, q_len, QUERIES_PER_KV
    )
    out = out * (shares + 1) + share
    count = packed_tokens(watermark, start, KEY)
    tiles = (count + BLOCK_N - 1) // BLOCK_N
    tiles_per_share = gl.maximum((tiles + shares - 1) // shares, TILES)
    tile_begin = share * tiles_per_share
    tile_end = gl.minimum(tile_begin + tiles_per_share, tiles)
    whole_end = gl.minimum(tile_end, count // BLOCK_N)
    if tile_begin >= tile_end:
        gl.store(partial_max + out, gl.full([BLOCK_M], float("-inf"), gl.float32, ROWS), keep_row)
        gl.store(partial_sum + out, gl.zeros([BLOCK_M], gl.float32, ROWS), keep_row)
    else:
        key_memory = word_memory(KEY, STAGES, BLOCK_N)
        value_memory = word_memory(VALUE, STAGES, BLOCK_N)
        key_scales = gl.allocate_shared_memory(gl.float16, [STAGES, BLOCK_N], SCALES_IN_MEMORY)
        value_scales = gl.allocate_shared_memory(gl.float16, [STAGES, BLOCK_N], SCALES_IN_MEMORY)
        memory = (key_memory, value_memory, key_scales, value_scales)
        first_row = head * key.capacity
        for s in gl.static_range(STAGES - 1):
            tile = tile_begin + s
            if tile < whole_end:
                copy_tile(memory, s, key, value, first_row + tile * BLOCK_N, KEY, VALUE, BLOCK_N)
            async_copy.commit_group()

        if key.basis is None:
            planes, largest, row_offset = rotated_rows(
                query, key, head, batch, kv_head, num_kv_heads, q_len, scale * LOG2_E,
                query_strides, KEY, QUERIES_PER_KV, BLOCK_M,
            )  # fmt: skip
        else:
            if DEPENDENT:
                wait_for_previous_launch()
            planes, largest, row_offset = loaded_rows(
                latent_query, size, offset, head * q_len * QUERIES_PER_KV, q_len, scale * LOG2_E,
                KEY, QUERIES_PER_KV, BLOCK_M,
            )  # fmt: skip
        # As far as fp16 has room for the rows; the rest is a power of two that all rows share.
        score_unit = gl.exp2(gl.ceil(gl.maximum(gl.log2(largest / 256), 0.0)))
        per_unit = 1.0 / score_unit
        score_unit *= SCORE_FACTOR
        latent = ()
        zero = gl.zeros([BLOCK_M], gl.float32, WEIGHT_ROWS)
        for j in gl.static_range(num_planes(KEY)):
            plane = (planes[j] * (per_unit * step(KEY, j) * query_factor(KEY, j))).to(gl.float16)
            zero += gl.sum(plane.to(gl.float32), 0) * (zero_code(KEY, j) / 2**24)
            latent += (plane,)
        row_zero = gl.convert_layout(zero, ROWS)

        acc = ()
        for _ in gl.static_range(num_planes(VALUE)):
            acc += (gl.zeros([16, BLOCK_M], gl.float32, SCORES),)
        weight_sum = gl.zeros([16, BLOCK_M], gl.float32, SCORES)
        total = gl.zeros([16, BLOCK_M], gl.float32, SCORES)
        running_max = gl.full([BLOCK_M], float("-inf"), gl.float32, ROWS)

        stage = 0
        for i in range(tile_begin, whole_end):
            async_copy.wait_group(STAGES - 2)
            k_words = key_words(key_memory, stage, KEY)
            v_words = value_words(value_memory, stage, VALUE)
            key_scale = key_scales.index(stage).load(TOKENS).to(gl.float32) * score_unit
            value_scale = value_scales.index(stage).load(WEIGHT_TOKENS)
            tile = i + STAGES - 1
            if tile < whole_end:
                free = stage - 1
                free = gl.where(free < 0, free + STAGES, free)
                copy_tile(memory, free, key, value, first_row + tile * BLOCK_N, KEY, VALUE, BLOCK_N)
            async_copy.commit_group()
            stage = gl.where(stage == STAGES - 1, 0, stage + 1)
            acc, weight_sum, total, running_max = attend_tile(
                latent, row_zero, acc, weight_sum, total, running_max, k_words, v_words,
                key_scale, value_scale, None, KEY, VALUE, BLOCK_M, BLOCK_N,
            )  # fmt: skip

        if whole_end < tile_end:
            left = count - whole_end * BLOCK_N
            tile_row = first_row + whole_end * BLOCK_N
            async_copy.wait_group(0)
            copy_words(key_memory, 0, key.qdata, tile_row, left - 1, KEY, BLOCK_N)
            copy_words(value_memory, 0, value.qdata, tile_row, left - 1, VALUE, BLOCK_N)
            async_copy.commit_group()
            row_token = gl.arange(0, BLOCK_N, TOKENS)
            keep = row_token < left
            key_scale = gl.load(key.scale + tile_row + row_token, mask=keep, other=0.0)
            key_scale = key_scale.to(gl.float32) * score_unit
            token = gl.arange(0, BLOCK_N, WEIGHT_TOKENS)
            value_scale = gl.load(value.scale + tile_row + token, mask=token < left, other=0.0)
            async_copy.wait_group(0)
            acc, weight_sum, total, running_max = attend_tile(
                latent, row_zero, acc, weight_sum, total, running_max,
                key_words(key_memory, 0, KEY), value_words(value_memory, 0, VALUE),
                key_scale, value_scale, keep, KEY, VALUE, BLOCK_M, BLOCK_N,
            )  # fmt: skip

        gl.store(partial_sum + out, gl.max(total, 0), mask=keep_row)
        gl.store(partial_max + out, running_max + row_offset, mask=keep_row)
        lane = gl.arange(0, 16, TOKENS)
        pointers = partial + out[None, :] * VALUE.head_dim
        for j in gl.static_range(num_planes(VALUE)):
            x = acc[j] * (1.0 / code_factor(VALUE, j))
            x = (x - weight_sum * (largest_code(VALUE, j) / 2)) * step(VALUE, j)
            channel = (16 * j + lane)[:, None]
            gl.store(pointers + channel, x, mask=keep_row[None, :] & (channel < VALUE.head_dim))


@gluon.jit(do_not_specialize=["key_row"])
def swapped_attend_kernel(
    query, new_key, new_value, key, value, positions, key_row, latent_query, size, offset,
    partial, partial_max, partial_sum, num_kv_heads, q_len, new_len, scale,
    query_strides, new_key_strides, new_value_strides,
    KEY: gl.constexpr, VALUE: gl.constexpr, QUERIES_PER_KV: gl.constexpr, TILES: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    EXACT_BLOCK_N: gl.constexpr, PADDED_D: gl.constexpr, DEPENDENT: gl.constexpr,
    ORDER: gl.constexpr,
):  # fmt: skip
    """Grid ``(batch * num_kv_heads, blocks of query rows, 1 + shares)``; first the exact tokens.

    ``DEPENDENT``: it was launched while the launch before runs. That is ``prepare_kernel`` if keys
    have a matrix, and what made the query if not.
    """
    if DEPENDENT and key.basis is None:
        wait_for_previous_launch()
    if ORDER == 0:  # heads first
        head = gl.program_id(0).to(gl.int64)
        share = gl.program_id(2) - 1
        shares = gl.num_programs(2) - 1
    else:
        shares = gl.num_programs(0) - 1
        head = gl.program_id(2).to(gl.int64)
        share = gl.program_id(0) - 1
        if ORDER == 2:  # the exact tokens last
            share = gl.program_id(0)
            share = gl.where(share == shares, -1, share)
    if share < 0:
        attend_exact(
            query, new_key, new_value, key, value, positions, key_row,
            partial, partial_max, partial_sum, head, num_kv_heads, q_len, new_len, scale, shares,
            query_strides, new_key_strides, new_value_strides,
            KEY, VALUE, QUERIES_PER_KV, BLOCK_M, EXACT_BLOCK_N, PADDED_D,
        )  # fmt: skip
    else:
        attend_packed(
            query, key, value, positions, key_row, latent_query, size, offset,
            partial, partial_max, partial_sum, head, share, shares, num_kv_heads, q_len, scale,
            query_strides, KEY, VALUE, QUERIES_PER_KV, TILES, BLOCK_M, BLOCK_N, STAGES,
            DEPENDENT,
        )  # fmt: skip
