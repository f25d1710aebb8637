"""Attention over the kept part of a prompt: that it is exact, and that nothing else has changed."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squat_fx import QuantizedKV
from squat_fx.codecs import Codec, Kivi, Lossless, Pruned, Squat, TurboQuant
from squat_fx.kernels import kept, ops, reference
from squat_fx.layouts import Format
from squat_fx.layouts.kept import MOVED, beneath
from tests.conftest import left_padding, randn, stored_format

HEAD_DIM, HEADS, QUERIES, SINKS, RESIDUAL, TOKENS = 16, 2, 2, 2, 8, 100
SEEDS = st.integers(0, 2**16)
PADS = st.lists(st.integers(0, TOKENS), min_size=1, max_size=3)
Caches = tuple[QuantizedKV, QuantizedKV]


def formats_of(codec: Codec, sinks: int = SINKS, bits: int = 2) -> tuple[Format, Format]:
    key, value = (
        stored_format(codec, role, HEAD_DIM, bits, RESIDUAL, sinks) for role in ("key", "value")
    )
    return key, value


def caches(
    key: Tensor,
    value: Tensor,
    query: Tensor,
    codec: Codec,
    valid: Tensor | None = None,
    sinks: int = SINKS,
) -> Caches:
    """A packed prompt."""
    key_format, value_format = formats_of(codec, sinks)
    keys = QuantizedKV.from_dense(key, key_format, "key", valid, query)
    keeps_part = value_format.stored_layout.keeps_part
    return keys, QuantizedKV.from_dense(
        value, value_format, "value", valid, keys=keys if keeps_part else None
    )


def exact(budget: int, group: int = 1) -> Pruned:
    return Pruned(budget, Lossless(group), window=8, pooling=3)


def tensors(rows: int, tokens: int = TOKENS, seed: int = 0, dtype: torch.dtype = torch.float64):
    """Keys, values and queries."""
    key, value = randn(2, rows, HEADS, tokens, HEAD_DIM, seed=seed, dtype=dtype)
    query = randn(rows, HEADS * QUERIES, tokens, HEAD_DIM, seed=seed + 1, dtype=dtype)
    return key, value, query


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def stored_tokens(keys: QuantizedKV, length: int) -> Tensor:
    """Which of ``length`` tokens are there, bool ``[batch, heads, length]``."""
    storage = keys._storage
    start, moved = storage["start"], storage[MOVED]
    sinks = keys.format.sink_length
    source = kept.source_of(torch.arange(length), start, moved, sinks)
    there = torch.arange(length) >= start[:, None]
    found = torch.zeros(source.shape, dtype=torch.int64)
    # One place more, for what is no token of the row.
    found = F.pad(found, (0, 1))
    place = torch.where(there[:, None], source, length)
    return found.scatter_add_(2, place, torch.ones_like(place))[..., :length] > 0


def more(cached: Caches, new: Caches | tuple[Tensor, Tensor]) -> Caches:
    key, value = (torch.cat([x, n], 2) for x, n in zip(cached, new, strict=True))
    assert isinstance(key, QuantizedKV)
    assert isinstance(value, QuantizedKV)
    return key, value


# what is read -------------------------------------------------------------------------------------


@given(
    pads=PADS,
    budget=st.integers(1, 12),
    group=st.sampled_from([1, 4]),
    sinks=st.integers(0, 5),
    appended=st.lists(st.integers(1, 11), max_size=3),
    q_len=st.sampled_from([1, 3]),
    masked=st.sampled_from(["no", "boolean", "additive"]),
    seed=SEEDS,
)
def test_it_is_attention_over_the_tokens_that_were_kept(
    pads: list[int], budget: int, group: int, sinks: int, appended: list[int], q_len: int,
    masked: str, seed: int,
) -> None:  # fmt: skip
    """In fp64, with exact storage, whatever is appended and whatever a mask hides."""
    rows, total = len(pads), TOKENS + sum(appended)
    key, value, query = tensors(rows, total, seed)
    prompt = slice(0, TOKENS)
    valid = left_padding(pads, TOKENS)
    cached = caches(
        key[:, :, prompt], value[:, :, prompt], query[:, :, prompt],
        exact(budget * group, group), valid, sinks,
    )  # fmt: skip
    at = TOKENS
    for count in appended:
        cached = more(cached, (key[:, :, at : at + count], value[:, :, at : at + count]))
        at += count
    assert [x.shape[2] for x in cached] == [total, total]
    new = randn(rows, HEADS * QUERIES, q_len, HEAD_DIM, seed=seed + 2, dtype=torch.float64)
    there = stored_tokens(cached[0], total).repeat_interleave(QUERIES, 1)[:, :, None]
    mask = {
        "no": None,
        "boolean": randn(rows, 1, q_len, total, seed=seed + 3) > -0.5,
        "additive": 3 * randn(1, HEADS * QUERIES, 1, total, seed=seed + 3, dtype=torch.float64),
    }[masked]
    seen = there if mask is None else torch.zeros(1).double().masked_fill(~there, -torch.inf)
    if mask is not None:
        bias = mask if mask.dtype != torch.bool else torch.zeros(1).masked_fill(~mask, -torch.inf)
        seen = seen + bias
    expected = attention(new, key, value, seen).nan_to_num(0.0)
    found = attention(new, *cached, mask).nan_to_num(0.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@given(pads=PADS, budget=st.integers(1, 12), group=st.sampled_from([1, 4]), seed=SEEDS)
def test_each_head_keeps_its_budget_and_all_that_is_exact(
    pads: list[int], budget: int, group: int, seed: int
) -> None:
    key, value, query = tensors(len(pads), seed=seed)
    codec = exact(budget * group, group)
    keys, values = caches(key, value, query, codec, left_padding(pads, TOKENS))
    there = stored_tokens(keys, TOKENS)
    for row, pad in zip(there, pads, strict=True):
        begin, end = min(pad, TOKENS), TOKENS - RESIDUAL
        packable = max(end - begin - SINKS, 0) // group * group
        packed = slice(begin + SINKS, begin + SINKS + packable)
        assert not row[:, :begin].any()
        assert row[:, begin : begin + SINKS].all()
        assert row[:, packed.stop :].all()
        if packable:
            assert (row[:, packed].sum(-1) == min(packable, budget * group)).all()
    for cached in (keys, values):
        lost = TOKENS - RESIDUAL - SINKS - budget * group >= group
        assert cached._storage.lost_tokens == lost
        assert (cached._storage["start"] >= cached._storage.dropped).all()
    assert torch.equal(keys._storage["start"], values._storage["start"])
    assert torch.equal(keys._storage[MOVED][..., :1], values._storage[MOVED])


@pytest.mark.parametrize("inner", [Squat(), Kivi(), TurboQuant(), Lossless()])
def test_with_budget_for_all_arenas_are_those_of_the_codec_beneath(inner: Codec) -> None:
    key, value, query = tensors(3, 200, dtype=torch.float32)
    valid = left_padding([0, 5, 120], 200)
    whole = caches(key, value, query, inner, valid)
    part = caches(key, value, query, Pruned(192, inner), valid)
    for one, other in zip(whole, part, strict=True):
        assert beneath(other.format).layout == one.format.layout
        for name in one.format.arena_names:
            assert torch.equal(one._storage[name], other._storage[name]), name
        assert not other._storage[MOVED].any()
        assert torch.equal(one.dequantize(), other.dequantize())
    new = randn(3, HEADS * QUERIES, 1, HEAD_DIM, seed=5)
    assert torch.equal(attention(new, *whole), attention(new, *part))


@pytest.mark.parametrize("inner", [Squat(), Kivi(), TurboQuant()])
def test_kept_tokens_are_rounded_as_those_of_a_prompt_without_the_others(inner: Codec) -> None:
    """Here all heads keep the same, and nothing is learned."""
    inner = Squat(strength=0.0, center=False, smooth=False) if isinstance(inner, Squat) else inner
    key, value, query = tensors(1, 170, dtype=torch.float32)
    key, query = key[:, :1].repeat(1, HEADS, 1, 1), query[:, :1].repeat(1, HEADS * QUERIES, 1, 1)
    part = caches(key, value, query, Pruned(64, inner))
    there = stored_tokens(part[0], 170)[0, 0]
    assert there.sum() < 170
    whole = caches(key[:, :, there], value[:, :, there], query[:, :, there], inner)
    new = randn(1, HEADS * QUERIES, 1, HEAD_DIM, seed=5)
    assert torch.equal(attention(new, *part), attention(new, *whole))


@given(pads=st.lists(st.integers(0, 80), min_size=2, max_size=3), seed=SEEDS)
def test_a_row_keeps_what_it_would_keep_alone(pads: list[int], seed: int) -> None:
    key, value, query = tensors(len(pads), seed=seed)
    together, _ = caches(key, value, query, exact(9), left_padding(pads, TOKENS))
    there = stored_tokens(together, TOKENS)
    for row, pad in enumerate(pads):
        alone = (x[row : row + 1, :, pad:] for x in (key, value, query))
        keys, _ = caches(*alone, exact(9))
        assert torch.equal(stored_tokens(keys, TOKENS - pad)[0], there[row, :, pad:])


# what is chosen -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", [1, 5])
def test_the_tokens_of_most_votes_are_kept(pooling: int) -> None:
    """By the formula, in fp64 and in loops."""
    budget, window = 12, 6
    key, value, query = tensors(2, seed=3)
    codec = Pruned(budget, Lossless(1), window, pooling)
    keys, _ = caches(key, value, query, codec)
    there = stored_tokens(keys, TOKENS)
    for row in range(2):
        for head in range(HEADS):
            votes = torch.zeros(TOKENS, dtype=torch.float64)
            for q in range(QUERIES * head, QUERIES * (head + 1)):
                for t in range(TOKENS - window, TOKENS):
                    scores = key[row, head, : t + 1] @ query[row, q, t] * HEAD_DIM**-0.5
                    votes[: t + 1] += scores.softmax(0)
            votes[TOKENS - window :] = 0.0
            padded = F.pad(votes, (pooling // 2, pooling // 2))
            votes = torch.stack([padded[i : i + pooling].sum() for i in range(TOKENS)])
            packed = votes[SINKS : TOKENS - RESIDUAL]
            expected = packed.topk(budget).indices.sort().values + SINKS
            found = there[row, head, SINKS : TOKENS - RESIDUAL].nonzero()[:, 0] + SINKS
            assert torch.equal(found, expected)


def test_tokens_of_the_window_that_are_not_exact_are_kept() -> None:
    key, value, query = tensors(1)
    keys, _ = caches(key, value, query, Pruned(20, Lossless(1), window=RESIDUAL + 15))
    assert stored_tokens(keys, TOKENS)[..., -RESIDUAL - 15 :].all()


def test_padding_inside_a_prompt_is_kept_last() -> None:
    key, value, query = tensors(2)
    valid = left_padding([0, 10], TOKENS)
    valid[:, 40:60] = False
    keys, _ = caches(key, value, query, exact(30), valid)
    there = stored_tokens(keys, TOKENS)
    assert not there[:, :, 40:60].any()
    keys, values = caches(key, value, query, exact(75), valid)
    there = stored_tokens(keys, TOKENS)
    assert (there[:, :, 40:60].sum(-1) == torch.tensor([[5, 5], [15, 15]])).all()
    mask = F.pad(valid, (0, 0))[:, None, None]
    new = randn(2, HEADS * QUERIES, 1, HEAD_DIM, seed=5, dtype=torch.float64)
    seen = there.repeat_interleave(QUERIES, 1)[:, :, None] & mask
    torch.testing.assert_close(
        attention(new, keys, values, mask), attention(new, key, value, seen), rtol=1e-6, atol=1e-6
    )


def test_numbers_that_are_not_finite_choose_nothing() -> None:
    key, value, query = tensors(2)
    usual = stored_tokens(caches(key, value, query, exact(9))[0], TOKENS)
    key[0, 0, 30], query[1, 3, -2] = torch.nan, torch.inf
    found = stored_tokens(caches(key, value, query, exact(9))[0], TOKENS)
    assert torch.equal(found[0, 1], usual[0, 1])
    assert torch.equal(found[1, 0], usual[1, 0])
    assert (found.sum(-1) == usual.sum(-1)).all()


def test_without_queries_all_tokens_are_kept() -> None:
    key, value, _ = tensors(1)
    key_format, value_format = formats_of(exact(9))
    keys = QuantizedKV.from_dense(key, key_format, "key")
    values = QuantizedKV.from_dense(value, value_format, "value")
    assert torch.equal(keys.dequantize(), key)
    assert torch.equal(values.dequantize(), value)
    assert torch.equal(keys[:, :, 40:], key[:, :, 40:])


def test_keys_that_keep_all_tokens_choose_nothing() -> None:
    key, value, query = tensors(1)
    keys = QuantizedKV.from_dense(key, formats_of(Lossless(1))[0], "key", query=query)
    with pytest.raises(ValueError, match=r"^keys say .*, got 'dense' and 'kept/dense'; leave .*$"):
        QuantizedKV.from_dense(value, formats_of(exact(9))[1], "value", keys=keys)


# handles ------------------------------------------------------------------------------------------


def pruned(rows: int = 1, codec: Codec | None = None) -> tuple[Caches, tuple[Tensor, Tensor]]:
    key, value, query = tensors(rows, dtype=torch.float32)
    return caches(key, value, query, codec or exact(9)), (key, value)


LOST = (
    r"^these keys lost tokens of their prompt, of which each head kept 9, and have no dense form; "
    r"attend to keys and values with scaled_dot_product_attention or under backend='squat', or "
    r"compile with a larger budget$"
)


def test_what_lost_tokens_has_no_dense_form() -> None:
    (keys, values), _ = pruned()
    new = randn(1, HEADS * QUERIES, 1, HEAD_DIM)
    for read in (
        lambda: keys.dequantize(),
        lambda: keys + 1,
        lambda: keys[:, :, 40:],
        lambda: keys[:, :, 40:50],
        lambda: keys[0],
        lambda: attention(new, keys, keys.new_zeros(values.shape)),
        lambda: torch.cat([keys, keys], 2),
        lambda: keys.from_its_first(),
    ):
        with pytest.raises(ValueError, match=LOST):
            read()


def test_a_causal_mask_that_counts_from_the_first_token_is_refused() -> None:
    cached, _ = pruned()
    new = randn(1, HEADS * QUERIES, 3, HEAD_DIM)
    with pytest.raises(ValueError, match=r"^attention with is_causal=True over a past .* a mask$"):
        F.scaled_dot_product_attention(new, *cached, is_causal=True, enable_gqa=True)


def test_it_is_cropped_as_far_as_nothing_was_chosen() -> None:
    cached, (key, value) = pruned()
    more_key, more_value, _ = tensors(1, 60, seed=9, dtype=torch.float32)
    shortest = TOKENS - RESIDUAL
    longer = more(cached, (more_key, more_value))
    for length in (TOKENS + 33, TOKENS, TOKENS - 3, shortest):
        cropped = more(tuple(x[:, :, :length] for x in longer), (more_key, more_value))  # pyright: ignore
        whole = [
            torch.cat([x, y], 2)[:, :, :length] for x, y in ((key, more_key), (value, more_value))
        ]
        whole = [torch.cat([x, y], 2) for x, y in zip(whole, (more_key, more_value), strict=True)]
        new = randn(1, HEADS * QUERIES, 1, HEAD_DIM, seed=4)
        there = stored_tokens(cropped[0], length + 60).repeat_interleave(QUERIES, 1)[:, :, None]
        torch.testing.assert_close(
            attention(new, *cropped), attention(new, whole[0], whole[1], there)
        )
    for handle in longer:
        with pytest.raises(
            ValueError,
            match=rf"^cannot crop to {shortest - 1} tokens: of the first {shortest} each head kept "
            rf"others; crop to {shortest} or more, or begin with the shorter prompt$",
        ):
            handle[:, :, : shortest - 1]
    assert longer[0].shape[2] == TOKENS + 60


def test_an_older_reader_still_attends() -> None:
    cached, _ = pruned()
    new = randn(1, HEADS * QUERIES, 1, HEAD_DIM, seed=4)
    before = attention(new, *cached)
    longer = more(cached, cached_tokens(30))
    shorter = tuple(x[:, :, :TOKENS] for x in longer)
    assert torch.equal(attention(new, *shorter), before)
    assert torch.equal(attention(new, *cached), before)
    assert longer[0].shape[2] == TOKENS + 30


def cached_tokens(tokens: int) -> tuple[Tensor, Tensor]:
    return tensors(1, tokens, seed=9, dtype=torch.float32)[:2]


@pytest.mark.parametrize("inner", [Squat(), Kivi()])
def test_copies_attend_alike(inner: Codec) -> None:
    (keys, values), _ = pruned(3, Pruned(32, inner))
    new, rows = randn(3, HEADS * QUERIES, 1, HEAD_DIM), torch.tensor([2, 0, 0])
    mask = randn(3, 1, 1, TOKENS) > 0
    out = attention(new, keys, values, mask)
    copies = [
        [pickle.loads(pickle.dumps(x)) for x in (keys, values)],
        [x.clone() for x in (keys, values)],
    ]
    for key, value in copies:
        assert torch.equal(attention(new, key, value, mask), out)
        assert key.storage_nbytes == keys.storage_nbytes
    picked = (x.index_select(0, rows) for x in (keys, values))
    # Products of other rows may be summed in another order.
    torch.testing.assert_close(attention(new[rows], *picked, mask[rows]), out[rows])
    sliced = (x[1:] for x in (keys, values))
    torch.testing.assert_close(attention(new[1:], *sliced, mask[1:]), out[1:])


def test_a_copy_in_another_dtype_has_its_kept_tokens_in_it() -> None:
    (keys, values), _ = pruned()
    half = tuple(x.half() for x in (keys, values))
    assert half[0]._storage["qdata"].dtype == torch.float16
    new = randn(1, HEADS * QUERIES, 1, HEAD_DIM)
    torch.testing.assert_close(
        attention(new.half(), *half).float(), attention(new, keys, values), rtol=1e-2, atol=1e-2
    )


def test_a_long_prompt_takes_the_room_of_its_budget() -> None:
    key, value, query = tensors(1, 4000, dtype=torch.float32)
    part = caches(key, value, query, Pruned(128))
    whole = caches(key, value, query, Squat())
    for some, all_of_it in zip(part, whole, strict=True):
        assert some.shape == all_of_it.shape
        assert some._storage.capacity == 512  # 138 tokens, and room for 256
        assert some.storage_nbytes < 0.2 * all_of_it.storage_nbytes
        made = reference.Extent(0, 0).after(4000, some.format)
        assert (some._storage["start"] == made.watermark - SINKS - 128).all()


def test_appended_tokens_grow_what_was_kept_and_drop_nothing() -> None:
    cached, _ = pruned(2)
    total = TOKENS
    for seed in range(4):
        key, value, _ = tensors(2, 150, seed=seed, dtype=torch.float32)
        cached = more(cached, (key, value))
        total += 150
    there = stored_tokens(cached[0], total)
    assert there[..., TOKENS:].all()
    assert (there.sum(-1) == 9 + SINKS + RESIDUAL + 600).all()


STEPS = st.sampled_from(["append", "crop", "clone", "pick", "pickle", "keep both"])


@given(steps=st.lists(st.tuples(STEPS, st.integers(0, 2**16)), max_size=12), seed=SEEDS)
def test_whatever_is_done_to_a_cache_it_attends_to_what_it_holds(
    steps: list[tuple[str, int]], seed: int
) -> None:
    """Older handles, too."""
    key, value, query = tensors(2, seed=seed)
    cached = caches(key, value, query, exact(9), left_padding([0, 30], TOKENS))
    there = stored_tokens(cached[0], TOKENS)
    held: list[tuple[Any, Tensor, Tensor, Tensor]] = [(cached, key, value, there)]
    for step, number in steps:
        cached, key, value, there = held[-1]
        length = key.shape[2]
        if step == "append":
            count = 1 + number % 9
            new = tensors(key.shape[0], count, number)[:2]
            cached = more(cached, new)
            key, value = (torch.cat([x, n], 2) for x, n in zip((key, value), new, strict=True))
            there = F.pad(there, (0, count), value=True)
        elif step == "crop":
            shortest = TOKENS - RESIDUAL
            end = shortest + number % (length - shortest + 1)
            cached = tuple(x[:, :, :end] for x in cached)
            key, value, there = key[:, :, :end], value[:, :, :end], there[..., :end]
        elif step == "pick":
            rows = torch.tensor([number % key.shape[0], 0])
            cached = tuple(x.index_select(0, rows) for x in cached)
            key, value, there = key[rows], value[rows], there[rows]
        elif step == "clone":
            cached = tuple(x.clone() for x in cached)
        elif step == "pickle":
            cached = tuple(pickle.loads(pickle.dumps(x)) for x in cached)
        after = cached, key, value, there
        held = [*held, after] if step == "keep both" else [*held[:-1], after]
    for cached, key, value, there in held:
        new = randn(key.shape[0], HEADS * QUERIES, 1, HEAD_DIM, seed=1, dtype=torch.float64)
        seen = there.repeat_interleave(QUERIES, 1)[:, :, None]
        torch.testing.assert_close(
            attention(new, *cached), attention(new, key, value, seen), rtol=1e-6, atol=1e-6
        )


# ops ----------------------------------------------------------------------------------------------


def test_store_is_as_large_as_a_budget_needs() -> None:
    key, value, query = tensors(1, dtype=torch.float32)
    for group, slots, value_slots in ((1, 12, 12), (4, 12, 15)):
        fmt, value_fmt = formats_of(exact(12, group))
        ints = fmt.to_ints()
        store = ops.overload("store", fmt.layout)
        made = store(key, None, query, None, "key", fmt.codec, ints)
        assert made[0].shape[2] == slots
        whole = store(key, None, None, None, "key", fmt.codec, ints)
        assert whole[0].shape[2] == TOKENS
        short = store(key[:, :, :9], None, query[:, :, :9], None, "key", fmt.codec, ints)
        assert short[0].shape[2] == 9 + -9 % group
        moved = made[fmt.stored_names.index(MOVED)]
        values = store(value, None, None, None, "value", fmt.codec, value_fmt.to_ints(), moved)
        assert values[0].shape[2] == value_slots


def test_an_error_of_a_prompt_counts_what_was_lost() -> None:
    key, value, query = tensors(1, dtype=torch.float32)
    output = reference.attention(
        query, key, value, mask=None, sinks=None, scale=HEAD_DIM**-0.5, causal=1, softcap=0.0
    )
    found = []
    for codec in (Pruned(12, Lossless(1)), Pruned(88, Lossless(1)), Pruned(96, Lossless(1))):
        formats = formats_of(codec)
        cached = caches(key, value, query, codec)
        arenas = [x._storage[name] for x in cached for name in x.format.stored_names]
        op = ops.overload("attend_error", *(fmt.layout for fmt in formats))
        ints = [fmt.to_ints() for fmt in formats]
        error = op(query, output, *arenas, None, None, None, HEAD_DIM**-0.5, 1, 0.0, *ints)
        found.append(float(error))
    assert found[0] > 0.2
    assert found[0] > found[1] > 1e-3
    assert found[2] < 1e-6
