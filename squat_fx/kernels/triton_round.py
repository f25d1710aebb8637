"""Numbers to codes inside a kernel: the two roundings, and error feedback between plane groups.

``planes/channel`` (``codecs/kivi.py``; scale and zero point are rounded to fp16 *before* the codes
are computed, bit for bit as there):

    scale = (max - min) / (2**bits - 1)      zero_point = min
    code = round_half_even((x - zero_point) / scale)

over the valid numbers of a group. ``planes/token`` (``codecs/symmetric.py``):

    y = ((x - offset) / factor) @ basis
    scale = max(sqrt(mean(y**2)), max(|y| * least_scale(bits))), fp16, negative in odd slots
    code = clamp(round_half_even(y / (scale * step) + zero), 0, 2**bits - 1)

With ``feedback`` ``W``, plane group by plane group, ``later += (rounded - true) @ W[group, later]``
(``codecs/feedback.py``). Tokens that take part in dots are a tuple of *tiles*, fp32 ``[T, width]``,
64 channels each, the accumulators of the dots; with 64 tokens and more, warps divide tokens only,
and a plane group is cut out of a tile without moving data.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squat_fx.kernels.triton_planes import (
    add_plane,
    largest_code,
    load_affine,
    no_words,
    num_planes,
    num_tiles,
    scale_asked,
    step,
    store_words,
    tile_width,
)

ROUND_TO_INTEGER = tl.constexpr(
    12582912.0
)  # 1.5 * 2**23: the sum's low mantissa bits are the integer, half to even
SMALLEST_SCALE = tl.constexpr(1e-6)
SMALLEST_TOKEN_SCALE = tl.constexpr(2.0**-24)
LARGEST_HALF = tl.constexpr(65504.0)
BLOCK_K = tl.constexpr(32)  # channels that a step of a rotation takes


@triton.jit
def round_half_even(x):
    """Numbers from 0 to 255 to int32."""
    return (x + ROUND_TO_INTEGER).to(tl.int32, bitcast=True) & 0xFF


@triton.jit
def high_part(x):
    """The part of an fp32 number that a tensor core takes as it is (tf32)."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def dot_in_fp32(a, b, acc, SHORT_A: tl.constexpr):
    """``acc + a @ b`` to fp32's precision on tensor cores; ``SHORT_A``: fp16 holds ``a``.

    As ``input_precision="tf32x3"``, whose second accumulator spills: 255 registers instead of 174
    to pack with feedback at head_dim 128 (sm_90, Triton 3.6).
    """
    a_high, b_high = high_part(a), high_part(b)
    if not SHORT_A:
        acc = tl.dot(a - a_high, b_high, acc, input_precision="tf32")
    acc = tl.dot(a_high, b - b_high, acc, input_precision="tf32")
    return tl.dot(a_high, b_high, acc, input_precision="tf32")


# tiles -------------------------------------------------------------------------------------------


@triton.jit
def tile_channels(tile: tl.constexpr, fmt: tl.constexpr):
    """The channels of a tile, ``[1, width]``."""
    return tile * tile_width(fmt) + tl.arange(0, tile_width(fmt))[None, :]


