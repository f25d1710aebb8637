"""Attention over chosen keys: which they are, that nothing else is read, how little that is."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import squat_fx
from squat_fx import QuantizedKV
from squat_fx.codecs import Svdq
from squat_fx.kernels import chosen, launch, ops, reference
from squat_fx.layouts import Format
from squat_fx.layouts.latent_sparse import CHUNK, outlier_positions
from squat_fx.layouts.rotary import Rotation
from tests.codecs.round_trip import relative_error
from tests.codecs.test_svdq import append, frequencies, low_rank, turned
from tests.conftest import left_padding, randn, stored_format
from tests.test_models import build, logits

HEAD_DIM, VALUE_DIM, HEADS, SINKS, RESIDUAL = 32, 16, 2, 2, 8
ROTATION = Rotation(HEAD_DIM, "halves")
SEEDS = st.integers(0, 2**16)


def format_of(budget: int, outliers: int, schedule: str = "8") -> Format:
    codec = Svdq(schedule=schedule, budget=budget, outlier_chunks=outliers)
    fmt = stored_format(codec, "key", HEAD_DIM, 2, RESIDUAL, SINKS)
    return fmt.stored_layout.with_rotation(fmt, ROTATION)


def caches(
    key: Tensor, value: Tensor, budget: int, outliers: int = 0, valid: Tensor | None = None
) -> tuple[QuantizedKV, QuantizedKV]:
    """Packed keys and values, these at 8 bits."""
    fmt = format_of(budget, outliers)
    value_fmt = stored_format(Svdq(), "value", value.shape[3], 8, RESIDUAL, SINKS)
    given_angles = frequencies(HEAD_DIM)
    packed = QuantizedKV.from_dense(key, fmt, "key", valid, given=given_angles)
    return packed, QuantizedKV.from_dense(value, value_fmt, "value", valid)


def keys_and_values(batch: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    key = turned(
        low_rank(batch, HEADS, tokens, HEAD_DIM, seed=seed), ROTATION, torch.arange(tokens)
    )
    return key, randn(batch, HEADS, tokens, VALUE_DIM, seed=seed + 9)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: float
) -> Tensor:
    """Torch's, on handles or on tensors."""
    with torch.inference_mode():
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=True, **options
        )


def chosen_slots(query: Tensor, key: QuantizedKV) -> Tensor:
    """Packed slots that a query ``[batch, num_heads, 1, head_dim]`` chooses."""
    storage = key._storage
    side = chosen.Side(storage.arenas, storage.length, storage.watermark, key.format, None)
    grouped = query.unflatten(1, (HEADS, -1)).squeeze(3) * HEAD_DIM**-0.5

    def seen(position: Tensor, there: Tensor) -> Tensor:
        return there[:, :, None].expand(-1, -1, grouped.shape[2], -1)

    slot, there = chosen.choose(grouped, side, seen)
    return slot.masked_fill(~there, -1)


# what is chosen -----------------------------------------------------------------------------------


@given(
    pads=st.lists(st.integers(0, 90), min_size=1, max_size=3),
    outliers=st.integers(0, 4),
    more=st.integers(0, 20),
    seed=SEEDS,
)
def test_with_budget_for_all_it_is_attention_over_all(
    pads: list[int], outliers: int, more: int, seed: int
) -> None:
    key, value = keys_and_values(len(pads), 90 + more, seed)
    valid = left_padding(pads, 90)
    packed, packed_value = caches(key[:, :, :90], value[:, :, :90], 1024, outliers, valid)
    query = randn(len(pads), 2 * HEADS, 1, HEAD_DIM, seed=seed)
    for at in range(90, 90 + more + 1):
        mask = F.pad(valid, (0, at - 90), value=True)[:, None, None]
        expected = attention(query, packed.dequantize(), packed_value.dequantize(), mask)
        torch.testing.assert_close(
            attention(query, packed, packed_value), expected.nan_to_num(0.0), rtol=1e-4, atol=1e-5
        )
        if at < 90 + more:
            packed, packed_value = (
                torch.cat([x, new[:, :, at : at + 1]], 2)
                for x, new in ((packed, key), (packed_value, value))
            )


