"""Stored tokens inside a kernel: where a token lies, and its channels 16 at a time.

Every kernel walks a head in *plane groups* of 16 channels (``layouts/planes.py``), so a tile of
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
from functools import cached_property, lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from squat_fx.codecs import Format
from squat_fx.kernels.operands import (
    WORD_SHIFT,
    Term,
    TokenRow,
    best_exponent,
    terms_of,
    token_row,
    unpack_ptx,
)
from squat_fx.layouts.planes import LANES
from squat_fx.layouts.symmetric import STEP, least_scales, worths


class Stored(NamedTuple):
    """The arenas of one role as a kernel takes them; ``capacity`` counts packed tokens.

    ``basis`` is fp32 ``[2, heads, head_dim, head_dim]``: ``basis_stride`` elements lie between two
    heads, ``inverse`` ones before the inverse. None: the fixed rotation (``triton_hadamard.py``).
    Fixed arenas of other layouts are in the field of their name, or else ``fixed``.
    """

    qdata: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    dense: Tensor
    start: Tensor
    capacity: int
    affine: Tensor | None = None
    basis: Tensor | None = None
    basis_stride: int = 0
    inverse: int = 0
    extra: Tensor | None = None
    fixed: Tensor | None = None
    center: Tensor | None = None
    frequency: Tensor | None = None
    outlier: Tensor | None = None
    outlier_key: Tensor | None = None


@dataclass(frozen=True)
class StoredFormat:
    """``Format`` as kernels take it, a compile-time constant.

    It carries the piece table, so that kernels are compiled anew when the table changes:
    ``pieces[plane]`` lists ``(word, shift in the word, mask, shift in the code)``; None says that
    qdata holds the numbers themselves. What is left of the lanes after ``whole_bytes``, in
    ``sections`` of so many bits, counts as one more byte. ``token_row`` and ``terms`` are the same
    for tensor cores (``operands.py``).

    ``layout`` is its name. In ``planes/token``, which is ``per_token``, ``steps[plane]`` is the
    distance of its levels, ``least_scales[plane]`` what its largest number asks of the size, and
    ``worths[plane]`` what it counts in what the scale keeps, which ``unbiased`` says.
    """

    layout: str
    head_dim: int
    num_planes: int
    pieces: tuple[tuple[tuple[int, int, int, int], ...], ...] | None
    whole_bytes: int
    sections: tuple[int, ...]
    token_row: TokenRow
    terms: tuple[Term, ...]
    row_size: int
    widths: tuple[int, ...]
    per_token: bool
    steps: tuple[float, ...]
    least_scales: tuple[float, ...]
    worths: tuple[float, ...]
    unbiased: bool
    affine: bool
    levels: float
    token_group: int
    channel_group: int
    channel_groups: int
    sink_length: int
    ring_length: int
    residual_length: int
    details: tuple[int, ...]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Computed once: every launch looks its kernel up by it."""
        return hash(repr(self))

    @property
    def dense_length(self) -> int:
        """Slots of the dense buffer."""
        return self.sink_length + self.ring_length

    def words(self, plane: int) -> tuple[int, ...]:
        """The words that a plane group has pieces in."""
        assert self.pieces is not None
        return tuple(dict.fromkeys(word for word, *_ in self.pieces[plane]))

    def exponent(self, plane: int) -> int:
        """How far above bit 0 a code stays when it is masked out of its words."""
        assert self.pieces is not None
        return best_exponent(self.pieces[plane], WORD_SHIFT) if self.pieces[plane] else 0

    def unpack_asm(self, plane: int) -> str:
        """PTX that masks a plane group out of its words; a register has two lanes."""
        assert self.pieces is not None
        words, exponent = self.words(plane), self.exponent(plane)
        return unpack_ptx(
            [
                (words.index(word), shift, mask, code_shift + exponent)
                for word, shift, mask, code_shift in self.pieces[plane]
            ]
        )


