"""Attention of one query over packed keys that it chooses by landmarks, on any device.

    weight of a chunk = softmax over chunks of scale * query @ landmark
    chosen = the chunks of largest weight, by the largest of the query heads of a KV head
    output = attention over the chosen tokens, outliers and all exact tokens

Nobody reads the codes of what is not chosen, nor its values: codes are gathered by index. Every
size follows from capacities alone and nothing waits for the device, so that this runs inside a CUDA
graph. Chunks that a mask hides are not chosen before visible ones are. A chunk of outliers takes
part always, with its exact keys, and is not counted in the budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from squat_fx.kernels.softmax import TOP_LEFT, probabilities
from squat_fx.layouts.format import Format
from squat_fx.layouts.latent_rope import from_codes
from squat_fx.layouts.latent_sparse import CHUNK, budget, outlier_positions

Number = int | Tensor


@dataclass(frozen=True)
class Side:
    """One role: its arenas, how much of them is written, on the device or not, and its format."""

    arenas: Any
    length: Number
    watermark: Number
    fmt: Format
    new: Tensor | None

    @property
    def start(self) -> Tensor:
        """The first position of each row, int64 ``[batch, 1, 1]``."""
        return self.arenas.start.long()[:, None, None]

    @property
    def count(self) -> Tensor:
        """Packed tokens of each row, ``[batch, 1, 1]``."""
        fmt = self.fmt
        packed = (self.watermark - self.start - fmt.sink_length).clamp(min=0)
        return packed // fmt.token_group * fmt.token_group

    @property
    def first(self) -> Tensor:
        """The position of the first packed token."""
        return self.start + self.fmt.sink_length


def attend_chosen(
    query: Tensor, key: Side, value: Side, *, first: Number, mask: Tensor | None,
    sinks: Tensor | None, scale: float, causal: int, softcap: float,
) -> Tensor:  # fmt: skip
    """See the module; ``query`` is ``[batch, num_heads, 1, head_dim]``, ``mask`` boolean or
    additive, ``[batch | 1, num_heads | 1, 1, kv_len]``, from position ``first`` on, before which
    nothing is seen.
    """
    batch, num_heads, _, _ = query.shape
    heads = key.arenas.dense.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    q = query.to(wide).unflatten(1, (heads, -1)).squeeze(3)  # [batch, heads, queries, head_dim]

    def seen(position: Tensor, there: Tensor) -> Tensor:
        """The mask of tokens at ``position`` ``[batch, heads, n]``, boolean or additive, for each
        query.
        """
        position = position - first
        there = there & (position >= 0)
        if causal == TOP_LEFT:
            there = there & (position <= 0)
        there = there[:, :, None].expand(-1, -1, q.shape[2], -1)
        if mask is None:
            return there
        rows = mask[(None,) * (4 - mask.dim())].expand(batch, num_heads, 1, mask.shape[-1])
        rows = rows.unflatten(1, (heads, -1)).squeeze(3)
        place = position.clamp(0, mask.shape[-1] - 1)[:, :, None].expand_as(there)
        found = rows.gather(-1, place if mask.shape[-1] > 1 else torch.zeros_like(place))
        if mask.dtype == torch.bool:
            return there & found
        return found.to(wide).masked_fill(~there, -torch.inf)

    slot, there = choose(q * scale, key, seen)
    position = key.first + slot
    index = slot[..., None].expand(-1, -1, -1, key.arenas.packed[0].shape[3])
    fixed = key.arenas.fixed
    keys = [from_codes(key.arenas.packed[0].gather(2, index), key.fmt, fixed, position)]
    positions, exists = [position], [there]
    for more, at, is_there in (outliers(key), *exact(key)):
        keys.append(more.float())
        positions.append(at.expand(batch, heads, -1))
        exists.append(is_there.expand(batch, heads, -1))
    position, there = torch.cat(positions, -1), torch.cat(exists, -1)
    # What is not there may be anything, and what a mask adds would not hide a NaN.
    numbers = torch.cat(keys, 2).to(wide).masked_fill(~there[..., None], 0.0)
    scores = (q @ numbers.mT) * scale

    def per_query(x: Tensor) -> Tensor:
        return x.flatten(1, 2)[:, :, None]

    probs = probabilities(per_query(scores), per_query(seen(position, there)), sinks, softcap)
    probs = probs.unflatten(1, (heads, -1)).squeeze(3)
    return per_query(probs @ values_at(value, position, there).to(wide)).to(query.dtype)


def choose(q: Tensor, key: Side, seen: Any) -> tuple[Tensor, Tensor]:
    """Packed slots ``[batch, heads, n]`` of the chosen chunks, and which of them are there; ``q``
    ``[batch, heads, queries, head_dim]`` is scaled.
    """
    landmark = key.arenas.packed[1]
    chunk = torch.arange(landmark.shape[2], device=q.device)
    there = CHUNK * chunk < key.count  # [batch, 1, chunks]
    tokens = (CHUNK * chunk[:, None] + torch.arange(CHUNK, device=q.device)).flatten()
    position = (key.first + tokens).expand(*q.shape[:2], -1)
    visible = seen(position, there.repeat_interleave(CHUNK, -1))
    if visible.dtype != torch.bool:
        visible = visible > torch.finfo(key.arenas.dense.dtype).min / 4
    visible = visible.unflatten(-1, (-1, CHUNK)).any(-1)  # [batch, heads, queries, chunks]
    outlier = key.arenas.fixed["outlier"].long()[:, :, 0]
    apart = torch.where(outlier < 0, -1, (outlier - key.first) // CHUNK)
    visible = visible & (chunk[:, None] != apart[:, :, None]).all(-1)[:, :, None]
    scores = (q @ landmark.to(q.dtype).mT).masked_fill(~visible, -torch.inf)
    weight = torch.softmax(scores, -1).nan_to_num(0.0).masked_fill(~visible, -1.0).amax(2)
    largest, best = weight.topk(min(budget(key.fmt) // CHUNK, len(chunk)), -1)
    best, order = best.sort(-1)
    kept = largest.gather(-1, order) >= 0
    slot = CHUNK * best[..., None] + torch.arange(CHUNK, device=q.device)
    return slot.flatten(2), kept.repeat_interleave(CHUNK, -1)


def outliers(key: Side) -> tuple[Tensor, Tensor, Tensor]:
    """The exact keys of outliers, where they are, and which there are."""
    position = outlier_positions(key.arenas.fixed)
    there = (position >= key.first) & (position < key.first + key.count)
    return key.arenas.fixed["outlier_key"], position, there


def exact(side: Side) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tokens of the dense buffer, and new ones: numbers, positions, which there are."""
    fmt, dense = side.fmt, side.arenas.dense
    slot = torch.arange(fmt.dense_length, device=dense.device)
    tokens = (side.length - side.start).clamp(min=0)  # of each row
    recent = tokens - fmt.sink_length  # the newest of those that leave the ring is recent - 1
    ring = slot - fmt.sink_length
    newest = (
        ring + (recent - 1 - ring).div(fmt.ring_length, rounding_mode="floor") * fmt.ring_length
    )
    is_sink = slot < fmt.sink_length
    token = torch.where(is_sink, slot, fmt.sink_length + newest)
    there = torch.where(is_sink, slot < tokens, (newest >= side.count) & (recent > 0))
    found = [(dense, side.start + token, there)]
    if side.new is not None:
        position = side.length + torch.arange(side.new.shape[2], device=dense.device)
        at = position.expand(dense.shape[0], 1, -1)
        found.append((side.new, at, torch.ones_like(at, dtype=torch.bool)))
    return found


