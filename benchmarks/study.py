"""What the default codec should be: variants of ``squat``, one thing changed at a time.

    python benchmarks/study.py --text book_pride_and_prejudice.txt \\
        --calibration-text essays_federalist_papers.txt --prompt 1024 --prompt 128 --device cuda

Every variant (:mod:`variants`) is scored on the same windows, teacher-forced, in one pass
(:mod:`simulation`), and compared with ``squat`` as it is, window by window: the ratio of the mean
KLs and, since windows differ far more than variants do, how many standard errors the mean of the
differences of the logarithms is away from zero. ``kivi`` is there twice, by the arithmetic of
squat_fx and written apart from it. A text whose name begins with ``+`` gives its second half, so
that its first half can be calibrated on.

Parameters are chosen on some texts and reported on others; which is which is for the caller to say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from common import command, load_model, model_folder, text_record, write_result
from rich.console import Console
from rich.table import Table
from simulation import OfConfig, PlainKivi, Rounding, Simulation, Site, formats_of
from torch import Tensor
from variants import Statistics, Variant

import squat_fx
from squat_fx.bench.record import device_name, versions
from squat_fx.calibrate import FIRST
from squat_fx.calibration import QUERY_WEIGHT, Fingerprint
from squat_fx.codecs import Kivi, SquatPaper
from squat_fx.evaluate import together
from squat_fx.evaluate.measure import Scores, records_by_text, score
from squat_fx.evaluate.numbers import standard_error
from squat_fx.evaluate.settings import parse_bits, parse_codec
from squat_fx.evaluate.tasks import Answers, Case, Needles
from squat_fx.evaluate.texts import Windows, encoder, leading_tokens, text_tokens
from squat_fx.layouts import kept as kept_layout

BASE = "squat"
FULL = "full"
SCORES = 2**27  # of a head, that go through together: prompts may be scored at once
ANSWER = 64  # tokens of an answer that count


def _calibrated(
    weight: float = QUERY_WEIGHT,
    joint: bool = False,
    inner: bool = True,
    first: int = FIRST,
    usual: bool = False,
    **options: Any,
) -> Callable[[Statistics], Variant]:
    def build(statistics: Statistics) -> Variant:
        found = {"calibration": statistics.calibration(weight, joint, inner, first)}
        if usual:
            found["usual"] = statistics.usual(first)
        return Variant(**found, **options)

    return build


def _mended(weight: float = 0.5, joint: bool = False, first: int = 0, **options: Any) -> Any:
    """Around what a calibration was before: half weighed by queries, all tokens, and the strongest
    channels first.
    """
    chosen = {"mend_mixed": "weighed", "falling": True, **options}
    return _calibrated(weight, joint, first=first, **chosen)


Build = Rounding | Callable[[Statistics], Rounding]

VARIANTS: dict[str, Build] = {
    BASE: Variant(),
    "kivi G=32": OfConfig(squat_fx.Config(codec=Kivi(32))),
    "kivi G=32, written apart": PlainKivi(),
    "kivi G=128": OfConfig(squat_fx.Config(codec=Kivi(128))),
    "calibrated": _calibrated(),
    "calibrated, before": _mended(mend_mixed=""),
    "calibrated, scales not mended": _calibrated(mend_mixed=""),
    "calibrated, first tokens too": _calibrated(first=0),
    "calibrated, strongest first": _calibrated(falling=True),
    "calibrated, factors for what is unusual": _calibrated(usual=True),
    "calibrated, at least 1 bit": _calibrated(least_width=1),
    "calibrated, channels of a width balanced": _calibrated(balanced=True),
    "calibrated, the keys' identity": _calibrated(plain_metric=True),
    "calibrated, w 0.125": _calibrated(0.125),
    "calibrated, w 0.5": _calibrated(0.5),
    # scale and levels
    "before: reach 0.75, scales not mended": Variant(reach=(0.75, 1.0), norm="", value_norm=""),
    "scale of keys not mended": Variant(norm=""),
    "scale of keys of least squares": Variant(norm="fit"),
    "unbiased scale of keys": Variant(norm="unbiased"),
    "scale of values not mended": Variant(value_norm=""),
    "scale of values of least squares": Variant(value_norm="fit"),
    "values as long as they were": Variant(value_norm="norm"),
    "scale searched": Variant(norm="search"),
    "scale searched with the queries' metric": Variant(norm="search", weighted_search=True),
    "levels reach 0.5": Variant(reach=(0.5, 1.0)),
    "levels reach 0.75": Variant(reach=(0.75, 1.0)),
    "levels reach 1": Variant(reach=(1.0, 1.0)),
    "levels stretched by 0.9": Variant(stretch=0.9),
    "levels stretched by 1.1": Variant(stretch=1.1),
    "levels stretched by 1.2": Variant(stretch=1.2),
    "Lloyd-Max levels": Variant(uniform=False),
    "3 bits": Variant(key_bits=3, value_bits=3),
    "3 bits, levels reach 1": Variant(key_bits=3, value_bits=3, reach=(0.0, 1.0)),
    "3 bits, levels reach 0.6": Variant(key_bits=3, value_bits=3, reach=(0.0, 0.6)),
    "3 bits, levels reach 0.8": Variant(key_bits=3, value_bits=3, reach=(0.0, 0.8)),
    "3 bits, scales not mended": Variant(key_bits=3, value_bits=3, norm="", value_norm=""),
    "3 bits, unbiased scale": Variant(key_bits=3, value_bits=3, norm="unbiased"),
    "3 bits, Lloyd-Max levels": Variant(key_bits=3, value_bits=3, uniform=False),
    "kivi G=32, 3 bits": OfConfig(squat_fx.Config(codec=Kivi(32), bits=3)),
    "kivi G=128, 3 bits": OfConfig(squat_fx.Config(codec=Kivi(128), bits=3)),
    "4 bits": Variant(key_bits=4, value_bits=4),
    "4 bits, levels reach 0": Variant(key_bits=4, value_bits=4, reach=(0.0, 0.0)),
    "4 bits, levels reach 0.6": Variant(key_bits=4, value_bits=4, reach=(0.0, 0.6)),
    "4 bits, levels reach 0.8": Variant(key_bits=4, value_bits=4, reach=(0.0, 0.8)),
    "4 bits, scales not mended": Variant(key_bits=4, value_bits=4, norm="", value_norm=""),
    "4 bits, unbiased scale": Variant(key_bits=4, value_bits=4, norm="unbiased"),
    "4 bits, Lloyd-Max levels": Variant(key_bits=4, value_bits=4, uniform=False),
    "4 bits, lambda' 10": Variant(key_bits=4, value_bits=4, strength=10.0),
    "4 bits, blocks of 4": Variant(key_bits=4, value_bits=4, block=4),
    "4 bits, feedback for appended tokens": Variant(key_bits=4, value_bits=4, appended=True),
    "4 bits, 64 sinks": Variant(key_bits=4, value_bits=4, sinks=64),
    "K5 V4": Variant(key_bits=5, value_bits=4),
    "kivi G=32, 4 bits": OfConfig(squat_fx.Config(codec=Kivi(32), bits=4)),
    "kivi G=128, 4 bits": OfConfig(squat_fx.Config(codec=Kivi(128), bits=4)),
    # feedback
    "lambda' 0": Variant(strength=0.0),
    "lambda' 0.3": Variant(strength=0.3),
    "lambda' 2": Variant(strength=2.0),
    "lambda' 4": Variant(strength=4.0),
    "lambda' 10": Variant(strength=10.0),
    "lambda' 100": Variant(strength=100.0),
    "blocks of 4": Variant(block=4),
    "blocks of 8": Variant(block=8),
    "blocks of 32": Variant(block=32),
    "rank 4": Variant(rank=4),
    "rank 16": Variant(rank=16),
    "feedback for appended tokens": Variant(appended=True),
    "queries of the last 256 tokens": Variant(newest=256),
    "queries of the last 64 tokens": Variant(newest=64),
    # frame
    "no mean": Variant(center=False),
    "0.9 of the mean": Variant(center=0.9),
    "mean with the first tokens": Variant(center_sinks=True),
    "mean of values too": Variant(center_values=True),
    "no factors": Variant(smooth=0.0),
    "factors, exponent 1/8": Variant(smooth=0.125),
    "factors, exponent 3/16": Variant(smooth=0.1875),
    "factors, exponent 3/8": Variant(smooth=0.375),
    "factors, exponent 1/2": Variant(smooth=0.5),
    "factors of any size": Variant(power_of_two=False),
    "rotated 16 channels at a time": Variant(rotate=16),
    "not rotated": Variant(rotate=1),
    "trusted by half at 32 tokens": Variant(shrink=32),
    "trusted by half at 128 tokens": Variant(shrink=128),
    # values
    "factors of values": Variant(smooth_values=True),
    "feedback for values 1": Variant(value_strength=1.0),
    "feedback for values 4": Variant(value_strength=4.0),
    # calibration
    "calibrated, w 0": _calibrated(0.0),
    "calibrated, w 0.75": _calibrated(0.75),
    "calibrated, w 1": _calibrated(1.0),
    "calibrated, one basis for all heads": _calibrated(joint=True),
    "calibrated, no rotation inside": _calibrated(inner=False),
    "calibrated, no feedback": _calibrated(strength=0.0),
    "calibrated, lambda' 4": _calibrated(strength=4.0),
    "calibrated, w 0, lambda' 4": _calibrated(0.0, strength=4.0),
    "calibrated, factors before it": _calibrated(smooth_latent=True),
    "calibrated, levels reach 0": _calibrated(reach=(0.0, 0.0)),
    "calibrated, levels reach 0.75 and 1": _calibrated(reach=(0.75, 1.0)),
    "calibrated, levels reach 0.6": _calibrated(reach=(0.6, 0.6)),
    "calibrated, scales mended": _mended(),
    "calibrated, mended, no sinks": _mended(first=4),
    "calibrated, mended, no sinks, w 0.75": _mended(0.75, first=4),
    "calibrated, mended, no sinks, reach 0.5 and 1": _mended(first=4, reach=(0.5, 1.0)),
    "calibrated, mended, no sinks, 4 bits": _mended(first=4, key_bits=4, value_bits=4),
    "calibrated, mended by all channels": _mended(mend_mixed="all"),
    "calibrated, mended by stored channels": _mended(mend_mixed="stored"),
    "calibrated, mended, levels of each width stretched": _mended(gain=True),
    "calibrated, mended, reach 0": _mended(reach=(0.0, 0.0)),
    "calibrated, mended, reach 0 and 1": _mended(reach=(0.0, 1.0)),
    "calibrated, mended, reach 0.5 and 1": _mended(reach=(0.5, 1.0)),
    "calibrated, mended, reach 0.75": _mended(reach=(0.75, 0.75)),
    "calibrated, mended, reach 1": _mended(reach=(1.0, 1.0)),
    "calibrated, mended, reach 0.75 and 1.25": _mended(reach=(0.75, 1.25)),
    "calibrated, mended, size weighed": _mended(mixed_size="weighed"),
    "calibrated, mended, size of stored channels": _mended(mixed_size="stored"),
    "calibrated, mended, scale sought": _mended(seek=True),
    "calibrated, mended, unbiased": _mended(norm="unbiased"),
    "calibrated, mended, least squares": _mended(norm="fit"),
    "calibrated, mended, least channels first": _mended(falling=False),
    "calibrated, mended, least first, keys' identity": _mended(falling=False, plain_metric=True),
    "calibrated, mended, keys' identity": _mended(plain_metric=True),
    "calibrated, mended, balanced": _mended(balanced=True),
    "calibrated, mended, balanced, least first": _mended(balanced=True, falling=False),
    "calibrated, mended, no feedback": _mended(strength=0.0),
    "calibrated, mended, lambda' 4": _mended(strength=4.0),
    "calibrated, mended, w 0.25": _mended(0.25),
    "calibrated, mended, w 0.75": _mended(0.75),
    "calibrated, mended, w 0.9": _mended(0.9),
    "calibrated, mended, one basis for all heads": _mended(joint=True),
    "calibrated, even widths": _mended(even=True, balanced=True),
    "calibrated, even widths, w 0.75": _mended(0.75, even=True, balanced=True),
    "calibrated, even widths, keys' identity": _mended(even=True, balanced=True, plain_metric=True),
    "calibrated, mended, K3 V2": _mended(key_bits=3),
    "calibrated, mended, 1.5 bits": _mended(key_bits=1.5, value_bits=1.5),
    "calibrated, mended, 1.5 bits, values stretched": _mended(
        key_bits=1.5, value_bits=1.5, gain=True
    ),
    "calibrated, mended, K1.5 V2": _mended(key_bits=1.5),
    "calibrated, mended, K1 V2": _mended(key_bits=1),
    "calibrated, mended, 3 bits": _mended(key_bits=3, value_bits=3),
    "calibrated, mended, 3 bits, reach 0.75": _mended(key_bits=3, value_bits=3, reach=(0.75, 0.75)),
    "calibrated, mended, 3 bits, reach 0": _mended(key_bits=3, value_bits=3, reach=(0.0, 0.0)),
    "calibrated, mended, 4 bits": _mended(key_bits=4, value_bits=4),
    "calibrated, mended, 4 bits, reach 0.75": _mended(key_bits=4, value_bits=4, reach=(0.75, 0.75)),
    "calibrated, mended, 4 bits, balanced": _mended(key_bits=4, value_bits=4, balanced=True),
    "calibrated, 3 bits": _calibrated(key_bits=3, value_bits=3),
    "calibrated, before, 3 bits": _mended(mend_mixed="", key_bits=3, value_bits=3),
    "1.5 bits": Variant(key_bits=1.5, value_bits=1.5),
    "1.5 bits, scales not mended": Variant(key_bits=1.5, value_bits=1.5, mend_mixed=""),
    "1.5 bits, mended by worth": Variant(key_bits=1.5, value_bits=1.5, mend_mixed="weighed"),
    "1.5 bits, stretched": Variant(key_bits=1.5, value_bits=1.5, mend_mixed="all", gain=True),
    "1.5 bits, reach 0": Variant(key_bits=1.5, value_bits=1.5, mend_mixed="all", reach=(0.0, 0.0)),
    "1.5 bits, stretched, reach 0": Variant(
        key_bits=1.5, value_bits=1.5, mend_mixed="all", gain=True, reach=(0.0, 0.0)
    ),
    "2.5 bits": Variant(key_bits=2.5, value_bits=2.5),
    "2.5 bits, scales not mended": Variant(key_bits=2.5, value_bits=2.5, mend_mixed=""),
    "2.5 bits, stretched, reach 0": Variant(
        key_bits=2.5, value_bits=2.5, mend_mixed="all", gain=True, reach=(0.0, 0.0)
    ),
    "2.5 bits, reach 0": Variant(key_bits=2.5, value_bits=2.5, mend_mixed="all", reach=(0.0, 0.0)),
    "calibrated, 4 bits": _calibrated(key_bits=4, value_bits=4),
    "calibrated, before, 4 bits": _mended(mend_mixed="", key_bits=4, value_bits=4),
    "calibrated, 4 bits, levels reach 0": _calibrated(key_bits=4, value_bits=4, reach=(0.0, 0.0)),
    "calibrated, K3 V2": _calibrated(key_bits=3),
    "calibrated, before, K3 V2": _mended(mend_mixed="", key_bits=3),
    "calibrated, K3 V2, levels reach 0": _calibrated(key_bits=3, reach=(0.0, 0.0)),
    "calibrated, 1.5 bits, levels reach 0": _calibrated(
        key_bits=1.5, value_bits=1.5, reach=(0.0, 0.0)
    ),
    "calibrated, 1.5 bits": _calibrated(key_bits=1.5, value_bits=1.5),
    "calibrated, before, 1.5 bits": _mended(mend_mixed="", key_bits=1.5, value_bits=1.5),
    "calibrated, K1.5 V2": _calibrated(key_bits=1.5),
    "calibrated, before, K1.5 V2": _mended(mend_mixed="", key_bits=1.5),
    # widths
    "K3 V1": Variant(key_bits=3, value_bits=1),
    "K2.5 V1.5": Variant(key_bits=2.5, value_bits=1.5),
    "K2.5 V1.5, scales not mended": Variant(key_bits=2.5, value_bits=1.5, mend_mixed=""),
    "K1.5 V2.5": Variant(key_bits=1.5, value_bits=2.5),
    "K1 V3": Variant(key_bits=1, value_bits=3),
    "K3 V2": Variant(key_bits=3),
    "K2 V3": Variant(value_bits=3),
    "K4 V2": Variant(key_bits=4),
    "K2 V4": Variant(value_bits=4),
    # what stays exact
    "no sinks": Variant(sinks=0),
    "1 sink": Variant(sinks=1),
    "16 sinks": Variant(sinks=16),
    "64 sinks": Variant(sinks=64),
    "residual 0": Variant(residual=0),
    "residual 16": Variant(residual=16),
    "residual 128": Variant(residual=128),
    "first and last 2 layers exact": Variant(exact_layers=(0, 1, -1, -2)),
    "K2.5 V2 in the first half of the layers, K1.5 V2 in the second": Variant(
        by_half=((2.5, 2.0), (1.5, 2.0))
    ),
    "K1.5 V2 in the first half of the layers, K2.5 V2 in the second": Variant(
        by_half=((1.5, 2.0), (2.5, 2.0))
    ),
    "first 2 layers exact": Variant(exact_layers=(0, 1)),
    "last 2 layers exact": Variant(exact_layers=(-1, -2)),
    # the paper's own
    "squat_paper G=32, blocks of 64": OfConfig(squat_fx.Config(codec=SquatPaper(32, block=64))),
    "squat_paper G=32, blocks of 32": OfConfig(squat_fx.Config(codec=SquatPaper(32, block=32))),
    "squat_paper G=32": OfConfig(squat_fx.Config(codec=SquatPaper(32))),
    "squat_paper G=32, lambda' 100": OfConfig(
        squat_fx.Config(codec=SquatPaper(32, strength=100.0))
    ),
    "squat_paper G=32, as published": OfConfig(
        squat_fx.Config(codec=SquatPaper(32, strength=1e-3, relative=False, block=64))
    ),
}


def of_codecs(texts: list[str], bits: list[str], is_calibrated: bool) -> dict[str, Build]:
    """Codecs as ``squat-fx eval`` takes them; those that can be are there calibrated too, behind
    all others, if anything is.
    """
    found: dict[str, Build] = {}
    calibrated: dict[str, Build] = {}
    for text in texts:
        spec, _, own = text.partition(" at ")
        label, codec = parse_codec(spec)
        for width in [own] if own else bits:
            options = {"codec": codec, **parse_bits(width)}
            name = f"{label}, {width} bits"
            found[name] = OfConfig(squat_fx.Config(**options))
            if is_calibrated and codec.takes_calibration:
                calibrated[f"{name}, calibrated"] = partial(_with_calibration, options)
    return found | calibrated


def _with_calibration(options: dict[str, Any], statistics: Statistics) -> Rounding:
    nobody = Fingerprint("", torch.zeros(0))  # what is rounded is not a compiled model
    calibration = squat_fx.Calibration(statistics.calibration(), nobody, 0)
    return OfConfig(squat_fx.Config(**options, calibration=calibration))


@dataclass(frozen=True)
class Study:
    """What a process must know to score variants; picklable.

    Attributes:
        folder: of the model.
        device: where it runs.
        sets: windows.
        last: of each set, how many of its tokens count.
        batch: windows that go through together at most.
        calibration: windows ``[windows, tokens]`` to calibrate on, if anything is calibrated.
        names: which variants.
        codecs: roundings beside the variants, by name.
    """

    folder: Path
    device: str
    sets: list[Windows]
    last: list[int]
    batch: int
    calibration: Tensor | None
    names: list[str]
    codecs: dict[str, Build]

    def start(self) -> Callable[[int], dict[str, Any]]:
        """What scores variants by number."""
        model = load_model(self.folder).to(self.device)
        truths = [
            [self._predict(model, None, windows, ids) for ids in self._batches(windows)]
            for windows in self.sets
        ]

        @cache
        def statistics() -> Statistics:
            assert self.calibration is not None
            found = Statistics()
            simulation = Simulation(found, self.calibration.shape[1])
            with torch.no_grad(), simulation.of(model):
                for ids in self.calibration.split(self.batch):
                    model(ids.to(self.device), use_cache=False, logits_to_keep=1)
            return found

        def measure(number: int) -> dict[str, Any]:
            name = self.names[number]
            built = (VARIANTS | self.codecs)[name] if name != FULL else None
            rounding: Any = (
                built if built is None or hasattr(built, "groups") else built(statistics())  # pyright: ignore
            )
            scores = [
                self._score(model, rounding, windows, truth, last)
                for windows, truth, last in zip(self.sets, truths, self.last, strict=True)
            ]
            texts = records_by_text(scores, self.sets)
            lengths = {
                x.label(t): (x.prompt, x.prompt + x.tokens) for x in self.sets for t in x.texts
            }
            for label, length in lengths.items():
                texts[label] |= bits_of(model, rounding, *length)
            row = {"name": name, **bits_of(model, rounding, *next(iter(lengths.values())))}
            errors = {} if rounding is None else self._errors(model, rounding)
            return row | {"attention_error": errors, "texts": texts}

        return measure

    def _batches(self, windows: Windows) -> tuple[Tensor, ...]:
        """Windows that go through together: fewer where their scores would be too large."""
        fitting = SCORES // windows.ids.shape[1] ** 2
        return windows.ids.split(max(1, min(self.batch, fitting)))

    def _errors(self, model: Any, rounding: Rounding) -> dict[str, float]:
        """The relative error of attention's output by layer, on the first windows."""
        windows = self.sets[0]
        simulation = Simulation(rounding, windows.prompt, measure=True)
        ids = self._batches(windows)[0][:, :-1].to(self.device)
        with torch.no_grad(), simulation.of(model):
            model(ids, use_cache=False, logits_to_keep=1)
        found = {str(k): (a / b).sqrt().item() for k, (a, b) in sorted(simulation.errors.items())}
        return {layer: round(error, 5) for layer, error in found.items()}

    def _predict(
        self, model: Any, rounding: Rounding | None, windows: Windows, ids: Tensor
    ) -> list[Tensor]:
        """Log-probabilities after each token behind the prompt, a tensor for each window."""
        with torch.no_grad(), Simulation(rounding, windows.prompt).of(model):
            out = model(ids[:, :-1].to(self.device), use_cache=False, logits_to_keep=windows.tokens)
        return [logits.log_softmax(-1) for logits in out.logits]

    def _score(
        self,
        model: Any,
        rounding: Rounding | None,
        windows: Windows,
        truths: list[list[Tensor]],
        last: int,
    ) -> Scores:
        found = []
        for ids, truth in zip(self._batches(windows), truths, strict=True):
            predicted = self._predict(model, rounding, windows, ids)
            for row, log_probs, full in zip(ids, predicted, truth, strict=True):
                following = row[windows.prompt + 1 :].to(self.device)
                found.append(score(log_probs.double(), full.double(), following).cpu())
        return Scores(*torch.stack(found, 1)[:, :, -last:])