@lru_cache(maxsize=256)
def stored_format(fmt: Format) -> StoredFormat:
    """The compile-time constant of ``fmt``."""
    num_planes = -(-fmt.head_dim // LANES)
    planes, row_size = fmt.planes, fmt.last_dim("qdata")
    pieces, whole_bytes, sections, levels = None, 0, (), 0.0
    if planes is not None:
        pieces = tuple(
            tuple(
                (p.byte // 2, p.byte % 2 * 8 + p.bit_shift, 2**p.bits - 1, p.code_shift)
                for p in planes.pieces
                if p.group == plane
            )
            for plane in range(len(planes.widths))
        )
        whole_bytes, sections = planes.whole_bytes, planes.sections
        levels = float(2 ** planes.widths[0] - 1)
    per_token = fmt.layout == "planes/token"
    row = token_row(whole_bytes, sections)
    return StoredFormat(
        layout=fmt.layout,
        head_dim=fmt.head_dim,
        num_planes=num_planes,
        pieces=pieces,
        whole_bytes=whole_bytes,
        sections=sections,
        token_row=row,
        terms=terms_of(pieces or (), row.sources),
        row_size=row_size,
        widths=fmt.widths,
        per_token=per_token,
        steps=tuple(STEP[bits] for bits in fmt.widths) if per_token else (),
        least_scales=least_scales(fmt.widths) if per_token else (),
        worths=worths(fmt.widths, fmt.latent) if per_token else (),
        unbiased=fmt.unbiased,
        affine=fmt.affine,
        levels=levels,
        token_group=fmt.token_group,
        channel_group=fmt.channel_group,
        channel_groups=fmt.channel_groups,
        sink_length=fmt.sink_length,
        ring_length=fmt.ring_length,
        residual_length=fmt.residual_length,
        details=fmt.details,
    )


# compile-time arithmetic (Triton 3.6 cannot index nested tuples inside a kernel) -----------------


@triton.constexpr_function
def num_planes(fmt):
    return fmt.num_planes


@triton.constexpr_function
def num_words(fmt):
    return -(-(fmt.whole_bytes + bool(fmt.sections)) // 2)


@triton.constexpr_function
def num_sections(fmt):
    return len(fmt.sections)


@triton.constexpr_function
def section_width(fmt, index):
    return fmt.sections[index]


@triton.constexpr_function
def section_shift(fmt, index):
    """Where a section begins in what is left of a lane."""
    return sum(fmt.sections[:index])


@triton.constexpr_function
def section_offset(fmt, index):
    """Bytes of a stored token before a section."""
    return 16 * fmt.whole_bytes + 2 * sum(fmt.sections[:index])


@triton.constexpr_function
def step(fmt, plane):
    """Distance of the levels of a plane group, in units of the token's scale."""
    return fmt.steps[plane]


@triton.constexpr_function
def largest_code(fmt, plane):
    return 2 ** fmt.widths[plane] - 1


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


@triton.jit
def wait_for_previous_launch():
    """What the launch before has written is there from here on."""
    tl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


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
def load_or_zero(pointers, keep):
    """What is at ``pointers``; with ``keep``, zero elsewhere."""
    return tl.load(pointers) if keep is None else tl.load(pointers, mask=keep, other=0)


@triton.jit
def load_words(stored, head, slot, keep, lane, fmt: tl.constexpr):
    """The 16-bit words of the lanes of packed ``slot`` ``[N, 1]``: a tuple of int16 ``[N, 16]``.

    ``keep`` may be None: all of them are there.
    """
    rows = stored.qdata + head * stored.capacity * fmt.row_size + slot * fmt.row_size
    return words_of_rows(rows, keep, lane, fmt)


@triton.jit
def words_of_rows(rows, keep, lane, fmt: tl.constexpr):
    """The same of tokens whose codes begin at ``rows`` ``[N, 1]``."""
    words = ()
    if fmt.pieces is not None:
        for w in tl.static_range(num_words(fmt)):
            if 2 * w + 1 < fmt.whole_bytes:
                word = load_or_zero(rows.to(tl.pointer_type(tl.int16)) + (16 * w + lane), keep)
            elif 2 * w + 1 == fmt.whole_bytes:
                word = load_or_zero(rows + (32 * w + lane), keep).to(tl.int16)
                if num_sections(fmt) > 0:
                    word |= load_sections(rows, keep, lane, fmt) << 8
            else:
                word = load_sections(rows, keep, lane, fmt)
            words += (word,)
    return words


@triton.jit
def load_sections(rows, keep, lane, fmt: tl.constexpr):
    """What is left of the lanes after their whole bytes, int16 ``[N, 16]``."""
    rest = tl.zeros([1, 1], tl.int16)
    for i in tl.static_range(num_sections(fmt)):
        rest = rest | load_section(rows, keep, lane, i, fmt)
    return rest


@triton.jit
def load_section(rows, keep, lane, index: tl.constexpr, fmt: tl.constexpr):
    """One section, where it belongs in a lane."""
    bits: tl.constexpr = section_width(fmt, index)
    section = rows + (section_offset(fmt, index) + lane % (2 * bits))
    byte = load_or_zero(section, keep).to(tl.int16)
    piece_bits = (byte >> (lane // (2 * bits) * bits).to(tl.int16)) & (2**bits - 1)
    return piece_bits << section_shift(fmt, index)


@triton.jit
def unpack_plane(words, plane: tl.constexpr, fmt: tl.constexpr):
    """The codes of one plane group, int16 ``[N, 16]``."""
    codes = tl.zeros_like(words[0])
    for i in tl.static_range(num_pieces(fmt, plane)):
        word = words[piece(fmt, plane, i, WORD)]
        bits = (word >> piece(fmt, plane, i, SHIFT)) & piece(fmt, plane, i, MASK)
        codes |= bits << piece(fmt, plane, i, CODE_SHIFT)
    return codes


@triton.constexpr_function
def plane_exponent(fmt, plane):
    """``half_codes`` gives codes times two to this, less 24."""
    return fmt.exponent(plane)


@triton.constexpr_function
def num_plane_words(fmt, plane):
    return len(fmt.words(plane))


@triton.constexpr_function
def plane_word(fmt, plane, index):
    return fmt.words(plane)[index]


@triton.constexpr_function
def unpack_constraints(fmt, plane):
    return "=&r" + ",r" * len(fmt.words(plane))


@triton.constexpr_function
def unpack_asm(fmt, plane):
    return fmt.unpack_asm(plane)


@triton.jit
def half_codes(words, plane: tl.constexpr, fmt: tl.constexpr, ASM: tl.constexpr):
    """The codes of one plane group as fp16 subnormals: ``code * 2**(plane_exponent - 24)``.

    Nothing is converted: the bits of a code are the mantissa of a subnormal. In Triton's own
    operators each lane would take a register of its own; with ``ASM`` two share one.
    """
    if ASM:
        args = (words[plane_word(fmt, plane, 0)],)
        if num_plane_words(fmt, plane) > 1:
            args += (words[plane_word(fmt, plane, 1)],)
        if num_plane_words(fmt, plane) > 2:
            args += (words[plane_word(fmt, plane, 2)],)
        codes = tl.inline_asm_elementwise(
            unpack_asm(fmt, plane), unpack_constraints(fmt, plane), args,
            dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        codes = unpack_plane(words, plane, fmt) << plane_exponent(fmt, plane)
        codes = codes.to(tl.float16, bitcast=True)
    return codes


@triton.jit
def load_affine(stored, head, channel, inside, fmt: tl.constexpr):
    """Offset and factor of channels, fp32, the shape of ``channel``."""
    pointers = stored.affine + head * (2 * fmt.head_dim) + channel
    offset = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(pointers + fmt.head_dim, mask=inside, other=1.0).to(tl.float32)
    return offset, factor


@triton.jit
def no_words(slot, fmt: tl.constexpr):
    """The words of tokens at ``slot`` ``[N, 1]`` before any code: a tuple of int32 ``[N, 16]``."""
    words = ()
    for _ in tl.static_range(num_words(fmt)):
        words += (tl.zeros([slot.shape[0], 16], tl.int32),)
    return words


@triton.jit
def add_plane(words, codes, plane: tl.constexpr, fmt: tl.constexpr):
    """Undo :func:`unpack_plane`: ``words`` with the int32 ``codes`` of one more plane group."""
    filled = ()
    for w in tl.static_range(num_words(fmt)):
        word = words[w]
        for i in tl.static_range(num_pieces(fmt, plane)):
            if piece(fmt, plane, i, WORD) == w:
                bits = (codes >> piece(fmt, plane, i, CODE_SHIFT)) & piece(fmt, plane, i, MASK)
                word |= bits << piece(fmt, plane, i, SHIFT)
        filled += (word,)
    return filled


@triton.jit
def store_words(stored, head, slot, keep, lane, words, fmt: tl.constexpr):
    """Undo :func:`load_words`; ``words`` are int32."""
    rows = stored.qdata + head * stored.capacity * fmt.row_size + slot * fmt.row_size
    for w in tl.static_range(num_words(fmt)):
        word = words[w]
        if 2 * w + 1 < fmt.whole_bytes:
            tl.store(
                rows.to(tl.pointer_type(tl.int16)) + (16 * w + lane), word.to(tl.int16), mask=keep
            )
        elif 2 * w + 1 == fmt.whole_bytes:
            tl.store(rows + (32 * w + lane), word.to(tl.uint8), mask=keep)
            store_sections(rows, keep, word >> 8, fmt)
        else:
            store_sections(rows, keep, word, fmt)


@triton.jit
def store_sections(rows, keep, rest, fmt: tl.constexpr):
    """Undo :func:`load_sections`."""
    for i in tl.static_range(num_sections(fmt)):
        store_section(rows, keep, rest, i, fmt)


@triton.jit
def store_section(rows, keep, rest, index: tl.constexpr, fmt: tl.constexpr):
    """Undo :func:`load_section`."""
    bits: tl.constexpr = section_width(fmt, index)
    part = (rest >> section_shift(fmt, index)) & (2**bits - 1)
    part = tl.reshape(part, [rest.shape[0], 8 // bits, 2 * bits])
    place = tl.arange(0, 8 // bits)[None, :, None]
    section = tl.sum(part << (place * bits), 1)  # [N, bytes]
    byte = tl.arange(0, 2 * bits)[None, :]
    tl.store(rows + (section_offset(fmt, index) + byte), section.to(tl.uint8), mask=keep)


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
