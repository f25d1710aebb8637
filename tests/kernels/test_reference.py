"""The specification of the ops: however tokens arrive, the same is stored, and nobody notices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from squat_fx.codecs import (
    Format,
    Kivi,
    Kvarn,
    Polar,
    PolarRope,
    Qjl,
    Role,
    Squat,
    Svdq,
    Think,
    TurboQuant,
)
from squat_fx.kernels import reference
from squat_fx.kernels.reference import (
    BOTTOM_RIGHT,
    FEW_QUERIES,
    NO_CAUSALITY,
    TOP_LEFT,
    Arenas,
    Extent,
    dense_past,
    dequantize_groups,
    drop_front,
    drop_step,
    empty_arenas,
    quantize,
    truncate,
    valid_tokens,
    write,
)
from squat_fx.layouts.hadamard import rotation_pair
from squat_fx.layouts.latent_rope import num_latent
from squat_fx.layouts.planes import LANES
from squat_fx.layouts.rotary import Pairing, Rotation
from tests.conftest import left_padding, randn, stored_format, whole_numbers

HEADS = 2
NOTHING = Extent(0, 0)


KINDS = (
    *("lossless", "kivi", "squat", "kvarn", "think", "polar", "polar_rope", "turboquant", "qjl"),
    "svdq",
)
ROTATED_KINDS = ("squat", "kvarn", "polar", "turboquant")
LATENT = ("latent/rope", "latent/sparse")
OF_PRODUCTS = ("planes/token", "planes/dual", "polar/token", "levels/token", "signs/token")
"""Layouts whose numbers come out of a matrix product."""


@st.composite
def formats(draw: st.DrawFn, kind: str | None = None, role: Role | None = None) -> Format:
    """A stored format whose groups are so small that forty tokens fill several."""
    kind = kind or draw(st.sampled_from(KINDS))
    role = role or draw(st.sampled_from(["key", "value"]))
    sizes = {
        "head_dim": draw(st.sampled_from([16, 20, 64 if kind in ROTATED_KINDS else 40])),
        "residual_length": draw(st.integers(0, 9)),
        "sink_length": draw(st.integers(0, 3)),
    }
    if kind == "lossless":
        return stored_format(role=role, **sizes)
    if kind == "squat":
        planes = -(-sizes["head_dim"] // LANES)
        widths = draw(st.tuples(*[st.integers(0, 8)] * planes).filter(any))
        return stored_format(Squat(), role, bits=widths, latent=draw(st.booleans()), **sizes)
    if kind == "polar":
        return stored_format(
            Polar(), role, bits=draw(st.sampled_from([3.375, 3.875, 4.25])), **sizes
        )
    if kind == "svdq":
        schedule = tuple(sorted(draw(st.lists(st.integers(1, 8), min_size=1)), reverse=True))
        codec = Svdq(schedule=schedule, budget=draw(st.sampled_from([None, 1024])))
        fmt = stored_format(codec, role, **sizes)
        pairing, pairs = draw(st.sampled_from(get_args(Pairing))), draw(st.integers(0, 8))
        turned = role == "key" and pairs
        return fmt.stored_layout.with_rotation(fmt, Rotation(2 * pairs, pairing)) if turned else fmt
    if kind == "turboquant":
        planes = -(-sizes["head_dim"] // LANES)
        widths = draw(st.tuples(*[st.integers(1, 4)] * planes))
        return stored_format(TurboQuant(draw(st.booleans())), role, bits=widths, **sizes)
    codecs = {"kivi": Kivi(), "kvarn": Kvarn(), "think": Think(), "polar_rope": PolarRope(32)}
    codec = Qjl(48, draw(st.integers(0, 3)), 32) if kind == "qjl" else codecs[kind]
    most = 4 if kind == "polar_rope" else 8
    fmt = stored_format(codec, role, bits=draw(st.sampled_from([1, 2, 3, 4, most])), **sizes)
    return replace(fmt, token_group=4) if fmt.token_group > 1 else fmt


@dataclass(frozen=True)
class Prompt:
    """``x`` ``[batch, heads, tokens, head_dim]``; row ``b`` has ``pads[b]`` pads of garbage."""

    fmt: Format
    x: Tensor
    pads: list[int]

    @property
    def valid(self) -> Tensor:
        """Bool ``[batch, tokens]``."""
        return left_padding(self.pads, self.x.shape[2])

    def row(self, b: int) -> Prompt:
        """Row ``b`` alone, without its padding."""
        return Prompt(self.fmt, self.x[b : b + 1, :, self.pads[b] :], [0])


@st.composite
def prompts(
    draw: st.DrawFn, kind: str | None = None, least_tokens: int = 1, role: Role | None = None
) -> Prompt:
    """A left-padded batch; some rows may be nothing but padding.

    Where numbers are rounded after a matrix product they are whole, so that its sums are exact.
    """
    fmt, tokens = draw(formats(kind, role)), draw(st.integers(least_tokens, 40))
    pads = draw(
        st.lists(st.integers(0, tokens), min_size=1, max_size=3) | st.just([0]) | st.just([0, 0])
    )
    shape, seed = (len(pads), HEADS, tokens, fmt.head_dim), draw(st.integers(0, 2**16))
    whole = fmt.layout in OF_PRODUCTS
    x = whole_numbers(*shape, seed=seed, largest=3) if whole else randn(*shape, seed=seed)
    pad = ~left_padding(pads, tokens)[:, None, :, None]
    return Prompt(fmt, torch.where(pad, x * 1e3, x), pads)


def poisoned_arenas(x: Tensor, fmt: Format) -> Arenas:
    """Arenas for all of ``x`` in which whatever was forgotten to be written shows.

    Offsets, factors, kept channels and a basis, if ``fmt`` has them, are the same for every row;
    latent channels are single ones, so that their sums are exact, too.
    """
    basis = some_basis(fmt.head_dim) if fmt.latent else None
    arenas = empty_arenas(x, -(-x.shape[2] // fmt.token_group) * fmt.token_group, fmt, basis)
    for arena in (*arenas.packed, arenas.dense):
        arena.fill_(torch.nan if arena.is_floating_point() else 0xA5)
    if fmt.affine and arenas.affine is not None:
        arenas.affine[:, :, :1] = whole_numbers(1, HEADS, 1, fmt.head_dim, seed=1, largest=9)
        arenas.affine[:, :, 1:] = whole_numbers(1, HEADS, 1, fmt.head_dim, seed=2, largest=1).exp2()
    if fmt.layout in LATENT:
        arenas.fixed["basis"].copy_(torch.eye(fmt.head_dim)[: num_latent(fmt)])
        arenas.fixed["center"].copy_(whole_numbers(1, HEADS, 1, fmt.head_dim, seed=1, largest=1))
        arenas.fixed["scale"].fill_(0.125)
        arenas.fixed["zero_point"].fill_(-3.0)
        arenas.fixed["frequency"].fill_(0.03)
    for channels in (t for name, t in arenas.fixed.items() if name == "channels"):
        channels += fmt.head_dim - channels.shape[-1]  # the last ones
    return arenas


def some_basis(head_dim: int) -> Tensor:
    """A basis of either head and its inverse, neither orthogonal nor ever inexact."""
    powers = 2.0 ** whole_numbers(HEADS, 1, head_dim, seed=2, largest=1)
    there, back = rotation_pair(head_dim, torch.device("cpu"))
    return torch.stack([there * powers, back / powers.mT])


def stored(prompt: Prompt, cuts: list[int] | None = None) -> tuple[Arenas, Extent]:
    """Append the prompt, at once or cut before the tokens ``cuts``."""
    arenas, extent = poisoned_arenas(prompt.x, prompt.fmt), NOTHING
    edges = sorted({0, prompt.x.shape[2], *(cuts or [])})
    for first, last in pairwise(edges):
        valid = prompt.valid[:, first:last] if any(prompt.pads) else None
        write(arenas, prompt.x[:, :, first:last], valid, extent, prompt.fmt)
        extent = extent.after(last - first, prompt.fmt)
    return arenas, extent


def assert_same_numbers(a: Tensor, b: Tensor, fmt: Format) -> None:
    """Equal; where they come out of a matrix product, to the order of its sums."""
    if fmt.layout not in OF_PRODUCTS:
        assert torch.equal(a, b)
    else:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def packed_rows(arenas: Arenas, extent: Extent, fmt: Format) -> list[Tensor]:
    """What is written of each packed arena, row by row."""
    return [
        arena[b, :, : extent.packed(start, fmt) // fmt.tokens_per_slot(name)]
        for b, start in enumerate(arenas.start.tolist())
        for name, arena in zip(fmt.packed_names, arenas.packed, strict=True)
    ]


def half_step(arenas: Arenas, extent: Extent, fmt: Format, b: int) -> Tensor:
    """Half the step of each packed number of row ``b``, ``[heads, tokens, head_dim]``."""
    scale = packed_rows(arenas, extent, fmt)[b * 3 + 1].float()
    scale = scale.repeat_interleave(fmt.token_group, 1).repeat_interleave(fmt.channel_group, 2)
    return scale[..., : fmt.head_dim] / 2


# what is stored ---------------------------------------------------------------------------------


@given(prompt=prompts("lossless"))
def test_the_lossless_format_gives_back_every_token(prompt: Prompt) -> None:
    expected = prompt.x.masked_fill(~prompt.valid[:, None, :, None], 0.0)
    assert torch.equal(dense_past(*stored(prompt), prompt.fmt), expected)


@given(prompt=prompts("kivi"))
def test_first_and_recent_tokens_are_exact_and_the_rest_within_half_a_step(prompt: Prompt) -> None:
    fmt, (arenas, extent) = prompt.fmt, stored(prompt)
    past = dense_past(arenas, extent, fmt)
    for b, pads in enumerate(prompt.pads):
        x, restored = prompt.x[b, :, pads:], past[b, :, pads:]
        end = fmt.sink_length + extent.packed(pads, fmt)
        assert not past[b, :, :pads].any()
        assert torch.equal(restored[:, : fmt.sink_length], x[:, : fmt.sink_length])
        assert torch.equal(restored[:, end:], x[:, end:])
        assert x.shape[1] - end <= fmt.residual_length + fmt.token_group - 1
        assert x.shape[1] - end >= min(fmt.residual_length, x.shape[1] - fmt.sink_length)
        error = (restored - x)[:, fmt.sink_length : end].abs()
        slack = 2.0**-9 * x.abs().amax() if x.numel() else 0.0
        assert (error <= half_step(arenas, extent, fmt, b) + slack).all()


@given(prompt=prompts(), data=st.data())
def test_appending_in_any_split_equals_storing_at_once(prompt: Prompt, data: st.DataObject) -> None:
    tokens = prompt.x.shape[2]
    cuts = data.draw(st.lists(st.integers(0, tokens)) | st.just(list(range(tokens))), label="cuts")
    at_once, extent = stored(prompt)
    split, split_extent = stored(prompt, cuts)
    assert split_extent == extent
    assert torch.equal(split.start, at_once.start)
    rows = zip(
        packed_rows(split, extent, prompt.fmt),
        packed_rows(at_once, extent, prompt.fmt),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in rows)
    numbers = dense_past(split, extent, prompt.fmt), dense_past(at_once, extent, prompt.fmt)
    assert_same_numbers(*numbers, prompt.fmt)


@given(prompt=prompts())
def test_a_row_is_stored_as_if_it_were_alone(prompt: Prompt) -> None:
    fmt, (arenas, extent) = prompt.fmt, stored(prompt)
    past, count = dense_past(arenas, extent, fmt), len(fmt.packed_names)
    for b, pads in enumerate(prompt.pads):
        row = prompt.row(b)
        is_turned = fmt.layout in LATENT and any(fmt.details[:1])  # by its place in the cache
        if row.x.shape[2] and not (pads and is_turned):
            alone = stored(row)
            found = packed_rows(arenas, extent, fmt)[b * count : (b + 1) * count]
            assert all(map(torch.equal, found, packed_rows(*alone, fmt)))
            assert_same_numbers(past[b : b + 1, :, pads:], dense_past(*alone, fmt), fmt)


@given(prompt=prompts(), garbage=st.sampled_from([0.0, 1e4, torch.inf, torch.nan]))
def test_padding_never_shows(prompt: Prompt, garbage: float) -> None:
    x = prompt.x.masked_fill(~prompt.valid[:, None, :, None], garbage)
    other = stored(replace(prompt, x=x))
    assert torch.equal(dense_past(*other, prompt.fmt), dense_past(*stored(prompt), prompt.fmt))


@given(prompt=prompts(), data=st.data())
def test_permuting_rows_commutes_with_dequantize(prompt: Prompt, data: st.DataObject) -> None:
    order = torch.tensor(data.draw(st.permutations(range(len(prompt.pads))), label="order"))
    arenas, extent = stored(prompt)
    permuted = replace(
        arenas,
        packed=tuple(a[order] for a in arenas.packed),
        dense=arenas.dense[order],
        start=arenas.start[order],
        fixed={
            name: t if name in prompt.fmt.stored_layout.shared else t[order]
            for name, t in arenas.fixed.items()
        },
    )
    expected = dense_past(arenas, extent, prompt.fmt)[order]
    assert_same_numbers(dense_past(permuted, extent, prompt.fmt), expected, prompt.fmt)


# what is forgotten ------------------------------------------------------------------------------


@given(prompt=prompts(least_tokens=2), data=st.data())
def test_cropping_commutes_with_dequantize(prompt: Prompt, data: st.DataObject) -> None:
    arenas, extent = stored(prompt)
    length = data.draw(st.integers(1, extent.length - 1), label="length")
    expected = dense_past(arenas, extent, prompt.fmt)[:, :, :length]
    cropped = Extent(length, min(extent.watermark, length))
    truncate(arenas, extent, cropped, prompt.fmt)
    assert_same_numbers(dense_past(arenas, cropped, prompt.fmt), expected, prompt.fmt)


@given(prompt=prompts("lossless", least_tokens=2), data=st.data())
@example(prompt=Prompt(stored_format(), randn(2, HEADS, 9, 16), [0, 6]), data=None)
def test_what_is_appended_after_a_crop_is_kept(prompt: Prompt, data: st.DataObject | None) -> None:
    """Also by a row that the crop left with nothing but padding."""
    fmt, (arenas, extent) = prompt.fmt, stored(prompt)
    length = data.draw(st.integers(1, extent.length - 1), label="length") if data else 3
    cropped = Extent(length, min(extent.watermark, length))
    expected = dense_past(arenas, extent, fmt)[:, :, :length]
    truncate(arenas, extent, cropped, fmt)
    new = randn(*prompt.x.shape[:2], prompt.x.shape[2] - length, fmt.head_dim, seed=7)
    write(arenas, new, None, cropped, fmt)
    past = dense_past(arenas, cropped.after(new.shape[2], fmt), fmt)
    assert torch.equal(past, torch.cat([expected, new], 2))


@given(prompt=prompts(least_tokens=2), data=st.data())
def test_a_write_is_invisible_to_a_reader_of_the_old_extent(
    prompt: Prompt, data: st.DataObject
) -> None:
    """What makes a run harmless that dies after it wrote: its caller only has to forget it."""
    fmt, tokens = prompt.fmt, prompt.x.shape[2]
    new_tokens = data.draw(st.just(1) | st.integers(1, tokens - 1), label="new tokens")
    cut = tokens - new_tokens
    before = replace(prompt, x=prompt.x[:, :, :cut], pads=[min(p, cut) for p in prompt.pads])
    half_written, extent = stored(before)
    arenas = poisoned_arenas(prompt.x, fmt)
    for arena, old in zip(arenas.packed, half_written.packed, strict=True):
        arena[:, :, : old.shape[2]] = old
    arenas = replace(arenas, dense=half_written.dense, start=half_written.start)
    expected = dense_past(arenas, extent, fmt)

    dense = arenas.dense if new_tokens == 1 else arenas.dense.clone()
    written = replace(arenas, dense=dense)
    write(written, prompt.x[:, :, cut:], prompt.valid[:, cut:], extent, fmt)
    assert torch.equal(dense_past(arenas, extent, fmt), expected)
    longer = dense_past(written, extent.after(new_tokens, fmt), fmt)
    assert_same_numbers(longer, dense_past(*stored(prompt), fmt), fmt)


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("residual_length", [0, 5])
def test_no_single_token_is_visible_to_a_reader_of_the_old_extent(
    role: Role, residual_length: int
) -> None:
    """In every state of the ring, the full one included, one slot is spare."""
    fmt = stored_format(role=role, residual_length=residual_length)
    x, extent = randn(1, HEADS, 40, 16), NOTHING
    arenas = poisoned_arenas(x, fmt)
    for i in range(40):
        write(arenas, x[:, :, i : i + 1], None, extent, fmt)
        assert torch.equal(dense_past(arenas, extent, fmt), x[:, :, :i])
        extent = extent.after(1, fmt)


def test_several_tokens_may_reuse_ring_slots() -> None:
    """Why the caller of such a write hands it a copy of the dense buffer."""
    fmt = stored_format(residual_length=4, sink_length=0)
    x = randn(1, HEADS, 40, 16)
    arenas = poisoned_arenas(x, fmt)
    write(arenas, x[:, :, :10], None, NOTHING, fmt)
    extent = NOTHING.after(10, fmt)
    write(arenas, x[:, :, 10:], None, extent, fmt)
    assert not torch.equal(dense_past(arenas, extent, fmt), x[:, :, :10])


# groups -----------------------------------------------------------------------------------------


@given(
    fmt=formats("kivi"),
    groups=st.integers(1, 3),
    rows=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_groups_come_back_within_half_a_step(
    fmt: Format, groups: int, rows: int, seed: int
) -> None:
    x = randn(rows, HEADS, groups * fmt.token_group, fmt.head_dim, seed=seed)
    packed = quantize(x, None, fmt)
    assert packed[0].shape == (*x.shape[:3], fmt.planes.row_bytes)
    assert packed[1].shape == packed[2].shape == (rows, HEADS, groups, fmt.channel_groups)
    step = packed[1].float().repeat_interleave(fmt.token_group, 2)
    step = step.repeat_interleave(fmt.channel_group, 3)[..., : fmt.head_dim]
    error = (dequantize_groups(packed, fmt, out=torch.full_like(x, torch.nan)) - x).abs()
    assert (error <= step / 2 + 2.0**-9 * x.abs().amax()).all()


def test_a_ragged_last_group_of_channels_has_its_own_range() -> None:
    """Channels 32 to 39 of 40 share one scale, and nothing that is not there widens it."""
    fmt = stored_format(Kivi(), "value", head_dim=40)
    x = randn(1, 1, 1, 40) + 5.0
    _, scale, zero_point = quantize(x, None, fmt)
    assert zero_point[0, 0, 0, 1] == x[..., 32:].amin().half()
    assert scale[0, 0, 0, 1] == ((x[..., 32:].amax() - x[..., 32:].amin()) / 3).half()


# attention --------------------------------------------------------------------------------------


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor,
    *,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: int,
    softcap: float,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Attention, query by query; ``hidden`` bool ``[batch, kv_len]`` are keys that nobody sees."""
    batch, num_heads, q_len, _ = query.shape
    kv_len, per_kv = key.shape[2], num_heads // key.shape[1]
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    mask = None if mask is None else mask.expand(batch, num_heads, q_len, kv_len)
    out = torch.zeros(batch, num_heads, q_len, value.shape[3], dtype=dtype)
    last_seen = {TOP_LEFT: 0, BOTTOM_RIGHT: kv_len - q_len}
    for b in range(batch):
        for h in range(num_heads):
            for i in range(q_len):
                scores = scale * key[b, h // per_kv] @ query[b, h, i]
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                if mask is not None and mask.dtype != torch.bool:
                    scores = scores + mask[b, h, i].to(dtype)
                elif mask is not None:
                    scores = scores.masked_fill(~mask[b, h, i], -torch.inf)
                if causal != NO_CAUSALITY:
                    scores[max(last_seen[causal] + i + 1, 0) :] = -torch.inf
                scores = scores.masked_fill(hidden[b], -torch.inf)
                sink = torch.tensor(-torch.inf) if sinks is None else sinks[h].to(dtype)
                peak = torch.maximum(scores.max(), sink).clamp(min=-1e4)  # or fp32 overflows
                weight = (scores - peak).exp()
                total = weight.sum() + (sink - peak).exp()
                if total > 0:
                    out[b, h, i] = weight @ value[b, h // per_kv] / total
    return out


def some_mask(kind: str, shape: tuple[int, ...], seed: int) -> Tensor | None:
    """A mask of ``shape``; a float one is additive and hides keys with minus infinity."""
    if kind == "none":
        return None
    seen = randn(*shape, seed=seed) > -0.5
    if kind == "bool":
        return seen
    return randn(*shape, seed=seed + 1).masked_fill(~seen, -torch.inf)


@given(data=st.data(), prompt=prompts(least_tokens=2))
def test_what_is_dropped_from_the_front_is_not_missed(data: st.DataObject, prompt: Prompt) -> None:
    """Neither by a window over what is left nor by what is appended afterwards."""
    length, split = prompt.x.shape[2], data.draw(st.integers(1, prompt.x.shape[2] - 1))
    first = data.draw(st.integers(0, split))
    arenas, fmt = poisoned_arenas(prompt.x, prompt.fmt), prompt.fmt
    write(arenas, prompt.x[:, :, :split], prompt.valid[:, :split], NOTHING, fmt)
    extent, before = NOTHING.after(split, fmt), arenas.start.clone()
    expected = dense_past(arenas, extent, fmt, first=first)
    drop_front(arenas, first, fmt)
    dropped = arenas.start - before
    assert (dropped % drop_step(fmt) == 0).all()
    left = first - fmt.sink_length - arenas.start
    assert ((dropped == 0) | (left >= 0)).all()
    assert (left < drop_step(fmt)).all()  # all that can go has gone
    assert torch.equal(dense_past(arenas, extent, fmt, first=first), expected)
    write(arenas, prompt.x[:, :, split:], prompt.valid[:, split:], extent, fmt)
    after = dense_past(arenas, extent.after(length - split, fmt), fmt, first=first)
    assert_same_numbers(after, dense_past(*stored(prompt), fmt, first=first), fmt)


@given(
    data=st.data(),
    kind=st.sampled_from(KINDS),
    per_kv=st.integers(1, 4),
    new_tokens=st.integers(0, 4) | st.sampled_from([FEW_QUERIES, FEW_QUERIES + 1]),
    mask_kind=st.sampled_from(["none", "bool", "float"]),
    mask_is_one=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    causal=st.sampled_from([NO_CAUSALITY, TOP_LEFT, BOTTOM_RIGHT]),
    softcap=st.sampled_from([0.0, 2.0]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_attend_is_attention_over_the_past_and_the_exact_new_tokens(
    data: st.DataObject,
    kind: str,
    per_kv: int,
    new_tokens: int,
    mask_kind: str,
    mask_is_one: tuple[bool, bool, bool],
    causal: int,
    softcap: float,
    with_sinks: bool,
    seed: int,
) -> None:
    # Keys and values of qjl have layouts of their own.
    roles: tuple[Role | None, ...] = ("key", "value") if kind == "qjl" else (None, None)
    prompt = data.draw(prompts(kind, role=roles[0]))
    value_fmt = data.draw(formats(kind, roles[1]))
    batch, _, length, head_dim = prompt.x.shape
    value = replace(
        prompt, fmt=value_fmt, x=randn(batch, HEADS, length, value_fmt.head_dim, seed=seed + 1)
    )
    q_len, num_heads = max(new_tokens, 1), HEADS * per_kv
    first = data.draw(st.just(0) | st.integers(0, length if new_tokens else length - 1))
    kv_len = length + new_tokens - first
    query = randn(batch, num_heads, q_len, head_dim, seed=seed + 2)
    new_key = randn(batch, HEADS, new_tokens, head_dim, seed=seed + 3)
    new_value = randn(batch, HEADS, new_tokens, value_fmt.head_dim, seed=seed + 4)
    full_shape = (batch, num_heads, q_len)
    mask_shape = tuple(1 if one else n for one, n in zip(mask_is_one, full_shape, strict=True))
    options = {
        "mask": some_mask(mask_kind, (*mask_shape, kv_len), seed + 5),
        "sinks": randn(num_heads, seed=seed + 6) if with_sinks else None,
        "scale": 0.3,
        "causal": causal,
        "softcap": softcap,
    }
    key_side, value_side = (*stored(prompt), prompt.fmt), (*stored(value), value_fmt)
    out = reference.attend(
        query,
        new_key if new_tokens else None,
        new_value if new_tokens else None,
        key_side,
        value_side,
        first=first,
        **options,
    )
    padding = torch.cat([~prompt.valid, torch.zeros(batch, new_tokens, dtype=torch.bool)], 1)
    full = (
        query,
        torch.cat([dense_past(*key_side), new_key], 2)[:, :, first:],
        torch.cat([dense_past(*value_side), new_value], 2)[:, :, first:],
        padding[:, first:],
    )
    exact = exact_attention(*full, **options)
    fp32_error = (exact_attention(*full, **options, dtype=torch.float32) - exact).abs().max()
    if prompt.fmt.layout in OF_PRODUCTS:  # stored numbers are rounded in themselves
        query, *both, hidden = full
        both = [x + 2.0**-21 * x.abs().amax() * randn(*x.shape, seed=seed) for x in both]
        fp32_error += (exact_attention(query, *both, hidden, **options) - exact).abs().max()
    assert out.shape == exact.shape
    assert (out - exact).abs().max() <= 16 * fp32_error + 5e-6


def test_top_left_and_bottom_right_differ_beside_a_past() -> None:
    query, key = randn(1, 1, 2, 16), randn(1, 1, 5, 16, seed=1)
    options = {"mask": None, "sinks": None, "scale": 1.0, "softcap": 0.0}
    top, bottom = (
        reference.attention(query, key, key, causal=causal, **options)
        for causal in (TOP_LEFT, BOTTOM_RIGHT)
    )
    torch.testing.assert_close(top[:, :, 0], key[:, :, 0])
    torch.testing.assert_close(
        bottom[:, :, :1],
        reference.attention(query[:, :, :1], key[:, :, :4], key[:, :, :4], causal=0, **options),
    )


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_that_sees_nothing_gives_zeros(kind: str, softcap: float) -> None:
    seen = torch.tensor([[True, True, False], [False, False, False]])
    mask = seen if kind == "bool" else torch.zeros(2, 3).masked_fill(~seen, -torch.inf)
    out = reference.attention(
        randn(1, 2, 2, 16),
        randn(1, 2, 3, 16, seed=1),
        randn(1, 2, 3, 16, seed=2),
        mask=mask[None, None],
        sinks=None,
        scale=1.0,
        causal=NO_CAUSALITY,
        softcap=softcap,
    )
    assert out[:, :, 0].all()
    assert not out[:, :, 1].any()


# true scores ------------------------------------------------------------------------------------

LARGE_MEAN = 50.0


@pytest.mark.parametrize("q_len", [1, FEW_QUERIES, FEW_QUERIES + 1])
@pytest.mark.parametrize("kind", ["softcap", "sinks", "neither"])
def test_the_mean_of_keys_is_added_to_their_scores(kind: str, q_len: int) -> None:
    """A softmax does not notice what is added to all scores, but a softcap, sinks and the exact
    tokens beside the packed ones do: keys of 8 bits give what dense keys give, with any mean.
    """
    sizes = {"head_dim": 64, "bits": 8, "residual_length": 32, "sink_length": 4}
    shared = randn(1, HEADS, 1, 64, seed=1)
    shared = LARGE_MEAN * shared / shared.norm(dim=-1, keepdim=True)
    key, value = randn(1, HEADS, 200, 64) + shared, randn(1, HEADS, 200, 64, seed=2)
    query = randn(1, 2 * HEADS, q_len, 64, seed=3)
    sides = []
    for role, x in (("key", key), ("value", value)):
        fmt = stored_format(Squat(), role, **sizes)
        arenas = empty_arenas(x, 200, fmt)
        reference.learn(arenas, x, None, None, fmt, role)
        write(arenas, x, None, NOTHING, fmt)
        sides.append((arenas, NOTHING.after(200, fmt), fmt))
    options = {
        "mask": None,
        "sinks": 3 * randn(2 * HEADS, seed=4) if kind == "sinks" else None,
        "scale": 64**-0.5,
        "causal": NO_CAUSALITY,
        "softcap": 5.0 if kind == "softcap" else 0.0,
    }
    expected = reference.attention(query, key, value, **options)
    out = reference.attend(query, None, None, *sides, **options)
    assert ((out - expected).norm() / expected.norm()).item() < 0.03

    (arenas, extent, fmt), value_side = sides
    assert arenas.affine is not None
    arenas.affine[:, :, :1] = 0.0
    wrong = reference.attend(query, None, None, (arenas, extent, fmt), value_side, **options)
    assert ((wrong - expected).norm() / expected.norm()).item() > 0.3


# validity of new tokens -------------------------------------------------------------------------


@given(
    pads=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    past=st.integers(0, 3),
    heads=st.sampled_from([1, 2]),
    queries=st.sampled_from([1, 4]),
    dtype=st.sampled_from([torch.bool, torch.float32, torch.float16]),
    hidden=st.sampled_from(["infinity", "smallest"]),
)
def test_a_token_is_valid_if_any_query_sees_it(
    pads: list[int], past: int, heads: int, queries: int, dtype: torch.dtype, hidden: str
) -> None:
    valid = left_padding(pads, 4)
    seen = torch.cat([torch.ones(len(pads), past, dtype=torch.bool), valid], 1)
    mask = seen[:, None, None].expand(-1, heads, queries, -1)
    if queries > 1:
        mask = mask & torch.ones(queries, past + 4, dtype=torch.bool).tril(past)
    if dtype != torch.bool:
        number = -torch.inf if hidden == "infinity" else torch.finfo(dtype).min
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, number)
    assert torch.equal(valid_tokens(mask, 4), valid)


def test_an_additive_bias_hides_nothing() -> None:
    """An ALiBi mask is very negative far away, and no padding."""
    bias = torch.linspace(-1e4, 0, 6).reshape(1, 1, 1, 6)
    assert valid_tokens(bias, 6).all()


def test_a_mask_with_one_column_speaks_for_every_token() -> None:
    assert valid_tokens(torch.tensor([True, False]).reshape(2, 1, 1, 1), 3).tolist() == [
        [True] * 3,
        [False] * 3,
    ]
