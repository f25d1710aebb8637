"""How numbers become bits. One codec is one file and one row of ``CODECS``."""

from __future__ import annotations

import dataclasses
import difflib
import json
from functools import lru_cache

from squat_fx.codecs.base import (
    Codec,
    Fit,
    PerChannel,
    PerToken,
    Role,
    make_format,
)
from squat_fx.codecs.kivi import Kivi
from squat_fx.codecs.kvarn import Kvarn
from squat_fx.codecs.none import Lossless
from squat_fx.codecs.polar import Polar
from squat_fx.codecs.polar_rope import PolarRope
from squat_fx.codecs.pruned import Pruned
from squat_fx.codecs.qjl import Qjl
from squat_fx.codecs.squat import Squat
from squat_fx.codecs.squat_paper import SquatPaper
from squat_fx.codecs.svdq import Svdq
from squat_fx.codecs.think import Think
from squat_fx.codecs.turboquant import TurboQuant
from squat_fx.layouts import Format

CODECS: dict[str, type[Codec]] = {
    Squat.name: Squat,
    SquatPaper.name: SquatPaper,
    Kivi.name: Kivi,
    Kvarn.name: Kvarn,
    Think.name: Think,
    Polar.name: Polar,
    PolarRope.name: PolarRope,
    TurboQuant.name: TurboQuant,
    Qjl.name: Qjl,
    Svdq.name: Svdq,
    Pruned.name: Pruned,
    Lossless.name: Lossless,
}

__all__ = [
    "CODECS",
    "Codec",
    "Fit",
    "Format",
    "Kivi",
    "Kvarn",
    "Lossless",
    "PerChannel",
    "PerToken",
    "Polar",
    "PolarRope",
    "Pruned",
    "Qjl",
    "Role",
    "Squat",
    "SquatPaper",
    "Svdq",
    "Think",
    "TurboQuant",
    "codec_class",
    "codec_from_spec",
    "codec_spec",
    "list_codecs",
    "make_format",
    "register",
]


def list_codecs() -> tuple[str, ...]:
    """Names of the codecs that ``compile(codec=...)`` takes."""
    return tuple(CODECS)


def register(codec: type[Codec]) -> type[Codec]:
    """Add a codec class to the table under its ``name``; usable as a decorator.

    Raises:
        ValueError: another class already has that name.
    """
    if CODECS.setdefault(codec.name, codec) is not codec:
        raise ValueError(
            f"a codec named {codec.name!r} exists already: {CODECS[codec.name].__qualname__}"
        )
    return codec


def codec_class(name: str) -> type[Codec]:
    """The codec class called ``name``.

    Raises:
        ValueError: there is none; the message names the nearest one.
    """
    if name in CODECS:
        return CODECS[name]
    near = difflib.get_close_matches(name, CODECS, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown codec {name!r}, choose one of {', '.join(CODECS)}{hint}")


def codec_spec(codec: Codec) -> str:
    """``codec`` as one string, the form in which ops carry it: its name and its hyper-parameters as
    json; one that is a codec is a string itself.
    """
    own = {f.name: getattr(codec, f.name) for f in dataclasses.fields(codec)}  # pyright: ignore[reportArgumentType]
    return f"{codec.name} {json.dumps(own, sort_keys=True, default=codec_spec)}"


@lru_cache(maxsize=64)
def codec_from_spec(spec: str) -> Codec:
    """Undo :func:`codec_spec`; a bare name gives the codec with its defaults."""
    name, _, fields = spec.partition(" ")
    return codec_class(name)(**json.loads(fields or "{}"))