def bits_of(
    model: Any, rounding: Rounding | None, prompt: int, tokens: int
) -> dict[str, float | None]:
    """Bits of a packed number, and with everything counted after so many tokens, those of the
    prompt among them, in half precision; the mean over layers, keys and values; None of what has no
    stored layout.
    """
    if rounding is None:
        return {"packed_bits": None, "effective_bits": 16.0}
    if not isinstance(rounding, OfConfig):
        return {"packed_bits": None, "effective_bits": None}
    packed, effective = [], []
    for module in attentions(model):
        layers, layer = module.config.num_hidden_layers, module.layer_idx
        heads = module.config.num_key_value_heads
        formats = formats_of(rounding.config, module, layers, heads, module.head_dim)
        seen = min(tokens, (getattr(module, "sliding_window", None) or tokens + 1) - 1)
        site = Site(layer, module, seen, rounding.residual, rounding.sinks)
        for fmt in formats:
            bits, of_layout = fmt.packed_bits_per_element(), fmt.stored_layout
            count, lost = site.packed(seen, fmt.token_group), 0
            if fmt.stored_layout.keeps_part:
                lost = max(site.packed(prompt, kept_layout.group(fmt)) - kept_layout.budget(fmt), 0)
            learned = sum(
                math.prod(of_layout.fixed_shape(fmt, name, 1, 1))
                * 8 * of_layout.dtype(fmt, name, torch.float16).itemsize
                for name in of_layout.fixed
            )  # fmt: skip
            learned += 2 * 32 * fmt.head_dim**2 * fmt.latent  # a basis and its inverse
            packed.append(bits)
            stored = bits * (count - lost) + 16 * (seen - count)
            effective.append((stored + learned / fmt.head_dim) / seen)
    return {"packed_bits": mean(packed), "effective_bits": mean(effective)}


