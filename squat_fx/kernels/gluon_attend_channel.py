"""The packed tokens of ``triton_attend.py`` with tokens where tensor cores have 16 rows.

As ``gluon_attend_token.py``, for the layout ``planes/channel`` with a scale and a zero point for
each channel of a group of keys and for each group of channels of a value:

    score  = scale * ((query * key_scale) @ code.T + query @ key_zero)
    output = code.T @ (weight * value_scale) + sum of weight * value_zero

A tile lies in one group of keys, whose scales go into the query before the tile, so that codes are
multiplied as they are. Every tile is summed by itself and added in fp32: tensor cores cut sums off,
and codes, which run from zero, would add up to large ones.

It takes whole groups of keys whose values are packed too, of fp16 and bf16 models without mask,
causality and softcap; the other tokens are left to ``triton_attend.attend_kernel``. Keys and
values of a row start at the same token. Each share leaves what ``triton_attend.merge_kernel``
takes.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from squat_fx.kernels import gluon_tiles
from squat_fx.kernels.gluon_tiles import (
    CODES,
    ROWS,
    SCALES_IN_MEMORY,
    SCORES,
    WEIGHT_ROWS,
    WEIGHT_TOKENS,
    WEIGHTS,
    copy_scales,
    copy_to_shared,
    copy_tokens,
    is_split,
    key_words,
    num_terms,
    plane_output,
    split_lanes,
    term_codes,
    term_exponent,
    term_plane,
    tile_memory,
    value_words,
)
from squat_fx.kernels.triton_attend import places_of_rows, whole_groups
from squat_fx.kernels.triton_attend_token import LOG2_E
from squat_fx.kernels.triton_planes import (
    StoredFormat,
    num_planes,
    packed_tokens,
    wait_for_previous_launch,
)

PARAMETERS_IN_MEMORY = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
CODE_CHANNELS = gl.constexpr(gl.SliceLayout(0, CODES.value))
LN_2 = gl.constexpr(0.6931471805599453)
BLOCK_M = 8  # query rows
SHORTEST_TILE = 32


def takes(key: StoredFormat, value: StoredFormat) -> bool:
    """Whether rows can be copied, and groups are whole tiles and plane groups."""
    return (
        all(map(gluon_tiles.takes, (key, value)))
        and key.channel_group == value.token_group == 1
        and key.token_group % SHORTEST_TILE == 0
        and value.channel_group % 16 == 0
        and all(n & (n - 1) == 0 for n in (key.head_dim, value.channel_groups))
        and key.sink_length == value.sink_length
    )


@gluon.constexpr_function
def scale_factor(fmt, term):
    """What scales of keys are multiplied with: large ones stay halves, small ones normal."""
    return 2.0 ** (2 - term_exponent(fmt, term))


SCORE_FACTOR = gl.constexpr(2.0**22)  # takes the factors of codes and of scales back


@gluon.constexpr_function
def num_groups(fmt):
    """Scales of a value."""
    return fmt.channel_groups


@gluon.constexpr_function
def first_term(fmt, group):
    """The first term of a value's group of channels."""
    return sum(16 * term.plane < group * fmt.channel_group for term in fmt.terms)


@gluon.constexpr_function
def group_of(fmt, plane):
    """The group of channels that a plane group of a value belongs to."""
    return plane * 16 // fmt.channel_group


