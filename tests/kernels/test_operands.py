"""Operands of tensor cores: the PTX of every dot, run on stored bits, gives part of the codes."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from squat_fx.kernels.operands import MOST_TERMS, Source, Term
from squat_fx.layouts.planes import LANES, pack
from tests.kernels.test_unpack import WIDTHS, format_of, run


def registers(row: bytes, source: Source, column: int) -> tuple[int, int]:
    """What ``column`` and the next one of a source hold, in a register; and how far it is moved."""
    words = [
        struct.unpack_from("<H", row, 2 * (source.offset + i))[0] for i in range(source.stored)
    ]
    pair = words[column % source.stored] | words[(column + 1) % source.stored] << 16
    return pair, column // source.stored * source.bits if source.split else 0


def unpacked(term: Term, row: bytes, sources: tuple[Source, ...]) -> list[float]:
    """The 16 operands of a token, by channel."""
    lanes = [0.0] * LANES
    for half in range(1 + term.split):
        for column in range(0, 8 if term.split else 16, 2):
            pairs = [registers(row, sources[i], column) for i in term.sources]
            found = run(term.ptx(half), [pair >> distance for pair, distance in pairs])
            for i, x in enumerate(struct.unpack("<2e", struct.pack("<I", found))):
                lane = 2 * (column + i) + half if term.split else column + i
                lanes[lane] = x * 2.0 ** (24 - term.exponent)
    return lanes


@given(widths=WIDTHS.filter(lambda widths: sum(widths) % 2 == 0), seed=st.integers(0, 2**16))
def test_the_terms_of_a_plane_group_add_up_to_its_codes(widths: tuple[int, ...], seed: int) -> None:
    """Of an odd number of bits a lane the last section has bytes of one bit: no kernel takes it."""
    fmt = format_of(widths)
    generator = torch.Generator().manual_seed(seed)
    most = torch.tensor(widths).repeat_interleave(LANES)
    codes = (torch.rand(len(most), generator=generator) * 2.0**most).to(torch.uint8)
    row = bytes(pack(codes[None], widths)[0].tolist())
    assert fmt.token_row.used <= fmt.token_row.width
    for plane, width in enumerate(widths):
        terms = [t for t in fmt.terms if t.plane == plane]
        assert all(len(t.sources) <= 3 for t in terms), "the kernel takes three"
        assert sum(t.middle for t in terms) == (2**width - 1) / 2
        parts = [unpacked(t, row, fmt.token_row.sources) for t in terms]
        found = torch.tensor(parts).sum(0) if terms else torch.zeros(LANES)
        assert found.tolist() == codes.view(-1, LANES)[plane].tolist()


def test_pieces_are_dots_of_their_own_while_there_is_room() -> None:
    assert [len(format_of((bits,) * 8).terms) for bits in (2, 3, 4, 5)] == [8, 16, 8, 16]
    assert len(format_of((3,) * 8).terms) == MOST_TERMS
    joined = format_of((3,) * 16).terms
    assert len(joined) == 16
    assert all(len(t.pieces) == 2 for t in joined)


@pytest.mark.parametrize(
    ("planes", "bits", "used", "width", "together"),
    [
        (8, 2, 16, 16, 8),  # a word a lane
        (8, 4, 32, 32, 8),
        (8, 3, 24, 32, 8),  # a word and a byte: 48 bytes
        (4, 2, 8, 8, 8),  # a byte
        (4, 3, 16, 16, 4),  # a byte and four bits: 24 bytes
        (5, 2, 16, 16, 2),  # a byte and two bits: 20 bytes
        (7, 2, 24, 32, 2),  # a byte, four bits and two: 28 bytes
        (12, 4, 48, 64, 8),  # three words
    ],
)
def test_rows_hold_what_is_stored(
    planes: int, bits: int, used: int, width: int, together: int
) -> None:
    row = format_of((bits,) * planes).token_row
    assert (row.used, row.width, row.together) == (used, width, together)
