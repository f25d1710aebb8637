"""Numbers to codes inside a kernel: the two roundings, and error feedback between plane groups.

``planes/channel`` (``codecs/kivi.py``; scale and zero point are rounded to fp16 *before* the codes
are computed, bit for bit as there):

    scale = (max - min) / (2**bits - 1)      zero_point = min
    code = round_half_even((x - zero_point) / scale)

over the valid numbers of a group. ``planes/token`` (``layouts/symmetric.py``):

    y = ((x - offset) / factor) @ basis
    size = max(sqrt(mean(y**2)), max(|y| * least_scale))
    code = clamp(round_half_even(y / (size * step) + zero), 0, 2**bits - 1)
    scale = size, mended by what the plane groups are worth, fp16, negative in odd slots

With ``feedback`` ``W``, plane group by plane group, ``later += (rounded - true) @ W[group, later]``
(``codecs/feedback.py``). Tokens are a tuple of plane groups, fp32 ``[T, 16]``: what a plane group
adds to a later one is a dot of its own, and the later one the dot's accumulator.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squat_fx.kernels.triton_hadamard import high_part, rotate
from squat_fx.kernels.triton_planes import (
    add_plane,
    largest_code,
    load_affine,
    no_words,
    num_planes,
    step,
    store_words,
)

ROUND_TO_INTEGER = tl.constexpr(
    12582912.0
)  # 1.5 * 2**23: the sum's low mantissa bits are the integer, half to even
SMALLEST_SCALE = tl.constexpr(1e-6)
SMALLEST_TOKEN_SCALE = tl.constexpr(2.0**-24)
LARGEST_HALF = tl.constexpr(65504.0)
BLOCK_K = tl.constexpr(32)  # channels that a step of a rotation takes
MOST_PLANES_AHEAD = tl.constexpr(8)


@triton.jit
def round_half_even(x):
    """Numbers from 0 to 255 to int32."""
    return (x + ROUND_TO_INTEGER).to(tl.int32, bitcast=True) & 0xFF


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


# feedback ----------------------------------------------------------------------------------------


@triton.jit
def load_feedback(feedback, plane: tl.constexpr, later: tl.constexpr, fmt: tl.constexpr):
    """What the errors of a plane group add to a later one, ``[16, 16]``."""
    row = 16 * plane + tl.arange(0, 16)[:, None]
    column = 16 * later + tl.arange(0, 16)[None, :]
    pointers = feedback + row * fmt.head_dim + column
    return tl.load(pointers, mask=column < fmt.head_dim, other=0.0)


@triton.jit
def feed_back(planes, error, feedback, plane: tl.constexpr, fmt: tl.constexpr):
    """Add the ``error`` ``[T, 16]`` of a plane group to the plane groups after it."""
    fed = ()
    for j in tl.static_range(num_planes(fmt)):
        x = planes[j]
        if j > plane:
            x = dot_in_fp32(error, load_feedback(feedback, plane, j, fmt), x, False)
        fed += (x,)
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
    planes = ()
    for j in tl.static_range(num_planes(fmt)):
        channel = 16 * j + lane
        there = keep & (channel < fmt.head_dim)
        planes += (tl.load(rows + channel, mask=there, other=0.0).to(tl.float32),)
    words = no_words(slot, fmt)
    for j in tl.static_range(num_planes(fmt)):
        x = planes[j]
        inside = 16 * j + lane < fmt.head_dim
        low, high = range_of((x,), (usable & inside,), 0, 1, fmt)
        scale, zero_point = scale_and_zero_point(low, high, fmt)
        store_parameters(stored, head, slot, keep, scale, zero_point, lane, j, fmt)
        code = round_to_levels(x, scale, zero_point, fmt)
        words = add_plane(words, tl.where(inside, code, 0), j, fmt)
        if j + 1 < num_planes(fmt):
            rounded = code.to(tl.float32) * scale.to(tl.float32) + zero_point.to(tl.float32)
            planes = feed_back(planes, rounded - x, feedback, j, fmt)
    store_words(stored, head, slot, keep, lane, words, fmt)


# planes/token ------------------------------------------------------------------------------------


@triton.jit
def shifted_numbers(stored, head, rows, keep, channel, fmt: tl.constexpr):
    """Channels of the tokens at ``rows``, shifted and scaled in fp32, or as they are."""
    x = tl.load(rows + channel, mask=keep, other=0.0)
    if fmt.affine:
        offset, factor = load_affine(stored, head, channel, channel < fmt.head_dim, fmt)
        root = tl.rsqrt(
            factor
        )  # a quotient takes five times the instructions; factors are positive
        x = (x.to(tl.float32) - offset) * (root * root)
    return x


@triton.jit
def latent_planes(stored, head, kv_head, rows, keep, lane, fmt: tl.constexpr):
    """The tokens at ``rows`` ``[T, 1]`` in the latent frame."""
    if stored.basis is not None:
        planes = projected_planes(stored, head, kv_head, rows, keep, fmt)
    else:
        planes = ()
        for j in tl.static_range(num_planes(fmt)):
            channel = 16 * j + lane
            there = keep & (channel < fmt.head_dim)
            planes += (shifted_numbers(stored, head, rows, there, channel, fmt),)
        planes = rotate(planes, lane, fmt)
    return planes


@triton.jit
def projected_planes(stored, head, kv_head, rows, keep, fmt: tl.constexpr):
    """The same where the latent frame has a matrix."""
    short: tl.constexpr = not fmt.affine and rows.dtype.element_ty.primitive_bitwidth == 16
    one: tl.constexpr = rows.shape[0] == 1  # no tensor core has work for one token
    sums = ()
    for _ in tl.static_range(num_planes(fmt)):
        sums += (tl.zeros([BLOCK_K if one else rows.shape[0], 16], tl.float32),)
    for first in range(0, fmt.head_dim, BLOCK_K):
        inner = first + tl.arange(0, BLOCK_K)
        channel = inner[:, None] if one else inner[None, :]
        there = keep & (channel < fmt.head_dim)
        x = shifted_numbers(stored, head, rows, there, channel, fmt).to(tl.float32)
        pointers = stored.basis + kv_head * stored.basis_stride + inner[:, None] * fmt.head_dim
        added = ()
        for j in tl.static_range(num_planes(fmt)):
            out = 16 * j + tl.arange(0, 16)[None, :]
            inside = (inner < fmt.head_dim)[:, None] & (out < fmt.head_dim)
            matrix = tl.load(pointers + out, mask=inside, other=0.0)
            if one:
                added += (sums[j] + x * matrix,)
            else:
                added += (dot_in_fp32(x, matrix, sums[j], short),)
        sums = added
    if one:
        planes = ()
        for j in tl.static_range(num_planes(fmt)):
            planes += (tl.sum(sums[j], 0, keep_dims=True),)
    else:
        planes = sums
    return planes


@triton.jit
def split_half(x):
    """fp32 numbers as sums of two fp16 ones, which take half the tensor core's time of tf32."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def feedback_row(feedback, plane: tl.constexpr, fmt: tl.constexpr):
    """What the errors of a plane group add to each that comes after it."""
    matrices = ()
    for j in tl.static_range(plane + 1, num_planes(fmt)):
        matrices += (load_feedback(feedback, plane, j, fmt),)
    return matrices


