"""Packed tokens of the layout ``planes/pruned`` as numbers.

    x[t, channels[i]] = code[t, i] * scale[i] + zero_point[i]        zero in all other channels

A plane group of kept channels reaches the channels that it is of through a dot with a matrix of
zeros and ones, ``[16 kept, 16 channels]``. Channels ascend, so that a plane group of the head gets
its channels from few plane groups of kept ones: kept channel ``i`` is channel ``i`` at least and
``i + head_dim - kept`` at most.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squat_fx.kernels.triton_hadamard import dot_short
from squat_fx.kernels.triton_planes import load_words, num_planes, unpack_plane


@triton.constexpr_function
def num_kept_planes(fmt):
    """Plane groups of kept channels."""
    return len(fmt.widths)


@triton.constexpr_function
def num_kept(fmt):
    """Kept channels."""
    return min(16 * len(fmt.widths), fmt.head_dim)


@triton.constexpr_function
def may_reach(fmt, kept_plane, plane):
    """Whether a plane group of kept channels may have channels of the head's group ``plane``."""
    dropped = fmt.head_dim - min(16 * len(fmt.widths), fmt.head_dim)
    return kept_plane <= plane and 16 * plane <= 16 * kept_plane + 15 + dropped


@triton.jit
def pruned_planes(stored, head, slot, keep, lane, fmt: tl.constexpr):
    """Packed tokens at ``slot`` ``[N, 1]`` in the model's frame: a tuple of fp32 ``[N, 16]``, one
    for each plane group of 16 channels; zero where not ``keep``.
    """
    words = load_words(stored, head, slot, keep, lane, fmt)
    group = head * (stored.capacity // fmt.token_group) + slot // fmt.token_group
    kept = ()
    channels = ()
    for i in tl.static_range(num_kept_planes(fmt)):
        offsets = group * num_kept(fmt) + (16 * i + lane)  # [N, 16]
        there = keep & (16 * i + lane < num_kept(fmt))
        scale = tl.load(stored.scale + offsets, mask=there, other=0.0).to(tl.float32)
        zero_point = tl.load(stored.zero_point + offsets, mask=there, other=0.0).to(tl.float32)
        kept += (unpack_plane(words, i, fmt).to(tl.float32) * scale + zero_point,)
        place = 16 * i + tl.arange(0, 16)[:, None]  # [16 kept, 1]
        pointers = stored.fixed + head * num_kept(fmt) + place
        channels += (tl.load(pointers, mask=place < num_kept(fmt), other=-1).to(tl.int32),)
    planes = ()
    for j in tl.static_range(num_planes(fmt)):
        x = tl.zeros([slot.shape[0], 16], tl.float32)
        for i in tl.static_range(num_kept_planes(fmt)):
            if may_reach(fmt, i, j):
                x = dot_short(kept[i], (channels[i] == 16 * j + lane).to(tl.float32), x)
        planes += (x,)
    return planes
