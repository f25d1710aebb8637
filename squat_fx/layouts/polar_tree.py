"""A block of 16 numbers as one radius and 15 angles: the recursive polar transform.

    level 1      angle_j = atan2(y_{2j+1}, y_{2j})         8 angles in [0, 2 pi)
                 r_j     = hypot(y_{2j}, y_{2j+1})
    level 2..4   the same of the radii of the level below   4 + 2 + 1 angles in [0, pi / 2]

and back: a radius is split in two by the cosine and the sine of its angle, four times over (Han et
al., PolarQuant, 2025, algorithm 1, with depth ``L = 4``). Of a Gaussian block, all angles and the
radius are independent: those of level 1 are uniform, those of level ``l`` have a density in
proportion to ``sin(2 psi) ** (2 ** (l - 1) - 1)`` about ``pi / 4``, narrower at every level (lemma
2). So a codebook for each level, made once for everything, fits every token that was rotated.

A stored token is one little-endian stream of bits: the codes of level 1 of all blocks, then those
of level 2, and so on, each with its low bit first. Nothing is padded but the last byte, and the
codes of a block at level 1 begin at a whole byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 16
LEVELS = 4
LARGEST_HALF = 65504.0

# Lloyd's iteration on a grid: of the densities once, of a prompt's angles at every store.
GRID_POINTS = 2**15
GRID_ITERATIONS = 1000
PROMPT_BINS = 1024
PROMPT_ITERATIONS = 8


def angles_of_block(level: int) -> int:
    """Angles of ``level``, 1 to 4, in a block."""
    return BLOCK >> level


def num_blocks(head_dim: int) -> int:
    """Blocks of a head; zeros fill the last one."""
    return -(-head_dim // BLOCK)


def block_bits(widths: Sequence[int]) -> int:
    """Bits of the angles of a block."""
    return sum(angles_of_block(level) * bits for level, bits in enumerate(widths, 1))


def row_bytes(head_dim: int, widths: Sequence[int]) -> int:
    """Bytes of the angles of a token."""
    return -(-num_blocks(head_dim) * block_bits(widths) // 8)


def entries(widths: Sequence[int]) -> int:
    """Centroids of all levels."""
    return sum(2**bits for bits in widths)


# there and back -----------------------------------------------------------------------------------


def to_polar(y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The radius of each block, ``[..., blocks]``, and the angles of each level, ``[..., blocks *
    angles of a block]``, of ``y`` ``[..., channels]``; zeros fill the last block.
    """
    radius = F.pad(y, (0, -y.shape[-1] % BLOCK))
    angles = []
    for level in range(1, LEVELS + 1):
        x, y = radius[..., 0::2], radius[..., 1::2]
        angle = angle_of(x, y)
        angles.append(angle.remainder(2 * math.pi) if level == 1 else angle)
        radius = (x.square() + y.square()).sqrt()
    return radius, tuple(angles)


def angle_of(x: Tensor, y: Tensor) -> Tensor:
    """``atan2(y, x)``, fp32, by way of fp64: in fp32 torch's differ in the last bit by how many
    numbers it is given, and what is stored must not depend on how tokens arrive.
    """
    return torch.atan2(y.double(), x.double()).float()


def from_polar(radius: Tensor, cosines: Sequence[Tensor], sines: Sequence[Tensor]) -> Tensor:
    """Undo :func:`to_polar`, from the cosines and the sines of each level's angles."""
    for cosine, sine in zip(reversed(cosines), reversed(sines), strict=True):
        radius = torch.stack([radius * cosine, radius * sine], -1).flatten(-2)
    return radius


# codebooks ----------------------------------------------------------------------------------------


