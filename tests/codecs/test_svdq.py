"""SVDq: singular frames of keys before their rotary embedding, and what they cost."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squat_fx import QuantizedKV
from squat_fx.codecs import Kivi, PerToken, Svdq
from squat_fx.codecs.svdq import SCHEDULES, SMALLEST_PROMPT, spread
from squat_fx.kernels import reference
from squat_fx.layouts import Format
from squat_fx.layouts.rotary import Pairing, Rotation
from tests.codecs.round_trip import relative_error, round_trip
from tests.conftest import left_padding, randn, stored_format

SEEDS = st.integers(0, 2**16)
PAIRINGS: tuple[Pairing, ...] = ("halves", "interleaved")


def low_rank(*shape: int, seed: int = 0) -> Tensor:
    """Keys before their embedding: a mean, and directions of exponentially falling size."""
    *_, heads, _, head_dim = shape
    sizes = torch.exp(-torch.arange(head_dim) / (head_dim / 7))
    basis = torch.linalg.qr(randn(heads, head_dim, head_dim, seed=seed + 1)).Q
    return (randn(*shape, seed=seed) * sizes) @ basis + randn(1, heads, 1, head_dim, seed=seed + 2)


def frequencies(rotary_dim: int, base: float = 1e4) -> Tensor:
    """Radians a token of each pair."""
    return base ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)


def turned(x: Tensor, rotation: Rotation, positions: Tensor) -> Tensor:
    """``x`` after its embedding at ``positions`` ``[..., tokens]``."""
    angle = positions[..., None].double() * frequencies(rotation.rotary_dim).double()
    return rotation.apply(x.double(), angle.cos(), angle.sin()).float()


def format_of(
    codec: Svdq, head_dim: int, rotation: Rotation | None = None, bits: float = 2, **sizes: int
) -> Format:
    """Keys of which all but the sinks may be packed."""
    fmt = stored_format(codec, "key", head_dim, bits, **{"residual_length": 0, **sizes})
    return fmt if rotation is None else fmt.stored_layout.with_rotation(fmt, rotation)


def stored(
    x: Tensor, codec: Svdq, rotation: Rotation | None = None, bits: float = 2, **given: Tensor
) -> QuantizedKV:
    """``x`` behind the op ``store``."""
    angles = None if rotation is None else frequencies(rotation.rotary_dim)
    fmt = format_of(codec, x.shape[3], rotation, bits)
    return QuantizedKV.from_dense(x, fmt, "key", given=angles, **given)


# what it is for -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_dim", "schedule"), [(64, "1.25"), (128, "1.25"), (128, "2")])
def test_keys_of_low_rank_come_back_ten_times_better_than_per_channel(
    head_dim: int, schedule: str
) -> None:
    rotation = Rotation(head_dim, "halves")
    x = turned(low_rank(1, 2, 1024, head_dim), rotation, torch.arange(1024))
    found = stored(x, Svdq(schedule=schedule), rotation)
    per_channel = round_trip(Kivi(128), "key", x, int(float(schedule)))
    assert found.format.packed_bits_per_element() == float(schedule)
    assert per_channel.fmt.packed_bits_per_element() >= float(schedule)
    error = relative_error(found.dequantize(), x)
    assert error < 0.1 * relative_error(per_channel.numbers, x)


def test_keys_without_structure_come_back_worse_than_per_channel() -> None:
    x = randn(1, 2, 1024, 64)
    error = relative_error(stored(x, Svdq(pre_rope=False), bits=2).dequantize(), x)
    per_channel = relative_error(round_trip(Kivi(128), "key", x, 2).numbers, x)
    assert error > 1.5 * per_channel, "half of the channels are not stored"


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("rotary_dim", [64, 32])
def test_turning_keys_back_is_as_good_as_never_turning_them(
    pairing: Pairing, rotary_dim: int
) -> None:
    x, rotation = low_rank(1, 2, 300, 64), Rotation(rotary_dim, pairing)
    codec, rotated = Svdq(), turned(x, rotation, torch.arange(300))
    before = relative_error(stored(x, Svdq(pre_rope=False)).dequantize(), x)
    after = relative_error(stored(rotated, codec, rotation).dequantize(), rotated)
    cached = relative_error(stored(rotated, Svdq(pre_rope=False)).dequantize(), rotated)
    assert after == pytest.approx(before, rel=0.02)
    assert cached > 2 * after


@given(first=st.integers(0, 100_000), seed=SEEDS)
def test_where_positions_begin_does_not_matter(first: int, seed: int) -> None:
    x, rotation = low_rank(1, 1, 100, 32, seed=seed), Rotation(32, "halves")
    at_zero, later = (turned(x, rotation, at + torch.arange(100)) for at in (0, first))
    errors = [
        relative_error(stored(keys, Svdq(), rotation, bits=4).dequantize(), keys)
        for keys in (at_zero, later)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.2)


def test_keys_between_which_positions_jump_come_back_right_if_worse() -> None:
    x, rotation = low_rank(1, 1, 400, 64), Rotation(64, "halves")
    jumping = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    x = turned(x, rotation, jumping)
    assert relative_error(stored(x, Svdq(), rotation, bits=8).dequantize(), x) < 1e-4
    assert relative_error(stored(x, Svdq(), rotation, bits=2).dequantize(), x) < 0.5


def test_the_first_latent_channels_are_the_strongest() -> None:
    x = low_rank(1, 2, 500, 64)
    handle = stored(x, Svdq(pre_rope=False), bits=8)
    assert handle._storage["basis"].shape == (1, 2, 64, 64)
    centred = x[:, :, 2:] - x[:, :, 2:].mean(2, keepdim=True)
    sizes = (centred @ handle._storage["basis"].float().mT).square().sum(2)
    singular = torch.linalg.svdvals(centred).square()
    torch.testing.assert_close(sizes, singular, rtol=1e-2, atol=1e-3 * singular.max().item())
    identity = handle._storage["basis"].float() @ handle._storage["basis"].float().mT
    torch.testing.assert_close(identity, torch.eye(64).expand_as(identity), atol=2e-3, rtol=0)


@pytest.mark.parametrize("codec", [Svdq(), Svdq(pre_rope=False)], ids=str)
def test_eight_bits_lose_almost_nothing(codec: Svdq) -> None:
    x = randn(2, 2, 200, 40)
    rotation = Rotation(40, "halves") if codec.pre_rope else None
    assert relative_error(stored(x, codec, rotation, bits=8).dequantize(), x) < 1e-4


# later tokens -------------------------------------------------------------------------------------


@given(prompt=st.integers(1, 90), seed=SEEDS, pairing=st.sampled_from(PAIRINGS))
def test_later_tokens_are_rounded_with_what_the_prompt_taught(
    prompt: int, seed: int, pairing: Pairing
) -> None:
    x, rotation = low_rank(2, 2, 120, 32, seed=seed), Rotation(24, pairing)
    x = turned(x, rotation, torch.arange(120))
    handle = stored(x[:, :, :prompt], Svdq(), rotation, bits=3)
    at_once, one_by_one = (
        append(handle, x[:, :, prompt:].split(n, 2)) for n in (120, 1 + seed % 7)
    )
    for name in handle.format.stored_layout.fixed:
        assert torch.equal(at_once._storage[name], handle._storage[name]), name
    assert torch.equal(at_once.dequantize(), one_by_one.dequantize())


def append(handle: QuantizedKV, parts: tuple[Tensor, ...]) -> QuantizedKV:
    """A longer handle, its tokens written."""
    for part in parts:
        longer = torch.cat([handle, part], 2)
        assert isinstance(longer, QuantizedKV)
        handle = longer
        handle.writable_storage()
    return handle


def test_later_tokens_of_the_same_kind_are_rounded_as_well() -> None:
    rotation = Rotation(64, "halves")
    x = turned(low_rank(1, 2, 1200, 64), rotation, torch.arange(1200))
    handle = append(stored(x[:, :, :1000], Svdq(), rotation), (x[:, :, 1000:],))
    numbers = handle.dequantize()
    old, later = (
        relative_error(numbers[:, :, part], x[:, :, part])
        for part in (slice(1000), slice(1000, 1200))
    )
    assert later < 1.3 * old


def test_what_is_left_of_a_crop_is_packed_again_where_it_was() -> None:
    rotation = Rotation(32, "halves")
    x = turned(low_rank(1, 2, 100, 32), rotation, torch.arange(100))
    handle = stored(x, Svdq(), rotation, bits=4)
    whole = handle.dequantize()
    cropped = append(handle[:, :, :60], (x[:, :, 60:],))
    torch.testing.assert_close(cropped.dequantize(), whole, rtol=0, atol=1e-5)


def test_keys_stay_what_they_are_when_slots_move() -> None:
    rotation = Rotation(32, "halves")
    x = turned(low_rank(2, 2, 200, 32), rotation, torch.arange(200))
    window = stored(x, Svdq(), rotation)[:, :, 101:]
    assert isinstance(window, QuantizedKV)
    before = window.dequantize()
    reference.drop_front(window._storage.arenas, window.first, window.format)
    assert window._storage["start"].tolist() == [98, 98]
    assert torch.equal(window.dequantize(), before)


def test_copies_carry_what_was_learned() -> None:
    rotation = Rotation(32, "halves")
    x = turned(low_rank(3, 2, 80, 32), rotation, torch.arange(80))
    handle = stored(x, Svdq(), rotation)
    numbers, rows = handle.dequantize(), torch.tensor([2, 0, 0])
    assert torch.equal(handle.index_select(0, rows).dequantize(), numbers[rows])
    assert torch.equal(pickle.loads(pickle.dumps(handle)).dequantize(), numbers)
    assert torch.equal(handle.clone().dequantize(), numbers)


# rows ---------------------------------------------------------------------------------------------


@given(pads=st.lists(st.integers(0, 60), min_size=2, max_size=3), seed=SEEDS)
def test_a_row_is_as_it_would_be_alone(pads: list[int], seed: int) -> None:
    x, rotation = low_rank(len(pads), 2, 100, 32, seed=seed), Rotation(32, "halves")
    positions = (torch.arange(100) - torch.tensor(pads)[:, None]).clamp(min=0)
    x = turned(x, rotation, positions[:, None])
    valid = left_padding(pads, 100)
    shown = x.masked_fill(~valid[:, None, :, None], torch.nan)
    together = stored(shown, Svdq(), rotation, bits=3, valid=valid).dequantize()
    assert together.isfinite().all()
    for row, first in enumerate(pads):
        alone = x[row : row + 1, :, first:]
        numbers = stored(alone, Svdq(), rotation, bits=3).dequantize()
        # Keys behind padding are turned by other angles, and fp16 rounds another basis for them.
        difference = relative_error(together[row : row + 1, :, first:], numbers)
        assert difference < 0.1 * relative_error(numbers, alone) + 1e-6
        if first == 0:
            assert difference < 1e-6


@given(seed=SEEDS)
def test_padding_among_the_tokens_teaches_nothing(seed: int) -> None:
    x, valid = low_rank(1, 2, 80, 32, seed=seed), randn(1, 80, seed=seed) > -1
    shown = x.masked_fill(~valid[:, None, :, None], 1e4)
    expected, actual = (stored(k, Svdq(pre_rope=False), valid=valid) for k in (x, shown))
    for name in expected.format.stored_layout.fixed:
        assert torch.equal(actual._storage[name], expected._storage[name]), name


# little to learn from -----------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3, SMALLEST_PROMPT + 1])
def test_from_too_few_tokens_nothing_is_learned(tokens: int) -> None:
    x = 5 * randn(1, 2, 400, 64)
    codec = Svdq(schedule="4", pre_rope=False)
    handle = stored(x[:, :, :tokens], codec)
    assert not handle._storage["center"].any()
    numbers = append(handle, (x[:, :, tokens:],)).dequantize()
    assert relative_error(numbers, x) < (1.0 if tokens == 1 else 0.2)


@pytest.mark.parametrize("value", [0.0, 1.5, -3e4, 1e30, torch.inf])
def test_constant_and_huge_numbers_stay_finite(value: float) -> None:
    for x in (torch.full((1, 1, 64, 32), value), value * randn(1, 1, 64, 32).exp()):
        handle = stored(x, Svdq(), Rotation(32, "halves"))
        assert not handle._storage["basis"].isnan().any()
        if value != torch.inf:
            assert handle.dequantize().isfinite().all()


def test_a_constant_comes_back() -> None:
    x = torch.full((1, 1, 64, 32), 1.5)
    torch.testing.assert_close(stored(x, Svdq(pre_rope=False)).dequantize(), x)


# bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_dim", "schedule", "widths"),
    [
        (128, "1.25", (4, 4, 2, 0, 0, 0, 0, 0)),
        (256, "1.25", (4, 4, 4, 4, 2, 2, *[0] * 10)),
        (64, "1.25", (3, 2, 0, 0)),
        (192, "1.25", (3, 3, 3, 2, 2, 2, *[0] * 6)),
        (80, "1.25", (4, 2, 0, 0, 0)),
        (128, "2 published", (8, 4, 2, 1, 1, 0, 0, 0)),
        (16, "1.25", (1,)),
        (128, (4, 4, 2, 0, 0, 0, 0, 0), (4, 4, 2, 0, 0, 0, 0, 0)),
        (64, (4, 4, 2, 0, 0, 0, 0, 0), (4, 1, 0, 0)),
    ],
)
def test_schedules_are_spread_over_plane_groups(
    head_dim: int, schedule: str | tuple[int, ...], widths: tuple[int, ...]
) -> None:
    assert stored_format(Svdq(schedule=schedule), "key", head_dim).widths == widths


def test_schedules_have_the_bits_that_they_are_named_by() -> None:
    for name, choices in SCHEDULES.items():
        for widths in choices:
            assert sum(widths) / len(widths) == float(name.split()[0]), name
            assert list(widths) == sorted(widths, reverse=True)


@given(planes=st.integers(1, 16), schedule=st.lists(st.integers(0, 8), min_size=1, max_size=8))
def test_spread_widths_fall_and_keep_the_sum(planes: int, schedule: list[int]) -> None:
    schedule = sorted(schedule, reverse=True)
    widths = spread(schedule, planes)
    exact = sum(schedule) * planes / len(schedule)
    assert list(widths) == sorted(widths, reverse=True)
    assert abs(sum(widths) - max(exact, 1)) <= 0.5
    assert max(widths) <= 8


@pytest.mark.parametrize(("head_dim", "latent"), [(128, 48), (64, 32)])
@pytest.mark.parametrize("tokens", [512, 2048])
def test_the_published_width_is_stored_in_as_many_bytes(
    head_dim: int, latent: int, tokens: int
) -> None:
    rotation = Rotation(head_dim, "halves")
    handle = stored(randn(2, 3, tokens, head_dim), Svdq(schedule="1.25"), rotation)
    packed = tokens - handle.format.sink_length
    row = handle._storage["qdata"][0, 0, :packed]
    assert 8 * row.nbytes / (packed * head_dim) == 1.25
    fixed = {name: handle._storage[name].nbytes for name in handle.format.stored_layout.fixed}
    per_head = 16 * latent * head_dim + 32 * (2 * latent + head_dim + head_dim // 2)
    assert 8 * sum(fixed.values()) == 2 * 3 * per_head


def test_values_are_kivis() -> None:
    assert Svdq(64).layout_of("value") == "planes/channel"
    assert Svdq(64).granularity("value") == PerToken(64)
    x = randn(2, 2, 40, 64)
    expected = round_trip(Kivi(), "value", x).numbers
    assert torch.equal(round_trip(Svdq(), "value", x).numbers, expected)


# what is refused ----------------------------------------------------------------------------------


def test_the_rotary_embedding_is_asked_for() -> None:
    assert Svdq().taps("key") == {"rotary"}
    assert not Svdq().taps("value")
    assert not Svdq(pre_rope=False).taps("key")


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^schedule must be one of 1, 1.25, .*, 8, or widths, got '1.3'$"
    ):
        Svdq(schedule="1.3")


@pytest.mark.parametrize("schedule", [(), (0, 0), (2, 4), (9, 1), (2.0, 1)])
def test_widths_that_do_not_fall_are_refused(schedule: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError,
        match=r"^a schedule is bits from 0 to 8 in falling order, of which the first are not 0, "
        r"got \(.*\); singular values fall, too$",
    ):
        Svdq(schedule=schedule)


def test_bits_without_a_schedule_are_refused_with_the_nearest() -> None:
    with pytest.raises(
        ValueError,
        match=r"^codec 'svdq' has no schedule of 2.5 bits; the nearest are 2 and 3; "
        r"or give it widths, as in Svdq\(schedule=\(4, 4, 2, 0\)\)$",
    ):
        Svdq().check_bits(2.5)
    Svdq(schedule="2").check_bits(2.5)  # values answer for themselves


def test_other_flags_and_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^pre_rope must be True or False, got 1$"):
        Svdq(pre_rope=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^group_size must be 32, 64 or 128, got 16$"):
        Svdq(16)
