"""What is different where a prompt is stored in part (:mod:`squat_fx.layouts.kept`).

    store(prompt)          store, in the layout beneath, a shorter prompt that begins later
    append_, attend, ...   those of the layout beneath
    attend with a mask     the same with its columns moved to where the tokens are stored now

Torch operations on any device. No size depends on what numbers are, and nothing waits for a device,
so that all but the store may run in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from squat_fx.codecs import Pruned, Role, codec_from_spec, codec_spec
from squat_fx.kernels import reference
from squat_fx.kernels.reference import Arenas, Extent
from squat_fx.kernels.softmax import TOP_LEFT
from squat_fx.layouts import Format
from squat_fx.layouts import kept as layout

LOST = (
    "these {role}s lost tokens of their prompt, of which each head kept {budget}, and have no "
    "dense form; attend to keys and values with scaled_dot_product_attention or under "
    "backend='squat', or compile with a larger budget"
)
TOO_SHORT = (
    "cannot crop to {length} tokens: of the first {shortest} each head kept others; crop to "
    "{shortest} or more, or begin with the shorter prompt"
)
NOT_CAUSAL = (
    "attention with is_causal=True over a past counts keys from the first token of a prompt, some "
    "of which are lost; pass a mask"
)


@lru_cache(maxsize=64)
def beneath_format(fmt: Format) -> Format:
    """The format in which the kept tokens are stored, of the codec that rounds them."""
    if codec := _pruned(fmt):
        fmt = replace(fmt, codec=codec_spec(codec.codec))
    return layout.beneath(fmt)


def _pruned(fmt: Format) -> Pruned | None:
    """The codec that chooses tokens, if it is one; ops that only read do not know it."""
    codec = codec_from_spec(fmt.codec) if fmt.codec else None
    return codec if isinstance(codec, Pruned) else None


def beneath(arenas: Arenas, fmt: Format) -> tuple[Arenas, Format]:
    """Arenas and format of what is stored; unchanged where another codec keeps all tokens."""
    if not fmt.stored_layout.keeps_part and _pruned(fmt) is None:
        return arenas, fmt
    return replace(arenas, fixed=layout.beneath_fixed(arenas.fixed)), beneath_format(fmt)


# the prompt ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """What the layout beneath stores of a prompt.

    Attributes:
        x: ``[batch, heads, tokens - first, head_dim]``.
        valid: bool ``[batch, tokens - first]``.
        first: the position of its first token.
    """

    x: Tensor
    valid: Tensor | None
    first: int = 0


def _guide(query: Tensor | None, keys: Tensor | None, fmt: Format) -> Tensor | None:
    """What tells which tokens of a prompt to keep; None: they are all kept."""
    if not fmt.stored_layout.keeps_part:
        return None
    return query if layout.is_key(fmt) else keys


def most_packed(tokens: int, query: Tensor | None, keys: Tensor | None, fmt: Format) -> int:
    """How many of a prompt's ``tokens``, maybe symbolic, can be packed; of groups that are smaller
    than those of the other role, those that follow what was kept.
    """
    if _guide(query, keys, fmt) is None:
        return tokens
    return torch.sym_min(tokens, layout.budget(fmt) + layout.group(fmt) - fmt.token_group)  # pyright: ignore[reportReturnType]


def begins_at(packed: int, extent: Extent, fmt: Format) -> int:
    """A position before which no row of a prompt starts that has room for so many packed tokens."""
    return max(extent.watermark - fmt.sink_length - packed - fmt.token_group + 1, 0)


def prompt_of(
    arenas: Arenas,
    x: Tensor,
    valid: Tensor | None,
    query: Tensor | None,
    keys: Tensor | None,
    fmt: Format,
) -> Prompt:
    """What is stored of the prompt ``x`` ``[batch, heads, tokens, head_dim]``; the start of each
    row, and what has moved, are noted in ``arenas``, which are still empty.

    Args:
        arenas: where it will be stored.
        x, valid: the prompt; bool ``[batch, tokens]``, False for padding.
        query: ``[batch, num_heads, tokens, head_dim]``, by which tokens are chosen for keys.
        keys: for values, the arena ``moved`` of their keys.
        fmt: the stored format.
    """
    guide = _guide(query, keys, fmt)
    if guide is None:
        return Prompt(x, valid)
    (batch, _, tokens, head_dim), sinks = x.shape, fmt.sink_length
    watermark = Extent(0, 0).after(tokens, fmt).watermark
    budget, group = layout.budget(fmt), layout.group(fmt)
    first = max(watermark - sinks - group + 1 - budget, 0)
    if not first:
        return Prompt(x, valid)
    begins = torch.zeros(batch, dtype=torch.int64, device=x.device)
    if valid is not None:
        valid = valid.view(torch.bool).expand(batch, -1)
        begins = valid.int().argmax(1) + tokens * ~valid.any(1)
    packed = (watermark - begins - sinks).clamp(min=0) // group * group
    lost = (packed - budget).clamp(min=0)
    moved = guide
    if layout.is_key(fmt):
        moved = _moved(x, valid, guide, begins + sinks, packed, lost, fmt)
    start = begins + lost
    arenas.start.copy_(start)
    arenas.fixed[layout.MOVED].copy_(moved[..., : arenas.fixed[layout.MOVED].shape[-1]])
    position = torch.arange(first, tokens, device=x.device)
    source = source_of(position, start, moved, sinks).clamp(min=0)
    shorter = x.gather(2, source[..., None].expand(-1, -1, -1, head_dim))
    if valid is not None:
        # Heads of a row keep padding only where it has too little else, and then the same.
        valid = valid.gather(1, source[:, 0]) & (position > start[:, None])
        valid = valid | (position == start[:, None])
    return Prompt(shorter, valid, first)


def _moved(
    key: Tensor, valid: Tensor | None, query: Tensor, first: Tensor, packed: Tensor, lost: Tensor,
    fmt: Format,
) -> Tensor:  # fmt: skip
    """The arena ``moved`` of a prompt whose row ``b`` has ``packed[b]`` tokens from ``first[b]`` on
    that could be packed, and loses ``lost[b]`` of them.
    """
    codec = _pruned(fmt)
    assert codec is not None, f"{fmt.codec} keeps all tokens"
    token = torch.arange(key.shape[2], device=key.device)
    known = valid if valid is not None else token.new_ones(key.shape[:1] + token.shape).bool()
    candidate = (token >= first[:, None]) & (token < (first + packed)[:, None])
    votes = codec.votes(query, key, known).masked_fill(~candidate[:, None], -torch.inf)
    # Newer tokens first among equals.
    order = votes.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    chosen = (len(token) - 1 - order[..., : layout.budget(fmt)]).sort(-1).values
    slot = chosen - first[:, None, None]
    moved = lost[:, None, None] + torch.arange(slot.shape[-1], device=key.device) - slot
    of_sinks = lost[:, None, None].expand(-1, key.shape[1], 1)
    return torch.cat([of_sinks, moved * (lost > 0)[:, None, None]], -1)[:, :, None]


def source_of(position: Tensor, start: Tensor, moved: Tensor, sinks: int) -> Tensor:
    """Where the tokens stood that are stored at ``position`` ``[n]``, int64 ``[batch, heads, n]``.

    ``start`` is ``[batch]``, ``moved`` ``[batch, heads, 1, 1 + budget]``; a row has so many sinks.
    """
    token, moved = position - start.long()[:, None], moved[:, :, 0]
    index = (token - sinks + 1).clamp(min=0)
    inside = (token >= 0) & (index < moved.shape[-1])
    index = index.clamp(max=moved.shape[-1] - 1)[:, None].expand(-1, moved.shape[1], -1)
    return position - moved.gather(-1, index).long().masked_fill(~inside[:, None], 0)


# attention and reading ----------------------------------------------------------------------------


def moved_mask(
    mask: Tensor | None,
    causal: int,
    key: Arenas,
    fmt: Format,
    query: Tensor,
    kv_len: int | None = None,
) -> tuple[Tensor | None, int]:
    """A mask with its columns where the keys are stored, and the causality besides; both unchanged
    where all tokens are kept.

    Args:
        mask: broadcastable to ``[batch, num_heads, q_len, kv_len]``.
        causal: as attention takes it.
        key, fmt: the stored keys.
        query: ``[batch, num_heads, q_len, head_dim]``; of new tokens, or, where it is said how many
            keys there are, the newest ones of a prompt.
        kv_len: see there.

    Raises:
        ValueError: the causality is one that depends on where keys stood.
    """
    if not fmt.stored_layout.keeps_part:
        return mask, causal
    if kv_len is not None:
        mask = reference.with_causality(mask, causal, query.shape[2], kv_len, query.device)
        causal = reference.NO_CAUSALITY
    if causal == TOP_LEFT:
        raise ValueError(NOT_CAUSAL)
    if mask is None or mask.shape[-1] == 1:
        return mask, causal
    batch, heads = key.dense.shape[:2]
    num_heads = query.shape[1]
    position = torch.arange(mask.shape[-1], device=mask.device)
    source = source_of(position, key.start, key.fixed[layout.MOVED], fmt.sink_length).clamp(min=0)
    source = source.repeat_interleave(num_heads // heads, 1)[:, :, None]
    mask = mask[(None,) * (4 - mask.dim())].expand(batch, num_heads, -1, -1)
    return mask.gather(-1, source.expand(-1, -1, mask.shape[2], -1)), causal


def is_whole(arenas: Arenas, fmt: Format) -> bool:
    """Whether no row lost a token; reads from the device."""
    return not fmt.stored_layout.keeps_part or not bool(arenas.fixed[layout.MOVED].any())


def check_whole(arenas: Arenas, fmt: Format, role: Role | None = None) -> None:
    """Refuse to read what lost tokens.

    Raises:
        ValueError: some row did.
    """
    if not is_whole(arenas, fmt):
        role = role or ("key" if layout.is_key(fmt) else "value")
        raise ValueError(LOST.format(role=role, budget=layout.budget(fmt)))


def check_crop(arenas: Arenas, fmt: Format, length: int) -> None:
    """Refuse to crop into what the heads kept different tokens of.

    Raises:
        ValueError: the message says to how many tokens it may be cropped.
    """
    if is_whole(arenas, fmt):
        return
    lost = arenas.fixed[layout.MOVED][:, 0, 0, 0] > 0
    end = arenas.start + fmt.sink_length + layout.budget(fmt)
    shortest = int((end * lost).max())
    if length < shortest:
        raise ValueError(TOO_SHORT.format(length=length, shortest=shortest))
