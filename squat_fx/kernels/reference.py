"""The specification of every op, in plain torch.

Read this to know what an op means; kernels are held to it. It runs on any device, and is what runs
on CPU.

How a cached tensor is stored (one role, keys or values, of one layer):

* Positions ``t`` count from the first token the model fed, padding included. ``start[b]`` is row
  ``b``'s first valid position; its token ``i`` lies at ``t = start[b] + i``. Tokens before
  ``start[b]`` are padding and are not stored.
* ``length`` tokens have been stored, and everything older than position ``watermark`` that fills
  whole groups is packed: ``packed = token_group * floor(max(watermark - start - sink_length, 0) /
  token_group)`` tokens.
* Token ``i`` is in ``dense[i]`` if ``i < sink_length``; else, with ``j = i - sink_length``, it is
  packed slot ``j`` if ``j < packed``, and ``dense[sink_length + j % ring_length]`` otherwise.
* A reader may see a window only: the tokens from ``first`` on. What no reader sees any more is
  dropped from the front of a row (``drop_front``), which moves its ``start`` and no other position;
  its first ``sink_length`` tokens are then ones that nobody looks at.
* A row of which a part is kept is, to all that is said here, a shorter row that begins later
  (:mod:`squat_fx.layouts.kept`).

What a codec learns from a prompt (offsets and factors, error feedback) it learns in ``store``, from
the valid tokens after the sinks; tokens that are appended later are rounded with what was learned
and stored. A token of which a number is NaN, or more than fp16 can hold, counts as zeros there; so
does such a number of a query. Packed themselves they spoil what shares their scale, and no more.

``length`` and ``watermark`` are host numbers; they reach an op as a row of the small ``positions``
tensor. Nothing here counts up: an append writes only where a reader of the old ``length`` and
``watermark`` does not look (``append_`` of more than one token may reuse ring slots, so its caller
hands it a copy of ``dense``).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from squat_fx.codecs import Codec, Fit, Role, codec_from_spec
from squat_fx.kernels import chosen
from squat_fx.kernels.softmax import BOTTOM_RIGHT, NO_CAUSALITY, probabilities
from squat_fx.kernels.softmax import TOP_LEFT as TOP_LEFT
from squat_fx.layouts import Fixed, Format
from squat_fx.layouts.planes import unpack
from squat_fx.layouts.planes_token import basis_pair
from squat_fx.layouts.symmetric import LARGEST_HALF, step_and_zero

NO_FIT = Fit()
NOTHING: Mapping[str, Tensor] = {}
FEW_QUERIES = 16
NEWEST_QUERIES = 16
"""Of a prompt, by which its store is judged: so many that no single one decides."""


@dataclass(frozen=True)
class Arenas:
    """The tensors of one role.

    ``packed`` is in the order of ``Format.packed_names``, dims ``[batch, heads, slots, n]``.
    ``dense`` is ``[batch, heads, dense_length, head_dim]`` and ``start`` int32 ``[batch]``.
    ``fixed`` are those of the layout that the store made, and that are only read since.
    """

    packed: tuple[Tensor, ...]
    dense: Tensor
    start: Tensor
    fixed: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, fmt: Format, tensors: Sequence[Tensor]) -> Arenas:
        """Arenas from tensors in the order of ``Format.arena_names``."""
        count = len(fmt.packed_names)
        *fixed, dense, start = tensors[count:]
        names = fmt.stored_layout.fixed
        return cls(tuple(tensors[:count]), dense, start, dict(zip(names, fixed, strict=True)))

    def tensors(self, fmt: Format) -> tuple[Tensor, ...]:
        """Undo :meth:`of`."""
        fixed = (self.fixed[name] for name in fmt.stored_layout.fixed)
        return (*self.packed, *fixed, self.dense, self.start)

    @property
    def affine(self) -> Tensor | None:
        """Offsets and factors in the layout ``planes/token``."""
        return self.fixed.get("affine")

    @property
    def basis(self) -> Tensor | None:
        """The basis of the layout ``planes/token``."""
        return self.fixed.get("basis")

    def with_fixed(self, **arenas: Tensor) -> Arenas:
        """The same with other fixed arenas."""
        return replace(self, fixed={**self.fixed, **arenas})

    def fixed_of(self, rows: slice, fmt: Format) -> dict[str, Tensor]:
        """The fixed arenas of some rows of the batch."""
        shared = fmt.stored_layout.shared
        return {name: t if name in shared else t[rows] for name, t in self.fixed.items()}


def advanced(length: int, watermark: int, new_tokens: int, fmt: Format) -> tuple[int, int]:
    """Length and watermark once ``new_tokens`` more are stored."""
    length += new_tokens
    return length, max(watermark, length - fmt.residual_length)


@dataclass(frozen=True)
class Extent:
    """How much of an arena is meant: the first ``length`` tokens, packed up to ``watermark``."""

    length: int
    watermark: int

    @classmethod
    def at(cls, positions: Tensor, row: int) -> Extent:
        """Read ``row`` of a positions tensor, int64 ``[rows, 2]``."""
        length, watermark = positions[row].tolist()
        return cls(length, watermark)

    def after(self, new_tokens: int, fmt: Format) -> Extent:
        """The extent once ``new_tokens`` more are stored."""
        return Extent(*advanced(self.length, self.watermark, new_tokens, fmt))

    def packed(self, start: int, fmt: Format) -> int:
        """Packed tokens of a row that starts at ``start``."""
        return max(self.watermark - start - fmt.sink_length, 0) // fmt.token_group * fmt.token_group


Write = tuple[Arenas, Tensor, Extent, Format]
"""Where new tokens go, the tokens, what is there, and how it is stored."""


# quantize and dequantize whole groups -------------------------------------------------------------


def quantize(
    x: Tensor,
    valid: Tensor | None,
    fmt: Format,
    fixed: Fixed = NOTHING,
    feedback: Tensor | None = None,
    first_slot: int = 0,
    first_position: int | Tensor = 0,
) -> tuple[Tensor, ...]:
    """Pack ``x`` ``[batch, heads, tokens, head_dim]``, ``tokens`` a multiple of ``token_group``,
    for the slots from ``first_slot`` on; valid ``[batch, tokens]``. ``first_position`` is that of
    the first token, a number or int64 ``[batch, 1]``.
    """
    codec = codec_from_spec(fmt.codec)
    place = first_slot, first_position
    return fmt.stored_layout.quantize(x, valid, fmt, codec, fixed, feedback, *place)


def dequantize_groups(
    packed: tuple[Tensor, ...],
    fmt: Format,
    out: Tensor,
    fixed: Fixed = NOTHING,
    first_position: int = 0,
) -> Tensor:
    """Undo :func:`quantize` into ``out`` ``[batch, heads, tokens, head_dim]``; fp32 arithmetic."""
    return fmt.stored_layout.dequantize_into(packed, fmt, fixed, out, first_position)


# reading and writing arenas -----------------------------------------------------------------------


def dense_past(
    arenas: Arenas, extent: Extent, fmt: Format, out: Tensor | None = None, first: int = 0
) -> Tensor:
    """The stored tokens from ``first`` on as numbers, ``[batch, heads, length - first, head_dim]``,
    in the cache's dtype.

    Zeros where padding was not stored. ``out`` is written if given.
    """
    dense = arenas.dense
    if out is None:
        out = dense.new_empty((*dense.shape[:2], extent.length - first, dense.shape[3]))
    for rows, start in _runs(arenas.start):
        tokens = max(extent.length - start, 0)
        sinks = min(fmt.sink_length, tokens)
        count = extent.packed(start, fmt)
        hidden = max(first - start, 0)
        shown = out[rows, :, out.shape[2] - max(tokens - hidden, 0) :]
        out[rows, :, : out.shape[2] - shown.shape[2]] = 0.0
        row_tokens = shown
        if hidden:
            row_tokens = dense.new_empty((*shown.shape[:2], tokens, dense.shape[3]))
        row_tokens[:, :, :sinks] = dense[rows, :, :sinks]
        if count:
            packed = _packed_slots(arenas, rows, 0, count, fmt)
            target = row_tokens[:, :, sinks : sinks + count]
            fixed = arenas.fixed_of(rows, fmt)
            dequantize_groups(packed, fmt, target, fixed, start + fmt.sink_length)
        ring = _ring_slots(count, tokens - sinks, fmt, dense.device)
        row_tokens[:, :, sinks + count :] = dense[rows].index_select(2, ring)
        if hidden:
            shown.copy_(row_tokens[:, :, hidden:])
    return out


def learn(
    arenas: Arenas, new: Tensor, valid: Tensor | None, query: Tensor | None, fmt: Format, role: Role
) -> Fit:
    """What the codec learns from the prompt ``new``; fixed arenas are filled with it.

    ``query`` is ``[batch, num_heads, tokens, head_dim]``; ``valid`` bool ``[batch, tokens]``.
    """
    codec = codec_from_spec(fmt.codec)
    if type(codec).fit is Codec.fit and type(codec).fit_format is Codec.fit_format:
        return NO_FIT
    token = torch.arange(new.shape[2], device=new.device)
    first = token.new_full((new.shape[0],), fmt.sink_length)  # of the tokens that may be packed
    if valid is not None:
        valid = valid.view(torch.bool).expand(new.shape[0], -1)
        first += valid.int().argmax(1)
    keep = token >= first[:, None]
    keep = keep if valid is None else keep & valid
    basis = arenas.basis if fmt.latent else None
    if query is not None:
        query = query.where(query.abs() <= LARGEST_HALF, 0.0) if codec.taps(role) else None
    usable = (new.abs() <= LARGEST_HALF).all(-1, keepdim=True)
    x = fmt.stored_layout.to_frame(new.where(usable, 0.0), fmt, arenas.fixed)
    fit = codec.fit_format(role, fmt, x, query, keep, basis)
    after = Extent(0, 0).after(new.shape[2], fmt)
    packed = (after.watermark - first).clamp(min=0) // fmt.token_group * fmt.token_group
    packed = packed if valid is None else packed * valid.any(1)
    of_layout = fmt.stored_layout.learned(new, first, packed, fmt)
    for name, learned in (*fit.fixed.items(), *of_layout.items()):
        if arenas.fixed[name].numel():
            arenas.fixed[name].copy_(learned)
    return fit


def write(
    arenas: Arenas,
    new: Tensor,
    valid: Tensor | None,
    extent: Extent,
    fmt: Format,
    feedback: Tensor | None = None,
) -> None:
    """Append ``new`` ``[batch, heads, tokens, head_dim]``: into the ring, packing what leaves it.

    ``valid`` is bool ``[batch, tokens]``. Rows that hold no token yet start at their first valid
    new one. ``feedback`` is that of :class:`squat_fx.codecs.Fit`, for the tokens of a prompt.
    """
    after = extent.after(new.shape[2], fmt)
    if valid is not None:
        valid = valid.expand(new.shape[0], -1)
        leading = valid.int().argmax(1) + new.shape[2] * ~valid.any(1)
        empty = arenas.start >= extent.length
        arenas.start.copy_(torch.where(empty, extent.length + leading, arenas.start))
    for rows, start in _runs(arenas.start):
        row_valid = None if valid is None else valid[rows]
        row_feedback = None if feedback is None else feedback[rows]
        _pack_leaving(arenas, new[rows], row_valid, rows, start, extent, after, fmt, row_feedback)
        _keep_recent(arenas.dense[rows], new[rows], start, extent, after, fmt)


def write_both(key: Write, value: Write, valid: Tensor | None) -> None:
    """:func:`write` the new keys and values of a layer."""
    for arenas, new, extent, fmt in (key, value):
        write(arenas, new, valid, extent, fmt)


def _runs(start: Tensor) -> list[tuple[slice, int]]:
    """Neighbouring rows that start at the same position: ``(rows, start)``."""
    starts = start.tolist()
    edges = [i for i in range(len(starts)) if i == 0 or starts[i] != starts[i - 1]]
    return [(slice(a, b), starts[a]) for a, b in pairwise([*edges, len(starts)])]


def _pack_leaving(
    arenas: Arenas,
    new: Tensor,
    valid: Tensor | None,
    rows: slice,
    start: int,
    before: Extent,
    after: Extent,
    fmt: Format,
    feedback: Tensor | None,
) -> None:
    """Pack the tokens that are packed after an append and were not before it."""
    first, end = before.packed(start, fmt), after.packed(start, fmt)
    if first == end:
        return
    in_ring = min(end, max(before.length - start - fmt.sink_length, first))
    leaving = arenas.dense[rows].index_select(2, _ring_slots(first, in_ring, fmt, new.device))
    skip = (
        start + fmt.sink_length + in_ring - before.length
    )  # new tokens before the first leaving one
    leaving = torch.cat([leaving, new[:, :, skip : skip + end - in_ring]], 2)
    if valid is not None:
        known = valid.new_ones((valid.shape[0], in_ring - first))
        valid = torch.cat([known, valid[:, skip : skip + end - in_ring]], 1)
    slots = _packed_slots(arenas, rows, first, end, fmt)
    place = first, start + fmt.sink_length + first
    packed = quantize(leaving, valid, fmt, arenas.fixed_of(rows, fmt), feedback, *place)
    for slot, numbers in zip(slots, packed, strict=True):
        slot.copy_(numbers)


def _keep_recent(
    dense: Tensor, new: Tensor, start: int, before: Extent, after: Extent, fmt: Format
) -> None:
    """Put new tokens that stay exact into their sink and ring slots."""
    token = before.length - start  # of the first new one
    total = after.length - start
    first_sink, last_sink = max(token, 0), min(total, fmt.sink_length)
    if first_sink < last_sink:
        dense[:, :, first_sink:last_sink] = new[:, :, first_sink - token : last_sink - token]
    first = max(token - fmt.sink_length, after.packed(start, fmt), 0)
    slots = _ring_slots(first, total - fmt.sink_length, fmt, dense.device)
    if kept := len(slots):
        dense.index_copy_(2, slots, new[:, :, -kept:].to(dense.dtype))


def truncate(arenas: Arenas, before: Extent, after: Extent, fmt: Format) -> None:
    """Forget the tokens from ``after.length`` on: what is left of a packed group goes back into the
    ring, as numbers.
    """
    starts = arenas.start.tolist()
    arenas.start.clamp_(max=after.length)  # a row of nothing but padding starts with its next token
    for row, start in enumerate(starts):
        count, kept = before.packed(start, fmt), after.packed(start, fmt)
        left = min(count, after.length - start - fmt.sink_length) - kept
        if count == kept or left <= 0:
            continue
        group = _packed_slots(arenas, slice(row, row + 1), kept, kept + fmt.token_group, fmt)
        out = arenas.dense.new_empty((1, arenas.dense.shape[1], fmt.token_group, fmt.head_dim))
        fixed = arenas.fixed_of(slice(row, row + 1), fmt)
        first = start + fmt.sink_length + kept
        numbers = dequantize_groups(group, fmt, out, fixed, first)[0, :, :left]
        arenas.dense[row].index_copy_(
            1, _ring_slots(kept, kept + left, fmt, numbers.device), numbers
        )
    ends = [start + fmt.sink_length + after.packed(start, fmt) for start in starts]
    fmt.stored_layout.forget(arenas.fixed, arenas.start.new_tensor(ends))


def drop_front(arenas: Arenas, first: int, fmt: Format) -> None:
    """Make room: move every row to the front of its arenas, as far as its tokens from ``first`` on
    stay, in steps of :func:`drop_step`.

    Any device; nothing is read back from it.
    """
    step, dense = drop_step(fmt), arenas.dense
    free = first - fmt.sink_length - arenas.start.long()
    dropped = (free.clamp(min=0) // step * step)[:, None]  # [batch, 1]

    def moved(arena: Tensor, steps: Tensor) -> Tensor:
        slots = torch.arange(arena.shape[2], device=arena.device)
        source = ((slots + steps) % arena.shape[2])[:, None, :, None]
        return arena.gather(2, source.expand_as(arena))

    ring = dense[:, :, fmt.sink_length :]
    steps = [dropped // fmt.tokens_per_slot(name) for name in fmt.packed_names]
    places = [*zip(arenas.packed, steps, strict=True), (ring, dropped)]
    after = [moved(*place) for place in places]  # all of them, before anything has changed
    for (arena, _), numbers in zip(places, after, strict=True):
        arena.copy_(numbers)
    arenas.start.add_(dropped[:, 0].to(arenas.start.dtype))


def drop_step(fmt: Format) -> int:
    """How many tokens are dropped at once: whole groups, and an even number of them, since a layout
    may round every second token the other way.
    """
    return math.lcm(fmt.token_group, 2)


def empty_arenas(like: Tensor, capacity: int, fmt: Format, given: Tensor | None = None) -> Arenas:
    """Unwritten arenas with room for ``capacity`` packed tokens, for tensors like ``like``
    ``[batch, heads, _, head_dim]``; ``given`` is what the layout makes one of the fixed ones of.
    """
    batch, heads = like.shape[:2]
    packed = tuple(
        like.new_zeros(
            (batch, heads, capacity // fmt.tokens_per_slot(name), fmt.last_dim(name)),
            dtype=fmt.arena_dtype(name, like.dtype),
        )
        for name in fmt.packed_names
    )
    dense = like.new_zeros((batch, heads, fmt.dense_length, fmt.head_dim))
    start = like.new_zeros((batch,), dtype=torch.int32)
    layout = fmt.stored_layout
    fixed = {
        name: layout.empty_fixed(fmt, name, like)
        if given is None or name != layout.given
        else layout.place_given(fmt, given, like)
        for name in layout.fixed
    }
    return Arenas(packed, dense, start, fixed)


def _ring_slots(first: int, end: int, fmt: Format, device: torch.device) -> Tensor:
    """Dense slots of the unpacked tokens ``first <= j < end`` of a row."""
    return fmt.sink_length + torch.arange(first, max(end, first), device=device) % fmt.ring_length


def _packed_slots(
    arenas: Arenas, rows: slice, first: int, end: int, fmt: Format
) -> tuple[Tensor, ...]:
    """The packed arenas of ``rows``, tokens ``first <= j < end`` (whole groups), as views."""
    slots = []
    for name, arena in zip(fmt.packed_names, arenas.packed, strict=True):
        step = fmt.tokens_per_slot(name)
        slots.append(arena[rows, :, first // step : end // step])
    return tuple(slots)


# attention ----------------------------------------------------------------------------------------


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

    ``softmax(softcap(scale * query @ key.T) + mask) @ value``, ``softcap(s) = softcap * tanh(s /
    softcap)``; a bool mask is True where a query attends. ``causal`` is ``NO_CAUSALITY``,
    ``TOP_LEFT`` (query ``i`` sees keys up to ``i``; torch's ``is_causal``) or ``BOTTOM_RIGHT`` (up
    to ``i + kv_len - q_len``). ``sinks`` ``[num_heads]`` are logits that take part in the
    normalisation and carry no value. A row that may attend nowhere gives zeros.

    Shapes: query ``[batch, num_heads, q_len, head_dim]``, key and value ``[batch, num_kv_heads,
    kv_len, head_dim]``, mask broadcastable to ``[batch, num_heads, q_len, kv_len]``.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    mask = with_causality(mask, causal, q_len, kv_len, query.device)
    key, value = key.to(query.dtype), value.to(query.dtype)
    gqa = query.shape[1] != key.shape[1]
    if sinks is None and not softcap:
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=gqa
        )
    if gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(wide) @ key.to(wide).transpose(-1, -2)) * scale
    return (probabilities(scores, mask, sinks, softcap) @ value.to(wide)).to(query.dtype)


def with_causality(
    mask: Tensor | None, causal: int, q_len: int, kv_len: int, device: torch.device
) -> Tensor | None:
    """``mask`` and what ``causal`` says, as one mask."""
    if causal == NO_CAUSALITY:
        return mask
    offset = kv_len - q_len if causal == BOTTOM_RIGHT else 0
    visible = torch.ones(q_len, kv_len, dtype=torch.bool, device=device).tril(offset)
    return visible if mask is None else _both(mask, visible)


def _both(mask: Tensor, visible: Tensor) -> Tensor:
    return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, -torch.inf)


def attend(
    query: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    key: tuple[Arenas, Extent, Format],
    value: tuple[Arenas, Extent, Format],
    *,
    first: int = 0,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: int,
    softcap: float,
) -> Tensor:
    """Attention over the stored tokens from ``first`` on and, beside them, the exact new ones.

    The mask and the causality count from ``first``; the mask may have more columns than there are
    tokens.
    """
    if mask is not None and mask.shape[-1] > 1:
        new_len = 0 if new_key is None else new_key.shape[2]
        mask = mask[..., : key[1].length + new_len - first]
    if key[2].stored_layout.chooses and query.shape[2] == 1:
        sides = (
            chosen.Side(arenas, extent.length, extent.watermark, fmt, new)
            for (arenas, extent, fmt), new in ((key, new_key), (value, new_value))
        )
        options = {"first": first, "mask": mask, "sinks": sinks, "scale": scale, "causal": causal}
        return chosen.attend_chosen(query, *sides, **options, softcap=softcap)
    if key[2].layout == value[2].layout == "planes/token" and query.shape[2] <= FEW_QUERIES:
        return _attend_latent(
            query,
            new_key,
            new_value,
            key,
            value,
            first=first,
            mask=mask,
            sinks=sinks,
            scale=scale,
            causal=causal,
            softcap=softcap,
        )
    full_key, full_value = (
        _past_and_new("key", *key, new_key, first),
        _past_and_new("value", *value, new_value, first),
    )
    padding = key[0].start - first
    if (padding > 0).any():
        stored = torch.arange(full_key.shape[2], device=padding.device) >= padding[:, None]
        stored = stored[:, None, None, :]
        mask = stored if mask is None else _both(mask, stored)
    return attention(
        query,
        full_key,
        full_value,
        mask=mask,
        sinks=sinks,
        scale=scale,
        causal=causal,
        softcap=softcap,
    )


def _attend_latent(
    query: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    key: tuple[Arenas, Extent, Format],
    value: tuple[Arenas, Extent, Format],
    *,
    first: int,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: int,
    softcap: float,
) -> Tensor:
    """The same where queries are few: packed tokens stay in their latent frame.

    The query goes there instead, and the weighted sum of the values comes back; what the offsets
    of the keys add is one number per query, so that scores are true ones.
    """
    batch, num_heads, q_len, _ = query.shape
    num_kv_heads = key[0].dense.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    length = key[1].length
    kv_len = length + (0 if new_key is None else new_key.shape[2])
    mask = with_causality(mask, causal, q_len, kv_len - first, query.device)
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        mask = mask.expand(batch, *mask.shape[1:])
    out = query.new_empty((batch, num_heads, q_len, value[2].head_dim))
    for rows, start in _runs(key[0].start):
        if start >= kv_len:
            out[rows] = 0.0
            continue
        q = query[rows].to(wide).unflatten(1, (num_kv_heads, -1)).flatten(2, 3)
        scores = _scores(q, _Row.of(key, new_key, rows, start, wide)) * scale
        hidden = max(first - start, 0)
        scores = scores.unflatten(2, (-1, q_len)).flatten(1, 2)[..., hidden:]
        visible = mask
        if mask is not None:
            visible = mask[rows]
            visible = visible[..., max(start - first, 0) :] if visible.shape[-1] > 1 else visible
        probs = F.pad(probabilities(scores, visible, sinks, softcap), (hidden, 0))
        probs = probs.unflatten(1, (num_kv_heads, -1)).flatten(2, 3)
        found = _weighted_sum(probs, _Row.of(value, new_value, rows, start, wide))
        out[rows] = found.unflatten(2, (-1, q_len)).flatten(1, 2).to(query.dtype)
    return out


@dataclass(frozen=True)
class _Row:
    """The tokens of rows that start together: ``before`` exact ones, packed ones, exact ones.

    ``exact`` is ``[rows, heads, tokens, head_dim]``; ``unit`` what a step of a code is worth per
    channel, ``zero`` the code of zero.
    """

    exact: Tensor
    before: int
    codes: Tensor
    scale: Tensor
    unit: Tensor
    zero: Tensor
    inverse: Tensor
    affine: Tensor | None

    @classmethod
    def of(
        cls,
        side: tuple[Arenas, Extent, Format],
        new: Tensor | None,
        rows: slice,
        start: int,
        wide: torch.dtype,
    ) -> _Row:
        arenas, extent, fmt = side
        dense = arenas.dense[rows]
        tokens = max(extent.length - start, 0)
        sinks, count = min(fmt.sink_length, tokens), extent.packed(start, fmt)
        parts = [dense[:, :, :sinks]]
        parts.append(dense.index_select(2, _ring_slots(count, tokens - sinks, fmt, dense.device)))
        if new is not None:
            parts.append(new[rows, :, max(start - extent.length, 0) :].to(dense.dtype))
        qdata, scale = _packed_slots(arenas, rows, 0, count, fmt)
        shape = (*qdata.shape[:3], fmt.head_dim)
        codes = _WORKSPACE.take("codes", shape, dense.new_empty(0, dtype=wide))
        unit, zero = step_and_zero(fmt.widths, fmt.head_dim, dense.device)
        inverse = basis_pair(arenas.basis, fmt.head_dim, dense.device)[1]
        affine = arenas.affine[rows].to(wide) if fmt.affine and arenas.affine is not None else None
        return cls(
            torch.cat(parts, 2).to(wide),
            sinks,
            unpack(qdata, fmt.head_dim, fmt.widths, codes),
            scale.to(wide).transpose(-1, -2),
            unit.to(wide),
            zero.to(wide),
            inverse.to(wide),
            affine,
        )


def _scores(q: Tensor, row: _Row) -> Tensor:
    """``q @ key.T`` for the tokens of ``row`` in their order; ``q`` is ``[rows, heads, n, d]``."""
    scaled = q if row.affine is None else q * row.affine[:, :, 1:]
    latent = (scaled @ row.inverse.transpose(-1, -2)) * row.unit
    packed = (latent @ row.codes.transpose(-1, -2) - (latent @ row.zero)[..., None]) * row.scale
    if row.affine is not None:
        packed = packed + q @ row.affine[:, :, :1].transpose(-1, -2)
    exact = q @ row.exact.transpose(-1, -2)
    return torch.cat([exact[..., : row.before], packed, exact[..., row.before :]], -1)


def _weighted_sum(probs: Tensor, row: _Row) -> Tensor:
    """``probs @ value`` for the tokens of ``row``."""
    count = row.codes.shape[2]
    before, packed, after = probs.split(
        [row.before, count, probs.shape[-1] - row.before - count], -1
    )
    weights = packed * row.scale
    latent = (weights @ row.codes - weights.sum(-1, keepdim=True) * row.zero) * row.unit
    out = latent @ row.inverse
    if row.affine is not None:
        out = out * row.affine[:, :, 1:] + packed.sum(-1, keepdim=True) * row.affine[:, :, :1]
    return out + torch.cat([before, after], -1) @ row.exact


def relative_error(found: Tensor, true: Tensor) -> Tensor:
    """Root of the squared error of some outputs over that of the outputs, fp32, of no dims."""
    wide = torch.promote_types(true.dtype, torch.float32)
    found, true = found.to(wide), true.to(wide)
    return ((found - true).norm() / true.norm().clamp_min(1e-30)).float()


def _past_and_new(
    name: str, arenas: Arenas, extent: Extent, fmt: Format, new: Tensor | None, first: int
) -> Tensor:
    """Stored tokens from ``first`` on and new ones as one tensor, in memory that the next call
    reuses.
    """
    batch, heads, _, head_dim = arenas.dense.shape
    stored = extent.length - first
    length = stored + (0 if new is None else new.shape[2])
    both = _WORKSPACE.take(name, (batch, heads, length, head_dim), arenas.dense)
    dense_past(arenas, extent, fmt, out=both[:, :, :stored], first=first)
    if new is not None:
        both[:, :, stored:] = new
    return both


class _Workspace(threading.local):
    """Scratch memory per thread, kept between calls up to a few MiB.

    Fresh memory of this size costs ten times the arithmetic on it in page faults.
    """

    KEPT_BYTES = 16 * 2**20

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Unwritten memory of ``shape``; what was taken under ``name`` before is overwritten."""
        size = math.prod(shape)
        key = (name, like.dtype, like.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):
                buffer = like.new_empty(size + size // 8)
            if buffer.nbytes <= self.KEPT_BYTES:
                self._buffers[key] = buffer
        return buffer[:size].view(shape)


_WORKSPACE = _Workspace()


def valid_tokens(mask: Tensor, new_tokens: int) -> Tensor:
    """Which of the newest tokens any query attends, bool ``[batch, new_tokens]``.

    ``mask`` is ``[batch | 1, heads | 1, q_len | 1, kv_len]``, bool (True = attend) or additive
    float (padding at or below a quarter of the dtype's smallest number).
    """
    newest = mask[..., -new_tokens:]
    if newest.dtype != torch.bool:
        newest = newest > torch.finfo(newest.dtype).min / 4
    return newest.any(2).any(1).expand(-1, new_tokens)