def attentions(model: Any) -> list[Any]:
    """The attention modules of a model of transformers."""
    return [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "o_proj")]


def against(row: dict[str, Any], base: dict[str, Any], label: str) -> tuple[float, float]:
    """The ratio of the mean KLs, and the mean difference of their logarithms over windows in
    standard errors.
    """
    mine, other = (x["texts"][label] for x in (row, base))
    pairs = zip(mine["kl_by_window"], other["kl_by_window"], strict=True)
    logs = [math.log(a / b) for a, b in pairs if a > 0 and b > 0]
    spread = standard_error(logs)
    errors = mean(logs) / spread if spread else 0.0
    return mine["kl"] / other["kl"] if other["kl"] else 1.0, errors


def table_of(rows: list[dict[str, Any]]) -> Table:
    """A row for each variant: its KL on each text, the ratio to the base, standard errors."""
    base = next((row for row in rows if row["name"].startswith(BASE)), rows[0])
    labels = list(base["texts"])
    table = Table("", *labels, box=None)
    for row in rows:
        cells = []
        for label in labels:
            ratio, errors = against(row, base, label)
            cells.append(f"{row['texts'][label]['kl']:.5f}  {ratio:.3f} ({errors:+.1f})")
        table.add_row(row["name"], *cells)
    return table


