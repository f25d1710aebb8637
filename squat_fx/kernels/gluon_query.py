"""The query as the narrow operand of tensor cores: latent rows, ``[channels, query rows]``.

Every program makes its own, by the butterflies of ``triton_hadamard.py``, unless keys have a
matrix: then ``prepare_kernel`` has left them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from squat_fx.kernels.gluon_tiles import (
    ROWS,
    WEIGHT_ROWS,
    WEIGHT_TOKENS,
    WEIGHTS,
    is_split,
    num_terms,
    split_lanes,
    term_exponent,
    term_middle,
    term_plane,
)
from squat_fx.kernels.triton_attend import places_of_rows
from squat_fx.kernels.triton_hadamard import (
    channel_signs,
    lane_stages,
    mix_planes,
    normalization,
    plane_stages,
)
from squat_fx.kernels.triton_planes import load_affine, num_planes, step


@gluon.constexpr_function
def query_factor(fmt, term):
    """What rows of unit size are multiplied with: small numbers stay normal halves."""
    return 2.0 ** (4 - term_exponent(fmt, term))


@gluon.constexpr_function
def middle_factor(fmt, term):
    """What the code of zero adds to a score for each unit of a row."""
    return term_middle(fmt, term) * 2.0 ** (term_exponent(fmt, term) - 24)


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
    """Latent queries times ``scale``, with the largest number and what rows add to scores."""
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
def latent_term(planes, per_unit, term: gl.constexpr, KEY: gl.constexpr):
    """The fp16 operand of a term of keys, before its channels are put in order."""
    plane: gl.constexpr = term_plane(KEY, term)
    factor: gl.constexpr = step(KEY, plane) * query_factor(KEY, term)
    return (planes[plane] * (per_unit * factor)).to(gl.float16)


@gluon.jit
def latent_terms(planes, per_unit, KEY: gl.constexpr, BLOCK_M: gl.constexpr):
    """The operands of all terms of keys, times ``per_unit``, and what codes of zero give."""
    latent = ()
    zero = gl.zeros([16, BLOCK_M], gl.float32, WEIGHTS)
    for i in gl.static_range(num_terms(KEY)):
        rows = latent_term(planes, per_unit, i, KEY)
        zero += rows.to(gl.float32) * middle_factor(KEY, i)
        if is_split(KEY, i):
            rows = split_lanes(rows, WEIGHTS)
        latent += (rows,)
    return latent, gl.convert_layout(gl.sum(zero, 0), ROWS)
