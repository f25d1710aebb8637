"""The caches that are compared: our codecs, and those of transformers where they are installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torch import Tensor
from transformers import DynamicCache, QuantizedCache, cache_utils

import squat_fx
from squat_fx.codecs import Codec, codec_class, codec_from_spec

MakeCache = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """A cache by name; ``prepare`` readies a fresh model for it and says how to make one.

    One that is ``optional`` may raise ``ValueError`` where it does not know the model; one that
    ``packs`` must leave something packed.
    """

    name: str
    prepare: Callable[[Any], MakeCache]
    optional: bool = False
    packs: bool = False


def new_cache(model: Any) -> DynamicCache:
    """The cache that ``generate()`` would make."""
    return DynamicCache(config=model.config)


def full() -> Setting:
    """The untouched model; the others are compared with it."""
    return Setting("full", _caches_of)


def _caches_of(model: Any) -> MakeCache:
    return lambda: new_cache(model)


class Calibrated:
    """A calibration on some tokens, made once for all settings that want it."""

    def __init__(self, ids: Tensor) -> None:
        self._ids = ids
        self._found: squat_fx.Calibration | None = None

    def of(self, model: Any) -> squat_fx.Calibration:
        """That of a model; the model must always be the same."""
        if self._found is None:
            self._found = squat_fx.calibrate(model, self._ids)
        return self._found


def packed(name: str, calibrated: Calibrated | None = None, **options: Any) -> Setting:
    """``squat_fx.compile(model, **options)``, calibrated on some tokens if there are any."""
    return Setting(name, partial(_compiled, calibrated, options), packs=True)


def _compiled(calibrated: Calibrated | None, options: dict[str, Any], model: Any) -> MakeCache:
    calibration: dict[str, Any] = {}
    if calibrated is not None:
        calibration["calibration"] = calibrated.of(model)
    squat_fx.compile(model, **options, **calibration)
    return _caches_of(model)


def of_transformers(name: str, backend: str, **options: Any) -> Setting:
    """A ``QuantizedCache`` of transformers."""
    return Setting(name, partial(_quantized_caches, backend, options), optional=True)


def _quantized_caches(backend: str, options: dict[str, Any], model: Any) -> MakeCache:
    return lambda: QuantizedCache(backend, model.config, **options)


def parse_codec(text: str) -> tuple[str, Codec]:
    """``name`` or ``name {"field": value}``, as it is shown and what it means.

    Raises:
        ValueError: there is no such codec, or it has no such field; the message says which it has.
    """
    try:
        return text, codec_from_spec(text)
    except TypeError as error:
        found: Any = codec_class(text.split(" ")[0])
        known = ", ".join(f.name for f in fields(found)) or "none"
        raise ValueError(f"{error}; its fields are: {known}") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"after the name of a codec come its fields as json, got {text!r}"
        ) from error


def parse_bits(text: str) -> dict[str, Any]:
    """``2``, or ``3/2`` for keys and values, as options of ``compile``.

    Raises:
        ValueError: the text is something else.
    """
    try:
        numbers = [float(part) for part in text.split("/")]
        if len(numbers) > 2:
            raise ValueError
    except ValueError:
        raise ValueError(f"bits are a number, or keys/values as 3/2; got {text!r}") from None
    whole = [int(n) if n == int(n) else n for n in numbers]
    return (
        {"bits": whole[-1]} if len(whole) == 1 else {"key_bits": whole[0], "value_bits": whole[1]}
    )


def ours(
    codecs: Sequence[str],
    bits: Sequence[str],
    calibration_ids: Tensor | None = None,
    **options: Any,
) -> list[Setting]:
    """Every codec at every width, and calibrated too if it can be; ``none`` has no widths.

    A codec may name widths of its own: ``polar at 3.875``.

    Raises:
        ValueError: a codec or a width is unknown, or the codec has no such width.
    """
    found: list[Setting] = []
    calibrated = None if calibration_ids is None else Calibrated(calibration_ids)
    for text in codecs:
        text, _, own = text.partition(" at ")
        label, codec = parse_codec(text)
        for width in ["16"] if codec.name == "none" else [own] if own else bits:
            chosen: dict[str, Any] = {} if codec.name == "none" else parse_bits(width)
            name = label if codec.name == "none" else f"{label}, {width} bits"
            squat_fx.Config(codec=codec, **chosen, **options)  # refuses what there is not
            found.append(packed(name, codec=codec, **chosen, **options))
            if calibrated is not None and codec.takes_calibration:
                name = f"{name}, calibrated"
                found.append(packed(name, calibrated, codec=codec, **chosen, **options))
    return found


def peers(bits: int, residual_length: int) -> list[Setting]:
    """Quantized caches of transformers whose packages are installed, and its 8-bit floats."""
    found = []
    if hasattr(cache_utils, "Fp8QuantizedLayer"):
        found.append(of_transformers("transformers fp8", "fp8"))
    for package, backend, keys in (("optimum.quanto", "quanto", -1), ("hqq", "hqq", 1)):
        if not _is_installed(package):
            continue
        name = f"transformers {backend}, {bits} bits"
        found.append(of_transformers(name, backend, nbits=bits))
        options = {"axis_key": keys, "q_group_size": 32, "residual_length": residual_length}
        name += ", per-channel keys"
        found.append(of_transformers(name, backend, nbits=bits, **options))
    return found


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False