def test_chunks_that_look_like_the_query_are_chosen() -> None:
    key, value = keys_and_values(1, 400)
    key *= 0.1
    slots = {0: 40, 1: 200}  # of each head
    query = randn(1, 2 * HEADS, 1, HEAD_DIM, seed=3)
    for head, slot in slots.items():
        wanted = query[0, 2 * head + 1, 0]  # the second query of the head
        key[0, head, SINKS + slot : SINKS + slot + CHUNK] = wanted * 8 / wanted.norm()
    packed, packed_value = caches(key, value, 8)
    found = chosen_slots(query, packed)
    assert found.tolist() == [[[*range(40, 48)], [*range(200, 208)]]]
    out = attention(query, packed, packed_value)
    numbers, values = packed.dequantize(), packed_value.dequantize()
    count = packed._storage.extent.packed(0, packed.format)
    for head, slot in slots.items():
        seen = torch.zeros(400, dtype=torch.bool)
        seen[:SINKS] = seen[SINKS + count :] = seen[SINKS + slot : SINKS + slot + CHUNK] = True
        rows = slice(2 * head, 2 * head + 2)
        expected = attention(
            query[:, rows], numbers[:, head : head + 1, seen], values[:, head : head + 1, seen]
        )
        torch.testing.assert_close(out[:, rows], expected, rtol=1e-4, atol=1e-5)


def test_what_a_mask_hides_is_not_chosen() -> None:
    key, value = keys_and_values(1, 200)
    query = key[:, :, 100:101].repeat_interleave(2, 1) * 10
    mask = torch.ones(1, 1, 1, 200, dtype=torch.bool)
    mask[..., 90:120] = False
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    packed, packed_value = caches(key, value, 64)
    expected = attention(query, packed, packed_value, mask)
    torch.testing.assert_close(attention(query, packed, packed_value, additive), expected)
    value = value.clone()
    value[:, :, 90:120] = 1e4
    hidden = caches(key, value, 64)
    torch.testing.assert_close(attention(query, *hidden, mask=mask), expected)


@pytest.mark.parametrize("tokens", [5, 60])
def test_memory_that_nobody_wrote_is_not_seen(tokens: int) -> None:
    key, value = keys_and_values(1, tokens)
    packed, packed_value = caches(key, value, 64)
    mask = torch.zeros(1, 1, 1, tokens)
    query = randn(1, 4, 1, HEAD_DIM)
    expected = attention(query, packed.dequantize(), packed_value.dequantize(), mask)
    for handle in (packed, packed_value):
        extent, fmt = handle._storage.extent, handle.format
        count = extent.packed(0, fmt)
        handle._storage["qdata"][:, :, count:] = 255
        used = [*range(min(SINKS, tokens))]
        used += reference._ring_slots(count, tokens - SINKS, fmt, key.device).tolist()
        unused = [slot for slot in range(fmt.dense_length) if slot not in used]
        handle._storage["dense"][:, :, unused] = torch.nan
    written = packed._storage.extent.packed(0, packed.format) // CHUNK
    packed._storage["landmark"][:, :, written:] = torch.nan
    for shown in (None, mask):
        found = attention(query, packed, packed_value, shown)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@given(pads=st.lists(st.integers(0, 60), min_size=2, max_size=3), seed=SEEDS)
def test_a_row_chooses_as_it_would_alone(pads: list[int], seed: int) -> None:
    key, value = keys_and_values(len(pads), 160, seed)
    query = randn(len(pads), 4, 1, HEAD_DIM, seed=seed)
    together = attention(query, *caches(key, value, 32, 2, left_padding(pads, 160)))
    for row, first in enumerate(pads):
        part = slice(row, row + 1)
        alone = caches(key[part, :, first:], value[part, :, first:], 32, 2)
        expected = attention(query[part], *alone)
        torch.testing.assert_close(together[part], expected, rtol=0.05, atol=0.05)


def test_what_left_a_window_is_not_chosen_also_when_slots_have_moved() -> None:
    key, value = keys_and_values(2, 300)
    query = 3 * key[:, :, 50:51].repeat_interleave(2, 1)
    packed, packed_value = (x[:, :, 150:] for x in caches(key, value, 1024, 2))
    assert isinstance(packed, QuantizedKV)
    assert isinstance(packed_value, QuantizedKV)
    found = attention(query, packed, packed_value)
    expected = attention(query, packed.dequantize(), packed_value.dequantize())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for handle in (packed, packed_value):
        reference.drop_front(handle._storage.arenas, handle.first, handle.format)
        assert (handle._storage["start"] > 100).all()
    torch.testing.assert_close(attention(query, packed, packed_value), found)


def test_several_queries_attend_to_all() -> None:
    key, value = keys_and_values(1, 200)
    packed, packed_value = caches(key, value, 16)
    query = randn(1, 4, 3, HEAD_DIM)
    expected = attention(query, packed.dequantize(), packed_value.dequantize())
    torch.testing.assert_close(attention(query, packed, packed_value), expected)


