"""The polar transform: there and back, codebooks as good as theory has it, bits without padding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squat_fx.layouts.polar_token import WIDTHS
from squat_fx.layouts.polar_tree import (
    BLOCK,
    LARGEST_HALF,
    LEVELS,
    angles_of,
    angles_of_block,
    block_bits,
    codebook,
    codebooks,
    cosines_and_sines,
    dequantize_blocks,
    entries,
    fit_codebooks,
    from_polar,
    lloyd,
    middles,
    nearest,
    num_blocks,
    pack_codes,
    quantize_blocks,
    row_bytes,
    to_polar,
    unpack_codes,
)
from tests.conftest import randn

CPU = torch.device("cpu")
SEEDS = st.integers(0, 2**16)
SCHEDULES = st.sampled_from(list(WIDTHS.values())) | st.tuples(*[st.integers(1, 4)] * LEVELS)
HEAD_DIMS = st.sampled_from([1, 16, 20, 40, 64, 80, 128])

# Of the density sin(2 psi) ** (2 ** (level - 1) - 1) on [0, pi / 2].
CENTROIDS = {
    (2, 1): (0.5000, 1.0708),
    (3, 1): (0.5833, 0.9875),
    (4, 1): (0.6432, 0.9276),
    (2, 2): (0.3098, 0.6340, 0.9368, 1.2610),
    (3, 2): (0.4262, 0.6744, 0.8964, 1.1445),
    (4, 2): (0.5242, 0.7059, 0.8649, 1.0466),
}
DEVIATIONS = {2: 0.3418, 3: 0.2476, 4: 0.1763}


def tables(widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the codebooks of Gaussian numbers."""
    cosines, sines = cosines_and_sines(codebooks(widths, CPU))
    return cosines[None, None], sines[None, None]


def roundtrip(y: Tensor, widths: tuple[int, ...]) -> Tensor:
    return dequantize_blocks(*quantize_blocks(y, *tables(widths), widths), *tables(widths), widths)


# there and back ---------------------------------------------------------------------------------


@given(head_dim=HEAD_DIMS, exponent=st.integers(-8, 8), seed=SEEDS)
def test_angles_and_radius_say_all_of_a_block(head_dim: int, exponent: int, seed: int) -> None:
    y = randn(2, 3, head_dim, seed=seed) * 2.0**exponent
    radius, angles = to_polar(y)
    blocks = num_blocks(head_dim)
    assert radius.shape == (2, 3, blocks)
    assert [a.shape[-1] for a in angles] == [blocks * n for n in (8, 4, 2, 1)]
    assert all((a >= 0).all() for a in angles)
    assert (angles[0] <= 2 * math.pi).all()
    assert all((a <= math.pi / 2).all() for a in angles[1:])
    back = from_polar(radius, [a.cos() for a in angles], [a.sin() for a in angles])
    assert back.shape[-1] == BLOCK * blocks
    tolerance = 1e-6 * radius.max().item()
    torch.testing.assert_close(back[..., :head_dim], y, rtol=0.0, atol=tolerance)
    assert (back[..., head_dim:].abs() <= tolerance).all()


@given(seed=SEEDS)
def test_the_radius_is_the_length_of_the_block(seed: int) -> None:
    y = randn(5, 64, seed=seed)
    radius, _ = to_polar(y)
    torch.testing.assert_close(radius, y.unflatten(-1, (-1, BLOCK)).norm(dim=-1))


def test_the_angles_of_a_gaussian_have_the_deviations_of_theory() -> None:
    _, (first, *higher) = to_polar(randn(40_000, 16))
    torch.testing.assert_close(
        torch.histc(first, 8, 0.0, 2 * math.pi) / first.numel(), torch.full((8,), 1 / 8),
        rtol=0.02, atol=0.0,
    )  # fmt: skip
    for level, angle in enumerate(higher, 2):
        assert angle.mean().item() == pytest.approx(math.pi / 4, abs=2e-3)
        assert angle.std().item() == pytest.approx(DEVIATIONS[level], rel=0.01)


# codebooks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "bits"), CENTROIDS)
def test_centroids_are_those_of_the_density(level: int, bits: int) -> None:
    assert codebook(level, bits) == pytest.approx(CENTROIDS[level, bits], abs=1e-3)