@triton.jit
def plane_of(tiles, plane: tl.constexpr, fmt: tl.constexpr):
    """One plane group of tiles, fp32 ``[T, 16]``.

    Whole numbers are added, so that the compiler sees that nothing but one of them counts.
    """
    planes: tl.constexpr = tile_width(fmt) // 16
    tile = tiles[plane // planes]
    bits = tl.reshape(tile.to(tl.int32, bitcast=True), [tile.shape[0], planes, 16])
    index = tl.arange(0, planes)[None, :, None]
    return tl.sum(tl.where(index == plane % planes, bits, 0), 1).to(tl.float32, bitcast=True)


@triton.jit
def feed_back(tiles, error, feedback, plane: tl.constexpr, fmt: tl.constexpr):
    """Add the ``error`` ``[T, 16]`` of a plane group to the channels after it.

    ``feedback`` is zero for the others.
    """
    row = 16 * plane + tl.arange(0, 16)[:, None]
    fed = ()
    for t in tl.static_range(num_tiles(fmt)):
        tile = tiles[t]
        if (t + 1) * tile_width(fmt) > 16 * (plane + 1):
            column = tile_channels(t, fmt)
            pointers = feedback + row * fmt.head_dim + column
            matrix = tl.load(pointers, mask=column < fmt.head_dim, other=0.0)
            tile = dot_in_fp32(error, matrix, tile, False)
        fed += (tile,)
    return fed


# planes/channel ----------------------------------------------------------------------------------


@triton.constexpr_function
def begins_group(fmt, plane):
    """Whether a plane group is the first of its channel group."""
    return fmt.channel_group == 1 or plane * 16 % fmt.channel_group == 0


@triton.constexpr_function
def group_end(fmt, plane):
    """One past the last plane group of the channel group that begins at ``plane``."""
    return min(plane + -(-fmt.channel_group // 16), fmt.num_planes)


@triton.jit
def range_of(planes, seen, first: tl.constexpr, last: tl.constexpr, fmt: tl.constexpr):
    """Smallest and largest seen number of each group; zeros if none is seen.

    The groups are those of plane groups ``first`` to ``last - 1``.
    """
    low = tl.where(seen[first], planes[first], float("inf"))
    high = tl.where(seen[first], planes[first], float("-inf"))
    for j in tl.static_range(first + 1, last):
        low = tl.minimum(low, tl.where(seen[j], planes[j], float("inf")))
        high = tl.maximum(high, tl.where(seen[j], planes[j], float("-inf")))
    if fmt.channel_group > 1:
        low = tl.min(low, 1, keep_dims=True)
        high = tl.max(high, 1, keep_dims=True)
    if fmt.token_group > 1:
        low = tl.min(low, 0, keep_dims=True)
        high = tl.max(high, 0, keep_dims=True)
    empty = low > high
    return tl.where(empty, 0.0, low), tl.where(empty, 0.0, high)


@triton.jit
def scale_and_zero_point(low, high, fmt: tl.constexpr):
    """fp16 scale and zero point of each group."""
    scale = tl.div_rn(high - low, tl.full(low.shape, fmt.levels, tl.float32))
    scale = tl.minimum(tl.maximum(scale, SMALLEST_SCALE), LARGEST_HALF)
    zero_point = tl.minimum(tl.maximum(low, -LARGEST_HALF), LARGEST_HALF)
    return scale.to(tl.float16), zero_point.to(tl.float16)


@triton.jit
def round_to_levels(x, scale, zero_point, fmt: tl.constexpr):
    """Codes, int32: round half to even, then clamp."""
    x = x - zero_point.to(tl.float32)
    scale, x = tl.broadcast(scale.to(tl.float32), x)
    return round_half_even(tl.minimum(tl.maximum(tl.div_rn(x, scale), 0.0), fmt.levels))


@triton.jit
def store_parameters(
    stored, head, slot, keep, scale, zero_point, lane, plane: tl.constexpr, fmt: tl.constexpr
):
    """Scale and zero point of the channel group that begins at ``plane``."""
    group = slot // fmt.token_group
    if fmt.token_group > 1:  # one group: its rows are the tile's
        group = tl.min(group, 0, keep_dims=True)
        keep = tl.max(keep.to(tl.int32), 0, keep_dims=True) > 0
    channel = 16 * plane // fmt.channel_group
    if fmt.channel_group == 1:
        channel += lane
        keep = keep & (channel < fmt.head_dim)
    groups = head * (stored.capacity // fmt.token_group) + group
    offsets = groups * fmt.channel_groups + channel
    tl.store(stored.scale + offsets, scale, mask=keep)
    tl.store(stored.zero_point + offsets, zero_point, mask=keep)


@triton.jit
def pack_groups(stored, head, slot, keep, usable, rows, lane, fmt: tl.constexpr):
    """Quantize the tokens at ``rows`` ``[T, 1]`` into ``slot``; ``usable`` ones make the range."""
    planes = ()
    seen = ()
    for j in tl.static_range(num_planes(fmt)):
        channel = 16 * j + lane
        there = channel < fmt.head_dim
        planes += (tl.load(rows + channel, mask=keep & there, other=0.0).to(tl.float32),)
        seen += (usable & there,)
    words = no_words(slot, fmt)
    for j in tl.static_range(num_planes(fmt)):
        if begins_group(fmt, j):
            low, high = range_of(planes, seen, j, group_end(fmt, j), fmt)
            scale, zero_point = scale_and_zero_point(low, high, fmt)
            store_parameters(stored, head, slot, keep, scale, zero_point, lane, j, fmt)
        code = round_to_levels(planes[j], scale, zero_point, fmt)
        code = tl.where(16 * j + lane < fmt.head_dim, code, 0)
        words = add_plane(words, code, j, fmt)
    store_words(stored, head, slot, keep, lane, words, fmt)


@triton.jit
def pack_groups_with_feedback(
    stored, head, slot, keep, usable, rows, feedback, lane, fmt: tl.constexpr
):
    """The same for one token group whose channels have their own scales, with feedback."""
    tiles = ()
    for t in tl.static_range(num_tiles(fmt)):
        channel = tile_channels(t, fmt)
        there = keep & (channel < fmt.head_dim)
        tiles += (tl.load(rows + channel, mask=there, other=0.0).to(tl.float32),)
    words = no_words(slot, fmt)
    for j in tl.static_range(num_planes(fmt)):
        x = plane_of(tiles, j, fmt)
        inside = 16 * j + lane < fmt.head_dim
        low, high = range_of((x,), (usable & inside,), 0, 1, fmt)
        scale, zero_point = scale_and_zero_point(low, high, fmt)
        store_parameters(stored, head, slot, keep, scale, zero_point, lane, j, fmt)
        code = round_to_levels(x, scale, zero_point, fmt)
        words = add_plane(words, tl.where(inside, code, 0), j, fmt)
        if j + 1 < num_planes(fmt):
            rounded = code.to(tl.float32) * scale.to(tl.float32) + zero_point.to(tl.float32)
            tiles = feed_back(tiles, rounded - x, feedback, j, fmt)
    store_words(stored, head, slot, keep, lane, words, fmt)


# planes/token ------------------------------------------------------------------------------------


@triton.jit
def shifted_numbers(stored, head, rows, keep, channel, fmt: tl.constexpr):
    """Channels of the tokens at ``rows``, shifted and scaled, in fp32."""
    x = tl.load(rows + channel, mask=keep, other=0.0).to(tl.float32)
    if fmt.affine:
        offset, factor = load_affine(stored, head, channel, channel < fmt.head_dim, fmt)
        x = tl.div_rn(x - offset, tl.broadcast_to(factor, x.shape))
    return x


@triton.jit
def basis_tile(stored, kv_head, channel, tile: tl.constexpr, fmt: tl.constexpr):
    """Rows ``channel`` ``[K, 1]`` of the matrix into the latent frame, ``[K, width]``."""
    out = tile_channels(tile, fmt)
    pointers = stored.basis + kv_head * stored.basis_stride + channel * fmt.head_dim + out
    return tl.load(pointers, mask=(channel < fmt.head_dim) & (out < fmt.head_dim), other=0.0)


@triton.jit
def latent_tiles(stored, head, kv_head, rows, keep, fmt: tl.constexpr):
    """The tokens at ``rows`` ``[T, 1]`` in the latent frame."""
    short: tl.constexpr = not fmt.affine and rows.dtype.element_ty.primitive_bitwidth == 16
    tiles = ()
    for _ in tl.static_range(num_tiles(fmt)):
        tiles += (tl.zeros([rows.shape[0], tile_width(fmt)], tl.float32),)
    for first in range(0, fmt.head_dim, BLOCK_K):
        channel = first + tl.arange(0, BLOCK_K)
        there = keep & (channel < fmt.head_dim)[None, :]
        x = shifted_numbers(stored, head, rows, there, channel[None, :], fmt)
        sums = ()
        for t in tl.static_range(num_tiles(fmt)):
            matrix = basis_tile(stored, kv_head, channel[:, None], t, fmt)
            sums += (dot_in_fp32(x, matrix, tiles[t], short),)
        tiles = sums
    return tiles


@triton.jit
def latent_row(stored, head, kv_head, row, keep, fmt: tl.constexpr):
    """The same for one token: no tensor core has work for it."""
    products = ()
    for _ in tl.static_range(num_tiles(fmt)):
        products += (tl.zeros([BLOCK_K, tile_width(fmt)], tl.float32),)
    for first in range(0, fmt.head_dim, BLOCK_K):
        channel = first + tl.arange(0, BLOCK_K)[:, None]
        there = keep & (channel < fmt.head_dim)
        x = shifted_numbers(stored, head, row, there, channel, fmt)
        sums = ()
        for t in tl.static_range(num_tiles(fmt)):
            sums += (products[t] + x * basis_tile(stored, kv_head, channel, t, fmt),)
        products = sums
    tiles = ()
    for t in tl.static_range(num_tiles(fmt)):
        tiles += (tl.sum(products[t], 0, keep_dims=True),)
    return tiles


@triton.jit
def pack_tokens(stored, head, slot, keep, tiles, feedback, lane, fmt: tl.constexpr):
    """Quantize latent tokens into ``slot``."""
    squares = tiles[0] * tiles[0]
    for t in tl.static_range(1, num_tiles(fmt)):
        squares += tiles[t] * tiles[t]
    scale = tl.sqrt_rn(tl.sum(squares, 1, keep_dims=True) / fmt.head_dim)
    asked = tl.zeros([slot.shape[0], 16], tl.float32)
    for j in tl.static_range(num_planes(fmt)):
        if scale_asked(fmt, j) > 0:
            asked = tl.maximum(asked, tl.abs(plane_of(tiles, j, fmt)) * scale_asked(fmt, j))
    scale = tl.maximum(scale, tl.max(asked, 1, keep_dims=True))
    scale = tl.minimum(tl.maximum(scale, SMALLEST_TOKEN_SCALE), LARGEST_HALF).to(tl.float16)
    scale = tl.where(slot % 2 == 0, scale, -scale)
    tl.store(stored.scale + head * stored.capacity + slot, scale, mask=keep)
    words = no_words(slot, fmt)
    for j in tl.static_range(num_planes(fmt)):
        x = plane_of(tiles, j, fmt)
        error = -x
        if largest_code(fmt, j) > 0:
            unit = scale.to(tl.float32) * step(fmt, j)
            level = x * (1.0 / unit) + largest_code(fmt, j) / 2
            code = round_half_even(tl.minimum(tl.maximum(level, 0.0), largest_code(fmt, j)))
            error += (code.to(tl.float32) - largest_code(fmt, j) / 2) * unit
            code = tl.where(16 * j + lane < fmt.head_dim, code, 0)
            words = add_plane(words, code, j, fmt)
        if feedback is not None and j + 1 < num_planes(fmt):
            tiles = feed_back(tiles, error, feedback, j, fmt)
    store_words(stored, head, slot, keep, lane, words, fmt)
