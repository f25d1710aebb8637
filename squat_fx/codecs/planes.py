"""Bit planes: where each channel's code lies inside a stored token.

A token's channels are split into *plane groups* of 16. Lane ``l`` of 16 holds channel ``l`` of
every plane group, so masking one plane out of a word yields 16 contiguous channels and no shuffle
is ever needed. A code of ``b`` bits is stored as pieces of 8, 4, 2 or 1 bits (3 = 2 + 1, low bits
first); pieces are laid into the lane from the widest to the narrowest, each class in channel order,
so that no piece straddles a byte and nothing is lost between them. The whole arithmetic is one
formula:

    bytes per lane = ceil(sum of the plane groups' widths / 8)
    bytes per token = 16 * bytes per lane

True code bits per element (what is stored, padding included; scales come on top):

| head_dim | plane groups | 1 bit | 2 bits | 3 bits | 4 bits | 8 bits |
|---------:|-------------:|------:|-------:|-------:|-------:|-------:|
|       16 |            1 |  8.00 |   8.00 |   8.00 |   8.00 |   8.00 |
|       64 |            4 |  2.00 |   2.00 |   4.00 |   4.00 |   8.00 |
|       80 |            5 |  1.60 |   3.20 |   3.20 |   4.80 |   8.00 |
|       96 |            6 |  1.33 |   2.67 |   4.00 |   4.00 |   8.00 |
|      112 |            7 |  1.14 |   2.29 |   3.43 |   4.57 |   8.00 |
|      128 |            8 |  1.00 |   2.00 |   3.00 |   4.00 |   8.00 |
|      192 |           12 |  1.33 |   2.00 |   3.33 |   4.00 |   8.00 |
|      256 |           16 |  1.00 |   2.00 |   3.00 |   4.00 |   8.00 |

Bytes ``2w`` and ``2w + 1`` of a lane form the little-endian 16-bit word ``w``; words are stored
word-major (``[word, lane]``), a last odd byte follows as 16 bytes. Kernels read 16-bit words, the
width of a tensor-core operand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

LANES = 16
PIECE_WIDTHS = (8, 4, 2, 1)


@dataclass(frozen=True)
class Piece:
    """``bits`` bits of plane group ``group``: code bits from ``code_shift`` up, at ``bit_shift`` of
    lane byte ``byte``.
    """

    group: int
    bits: int
    code_shift: int
    byte: int
    bit_shift: int


@dataclass(frozen=True)
class PlaneLayout:
    """Where the codes of one token lie; see the module's docstring for the formula."""

    head_dim: int
    widths: tuple[int, ...]
    pieces: tuple[Piece, ...]
    bytes_per_lane: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored token."""
        return LANES * self.bytes_per_lane

    @property
    def bits_per_element(self) -> float:
        """Stored code bits per channel of the head, padding included, scales not."""
        return 8 * self.row_bytes / self.head_dim


def uniform_widths(head_dim: int, bits: int) -> tuple[int, ...]:
    """The same width for every plane group of ``head_dim`` channels."""
    return (bits,) * -(-head_dim // LANES)


@lru_cache(maxsize=256)
def plane_layout(head_dim: int, widths: tuple[int, ...]) -> PlaneLayout:
    """Map ``(head_dim, widths)`` to pieces, lanes, padding and true bits per element.

    Args:
        head_dim: channels of one head; padded with zero codes to a multiple of 16.
        widths: bits of each plane group of 16 channels, each from 1 to 8.

    Raises:
        ValueError: a width is outside 1..8, or there is not one width per plane group.
    """
    groups = -(-head_dim // LANES)
    if len(widths) != groups:
        raise ValueError(
            f"head_dim {head_dim} has {groups} plane groups of {LANES} channels, "
            f"got {len(widths)} widths"
        )
    if bad := [w for w in widths if not 1 <= w <= 8]:
        raise ValueError(f"a plane width must be from 1 to 8 bits, got {bad[0]}")
    pieces, position = [], 0
    for bits in PIECE_WIDTHS:
        for group, width in enumerate(widths):
            if width & bits:
                # Wider pieces hold the low bits of a code, so that 3 bits are 2 low bits and 1 high
                # bit.
                code_shift = sum(p for p in PIECE_WIDTHS if p > bits and width & p)
                pieces.append(Piece(group, bits, code_shift, position // 8, position % 8))
                position += bits
    return PlaneLayout(head_dim, widths, tuple(pieces), -(-position // 8))


def pack(codes: Tensor, widths: Sequence[int]) -> Tensor:
    """Pack integer codes ``[..., head_dim]`` into bytes ``[..., row_bytes]`` (uint8)."""
    layout = plane_layout(codes.shape[-1], tuple(widths))
    padding = LANES * len(layout.widths) - layout.head_dim
    planes = torch.nn.functional.pad(codes.to(torch.uint8), (0, padding)).unflatten(-1, (-1, LANES))
    lane_bytes = planes.new_zeros(*codes.shape[:-1], layout.bytes_per_lane, LANES)
    for piece in layout.pieces:
        bits = (planes[..., piece.group, :] >> piece.code_shift) & (2**piece.bits - 1)
        lane_bytes[..., piece.byte, :] |= bits << piece.bit_shift
    return _words_from_bytes(lane_bytes)


def unpack(
    qdata: Tensor, head_dim: int, widths: Sequence[int], out: Tensor | None = None
) -> Tensor:
    """Undo :func:`pack`: bytes ``[..., row_bytes]`` to codes ``[..., head_dim]``.

    The codes are uint8, or of ``out``'s dtype where that is given to be written.
    """
    layout = plane_layout(head_dim, tuple(widths))
    if out is None:
        out = qdata.new_empty((*qdata.shape[:-1], head_dim))
    written: set[int] = set()
    for piece in layout.pieces:
        bits = _lane_byte(qdata, piece.byte, layout.bytes_per_lane)
        if piece.bit_shift:
            bits = bits >> piece.bit_shift
        bits = bits & (2**piece.bits - 1)
        first = piece.group * LANES
        channels = out[..., first : first + LANES]
        bits = bits[..., : channels.shape[-1]]
        if piece.group in written:
            channels += bits << piece.code_shift
        else:
            channels.copy_(bits)  # the widest piece comes first and holds the low bits
        written.add(piece.group)
    return out


def _words_from_bytes(lane_bytes: Tensor) -> Tensor:
    """``[..., byte, lane]`` to stored order: 16-bit words ``[word, lane, low/high]``, then a last
    odd byte.
    """
    even = lane_bytes.shape[-2] // 2 * 2
    words = lane_bytes[..., :even, :].unflatten(-2, (-1, 2)).transpose(-1, -2).flatten(-3)
    return (
        torch.cat([words, lane_bytes[..., even:, :].flatten(-2)], -1)
        if even
        else lane_bytes.flatten(-2)
    )


def _lane_byte(qdata: Tensor, byte: int, bytes_per_lane: int) -> Tensor:
    """Byte ``byte`` of every lane, ``[..., 16]``, as a view: every other byte of its words."""
    first = byte // 2 * 2 * LANES
    if byte == bytes_per_lane - 1 and bytes_per_lane % 2:
        return qdata[..., first:]
    return qdata[..., first + byte % 2 : first + 2 * LANES : 2]
