"""Packed tokens of any layout as numbers, a plane group of 16 channels at a time.

A layout whose plane groups are numbers by themselves is decoded one plane group after the other, so
that a tile keeps few of them in registers; of another, :func:`load_packed` decodes all at once, by
a function in a file of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squat_fx.kernels.triton_dual import dual_planes
from squat_fx.kernels.triton_latent import latent_planes
from squat_fx.kernels.triton_levels import levels_planes
from squat_fx.kernels.triton_planes import load_words, unpack_plane
from squat_fx.kernels.triton_polar import polar_planes
from squat_fx.kernels.triton_polar_pairs import polar_pairs_planes
from squat_fx.kernels.triton_pruned import pruned_planes
from squat_fx.kernels.triton_signs import signs_planes


@triton.jit
def load_packed(stored, head, slot, position, keep, lane, fmt: tl.constexpr):
    """What :func:`packed_plane` finds the plane groups of packed ``slot`` ``[N, 1]`` in, which
    holds the token at ``position``: a tuple of words of codes, or of numbers, each ``[N, 16]``.
    """
    if fmt.layout == "planes/dual":
        loaded = dual_planes(stored, head, slot, keep, lane, fmt)
    elif fmt.layout == "planes/pruned":
        loaded = pruned_planes(stored, head, slot, keep, lane, fmt)
    elif fmt.layout == "levels/token":
        loaded = levels_planes(stored, head, slot, keep, lane, fmt)
    elif fmt.layout == "signs/token":
        loaded = signs_planes(stored, head, slot, keep, lane, fmt)
    elif fmt.layout == "latent/rope" or fmt.layout == "latent/sparse":
        loaded = latent_planes(stored, head, slot, position, keep, lane, fmt)
    elif fmt.layout == "polar/token":
        loaded = polar_planes(stored, head, slot, keep, lane, fmt)
    elif fmt.layout == "polar/pairs":
        loaded = polar_pairs_planes(stored, head, slot, keep, lane, fmt)
    else:
        loaded = load_words(stored, head, slot, keep, lane, fmt)
    return loaded


@triton.jit
def parameter_offsets(stored, head, group, lane, plane: tl.constexpr, fmt: tl.constexpr):
    """Where the parameters of a plane group lie: ``[N, 16]``, of size 1 along what shares them."""
    groups = head * (stored.capacity // fmt.token_group) + group
    if fmt.channel_groups == 1:
        offsets = groups
    elif fmt.channel_group % 16 == 0:
        offsets = groups * fmt.channel_groups + plane * 16 // fmt.channel_group
    else:
        channel = tl.minimum(plane * 16 + lane, fmt.head_dim - 1)
        offsets = groups * fmt.channel_groups + channel // fmt.channel_group
    return offsets


@triton.jit
def packed_plane(
    stored, loaded, head, slot, keep, group, keep_group, lane, plane: tl.constexpr,
    fmt: tl.constexpr,
):  # fmt: skip
    """One plane group of packed tokens as numbers, fp32 ``[N, 16]``; finite where not ``keep``.

    ``group`` is the token group of each token, ``[N, 1]``, or one number if the tile lies in one.
    """
    if fmt.layout == "dense":
        channel = plane * 16 + lane
        rows = stored.qdata + head * stored.capacity * fmt.row_size + slot * fmt.row_size
        x = tl.load(rows + channel, mask=keep & (channel < fmt.head_dim), other=0.0).to(tl.float32)
    elif fmt.layout == "planes/channel":
        offsets = parameter_offsets(stored, head, group, lane, plane, fmt)
        scale = tl.load(stored.scale + offsets, mask=keep_group, other=0.0).to(tl.float32)
        zero_point = tl.load(stored.zero_point + offsets, mask=keep_group, other=0.0).to(tl.float32)
        x = unpack_plane(loaded, plane, fmt).to(tl.float32) * scale + zero_point
    else:
        x = loaded[plane]
    return x


@triton.jit
def any_plane(
    stored, loaded, exact, head, slot, packed, keep, lane, plane: tl.constexpr, fmt: tl.constexpr
):
    """One plane group of tokens, at ``slot`` where ``packed``, else at ``exact``; fp32."""
    channel = plane * 16 + lane
    x = packed_plane(
        stored, loaded, head, slot, packed, slot // fmt.token_group, packed, lane, plane, fmt
    )
    unpacked = keep & (packed == 0) & (channel < fmt.head_dim)
    return tl.where(packed, x, tl.load(exact + channel, mask=unpacked, other=0.0).to(tl.float32))