@triton.jit
def feed_back_units(planes, error, matrices, plane: tl.constexpr, fmt: tl.constexpr):
    """``feed_back`` of errors in units of a token's scale.

    fp16 has room for both factors: an error is a few units, and a row of ``feedback`` is at most
    the root of the condition of the metric, ``1 + strength * head_dim``. Two parts of each keep 22
    bits, so that codes are those of fp32 but for ties.
    """
    error_high, error_low = split_half(error)
    fed = ()
    for j in tl.static_range(num_planes(fmt)):
        x = planes[j]
        if j > plane:
            high, low = split_half(matrices[j - plane - 1])
            x = tl.dot(error_low, high, x)
            x = tl.dot(error_high, low, x)
            x = tl.dot(error_high, high, x)
        fed += (x,)
    return fed


@triton.constexpr_function
def largest_scale(fmt):
    """The largest scale that a unit of a number asks for in any plane group."""
    return max(fmt.least_scales)


@triton.constexpr_function
def relative_scale(fmt, plane):
    """What a plane group asks for relative to that: one where all widths are equal."""
    return fmt.least_scales[plane] / max(max(fmt.least_scales), 1e-30)


@triton.constexpr_function
def worth(fmt, plane):
    """What the numbers of a plane group count in what a scale keeps."""
    return fmt.worths[plane]


@triton.constexpr_function
def count_alike(fmt):
    """Whether all plane groups count the same in it."""
    return len(set(fmt.worths)) == 1


