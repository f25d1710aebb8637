"""The specification of every op, in plain torch.

Read this to know what an op means; kernels are held to it. It runs on any device, and is what runs on CPU.

How a cached tensor is stored (one role, keys or values, of one layer):

* Positions ``t`` count from the first token the model fed, padding included. ``start[b]`` is row ``b``'s first valid
  position; its token ``i`` lies at ``t = start[b] + i``. Tokens before ``start[b]`` are padding and are not stored.
* ``length`` tokens have been stored, and everything older than position ``watermark`` that fills whole groups is packed:
  ``packed = token_group * floor(max(watermark - start - sink_length, 0) / token_group)`` tokens.
* Token ``i`` is in ``dense[i]`` if ``i < sink_length``; else, with ``j = i - sink_length``, it is packed slot ``j`` if
  ``j < packed``, and ``dense[sink_length + j % ring_length]`` otherwise.

``length`` and ``watermark`` are host numbers; they reach an op as a row of the small ``positions`` tensor. Nothing here
counts up: an append writes only where a reader of the old ``length`` and ``watermark`` does not look (``append_`` of more
than one token may reuse ring slots, so its caller hands it a copy of ``dense``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from squat_fx.codecs import Format, codec_from_spec
from squat_fx.codecs.planes import pack, unpack

NO_CAUSALITY, TOP_LEFT, BOTTOM_RIGHT = 0, 1, 2


@dataclass(frozen=True)
class Arenas:
    """The tensors of one role: ``packed`` in the order of ``Format.packed_names``, dims ``[batch, heads, slots, n]``.

    ``dense`` is ``[batch, heads, dense_length, head_dim]`` and ``start`` int32 ``[batch]``.
    """

    packed: tuple[Tensor, ...]
    dense: Tensor
    start: Tensor


@dataclass(frozen=True)
class Extent:
    """How much of an arena is meant: the first ``length`` tokens, packed up to ``watermark``."""

    length: int
    watermark: int

    @classmethod
    def at(cls, positions: Tensor, row: int) -> Extent:
        """Read ``row`` of a positions tensor, int64 ``[handles, 2]``."""
        length, watermark = positions[row].tolist()
        return cls(length, watermark)

    def after(self, new_tokens: int, fmt: Format) -> Extent:
        """The extent once ``new_tokens`` more are stored."""
        length = self.length + new_tokens
        return Extent(length, max(self.watermark, length - fmt.residual_length))

    def packed(self, start: int, fmt: Format) -> int:
        """Packed tokens of a row that starts at ``start``."""
        return max(self.watermark - start - fmt.sink_length, 0) // fmt.token_group * fmt.token_group


# quantize and dequantize whole groups ------------------------------------------------------------------------------------


def quantize(x: Tensor, valid: Tensor | None, fmt: Format) -> tuple[Tensor, ...]:
    """Pack ``x`` ``[batch, heads, tokens, head_dim]``, ``tokens`` a multiple of ``token_group``; valid ``[batch, tokens]``."""
    if fmt.layout == "dense":
        return (x.contiguous(),)
    groups = _grouped(x.float(), fmt)
    if valid is not None:
        valid = valid.unflatten(1, (-1, fmt.token_group))[:, None, :, :, None, None]
    codes, scale, zero_point = codec_from_spec(fmt.codec).quantize(groups, valid, fmt.widths[0])
    codes = codes.flatten(-2)[..., : fmt.head_dim].flatten(2, 3)
    return pack(codes, fmt.widths), scale.squeeze(5).squeeze(3), zero_point.squeeze(5).squeeze(3)


def dequantize_groups(packed: tuple[Tensor, ...], fmt: Format, dtype: torch.dtype) -> Tensor:
    """Undo :func:`quantize`: ``[batch, heads, tokens, head_dim]`` in ``dtype``; fp32 arithmetic."""
    if fmt.layout == "dense":
        return packed[0].to(dtype)
    qdata, scale, zero_point = packed
    codes = unpack(qdata, fmt.head_dim, fmt.widths).float()
    groups = _grouped(codes, fmt)
    # [batch, heads, token groups, channel groups] against [.., token groups, tokens, channel groups, channels]
    scale, zero_point = (p.float()[:, :, :, None, :, None] for p in (scale, zero_point))
    x = groups.mul_(scale).add_(zero_point) if groups.is_contiguous() else groups * scale + zero_point
    return x.flatten(-2)[..., : fmt.head_dim].flatten(2, 3).to(dtype)


def _grouped(x: Tensor, fmt: Format) -> Tensor:
    """``[batch, heads, token groups, tokens, channel groups, channels]``; a ragged last channel group repeats its end."""
    if ragged := fmt.channel_groups * fmt.channel_group - fmt.head_dim:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], ragged)], -1)
    return x.unflatten(-1, (-1, fmt.channel_group)).unflatten(2, (-1, fmt.token_group))


# reading and writing arenas ----------------------------------------------------------------------------------------------


def dense_past(arenas: Arenas, extent: Extent, fmt: Format) -> Tensor:
    """The stored tokens as numbers, ``[batch, heads, length, head_dim]`` in the dense buffer's dtype; zeros for padding."""
    dense, length = arenas.dense, extent.length
    starts = arenas.start.tolist()
    counts = [extent.packed(start, fmt) for start in starts]
    most = max(counts, default=0)
    slots = -(-most // fmt.token_group)
    packed = tuple(
        arena[:, :, : most // fmt.tokens_per_slot(name) if name == "qdata" else slots]
        for name, arena in zip(fmt.packed_names, arenas.packed, strict=True)
    )
    numbers = dequantize_groups(packed, fmt, dense.dtype)
    if len(set(starts)) <= 1:
        start, count = (starts[0], counts[0]) if starts else (0, 0)
        row_length = max(length - start, 0)
        ring = _ring_slots(count, row_length - fmt.sink_length, fmt, dense.device)
        pieces = [dense[:, :, : min(fmt.sink_length, row_length)], numbers, dense.index_select(2, ring)]
        if pads := length - row_length:
            pieces.insert(0, dense.new_zeros(*dense.shape[:2], pads, dense.shape[3]))
        return torch.cat(pieces, 2)
    token = torch.arange(length, device=dense.device) - arenas.start[:, None].long()  # [batch, length]
    index = _source_slot(token, torch.tensor(counts, device=dense.device)[:, None], fmt)
    rows = torch.cat([dense, numbers], 2)
    gathered = rows.gather(2, index.clamp(min=0)[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))
    return gathered.masked_fill_((token < 0)[:, None, :, None], 0.0)


def write(arenas: Arenas, new: Tensor, valid: Tensor | None, extent: Extent, fmt: Format) -> None:
    """Append ``new`` ``[batch, heads, tokens, head_dim]`` after ``extent``: into the ring, packing what leaves it.

    ``valid`` is bool ``[batch, tokens]``. Rows that hold no token yet start at their first valid new one.
    """
    new_tokens, device = new.shape[2], new.device
    after = extent.after(new_tokens, fmt)
    if valid is not None:
        leading = valid.int().argmax(1) + new_tokens * ~valid.any(1)
        empty = arenas.start >= extent.length
        arenas.start.copy_(torch.where(empty, extent.length + leading, arenas.start))
    starts = arenas.start.tolist()
    before_counts = [extent.packed(start, fmt) for start in starts]
    after_counts = [after.packed(start, fmt) for start in starts]
    span = max((a - b for a, b in zip(after_counts, before_counts, strict=True)), default=0)
    start = arenas.start.long()[:, None]
    if span:
        first = torch.tensor(before_counts, device=device)[:, None]
        end = torch.tensor(after_counts, device=device)[:, None]
        slot = first + torch.arange(span, device=device)  # packed slots, [batch, span]
        token = slot + fmt.sink_length
        position = token + start
        source = torch.where(
            position < extent.length,
            fmt.sink_length + slot % fmt.ring_length,
            fmt.dense_length + (position - extent.length).clamp(0, new_tokens - 1),
        )
        rows = torch.cat([arenas.dense, new], 2)
        leaving = rows.gather(2, source[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))
        leaving_valid = None
        if valid is not None:
            column = (position - extent.length).clamp(0, new_tokens - 1)
            leaving_valid = valid.expand(new.shape[0], -1).gather(1, column) | (position < extent.length)
        packed = quantize(leaving, leaving_valid, fmt)
        _scatter_packed(arenas.packed, packed, slot, slot < end, fmt)
    token = torch.arange(extent.length, after.length, device=device) - start  # [batch, tokens]
    in_ring = token - fmt.sink_length >= torch.tensor(after_counts, device=device)[:, None]
    keep = (token >= 0) & ((token < fmt.sink_length) | in_ring)
    slot = torch.where(token < fmt.sink_length, token, fmt.sink_length + (token - fmt.sink_length) % fmt.ring_length)
    batch, column = keep.nonzero(as_tuple=True)
    arenas.dense[batch, :, slot[batch, column]] = new.transpose(1, 2)[batch, column].to(arenas.dense.dtype)


def truncate(arenas: Arenas, before: Extent, after: Extent, fmt: Format) -> None:
    """Forget the tokens from ``after.length`` on: what is left of a packed group goes back into the ring, as numbers."""
    starts = arenas.start.tolist()
    arenas.start.clamp_(max=after.length)  # a row of nothing but padding starts with its next token
    for row, start in enumerate(starts):
        count, kept = before.packed(start, fmt), after.packed(start, fmt)
        left = min(count, after.length - start - fmt.sink_length) - kept
        if count == kept or left <= 0:
            continue
        group = tuple(
            arena[row : row + 1, :, slice(*(n // fmt.tokens_per_slot(name) for n in (kept, kept + fmt.token_group)))]
            for name, arena in zip(fmt.packed_names, arenas.packed, strict=True)
        )
        numbers = dequantize_groups(group, fmt, arenas.dense.dtype)[0, :, :left]
        arenas.dense[row].index_copy_(1, _ring_slots(kept, kept + left, fmt, numbers.device), numbers)


def empty_arenas(like: Tensor, capacity: int, fmt: Format) -> Arenas:
    """Unwritten arenas with room for ``capacity`` packed tokens, for tensors like ``like`` ``[batch, heads, _, head_dim]``."""
    batch, heads = like.shape[:2]
    packed = tuple(
        like.new_zeros(
            (batch, heads, capacity // fmt.tokens_per_slot(name), fmt.last_dim(name)),
            dtype=arena_dtype(name, fmt, like.dtype),
        )
        for name in fmt.packed_names
    )
    dense = like.new_zeros((batch, heads, fmt.dense_length, fmt.head_dim))
    return Arenas(packed, dense, like.new_zeros((batch,), dtype=torch.int32))


def arena_dtype(name: str, fmt: Format, dtype: torch.dtype) -> torch.dtype:
    """The dtype of arena ``name`` for a cache of ``dtype``."""
    if name == "start":
        return torch.int32
    if name == "dense" or fmt.layout == "dense":
        return dtype
    return torch.uint8 if name == "qdata" else torch.float16


def _ring_slots(count: int, end: int, fmt: Format, device: torch.device) -> Tensor:
    """Dense slots of the unpacked tokens ``count <= j < end`` of a row."""
    return fmt.sink_length + torch.arange(count, max(end, count), device=device) % fmt.ring_length


def _source_slot(token: Tensor, counts: Tensor, fmt: Format) -> Tensor:
    """Where token ``i`` of a row lies in ``cat([dense, packed tokens])``; negative for padding."""
    j = token - fmt.sink_length
    recent = torch.where(j < counts, fmt.dense_length + j, fmt.sink_length + j % fmt.ring_length)
    return torch.where(token < fmt.sink_length, token, recent)


def _scatter_packed(
    arenas: tuple[Tensor, ...], packed: tuple[Tensor, ...], slot: Tensor, keep: Tensor, fmt: Format
) -> None:
    """Write packed groups to ``slot`` (packed token slots, ``[batch, span]``), where ``keep``."""
    for name, arena, new in zip(fmt.packed_names, arenas, packed, strict=True):
        step = fmt.tokens_per_slot(name)
        batch, column = keep[:, ::step].nonzero(as_tuple=True)
        arena[batch, :, slot[:, ::step][batch, column] // step] = new.transpose(1, 2)[batch, column]


# attention ---------------------------------------------------------------------------------------------------------------


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: int,
    softcap: float,
) -> Tensor:
    """Scaled dot-product attention with grouped query heads, as one formula.

    ``softmax(softcap(scale * query @ key.T) + mask) @ value``, ``softcap(s) = softcap * tanh(s / softcap)``; a bool mask
    is True where a query attends. ``causal`` is ``NO_CAUSALITY``, ``TOP_LEFT`` (query ``i`` sees keys up to ``i``; torch's
    ``is_causal``) or ``BOTTOM_RIGHT`` (up to ``i + kv_len - q_len``). ``sinks`` ``[num_heads]`` are logits that take part
    in the normalisation and carry no value. A row that may attend nowhere gives zeros.

    Shapes: query ``[batch, num_heads, q_len, head_dim]``, key and value ``[batch, num_kv_heads, kv_len, head_dim]``,
    mask broadcastable to ``[batch, num_heads, q_len, kv_len]``.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    if causal != NO_CAUSALITY:
        offset = kv_len - q_len if causal == BOTTOM_RIGHT else 0
        visible = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).tril(offset)
        mask = visible if mask is None else _both(mask, visible)
    gqa = query.shape[1] != key.shape[1]
    if sinks is None and not softcap:
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=gqa)
    if gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = (query.float() @ key.float().transpose(-1, -2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    if sinks is not None:
        column = sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    probs = torch.softmax(scores, -1).nan_to_num(0.0)[..., :kv_len]
    return (probs @ value.float()).to(query.dtype)


def _both(mask: Tensor, visible: Tensor) -> Tensor:
    return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, -torch.inf)


def attend(
    query: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    key: tuple[Arenas, Extent, Format],
    value: tuple[Arenas, Extent, Format],
    *,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: int,
    softcap: float,
) -> Tensor:
    """Attention over the stored tokens and, beside them, the exact new ones."""
    past_key, past_value = dense_past(*key), dense_past(*value)
    full_key = past_key if new_key is None else torch.cat([past_key, new_key.to(past_key.dtype)], 2)
    full_value = past_value if new_value is None else torch.cat([past_value, new_value.to(past_value.dtype)], 2)
    padding = key[0].start
    if padding.any():
        stored = torch.arange(full_key.shape[2], device=padding.device) >= padding[:, None]
        stored = stored[:, None, None, :]
        mask = stored if mask is None else _both(mask, stored)
    return attention(
        query, full_key, full_value, mask=mask, sinks=sinks, scale=scale, causal=causal, softcap=softcap
    )


def valid_tokens(mask: Tensor, new_tokens: int) -> Tensor:
    """Which of the newest tokens any query attends, bool ``[batch, new_tokens]``.

    ``mask`` is ``[batch | 1, heads | 1, q_len | 1, kv_len]``, bool (True = attend) or additive float (padding at or below
    a quarter of the dtype's smallest number).
    """
    newest = mask[..., -new_tokens:]
    if newest.dtype != torch.bool:
        newest = newest > torch.finfo(newest.dtype).min / 4
    return newest.any(2).any(1).expand(-1, new_tokens)
