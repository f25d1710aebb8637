"""How far attention over a packed prompt is from attention over the prompt, by a sample.

Judged are the ``QUERIES`` newest queries of one row of the batch, the one with the most tokens, and
the ``TOKENS`` newest tokens of it that are packed. What comes after those, and the sinks, are exact
whatever the codec does; they are there for the share of a query's attention that they take. With
``p`` the exact probabilities over sinks, sample and what comes after, and ``q`` those over the
sample alone, of the keys as they were and as they come back::

    weight = sum(p over the sample)
    error  = |weight (q' @ values' - q @ values)| / |weight (q @ values)|     over heads and queries

A query that hardly looks at packed tokens counts little, and tokens that are still exact do not
hide what happens to them later: the error of a prompt of 80 tokens, of which 44 are packed, is
already that of a long one. What it costs does not depend on the prompt's length, and all layers
that are alike are judged in one call: ``judged_tokens`` says once which tokens to keep of each
layer, and ``attend_errors`` takes them when all layers have been stored. Both are torch on any
device, and wait for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from squat_fx.codecs import Format
from squat_fx.kernels.reference import Arenas, Extent
from squat_fx.kernels.softmax import probabilities

QUERIES = 16
TOKENS = 64
"""Fewer of them say less, and differ more from prompt to prompt."""


@dataclass(frozen=True)
class Plan:
    """Which tokens of a row are judged, in numbers that depend on nothing but formats.

    Attributes:
        group: tokens that are packed at once, for keys and values.
        sampled: packed tokens, whole groups.
        sinks: first tokens, exact.
        newest: tokens at the end among which all others that are exact are.
    """

    group: int
    sampled: int
    sinks: int
    newest: int

    @classmethod
    def of(cls, key: Format, value: Format) -> Plan:
        """That of keys and values of such formats."""
        group = math.lcm(key.token_group, value.token_group)
        residual = max(key.residual_length, value.residual_length)
        assert key.sink_length == value.sink_length, (key, value)
        sampled = -(-TOKENS // group) * group
        return cls(group, sampled, key.sink_length, residual + group - 1)

    def packed(self, tokens: int, key: Format, value: Format) -> int:
        """Tokens of a row of ``tokens`` that are packed for both, whole groups."""
        packed = (Extent(0, 0).after(tokens, fmt).packed(0, fmt) for fmt in (key, value))
        return min(packed) // self.group * self.group

    def packed_from(self, start: Tensor, tokens: int, key: Format, value: Format) -> Tensor:
        """The same where the row begins at ``start``, int64 ``[1]``, on its device."""
        exact = max(key.residual_length, value.residual_length) + self.sinks
        return (tokens - exact - start).clamp(min=0) // self.group * self.group


def judged_tokens(
    stored: Tensor, valid: Tensor | None, key: Format, value: Format
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What to keep of the queries, keys and values of a prompt.

    Args:
        stored: its keys ``[batch, heads, tokens, head_dim]``, of which the sizes are read.
        valid: bool ``[batch, tokens]``, False for padding; None if there is none.
        key, value: formats.

    Returns:
        The row, int64 ``[1, 1]``; positions of the queries, int64 ``[1, QUERIES]``, and of the
        keys, int64 ``[1, keys]``: the sample, the sinks, and what comes last; and which of the keys
        there are, bool ``[1, keys]``. Positions are those of a token, whether it is there or not.
    """
    plan, tokens = Plan.of(key, value), stored.shape[2]

    def positions(first: int, end: int) -> Tensor:
        return torch.arange(first, end, device=stored.device)

    row, start, packed = positions(0, 1), 0, plan.packed(tokens, key, value)
    if valid is not None:
        starts = valid.int().argmax(1) + tokens * ~valid.any(1)
        start, row = starts.min(0, keepdim=True)
        packed = plan.packed_from(start, tokens, key, value)
    end = start + plan.sinks + packed
    sample, sinks = positions(-plan.sampled, 0) + end, positions(0, plan.sinks) + start
    newest = positions(-plan.newest, 0) + tokens
    there = torch.cat([sample >= end - packed, sinks < tokens, newest >= end])
    keys = torch.cat([sample, sinks, newest]).clamp(0, tokens - 1)
    queries = (positions(-QUERIES, 0) + tokens).clamp(min=0)
    return row[None], queries[None], keys[None], there[None]


@dataclass(frozen=True)
class Side:
    """The keys or the values of layers that are alike.

    ``exact`` is what ``judged_tokens`` chose of each layer, ``[1, keys, heads, head_dim]``;
    ``arenas`` are what each stored.
    """

    fmt: Format
    exact: Sequence[Tensor]
    arenas: Sequence[Arenas]


