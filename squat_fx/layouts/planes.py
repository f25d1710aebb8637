"""Bit planes: where each channel's code lies inside a stored token.

A token's channels are split into *plane groups* of 16. Lane ``l`` of 16 holds channel ``l`` of
every plane group, so masking one plane out of a word yields 16 contiguous channels and no shuffle
is ever needed. Every plane group has its own width, from 1 to 8 bits; one formula says what a token
takes, and nothing is padded but a last plane group that is not full:

    bits per lane = sum of the plane groups' widths
    bytes per token = 2 * bits per lane

A code of ``b`` bits is stored as pieces of 8, 4, 2 or 1 bits (3 = 2 + 1, low bits first). Pieces
are laid into the lane from the widest to the narrowest, each class in channel order, so that no
piece straddles a byte. A stored token is, in this order:

1. the whole bytes of the lanes: bytes ``2w`` and ``2w + 1`` of a lane form the little-endian 16-bit
   word ``w``, words are word-major (``[word, lane]``), an odd last byte follows as 16 bytes;
2. what is left of the lanes, ``bits per lane % 8`` bits, as *sections* of 4, 2 and 1 bits where
   there are that many: a section of ``n`` bits takes ``2 * n`` bytes, lane ``l`` in byte
   ``l % (2 * n)`` from bit ``n * (l // (2 * n))`` up.

Kernels read 16-bit words, the width of a tensor-core operand; a token begins at an even byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

LANES = 16
PIECE_WIDTHS = (8, 4, 2, 1)
SECTION_WIDTHS = (4, 2, 1)


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

    @property
    def bits_per_lane(self) -> int:
        """Code bits of one lane."""
        return sum(self.widths)

    @property
    def whole_bytes(self) -> int:
        """Bytes of a lane that are full; what is left is in ``sections``."""
        return self.bits_per_lane // 8

    @property
    def sections(self) -> tuple[int, ...]:
        """Widths of the sections that hold the rest of every lane."""
        return tuple(bits for bits in SECTION_WIDTHS if self.bits_per_lane & bits)

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored token."""
        return LANES // 8 * self.bits_per_lane

    @property
    def bits_per_element(self) -> float:
        """Stored code bits per channel of the head, padding included, scales not."""
        return 8 * self.row_bytes / self.head_dim


def uniform_widths(head_dim: int, bits: int) -> tuple[int, ...]:
    """The same width for every plane group of ``head_dim`` channels."""
    return (bits,) * num_planes(head_dim)


def spread_widths(head_dim: int, bits: float) -> tuple[int, ...]:
    """Widths that average ``bits``, as even as can be, the wider ones last.

    Raises:
        ValueError: the plane groups cannot average ``bits``; the message names the nearest that
            they can.
    """
    planes = num_planes(head_dim)
    total = round(bits * planes)
    if abs(total - bits * planes) > 1e-6:
        below, above = math.floor(bits * planes) / planes, math.ceil(bits * planes) / planes
        raise ValueError(
            f"{planes} plane groups of head_dim {head_dim} cannot average {bits:g} bits; "
            f"the nearest are {below:.4g} and {above:.4g}"
        )
    wide = total % planes
    return (total // planes,) * (planes - wide) + (total // planes + 1,) * wide


def num_planes(head_dim: int) -> int:
    """Plane groups of ``head_dim`` channels."""
    return -(-head_dim // LANES)


@lru_cache(maxsize=256)
def plane_layout(head_dim: int, widths: tuple[int, ...]) -> PlaneLayout:
    """Map ``(head_dim, widths)`` to pieces, lanes, padding and true bits per element.

    Args:
        head_dim: channels of one head; padded with zero codes to a multiple of 16.
        widths: bits of each plane group of 16 channels, each from 0 to 8.

    Raises:
        ValueError: a width is outside 0..8, all are 0, or there is not one width per plane group.
    """
    planes = num_planes(head_dim)
    if len(widths) != planes:
        raise ValueError(
            f"head_dim {head_dim} has {planes} plane groups of {LANES} channels, "
            f"got {len(widths)} widths"
        )
    if bad := [w for w in widths if not 0 <= w <= 8]:
        raise ValueError(f"a plane width must be from 0 to 8 bits, got {bad[0]}")
    if not any(widths):
        raise ValueError(f"at least one plane width must be more than 0 bits, got {widths}")
    pieces, position = [], 0
    for bits in PIECE_WIDTHS:
        for group, width in enumerate(widths):
            if width & bits:
                # Wider pieces hold the low bits of a code, so that 3 bits are 2 low bits and 1 high
                # bit.
                code_shift = sum(p for p in PIECE_WIDTHS if p > bits and width & p)
                pieces.append(Piece(group, bits, code_shift, position // 8, position % 8))
                position += bits
    return PlaneLayout(head_dim, widths, tuple(pieces))


def pack(codes: Tensor, widths: Sequence[int]) -> Tensor:
    """Pack integer codes ``[..., head_dim]`` into bytes ``[..., row_bytes]`` (uint8)."""
    layout = plane_layout(codes.shape[-1], tuple(widths))
    padding = LANES * len(layout.widths) - layout.head_dim
    planes = torch.nn.functional.pad(codes.to(torch.uint8), (0, padding)).unflatten(-1, (-1, LANES))
    lane_bytes = planes.new_zeros(
        *codes.shape[:-1], layout.whole_bytes + bool(layout.sections), LANES
    )
    for piece in layout.pieces:
        bits = (planes[..., piece.group, :] >> piece.code_shift) & (2**piece.bits - 1)
        lane_bytes[..., piece.byte, :] |= bits << piece.bit_shift
    parts, shift = [_words_from_bytes(lane_bytes[..., : layout.whole_bytes, :])], 0
    for bits in layout.sections:
        rest = lane_bytes[..., layout.whole_bytes, :]
        lanes = ((rest >> shift) & (2**bits - 1)).unflatten(-1, (-1, 2 * bits))
        section = lanes[..., 0, :].clone()
        for i in range(1, 8 // bits):
            section |= lanes[..., i, :] << (bits * i)
        parts.append(section)
        shift += bits
    return torch.cat(parts, -1) if layout.sections else parts[0]


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
    rest: Tensor | None = None
    for piece in layout.pieces:
        if piece.byte < layout.whole_bytes:
            bits = _lane_byte(qdata, piece.byte, layout.whole_bytes)
        else:
            rest = _rest_of_lanes(qdata, layout) if rest is None else rest
            bits = rest
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
    for group, width in enumerate(layout.widths):
        if not width:
            out[..., group * LANES : (group + 1) * LANES] = 0
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


def _lane_byte(qdata: Tensor, byte: int, whole_bytes: int) -> Tensor:
    """Byte ``byte`` of every lane, ``[..., 16]``, as a view: every other byte of its words."""
    first = byte // 2 * 2 * LANES
    if byte == whole_bytes - 1 and whole_bytes % 2:
        return qdata[..., first : first + LANES]
    return qdata[..., first + byte % 2 : first + 2 * LANES : 2]


def _rest_of_lanes(qdata: Tensor, layout: PlaneLayout) -> Tensor:
    """The byte of every lane that is not full, ``[..., 16]``, from its sections."""
    first, shift = LANES * layout.whole_bytes, 0
    rest = qdata.new_zeros((*qdata.shape[:-1], LANES))
    for bits in layout.sections:
        section = qdata[..., first : first + 2 * bits]
        lanes = torch.cat([section >> (bits * i) for i in range(8 // bits)], -1)
        rest |= (lanes & (2**bits - 1)) << shift
        first, shift = first + 2 * bits, shift + bits
    return rest
