"""Launchers: check what the kernels assume, choose the grid, launch. Callables as in ``reference``.

An ``Extent`` here is either host numbers or ``(positions, row)``, read on the device: nothing below
waits for the GPU, and every grid follows from shapes alone, so a CUDA graph of these launches stays
right as lengths grow.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# Triton's launches take plain numbers for constexpr parameters, and options beside the parameters.

from __future__ import annotations

import dataclasses
import logging
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from squat_fx.codecs import Kivi, Qjl, codec_from_spec
from squat_fx.kernels import (
    chosen,
    gluon_attend_channel,
    gluon_attend_token,
    gluon_tiles,
    reference,
    triton_append,
    triton_attend,
    triton_attend_token,
    triton_dequantize,
    tuning,
)
from squat_fx.kernels.reference import NOTHING, Arenas, Extent
from squat_fx.kernels.triton_planes import Stored, StoredFormat, stored_format
from squat_fx.layouts import LAYOUTS, Fixed, Format
from squat_fx.layouts.planes import LANES

logger = logging.getLogger(__name__)

DeviceExtent = tuple[Tensor, int]
Side = tuple[Arenas, DeviceExtent, Format]
Write = tuple[Arenas, Tensor, DeviceExtent, Format]

Strides = tuple[int, ...]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NO_STRIDES: Strides = (0, 0, 0)
MOST_SHARES = 128
PROGRAMS_PER_MULTIPROCESSOR = 8
TILES_PER_SHARE = 4


def attend(
    query: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    key: Side,
    value: Side,
    *,
    first: int = -1,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: int,
    softcap: float,
) -> Tensor:
    """See :func:`squat_fx.kernels.reference.attend`; two or three launches, but torch operations
    where a query chooses its keys.

    ``first`` is the row of positions that says where a window begins, -1 if all tokens are seen.
    """
    if key[2].stored_layout.chooses and query.shape[2] == 1:
        sides = (
            chosen.Side(arenas, *positions[row].unbind(), fmt, new)
            for (arenas, (positions, row), fmt), new in ((key, new_key), (value, new_value))
        )
        hidden = key[1][0][first, 0] if first >= 0 else 0
        options = {"first": hidden, "mask": mask, "sinks": sinks, "scale": scale, "causal": causal}
        return chosen.attend_chosen(query, *sides, **options, softcap=softcap)
    (key_arenas, (positions, key_row), key_format), (value_arenas, (_, value_row), _) = key, value
    key_constant, value_constant = stored_format(key[2]), stored_format(value[2])
    query = contiguous_channels(query)
    batch, num_heads, q_len = query.shape[:3]
    num_kv_heads, head_dim = value_arenas.dense.shape[1], value_constant.head_dim
    if new_key is not None and new_value is not None:
        new_key, new_value = like_dense(new_key, key_arenas), like_dense(new_value, value_arenas)
    new_len = 0 if new_key is None else new_key.shape[2]
    mask, mask_strides = _mask_and_strides(mask)
    work = _Attention(
        query=query,
        key=stored(key_arenas, key_constant),
        value=stored(value_arenas, value_constant),
        formats=(key_constant, value_constant),
        positions=positions,
        first_row=first,
        new=(new_key, new_value),
        new_len=new_len,
        output=query.new_empty((batch, num_heads, q_len, head_dim)),
        num_kv_heads=num_kv_heads,
        mask=mask,
        mask_strides=mask_strides,
        sinks=sinks,
        scale=scale,
        causal=causal,
        softcap=softcap,
    )
    with _on(query.device):
        if key_constant.per_token and value_constant.per_token:
            _check_packed_in_step(key_format, value[2])
            _attend_per_token(work, key_row)
        else:
            most = key_arenas.packed[0].shape[2] + key_format.dense_length + new_len
            _attend_per_channel(work, key_row, value_row, most)
    return work.output


@dataclasses.dataclass(frozen=True)
class _Attention:
    """What the kernels of both layouts are given."""

    query: Tensor
    key: Stored
    value: Stored
    formats: tuple[StoredFormat, StoredFormat]
    positions: Tensor
    first_row: int
    new: tuple[Tensor | None, Tensor | None]
    new_len: int
    output: Tensor
    num_kv_heads: int
    mask: Tensor | None
    mask_strides: tuple[int, int, int, int]
    sinks: Tensor | None
    scale: float
    causal: int
    softcap: float

    @property
    def heads(self) -> int:
        """KV heads of all sequences."""
        return self.query.shape[0] * self.num_kv_heads

    @property
    def is_window(self) -> bool:
        """Whether older tokens than those that are seen may be there."""
        return self.first_row >= 0

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share a KV head."""
        return self.query.shape[1] // self.num_kv_heads

    @property
    def rows(self) -> int:
        """Query rows of a KV head."""
        return self.query.shape[2] * self.queries_per_kv

    @property
    def widest(self) -> int:
        """Channels of a key or a value."""
        return max(fmt.head_dim for fmt in self.formats)

    def partial(self, left: int) -> tuple[Tensor, Tensor, Tensor]:
        """Room for ``left`` outputs of each row, their maxima and their sums."""
        rows, head_dim = self.heads * self.rows, self.formats[1].head_dim
        partial = self.query.new_empty((rows, left, head_dim), dtype=torch.float32)
        maximum, total = partial.new_empty((2, rows, left))
        return partial, maximum, total

    def strides(self) -> tuple[Strides, ...]:
        """Those of the query, the new tokens and the mask."""
        return (
            self.query.stride()[:3],
            _strides(self.new[0]),
            _strides(self.new[1]),
            self.mask_strides,
        )


