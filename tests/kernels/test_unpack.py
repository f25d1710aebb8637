"""Unpacking codes as halves: the PTX, read instruction by instruction, against the stored bits."""

from __future__ import annotations

import re
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from squat_fx.codecs import Squat, codec_spec, make_format
from squat_fx.kernels.triton_planes import StoredFormat, stored_format
from squat_fx.layouts.planes import LANES, pack

WIDTHS = st.lists(st.integers(0, 8), min_size=1, max_size=8).filter(any).map(tuple)
OPERATIONS = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "shl": lambda a, b: a << b & 0xFFFFFFFF,
    "shr": lambda a, b: a >> b,
}


def run(asm: str, registers: list[int]) -> int:
    """What a block of PTX leaves in its first operand; the others are ``registers``."""
    values = {f"${i}": value for i, value in enumerate(registers, 1)}
    body = re.fullmatch(r"\{ \.reg \.b32 t; (.*) \}", asm)
    assert body
    for line in body[1].split("; "):
        found = re.fullmatch(r"(and|or|shl|shr)\.b32 (\S+), (\S+), (\S+?);?", line)
        assert found, line
        name, target, *operands = found.groups()
        a, b = (values[x] if x in values else int(x) for x in operands)
        values[target] = OPERATIONS[name](a, b)
    return values["$0"]


def format_of(widths: tuple[int, ...]) -> StoredFormat:
    codec = Squat()
    head_dim = LANES * len(widths)
    return stored_format(make_format(codec, codec_spec(codec), "key", head_dim, widths, 32, 4))


def lane_words(row: list[int], fmt: StoredFormat, lane: int) -> list[int]:
    """The 16-bit words of one lane of a stored token."""
    bits = 0
    for byte in range(fmt.whole_bytes):
        whole, odd = divmod(byte, 2)
        alone = 2 * whole + 1 == fmt.whole_bytes
        place = 32 * whole + (lane if alone else 2 * lane + odd)
        bits |= row[place] << 8 * byte
    offset, shift = 16 * fmt.whole_bytes, 8 * fmt.whole_bytes
    for width in fmt.sections:
        byte = row[offset + lane % (2 * width)]
        bits |= (byte >> lane // (2 * width) * width & 2**width - 1) << shift
        offset, shift = offset + 2 * width, shift + width
    return [bits >> 16 * word & 0xFFFF for word in range(-(-shift // 16))]


@given(widths=WIDTHS, seed=st.integers(0, 2**16))
def test_a_masked_word_is_the_code_as_a_subnormal(widths: tuple[int, ...], seed: int) -> None:
    """Two lanes a register, for every width and every way in which a code is cut in pieces."""
    fmt = format_of(widths)
    generator = torch.Generator().manual_seed(seed)
    most = torch.tensor(widths).repeat_interleave(LANES)
    codes = (torch.rand(len(most), generator=generator) * 2.0**most).to(torch.uint8)
    row = pack(codes[None], widths)[0].tolist()
    for lane in range(0, LANES, 2):
        pair = [lane_words(row, fmt, x) for x in (lane, lane + 1)]
        for plane, width in enumerate(widths):
            if not width:
                continue
            assert len(fmt.words(plane)) <= 3, "the kernel takes three"
            registers = [pair[0][w] | pair[1][w] << 16 for w in fmt.words(plane)]
            halves = struct.pack("<I", run(fmt.unpack_asm(plane), registers))
            found = struct.unpack("<2e", halves)
            expected = codes.view(-1, LANES)[plane, lane : lane + 2].tolist()
            assert [x * 2.0 ** (24 - fmt.exponent(plane)) for x in found] == expected


def test_common_widths_take_one_mask_and_at_most_one_shift() -> None:
    for bits in (1, 2, 4, 8):
        fmt = format_of((bits,) * 8)
        for plane in range(8):
            assert fmt.unpack_asm(plane).count(";") <= 3
            assert fmt.exponent(plane) + bits <= 10
