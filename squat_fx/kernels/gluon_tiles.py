"""Tiles of packed tokens in shared memory, and as the 16-row operands of tensor cores.

A program is one warp. It copies the rows of its tokens (``operands.py``) asynchronously, a whole
row at once, since the L2 cache answers as many requests whether they ask for a line or for half of
it. It reads them in the layout in which tensor cores take them, and masks codes out of registers:
keys with tokens as rows, ``[tokens, 16]``, values with channels as rows, ``[16, tokens]``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from squat_fx.kernels.triton_planes import StoredFormat

# Triton 3.9 has renamed it.
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

SCORES = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8]))
CODES = gl.constexpr(gl.DotOperandLayout(0, SCORES.value, 2))
WEIGHTS = gl.constexpr(gl.DotOperandLayout(1, SCORES.value, 2))
ROWS = gl.constexpr(gl.SliceLayout(0, SCORES.value))
TOKENS = gl.constexpr(gl.SliceLayout(1, SCORES.value))
WEIGHT_ROWS = gl.constexpr(gl.SliceLayout(0, WEIGHTS.value))
WEIGHT_TOKENS = gl.constexpr(gl.SliceLayout(1, WEIGHTS.value))
COPIED_SCALES = gl.constexpr(gl.BlockedLayout([8], [32], [1], [0]))
SCALES_IN_MEMORY = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


def takes(fmt: StoredFormat) -> bool:
    """Whether tokens begin where an asynchronous copy may, and so does all that is in them."""
    return fmt.pieces is not None and fmt.row_size % 4 == 0 and 1 not in fmt.sections


# compile-time arithmetic -------------------------------------------------------------------------


@gluon.constexpr_function
def num_sources(fmt):
    return len(fmt.token_row.sources)


@gluon.constexpr_function
def source_start(fmt, source):
    return fmt.token_row.sources[source].start


@gluon.constexpr_function
def source_offset(fmt, source):
    return fmt.token_row.sources[source].offset


@gluon.constexpr_function
def stored_words(fmt, source):
    return fmt.token_row.sources[source].stored


@gluon.constexpr_function
def is_split_source(fmt, source):
    return fmt.token_row.sources[source].split


@gluon.constexpr_function
def used_columns(fmt):
    """Words of a row that are copied."""
    return fmt.token_row.used


@gluon.constexpr_function
def columns(fmt):
    """Words of a row in shared memory."""
    return fmt.token_row.width


@gluon.constexpr_function
def copied_layout(fmt):
    """As many words at once as lie together at an address that is a multiple of so many."""
    words = fmt.token_row.together
    lanes = min(fmt.token_row.width // words, 32)
    return gl.BlockedLayout([1, words], [32 // lanes, lanes], [1, 1], [1, 0])


@gluon.constexpr_function
def layout_in_memory(fmt):
    """In which eight rows of eight words, as tensor cores take them, lie in different banks."""
    width = fmt.token_row.width
    return gl.SwizzledSharedLayout(8, max(64 // width, 1), min(width // 8, 8), [1, 0])


@gluon.constexpr_function
def split_layout(tokens, dim):
    """Of eight words of a token: what ``CODES`` has of the first eight of 16. ``dim`` is that of
    the tokens.
    """
    registers = [[8 << i, 0] for i in range((tokens // 8).bit_length() - 1)]
    if dim == 0:
        registers, shape = [[0, 1], *registers], [tokens, 8]
    else:
        registers, shape = [[0, 1], *[[0, token] for token, _ in registers]], [8, tokens]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], shape)


@gluon.constexpr_function
def columns_layout(width, tokens, dim):
    """How ``width`` columns of tokens are read."""
    return split_layout(tokens, dim) if width == 8 else CODES


@gluon.constexpr_function
def num_terms(fmt):
    return len(fmt.terms)


@gluon.constexpr_function
def term_plane(fmt, term):
    """Its plane group."""
    return fmt.terms[term].plane


@gluon.constexpr_function
def is_split(fmt, term):
    return fmt.terms[term].split


@gluon.constexpr_function
def has_terms(fmt, plane, split):
    """Whether a plane group has terms of a kind."""
    return any((t.plane, t.split) == (plane, split) for t in fmt.terms)


@gluon.constexpr_function
def term_exponent(fmt, term):
    """:func:`term_codes` gives codes times two to this, less 24."""
    return fmt.terms[term].exponent


@gluon.constexpr_function
def term_middle(fmt, term):
    """What a term has of the code of zero."""
    return fmt.terms[term].middle


@gluon.constexpr_function
def num_term_sources(fmt, term):
    return len(fmt.terms[term].sources)


@gluon.constexpr_function
def term_source(fmt, term, index):
    return fmt.terms[term].sources[index]


@gluon.constexpr_function
def term_ptx(fmt, term, half):
    return fmt.terms[term].ptx(half)


@gluon.constexpr_function
def term_constraints(fmt, term):
    return "=&r" + ",r" * len(fmt.terms[term].sources)


# copies ------------------------------------------------------------------------------------------


@gluon.jit
def tile_memory(fmt: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr):
    """Room for the rows of tiles."""
    shape: gl.constexpr = [STAGES, BLOCK_N, columns(fmt)]
    return gl.allocate_shared_memory(gl.int16, shape, layout_in_memory(fmt))


@gluon.jit
def copy_tokens(memory, stage, qdata, first_row, last, fmt: gl.constexpr, BLOCK_N: gl.constexpr):
    """Begin to copy the tokens ``first_row + [0, BLOCK_N)``, of which ``last`` is the last there
    is; None if all are there.
    """
    layout: gl.constexpr = copied_layout(fmt)
    token = gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
    if last is not None:
        token = gl.minimum(token, last)
    column = gl.arange(0, columns(fmt), gl.SliceLayout(0, layout))
    word = column
    for s in gl.static_range(num_sources(fmt)):
        if stored_words(fmt, s) < 8:
            repeated = (column - source_start(fmt, s)) % stored_words(fmt, s)
            repeated += source_offset(fmt, s)
            word = gl.where(column >= source_start(fmt, s), repeated, word)
    rows = (qdata + first_row * fmt.row_size).to(gl.pointer_type(gl.int16))
    pointers = rows + ((token * (fmt.row_size // 2))[:, None] + word[None, :])
    if used_columns(fmt) < columns(fmt):
        keep = (column < used_columns(fmt))[None, :] & (token >= 0)[:, None]
        copy_to_shared(memory.index(stage), pointers, mask=keep)
    else:
        copy_to_shared(memory.index(stage), pointers)


@gluon.jit
def copy_scales(memory, stage, scale, first_row, BLOCK_N: gl.constexpr):
    """The same of scales; all tokens are there."""
    token = gl.arange(0, BLOCK_N, COPIED_SCALES)
    copy_to_shared(memory.index(stage), scale + first_row + token)


# operands ----------------------------------------------------------------------------------------


@gluon.jit
def key_words(memory, stage, fmt: gl.constexpr):
    """The sources of keys, tokens first."""
    tile = memory.index(stage)
    rows = tile.load(columns_layout(tile.shape[1], tile.shape[0], 0))
    return sources_in_rows(rows, 0, fmt)


@gluon.jit
def value_words(memory, stage, fmt: gl.constexpr):
    """The sources of values, tokens last."""
    tile = memory.index(stage).permute((1, 0))
    rows = tile.load(columns_layout(tile.shape[0], tile.shape[1], 1))
    return sources_in_rows(rows, 1, fmt)


@gluon.jit
def half_columns(x, dim: gl.constexpr):
    """The first and the second half of the columns of a tile; ``dim`` is that of the tokens."""
    if dim == 0:
        tokens: gl.constexpr = x.shape[0]
        width: gl.constexpr = x.shape[1] // 2
        halves = gl.permute(gl.reshape(x, [tokens, 2, width]), (0, 2, 1))
    else:
        tokens: gl.constexpr = x.shape[1]
        width: gl.constexpr = x.shape[0] // 2
        halves = gl.permute(gl.reshape(x, [2, width, tokens]), (1, 2, 0))
    first, second = gl.split(halves)
    layout: gl.constexpr = columns_layout(width, tokens, dim)
    first = gl.convert_layout(first, layout, assert_trivial=True)
    return first, gl.convert_layout(second, layout, assert_trivial=True)


@gluon.jit
def all_columns(x, width: gl.constexpr, dim: gl.constexpr):
    """The columns of a tile, ``width`` at a time."""
    if x.shape[1 - dim] == width:
        parts = (x,)
    else:
        first, second = half_columns(x, dim)
        parts = all_columns(first, width, dim) + all_columns(second, width, dim)
    return parts


@gluon.constexpr_function
def part_of(fmt, source, width):
    return fmt.token_row.sources[source].start // width


@gluon.jit
def sources_in_rows(rows, dim: gl.constexpr, fmt: gl.constexpr):
    """The sources of a tile, in the layouts of ``columns_layout``."""
    words = ()
    if columns(fmt) > 8:
        parts = all_columns(rows, 16, dim)
    for s in gl.static_range(num_sources(fmt)):
        if columns(fmt) == 8:
            words += (columns_in_place(rows, dim, fmt, s),)
        elif is_split_source(fmt, s):
            part = half_columns(parts[part_of(fmt, s, 16)], dim)[part_of(fmt, s, 8) % 2]
            words += (columns_in_place(part, dim, fmt, s),)
        else:
            words += (parts[part_of(fmt, s, 16)],)
    return words


@gluon.jit
def columns_in_place(words, dim: gl.constexpr, fmt: gl.constexpr, source: gl.constexpr):
    """Words of which one stands for several columns, each with its bits where the first has them.

    ``dim`` is that of the tokens.
    """
    count: gl.constexpr = stored_words(fmt, source)
    if count < 8:
        column = gl.arange(0, 8, gl.SliceLayout(dim, words.type.layout))
        distance = gl.expand_dims(column // count * count, dim)
        distance = gl.broadcast(distance, words.to(gl.int32))[0]
        words = gl.inline_asm_elementwise(
            "shr.b32 $0, $1, $2;", "=r,r,r,r", [words, distance],
            dtype=gl.int16, is_pure=True, pack=2,
        )  # fmt: skip
    return words


@gluon.jit
def masked_codes(words, term: gl.constexpr, half: gl.constexpr, fmt: gl.constexpr):
    """The codes of a term as fp16 subnormals, of a split one a half of them."""
    args = (words[term_source(fmt, term, 0)],)
    if num_term_sources(fmt, term) > 1:
        args += (words[term_source(fmt, term, 1)],)
    if num_term_sources(fmt, term) > 2:
        args += (words[term_source(fmt, term, 2)],)
    return gl.inline_asm_elementwise(
        term_ptx(fmt, term, half), term_constraints(fmt, term), args,
        dtype=gl.float16, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def term_codes(words, term: gl.constexpr, dim: gl.constexpr, fmt: gl.constexpr):
    """The codes of a term as a 16-row operand; ``dim`` is that of the tokens."""
    codes = masked_codes(words, term, 0, fmt)
    if is_split(fmt, term):
        both = gl.join(codes, masked_codes(words, term, 1, fmt))
        if dim == 0:
            both = gl.reshape(gl.permute(both, (0, 2, 1)), [both.shape[0], 16])
        else:
            both = gl.reshape(gl.permute(both, (2, 0, 1)), [16, both.shape[1]])
        codes = gl.convert_layout(both, CODES, assert_trivial=True)
    return codes


@gluon.jit
def split_lanes(x, layout: gl.constexpr):
    """``[16, rows]`` by channel in the order of a split term."""
    halves = gl.permute(gl.reshape(x, [8, 2, x.shape[1]]), (1, 0, 2))
    return gl.convert_layout(gl.reshape(halves, x.shape), layout)


@gluon.jit
def joined_lanes(x, layout: gl.constexpr):
    """Undo :func:`split_lanes`."""
    halves = gl.permute(gl.reshape(x, [2, 8, x.shape[1]]), (1, 0, 2))
    return gl.convert_layout(gl.reshape(halves, x.shape), layout)


@gluon.constexpr_function
def output_factor(fmt, term):
    """Takes the factor of codes back."""
    return 2.0 ** (24 - term_exponent(fmt, term))


@gluon.jit
def plane_output(acc, plane: gl.constexpr, VALUE: gl.constexpr):
    """The sums of a plane group's codes, fp32 ``[16, BLOCK_M]``, and their channels ``[16]``."""
    plain = gl.zeros_like(acc[0])
    split = gl.zeros_like(acc[0])
    for i in gl.static_range(num_terms(VALUE)):
        if term_plane(VALUE, i) == plane:
            if is_split(VALUE, i):
                split += acc[i] * output_factor(VALUE, i)
            else:
                plain += acc[i] * output_factor(VALUE, i)
    lane = gl.arange(0, 16, TOKENS)
    if has_terms(VALUE, plane, False) and has_terms(VALUE, plane, True):
        plain += joined_lanes(split, SCORES)
    elif has_terms(VALUE, plane, True):
        plain = split
        lane = lane % 8 * 2 + lane // 8
    return plain, 16 * plane + lane
