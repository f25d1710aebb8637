"""What the user may ask for, checked once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from squat_fx.calibration import Calibration
from squat_fx.codecs import CODECS, Codec, Format, Lossless, codec_class, codec_spec, make_format

Inner = Literal["inductor", "aot_eager", "eager"]
Guard = Literal["off", "warn", "raise_bits"]
SMALLEST_WIDTH, LARGEST_WIDTH = 1, 8
DEFAULT_CODEC = "squat"
LARGEST_HEAD_DIM = 512
Width = float
LayerBits = Mapping[int, Width | tuple[Width, Width]] | tuple[tuple[int, tuple[Width, Width]], ...]


@dataclass(frozen=True)
class Config:
    """Options of :func:`squat_fx.compile`, frozen and validated.

    Attributes:
        bits: width of a code, for keys and values, from 1 to 8. A fraction is an average over the
            plane groups of 16 channels, where the codec allows it (``squat`` does) and the head has
            enough of them: 2.5 at head_dim 64 is 2, 2, 3 and 3 bits.
        codec: a name from :func:`squat_fx.list_codecs`, a codec instance, or None for the default.
        key_bits, value_bits: widths for one role; None takes ``bits``.
        residual_length: newest tokens kept exactly, at least.
        sink_length: first valid tokens of a row kept exactly.
        skip_layers: layers whose cache stays as it is; negative numbers count from the last
            attention of the graph.
        exact_layers: layers whose cache is packed like the others' but loses nothing.
        layer_bits: other widths for some layers, ``{layer: bits}`` or
            ``{layer: (key_bits, value_bits)}``; kept as sorted pairs.
        guard: what to do where what a prompt's newest queries find in packed tokens is further from
            what was there than ``guard_threshold``: ``"off"`` does not look, ``"warn"`` says so
            once for each layer, ``"raise_bits"`` stores the layer with more bits, this prompt and
            all later ones.
        guard_threshold: a share of the norm of what was there.
        calibration: from :func:`squat_fx.calibrate`, for codecs that take one (``squat`` does).
        inner: what compiles the rewritten graph.
        cuda_graphs: record static decode graphs as CUDA graphs, and replay them.
        share_layers: compile layers that are alike once, instead of the graph as a whole.
        strict: raise where an attention is left alone or a graph cannot be compiled, instead of
            running it as it was.

    Raises:
        ValueError: a value is outside what is allowed; the message says what is.
    """

    bits: Width = 2
    codec: str | Codec | None = None
    key_bits: Width | None = None
    value_bits: Width | None = None
    residual_length: int = 32
    sink_length: int = 4
    skip_layers: tuple[int, ...] = ()
    exact_layers: tuple[int, ...] = ()
    layer_bits: LayerBits = ()
    guard: Guard = "warn"
    guard_threshold: float = 0.65
    calibration: Calibration | None = None
    inner: Inner = "inductor"
    cuda_graphs: bool = False
    share_layers: bool = True
    strict: bool = False

    def __post_init__(self) -> None:
        for name in ("skip_layers", "exact_layers"):
            object.__setattr__(self, name, _layer_numbers(name, getattr(self, name)))
        object.__setattr__(self, "layer_bits", _widths_by_layer(self.layer_bits))
        for name in ("bits", "key_bits", "value_bits"):
            _check_width(name, getattr(self, name), optional=name != "bits")
        for name in ("residual_length", "sink_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} must be a number of tokens, 0 or more, got {value!r}")
        for name, choices in (("inner", get_args(Inner)), ("guard", get_args(Guard))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        threshold = self.guard_threshold
        if not isinstance(threshold, (int, float)) or not threshold > 0:
            raise ValueError(
                "guard_threshold must be a share of the norm of what attention finds, more than 0 "
                f"(the default is {Config.guard_threshold}), got {threshold!r}"
            )
        if isinstance(self.codec, str):
            codec_class(self.codec)
        elif self.codec is not None and not isinstance(self.codec, Codec):
            raise ValueError(f"codec must be a name or a codec instance, got {self.codec!r}")
        self._check_against_codec()

    def _check_against_codec(self) -> None:
        codec = self.resolved_codec
        widths = [self.bits, self.key_bits, self.value_bits]
        widths += [width for _, pair in self.layer_bits for width in pair]  # pyright: ignore
        for width in widths:
            if width is not None:
                codec.check_bits(width)
        if self.calibration is None:
            return
        if not isinstance(self.calibration, Calibration):
            raise ValueError(
                "calibration must come from squat_fx.calibrate() or Calibration.load(), "
                f"got {type(self.calibration).__name__}"
            )
        if not codec.takes_calibration:
            takers = ", ".join(name for name, c in CODECS.items() if c.takes_calibration)
            raise ValueError(
                f"codec {codec.name!r} takes no calibration; leave it out or choose {takers}"
            )

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Config:
        """A config from ``torch.compile(..., options=...)``.

        Raises:
            ValueError: an option is unknown; the message names the nearest one.
        """
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
                hint = f"; did you mean {near[0]!r}? Options" if near else "; options"
                raise ValueError(f"unknown option {name!r}{hint} are: {', '.join(known)}")
        return cls(**options)

    @cached_property
    def resolved_codec(self) -> Codec:
        """The codec as an instance."""
        if isinstance(self.codec, Codec):
            return self.codec
        return codec_class(self.codec or DEFAULT_CODEC)()

    def skips(self, layer: int, layers: int) -> bool:
        """Whether ``layer`` of ``layers`` stays as it is."""
        return layer in self.skip_layers or layer - layers in self.skip_layers

    def is_exact(self, layer: int, layers: int) -> bool:
        """Whether ``layer`` of ``layers`` loses nothing."""
        return layer in self.exact_layers or layer - layers in self.exact_layers

    def widths(self, layer: int) -> tuple[Width, Width]:
        """Bits of a key code and of a value code in ``layer``."""
        chosen: Any = dict(self.layer_bits).get(layer)  # pairs, since __post_init__
        if chosen is not None:
            return chosen
        return self.key_bits or self.bits, self.value_bits or self.bits

    def formats(
        self, layer: int, layers: int, heads: Any, key_dim: Any, value_dim: Any
    ) -> tuple[Format, Format] | str:
        """The stored formats of a layer's keys and values, or why the layer is left alone."""
        if self.skips(layer, layers):
            return "the layer is in skip_layers"
        for dim in (key_dim, value_dim):
            if not isinstance(dim, int) or not 1 <= dim <= LARGEST_HEAD_DIM:
                return f"head_dim {dim} is outside 1..{LARGEST_HEAD_DIM}"
        codec, (key_bits, value_bits) = self.resolved_codec, self.widths(layer)
        calibrated = self.calibration.layers.get(layer) if self.calibration else None
        if self.is_exact(layer, layers):
            codec, key_bits, value_bits, calibrated = Lossless(), 8, 8, None
        spec, exact = codec_spec(codec), (self.residual_length, self.sink_length)
        if calibrated and (misfit := calibrated.misfit(heads, key_dim)):
            return misfit
        try:
            key_widths = calibrated.widths(key_bits) if calibrated else key_bits
            return (
                make_format(codec, spec, "key", key_dim, key_widths, *exact, bool(calibrated)),
                make_format(codec, spec, "value", value_dim, value_bits, *exact),
            )
        except ValueError as error:
            return str(error)

    def basis(self, layer: int, fmt: Format, device: torch.device) -> Tensor | None:
        """The calibrated basis of a role of ``layer``, on ``device``, if its format is latent."""
        if not fmt.latent or self.calibration is None:
            return None
        return self.calibration.layers[layer].basis(device)


