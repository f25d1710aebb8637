"""PolarQuant for rotary keys: which bits go where; how it rounds is in
``tests/layouts/test_polar_pairs.py``.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squat_fx import QuantizedKV
from squat_fx.codecs import Kivi, PerChannel, PerToken, PolarRope, Role
from squat_fx.kernels import ops
from tests.conftest import randn, stored_format


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(
    ("bits", "radius_bits", "widths"),
    [(4, None, (4, 4)), (3, None, (3, 3)), (3, 2, (2, 4)), (3.5, None, (3, 4)), (2.5, 1, (1, 4))],
)
def test_bits_of_keys_are_those_of_the_bytes(
    bits: float, radius_bits: int | None, widths: tuple[int, int], group_size: int
) -> None:
    fmt = stored_format(PolarRope(group_size, radius_bits), "key", 128, bits, 0, 0)
    assert (fmt.layout, fmt.widths, fmt.token_group) == ("polar/pairs", widths, group_size)
    made = QuantizedKV.from_dense(randn(2, 2, 256, 128), fmt, "key")
    numbers = made._storage["qdata"][..., 0].numel() * 128
    counted = 8 * sum(made._storage[name].nbytes for name in fmt.packed_names)
    assert counted / numbers == bits + 32 / group_size == fmt.packed_bits_per_element()


@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
def test_values_are_rounded_as_in_kivi(head_dim: int) -> None:
    """In groups of 128 channels, by the kernels that do so for ``kivi``."""
    fmt = stored_format(PolarRope(32), "value", head_dim, 4)
    assert (fmt.layout, fmt.token_group) == ("planes/channel", 1)
    assert fmt.channel_group == min(head_dim, 128)
    assert PolarRope.quantize is Kivi.quantize
    assert PolarRope(64).granularity("value") == PerToken(128)
    assert PolarRope(64).granularity("key") == PerChannel(64)


@pytest.mark.parametrize("group_size", [0, 16, 48, 256])
def test_other_group_sizes_are_refused(group_size: int) -> None:
    with pytest.raises(ValueError, match=rf"^group_size must be 32, 64 or 128, got {group_size}$"):
        PolarRope(group_size)


@pytest.mark.parametrize("radius_bits", [0, 9, -1])
def test_other_radius_bits_are_refused(radius_bits: int) -> None:
    with pytest.raises(ValueError, match=r"^radius_bits must be from 1 to 8, or None for half"):
        PolarRope(radius_bits=radius_bits)


@pytest.mark.parametrize(
    ("codec", "role", "head_dim", "bits", "text"),
    [
        (PolarRope(), "key", 64, 3.3, "a radius and an angle cannot average 3.3 bits; "
         "the nearest are 3 and 3.5"),
        (PolarRope(), "value", 64, 3.5, "the layout 'planes/channel' gives all channels the same "
         "width, got 3.5 bits; the nearest are 3 and 4"),
        (PolarRope(), "key", 63, 3, "codec 'polar_rope' pairs the channels of keys, got head_dim "
         "63; choose another codec"),
        (PolarRope(radius_bits=8), "key", 64, 3, "codec 'polar_rope' with radius_bits=8 leaves an "
         "angle -2 bits at 3 bits, it takes 1 to 8; the nearest is 4.5"),
        (PolarRope(radius_bits=1), "key", 64, 8, "codec 'polar_rope' with radius_bits=1 leaves an "
         "angle 15 bits at 8 bits, it takes 1 to 8; the nearest is 4.5"),
    ],
)  # fmt: skip
def test_what_cannot_be_stored_is_refused_with_the_nearest(
    codec: PolarRope, role: Role, head_dim: int, bits: float, text: str
) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        stored_format(codec, role, head_dim, bits)


@given(seed=st.integers(0, 99), pads=st.integers(0, 40))
def test_a_padded_row_is_stored_as_if_it_were_alone(seed: int, pads: int) -> None:
    fmt = stored_format(PolarRope(32), "key", 40, 4, 0, 2)
    x = randn(2, 2, 110, 40, seed=seed)
    valid = torch.arange(110)[None] >= torch.tensor([[0], [pads]])
    store = ops.overload("store", fmt.layout)
    dirty = x.masked_fill(~valid[:, None, :, None], torch.nan)
    qdata, scale, zero_point, *_ = store(dirty, valid, None, None, "key", fmt.codec, fmt.to_ints())
    alone = store(x[1:, :, pads:], None, None, None, "key", fmt.codec, fmt.to_ints())
    tokens = (110 - pads - 2) // 32 * 32
    assert torch.equal(qdata[1:, :, :tokens], alone[0][:, :, :tokens])
    for found, expected in ((scale, alone[1]), (zero_point, alone[2])):
        assert torch.equal(found[1:, :, : tokens // 32], expected[:, :, : tokens // 32])
