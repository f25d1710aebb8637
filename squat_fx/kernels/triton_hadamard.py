"""The fixed rotation of ``layouts/hadamard.py`` inside a kernel, without its matrix.

    R = diag(signs) @ blockdiag(H, H, ...) / sqrt(block)        H = H_planes (x) H_16

``H`` is a Kronecker product of 2 x 2 matrices, one for each bit of a channel's index: the low bits
count channels inside a plane group, the high ones plane groups. A stage of the high bits adds and
subtracts plane groups, which lie in registers of the same lane; the four of the low bits are a
shuffle each, or, where a tensor core has work, a dot with the 16 x 16 matrix, whose ones are exact.

Tokens are a tuple of plane groups ``[T, 16]``, or rows ``[T, D]`` with all stages inside them;
zero past ``head_dim``. Numbers come out in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squat_fx.kernels.triton_planes import num_planes

LEAST_DOT_ROWS = tl.constexpr(16)


@triton.constexpr_function
def block_size(fmt):
    """Channels of a Hadamard matrix: the largest power of two that divides ``head_dim``."""
    return fmt.head_dim & -fmt.head_dim


@triton.constexpr_function
def lane_stages(fmt):
    """Stages inside a plane group."""
    return min(block_size(fmt), 16).bit_length() - 1


@triton.constexpr_function
def plane_stages(fmt):
    """Stages between plane groups."""
    return max(block_size(fmt) // 16, 1).bit_length() - 1


@triton.constexpr_function
def all_stages(fmt):
    return block_size(fmt).bit_length() - 1


@triton.constexpr_function
def normalization(fmt):
    """What makes the rotation orthogonal."""
    return block_size(fmt) ** -0.5


@triton.constexpr_function
def plane_parity(plane):
    """How many adjacent ones the index of a plane group has, modulo two."""
    return bin(plane & (plane >> 1)).count("1") % 2


@triton.jit
def parity(x):
    """The number of ones among four bits, modulo two."""
    return (0x6996 >> x) & 1


@triton.jit
def channel_signs(lane, plane: tl.constexpr):
    """The signs of a plane group's channels, fp32, the shape of ``lane``.

    The index of channel ``lane`` is ``16 * plane + lane``: its adjacent ones lie in ``lane``, in
    ``plane``, or one in each.
    """
    odd = parity(lane & (lane >> 1)) ^ plane_parity(plane)
    if plane % 2 == 1:
        odd ^= lane >> 3
    return 1.0 - 2.0 * odd.to(tl.float32)


@triton.jit
def row_signs(channel):
    """The signs of channels below ``2**16``, fp32."""
    odd = channel & (channel >> 1)
    odd ^= odd >> 8
    odd ^= odd >> 4
    return 1.0 - 2.0 * parity(odd & 15).to(tl.float32)


@triton.jit
def hadamard_matrix(fmt: tl.constexpr):
    """What mixes the channels of a plane group: int32 ``[16, 16]``, ones, minus ones and zeros."""
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    inside: tl.constexpr = (1 << lane_stages(fmt)) - 1
    same_block = (row | inside) == (column | inside)
    return tl.where(same_block, 1 - 2 * parity(row & column & inside), 0)


@triton.jit
def mix_neighbours(x, stage: tl.constexpr):
    """Sum and difference of the channels whose indices differ in one bit."""
    pairs = tl.reshape(x, [x.shape[0], x.shape[1] >> (stage + 1), 2, 1 << stage])
    total = tl.sum(pairs, 2, keep_dims=True)
    twice = 2.0 * tl.arange(0, 2)[None, None, :, None].to(tl.float32)
    return tl.reshape(total - pairs * twice, x.shape)  # a + b - 2 * b is a - b


@triton.jit
def mix_planes(planes, stage: tl.constexpr, fmt: tl.constexpr):
    """The same of plane groups."""
    mixed = ()
    for j in tl.static_range(num_planes(fmt)):
        if (j >> stage) % 2 == 0:
            mixed += (planes[j] + planes[j + (1 << stage)],)
        else:
            mixed += (planes[j - (1 << stage)] - planes[j],)
    return mixed


@triton.jit
def high_part(x):
    """The part of an fp32 number that a tensor core takes as it is (tf32)."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def dot_short(a, b, acc):
    """``acc + a @ b`` for ``b`` of 11 bits at most; fp32 ``a`` in two parts, on tensor cores."""
    if a.dtype == tl.float32:
        high = high_part(a)
        acc = tl.dot(high, b, acc, input_precision="tf32")
        acc = tl.dot(a - high, b, acc, input_precision="tf32")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def hadamard(planes, fmt: tl.constexpr):
    """``planes @ blockdiag(H, ...)``, not normalized."""
    mixed = ()
    if planes[0].shape[0] >= LEAST_DOT_ROWS:
        matrix = hadamard_matrix(fmt).to(planes[0].dtype)
        for j in tl.static_range(num_planes(fmt)):
            nothing = tl.zeros([planes[0].shape[0], 16], tl.float32)
            mixed += (dot_short(planes[j], matrix, nothing),)
    else:
        for j in tl.static_range(num_planes(fmt)):
            x = planes[j].to(tl.float32)
            for stage in tl.static_range(lane_stages(fmt)):
                x = mix_neighbours(x, stage)
            mixed += (x,)
    for stage in tl.static_range(plane_stages(fmt)):
        mixed = mix_planes(mixed, stage, fmt)
    return mixed


@triton.jit
def rotate(planes, lane, fmt: tl.constexpr):
    """``planes @ R``, into the latent frame; plane groups of 16 bits stay exact."""
    signed = ()
    for j in tl.static_range(num_planes(fmt)):
        signed += (planes[j] * channel_signs(lane, j).to(planes[0].dtype),)
    mixed = hadamard(signed, fmt)
    rotated = ()
    for j in tl.static_range(num_planes(fmt)):
        rotated += (mixed[j] * normalization(fmt),)
    return rotated


@triton.jit
def rotate_back(planes, lane, fmt: tl.constexpr):
    """``planes @ R.T``, out of the latent frame."""
    mixed = hadamard(planes, fmt)
    rotated = ()
    for j in tl.static_range(num_planes(fmt)):
        rotated += (mixed[j] * (channel_signs(lane, j) * normalization(fmt)),)
    return rotated


@triton.jit
def rotate_rows(x, fmt: tl.constexpr):
    """``x @ R`` of fp32 rows ``[T, D]``."""
    x *= row_signs(tl.arange(0, x.shape[1]))[None, :] * normalization(fmt)
    for stage in tl.static_range(all_stages(fmt)):
        x = mix_neighbours(x, stage)
    return x


@triton.jit
def rotate_rows_back(x, fmt: tl.constexpr):
    """``x @ R.T`` of fp32 rows ``[T, D]``."""
    for stage in tl.static_range(all_stages(fmt)):
        x = mix_neighbours(x, stage)
    return x * (row_signs(tl.arange(0, x.shape[1]))[None, :] * normalization(fmt))
