"""The table of codecs, and what all of its rows have in common."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squat_fx.codecs import (
    CODECS,
    Codec,
    Format,
    Kivi,
    Kvarn,
    Lossless,
    Polar,
    PolarRope,
    Qjl,
    Squat,
    SquatPaper,
    Svdq,
    Think,
    TurboQuant,
    codec_class,
    codec_from_spec,
    codec_spec,
    list_codecs,
    make_format,
    register,
)
from tests.conftest import stored_format


def test_the_rows() -> None:
    assert list_codecs() == (
        *("squat", "squat_paper", "kivi", "kvarn", "think", "polar", "polar_rope"),
        *("turboquant", "qjl", "svdq", "pruned", "none"),
    )


@pytest.mark.parametrize("name", list_codecs())
def test_a_row_is_a_frozen_dataclass_with_defaults(name: str) -> None:
    codec = CODECS[name]()
    assert isinstance(codec, Codec)
    assert codec.name == name
    assert codec.summary
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(codec, dataclasses.fields(codec)[0].name, 64)  # pyright: ignore


@pytest.mark.parametrize(
    "codec",
    [
        *(Kivi(), Kivi(128), Lossless(), Lossless(4), Squat(0.5), SquatPaper(64, rank=5)),
        *(Kvarn(32), Think(64, ratio=0.5), Polar("online"), PolarRope(64, radius_bits=2)),
        *(TurboQuant(), TurboQuant(False), Qjl(), Qjl(128, 4, 64)),
        *(Svdq(), Svdq(64, "1.25"), Svdq(schedule=(4, 2, 0, 0), pre_rope=False)),
    ],
)
def test_a_spec_names_the_codec_and_its_hyper_parameters(codec: Codec) -> None:
    assert codec_from_spec(codec_spec(codec)) == codec


def test_a_bare_name_is_a_spec() -> None:
    assert codec_from_spec("kivi") == Kivi()


def test_an_unknown_codec_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ValueError,
        match=rf"^unknown codec 'kiwi', choose one of {', '.join(list_codecs())}; "
        r"did you mean 'kivi'\?$",
    ):
        codec_class("kiwi")


def test_an_unknown_codec_with_nothing_near_it_gets_no_hint() -> None:
    with pytest.raises(
        ValueError, match=rf"^unknown codec 'xyz', choose one of {', '.join(list_codecs())}$"
    ):
        codec_class("xyz")


def test_register_adds_a_row_and_refuses_a_second_of_the_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclasses.dataclass(frozen=True)
    class Mine(Lossless):
        name: ClassVar[str] = "mine"

    class AlsoMine(Mine):
        pass

    before = list_codecs()
    monkeypatch.setattr("squat_fx.codecs.CODECS", dict(CODECS))
    assert register(Mine) is Mine
    assert register(Mine) is Mine, "the same class again is no conflict"
    assert list_codecs() == (*before, "mine")
    assert codec_from_spec("mine") == Mine()
    with pytest.raises(ValueError, match=r"^a codec named 'mine' exists already: .*Mine$"):
        register(AlsoMine)


@given(
    head_dim=st.integers(1, 256),
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    group_size=st.sampled_from([32, 64, 128]),
    role=st.sampled_from(["key", "value"]),
    residual_length=st.integers(0, 64),
    sink_length=st.integers(0, 8),
)
def test_ints_carry_the_whole_format(
    head_dim: int, bits: int, group_size: int, role: str, residual_length: int, sink_length: int
) -> None:
    codec = Kivi(group_size)
    fmt = make_format(codec, codec_spec(codec), role, head_dim, bits, residual_length, sink_length)  # pyright: ignore
    assert Format.from_ints(fmt.layout, fmt.codec, fmt.to_ints()) == fmt


def test_the_format_of_kivi_keys() -> None:
    fmt = stored_format(Kivi(), "key", head_dim=64, residual_length=32, sink_length=4)
    assert (fmt.token_group, fmt.channel_group, fmt.channel_groups) == (32, 1, 64)
    assert fmt.arena_names == ("qdata", "scale", "zero_point", "dense", "start")
    assert (fmt.ring_length, fmt.dense_length) == (64, 68)
    assert [fmt.last_dim(name) for name in fmt.packed_names] == [16, 64, 64]
    assert [fmt.tokens_per_slot(name) for name in fmt.packed_names] == [1, 32, 32]
    assert fmt.packed_bits_per_element() == 3.0


def test_the_format_of_kivi_values() -> None:
    fmt = stored_format(Kivi(), "value", head_dim=80, residual_length=32, sink_length=4)
    assert (fmt.token_group, fmt.channel_group, fmt.channel_groups) == (1, 32, 3)
    assert (fmt.ring_length, fmt.dense_length) == (33, 37)
    assert fmt.packed_bits_per_element() == pytest.approx(2.0 + 3 * 32 / 80)


def test_a_group_of_channels_is_no_wider_than_the_head() -> None:
    fmt = stored_format(Kivi(128), "value", head_dim=64)
    assert (fmt.channel_group, fmt.channel_groups) == (64, 1)


def test_the_lossless_format_has_no_scales() -> None:
    fmt = stored_format(Lossless(), "key", head_dim=64)
    assert fmt.arena_names == ("qdata", "dense", "start")
    assert fmt.last_dim("qdata") == 64
    assert fmt.packed_bits_per_element() == 16.0


@pytest.mark.parametrize(
    ("head_dim", "bits", "stored"), [(64, 2, 2.25), (64, 3, 3.25), (128, 2, 2.125), (80, 2.2, 2.4)]
)
def test_the_format_of_squat(head_dim: int, bits: float, stored: float) -> None:
    key, value = (
        stored_format(Squat(), role, head_dim=head_dim, bits=bits) for role in ("key", "value")
    )
    assert key.arena_names == ("qdata", "scale", "affine", "basis", "dense", "start")
    assert key.stored_names == ("qdata", "scale", "affine", "dense", "start")
    assert (key.token_group, key.channel_groups) == (1, 1)
    assert (key.affine, value.affine) == (True, False)
    assert key.packed_bits_per_element() == pytest.approx(stored)


def test_widths_that_do_not_fit_are_refused_with_the_nearest() -> None:
    with pytest.raises(
        ValueError,
        match=r"^4 plane groups of head_dim 64 cannot average 2.3 bits; "
        r"the nearest are 2.25 and 2.5$",
    ):
        stored_format(Squat(), "key", head_dim=64, bits=2.3)
    with pytest.raises(ValueError, match=r"^the layout 'planes/channel' gives all channels the"):
        stored_format(Kivi(), "key", head_dim=64, bits=2.5)


def test_every_layout_names_its_arenas() -> None:
    codecs = [CODECS[name]() for name in list_codecs()]
    for codec in (*codecs, Polar("online")):
        fmt = stored_format(codec, "key", head_dim=64, bits=3.875 if codec.name == "polar" else 2)
        assert Format.from_ints(fmt.layout, fmt.codec, fmt.to_ints()) == fmt