def hidden(folder: Path, haystack: Tensor, length: int, count: int) -> tuple[Windows, int]:
    """Windows that end in a question for a number hidden before, and how long the answers are."""
    cases = Needles.hide(haystack, encoder(folder), leading_tokens(folder), length, count, 1).cases
    fed = max(len(case.asked) + len(case.answer) for case in cases)
    answer = min(len(case.answer) for case in cases)
    return ending(cases, leading_tokens(folder), fed, f"number hidden in {length} tokens"), answer


def answered(folder: Path, questions: Path, length: int, count: int, answer: int) -> Windows:
    """Windows of ``length`` tokens and then the last ``answer`` tokens of a written answer."""
    leading = leading_tokens(folder)
    cases = Answers.read(questions, encoder(folder), leading, 4 * count, length, 1).cases
    cases = [case for case in cases if len(case.answer) > answer][:count]
    return ending(cases, leading, answer, f"end of an answer of {questions.name}")


def ending(cases: Sequence[Case], leading: Tensor, tokens: int, name: str) -> Windows:
    """The cases, made equally long at their beginnings, the last tokens fed one by one."""
    whole = [torch.cat([case.prompt, case.asked, case.answer]) for case in cases]
    least = min(map(len, whole)) - len(leading)
    ids = torch.stack([torch.cat([leading, x[len(x) - least :]]) for x in whole])
    return Windows(ids, (name,) * len(cases), ids.shape[1] - tokens - 1, tokens)