@gluon.jit
def copy_tile(
    memory, stage, key, value, head, slot, KEY: gl.constexpr, VALUE: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Begin to copy the tokens from ``slot`` on: words, scales and zero points."""
    key_memory, value_memory, key_scales, key_zeros, value_scales, value_zeros = memory
    row = head * key.capacity + slot
    copy_tokens(key_memory, stage, key.qdata, row, BLOCK_N - 1, KEY, BLOCK_N)
    group = head * (key.capacity // KEY.token_group) + slot // KEY.token_group
    copy_scales(key_scales, stage, key.scale, group * KEY.head_dim, KEY.head_dim)
    copy_scales(key_zeros, stage, key.zero_point, group * KEY.head_dim, KEY.head_dim)
    row = head * value.capacity + slot
    copy_tokens(value_memory, stage, value.qdata, row, BLOCK_N - 1, VALUE, BLOCK_N)
    copy_parameters(value_scales, stage, value.scale, row, VALUE, BLOCK_N)
    copy_parameters(value_zeros, stage, value.zero_point, row, VALUE, BLOCK_N)


@gluon.jit
def parameter_memory(fmt: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr):
    """Room for the scales or zero points of values."""
    if num_groups(fmt) == 1:
        memory = gl.allocate_shared_memory(gl.float16, [STAGES, BLOCK_N], SCALES_IN_MEMORY)
    else:
        shape: gl.constexpr = [STAGES, BLOCK_N, num_groups(fmt)]
        memory = gl.allocate_shared_memory(gl.float16, shape, PARAMETERS_IN_MEMORY)
    return memory


@gluon.jit
def copy_parameters(memory, stage, source, row, fmt: gl.constexpr, BLOCK_N: gl.constexpr):
    """Begin to copy the scales or zero points of values."""
    groups: gl.constexpr = num_groups(fmt)
    if groups == 1:
        copy_scales(memory, stage, source, row, BLOCK_N)
    else:
        layout: gl.constexpr = gl.BlockedLayout([1, groups], [32, 1], [1, 1], [1, 0])
        token = gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))[:, None]
        group = gl.arange(0, groups, gl.SliceLayout(0, layout))[None, :]
        copy_to_shared(memory.index(stage), source + row * groups + (token * groups + group))


@gluon.jit
def group_parameters(
    memory, stage, group: gl.constexpr, dim: gl.constexpr, layout: gl.constexpr, fmt: gl.constexpr
):
    """Scales or zero points of a group of channels: tokens along ``dim``, the other of size 1."""
    parameters = memory.index(stage)
    if num_groups(fmt) == 1:
        column = gl.expand_dims(parameters.load(gl.SliceLayout(1 - dim, layout)), 1 - dim)
    elif dim == 0:
        column = parameters.slice(group, 1, dim=1).load(layout)
    else:
        column = parameters.slice(group, 1, dim=1).permute((1, 0)).load(layout)
    return column


@gluon.jit
def unit_query(
    query, batch, kv_head, num_kv_heads, q_len, query_strides, fmt: gl.constexpr,
    QUERIES_PER_KV: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """The query's rows divided by a power of two each, fp16 ``[16, BLOCK_M]`` for each plane group,
    and that power.
    """
    row = gl.program_id(1) * BLOCK_M + gl.arange(0, BLOCK_M, WEIGHT_ROWS)
    query_token, query_head, keep_row, _ = places_of_rows(
        row, batch, kv_head, num_kv_heads, q_len, QUERIES_PER_KV
    )
    rows = query + batch * query_strides[0] + query_head * query_strides[1]
    rows += query_token * query_strides[2]
    lane = gl.arange(0, 16, WEIGHT_TOKENS)[:, None]
    planes = ()
    largest = gl.full([BLOCK_M], 1e-30, gl.float32, WEIGHT_ROWS)
    for j in gl.static_range(num_planes(fmt)):
        keep = keep_row[None, :] & (16 * j + lane < fmt.head_dim)
        plane = gl.load(rows[None, :] + (16 * j + lane), mask=keep, other=0.0).to(gl.float32)
        largest = gl.maximum(largest, gl.max(gl.abs(plane), 0))
        planes += (plane,)
    size = gl.exp2(gl.ceil(gl.log2(largest)))
    unit = ()
    for j in gl.static_range(num_planes(fmt)):
        unit += ((planes[j] / size[None, :]).to(gl.float16),)
    return unit, gl.convert_layout(size, ROWS)


@gluon.jit
def attend_tile(
    query, row_factor, acc, zeros, total, running_max, memory, stage, k_words, v_words,
    KEY: gl.constexpr, VALUE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Take a tile into the running softmax.

    Every row of ``total`` and of ``zeros``, for each group of channels, ``[16, BLOCK_M]``, is the
    sum of weights, as they are and times zero points.
    """
    _, _, key_scales, key_zeros, value_scales, value_zeros = memory
    offset = gl.zeros([16, BLOCK_M], gl.float32, SCORES)
    for j in gl.static_range(num_planes(KEY)):
        zero = key_zeros.index(stage).slice(16 * j, 16).load(CODE_CHANNELS)
        zero = gl.broadcast(zero[None, :], gl.zeros([16, 16], gl.float16, CODES))[0]
        offset = mma_v2(zero, query[j], offset)
    offset = gl.max(offset, 0) * (1.0 / SCORE_FACTOR)
    scores = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, SCORES) + offset[None, :]
    for i in gl.static_range(num_terms(KEY)):
        scale = key_scales.index(stage).slice(16 * term_plane(KEY, i), 16).load(WEIGHT_TOKENS)
        scale = scale * gl.full([16], scale_factor(KEY, i), gl.float16, WEIGHT_TOKENS)
        scaled = query[term_plane(KEY, i)] * scale[:, None]
        if is_split(KEY, i):
            scaled = split_lanes(scaled, WEIGHTS)
        scores = mma_v2(term_codes(k_words, i, 0, KEY), scaled, scores)
    scores *= row_factor[None, :]
    new_max = gl.maximum(running_max, gl.max(scores, 0))
    alpha = gl.exp2(running_max - new_max)[None, :]
    p = gl.exp2(scores - new_max[None, :]).to(gl.float16)
    p = gl.convert_layout(p, WEIGHTS)
    ones = gl.full([16, BLOCK_N], 1.0, gl.float16, CODES)
    nothing = gl.zeros([16, BLOCK_M], gl.float32, SCORES)
    total = total * alpha + mma_v2(ones, p, nothing)
    new_acc, new_zeros = (), ()
    for g in gl.static_range(num_groups(VALUE)):
        zero = group_parameters(value_zeros, stage, g, 1, CODES, VALUE)
        zero = gl.broadcast(zero, ones)[0]
        new_zeros += (zeros[g] * alpha + mma_v2(zero, p, nothing),)
        weights = p * group_parameters(value_scales, stage, g, 0, WEIGHTS, VALUE)
        for i in gl.static_range(first_term(VALUE, g), first_term(VALUE, g + 1)):
            tile = mma_v2(term_codes(v_words, i, 1, VALUE), weights, nothing)
            new_acc += (acc[i] * alpha + tile,)
    return new_acc, new_zeros, total, new_max