@pytest.mark.parametrize("level", [2, 3, 4])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_centroid_is_the_mean_of_what_is_nearest_to_it(level: int, bits: int) -> None:
    """And the codebook is even about ``pi / 4``, which kernels rely on."""
    book = torch.tensor(codebook(level, bits), dtype=torch.float64)
    assert (book.diff() > 0).all()
    torch.testing.assert_close(book + book.flip(0), torch.full_like(book, math.pi / 2))
    psi = (torch.arange(1_000_003, dtype=torch.float64) + 0.5) * (math.pi / 2 / 1_000_003)
    density = (2 * psi).sin() ** (2 ** (level - 1) - 1)
    cell = torch.bucketize(psi, middles(book))
    total = torch.zeros_like(book).index_add_(0, cell, density * psi)
    torch.testing.assert_close(
        total / torch.zeros_like(book).index_add_(0, cell, density), book, rtol=0.0, atol=2e-4
    )


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_first_level_has_cells_of_one_size(bits: int) -> None:
    step = 2 * math.pi / 2**bits
    assert codebook(1, bits) == pytest.approx([(k + 0.5) * step for k in range(2**bits)])


@given(widths=SCHEDULES)
def test_cosines_and_sines_say_the_angles(widths: tuple[int, ...]) -> None:
    books = codebooks(widths, CPU)
    assert books.shape == (entries(widths),)
    torch.testing.assert_close(angles_of(*cosines_and_sines(books), widths), books)


def test_a_cell_without_weight_keeps_its_centroid() -> None:
    weight = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    grid = torch.arange(4, dtype=torch.float64)
    start = torch.tensor([1.0, 3.0], dtype=torch.float64)
    found = lloyd(weight, grid, start.expand(2, 2), 3)
    assert found.tolist() == [[0.5, 3.0], [1.0, 3.0]]


@given(seed=SEEDS, widths=SCHEDULES, garbage=st.sampled_from([0.0, 1e9, torch.inf, torch.nan]))
def test_a_prompts_codebook_is_that_of_its_kept_tokens(
    seed: int, widths: tuple[int, ...], garbage: float
) -> None:
    y = randn(2, 2, 60, 32, seed=seed)
    keep = randn(2, 60, seed=seed + 1) > 0
    keep[0] = False
    start = codebooks(widths, CPU)
    found = fit_codebooks(to_polar(y)[1], keep, start, widths)
    assert found.shape == (2, 2, entries(widths))
    assert torch.equal(found[0], start.expand(2, -1)), "nothing was learned from"
    dirty = y.masked_fill(~keep[:, None, :, None], garbage)
    assert torch.equal(fit_codebooks(to_polar(dirty)[1], keep, start, widths), found)
    alone = fit_codebooks(to_polar(y[1:, :, keep[1]])[1], keep[1:, keep[1]], start, widths)
    assert torch.equal(alone, found[1:])


def test_a_prompts_codebook_errs_less_on_it() -> None:
    """Of angles that are not those of a Gaussian: numbers of one sign and of several sizes."""
    y = randn(1, 1, 500, 64).abs() * torch.linspace(0.2, 2.0, 64)
    widths = (4, 2, 2, 2)
    _, angles = to_polar(y)
    start = codebooks(widths, CPU)
    fitted = fit_codebooks(angles, torch.ones(1, 500, dtype=torch.bool), start, widths)
    for level in range(LEVELS):
        errors = []
        for books in (start.expand(1, 1, -1), fitted):
            book = books.split([2**b for b in widths], -1)[level][0, 0]
            code = nearest(angles, books, widths)[level]
            errors.append((book[code.long()] - angles[level]).square().mean())
        assert errors[1] < errors[0]


# codes and bits ---------------------------------------------------------------------------------