def attend_errors(
    queries: Sequence[Tensor],
    key: Side,
    value: Side,
    judged: tuple[Tensor, Tensor, Tensor, Tensor],
    tokens: int,
    *,
    padded: bool,
    mask: Tensor | None,
    sinks: Sequence[Tensor],
    scale: float,
    causal: bool,
    softcap: float,
) -> Tensor:
    """The error of each layer, fp32 ``[layers]``; 0 where nothing is packed.

    Args:
        queries: of each layer, ``[1, QUERIES, num_heads, head_dim]``.
        key, value: of the same layers.
        judged: what :func:`judged_tokens` returned.
        tokens: of the prompt.
        padded: whether rows may begin later than the prompt.
        mask: that of the attention, at the queries and keys that are judged, ``[1, QUERIES, keys,
            heads | 1]``, bool or added.
        sinks: of each layer, ``[num_heads]``, or none.
        scale, causal, softcap: those of the attention.
    """
    row, query_at, key_at, there = judged
    plan = Plan.of(key.fmt, value.fmt)
    packed = plan.packed(tokens, key.fmt, value.fmt)
    if not packed:
        return queries[0].new_zeros(len(queries), dtype=torch.float32)
    kept = plan.sampled if padded else min(plan.sampled, packed)
    place = _Place(kept, packed - kept, plan.sinks + packed - kept)
    if padded:
        start = key.arenas[0].start.index_select(0, row[0]).long()  # the same in all layers
        end = start + plan.sinks + plan.packed_from(start, tokens, key.fmt, value.fmt)
        place = _Place(kept, 0, (end - kept)[None], row[0], end - start - plan.sinks - kept)
    missing = plan.sampled - kept  # of the sample, where a prompt is short
    key_at, there = key_at[:, missing:], there[:, missing:]
    visible = there[:, None, None]
    if causal:
        visible = visible & (key_at[:, None, None] <= query_at[:, None, :, None])
    if mask is not None:
        mask = mask[:, :, missing:].permute(0, 3, 1, 2)
        is_bool = mask.dtype == torch.bool
        visible = mask & visible if is_bool else mask.float().masked_fill(~visible, -torch.inf)
    all_see_it = not padded and mask is None and (not causal or plan.newest >= QUERIES)
    query, keys = _stacked(queries) * scale, _stacked(key.exact)[:, :, missing:]
    column = torch.stack(list(sinks)) if sinks else None
    probs = probabilities(_per_head(query, keys.mT), visible, column, softcap)[..., :kept]
    found_scores = _per_head(query, _found(key, place).mT)
    seen = None if all_see_it else visible[..., :kept]
    found_probs = probabilities(found_scores, seen, None, softcap) * probs.sum(-1, keepdim=True)
    values, found_values = _stacked(value.exact)[:, :, missing:], _found(value, place)
    if padded:  # 0 times what is no number is none
        hidden = ~there[:, None, :kept, None]
        values, found_values = (x.masked_fill(hidden, 0.0) for x in (values, found_values))
    true, found = _per_head(probs, values), _per_head(found_probs, found_values)
    error, size = (found - true).flatten(1).norm(dim=1), true.flatten(1).norm(dim=1)
    return error / size.clamp_min(1e-30)


@dataclass(frozen=True)
class _Place:
    """Where ``tokens`` packed tokens are, the first of them at ``position``: from slot ``first`` of
    the first row on, or ``later`` tokens after that in a ``row``, int64 ``[1]``.
    """

    tokens: int
    first: int
    position: int | Tensor
    row: Tensor | None = None
    later: Tensor | int = 0

    def rows(self, arena: Tensor) -> Tensor:
        """The row of an arena ``[batch, ...]``."""
        return arena[:1] if self.row is None else arena.index_select(0, self.row)

    def slots(self, arena: Tensor, tokens_per_slot: int) -> Tensor:
        """The tokens of an arena ``[batch, heads, slots, n]``; any where there are none."""
        first, count = self.first // tokens_per_slot, self.tokens // tokens_per_slot
        if self.row is None:
            return arena[:1, :, first : first + count]
        slots = torch.arange(count, device=arena.device) + self.later // tokens_per_slot
        return self.rows(arena).index_select(2, slots.clamp(min=0))


def _found(side: Side, place: _Place) -> Tensor:
    """What comes back of the sample, fp32 ``[layers, heads, tokens, head_dim]``."""
    fmt, layout = side.fmt, side.fmt.stored_layout
    packed = tuple(
        torch.cat([place.slots(each.packed[i], fmt.tokens_per_slot(name)) for each in side.arenas])
        for i, name in enumerate(fmt.packed_names)
    )
    fixed = {
        name: side.arenas[0].fixed[name]
        if name in layout.shared
        else torch.cat([place.rows(each.fixed[name]) for each in side.arenas])
        for name in layout.fixed
    }
    return layout.dequantize(packed, fmt, fixed, place.position)


def _stacked(each: Sequence[Tensor]) -> Tensor:
    """``[1, n, heads, head_dim]`` of each layer as fp32 ``[layers, heads, n, head_dim]``."""
    return torch.cat(list(each)).transpose(1, 2).float()


def _per_head(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y`` where several heads of ``x`` share one of ``y``."""
    apart = x.unflatten(1, (y.shape[1], -1)).flatten(2, 3)
    return (apart @ y).unflatten(2, (-1, x.shape[2])).flatten(1, 2)