# softcaps, sinks, devices -------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_scores_are_softcapped_and_meet_sinks(softcap: float, with_sinks: bool) -> None:
    key, value = keys_and_values(2, 120)
    packed, packed_value = caches(key, value, 1024, 2)
    query, new = randn(2, 4, 1, HEAD_DIM), (key[:, :, :1], value[:, :, :1])
    options = {
        "mask": None, "sinks": randn(4) if with_sinks else None, "scale": 0.3, "causal": 0,
        "softcap": softcap,
    }  # fmt: skip
    sides = [(x._storage.arenas, x._storage.extent, x.format) for x in (packed, packed_value)]
    found = reference.attend(query, *new, *sides, **options)
    whole = (
        torch.cat([x.dequantize(), n], 2) for x, n in zip((packed, packed_value), new, strict=True)
    )
    expected = reference.attention(query, *whole, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    rows = torch.tensor([[e.length, e.watermark] for _, e, _ in sides])
    on_device = [(a, (rows, i), fmt) for i, (a, _, fmt) in enumerate(sides)]
    assert torch.equal(launch.attend(query, *new, *on_device, **options), found)


# what is read -------------------------------------------------------------------------------------


def test_nothing_else_is_read() -> None:
    key, value = keys_and_values(2, 600)
    packed, packed_value = caches(key, value, 64, 3)
    query = randn(2, 4, 1, HEAD_DIM)
    before, slots = attention(query, packed, packed_value), chosen_slots(query, packed)
    assert slots.shape == (2, HEADS, 64)
    assert (slots >= 0).all()
    qdata = packed._storage["qdata"]
    unread = torch.ones(qdata.shape[:3], dtype=torch.bool).scatter_(2, slots, False)
    qdata[unread] = 255
    assert torch.equal(attention(query, packed, packed_value), before)
    qdata[~unread] ^= 255
    assert not torch.equal(attention(query, packed, packed_value), before)


def test_the_published_ratio_is_that_of_bytes_that_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 64K keys 2048, at 1.25 bits: 16 / 1.25 * 32 = 409.6; landmarks and outliers on top."""
    tokens, head_dim, budget = 65536, 128, 2048
    codec = Svdq(schedule="1.25", budget=budget)
    fmt = stored_format(codec, "key", head_dim, 2, residual_length=0, sink_length=0)
    value_fmt = stored_format(Svdq(), "value", 16, 2, residual_length=0, sink_length=0)
    like = torch.zeros(1, 1, 1, head_dim, dtype=torch.float16)
    arenas = reference.empty_arenas(like, tokens, fmt)
    values = reference.empty_arenas(like[..., :16], tokens, value_fmt)
    arenas.packed[1].normal_()
    read: list[Tensor] = []

    def recorded(qdata: Tensor, *args: object) -> Tensor:
        read.append(qdata)
        return from_codes(qdata, *args)  # pyright: ignore[reportArgumentType]

    from_codes = chosen.from_codes
    monkeypatch.setattr(chosen, "from_codes", recorded)
    extent = reference.Extent(tokens, tokens)
    query = randn(1, 4, 1, head_dim, dtype=torch.float16)
    options = {"mask": None, "sinks": None, "scale": 0.1, "causal": 0, "softcap": 0.0}
    sides = (arenas, extent, fmt), (values, extent, value_fmt)
    reference.attend(query, None, None, *sides, **options)
    (codes,) = read
    dense = tokens * head_dim * 2
    assert codes.nbytes == budget * 20
    assert dense / codes.nbytes == 16 / 1.25 * (tokens / budget) == 409.6
    with_all = codes.nbytes + arenas.packed[1].nbytes + arenas.fixed["outlier_key"].nbytes
    assert 7.4 < dense / with_all < 7.6, "landmarks are most of what is read"


def test_landmarks_count_as_stored_bits() -> None:
    fmt = stored_format(Svdq(schedule="1.25", budget=2048), "key", 128)
    assert fmt.packed_bits_per_element() == 1.25 + 16 / CHUNK


# outliers -----------------------------------------------------------------------------------------


def test_chunks_that_lie_least_along_their_landmark_are_exact() -> None:
    key, value = keys_and_values(1, 200)
    key = key.cumsum(2) / 10  # neighbours look alike
    strange = SINKS + 72
    key[:, 1, strange : strange + CHUNK] = 3 * randn(1, CHUNK, HEAD_DIM, seed=8)
    packed, _ = caches(key, value, 32, 1)
    assert packed._storage["outlier"][0, 1].item() == strange
    numbers = packed.dequantize()
    part = slice(strange, strange + CHUNK)
    assert torch.equal(numbers[:, 1, part], key[:, 1, part])
    assert not torch.equal(numbers[:, 0, part], key[:, 0, part])


def test_prompts_with_few_chunks_have_few_outliers() -> None:
    key, value = keys_and_values(2, 40)
    packed, _ = caches(key, value, 32, 5, left_padding([0, 20], 40))
    # 30 and 10 tokens may be packed, in chunks of 8
    assert (packed._storage["outlier"] >= 0).sum(-1).flatten().tolist() == [3, 3, 1, 1]
    packed, packed_value = caches(key[:, :, :3], value[:, :, :3], 32, 5)
    assert (packed._storage["outlier"] == -1).all()
    assert attention(randn(2, 4, 1, HEAD_DIM), packed, packed_value).isfinite().all()


def test_a_crop_forgets_the_outliers_behind_it() -> None:
    key, value = keys_and_values(1, 200)
    packed, packed_value = caches(key, value, 1024, 20)
    assert (outlier_positions({"outlier": packed._storage["outlier"]}) >= 100).any()
    other_key, other_value = keys_and_values(1, 200, seed=5)
    packed = append(packed[:, :, :100], (other_key[:, :, 100:],))
    packed_value = append(packed_value[:, :, :100], (other_value[:, :, 100:],))
    kept = outlier_positions({"outlier": packed._storage["outlier"]})
    assert (kept >= 0).any()
    assert (kept < 100).all()
    whole = torch.cat([key[:, :, :100], other_key[:, :, 100:]], 2)
    assert relative_error(packed.dequantize()[:, :, :100], whole[:, :, :100]) < 1e-3
    query = randn(1, 4, 1, HEAD_DIM)
    expected = attention(query, packed.dequantize(), packed_value.dequantize())
    torch.testing.assert_close(
        attention(query, packed, packed_value), expected, rtol=1e-4, atol=1e-5
    )


def test_copies_choose_alike() -> None:
    key, value = keys_and_values(3, 200)
    packed, packed_value = caches(key, value, 32, 2)
    query, rows = randn(3, 4, 1, HEAD_DIM), torch.tensor([2, 0, 0])
    out = attention(query, packed, packed_value)
    for copied in (pickle.loads(pickle.dumps(packed)), packed.clone()):
        assert torch.equal(attention(query, copied, packed_value), out)
    picked = (x.index_select(0, rows) for x in (packed, packed_value))
    assert torch.equal(attention(query[rows], *picked), out[rows])


# whole models -------------------------------------------------------------------------------------


def test_a_model_with_budget_for_all_answers_as_without_a_budget() -> None:
    found, options = [], {"bits": 8, "inner": "eager", "residual_length": 8}
    for codec in (Svdq(), Svdq(budget=1024, outlier_chunks=0), Svdq(budget=16, outlier_chunks=0)):
        torch._dynamo.reset()
        model = squat_fx.compile(build("llama"), codec=codec, **options)
        found.append(logits(model))
        assert squat_fx.report(model).rewritten > 0, str(squat_fx.report(model))
    assert relative_error(found[1], found[0]) < 1e-4
    assert relative_error(found[2], found[0]) > 1e-3


def test_an_op_is_traced_for_the_layout() -> None:
    assert ops.overload("attend", "latent/sparse", "planes/channel")


@pytest.mark.parametrize("budget", [0, 4, 20, 2048.0, True])
def test_other_budgets_are_refused(budget: object) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^budget must be a number of tokens, a multiple of 8, got {budget!r}; "
        r"choose 2048, or None for all$",
    ):
        Svdq(budget=budget)  # pyright: ignore[reportArgumentType]


def test_negative_outliers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^outlier_chunks must be .*, 0 or more, got -1$"):
        Svdq(budget=8, outlier_chunks=-1)


def test_a_codec_without_a_budget_has_the_plain_layout() -> None:
    fmt = stored_format(Svdq(), "key", HEAD_DIM)
    assert fmt.layout == "latent/rope"
    assert replace(fmt, details=()) == fmt
    assert stored_format(Svdq(budget=64), "key", HEAD_DIM).details == (0, 0, 64, 48)
    assert stored_format(Svdq(budget=64), "value", HEAD_DIM).layout == "planes/channel"
