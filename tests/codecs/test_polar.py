"""PolarQuant: as many bits as it says, errors as in theory, a codebook of the prompt's own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squat_fx import Config, QuantizedKV
from squat_fx.codecs import Codec, Format, Polar, Role
from squat_fx.codecs.polar import SMALLEST_PROMPT
from squat_fx.kernels import ops, reference
from squat_fx.kernels.reference import Extent
from squat_fx.layouts.polar_token import WIDTHS
from squat_fx.layouts.polar_tree import angles_of, codebooks
from tests.conftest import left_padding, randn, stored_format

SEEDS = st.integers(0, 2**16)
BITS = sorted(WIDTHS)
CODEBOOKS = ("offline", "online")


def format_of(codebook: str = "offline", bits: float = 3.875, **sizes: int) -> Format:
    sizes = {"head_dim": 64, "residual_length": 0, "sink_length": 0} | sizes
    return stored_format(Polar(codebook), "key", bits=bits, **sizes)  # pyright: ignore


def stored(x: Tensor, fmt: Format, valid: Tensor | None = None) -> dict[str, Tensor]:
    """What the op ``store`` makes of a prompt."""
    store = ops.overload("store", fmt.layout)
    made = store(x, valid, None, None, "key", fmt.codec, fmt.to_ints())
    return dict(zip(fmt.stored_names, made, strict=True))


def relative_error(x: Tensor, fmt: Format) -> float:
    """Mean squared error of a prompt that was stored, over its mean square."""
    made = stored(x, fmt)
    arenas = reference.Arenas.of(fmt, [made[name] for name in fmt.arena_names])
    past = reference.dense_past(arenas, Extent(0, 0).after(x.shape[2], fmt), fmt)
    return ((past - x).square().mean() / x.square().mean()).item()


# bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_bits_are_those_of_the_bytes(head_dim: int, bits: float, role: Role, codebook: str) -> None:
    fmt = stored_format(Polar(codebook), role, head_dim, bits, 0, 0)  # pyright: ignore
    x = randn(2, 3, 32, head_dim)
    made = QuantizedKV.from_dense(x, fmt, role)
    counted = sum(made._storage[name].nbytes for name in fmt.packed_names)
    tokens = made._storage["qdata"].shape[2] * 2 * 3
    assert 8 * counted == bits * tokens * head_dim
    assert fmt.packed_bits_per_element() == bits == fmt.bits


@pytest.mark.parametrize(
    ("head_dim", "stored_bits"),
    [(16, (6 * 8 + 16) / 16), (80, (29 * 8 + 5 * 16) / 80), (24, (12 * 8 + 2 * 16) / 24)],
)
def test_what_does_not_fill_a_byte_or_a_block_is_counted(head_dim: int, stored_bits: float) -> None:
    assert format_of(head_dim=head_dim).packed_bits_per_element() == pytest.approx(stored_bits)


def test_bits_of_other_schedules_are_refused_with_the_nearest() -> None:
    text = (
        r"^the layout 'polar/token' takes 3.375, 3.875 or 4.25 bits a number, its radius among "
        r"them, got 2; the nearest is 3.375$"
    )
    with pytest.raises(ValueError, match=text):
        format_of(bits=2)
    with pytest.raises(ValueError, match=text):
        Config(codec="polar")
    assert Config(codec="polar", bits=3.875).resolved_codec == Polar()


def test_another_codebook_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"^codebook must be 'offline', the same for everything, or 'online', of each prompt, "
        r"got 'mine'$",
    ):
        Polar("mine")  # pyright: ignore[reportArgumentType]


def test_codebooks_have_an_arena() -> None:
    fmt = format_of()
    assert fmt.arena_names == ("qdata", "radius", "codebook", "dense", "start")
    assert stored(randn(2, 3, 8, 64), fmt)["codebook"].shape == (2, 3, 2, 16 + 4 + 4 + 4)


# errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize(("bits", "error"), [(3.375, 0.070), (3.875, 0.0320), (4.25, 0.0205)])
def test_gaussian_tokens_are_rounded_as_well_as_theory_has_it(
    bits: float, error: float, codebook: str
) -> None:
    fmt = format_of(codebook, bits, head_dim=128)
    assert relative_error(randn(1, 2, 1000, 128), fmt) == pytest.approx(error, rel=0.03)


def test_the_rotation_takes_outliers_out() -> None:
    x = randn(1, 2, 500, 128)
    x[..., 5] *= 40
    assert relative_error(x, format_of(head_dim=128)) == pytest.approx(0.0320, rel=0.2)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("value", [0.0, 1.0, -1e4])
def test_a_constant_prompt_keeps_its_length(codebook: str, value: float) -> None:
    x, fmt = torch.full((1, 1, 40, 64), value), format_of(codebook)
    made = QuantizedKV.from_dense(x, fmt, "key").dequantize()
    torch.testing.assert_close(made.norm(dim=-1), x.norm(dim=-1), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("size", [1e9, 1e25, 3e38])
def test_huge_numbers_stay_finite(codebook: str, size: float) -> None:
    x, fmt = randn(1, 1, 40, 64).clamp(-1, 1) * size, format_of(codebook)
    made = stored(x, fmt)
    assert made["radius"].isfinite().all()
    if codebook == "online":
        assert made["codebook"].isfinite().all()
    assert QuantizedKV.from_dense(x, fmt, "key").dequantize().isfinite().all()


# the codebook of a prompt -----------------------------------------------------------------------


def lopsided(*shape: int, seed: int = 0) -> Tensor:
    """Tokens whose rotated numbers do not look like a Gaussian's: few channels at a time."""
    x = randn(*shape, seed=seed)
    return x * (randn(*shape[:-1], 1, seed=seed + 1).abs() + 0.1) * (x.abs() > 1.6)


