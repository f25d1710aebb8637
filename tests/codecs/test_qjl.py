"""QJL: an unbiased estimate through the real packed storage, outliers apart, every bit counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squat_fx.codecs import Kivi, PerToken, Qjl, TurboQuant
from squat_fx.config import Config
from squat_fx.layouts import LAYOUTS
from squat_fx.layouts.signs_token import is_outlier, outlier_channels
from squat_fx.state import QuantizedKV
from tests.conftest import left_padding, randn, stored_format

SEEDS = st.integers(0, 2**16)
PLAIN = Qjl(outliers=0)


def packed(codec: Any, x: Tensor, bits: Any = 2, role: Any = "key") -> QuantizedKV:
    """Nothing of ``x`` stays exact."""
    fmt = stored_format(codec, role, x.shape[3], bits, residual_length=0, sink_length=0)
    return QuantizedKV.from_dense(x, fmt, role)


def error(codec: Any, x: Tensor, bits: Any = 2) -> float:
    """Relative mean squared error."""
    restored = packed(codec, x, bits).dequantize()
    return ((restored - x).square().mean() / x.square().mean()).item()


def with_outliers(tokens: int, head_dim: int = 128) -> Tensor:
    """Keys with four large channels, others in each head."""
    x = randn(1, 2, tokens, head_dim)
    x[:, 0, :, [3, 40, 77, 120]] *= 15
    x[:, 1, :, [0, 1, 64, 127]] *= 15
    return x


# how good it is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [PLAIN, Qjl(), Qjl(128, 4, 64)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_scores_are_right_on_average(codec: Qjl, head_dim: int) -> None:
    """The slope of estimated scores over true ones."""
    key, query = randn(1, 1, 3200, head_dim), randn(1, 1, 64, head_dim, seed=1)
    true, found = query @ key.mT, query @ packed(codec, key).dequantize().mT
    slope = (true * found).sum() / true.square().sum()
    assert slope.item() == pytest.approx(1.0, abs=0.02)


def test_sketching_outliers_apart_is_what_saves_the_others() -> None:
    """The error is a share of the norm: apart, large channels leave the small ones alone."""
    x = with_outliers(640)
    small = torch.ones(2, 128, dtype=torch.bool)
    small[0, [3, 40, 77, 120]] = small[1, [0, 1, 64, 127]] = False
    errors = []
    for codec in (Qjl(), Qjl(512, 0)):  # of as many signs
        wrong = packed(codec, x).dequantize() - x
        errors.append(wrong.transpose(2, 3)[:, small].square().mean().item())
    assert errors[0] < errors[1] / 3


def test_more_signs_are_better_and_rounding_is_better_still() -> None:
    x = randn(1, 1, 2000, 128)
    sketches = [error(Qjl(signs, 0), x) for signs in (128, 256, 512)]
    assert sketches[0] > 1.8 * sketches[1] > 3.2 * sketches[2]
    assert sketches[1] > 2 * error(TurboQuant(), x)


def test_values_are_those_of_min_max_rounding() -> None:
    x = randn(1, 2, 96, 80)
    ours, theirs = (packed(codec, x, 3, "value").dequantize() for codec in (Qjl(), Kivi(32)))
    assert torch.equal(ours, theirs)


# what is stored -----------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("codec", [Qjl(), PLAIN, Qjl(512, 8, 128), Qjl(96, 5, 48)], ids=str)
def test_the_bits_are_those_that_are_there(codec: Qjl, head_dim: int) -> None:
    tokens = 96
    handle = packed(codec, randn(1, 2, tokens, head_dim))
    fmt = handle.format
    counted = sum(
        handle._storage[name][:, :, : tokens // fmt.tokens_per_slot(name)].nbytes
        for name in fmt.packed_names
    )
    bits = 8 * counted / (2 * tokens * head_dim)
    signs, norms, channels = codec.sketch_dim, 16, 0.0
    if codec.outliers:
        signs, norms = signs + codec.outlier_sketch_dim, 32
        channels = 8 * codec.outliers / 32
    assert bits == fmt.packed_bits_per_element() == (signs + norms + channels) / head_dim


def test_the_bits_of_the_published_configuration() -> None:
    key, value = (stored_format(Qjl(), role, 128) for role in ("key", "value"))
    assert key.packed_bits_per_element() == 4.265625
    assert value.packed_bits_per_element() == 3.0
    assert stored_format(PLAIN, "key", 128).packed_bits_per_element() == 2.125


def test_the_formats() -> None:
    key, value = (stored_format(Qjl(), role, 128) for role in ("key", "value"))
    assert (key.layout, key.widths, key.token_group) == ("signs/token", (256, 256, 8), 32)
    assert key.packed_names == ("qdata", "norm", "outliers")
    assert [key.tokens_per_slot(name) for name in key.packed_names] == [1, 1, 32]
    assert [key.last_dim(name) for name in key.packed_names] == [64, 2, 8]
    assert (value.layout, value.widths) == ("planes/channel", (2,) * 8)
    assert Qjl().granularity("value") == PerToken(32)
    plain = stored_format(PLAIN, "key", 128)
    assert (plain.widths, plain.token_group) == ((256,), 1)
    assert [plain.last_dim(name) for name in plain.packed_names] == [32, 1, 0]


def test_the_outliers_of_a_group_are_its_channels_of_largest_norm() -> None:
    x = randn(2, 2, 64, 40)
    x[0, 0, :32, [7, 39]] *= 9
    x[1, 1, 32:, [0, 20]] *= 9
    channels = outlier_channels(x, 32, 2)
    assert (channels.shape, channels.dtype) == ((2, 2, 2, 2), torch.uint8)
    assert channels[0, 0, 0].tolist() == [7, 39]
    assert channels[1, 1, 1].tolist() == [0, 20]
    apart = is_outlier(channels, 40, 32)
    assert apart.shape == x.shape
    assert (apart.sum(-1) == 2).all()
    assert apart[0, 0, 31, [7, 39]].all()


@given(garbage=st.sampled_from([0.0, 6e4, torch.inf, torch.nan]), seed=SEEDS)
def test_padding_is_nobodys_outlier_and_comes_back_as_zeros(garbage: float, seed: int) -> None:
    x = randn(2, 2, 64, 40, seed=seed)
    valid = torch.rand(2, 64, generator=torch.Generator().manual_seed(seed)) < 0.6
    valid[0, :32] = False
    fmt, layout = stored_format(Qjl(), "key", 40), LAYOUTS["signs/token"]
    hidden = ~valid[:, None, :, None]
    restored = [
        layout.dequantize(layout.quantize(shown, valid, fmt, Qjl(), {}), fmt, {})
        for shown in (x, x.masked_fill(hidden, garbage))
    ]
    assert torch.equal(*restored)
    assert not restored[0].masked_select(hidden).any()


@given(pads=st.lists(st.integers(0, 80), min_size=1, max_size=3), seed=SEEDS)
def test_rows_do_not_depend_on_each_other(pads: list[int], seed: int) -> None:
    x, fmt = randn(len(pads), 2, 80, 64, seed=seed), stored_format(Qjl(), "key", 64)
    together = QuantizedKV.from_dense(x, fmt, "key", left_padding(pads, 80)).dequantize()
    for row, first in enumerate(pads):
        if first < 80:
            alone = QuantizedKV.from_dense(x[row : row + 1, :, first:], fmt, "key").dequantize()
            torch.testing.assert_close(together[row : row + 1, :, first:], alone)


@pytest.mark.parametrize("codec", [Qjl(), PLAIN], ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -3e4, 6e4, 1e12, 3e38])
def test_constant_zero_and_huge_keys_stay_finite(codec: Qjl, value: float) -> None:
    restored = packed(codec, torch.full((1, 1, 64, 64), value)).dequantize()
    assert restored.isfinite().all()
    if not value:
        assert not restored.any()


# what is refused ----------------------------------------------------------------------------------


def test_bad_fields_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^sketch_dim must be a multiple of 16, 16 or more, got 100; choose 96$"
    ):
        Qjl(100)
    with pytest.raises(ValueError, match=r"^outlier_sketch_dim must be .*, got 0; choose 16$"):
        Qjl(outlier_sketch_dim=0)
    with pytest.raises(ValueError, match=r"^sketch_dim must be .*, got 'x'; choose 256$"):
        Qjl("x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^outliers must be a number of channels, 0 or more, got"):
        Qjl(outliers=-1)
    with pytest.raises(
        ValueError,
        match=r"^codec 'qjl' keeps 8 outlier channels apart in heads of 9 to 256 channels, "
        r"got head_dim 8; choose outliers=0$",
    ):
        stored_format(Qjl(), "key", 8)
    with pytest.raises(ValueError, match=r"^codec 'qjl' takes whole bits, got 2.5; the nearest"):
        Config(codec="qjl", bits=2.5)
