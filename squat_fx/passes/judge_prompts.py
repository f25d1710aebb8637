"""Nodes that measure what a prompt's store does to attention: :mod:`squat_fx.kernels.judge`.

    once:        row, queries_at, keys_at, there = squat_fx.judged_tokens(key, valid, ...)
    each layer:  judged = query[row, :, queries_at], key[row, :, keys_at], value[row, :, sample_at]
    at the end:  errors = squat_fx.attend_errors(judged of all layers, their arenas, ...)

Only the few tokens of a layer that are judged are kept until the end, and layers that are alike are
judged in one call: a call for each of them costs a short prompt more than the arithmetic.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from squat_fx.codecs import Format
from squat_fx.kernels.judge import Plan
from squat_fx.passes.records import AttentionSite
from squat_fx.passes.spelling import sizes_of, value_of


@dataclass(frozen=True, eq=False)
class Chosen:
    """The nodes that say which tokens are judged: what ``judged_tokens`` was given and returned,
    its positions of the sample, batch and length of the prompt, and masks at those tokens.
    """

    valid: fx.Node | None
    all: tuple[fx.Node, ...]
    sample: fx.Node
    sizes: tuple[fx.Node | int, fx.Node | int]
    masks: dict[fx.Node | None, fx.Node | None] = field(default_factory=lambda: {None: None})

    @classmethod
    def of(
        cls, key: fx.Node, valid: fx.Node | None, site: AttentionSite, graph: fx.Graph
    ) -> Chosen:
        """New nodes, for the prompt whose keys are ``key``."""
        formats = site.key.fmt, site.value.fmt
        layouts = [fmt.layout for fmt in formats]
        arguments = (key, valid, layouts, *(fmt.to_ints() for fmt in formats))
        made = graph.call_function(torch.ops.squat_fx.judged_tokens.default, arguments)
        parts = tuple(graph.call_function(operator.getitem, (made, i)) for i in range(4))
        sampled = (slice(None), slice(None, Plan.of(*formats).sampled))
        sample = graph.call_function(operator.getitem, (parts[2], sampled))
        sizes = _size(key, 0, graph), _size(key, 2, graph)
        return cls(valid, parts, sample, sizes)

    @property
    def places(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Positions of what is judged of the queries, keys and values of a layer."""
        return self.all[1], self.all[2], self.sample

    def kept(self, x: fx.Node, at: fx.Node, graph: fx.Graph) -> fx.Node:
        """What is judged of one of these, ``[1, tokens, heads, head_dim]``."""
        return graph.call_function(operator.getitem, (x, (self.all[0], slice(None), at)))

    def mask(self, mask: fx.Node | None, graph: fx.Graph) -> fx.Node | None:
        """A mask ``[batch | 1, heads | 1, queries | 1, keys | 1]`` at those tokens, ``[1, queries,
        keys, heads | 1]``.
        """
        if mask not in self.masks:
            assert mask is not None
            row, queries, keys, _ = self.all
            everything, batch, tokens = slice(None), *self.sizes
            whole = graph.call_method("expand", (mask, batch, -1, tokens, tokens))
            places = (
                (row, (everything, everything, None)),
                (queries, (everything, everything, None)),
                (keys, (everything, None)),
            )
            at = [graph.call_function(operator.getitem, place) for place in places]
            index = (at[0], everything, *at[1:])
            self.masks[mask] = graph.call_function(operator.getitem, (whole, index))
        return self.masks[mask]


def _size(x: fx.Node, dim: int, graph: fx.Graph) -> fx.Node | int:
    """A size that is a number is no node: nothing but tensors and symbols may cross regions."""
    value = value_of(x).shape[dim]
    if isinstance(value, int):
        return value
    size = graph.call_method("size", (x, dim))
    size.meta["val"] = value
    return size


def which(key: fx.Node, valid: fx.Node | None, site: AttentionSite) -> Any:
    """What is equal where the same tokens are chosen."""
    formats: tuple[Format, Format] = (site.key.fmt, site.value.fmt)
    return valid, sizes_of(key)[2], Plan.of(*formats), value_of(key).device


@dataclass(frozen=True)
class Judged:
    """What is kept of a layer: the judged queries, keys and values, its arenas, the one that the
    model gives, and the mask at those tokens.
    """

    site: AttentionSite
    chosen: Chosen
    kept: tuple[fx.Node, ...]
    arenas: tuple[fx.Node, ...]
    given: fx.Node | None
    mask: fx.Node | None

    @property
    def alike(self) -> Any:
        """Equal for layers that one call judges."""
        attention, key, value = self.site.attention, self.site.key, self.site.value
        numbers = attention.scale, attention.causal, attention.softcap, attention.sinks is None
        nodes = key.stored, value.stored, attention.query
        looks = tuple((tuple(sizes_of(node)), value_of(node).dtype) for node in nodes)
        heads = self.site.num_queries_per_kv, self.site.heads
        own = None if self.given is None else self.site
        place = self.mask, id(self.chosen), id(own)
        return key.fmt, value.fmt, numbers, looks, heads, place


def errors_of(group: Sequence[Judged], due: fx.Node | None, graph: fx.Graph) -> fx.Node:
    """The errors of layers that are alike, fp32 ``[layers]``; zeros unless ``due``."""
    first = group[0]
    attention, formats = first.site.attention, (first.site.key.fmt, first.site.value.fmt)
    sinks = [each.site.attention.sinks for each in group if each.site.attention.sinks is not None]
    return graph.call_function(
        torch.ops.squat_fx.attend_errors.default,
        (
            *([each.kept[i] for each in group] for i in range(3)),
            [arena for each in group for arena in each.arenas],
            first.given,
            sinks,
            first.mask,
            list(first.chosen.all),
            first.chosen.sizes[1],
            first.chosen.valid is not None,
            attention.scale,
            attention.causal,
            attention.softcap,
            [fmt.layout for fmt in formats],
            *(fmt.to_ints() for fmt in formats),
            due,
        ),
    )
