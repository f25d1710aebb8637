"""Bit planes: nothing is lost, nothing is moved, nothing is padded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from squat_fx.layouts.planes import (
    LANES,
    num_planes,
    pack,
    plane_layout,
    spread_widths,
    uniform_widths,
    unpack,
)

HEAD_DIMS = (16, 20, 32, 40, 48, 64, 72, 80, 96, 100, 112, 128, 144, 160, 192, 224, 255, 256)


def random_codes(rows: int, head_dim: int, widths: tuple[int, ...], seed: int) -> torch.Tensor:
    """Codes that use all bits of their plane, ``[rows, head_dim]``."""
    limits = torch.tensor(widths).repeat_interleave(LANES)[:head_dim]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (rows, head_dim), generator=generator)
    return (noise % 2**limits).to(torch.uint8)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, tuple[int, ...]]:
    """A head_dim and one width for each of its plane groups, all the same or not."""
    head_dim = draw(st.sampled_from(HEAD_DIMS) | st.integers(1, 256))
    groups = -(-head_dim // LANES)
    width = st.integers(0, 8)
    widths = draw(width.map(lambda w: (w,) * groups) | st.tuples(*[width] * groups))
    assume(any(widths))
    return head_dim, widths


@given(layout=layouts(), rows=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_unpack_undoes_pack(layout: tuple[int, tuple[int, ...]], rows: int, seed: int) -> None:
    head_dim, widths = layout
    codes = random_codes(rows, head_dim, widths, seed)
    assert torch.equal(unpack(pack(codes, widths), head_dim, widths), codes)


@given(layout=layouts(), seed=st.integers(0, 2**16))
def test_unpack_writes_every_channel_and_those_of_no_bits_are_zero(
    layout: tuple[int, tuple[int, ...]], seed: int
) -> None:
    head_dim, widths = layout
    codes = random_codes(2, head_dim, widths, seed)
    out = torch.full((2, head_dim), torch.nan)
    assert unpack(pack(codes, widths), head_dim, widths, out) is out
    assert torch.equal(out, codes.float())
    silent = torch.tensor([not width for width in widths]).repeat_interleave(LANES)[:head_dim]
    assert not out[:, silent].any()


@given(layout=layouts(), seed=st.integers(0, 2**16))
def test_what_does_not_fit_a_code_is_cut_off(
    layout: tuple[int, tuple[int, ...]], seed: int
) -> None:
    """No neighbour is touched."""
    head_dim, widths = layout
    codes = random_codes(2, head_dim, (8,) * len(widths), seed)
    limits = 2 ** torch.tensor(widths).repeat_interleave(LANES)[:head_dim]
    assert torch.equal(unpack(pack(codes, widths), head_dim, widths), codes % limits)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_unpack_undoes_pack_for_uniform_widths(head_dim: int, bits: int) -> None:
    widths = uniform_widths(head_dim, bits)
    codes = random_codes(2, head_dim, widths, seed=bits)
    assert torch.equal(unpack(pack(codes, widths), head_dim, widths), codes)


@given(layout=layouts(), seed=st.integers(0, 2**16), channel=st.integers(0, 255))
def test_pack_ignores_nothing(layout: tuple[int, tuple[int, ...]], seed: int, channel: int) -> None:
    head_dim, widths = layout
    channel %= head_dim
    assume(widths[channel // LANES])
    codes = random_codes(1, head_dim, widths, seed)
    other = codes.clone()
    other[0, channel] ^= 1
    assert not torch.equal(pack(codes, widths), pack(other, widths))


@given(layout=layouts())
def test_pieces_do_not_overlap_and_cover_every_code(layout: tuple[int, tuple[int, ...]]) -> None:
    head_dim, widths = layout
    found = plane_layout(head_dim, widths)
    lane_bits = [8 * p.byte + p.bit_shift + i for p in found.pieces for i in range(p.bits)]
    assert sorted(lane_bits) == list(range(sum(widths)))
    code_bits = [(p.group, p.code_shift + i) for p in found.pieces for i in range(p.bits)]
    assert sorted(code_bits) == [(g, bit) for g, width in enumerate(widths) for bit in range(width)]
    assert all(p.bit_shift + p.bits <= 8 for p in found.pieces), "a piece straddles a byte"


@given(layout=layouts())
def test_a_token_takes_the_bytes_that_the_formula_says(layout: tuple[int, tuple[int, ...]]) -> None:
    head_dim, widths = layout
    found = plane_layout(head_dim, widths)
    rows = pack(torch.zeros(2, 3, head_dim, dtype=torch.uint8), widths)
    assert rows.shape == (2, 3, found.row_bytes)
    assert rows.is_contiguous()
    assert found.row_bytes == 2 * sum(widths)
    assert found.row_bytes == 16 * found.whole_bytes + 2 * sum(found.sections)
    assert found.bits_per_element == pytest.approx(8 * found.row_bytes / head_dim)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("bits", range(1, 9))
def test_whole_plane_groups_have_no_padding(head_dim: int, bits: int) -> None:
    assert plane_layout(head_dim, uniform_widths(head_dim, bits)).bits_per_element == bits


@given(head_dim=st.integers(1, 256), total=st.integers(1, 8 * 16))
def test_spread_widths_sum_and_are_even(head_dim: int, total: int) -> None:
    planes = num_planes(head_dim)
    total = min(total, 8 * planes)
    widths = spread_widths(head_dim, total / planes)
    assert (len(widths), sum(widths)) == (planes, total)
    assert max(widths) - min(widths) <= 1
    assert list(widths) == sorted(widths)


@given(head_dim=st.integers(1, 256), bits=st.integers(1, 8))
def test_whole_bits_are_the_same_everywhere(head_dim: int, bits: int) -> None:
    assert spread_widths(head_dim, bits) == uniform_widths(head_dim, bits)


def test_half_a_bit_is_one_more_in_every_second_plane() -> None:
    assert spread_widths(64, 2.5) == (2, 2, 3, 3)
    assert plane_layout(64, (2, 2, 3, 3)).bits_per_element == 2.5


@pytest.mark.parametrize(
    ("head_dim", "bits", "text"),
    [
        (64, 2.3, "4 plane groups of head_dim 64 cannot average 2.3 bits; "
                  "the nearest are 2.25 and 2.5"),
        (80, 2.5, "5 plane groups of head_dim 80 cannot average 2.5 bits; "
                  "the nearest are 2.4 and 2.6"),
        (16, 1.5, "1 plane groups of head_dim 16 cannot average 1.5 bits; "
                  "the nearest are 1 and 2"),
    ],
)  # fmt: skip
def test_an_average_that_the_planes_do_not_have_is_refused_with_the_nearest(
    head_dim: int, bits: float, text: str
) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        spread_widths(head_dim, bits)


def test_a_section_holds_what_is_left_of_the_lanes() -> None:
    codes = torch.zeros(64, dtype=torch.uint8)
    codes[9::LANES] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)  # 12 bits a lane
    row = pack(codes, uniform_widths(64, 3))
    assert row.numel() == 24
    assert row[9] == 0b00_11_10_01, "low bits: a whole byte"
    assert row[16 + 1] == 0b1000 << 4, "high bits: four bits, lanes 8 to 15 in the upper half"
    assert row.count_nonzero() == 2


def test_lane_l_holds_channel_l_of_every_plane_group() -> None:
    widths = uniform_widths(64, 2)
    codes = torch.zeros(64, dtype=torch.uint8)
    codes[5::LANES] = torch.tensor([0, 1, 2, 3], dtype=torch.uint8)
    row = pack(codes, widths)
    assert row[5] == 0b11_10_01_00
    assert row.count_nonzero() == 1


def test_two_bytes_of_a_lane_are_one_little_endian_word() -> None:
    codes = torch.zeros(128, dtype=torch.uint8)
    codes[5::LANES] = torch.tensor([1, 0, 0, 0, 2, 0, 0, 0], dtype=torch.uint8)
    words = pack(codes, uniform_widths(128, 2)).view(torch.int16)
    assert words[5] == 1 | 2 << 8
    assert words.count_nonzero() == 1


def test_a_wrong_number_of_widths_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^head_dim 80 has 5 plane groups of 16 channels, got 4 widths$"
    ):
        plane_layout(80, (2, 2, 2, 2))


@pytest.mark.parametrize("width", [-1, 9])
def test_a_width_outside_one_byte_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=rf"^a plane width must be from 0 to 8 bits, got {width}$"):
        plane_layout(16, (width,))


def test_a_token_of_no_bits_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^at least one plane width must be more than 0 bits, got \(0, 0\)$"
    ):
        plane_layout(32, (0, 0))
