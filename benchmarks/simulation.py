"""Decoding over a rounded cache, simulated in one forward pass.

Queries of the prompt attend exactly. The query at position ``t`` after it sees every key and value
that is packed by then as it is after rounding, and the others exactly:

    token i is packed if  sinks <= i < sinks + group * floor((t - residual - sinks) / group)

because ``t`` tokens are stored when token ``t`` attends, and tokens leave the residual a group at a
time. A rounded number never changes again, so one pass over all tokens sees what each step would
see, some twenty times as fast as token by token: enough to try a hundred variants of a codec.
Tokens that ``pruned`` drops when it stores the prompt are hidden from all later queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import squat_fx
from squat_fx.codecs import Fit, Role
from squat_fx.kernels import kept, reference
from squat_fx.kernels.reference import Arenas
from squat_fx.layouts import Format
from squat_fx.layouts.kept import MOVED, beneath
from squat_fx.layouts.rotary import Rotation

NAME = "squat_fx_simulation"


@dataclass(frozen=True)
class Site:
    """The attention of one layer, and what a rounding may know of it.

    Attributes:
        layer: its number in the model.
        module: transformers' attention module.
        prompt, residual, sinks: tokens that are fed in one call, kept as newest, kept as first.
        frequency: radians from token to token of each pair of channels that the rotary embedding
            turns, ``[pairs]``.
    """

    layer: int
    module: Any
    prompt: int
    residual: int
    sinks: int
    frequency: Tensor | None = None

    def packed(self, tokens: int, group: int) -> int:
        """How many of ``tokens`` stored tokens are packed, ``group`` at a time."""
        return max(tokens - self.residual - self.sinks, 0) // group * group


class Rounding(Protocol):
    """What a cache does to keys and values."""

    residual: int
    sinks: int

    def groups(self, site: Site, key: Tensor) -> tuple[int, int]:
        """Tokens that are packed together, of keys and of values."""
        ...

    def __call__(
        self, site: Site, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values after rounding.

        Args:
            site: where.
            query: ``[batch, heads, tokens, head_dim]``, of all tokens; to be looked at for those of
                the prompt only.
            key, value: ``[batch, kv_heads, tokens, head_dim]``.
        """
        ...

    def lost(self, site: Site, query: Tensor, key: Tensor) -> Tensor | None:
        """Which tokens are not stored, bool ``[batch, kv_heads, tokens]``; None: they all are."""
        return None


class Simulation:
    """An attention function of transformers: causal, over everything or a sliding window."""

    def __init__(self, rounding: Rounding | None, prompt: int, measure: bool = False) -> None:
        """With ``measure``, ``errors`` is filled: squares of the errors of attention's outputs by
        layer, and of the outputs, given the same queries.
        """
        self._rounding = rounding
        self._prompt = prompt
        self._measure = measure
        self._rotary: Any = None
        self.errors: dict[int, Tensor] = {}

    @contextmanager
    def of(self, model: Any) -> Iterator[None]:
        """Use it in ``model`` while the context lasts; without a rounding nothing changes."""
        ALL_ATTENTION_FUNCTIONS.register(NAME, self)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        self._rotary = getattr(model.model, "rotary_emb", None)
        before = model.config._attn_implementation
        model.config._attn_implementation = before if self._rounding is None else NAME
        try:
            yield
        finally:
            model.config._attn_implementation = before

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Shapes are those of :class:`Rounding`; returns ``[batch, tokens, heads, head_dim]``."""
        assert self._rounding is not None
        prompt, device = self._prompt, key.device
        window = options.get("sliding_window") or key.shape[2]
        seen = None if window >= prompt else visible(prompt, 0, window, device)
        of_prompt = F.scaled_dot_product_attention(
            query[:, :, :prompt], key[:, :, :prompt], value[:, :, :prompt],
            attn_mask=seen, is_causal=seen is None, scale=scaling, enable_gqa=True,
        )  # fmt: skip
        # Of a prompt that is longer than the window, only what the next token sees is stored.
        first = max(prompt - window + 1, 0)
        query, key, value = (x[:, :, first:] for x in (query, key, value))
        prompt, tokens, rounding = prompt - first, key.shape[2], self._rounding
        frequency = frequencies(self._rotary, module)
        site = Site(module.layer_idx, module, prompt, rounding.residual, rounding.sinks, frequency)
        packed = _packed(site, tokens, rounding.groups(site, key), device)
        seen = visible(tokens, prompt, window, device)
        scale = scaling or key.shape[-1] ** -0.5
        rounded = rounding(site, query, key, value)
        if (lost := rounding.lost(site, query, key)) is not None:
            seen = seen & ~lost[:, :, None, None]
        query = query[:, :, prompt:]
        of_steps = _steps(query, key, value, *rounded, *packed, seen, scale)
        if self._measure:
            exact = _steps(query, key, value, key, value, *packed, seen, scale)
            squares = [x.double().square().sum() for x in (of_steps - exact, exact)]
            before = self.errors.get(site.layer, 0)
            self.errors[site.layer] = before + torch.stack(squares)
        return torch.cat([of_prompt, of_steps], 2).transpose(1, 2).contiguous(), None


def frequencies(rotary: Any, attention: Any) -> Tensor | None:
    """Those of the rotary embedding that an attention of transformers gets, if it gets one."""
    kind = getattr(attention, "layer_type", None)
    return getattr(rotary, f"{kind}_inv_freq", getattr(rotary, "inv_freq", None))


def visible(tokens: int, first: int, window: int, device: torch.device) -> Tensor:
    """Bool ``[tokens - first, tokens]``: what each token from ``first`` on may attend to."""
    t = torch.arange(first, tokens, device=device)[:, None]
    i = torch.arange(tokens, device=device)[None]
    return (i <= t) & (t - i < window)


def _packed(
    site: Site, tokens: int, groups: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Bool ``[steps, tokens]``: which keys and which values each step finds packed."""
    found = []
    for group in groups:
        ends = [site.sinks + site.packed(t, group) for t in range(site.prompt, tokens)]
        i = torch.arange(tokens, device=device)[None]
        found.append((i >= site.sinks) & (i < torch.tensor(ends, device=device)[:, None]))
    return found[0], found[1]