def _attend_per_channel(work: _Attention, key_row: int, value_row: int, most_tokens: int) -> None:
    """``planes/channel`` and exact storage."""
    block_m, num_warps = triton_attend.tile(work.rows, work.widest)
    blocks = triton.cdiv(work.rows, block_m)
    block_n, device = triton_attend.BLOCK_N, work.query.device
    q_len, head_dim = work.query.shape[2], work.formats[1].head_dim
    swapped = None
    per_channel = all(fmt.layout == "planes/channel" for fmt in work.formats)
    plain = work.mask is None and work.causal == reference.NO_CAUSALITY and work.softcap == 0
    few = (
        plain
        and not work.is_window
        and work.rows <= gluon_attend_channel.BLOCK_M
        and _tokens_take_rows(work)
    )
    if per_channel and few and gluon_attend_channel.takes(*work.formats):
        swapped = _choice("planes/channel", work).for_group(work.formats[0].token_group)
        shares = 1
        lefts = _chosen_shares(swapped, work) + shares
    else:
        shares = lefts = num_shares(work.heads * blocks, most_tokens, block_n, device)
    left = work.partial(lefts)
    triton_attend.attend_kernel[(work.heads, blocks, shares)](
        work.query, *work.new, work.key, work.value, work.positions, key_row, value_row,
        work.first_row, work.mask, *left, work.num_kv_heads, q_len, work.new_len, work.scale,
        lefts, *work.strides(),
        *work.formats, work.queries_per_kv, work.causal, work.softcap,
        REST=swapped is not None, WINDOW=work.is_window, TILES=TILES_PER_SHARE,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=triton_attend.NUM_STAGES,
    )  # fmt: skip
    if swapped is not None:
        gluon_attend_channel.swapped_attend_kernel[(work.heads, 1, lefts - shares)](
            work.query, work.key, work.value, work.positions, key_row, value_row, *left,
            work.num_kv_heads, q_len, work.scale, work.strides()[0],
            *work.formats, work.queries_per_kv, TILES=swapped.tiles,
            BLOCK_M=gluon_attend_channel.BLOCK_M, BLOCK_N=swapped.block_n, STAGES=swapped.stages,
            num_warps=1, **_early(device),
        )  # fmt: skip
    block_d = triton_attend.MERGE_BLOCK_D
    triton_attend.merge_kernel[(work.heads * work.rows, triton.cdiv(head_dim, block_d))](
        *left, work.sinks, work.output, work.query.shape[1], q_len, lefts,
        HEAD_DIM=head_dim, BLOCK_S=triton.next_power_of_2(lefts), BLOCK_D=block_d,
    )  # fmt: skip


