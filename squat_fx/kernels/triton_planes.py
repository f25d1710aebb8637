"""Stored tokens inside a kernel: where a token lies, and its channels 16 at a time.

Every kernel walks a head in *plane groups* of 16 channels (``codecs/planes.py``), so a tile of
``N`` tokens is a sequence of ``[N, 16]`` tensors and any head dim works. Position ``t`` is token
``i = t - start`` of its row and packed slot ``j = i - sink_length``; ``reference.py`` says which
tokens are packed and where the others lie.

| shape | what |
|---|---|
| ``[N, 1]`` | a number per token: position, slot, whether it is there |
| ``[1, 16]`` | ``lane``, a channel of a plane group |
| ``[N, 16]`` | one plane group of a tile: a word, a code, a number |

Arenas are contiguous; numbers are computed in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from squat_fx.codecs import Format
from squat_fx.codecs.planes import LANES


class Stored(NamedTuple):
    """The arenas of one role as a kernel takes them; ``capacity`` counts packed tokens."""

    qdata: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    dense: Tensor
    start: Tensor
    capacity: int


@dataclass(frozen=True)
class StoredFormat:
    """``Format`` as kernels take it, a compile-time constant.

    It carries the piece table, so that kernels are compiled anew when the table changes:
    ``pieces[plane]`` lists ``(word, shift in the word, mask, shift in the code)``; None says that
    qdata holds the numbers themselves. An odd last byte counts as a word.
    """

    head_dim: int
    num_planes: int
    pieces: tuple[tuple[tuple[int, int, int, int], ...], ...] | None
    bytes_per_lane: int
    levels: float
    token_group: int
    channel_group: int
    channel_groups: int
    sink_length: int
    ring_length: int
    residual_length: int

    @property
    def row_size(self) -> int:
        """Elements of one packed token in qdata."""
        return self.head_dim if self.pieces is None else LANES * self.bytes_per_lane

    @property
    def dense_length(self) -> int:
        """Slots of the dense buffer."""
        return self.sink_length + self.ring_length


@lru_cache(maxsize=256)
def stored_format(fmt: Format) -> StoredFormat:
    """The compile-time constant of ``fmt``."""
    num_planes = -(-fmt.head_dim // LANES)
    pieces, bytes_per_lane, levels = None, 0, 0.0
    if fmt.layout != "dense":
        pieces = tuple(
            tuple(
                (p.byte // 2, p.byte % 2 * 8 + p.bit_shift, 2**p.bits - 1, p.code_shift)
                for p in fmt.planes.pieces
                if p.group == plane
            )
            for plane in range(num_planes)
        )
        bytes_per_lane, levels = fmt.planes.bytes_per_lane, float(2 ** fmt.widths[0] - 1)
    return StoredFormat(
        head_dim=fmt.head_dim,
        num_planes=num_planes,
        pieces=pieces,
        bytes_per_lane=bytes_per_lane,
        levels=levels,
        token_group=fmt.token_group,
        channel_group=fmt.channel_group,
        channel_groups=fmt.channel_groups,
        sink_length=fmt.sink_length,
        ring_length=fmt.ring_length,
        residual_length=fmt.residual_length,
    )


# compile-time arithmetic (Triton 3.6 cannot index nested tuples inside a kernel) -----------------


@triton.constexpr_function
def num_planes(fmt):
    return fmt.num_planes


@triton.constexpr_function
def num_words(fmt):
    return -(-fmt.bytes_per_lane // 2)


@triton.constexpr_function
def num_pieces(fmt, plane):
    return len(fmt.pieces[plane])


@triton.constexpr_function
def piece(fmt, plane, index, field):
    return fmt.pieces[plane][index][field]


WORD = tl.constexpr(0)
SHIFT = tl.constexpr(1)
MASK = tl.constexpr(2)
CODE_SHIFT = tl.constexpr(3)


# where tokens lie --------------------------------------------------------------------------------


@triton.jit
def packed_tokens(watermark, start, fmt: tl.constexpr):
    """How many tokens of a row that starts at ``start`` are packed."""
    return tl.maximum(watermark - start - fmt.sink_length, 0) // fmt.token_group * fmt.token_group


@triton.jit
def dense_slot(token, fmt: tl.constexpr):
    """The dense slot of token ``i`` of a row, if it is not packed."""
    recent = fmt.sink_length + (token - fmt.sink_length) % fmt.ring_length
    return tl.where(token < fmt.sink_length, token, recent)


# packed tokens -----------------------------------------------------------------------------------


@triton.jit
def load_words(stored, head, slot, keep, lane, fmt: tl.constexpr):
    """The 16-bit words of the lanes of packed ``slot`` ``[N, 1]``: a tuple of int16 ``[N, 16]``."""
    words = ()
    if fmt.pieces is not None:
        rows = stored.qdata + head * stored.capacity * fmt.row_size + slot * fmt.row_size
        for w in tl.static_range(num_words(fmt)):
            if 2 * w + 1 < fmt.bytes_per_lane:
                word = tl.load(
                    rows.to(tl.pointer_type(tl.int16)) + (16 * w + lane), mask=keep, other=0
                )
            else:
                word = tl.load(rows + (32 * w + lane), mask=keep, other=0).to(tl.int16)
            words += (word,)
    return words


@triton.jit
def unpack_plane(words, plane: tl.constexpr, fmt: tl.constexpr):
    """The codes of one plane group, int16 ``[N, 16]``."""
    codes = tl.zeros_like(words[0])
    for i in tl.static_range(num_pieces(fmt, plane)):
        word = words[piece(fmt, plane, i, WORD)]
        bits = (word >> piece(fmt, plane, i, SHIFT)) & piece(fmt, plane, i, MASK)
        codes |= bits << piece(fmt, plane, i, CODE_SHIFT)
    return codes


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
    stored, words, head, slot, keep, group, keep_group, lane, plane: tl.constexpr, fmt: tl.constexpr
):
    """One plane group of packed tokens as numbers, fp32 ``[N, 16]``; finite where not ``keep``.

    ``group`` is the token group of each token, ``[N, 1]``, or one number if the tile lies in one.
    """
    if fmt.pieces is None:
        channel = plane * 16 + lane
        rows = stored.qdata + head * stored.capacity * fmt.row_size + slot * fmt.row_size
        x = tl.load(rows + channel, mask=keep & (channel < fmt.head_dim), other=0.0).to(tl.float32)
    else:
        offsets = parameter_offsets(stored, head, group, lane, plane, fmt)
        scale = tl.load(stored.scale + offsets, mask=keep_group, other=0.0).to(tl.float32)
        zero_point = tl.load(stored.zero_point + offsets, mask=keep_group, other=0.0).to(tl.float32)
        x = unpack_plane(words, plane, fmt).to(tl.float32) * scale + zero_point
    return x


@triton.jit
def store_words(stored, head, slot, keep, lane, codes, fmt: tl.constexpr):
    """Undo :func:`load_words` and :func:`unpack_plane`; ``codes`` are a tuple of int32."""
    rows = stored.qdata + head * stored.capacity * fmt.row_size + slot * fmt.row_size
    for w in tl.static_range(num_words(fmt)):
        word = tl.zeros_like(codes[0])
        for plane in tl.static_range(num_planes(fmt)):
            for i in tl.static_range(num_pieces(fmt, plane)):
                if piece(fmt, plane, i, WORD) == w:
                    bits = (codes[plane] >> piece(fmt, plane, i, CODE_SHIFT)) & piece(
                        fmt, plane, i, MASK
                    )
                    word |= bits << piece(fmt, plane, i, SHIFT)
        if 2 * w + 1 < fmt.bytes_per_lane:
            tl.store(
                rows.to(tl.pointer_type(tl.int16)) + (16 * w + lane), word.to(tl.int16), mask=keep
            )
        else:
            tl.store(rows + (32 * w + lane), word.to(tl.uint8), mask=keep)


# any stored or new token -------------------------------------------------------------------------


@triton.jit
def exact_rows(stored, new, new_head, new_stride, head, position, start, length, fmt: tl.constexpr):
    """Pointers ``[N, 1]`` to the tokens at ``position`` that are not packed.

    They are in the dense buffer, or in ``new`` from position ``length`` on; there a head begins
    ``new_head`` elements in and its tokens lie ``new_stride`` apart.
    """
    token = position - start
    rows = (
        stored.dense
        + head * fmt.dense_length * fmt.head_dim
        + dense_slot(token, fmt) * fmt.head_dim
    )
    if new is not None:
        column = (position - length).to(tl.int64)
        rows = tl.where(position < length, rows, new + new_head + column * new_stride)
    return rows


@triton.jit
def any_plane(
    stored, words, exact, head, slot, packed, keep, lane, plane: tl.constexpr, fmt: tl.constexpr
):
    """One plane group of tokens, at ``slot`` where ``packed``, else at ``exact``; fp32."""
    channel = plane * 16 + lane
    x = packed_plane(
        stored, words, head, slot, packed, slot // fmt.token_group, packed, lane, plane, fmt
    )
    unpacked = keep & (packed == 0) & (channel < fmt.head_dim)
    return tl.where(packed, x, tl.load(exact + channel, mask=unpacked, other=0.0).to(tl.float32))