@triton.jit
def pack_tokens(stored, head, slot, keep, planes, feedback, lane, fmt: tl.constexpr):
    """Quantize latent tokens into ``slot``."""
    squares = planes[0] * planes[0]
    weighed = squares * worth(fmt, 0) if largest_code(fmt, 0) > 0 else tl.zeros_like(squares)
    asked = tl.abs(planes[0]) * relative_scale(fmt, 0)
    for j in tl.static_range(1, num_planes(fmt)):
        squares += planes[j] * planes[j]
        if largest_code(fmt, j) > 0:
            weighed += planes[j] * planes[j] * worth(fmt, j)
        asked = tl.maximum(asked, tl.abs(planes[j]) * relative_scale(fmt, j))
    asked = tl.max(asked, 1, keep_dims=True) * largest_scale(fmt)
    total = tl.sum(squares, 1, keep_dims=True)
    size = tl.maximum(tl.sqrt(total / fmt.head_dim), asked)
    size = tl.minimum(tl.maximum(size, SMALLEST_TOKEN_SCALE), LARGEST_HALF)
    if not count_alike(fmt):
        total = tl.sum(weighed, 1, keep_dims=True)
    per_unit = 1.0 / tl.where(slot % 2 == 0, size, -size)
    kept = tl.zeros_like(squares)
    words = no_words(slot, fmt)
    if feedback is None:
        for j in tl.static_range(num_planes(fmt)):
            if largest_code(fmt, j) > 0:
                level = planes[j] * (per_unit * (1.0 / step(fmt, j))) + largest_code(fmt, j) / 2
                words = add_levels(words, level, lane, j, fmt)
                kept = add_kept(kept, planes[j], level_in_units(level, j, fmt), lane, j, fmt)
    else:
        units = ()
        for j in tl.static_range(num_planes(fmt)):
            units += (planes[j] * per_unit,)
        # The matrices of a plane group are loaded while the one before it is rounded, where
        # registers have room for both.
        ahead: tl.constexpr = num_planes(fmt) <= MOST_PLANES_AHEAD
        if ahead:
            matrices = feedback_row(feedback, 0, fmt)
        for j in tl.static_range(num_planes(fmt)):
            if ahead:
                next_matrices = feedback_row(feedback, j + 1, fmt)
            error = -units[j]
            if largest_code(fmt, j) > 0:
                level = units[j] * (1.0 / step(fmt, j)) + largest_code(fmt, j) / 2
                words = add_levels(words, level, lane, j, fmt)
                rounded = level_in_units(level, j, fmt)
                kept = add_kept(kept, planes[j], rounded, lane, j, fmt)
                error += rounded
            if ahead:
                units = feed_back_units(units, error, matrices, j, fmt)
                matrices = next_matrices
            else:
                units = feed_back(units, error, feedback, j, fmt)
    kept = tl.sum(kept, 1, keep_dims=True)
    total = total * per_unit * per_unit
    if fmt.unbiased:
        scale = size * (total / tl.maximum(kept * per_unit, SMALLEST_TOKEN_SCALE))
    else:
        scale = size * tl.sqrt(total / tl.maximum(kept, SMALLEST_TOKEN_SCALE))
    scale = tl.minimum(tl.maximum(scale, SMALLEST_TOKEN_SCALE), LARGEST_HALF).to(tl.float16)
    scale = tl.where(slot % 2 == 0, scale, -scale)
    tl.store(stored.scale + head * stored.capacity + slot, scale, mask=keep)
    store_words(stored, head, slot, keep, lane, words, fmt)


@triton.jit
def level_in_units(level, plane: tl.constexpr, fmt: tl.constexpr):
    """What the code nearest to a level stands for, in units of a scale."""
    code = nearest_level(level, plane, fmt) - ROUND_TO_INTEGER
    return (code - largest_code(fmt, plane) / 2) * step(fmt, plane)


@triton.jit
def add_kept(kept, number, rounded, lane, plane: tl.constexpr, fmt: tl.constexpr):
    """Add what a plane group keeps of its length, or of its product with itself."""
    if 16 * plane + 16 > fmt.head_dim:
        rounded = tl.where(16 * plane + lane < fmt.head_dim, rounded, 0.0)
    return kept + rounded * (number if fmt.unbiased else rounded) * worth(fmt, plane)


@triton.jit
def nearest_level(level, plane: tl.constexpr, fmt: tl.constexpr):
    """The code of a level, plus ``ROUND_TO_INTEGER``."""
    return tl.minimum(tl.maximum(level, 0.0), largest_code(fmt, plane)) + ROUND_TO_INTEGER


@triton.jit
def add_levels(words, level, lane, plane: tl.constexpr, fmt: tl.constexpr):
    """``add_plane`` of the codes nearest to levels."""
    code = nearest_level(level, plane, fmt).to(tl.int32, bitcast=True)
    if 16 * plane + 16 > fmt.head_dim:
        code = tl.where(16 * plane + lane < fmt.head_dim, code, 0)
    return add_plane(words, code, plane, fmt)