def _check_width(name: str, value: Any, optional: bool = False) -> None:
    if value is None and optional:
        return
    nearest = ""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if SMALLEST_WIDTH <= value <= LARGEST_WIDTH:
            return
        nearest = f"; the nearest is {SMALLEST_WIDTH if value < SMALLEST_WIDTH else LARGEST_WIDTH}"
    raise ValueError(
        f"{name} must be a number of bits from {SMALLEST_WIDTH} to {LARGEST_WIDTH}, "
        f"got {value!r}{nearest}"
    )


def _layer_numbers(name: str, layers: Any) -> tuple[int, ...]:
    if not isinstance(layers, (tuple, list, range, set, frozenset)) or any(
        type(layer) is not int for layer in layers
    ):
        raise ValueError(f"{name} must be a sequence of layer numbers, got {layers!r}")
    return tuple(layers)


def _widths_by_layer(layer_bits: Any) -> tuple[tuple[int, tuple[Width, Width]], ...]:
    """``{layer: bits or (key_bits, value_bits)}`` as sorted pairs, which hash and pickle."""
    chosen = {}
    for layer, widths in dict(layer_bits).items():
        if type(layer) is not int:
            raise ValueError(f"layer_bits maps layer numbers to bits, got the key {layer!r}")
        pair = tuple(widths) if isinstance(widths, (tuple, list)) else (widths, widths)
        if len(pair) != 2:
            raise ValueError(
                f"layer_bits[{layer}] must be bits or (key_bits, value_bits), got {widths!r}"
            )
        for width in pair:
            _check_width(f"layer_bits[{layer}]", width)
        chosen[layer] = pair
    return tuple(sorted(chosen.items()))