def _steps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rounded_key: Tensor,
    rounded_value: Tensor,
    key_is_packed: Tensor,
    value_is_packed: Tensor,
    visible: Tensor,
    scale: float,
) -> Tensor:
    """Attention of the tokens after the prompt."""
    query = query.unflatten(1, (key.shape[1], -1))
    exact, rounded = (query @ x[:, :, None].mT for x in (key, rounded_key))
    scores = torch.where(key_is_packed, rounded, exact) * scale
    probs = scores.masked_fill_(~visible, -torch.inf).softmax(-1)
    out = (probs * ~value_is_packed) @ value[:, :, None]
    out += (probs * value_is_packed) @ rounded_value[:, :, None]
    return out.flatten(1, 2)


@dataclass(frozen=True)
class OfConfig(Rounding):
    """What ``squat_fx.compile(model, config)`` does, by the reference's arithmetic."""

    config: squat_fx.Config

    @property
    def residual(self) -> int:
        return self.config.residual_length

    @property
    def sinks(self) -> int:
        return self.config.sink_length

    def groups(self, site: Site, key: Tensor) -> tuple[int, int]:
        """See :class:`Rounding`."""
        of_key, of_value = self._formats(site, key)
        return of_key.token_group, of_value.token_group

    def __call__(
        self, site: Site, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Rounding`."""
        formats = self._formats(site, key)
        given = self.config.basis(site.layer, formats[0], key.device)
        of_layout = formats[0].stored_layout
        if of_layout.given == "frequency" and site.frequency is not None:
            given = site.frequency
            rotation = Rotation(2 * len(given), "halves")
            formats = (of_layout.with_rotation(formats[0], rotation), formats[1])
        query = self._scored(site, query)
        stored = stored_tokens(site, query, key, formats[0])
        return (
            round_as("key", key, query, formats[0], site, given, stored),
            round_as("value", value, query, formats[1], site, None, stored),
        )

    def lost(self, site: Site, query: Tensor, key: Tensor) -> Tensor | None:
        """See :class:`Rounding`."""
        query = self._scored(site, query)
        stored = stored_tokens(site, query, key, self._formats(site, key)[0])
        if stored is None:
            return None
        return torch.ones(key.shape[:3], dtype=torch.bool, device=key.device).scatter_(
            2, stored, False
        )

    def _scored(self, site: Site, query: Tensor) -> Tensor:
        """The queries as the codec wants to see them."""
        if "scores" not in self.config.resolved_codec.taps("key"):
            return query
        return query * (site.module.scaling * query.shape[3] ** 0.5)

    def _formats(self, site: Site, key: Tensor) -> tuple[Format, Format]:
        layers, heads, head_dim = site.module.config.num_hidden_layers, *key.shape[1::2]
        return formats_of(self.config, site.module, layers, heads, head_dim)


def formats_of(
    config: squat_fx.Config, module: Any, layers: int, heads: int, head_dim: int
) -> tuple[Format, Format]:
    """The stored formats of an attention module's keys and values; a sliding window, which forgets
    by itself, keeps all its tokens.
    """
    found = config.formats(module.layer_idx, layers, heads, head_dim, head_dim)
    if isinstance(found, str):
        raise ValueError(found)
    is_window = getattr(module, "sliding_window", None)
    return (beneath(found[0]), beneath(found[1])) if is_window else found


def stored_tokens(site: Site, query: Tensor, key: Tensor, fmt: Format) -> Tensor | None:
    """The tokens that are stored, int64 ``[batch, kv_heads, stored]``, if some of the prompt are
    not.
    """
    if not fmt.stored_layout.keeps_part:
        return None
    arenas = reference.empty_arenas(key, 0, fmt)
    of_prompt = slice(0, site.prompt)
    kept.prompt_of(arenas, key[:, :, of_prompt], None, query[:, :, of_prompt], None, fmt)
    start = int(arenas.start[0])
    position = torch.arange(start, key.shape[2], device=key.device)
    moved = arenas.fixed[MOVED]
    return kept.source_of(position, arenas.start, moved, fmt.sink_length) if start else None


def round_as(
    role: Role, x: Tensor, query: Tensor, fmt: Format, site: Site, given: Tensor | None = None,
    tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``x`` after it was stored: fitted on the prompt, its tokens packed with feedback, those that
    came later without; of the ``tokens`` if not all are stored. ``given`` is what the layout is
    given: a basis, or frequencies.
    """
    of_prompt = slice(0, site.prompt)
    arenas = reference.empty_arenas(x, 0, fmt, given)
    fit = reference.learn(arenas, x[:, :, of_prompt], None, query[:, :, of_prompt], fmt, role)
    if tokens is None:
        return _packed_and_back(x, fmt, site, arenas, fit)
    place = tokens[..., None].expand(-1, -1, -1, x.shape[3])
    site = replace(site, prompt=site.prompt - x.shape[2] + tokens.shape[2])
    return x.scatter(2, place, _packed_and_back(x.gather(2, place), fmt, site, arenas, fit))


def _packed_and_back(x: Tensor, fmt: Format, site: Site, arenas: Arenas, fit: Fit) -> Tensor:
    """``x``, of which all that is packed by the end went through its codes."""
    out = x.clone()
    stored = site.packed(site.prompt, fmt.token_group)
    end = site.packed(x.shape[2], fmt.token_group)
    for first, last, feedback in ((0, stored, fit.feedback), (stored, end, None)):
        if first < last:
            position = site.sinks + first
            tokens = slice(position, site.sinks + last)
            packed = reference.quantize(
                x[:, :, tokens], None, fmt, arenas.fixed, feedback, first, position
            )
            reference.dequantize_groups(packed, fmt, out[:, :, tokens], arenas.fixed, position)
    return out


@dataclass(frozen=True)
class PlainKivi(Rounding):
    """KIVI, written without anything of squat_fx: where both agree, both say the same thing.

    Attributes:
        bits, group_size: of the rounding; keys per channel, values per token.
        residual, sinks: see :class:`Rounding`.
    """

    bits: int = 2
    group_size: int = 32
    residual: int = 32
    sinks: int = 4

    def groups(self, site: Site, key: Tensor) -> tuple[int, int]:
        """Values are packed one by one."""
        return self.group_size, 1

    def __call__(
        self, site: Site, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Each channel of a group of keys, each group of channels of a value, in its own range."""
        first, tokens = self.sinks, key.shape[2]
        end = first + (tokens - first) // self.group_size * self.group_size
        groups = key[:, :, first:end].unflatten(2, (-1, self.group_size))
        middle = round_min_max(groups, 3, self.bits).flatten(2, 3)
        rounded_key = torch.cat([key[:, :, :first], middle, key[:, :, end:]], 2)
        channels = value.unflatten(3, (-1, min(self.group_size, value.shape[3])))
        return rounded_key, round_min_max(channels, 4, self.bits).flatten(3, 4)


def round_min_max(x: Tensor, dim: int, bits: int) -> Tensor:
    """``x`` on ``2**bits`` even levels from its minimum along ``dim``; both parameters in fp16."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    levels = 2**bits - 1
    step = ((high - low) / levels).clamp(min=1e-6).half().float()
    low = low.half().float()
    return torch.round((x - low) / step).clamp(0, levels) * step + low