@given(blocks=st.integers(1, 9), widths=SCHEDULES, seed=SEEDS)
def test_unpacking_undoes_packing_without_padding(
    blocks: int, widths: tuple[int, ...], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = tuple(
        torch.randint(2**bits, (2, 3, blocks * angles_of_block(level)), generator=generator)
        .to(torch.uint8)
        for level, bits in enumerate(widths, 1)
    )  # fmt: skip
    qdata = pack_codes(codes, widths)
    assert qdata.dtype == torch.uint8
    assert qdata.shape == (2, 3, row_bytes(BLOCK * blocks, widths))
    assert 0 <= 8 * qdata.shape[-1] - blocks * block_bits(widths) < 8
    assert all(map(torch.equal, unpack_codes(qdata, blocks, widths), codes))


def test_a_token_begins_with_the_first_level_and_the_low_bits() -> None:
    """Stored caches depend on it: this is part of the stored format."""
    codes = [torch.tensor(c, dtype=torch.uint8) for c in
             ([1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3], [3, 1], [2])]  # fmt: skip
    packed = pack_codes(codes, (4, 2, 2, 2)).tolist()
    assert packed == [0x21, 0x43, 0x65, 0x87, 0b11_10_01_00, 0b00_10_01_11]


@given(widths=SCHEDULES, seed=SEEDS)
def test_a_code_is_that_of_the_nearest_centroid(widths: tuple[int, ...], seed: int) -> None:
    _, angles = to_polar(randn(2, 2, 9, 40, seed=seed))
    books = codebooks(widths, CPU) + 0.01 * randn(2, 2, entries(widths), seed=seed)
    parts = books.sort(-1).values.split([2**b for b in widths], -1)
    books = torch.cat([part.sort(-1).values for part in parts], -1)
    codes = nearest(angles, books, widths)
    for angle, code, book in zip(
        angles, codes, books.split([2**b for b in widths], -1), strict=True
    ):
        distance = (angle[..., None] - book[:, :, None, None]).abs()
        chosen = distance.gather(-1, code.long()[..., None])[..., 0]
        assert (chosen <= distance.amin(-1) + 1e-6).all()


# how well it rounds, and what it never does -----------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "error"), [((4, 2, 2, 2), 0.0320), ((3, 2, 2, 2), 0.070), ((4, 3, 3, 2), 0.0205)]
)
def test_a_gaussian_is_rounded_as_well_as_theory_has_it(
    widths: tuple[int, ...], error: float
) -> None:
    y = randn(1, 1, 4000, 64)
    found = (roundtrip(y, widths) - y).square().mean() / y.square().mean()
    assert found.item() == pytest.approx(error, rel=0.03)


@given(widths=SCHEDULES, head_dim=HEAD_DIMS, exponent=st.integers(-8, 8), seed=SEEDS)
def test_a_block_keeps_its_length(
    widths: tuple[int, ...], head_dim: int, exponent: int, seed: int
) -> None:
    y = randn(1, 2, 5, head_dim, seed=seed) * 2.0**exponent
    restored = roundtrip(y, widths).unflatten(-1, (-1, BLOCK)).norm(dim=-1)
    torch.testing.assert_close(restored, to_polar(y)[0], rtol=1e-3, atol=1e-6)


@given(widths=SCHEDULES, seed=SEEDS, garbage=st.sampled_from([0.0, 1e9, torch.inf, torch.nan]))
def test_a_token_does_not_depend_on_others(
    widths: tuple[int, ...], seed: int, garbage: float
) -> None:
    y = randn(2, 2, 6, 40, seed=seed)
    among = y.clone()
    among[:, :, 1::2] = garbage
    alone = quantize_blocks(y[:, :, 2:3], *tables(widths), widths)
    found = quantize_blocks(among, *tables(widths), widths)
    assert all(torch.equal(a, f[:, :, 2:3]) for a, f in zip(alone, found, strict=True))
    assert found[1].isfinite().all()


@given(widths=SCHEDULES)
def test_zeros_come_back_as_zeros(widths: tuple[int, ...]) -> None:
    assert not roundtrip(torch.zeros(1, 1, 3, 40), widths).any()


@given(widths=SCHEDULES, size=st.sampled_from([1e5, 1e9, 1e25, 3e38, torch.inf, torch.nan]))
def test_numbers_beyond_fp16_stay_finite(widths: tuple[int, ...], size: float) -> None:
    y = randn(1, 1, 4, 40)
    y[..., ::3] = size
    _, radius = quantize_blocks(y, *tables(widths), widths)
    assert (radius <= LARGEST_HALF).all()
    assert roundtrip(y, widths).isfinite().all()