def lloyd(weight: Tensor, grid: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    """Centroids of the distributions ``weight`` ``[..., points]`` on ``grid`` ``[points]``.

    Lloyd's iteration: cut in the middle between two centroids, move each to the mean of its cell.
    A cell without weight keeps its centroid. The arithmetic is that of ``centroids`` ``[..., n]``.
    """
    mass = F.pad(weight.cumsum(-1), (1, 0))
    moment = F.pad((weight * grid).cumsum(-1), (1, 0))
    for _ in range(iterations):
        cuts = torch.searchsorted(grid, middles(centroids))
        cuts = F.pad(F.pad(cuts, (1, 0)), (0, 1), value=grid.shape[0])
        inside = mass.gather(-1, cuts).diff(dim=-1)
        total = moment.gather(-1, cuts).diff(dim=-1)
        centroids = torch.where(inside > 0, total / inside.clamp_min(1e-300), centroids)
    return centroids


def middles(centroids: Tensor) -> Tensor:
    """Where one cell ends and the next one begins, ``[..., n - 1]``."""
    return (centroids[..., 1:] + centroids[..., :-1]) / 2


@lru_cache(maxsize=32)
def codebook(level: int, bits: int) -> tuple[float, ...]:
    """The ``2**bits`` angles that stand for those of ``level`` of Gaussian numbers, ascending."""
    if level == 1:
        return tuple((k + 0.5) * 2 * math.pi / 2**bits for k in range(2**bits))
    with torch.inference_mode(False), torch.no_grad():
        points = torch.arange(GRID_POINTS, dtype=torch.float64) + 0.5
        grid = points * (math.pi / 2 / GRID_POINTS)
        density = (2 * grid).sin() ** (2 ** (level - 1) - 1)
        start = (torch.arange(2**bits, dtype=torch.float64) + 0.5) * (math.pi / 2 / 2**bits)
        found = lloyd(density, grid, start, GRID_ITERATIONS)
        # The density is even about pi / 4, and so are its centroids.
        return tuple(((found + math.pi / 2 - found.flip(0)) / 2).tolist())


@lru_cache(maxsize=32)
def codebooks(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """Those of all levels one after the other, fp32 ``[entries]``; not to be written to."""
    angles = [angle for level, bits in enumerate(widths, 1) for angle in codebook(level, bits)]
    with torch.inference_mode(False), torch.no_grad():
        return torch.tensor(angles, dtype=torch.float64).float().to(device)


def cosines_and_sines(books: Tensor) -> Tensor:
    """Of angles ``[..., entries]``: ``[..., 2, entries]``."""
    return torch.stack([books.cos(), books.sin()], -2)


def angles_of(cosines: Tensor, sines: Tensor, widths: Sequence[int]) -> Tensor:
    """Undo :func:`cosines_and_sines`."""
    angles = angle_of(cosines, sines)
    first = 2 ** widths[0]
    return torch.cat([angles[..., :first].remainder(2 * math.pi), angles[..., first:]], -1)


def fit_codebooks(
    angles: Sequence[Tensor], keep: Tensor, start: Tensor, widths: Sequence[int]
) -> Tensor:
    """Codebooks of a prompt's own angles, fp32 ``[batch, heads, entries]``.

    Args:
        angles: of each level, ``[batch, heads, tokens, angles]``.
        keep: bool ``[batch, tokens]``; other tokens touch nothing. Where none is kept, ``start`` is
            what comes out.
        start: fp32 ``[entries]``.
        widths: bits of each level.

    Angles are counted in ``PROMPT_BINS`` bins, in integers, so that the outcome does not depend on
    the order in which a GPU adds.
    """
    found, device = [], keep.device
    starts = start.split([2**bits for bits in widths])
    for level, (angle, first) in enumerate(zip(angles, starts, strict=True), 1):
        batch, heads, _, count = angle.shape
        width = (2 * math.pi if level == 1 else math.pi / 2) / PROMPT_BINS
        where = (angle / width).nan_to_num(0.0).long().clamp(0, PROMPT_BINS - 1)
        kept = keep[:, None, :, None].expand(-1, heads, -1, count).int()
        bins = torch.zeros(batch, heads, PROMPT_BINS, dtype=torch.int32, device=device)
        bins.scatter_add_(-1, where.flatten(2), kept.flatten(2))
        grid = (torch.arange(PROMPT_BINS, dtype=torch.float64, device=device) + 0.5) * width
        centroids = first.double().expand(batch, heads, -1)
        found.append(lloyd(bins.double(), grid, centroids, PROMPT_ITERATIONS).float())
    return torch.cat(found, -1)


# codes --------------------------------------------------------------------------------------------


def nearest(angles: Sequence[Tensor], books: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """The codes of the angles of each level, ``[batch, heads, tokens, angles]``, uint8.

    ``books`` is ``[batch or 1, heads or 1, entries]``.
    """
    codes = []
    for angle, book in zip(angles, books.split([2**b for b in widths], -1), strict=True):
        cuts = middles(book).expand(*angle.shape[:2], -1).contiguous()
        found = torch.searchsorted(cuts, angle.flatten(2), out_int32=True)
        codes.append(found.to(torch.uint8).view(angle.shape))
    return tuple(codes)


def numbers(codes: Sequence[Tensor], table: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """What ``table`` ``[batch or 1, heads or 1, entries]`` has for the codes of each level."""
    found = []
    for code, part in zip(codes, table.split([2**b for b in widths], -1), strict=True):
        part = part.expand(*code.shape[:2], -1)
        found.append(part.gather(-1, code.flatten(2).long()).view(code.shape))
    return tuple(found)


def pack_codes(codes: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
    """The codes of each level, ``[..., blocks * angles of a block]``, as bytes ``[...,
    row_bytes]``.
    """
    device = codes[0].device
    stream = torch.cat(
        [
            ((code[..., None] >> torch.arange(bits, device=device)) & 1).flatten(-2)
            for code, bits in zip(codes, widths, strict=True)
        ],
        -1,
    ).to(torch.uint8)
    stream = F.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (stream << torch.arange(8, dtype=torch.uint8, device=device)).sum(-1, dtype=torch.uint8)


def unpack_codes(qdata: Tensor, blocks: int, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """Undo :func:`pack_codes`."""
    place = torch.arange(8, dtype=torch.uint8, device=qdata.device)
    stream = ((qdata[..., None] >> place) & 1).flatten(-2)
    codes, first = [], 0
    for level, bits in enumerate(widths, 1):
        last = first + blocks * angles_of_block(level) * bits
        code = stream[..., first:last].unflatten(-1, (-1, bits))
        codes.append((code << place[:bits]).sum(-1, dtype=torch.uint8))
        first = last
    return tuple(codes)


# tokens -------------------------------------------------------------------------------------------
# ``cosines`` and ``sines`` of the codebooks are fp32 ``[batch or 1, heads or 1, entries]``.


def quantize_blocks(
    y: Tensor, cosines: Tensor, sines: Tensor, widths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Packed codes, uint8 ``[batch, heads, tokens, row_bytes]``, and radii, fp16 ``[..., blocks]``,
    of fp32 ``y`` ``[batch, heads, tokens, channels]``.
    """
    radius, angles = to_polar(y)
    codes = nearest(angles, angles_of(cosines, sines, widths), widths)
    radius = radius.nan_to_num(0.0, LARGEST_HALF).clamp(max=LARGEST_HALF)
    return pack_codes(codes, widths), radius.half()


def dequantize_blocks(
    qdata: Tensor, radius: Tensor, cosines: Tensor, sines: Tensor, widths: Sequence[int]
) -> Tensor:
    """Undo :func:`quantize_blocks`, in fp32, whole blocks."""
    codes = unpack_codes(qdata, radius.shape[-1], widths)
    return from_polar(
        radius.float(), numbers(codes, cosines, widths), numbers(codes, sines, widths)
    )
