"""Packed tokens of the layout ``planes/dual`` as numbers.

    keys:    x = (factor[t] * (code * scale[c] + zero_point[c])) @ R.T
    values:  x = (factor[c] * (code * scale[t] + zero_point[t])) @ R.T

``c`` counts channels of a tile of ``token_group`` tokens, ``t`` tokens; ``R`` is the fixed rotation
of ``triton_hadamard.py``. ``factor`` is the third parameter of a layout, ``stored.extra``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squat_fx.kernels.triton_hadamard import rotate_back
from squat_fx.kernels.triton_planes import load_words, num_planes, unpack_plane


@triton.jit
def dual_planes(stored, head, slot, keep, lane, fmt: tl.constexpr):
    """Packed tokens at ``slot`` ``[N, 1]`` in the model's frame: a tuple of fp32 ``[N, 16]``, one
    for each plane group of 16 channels; zero where not ``keep``.
    """
    words = load_words(stored, head, slot, keep, lane, fmt)
    token = head * stored.capacity + slot  # [N, 1]
    tile = head * (stored.capacity // fmt.token_group) + slot // fmt.token_group
    if fmt.channel_group == 1:
        factor = tl.load(stored.extra + token, mask=keep, other=0.0).to(tl.float32)
    else:
        scale = tl.load(stored.scale + token, mask=keep, other=0.0).to(tl.float32)
        zero_point = tl.load(stored.zero_point + token, mask=keep, other=0.0).to(tl.float32)
    planes = ()
    for j in tl.static_range(num_planes(fmt)):
        channel = tile * fmt.head_dim + (16 * j + lane)  # [N, 16]
        there = keep & (16 * j + lane < fmt.head_dim)
        codes = unpack_plane(words, j, fmt).to(tl.float32)
        if fmt.channel_group == 1:
            scale = tl.load(stored.scale + channel, mask=there, other=0.0).to(tl.float32)
            zero_point = tl.load(stored.zero_point + channel, mask=there, other=0.0).to(tl.float32)
        else:
            factor = tl.load(stored.extra + channel, mask=there, other=0.0).to(tl.float32)
        planes += ((codes * scale + zero_point) * factor,)
    return rotate_back(planes, lane, fmt)