def test_codebooks_of_the_prompt_err_less_on_it() -> None:
    x = lopsided(1, 2, 400, 64)
    assert relative_error(x, format_of("online")) < relative_error(x, format_of())


@given(seed=SEEDS, tokens=st.sampled_from([40, 64]), sinks=st.sampled_from([0, 4]),
       garbage=st.sampled_from([0.0, 1e4, torch.inf, torch.nan]))  # fmt: skip
def test_padding_never_touches_a_token_or_a_codebook(
    seed: int, tokens: int, sinks: int, garbage: float
) -> None:
    """And a row is stored as if it were alone."""
    fmt, x = format_of("online", sink_length=sinks), lopsided(2, 2, tokens + 9, 64, seed=seed)
    valid = left_padding([0, 9], tokens + 9)
    made = stored(x.masked_fill(~valid[:, None, :, None], garbage), fmt, valid)
    alone = stored(x[1:, :, 9:], fmt)
    assert torch.equal(made["codebook"][1:], alone["codebook"])
    for name in fmt.packed_names:
        count = tokens - sinks
        assert alone[name].shape[2] >= count
        same = made[name][1:, :, :count] == alone[name][:, :, :count]
        assert same.float().mean() > 0.99  # a product in another order may round another way


def test_codebooks_of_different_heads_differ_and_are_of_ascending_angles() -> None:
    fmt = format_of("online")
    x = torch.cat([randn(1, 1, 300, 64), lopsided(1, 1, 300, 64)], 1)
    books = angles_of(*stored(x, fmt)["codebook"].float().unbind(2), fmt.widths)
    assert (books[0, 0] - books[0, 1]).abs().max() > 0.02
    for book in books.split([2**b for b in fmt.widths], -1):
        assert (book.diff(dim=-1) > 0).all()


def test_little_is_nothing_to_learn_from() -> None:
    fmt = format_of("online")
    few = stored(lopsided(1, 2, SMALLEST_PROMPT - 1, 64), fmt)["codebook"]
    books = angles_of(*few.float().unbind(2), fmt.widths)
    torch.testing.assert_close(
        books, codebooks(fmt.widths, few.device).expand_as(books), rtol=0, atol=1e-3
    )
    more = stored(lopsided(1, 2, SMALLEST_PROMPT, 64), fmt)["codebook"]
    assert not torch.equal(more, few)


@pytest.mark.parametrize("codec", [Polar(), Polar("online")], ids=lambda c: c.codebook)
def test_keys_and_values_are_treated_the_same(codec: Codec) -> None:
    formats = [stored_format(codec, role, 64, 3.875) for role in ("key", "value")]
    assert formats[0] == formats[1]
    assert math.isclose(formats[0].bits, 3.875)
