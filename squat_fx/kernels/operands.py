"""Which bits of a stored token become which operand of a tensor core.

A tensor core multiplies 16 channels of a token at once, two to a register, and unpacking is a mask:
each register of stored bits must hold the same bits of channels that belong together. A token is
copied as a row of 16-bit words, in which lie the *sources* of its codes:

* 16 words, one for each lane: channel ``l`` of every plane group in word ``l``;
* 8 words, an odd byte of the lanes or a section of what is left of them (``layouts/planes.py``):
  word ``c`` has lane ``2 * c`` in its low byte and lane ``2 * c + 1`` in its high one. A section of
  4 or 2 bits a lane is stored in 4 or 2 words, which are repeated: what word ``c`` stands for is
  ``c // stored * bits`` bits further up.

A *term* is one dot: the codes of a plane group, or a piece of them. Where there is room for the
sums of so many, every piece is a term, since a dot takes less than joining pieces to codes; else
those in one kind of source are joined. Terms of the second kind are *split*: of their 16 channels
the even ones come first, masked out of low bytes, then the odd ones, out of the same registers'
high bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WORD_SHIFT = 6  # brings the six upper bits of a word to where a half has its mantissa
BYTE_SHIFT = 8  # brings high bytes to where low ones are
HALF_BITS = 10  # of a mantissa
MOST_TERMS = 16  # whose sums a warp has registers for

PieceInWord = tuple[int, int, int, int]
"""``(word, shift in the word, mask, shift in the code)``."""


@dataclass(frozen=True)
class Source:
    """``bits`` of each lane, from column ``start`` of a row on; stored from word ``offset`` on."""

    start: int
    offset: int
    bits: int

    @property
    def split(self) -> bool:
        """Whether a word has two lanes."""
        return self.bits < 16

    @property
    def stored(self) -> int:
        """Words that a token has of it."""
        return self.bits


@dataclass(frozen=True)
class Term:
    """One dot: ``pieces`` ``(source, shift, mask, code_shift)`` of the codes of a plane group.

    Unpacked they are ``code * 2**(exponent - 24)``, for the part of the code that is in them.
    """

    plane: int
    split: bool
    pieces: tuple[tuple[int, int, int, int], ...]
    exponent: int

    @property
    def sources(self) -> tuple[int, ...]:
        """Those that the pieces are in."""
        return tuple(dict.fromkeys(source for source, *_ in self.pieces))

    @property
    def middle(self) -> float:
        """What the pieces contribute to the code of zero."""
        return sum(mask << code_shift for _, _, mask, code_shift in self.pieces) / 2

    def ptx(self, half: int) -> str:
        """Masks the codes out of a register of each source; ``half`` 1: out of high bytes."""
        moves = [
            (self.sources.index(source), shift + 8 * half, mask, code_shift + self.exponent)
            for source, shift, mask, code_shift in self.pieces
        ]
        return unpack_ptx(moves)


@dataclass(frozen=True)
class TokenRow:
    """A token as it is copied: ``used`` words in a row of ``width``, ``together`` at once."""

    sources: tuple[Source, ...]
    used: int
    width: int
    together: int


def token_row(whole_bytes: int, sections: Sequence[int]) -> TokenRow:
    """The row of tokens whose lanes have so many whole bytes and what is left in ``sections``."""
    sources, start, offset = [], 0, 0
    for bits in (*[16] * (whole_bytes // 2), *[8] * (whole_bytes % 2), *sections):
        sources.append(Source(start, offset, bits))
        start += max(bits, 8)
        offset += bits
    width = 1 << (start - 1).bit_length()
    return TokenRow(tuple(sources), start, width, min(offset & -offset, 8))


def terms_of(
    pieces: Sequence[Sequence[PieceInWord]], sources: Sequence[Source]
) -> tuple[Term, ...]:
    """The dots that all codes of a token take, by plane group.

    Args:
        pieces: of each plane group, ``(word, shift in the word, mask, shift in the code)``.
        sources: of :func:`token_row`.
    """
    starts = [sum(source.bits for source in sources[:i]) for i in range(len(sources))]
    few = sum(map(len, pieces)) <= MOST_TERMS
    found = []
    for plane, in_words in enumerate(pieces):
        dots: dict[object, list[PieceInWord]] = {}
        for word, shift, mask, code_shift in in_words:
            bit = 16 * word + shift
            index = max(i for i, start in enumerate(starts) if start <= bit)
            piece = (index, bit - starts[index], mask, code_shift)
            dots.setdefault(piece if few else sources[index].split, []).append(piece)
        for dot in dots.values():
            split = sources[dot[0][0]].split
            shared, halves = (BYTE_SHIFT, (0, 8)) if split else (WORD_SHIFT, (0,))
            found.append(Term(plane, split, tuple(dot), best_exponent(dot, shared, halves)))
    return tuple(found)


def best_exponent(pieces: Sequence[PieceInWord], shared: int, halves: Sequence[int] = (0,)) -> int:
    """How far above bit 0 codes stay when they are masked out, at the least cost.

    Best nothing moves; else by ``shared`` bits, a move that plane groups have in common.
    """
    top = max(code_shift + mask.bit_length() for _, _, mask, code_shift in pieces)

    def cost(exponent: int) -> int:
        distances = (
            shift + half - code_shift - exponent
            for _, shift, _, code_shift in pieces
            for half in halves
        )
        return sum({0: 0, shared: 1}.get(distance, 2) for distance in distances)

    return min(range(HALF_BITS + 1 - top), key=cost)


def unpack_ptx(moves: Sequence[PieceInWord]) -> str:
    """PTX that gathers pieces of codes, two lanes a register, from registers ``$1, $2, ...``.

    Args:
        moves: of each piece the register, from 0 on, its first bit there, its mask and the bit
            it is to begin at.
    """
    lines = []
    for index, (register, shift, mask, place) in enumerate(moves):
        source, target = f"${1 + register}", "t" if index else "$0"
        if shift != place:
            move = "shr" if shift > place else "shl"
            lines.append(f"{move}.b32 t, {source}, {abs(shift - place)};")
            source = "t"
        lines.append(f"and.b32 {target}, {source}, {(mask << place) * 0x10001};")
        if index:
            lines.append("or.b32 $0, $0, t;")
    return "{ .reg .b32 t; " + " ".join(lines) + " }"
