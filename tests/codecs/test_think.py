"""ThinK: which channels are kept, and that they are KIVI's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squat_fx import QuantizedKV
from squat_fx.codecs import Kivi, PerToken, Think
from squat_fx.codecs.think import WINDOW
from tests.codecs.round_trip import relative_error, round_trip
from tests.conftest import randn, stored_format

WIDTHS = st.sampled_from([1, 2, 3, 4, 8])
SEEDS = st.integers(0, 2**16)
RATIOS = st.sampled_from([0.0, 0.25, 0.4, 0.6, 0.9])


def chosen(
    codec: Think, key: Tensor, query: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
    """The kept channels, ``[batch, heads, kept]``."""
    keep = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool) if keep is None else keep
    return codec.fit("key", key, query, keep).fixed["channels"][:, :, 0]


@given(
    bits=WIDTHS,
    group_size=st.sampled_from([32, 64, 128]),
    head_dim=st.sampled_from([16, 40, 64]),
    seed=SEEDS,
)
def test_without_a_ratio_it_is_kivi_bit_for_bit(
    bits: int, group_size: int, head_dim: int, seed: int
) -> None:
    x = randn(2, 2, 128, head_dim, seed=seed)
    valid = randn(2, 128, seed=seed + 1) > 0
    think = round_trip(Think(group_size, 0.0), "key", x, bits, valid, randn(2, 4, 128, head_dim))
    kivi = round_trip(Kivi(group_size), "key", x, bits, valid)
    for a, e in zip(think.packed, kivi.packed, strict=True):
        assert torch.equal(a, e)
    assert torch.equal(think.numbers, kivi.numbers)


@given(bits=WIDTHS, ratio=RATIOS, seed=SEEDS)
def test_kept_channels_are_kivis_and_the_others_zero(bits: int, ratio: float, seed: int) -> None:
    x = randn(2, 2, 64, 64, seed=seed)
    found = round_trip(Think(ratio=ratio), "key", x, bits, query=randn(2, 4, 64, 64, seed=seed + 1))
    kivi = round_trip(Kivi(), "key", x, bits)
    kept = torch.zeros(2, 2, 1, 64, dtype=torch.bool)
    kept.scatter_(3, found.fixed["channels"].long(), True)
    assert torch.equal(found.numbers, kivi.numbers.masked_fill(~kept, 0.0))


@pytest.mark.parametrize("bits", [2, 4])
def test_channels_without_energy_cost_almost_nothing(bits: int) -> None:
    size = torch.full((128,), 1e-3)
    size[torch.randperm(128, generator=torch.Generator().manual_seed(1))[:76]] = 1.0
    x = size * randn(2, 2, 128, 128)
    think, kivi = (
        round_trip(codec, "key", x, bits, query=randn(2, 4, 128, 128, seed=1))
        for codec in (Think(ratio=0.4), Kivi())
    )
    error = relative_error(think.numbers, x)
    assert error < relative_error(kivi.numbers, x) + 1e-6
    assert think.fmt.packed_bits_per_element() == pytest.approx((bits + 1) * 80 / 128)


def test_channels_are_chosen_by_keys_times_queries() -> None:
    key, query = torch.ones(1, 1, 64, 32), torch.ones(1, 1, 64, 32)
    key[..., :8], query[..., :8] = 5.0, 0.1  # loud and unheard: 0.25
    key[..., 20:], query[..., 20:] = 0.5, 1.5  # quiet and heard: 0.5625
    assert chosen(Think(ratio=0.5), key, query).tolist() == [[[*range(8, 24)]]]
    assert chosen(Think(ratio=0.5), key).tolist() == [[[*range(16)]]]


def test_query_heads_of_a_kv_head_choose_together() -> None:
    query = torch.ones(1, 4, 64, 32)
    query[:, 0, :, :16] = 3.0  # 9 + 1 against 1 + 4
    query[:, 1, :, 16:] = 2.0
    query[:, 2, :, :16] = 3.0  # 9 + 1 against 1 + 16
    query[:, 3, :, 16:] = 4.0
    found = chosen(Think(ratio=0.5), torch.ones(1, 2, 64, 32), query)
    assert found.tolist() == [[[*range(16)], [*range(16, 32)]]]


@given(seed=SEEDS, tokens=st.integers(WINDOW, 80))
def test_the_newest_kept_queries_count(seed: int, tokens: int) -> None:
    key, query = randn(2, 1, tokens, 64, seed=seed), randn(2, 2, tokens, 64, seed=seed + 1)
    keep = torch.ones(2, tokens, dtype=torch.bool)
    keep[1, 1 : 1 + tokens - WINDOW] = False
    found = chosen(Think(), key, query, keep)
    query[0, :, : tokens - WINDOW] = 1e3 * randn(2, tokens - WINDOW, 64, seed=seed + 2)
    query[1].masked_fill_(~keep[1][:, None], torch.nan)
    key[1].masked_fill_(~keep[1][:, None], torch.nan)
    assert torch.equal(chosen(Think(), key, query, keep), found)


@given(seed=SEEDS)
def test_with_few_tokens_queries_do_not_count(seed: int) -> None:
    key, query = randn(2, 1, WINDOW, 64, seed=seed), randn(2, 2, WINDOW, 64, seed=seed + 1)
    keep = torch.ones(2, WINDOW, dtype=torch.bool)
    keep[1, 0] = False
    found, by_keys = chosen(Think(), key, query, keep), chosen(Think(), key, None, keep)
    assert torch.equal(found[1], by_keys[1])
    by_both = (key[0].square().sum(1) * query[0].square().sum((0, 1))).topk(48).indices
    assert torch.equal(found[0].long(), by_both.sort().values)


@given(seed=SEEDS, padding=st.sampled_from([0.0, 1e4, torch.inf, torch.nan]))
def test_padding_never_touches_a_valid_token(seed: int, padding: float) -> None:
    key, query = randn(2, 2, 64, 32, seed=seed), randn(2, 4, 64, 32, seed=seed + 1)
    valid = randn(2, 64, seed=seed + 2) > -1
    valid[0, :32] = False
    there = valid[:, None, :, None]
    codec = Think(ratio=0.5)
    expected = round_trip(codec, "key", key, 2, valid, query)
    key, query = (x.masked_fill(~there, padding) for x in (key, query))
    actual = round_trip(codec, "key", key, 2, valid, query)
    assert torch.equal(actual.fixed["channels"], expected.fixed["channels"])
    seen = there.expand_as(key)
    assert torch.equal(actual.numbers[seen], expected.numbers[seen])


@given(seed=SEEDS)
def test_rows_of_a_batch_are_independent(seed: int) -> None:
    key, query = randn(3, 2, 64, 32, seed=seed), randn(3, 4, 64, 32, seed=seed + 1)
    together = round_trip(Think(ratio=0.5), "key", key, query=query)
    for row in range(3):
        alone = slice(row, row + 1)
        found = round_trip(Think(ratio=0.5), "key", key[alone], query=query[alone])
        assert torch.equal(found.numbers, together.numbers[alone])


@pytest.mark.parametrize("value", [0.0, 1.5, -3e4, 1e9, 1e30])
def test_constant_and_huge_numbers_stay_finite(value: float) -> None:
    for x in (torch.full((1, 1, 32, 64), value), value * randn(1, 1, 32, 64)):
        found = round_trip(Think(), "key", x, query=x)
        assert found.numbers.isfinite().all()
        channels = found.fixed["channels"].flatten()
        assert (channels.diff() > 0).all(), "ascending, each once"


def test_with_nothing_to_learn_from_the_first_channels_are_kept() -> None:
    keep = torch.zeros(1, 5, dtype=torch.bool)
    found = chosen(Think(), randn(1, 1, 5, 64), randn(1, 1, 5, 64), keep)
    assert found.tolist() == [[[*range(48)]]]


def test_later_tokens_are_stored_in_the_channels_of_the_prompt() -> None:
    codec = Think(ratio=0.5)
    fmt = stored_format(codec, "key", 32, residual_length=0, sink_length=0)
    x = randn(2, 2, 96, 32)
    x[:, :, :64, ::2] *= 10  # the even channels matter in the prompt
    x[:, :, 64:, 1::2] *= 100  # and the odd ones later
    packed = QuantizedKV.from_dense(x[:, :, :64], fmt, "key", query=randn(2, 2, 64, 32))
    channels = packed._storage["channels"].clone()
    assert channels.tolist() == [[[[*range(0, 32, 2)]]] * 2] * 2
    packed = torch.cat([packed, x[:, :, 64:]], 2)
    assert isinstance(packed, QuantizedKV)
    packed.writable_storage()  # pending tokens go into it
    assert torch.equal(packed._storage["channels"], channels)
    numbers = packed.dequantize()
    assert not numbers[..., 1::2].any()
    assert relative_error(numbers[..., ::2], x[..., ::2]) < 0.2


@pytest.mark.parametrize(
    ("head_dim", "ratio", "kept"),
    [(128, 0.4, 80), (64, 0.4, 48), (64, 0.5, 32), (64, 0.0, 64), (40, 0.0, 40), (40, 0.1, 40),
     (80, 0.4, 48), (16, 0.9, 16), (128, 0.999, 16)],
)  # fmt: skip
def test_kept_channels_are_whole_plane_groups(head_dim: int, ratio: float, kept: int) -> None:
    codec = Think(ratio=ratio)
    fmt = stored_format(codec, "key", head_dim)
    assert codec.kept_channels(head_dim) == kept
    assert fmt.widths == (2,) * -(-kept // 16)
    assert fmt.arena_names == ("qdata", "scale", "zero_point", "channels", "dense", "start")
    assert [fmt.last_dim(name) for name in fmt.packed_names] == [4 * -(-kept // 16), kept, kept]


@pytest.mark.parametrize(("tokens", "indices"), [(128, 80 * 16 / 128 / 128), (1024, 10 / 1024)])
def test_bits_are_counted_over_all_channels(tokens: int, indices: float) -> None:
    found = round_trip(Think(), "key", randn(2, 3, tokens, 128))
    assert found.fmt.packed_bits_per_element() == 1.875
    assert found.bits_per_element == pytest.approx(1.875 + indices)


def test_values_are_kivis() -> None:
    assert Think(64).layout_of("value") == "planes/channel"
    assert Think(64).granularity("value") == PerToken(64)
    x = randn(2, 2, 40, 64)
    assert torch.equal(
        round_trip(Think(), "value", x).numbers, round_trip(Kivi(), "value", x).numbers
    )
    assert not Think().fit("value", x, None, torch.ones(2, 40, dtype=torch.bool)).fixed


def test_queries_are_asked_for_where_channels_are_dropped() -> None:
    assert Think().taps("key") == {"query"}
    assert not Think().taps("value")
    assert not Think(ratio=0.0).taps("key")


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 40.0, float("nan")])
def test_other_ratios_are_refused(ratio: float) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^ratio must be a share of channels, at least 0 and less than 1, got {ratio}; "
        r"choose 0.4 as published, or 0 to drop none$",
    ):
        Think(ratio=ratio)


def test_other_group_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^group_size must be 32, 64 or 128, got 16$"):
        Think(16)


def test_one_width_for_all_channels() -> None:
    with pytest.raises(ValueError, match=r"^the layout 'planes/pruned' gives .* are 2 and 3$"):
        stored_format(Think(), "key", head_dim=64, bits=2.5)
