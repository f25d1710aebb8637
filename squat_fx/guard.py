"""The quality guard: what the packed cache of a prompt does to attention, and more bits for layers
that lose too much.

The graph of a prompt returns one number a layer, the error of what the prompt's newest queries
find in packed tokens: :mod:`squat_fx.kernels.judge` says how it is measured, ``docs/guard.md`` what
it is for models and codecs that work and for some that do not.

With ``guard="warn"`` the numbers come to the host by themselves, after the prompt. With
``guard="raise_bits"`` the call waits for them, and where one is above the threshold it raises
:class:`TooFar` before anything was committed; the graph is then rewritten with more bits for these
layers, runs again without an inner compiler, and later calls find their graphs compiled anew. The
formats of a cache are part of what graphs are compiled for, so that those of decode steps follow.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from squat_fx.config import Config
from squat_fx.report import Report, ranges

logger = logging.getLogger(__name__)

EXACT = 16.0
"""More than any width of a code: the layer is stored exactly."""
LADDER = (4.0, 8.0, EXACT)
ALWAYS, EVERY = 8, 16
"""Of the prompts of a graph, the first so many are judged, and then one of so many."""


class TooFar(Exception):
    """Some layers got more bits; the call has changed nothing and is to be repeated with them."""


def with_raised(config: Config, raised: Mapping[int, float]) -> Config:
    """``config`` with more bits for the layers of ``raised``."""
    if not raised:
        return config
    widths: dict[int, Any] = dict(config.layer_bits)
    widths |= {layer: (bits, bits) for layer, bits in raised.items() if bits != EXACT}
    exact = {layer for layer, bits in raised.items() if bits == EXACT}
    exact_layers = tuple(sorted(exact.union(config.exact_layers)))
    return replace(config, layer_bits=widths, exact_layers=exact_layers)


def next_bits(config: Config, layer: int) -> float:
    """The next width for ``layer`` that its codec has, for keys and values."""
    for bits in LADDER:
        try:
            if bits != EXACT:
                config.resolved_codec.check_bits(bits)
        except ValueError:
            continue
        if bits > max(config.widths(layer)):
            return bits
    return EXACT


@dataclass
class Watch:
    """Looks at the errors of a graph's ``layers``.

    With ``guard="warn"`` at those of its first prompts, and then of every few: what is wrong with a
    model and a codec shows at once, and a prompt that is bound by launches pays for every one.

    Attributes:
        repeatable: whether the graph changes no input.
        due: what tells the graph whether to measure them, see ``Rewriting.due``; None: it always
            does.
    """

    layers: tuple[int, ...]
    config: Config
    report: Report
    repeatable: bool
    due: Tensor | None = None
    _prompts: int = 0

    def __call__(self, errors: Tensor) -> None:
        """Take the errors of one call, fp32 ``[layers]``.

        Raises:
            TooFar: see there.
        """
        if not self._was_due():
            return
        if self.config.guard == "raise_bits" or not errors.is_cuda:
            self._take(errors.tolist())
            return
        self.report.read_arrived(wait=True)  # of the prompt before, long since there
        with torch.inference_mode(False):
            there = torch.empty(errors.shape, dtype=errors.dtype, pin_memory=True)
            there.copy_(errors, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self.report.arriving = arrived, lambda: self._take(there.tolist())

    def _was_due(self) -> bool:
        """Whether the call at hand measured anything; says whether the next one is to."""
        if self.due is None or self.config.guard == "raise_bits":
            return True
        was_due = bool(self.due.item())
        self._prompts += 1
        self.due.fill_(self._prompts < ALWAYS or self._prompts % EVERY == 0)
        return was_due

    def _take(self, errors: Sequence[float]) -> None:
        threshold, known = self.config.guard_threshold, self.report.attention_errors
        found: dict[int, float] = {}
        for layer, error in zip(self.layers, errors, strict=True):  # some have several attentions
            if not error <= found.get(layer, -1.0):
                found[layer] = error
        far = [n for n in found if not found[n] <= threshold]  # what is no number is too far
        new = [n for n in far if known.get(n, 0.0) <= threshold]
        for layer, error in found.items():
            known[layer] = max(error, known.get(layer, 0.0))
        if self.config.guard == "raise_bits":
            self._raise(far, found)
        elif new:
            helps = self.config.resolved_codec.remedy
            self._say(new, found, f"{helps}: {_advice(self.config, new)}")

    def _raise(self, far: Sequence[int], found: Mapping[int, float]) -> None:
        if not far:
            return
        higher = {layer: next_bits(self.config, layer) for layer in far}
        if all(self.report.raised.get(layer) == bits for layer, bits in higher.items()):
            return  # a graph that cannot be repeated, and has not been traced anew
        for bits in sorted(set(higher.values())):
            layers = [layer for layer in far if higher[layer] == bits]
            how = "exactly" if bits == EXACT else f"with {bits:g} bits"
            when = "from now on" if self.repeatable else "from the next prompt on"
            self._say(layers, found, f"stored {how} {when}")
        self.report.raised.update(higher)
        for layer in far:
            del self.report.attention_errors[layer]  # was that of the bits before
        if self.repeatable:
            raise TooFar

    def _say(self, layers: Sequence[int], found: Mapping[int, float], what: str) -> None:
        worst = max((found[n] for n in layers), key=lambda e: e if e == e else float("inf"))
        text = (
            f"what attention finds in packed tokens changes by up to {worst:.0%} in layers "
            f"{ranges(layers)} ({self.config.resolved_codec.name}; guard_threshold is "
            f"{self.config.guard_threshold:.0%}); {what}"
        )
        logger.warning("%s", text)
        self.report.note(text)


def _advice(config: Config, layers: Sequence[int]) -> str:
    widths = {layer: next_bits(config, layer) for layer in layers}
    bits = ", ".join(f"{n}: {b:g}" for n, b in widths.items() if b != EXACT)
    exact = [n for n, b in widths.items() if b == EXACT]
    options = [f"layer_bits={{{bits}}}"] * bool(bits) + [f"exact_layers={exact}"] * bool(exact)
    return f"{', '.join(options)}, or guard='raise_bits'"


def repeated(
    run: Callable[..., Any], again: Callable[[], Callable[..., Any]]
) -> Callable[..., Any]:
    """``run``, and where it raises :class:`TooFar` what ``again()`` makes instead, from then on."""

    def call(*args: Any) -> Any:
        nonlocal run
        while True:
            try:
                return run(*args)
            except TooFar:
                run = again()

    return call