@gluon.jit(do_not_specialize=["key_row", "value_row"])
def swapped_attend_kernel(
    query, key, value, positions, key_row, value_row, partial, partial_max, partial_sum,
    num_kv_heads, q_len, scale, query_strides,
    KEY: gl.constexpr, VALUE: gl.constexpr, QUERIES_PER_KV: gl.constexpr,
    TILES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    DEPENDENT: gl.constexpr,
):  # fmt: skip
    """Grid ``(batch * num_kv_heads, blocks of query rows, shares)``; the launch before leaves one
    more share.
    """
    head = gl.program_id(0).to(gl.int64)
    share = gl.program_id(2)
    shares = gl.num_programs(2)
    batch = head // num_kv_heads
    kv_head = head % num_kv_heads
    start = gl.load(key.start + batch)
    key_count = packed_tokens(gl.load(positions + 2 * key_row + 1).to(gl.int32), start, KEY)
    value_count = packed_tokens(gl.load(positions + 2 * value_row + 1).to(gl.int32), start, VALUE)
    tiles = whole_groups(key_count, value_count, KEY) * (KEY.token_group // BLOCK_N)
    tiles_per_share = gl.maximum((tiles + shares - 1) // shares, TILES)
    tile_begin = share * tiles_per_share
    tile_end = gl.minimum(tile_begin + tiles_per_share, tiles)

    row = gl.program_id(1) * BLOCK_M + gl.arange(0, BLOCK_M, ROWS)
    _query_token, _query_head, keep_row, out = places_of_rows(
        row, batch, kv_head, num_kv_heads, q_len, QUERIES_PER_KV
    )
    out = out * (shares + 1) + share
    if tile_begin >= tile_end:
        gl.store(partial_max + out, gl.full([BLOCK_M], float("-inf"), gl.float32, ROWS), keep_row)
        gl.store(partial_sum + out, gl.zeros([BLOCK_M], gl.float32, ROWS), keep_row)
    else:
        memory = (
            tile_memory(KEY, STAGES, BLOCK_N),
            tile_memory(VALUE, STAGES, BLOCK_N),
            gl.allocate_shared_memory(gl.float16, [STAGES, KEY.head_dim], SCALES_IN_MEMORY),
            gl.allocate_shared_memory(gl.float16, [STAGES, KEY.head_dim], SCALES_IN_MEMORY),
            parameter_memory(VALUE, STAGES, BLOCK_N),
            parameter_memory(VALUE, STAGES, BLOCK_N),
        )
        for s in gl.static_range(STAGES - 1):
            tile = tile_begin + s
            if tile < tile_end:
                copy_tile(memory, s, key, value, head, tile * BLOCK_N, KEY, VALUE, BLOCK_N)
            async_copy.commit_group()

        rows, size = unit_query(
            query, batch, kv_head, num_kv_heads, q_len, query_strides, KEY, QUERIES_PER_KV, BLOCK_M
        )
        row_factor = size * (scale * LOG2_E * SCORE_FACTOR)
        acc = ()
        for _ in gl.static_range(num_terms(VALUE)):
            acc += (gl.zeros([16, BLOCK_M], gl.float32, SCORES),)
        zeros = ()
        for _ in gl.static_range(num_groups(VALUE)):
            zeros += (gl.zeros([16, BLOCK_M], gl.float32, SCORES),)
        total = gl.zeros([16, BLOCK_M], gl.float32, SCORES)
        running_max = gl.full([BLOCK_M], float("-inf"), gl.float32, ROWS)

        stage = 0
        for i in range(tile_begin, tile_end):
            async_copy.wait_group(STAGES - 2)
            k_words = key_words(memory[0], stage, KEY)
            v_words = value_words(memory[1], stage, VALUE)
            tile = i + STAGES - 1
            if tile < tile_end:
                free = stage - 1
                free = gl.where(free < 0, free + STAGES, free)
                copy_tile(memory, free, key, value, head, tile * BLOCK_N, KEY, VALUE, BLOCK_N)
            async_copy.commit_group()
            acc, zeros, total, running_max = attend_tile(
                rows, row_factor, acc, zeros, total, running_max, memory, stage, k_words, v_words,
                KEY, VALUE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            stage = gl.where(stage == STAGES - 1, 0, stage + 1)

        gl.store(partial_sum + out, gl.max(total, 0), mask=keep_row)
        gl.store(partial_max + out, running_max * LN_2, mask=keep_row)
        pointers = partial + out[None, :] * VALUE.head_dim
        for j in gl.static_range(num_planes(VALUE)):
            x, channel = plane_output(acc, j, VALUE)
            x += zeros[group_of(VALUE, j)]
            keep = keep_row[None, :] & (channel < VALUE.head_dim)[:, None]
            gl.store(pointers + channel[:, None], x, mask=keep)
    if DEPENDENT:
        wait_for_previous_launch()