def values_at(value: Side, position: Tensor, there: Tensor) -> Tensor:
    """Values of tokens at ``position`` ``[batch, heads, n]``, fp32; zero where not ``there``."""
    fmt, arenas = value.fmt, value.arenas
    batch, heads, count = position.shape
    assert fmt.token_group == 1, "values are packed token by token"
    slot = position - value.first

    def gathered(arena: Tensor, place: Tensor) -> Tensor:
        place = place.clamp(0, max(arena.shape[2] - 1, 0))[..., None]
        return arena.gather(2, place.expand(-1, -1, -1, arena.shape[3]))

    token = position - value.start
    dense = torch.where(slot < 0, token, fmt.sink_length + slot % fmt.ring_length)
    numbers = gathered(arenas.dense, dense).float()
    if arenas.packed[0].shape[2]:
        packed = tuple(gathered(arena, slot) for arena in arenas.packed)
        decoded = fmt.stored_layout.dequantize(packed, fmt, arenas.fixed)
        is_packed = (slot >= 0) & (slot < value.count)
        numbers = torch.where(is_packed[..., None], decoded, numbers)
    if value.new is not None:
        fresh = gathered(value.new, position - value.length).float()
        numbers = torch.where((position >= value.length)[..., None], fresh, numbers)
    return numbers.masked_fill(~there[..., None], 0.0).view(batch, heads, count, -1)