def _attend_per_token(work: _Attention, row: int) -> None:
    """``planes/token``."""
    q_len, device = work.query.shape[2], work.query.device
    block_m, num_warps = triton_attend_token.tile(work.rows)
    blocks = triton.cdiv(work.rows, block_m)
    swapped = None
    if _tokens_take_rows(work) and all(map(gluon_tiles.takes, work.formats)):
        block_m, swapped = gluon_attend_token.tile(
            work.rows, *work.formats, _choice("planes/token", work)
        )
        blocks = triton.cdiv(work.rows, block_m)
    block_n = triton_attend_token.BLOCK_N
    if swapped is not None:
        shares = _chosen_shares(swapped, work, blocks)
    else:
        shares = num_shares(work.heads * blocks, work.key.capacity, block_n, device)
    left = work.partial(shares + 1)  # the last is that of the exact tokens

    all_rows = work.heads * work.rows
    latent_query: tuple[Tensor | None, ...] = (None, None, None)
    if swapped is None or work.key.basis is not None:
        latent_query = _prepare(work, row, left, shares, with_exact=swapped is None)
    if swapped is not None:
        gluon_attend_token.swapped_attend_kernel[(work.heads, blocks, 1 + shares)](
            work.query, *work.new, work.key, work.value, work.positions, row,
            work.first_row, work.mask, *latent_query, *left,
            work.num_kv_heads, q_len, work.new_len, work.scale,
            *work.strides(), *work.formats, work.queries_per_kv, work.causal, work.softcap,
            WINDOW=work.is_window, TILES=swapped.tiles, BLOCK_M=block_m,
            BLOCK_N=swapped.block_n, STAGES=swapped.stages,
            EXACT_BLOCK_N=gluon_attend_token.EXACT_BLOCK_N, PADDED_D=padded(work.widest),
            num_warps=1, **_early(device),
        )  # fmt: skip
    else:
        half = work.query.dtype != torch.float32
        triton_attend_token.attend_kernel[(work.heads, blocks, shares)](
            work.key, work.value, work.positions, row, work.first_row, work.mask, *latent_query,
            *left, work.num_kv_heads, q_len, work.new_len, work.scale, work.mask_strides,
            *work.formats, work.queries_per_kv, work.causal, work.softcap,
            WINDOW=work.is_window, HALF=half, ASM=takes_asm(triton_attend_token.attend_kernel),
            TILES=TILES_PER_SHARE, BLOCK_M=block_m, BLOCK_N=block_n,
            num_warps=num_warps, num_stages=triton_attend_token.NUM_STAGES,
        )  # fmt: skip
    bases = work.num_kv_heads if work.value.basis_stride else 1
    head_dim, has_matrix = work.formats[1].head_dim, work.value.basis is not None
    rows, num_warps = triton_attend_token.merge_tile(shares, head_dim, has_matrix)
    row_blocks = triton.cdiv(all_rows // bases, rows)
    block_d = _rotated_channels(work.value, head_dim, head_dim)
    triton_attend_token.merge_kernel[(row_blocks * bases, triton.cdiv(head_dim, block_d))](
        *left, work.sinks, work.value, work.output, work.query.shape[1], q_len, shares,
        all_rows // bases, row_blocks, bases, work.formats[1], work.queries_per_kv,
        PADDED_D=padded(head_dim), BLOCK_M=rows, BLOCK_S=triton.next_power_of_2(shares),
        BLOCK_D=block_d, num_warps=num_warps, **_early(device),
    )  # fmt: skip


def _prepare(
    work: _Attention, row: int, left: tuple[Tensor, ...], shares: int, with_exact: bool
) -> tuple[Tensor, ...]:
    """Rotate the query; ``with_exact`` attend to the exact tokens beside it."""
    key_format, q_len = work.formats[0], work.query.shape[2]
    block_m, _ = triton_attend_token.tile(work.rows)
    all_rows = work.heads * work.rows
    latent = work.query.new_empty((all_rows, LANES * key_format.num_planes), dtype=torch.float32)
    latent_query = (latent, *latent.new_empty((2, all_rows)))
    bases = work.num_kv_heads if work.key.basis_stride else 1
    rotated_rows = triton_attend_token.ROTATED_ROWS
    row_blocks = triton.cdiv(all_rows // bases, rotated_rows)
    block_d = _rotated_channels(work.key, key_format.head_dim, work.widest)
    rotations = row_blocks * bases * triton.cdiv(LANES * key_format.num_planes, block_d)
    exact_n = triton_attend_token.exact_block_n(work.widest, work.query.element_size())
    exact = work.heads * triton.cdiv(work.rows, block_m) if with_exact else 0
    triton_attend_token.prepare_kernel[(rotations + exact,)](
        work.query, *work.new, work.key, work.value, work.positions, row, work.first_row, work.mask,
        *latent_query, *left, work.num_kv_heads, q_len, work.new_len, work.scale,
        shares, all_rows // bases, row_blocks, bases, work.heads, *work.strides(),
        *work.formats, work.queries_per_kv, work.causal, work.softcap, WINDOW=work.is_window,
        BLOCK_M=block_m, BLOCK_N=exact_n, PADDED_D=padded(work.widest),
        BLOCK_R=rotated_rows, BLOCK_D=block_d,
        num_warps=triton_attend_token.PREPARE_WARPS,
    )  # fmt: skip
    return latent_query


def _rotated_channels(tensors: Stored, head_dim: int, widest: int) -> int:
    """Channels that a program rotates at once: all of them unless it has to hold a matrix."""
    return padded(widest) if tensors.basis is None else triton_attend_token.matrix_block(head_dim)


def _tokens_take_rows(work: _Attention) -> bool:
    """Whether the Gluon kernels take this attention, if they take its formats."""
    return (
        work.query.dtype in (torch.float16, torch.bfloat16)
        and work.rows <= gluon_attend_token.LARGEST_BLOCK_M
        and work.key.capacity % gluon_attend_token.CAPACITY_MULTIPLE == 0
        and work.value.capacity % gluon_attend_token.CAPACITY_MULTIPLE == 0
        and runs_gluon(work.query.device)
    )


def _check_packed_in_step(key: Format, value: Format) -> None:
    """The same tokens of keys and values are packed.

    Raises:
        ValueError: the formats would pack different ones.
    """
    for name in ("residual_length", "sink_length", "token_group"):
        if getattr(key, name) != getattr(value, name):
            raise ValueError(
                f"keys and values in the layout planes/token must have the same {name}, "
                f"got {getattr(key, name)} and {getattr(value, name)}"
            )


def quantize(
    x: Tensor,
    valid: Tensor | None,
    fmt: Format,
    fixed: Fixed = NOTHING,
    feedback: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """See :func:`squat_fx.kernels.reference.quantize`; one launch."""
    if fmt.layout == "dense" or not rounds_in_kernel(fmt, feedback is not None):
        return reference.quantize(x, valid, fmt, fixed, feedback)
    # A prompt of whole groups, of which nothing stays exact.
    learned = {name: t.contiguous() for name, t in fixed.items() if t.numel()}
    affine = "affine" in learned
    fmt = dataclasses.replace(fmt, residual_length=0, sink_length=0, affine=affine)
    arenas = reference.empty_arenas(x, x.shape[2], fmt).with_fixed(**learned)
    extent = _on_device(Extent(0, 0), x)
    _pack(arenas, contiguous_channels(x), valid, extent, fmt, feedback)
    return arenas.packed


def write(
    arenas: Arenas,
    new: Tensor,
    valid: Tensor | None,
    extent: Extent | DeviceExtent,
    fmt: Format,
    feedback: Tensor | None = None,
) -> None:
    """See :func:`squat_fx.kernels.reference.write`; one launch for one token, else two or three."""
    positions, row = _on_device(extent, new)
    new = like_dense(new, arenas)
    batch, heads, new_len = new.shape[:3]
    in_kernel = rounds_in_kernel(fmt, feedback is not None)
    constant = stored_format(fmt)
    tensors = stored(arenas, constant)
    valid, valid_strides = _valid_and_strides(valid, batch)
    common = (positions, row, heads)
    block_t = triton_append.BLOCK_T
    with _on(new.device):
        if new_len == 1 and in_kernel and feedback is None:
            triton_append.append_kernel[(batch * heads,)](
                tensors, new, _strides(new), valid, valid_strides, *common, constant,
                num_warps=_append_warps(tensors, constant), **_early(new.device),
            )  # fmt: skip
            return
        if valid is not None:
            triton_append.start_kernel[(batch,)](
                arenas.start, valid, valid_strides, positions, row, new_len, BLOCK_T=1024
            )
        pack = _pack if in_kernel else _pack_in_torch
        pack(arenas, new, valid, (positions, row), fmt, feedback)
        triton_append.ring_kernel[(batch * heads, triton.cdiv(constant.dense_length, block_t))](
            tensors, new, _strides(new), *common, new_len, constant, BLOCK_T=block_t
        )


def write_both(key: Write, value: Write, valid: Tensor | None) -> None:
    """See :func:`squat_fx.kernels.reference.write_both`; one launch for one token of each."""
    if any(new.shape[2] > 1 or not rounds_in_kernel(fmt) for _, new, _, fmt in (key, value)):
        for arenas, new, extent, fmt in (key, value):
            write(arenas, new, valid, extent, fmt)
        return
    (key_arenas, new_key, (positions, key_row), _) = key
    (value_arenas, new_value, (_, value_row), _) = value
    new_key, new_value = like_dense(new_key, key_arenas), like_dense(new_value, value_arenas)
    batch, heads = new_key.shape[:2]
    formats = stored_format(key[3]), stored_format(value[3])
    tensors = stored(key_arenas, formats[0]), stored(value_arenas, formats[1])
    valid, valid_strides = _valid_and_strides(valid, batch)
    num_warps = max(_append_warps(*side) for side in zip(tensors, formats, strict=True))
    with _on(new_key.device):
        triton_append.append_both_kernel[(batch * heads, 2)](
            *tensors, new_key, new_value, _strides(new_key), _strides(new_value),
            valid, valid_strides, positions, key_row, value_row, heads, *formats,
            num_warps=num_warps, **_early(new_key.device),
        )  # fmt: skip


def _append_warps(tensors: Stored, fmt: StoredFormat) -> int:
    """Warps for one new token: one, unless a group of tokens or a matrix is more work."""
    return 1 if fmt.per_token and tensors.basis is None else 4


def _early(device: torch.device) -> dict[str, bool]:
    """Arguments of a kernel that waits for the launch before where it needs it."""
    early = launches_early(device)
    return {"DEPENDENT": early, **({"launch_pdl": True} if early else {})}


def dense_past(arenas: Arenas, extent: Extent, fmt: Format, first: int = 0) -> Tensor:
    """See :func:`squat_fx.kernels.reference.dense_past`; one launch."""
    batch, heads = arenas.dense.shape[:2]
    length = extent.length - first
    output = arenas.dense.new_empty((batch, heads, length, fmt.head_dim))
    if not output.numel():
        return output
    constant = stored_format(fmt)
    numbers = (
        stored(arenas, constant), output, extent.watermark, heads, first, extent.length, constant
    )  # fmt: skip
    with _on(output.device):
        if constant.per_token:
            block_t, block_d = triton_dequantize.TOKEN_BLOCK_T, padded(fmt.head_dim)
            if numbers[0].basis is not None:
                block_t = triton_dequantize.MATRIX_BLOCK_T
                block_d = min(block_d, triton_dequantize.MATRIX_CHANNELS)
            blocks = triton.cdiv(length, block_t), triton.cdiv(fmt.head_dim, block_d)
            triton_dequantize.dequantize_token_kernel[(batch * heads, *blocks)](
                *numbers, BLOCK_T=block_t, BLOCK_D=block_d, num_warps=block_t // 16
            )
        else:
            block_t = triton_dequantize.BLOCK_T
            grid = (batch * heads, triton.cdiv(length, block_t))
            triton_dequantize.dequantize_kernel[grid](*numbers, BLOCK_T=block_t)
    return output


# rounding ----------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def rounds_in_kernel(fmt: Format, with_feedback: bool = False) -> bool:
    """Whether the kernels know how ``fmt`` rounds; one warning that says why if not."""
    if fmt.layout in ("dense", "planes/token"):
        return True  # exact, or rounded as the layout says
    if fmt.layout != "planes/channel":
        return False
    codec = codec_from_spec(fmt.codec)
    if type(codec).quantize not in (Kivi.quantize, Qjl.quantize):
        reason = f"the Triton kernels do not know the rounding of codec {codec.name!r}"
    elif fmt.channel_group not in (1, fmt.head_dim) and fmt.channel_group % LANES:
        reason = (
            f"a channel group of {fmt.channel_group} is not whole plane groups of {LANES} channels"
        )
    elif with_feedback and fmt.channel_group > 1:
        reason = f"error feedback takes a scale per channel, not per {fmt.channel_group} channels"
    else:
        return True
    _warn_once(reason)
    return False


@lru_cache(maxsize=64)
def _warn_once(reason: str) -> None:
    logger.warning("%s: quantizing with torch operations on the GPU, which is slower", reason)


def _pack(
    arenas: Arenas,
    new: Tensor,
    valid: Tensor | None,
    extent: DeviceExtent,
    fmt: Format,
    feedback: Tensor | None,
) -> None:
    """Pack what leaves the ring when ``new`` comes in."""
    batch, heads, new_len = new.shape[:3]
    constant = stored_format(fmt)
    wide = constant.per_token and fmt.head_dim > triton_append.WIDE
    block_t = triton_append.WIDE_BLOCK_T if wide else triton_append.BLOCK_T
    per_program = fmt.token_group if fmt.token_group > 1 else block_t
    padded_t = triton.next_power_of_2(per_program)
    # A warp of tokens that take part in dots has 16 of them, and all their channels.
    with_dots = constant.per_token or feedback is not None
    valid, valid_strides = _valid_and_strides(valid, batch)
    if feedback is not None:
        feedback = feedback.contiguous()
    with _on(new.device):
        triton_append.pack_kernel[(batch * heads * triton.cdiv(new_len, per_program),)](
            stored(arenas, constant), new, _strides(new), valid, valid_strides, feedback, *extent,
            heads, new_len, constant, BLOCK_T=block_t, PADDED_T=padded_t,
            num_warps=padded_t // 16 if with_dots else 4,
        )  # fmt: skip


def _pack_in_torch(
    arenas: Arenas,
    new: Tensor,
    valid: Tensor | None,
    extent: DeviceExtent,
    fmt: Format,
    feedback: Tensor | None,
) -> None:
    """The same in torch, for any codec.

    As many slots are quantized as could leave the ring; those that do not keep what they hold.
    """
    positions, row = extent
    length, watermark = positions[row].unbind()
    new_len, device = new.shape[2], new.device
    start = arenas.start.long()[:, None]

    def packed(mark: Tensor) -> Tensor:
        return (mark - start - fmt.sink_length).clamp(min=0) // fmt.token_group * fmt.token_group

    before = packed(watermark)
    after = packed(torch.maximum(watermark, length + new_len - fmt.residual_length))
    room = arenas.packed[0].shape[2] * fmt.tokens_per_slot(fmt.packed_names[0])
    span = min(triton.cdiv(new_len, fmt.token_group) * fmt.token_group, room)
    slot = before + torch.arange(span, device=device)  # [batch, span]
    position = slot + fmt.sink_length + start
    column = (position - length).clamp(0, new_len - 1)
    source = torch.where(
        position < length, fmt.sink_length + slot % fmt.ring_length, fmt.dense_length + column
    )
    rows = torch.cat([arenas.dense, new], 2)
    leaving = rows.gather(2, source[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))
    if valid is not None:
        valid = valid.view(torch.bool).expand(new.shape[0], -1).gather(1, column) | (
            position < length
        )
    first = before + fmt.sink_length + start
    found = reference.quantize(leaving, valid, fmt, arenas.fixed, feedback, first_position=first)
    for name, arena, codes in zip(fmt.packed_names, arenas.packed, found, strict=True):
        step = fmt.tokens_per_slot(name)
        # Wrapped around, slots that are not there stay distinct, so that each is written once.
        where = (slot[:, ::step] // step % arena.shape[2])[:, None, :, None].expand_as(codes)
        keep = (slot < after)[:, None, ::step, None]
        arena.scatter_(2, where, torch.where(keep, codes, arena.gather(2, where)))


def padded(head_dim: int) -> int:
    """Channels of a tile that holds a whole head."""
    return max(LANES, 1 << (head_dim - 1).bit_length())


def takes_asm(kernel: Any) -> bool:
    """Whether a kernel may hold PTX: the interpreter and AMD's GPUs do not know it."""
    return isinstance(kernel, JITFunction) and torch.version.hip is None


def num_shares(
    programs: int, tokens: int, block_n: int, device: torch.device,
    tiles: int = TILES_PER_SHARE, per_multiprocessor: int = PROGRAMS_PER_MULTIPROCESSOR,
) -> int:  # fmt: skip
    """Into how many shares to split ``tokens`` at most: enough to fill the GPU, each of ``tiles``
    or more.

    Kernels give a share no fewer either, so that it does not depend on the room in an arena how
    the tokens in it are split.
    """
    wanted = per_multiprocessor * multiprocessors(device) // programs
    most = -(-tokens // (tiles * block_n))
    return max(1, min(wanted, most, MOST_SHARES))


def _choice(layout: str, work: _Attention) -> tuning.Choice:
    """How a Gluon kernel is tiled."""
    return tuning.choice(layout, max(fmt.row_size for fmt in work.formats), work.widest)


def _chosen_shares(chosen: tuning.Choice, work: _Attention, blocks: int = 1) -> int:
    """Shares of its launch, which has so many blocks of query rows."""
    return num_shares(
        work.heads * blocks, work.key.capacity, chosen.block_n, work.query.device,
        chosen.tiles, chosen.programs,
    )  # fmt: skip


def runs_gluon(device: torch.device) -> bool:
    """Whether tensor cores take tiles of 16 x 8 from 16-bit operands, with asynchronous copies."""
    return _capability(device) >= (8, 0)


def launches_early(device: torch.device) -> bool:
    """Whether a kernel may begin while the one before it ends (programmatic dependent launch)."""
    return _capability(device) >= (9, 0)


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of one of NVIDIA's GPUs, zeros of anything else."""
    if device.type != "cuda" or torch.version.hip is not None:
        return (0, 0)
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; the interpreter has one."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


# arguments ---------------------------------------------------------------------------------------


def _on(device: torch.device) -> AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _on_device(extent: Extent | DeviceExtent, like: Tensor) -> DeviceExtent:
    """``extent`` where kernels read it; filled there, since a copy from the host would wait."""
    if not isinstance(extent, Extent):
        return extent
    positions = like.new_zeros((1, 2), dtype=torch.int64)
    for column, number in enumerate((extent.length, extent.watermark)):
        if number:
            positions[:, column].fill_(number)
    return positions, 0


def _valid_and_strides(valid: Tensor | None, batch: int) -> tuple[Tensor | None, Strides]:
    if valid is None:
        return None, (0, 0)
    valid = valid.expand(batch, -1)
    return (valid.view(torch.uint8) if valid.dtype == torch.bool else valid), valid.stride()


def contiguous_channels(x: Tensor) -> Tensor:
    """``x`` with neighbouring channels next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def like_dense(new: Tensor, arenas: Arenas) -> Tensor:
    """``new`` as the dense buffer could hold it."""
    return contiguous_channels(new).to(arenas.dense.dtype)


def _strides(x: Tensor | None) -> Strides:
    """Strides of ``[batch, heads, tokens, channels]`` before the last."""
    return NO_STRIDES if x is None else x.stride()[:3]


def _mask_and_strides(mask: Tensor | None) -> tuple[Tensor | None, Strides]:
    """``mask`` as numbers, and its strides: zero along what it broadcasts."""
    if mask is None:
        return None, (*NO_STRIDES, 0)
    mask = mask[(None,) * (4 - mask.dim())]
    strides = tuple(
        0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)
    )
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask), strides


def stored(arenas: Arenas, constant: StoredFormat) -> Stored:
    """The kernel's view of ``arenas``.

    Raises:
        ValueError: the dtype is not one the kernels compute in, an arena is not contiguous, or a
            head is too long for 32-bit offsets.
    """
    if arenas.dense.dtype not in DTYPES:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(
            f"the Triton kernels take {names}, got {arenas.dense.dtype}; cast the model"
        )
    tensors = (*arenas.packed, arenas.dense, arenas.start, *arenas.fixed.values())
    if not all(t.is_contiguous() for t in tensors):
        raise ValueError(
            "arenas must be contiguous; pass the whole storage, not a slice of its tokens"
        )
    qdata, *parameters = arenas.packed
    named: dict[str, Tensor] = {}
    if not constant.per_token:
        named = {name: t for name, t in arenas.fixed.items() if name in Stored._fields}
        learned = [named.pop(name) for name in ("scale", "zero_point") if name in named]
        parameters = learned + parameters
    scale, zero_point, extra = (*parameters, None, None, None)[:3]
    capacity = qdata.shape[2]
    if capacity * max(constant.row_size, constant.head_dim) >= 2**31:
        raise ValueError(
            f"a head of {capacity} tokens does not fit 32-bit offsets; split the sequence"
        )
    layout = (qdata, scale, zero_point, arenas.dense, arenas.start, capacity)
    if not constant.per_token:
        fixed = next((t for n, t in arenas.fixed.items() if n not in Stored._fields), None)
        if fixed is None and not arenas.fixed:
            made_for = constant.head_dim, constant.widths, qdata.device
            fixed = LAYOUTS[constant.layout].constant(*made_for)
        return Stored(*layout, extra=extra, fixed=fixed, **named)
    affine, basis = arenas.affine if constant.affine else None, arenas.basis
    if basis is None or not basis.numel():
        return Stored(*layout, affine=affine)
    heads, matrix = basis.shape[1], constant.head_dim**2
    return Stored(*layout, affine=affine, basis=basis, basis_stride=matrix, inverse=heads * matrix)
