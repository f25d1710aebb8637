"""What the user may ask for, and what the errors say to a tired person."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squat_fx.codecs import Kivi, Lossless, Squat, codec_spec, list_codecs
from squat_fx.config import Config

OPTIONS = (
    "bits, codec, key_bits, value_bits, residual_length, sink_length, skip_layers, exact_layers, "
    "layer_bits, guard, guard_threshold, calibration, inner, cuda_graphs, share_layers, strict"
)


def test_the_defaults_are_valid() -> None:
    config = Config()
    assert config.resolved_codec == Squat()
    assert config.widths(0) == (2, 2)


def test_it_is_frozen() -> None:
    config = Config(layer_bits={0: 4}, skip_layers=[1])  # pyright: ignore[reportArgumentType]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bits = 4  # pyright: ignore
    with pytest.raises(TypeError):
        config.layer_bits[0] = 8  # pyright: ignore
    assert config.skip_layers == (1,)


def test_the_callers_dict_is_not_shared() -> None:
    widths = {0: 4}
    config = Config(layer_bits=widths)
    widths[0] = 8
    assert config.widths(0) == (4, 4)


# errors -----------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bits 9": ({"bits": 9}, "bits must be a number of bits from 1 to 8, got 9; the nearest is 8"),
    "bits 16": (
        {"bits": 16},
        "bits must be a number of bits from 1 to 8, got 16; the nearest is 8",
    ),
    "bits 0": ({"bits": 0}, "bits must be a number of bits from 1 to 8, got 0; the nearest is 1"),
    "bits 0.5": (
        {"bits": 0.5},
        "bits must be a number of bits from 1 to 8, got 0.5; the nearest is 1",
    ),
    "bits as text": ({"bits": "2"}, "bits must be a number of bits from 1 to 8, got '2'"),
    "bits as truth": ({"bits": True}, "bits must be a number of bits from 1 to 8, got True"),
    "no bits": ({"bits": None}, "bits must be a number of bits from 1 to 8, got None"),
    "key_bits": (
        {"key_bits": -2},
        "key_bits must be a number of bits from 1 to 8, got -2; the nearest is 1",
    ),
    "value_bits": (
        {"value_bits": 8.5},
        "value_bits must be a number of bits from 1 to 8, got 8.5; the nearest is 8",
    ),
    "layer_bits": (
        {"layer_bits": {3: 9}},
        "layer_bits[3] must be a number of bits from 1 to 8, got 9; the nearest is 8",
    ),
    "layer_bits of one role": (
        {"layer_bits": {3: (2, 0)}},
        "layer_bits[3] must be a number of bits from 1 to 8, got 0; the nearest is 1",
    ),
    "layer_bits by name": (
        {"layer_bits": {"first": 2}},
        "layer_bits maps layer numbers to bits, got the key 'first'",
    ),
    "residual_length": (
        {"residual_length": -1},
        "residual_length must be a number of tokens, 0 or more, got -1",
    ),
    "residual_length of True": (
        {"residual_length": True},
        "residual_length must be a number of tokens, 0 or more, got True",
    ),
    "sink_length": (
        {"sink_length": 1.5},
        "sink_length must be a number of tokens, 0 or more, got 1.5",
    ),
    "skip_layers": (
        {"skip_layers": ("last",)},
        "skip_layers must be a sequence of layer numbers, got ('last',)",
    ),
    "exact_layers": (
        {"exact_layers": 3},
        "exact_layers must be a sequence of layer numbers, got 3",
    ),
    "guard": (
        {"guard": "raise"},
        "guard must be one of off, warn, raise_bits, got 'raise'",
    ),
    "guard_threshold": (
        {"guard_threshold": 0},
        "guard_threshold must be a share of the norm of what attention finds, more than 0 "
        "(the default is 0.65), got 0",
    ),
    "inner": (
        {"inner": "cudagraphs"},
        "inner must be one of inductor, aot_eager, eager, got 'cudagraphs'",
    ),
    "calibration": (
        {"calibration": object()},
        "calibration must come from squat_fx.calibrate() or Calibration.load(), got object",
    ),
    "fraction of a codec that has none": (
        {"codec": "kivi", "key_bits": 2.5},
        "codec 'kivi' takes whole bits, got 2.5; the nearest are 2 and 3",
    ),
    "fraction by layer": (
        {"codec": "none", "layer_bits": {3: (2, 1.5)}},
        "codec 'none' takes whole bits, got 1.5; the nearest are 1 and 2",
    ),
    "codec by name": (
        {"codec": "kiwi"},
        f"unknown codec 'kiwi', choose one of {', '.join(list_codecs())}; did you mean 'kivi'?",
    ),
    "codec as a number": ({"codec": 2}, "codec must be a name or a codec instance, got 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_and_why(name: str) -> None:
    options, text = REFUSED[name]
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        Config(**options)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("bit", "bits"),
        ("keybits", "key_bits"),
        ("residual", "residual_length"),
        ("sinks", "sink_length"),
        ("cudagraphs", "cuda_graphs"),
        ("skip_layer", "skip_layers"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match="unknown option") as error:
        Config.from_options({wrong: 1})
    assert str(error.value).startswith(f"unknown option {wrong!r}; did you mean {right!r}?")
    assert str(error.value).endswith(f"ptions are: {OPTIONS}")


def test_an_unknown_option_with_nothing_near_it_lists_the_options() -> None:
    with pytest.raises(ValueError, match="unknown option 'qqq'") as error:
        Config.from_options({"qqq": 1})
    assert "did you mean" not in str(error.value)
    assert str(error.value).endswith(f"ptions are: {OPTIONS}")


def test_options_are_the_fields() -> None:
    given_options = {"bits": 4, "codec": "none", "strict": True}
    assert Config.from_options(given_options) == Config(bits=4, codec="none", strict=True)


# which layer gets what --------------------------------------------------------------------------


WIDTHS = (1, 2, 2.5, 3, 4, 5.75, 8)


@given(
    bits=st.sampled_from(WIDTHS),
    key_bits=st.none() | st.sampled_from(WIDTHS),
    value_bits=st.none() | st.sampled_from(WIDTHS),
)
def test_a_role_takes_its_own_width_or_the_common_one(
    bits: float, key_bits: float | None, value_bits: float | None
) -> None:
    config = Config(bits=bits, key_bits=key_bits, value_bits=value_bits)
    assert config.widths(7) == (key_bits or bits, value_bits or bits)


def test_a_layer_may_have_its_own_widths() -> None:
    config = Config(bits=2, key_bits=3, layer_bits={0: 8, 5: (4, 1)})
    assert config.widths(0) == (8, 8)
    assert config.widths(5) == (4, 1)
    assert config.widths(1) == (3, 2)


def test_exact_layers_lose_nothing_whatever_the_codec() -> None:
    config = Config(codec="turboquant", exact_layers=(-1,))
    packed, exact = (config.formats(layer, 2, 2, 64, 64) for layer in (0, 1))
    assert [fmt.layout for fmt in packed] == ["levels/token"] * 2  # pyright: ignore
    assert [fmt.layout for fmt in exact] == ["dense"] * 2  # pyright: ignore


def test_skipped_layers_count_from_both_ends() -> None:
    config = Config(skip_layers=(0, -1))
    assert [config.skips(layer, 4) for layer in range(4)] == [True, False, False, True]


def test_the_formats_of_a_layer() -> None:
    config = Config(bits=2, value_bits=4, residual_length=16, sink_length=1, codec=Kivi(64))
    formats = config.formats(0, 2, 4, 128, 64)
    assert not isinstance(formats, str)
    key, value = formats
    assert (key.head_dim, key.widths, key.token_group) == (128, (2,) * 8, 64)
    assert (value.head_dim, value.widths, value.channel_group) == (64, (4,) * 4, 64)
    for fmt in formats:
        assert (fmt.residual_length, fmt.sink_length) == (16, 1)
        assert fmt.codec == codec_spec(Kivi(64))


def test_a_codec_by_name_has_its_defaults() -> None:
    assert Config(codec="none").resolved_codec == Lossless()


def test_a_skipped_layer_says_why() -> None:
    assert Config(skip_layers=(1,)).formats(1, 2, 4, 64, 64) == "the layer is in skip_layers"


@pytest.mark.parametrize("dim", [0, 513, "s0"])
def test_a_head_that_no_layout_takes_says_why(dim: Any) -> None:
    assert Config().formats(0, 1, 4, 64, dim) == f"head_dim {dim} is outside 1..512"