def _tokens(folder: Path, text: Path, second_half: bool) -> Tensor:
    if text.suffix == ".jsonl":  # questions and answers, as in GSM8K
        lines = map(json.loads, text.read_text(encoding="utf-8").splitlines())
        pairs = (f"Question: {line['question']}\nAnswer: {line['answer']}" for line in lines)
        ids = encoder(folder)("\n\n".join(pairs))
    else:
        ids = text_tokens(folder, text)
    return ids[len(ids) // 2 :] if second_half else ids


def main(
    text: Annotated[list[str], typer.Option(help="UTF-8 text, or + and one; repeat.")],
    calibration_text: Annotated[
        Path | None, typer.Option(help="Its first half is calibrated on.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Hugging Face model folder; SmolLM2-135M when left out.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Names of variants; repeat.")] = None,
    codec: Annotated[
        list[str] | None, typer.Option(help="Codecs in place of variants, as eval takes them.")
    ] = None,
    bits: Annotated[list[str] | None, typer.Option(help="Their widths; repeat.")] = None,
    drift: Annotated[
        bool, typer.Option(help="Also prompts that go on with the tokens of another text.")
    ] = False,
    needle: Annotated[
        list[int] | None, typer.Option(help="Tokens of the first text to hide numbers in; repeat.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="Json lines with question and answer.")
    ] = None,
    num_questions: Annotated[int, typer.Option(help="How many of them.", min=1)] = 16,
    windows: Annotated[int, typer.Option(help="Windows per text, spread over it.", min=1)] = 8,
    prompt: Annotated[list[int] | None, typer.Option(help="Tokens of a prompt; repeat.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens after it, all scored.", min=1)] = 256,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch: Annotated[int, typer.Option(help="Windows in a pass.", min=1)] = 8,
    processes: Annotated[int, typer.Option(help="Processes side by side.", min=1)] = 1,
    keep: Annotated[Path | None, typer.Option(help="Folder of rows to go on with.")] = None,
    seconds: Annotated[float | None, typer.Option(help="How long it may take.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the json.")] = None,
) -> None:
    """Score variants of squat against it."""
    folder = model_folder(model)
    leading = leading_tokens(folder)
    paths = [Path(name.removeprefix("+")) for name in text]
    found = {
        f"{'second half of ' * name.startswith('+')}{path.name}": _tokens(
            folder, path, name.startswith("+")
        )
        for name, path in zip(text, paths, strict=True)
    }
    sets = [
        Windows.cut(found, leading, windows, length, tokens) for length in prompt or [1024, 128]
    ]
    if drift:
        sets += [part.drifting() for part in sets]
    if questions is not None:
        sets.append(answered(folder, questions, 1024, num_questions, ANSWER))
    last = [part.tokens for part in sets]
    for length in needle or ():
        part, answer = hidden(folder, next(iter(found.values())), length, windows)
        sets.append(part)
        last.append(answer)
    calibration = None
    if calibration_text is not None:
        half = text_tokens(folder, calibration_text)
        calibration = Windows.cut({"": half[: len(half) // 2]}, leading, 8, 1023, 0).ids
    elif not codec:
        raise typer.BadParameter("variants are calibrated too; give a --calibration-text")
    codecs = of_codecs(codec or [], bits or ["2"], calibration is not None)
    names = [name for name in VARIANTS if not only or name == BASE or name in only]
    if codecs:
        names = [FULL, *(only or ()), *codecs]
    study = Study(folder, device, sets, last, batch, calibration, names, codecs)
    rows: dict[int, dict[str, Any]] = {}
    with TemporaryDirectory() as scratch:
        kept = keep or Path(scratch)
        for number, row in together.run(study.start, len(names), processes, kept, seconds):
            if "error" in row:
                typer.echo(f"{names[number]}: {row['error']}", err=True)
                continue
            rows[number] = row
            kls = ", ".join(f"{x['kl']:.5f}" for x in row["texts"].values())
            typer.echo(f"{names[number]}: {kls}", err=True)
    ordered = [row for _, row in sorted(rows.items())]
    Console(width=200).print(table_of(ordered))
    options = {"windows": windows, "tokens": tokens, "device": device, "batch": batch}
    options |= {"calibration_text": calibration_text, "codecs": codec, "bits": bits}
    options |= {"drift": drift or None, "needle": needle, "questions": questions}
    options |= {"num_questions": num_questions if questions else None}
    result = {
        "command": command("study.py", model, out, texts=paths, prompts=prompt, **options),
        "versions": versions(),
        "device": device_name(),
        "model": folder.name,
        "texts": [text_record(path) for path in paths],
        "rows": ordered,
    }
    write_result(out, json.loads(json.dumps(result, default=str)))


if __name__ == "__main__":
    typer.run(main)
