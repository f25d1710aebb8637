"""TurboQuant: as good as its levels, through the real packed storage, and every bit counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squat_fx.codecs import Qjl, Squat, TurboQuant
from squat_fx.codecs.kivi import round_to_levels, value_range
from squat_fx.config import Config
from squat_fx.layouts import LAYOUTS
from squat_fx.layouts.hadamard import rotation
from squat_fx.state import QuantizedKV
from tests.conftest import left_padding, randn, stored_format

ROLES = ("key", "value")
SEEDS = st.integers(0, 2**16)
DISTORTION = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


def packed(codec: Any, x: Tensor, bits: Any, role: Any = "key") -> QuantizedKV:
    """Nothing of ``x`` stays exact."""
    fmt = stored_format(codec, role, x.shape[3], bits, residual_length=0, sink_length=0)
    return QuantizedKV.from_dense(x, fmt, role)


def error(codec: Any, x: Tensor, bits: Any, role: Any = "key") -> float:
    """Relative mean squared error."""
    restored = packed(codec, x, bits, role).dequantize()
    return ((restored - x).square().mean() / x.square().mean()).item()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", DISTORTION)
def test_gaussian_tokens_are_stored_as_well_as_the_levels_allow(role: str, bits: int) -> None:
    x = randn(1, 2, 2000, 128)
    assert error(TurboQuant(False), x, bits, role) == pytest.approx(DISTORTION[bits], rel=0.03)


@pytest.mark.parametrize("bits", DISTORTION)
def test_outlier_channels_cost_nothing(bits: int) -> None:
    """A token has the same error however uneven its channels are."""
    x = randn(1, 2, 2000, 128)
    x[..., ::32] *= 20
    assert error(TurboQuant(False), x, bits) < 1.05 * DISTORTION[bits]


@pytest.mark.parametrize(
    ("head_dim", "bits"),
    [*((64, bits) for bits in (1, 2, 3)), *((128, bits) for bits in DISTORTION)],
)
def test_it_is_no_worse_than_min_max_rounding_after_the_same_rotation(
    head_dim: int, bits: int
) -> None:
    """Which stores two numbers a token; with few channels for them it wins at 4 bits."""
    x = randn(1, 1, 2000, head_dim)
    groups = (x @ rotation(head_dim)).reshape(1, 1, 2000, 1, 1, head_dim)  # a group is a token
    codes, scale, zero = round_to_levels(groups, *value_range(groups, None), bits)
    uniform = ((codes * scale.float() + zero.float()) - groups).square().mean()
    uniform = (uniform / x.square().mean()).item()
    assert error(TurboQuant(), x, bits) <= uniform
    assert error(TurboQuant(False), x, bits) <= uniform


def test_it_is_much_better_than_a_sign_sketch_of_as_many_bits() -> None:
    x = randn(1, 1, 2000, 128)
    codecs = TurboQuant(), Qjl(outliers=0)
    formats = [stored_format(codec, "key", 128) for codec in codecs]
    assert [fmt.packed_bits_per_element() for fmt in formats] == [2.125, 2.125]
    ours, sketch = (error(codec, x, 2) for codec in codecs)
    assert sketch > 2 * ours


def test_the_norm_correction_gives_keys_their_norm() -> None:
    x = randn(1, 2, 500, 128)
    for correct in (True, False):
        restored = packed(TurboQuant(correct), x, 2).dequantize()
        ratio = restored.norm(dim=-1) / x.norm(dim=-1)
        if correct:
            torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-3, atol=0)
        else:
            assert ratio.mean().item() == pytest.approx((1 - DISTORTION[2]) ** 0.5, rel=0.01)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 2.5])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_the_bits_are_those_that_are_there(role: Any, bits: float, head_dim: int) -> None:
    if bits * head_dim % 16:
        pytest.skip("no such widths")
    tokens = 96
    handle = packed(TurboQuant(), randn(1, 2, tokens, head_dim), bits, role)
    fmt = handle.format
    assert fmt.packed_names == ("qdata", "scale")
    arenas = [handle._storage[name][:, :, :tokens] for name in fmt.packed_names]
    counted = 8 * sum(a.numel() * a.element_size() for a in arenas) / (2 * tokens * head_dim)
    assert counted == fmt.packed_bits_per_element() == pytest.approx(bits + 16 / head_dim)


@given(pads=st.lists(st.integers(0, 40), min_size=1, max_size=3), seed=SEEDS,
       garbage=st.sampled_from([0.0, 6e4, torch.inf, torch.nan]))  # fmt: skip
def test_padding_and_other_rows_touch_no_token(pads: list[int], seed: int, garbage: float) -> None:
    x, fmt = randn(len(pads), 2, 40, 64, seed=seed), stored_format(TurboQuant(), "key", 64)
    valid = left_padding(pads, 40)
    shown = x.masked_fill(~valid[:, None, :, None], garbage)
    together = QuantizedKV.from_dense(shown, fmt, "key", valid).dequantize()
    for row, first in enumerate(pads):
        if first < 40:
            alone = QuantizedKV.from_dense(x[row : row + 1, :, first:], fmt, "key").dequantize()
            torch.testing.assert_close(together[row : row + 1, :, first:], alone)


def test_padding_in_the_middle_is_stored_as_zeros() -> None:
    x, valid = randn(1, 2, 40, 64), torch.ones(1, 40, dtype=torch.bool)
    valid[:, 10:20] = False
    fmt, layout = stored_format(TurboQuant(), "key", 64), LAYOUTS["levels/token"]
    shown = x.masked_fill(~valid[:, None, :, None], torch.nan)
    found = layout.quantize(shown, valid, fmt, TurboQuant(), {})
    restored = layout.dequantize(found, fmt, {})
    assert not restored[:, :, 10:20].any()
    alone = layout.dequantize(layout.quantize(x, None, fmt, TurboQuant(), {}), fmt, {})
    assert torch.equal(restored[:, :, 20:], alone[:, :, 20:])


@pytest.mark.parametrize("codec", [TurboQuant(), TurboQuant(False), Squat()], ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -3e4, 6e4, 1e12, 3e38])
def test_constant_zero_and_huge_tokens_stay_finite(codec: Any, value: float) -> None:
    if isinstance(codec, Squat) and value > 1e30:
        pytest.skip("sums of its rotation overflow")
    restored = packed(codec, torch.full((1, 1, 40, 64), value), 2).dequantize()
    assert restored.isfinite().all()
    if not value and isinstance(codec, TurboQuant):
        assert not restored.any()


def test_bad_fields_and_bits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^norm_correction must be True or False, got 'no'; "):
        TurboQuant("no")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^codec 'turboquant' has levels for 1 to 4 bits, got 8;"):
        Config(codec="turboquant", bits=8)
    with pytest.raises(ValueError, match=r"levels for 1 to 4 bits, got 5; the nearest is 4$"):
        stored_format(TurboQuant(), "key", 64, 5)
    with pytest.raises(ValueError, match=r"cannot average 2.3 bits; the nearest are 2.25 and 2.5$"):
        stored_format(TurboQuant(), "key", 64, 2.3)
