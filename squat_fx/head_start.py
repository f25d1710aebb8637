"""Begin the replay of a step before Dynamo has looked at the call.

    call ─▶ replay begun ─▶ guards ─▶ boundary: is it what was begun? ─▶ its results
              GPU: ████████████████████████████████████████

``generate()`` waits for each token, so that the GPU has nothing to do while Python finds out what
the next call is: Dynamo's guards and the bookkeeping of a cache take about a millisecond at 32
layers. But the next step of a loop is known beforehand: the same cache, as the last call left it,
and other tensors of the same shapes. So its replay is launched when the call comes in, and the rest
happens while the GPU works.

Nothing is taken for granted. The boundary works out what it would have replayed, and takes the
results only if that is what was begun: the same recording, positions and tensors. Otherwise it goes
on as if nothing had happened, for a replay writes only where no handle reads, and nothing is
committed before the boundary does it. A wrong guess costs the time of a replay; after some, no more
are made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

MOST_FAILURES = 8  # wrong guesses more than right ones, until no more are made
Where = int | str  # of an argument: its place, or its name


@dataclass(frozen=True)
class Begun:
    """A replay that was launched.

    Attributes:
        by: who launched it.
        key: of what it found where it was; see :class:`squat_fx.replay.Replayed`.
        copied: the inputs that it was given, by their number.
        outputs: its results; the caller's.
    """

    by: object
    key: Hashable
    copied: Mapping[int, Tensor]
    outputs: list[Any]

    def is_what(self, by: object, key: Hashable, copied: Mapping[int, Tensor]) -> bool:
        """Whether a replay with such inputs would have been this one."""
        return (
            self.by is by
            and self.key == key
            and self.copied.keys() == copied.keys()
            and all(_same(x, copied[i]) for i, x in self.copied.items())
        )


@dataclass(frozen=True)
class Step:
    """A step that was replayed, as the next one will be.

    Attributes:
        begin: launches the next one on inputs by their number; None if it is none that can be.
        given: the tensors that the caller gave it, by their number.
    """

    begin: Callable[[Mapping[int, Tensor]], Begun | None]
    given: Mapping[int, Tensor]


@dataclass(frozen=True)
class _Guess:
    """What the next call is: tensors like those of ``like`` at such places, and besides them what
    is no tensor and the same as now.
    """

    begin: Callable[[Mapping[int, Tensor]], Begun | None]
    places: Mapping[int, Where]
    like: Mapping[Where, Any]

    @classmethod
    def after(cls, step: Step, given: Mapping[Where, Any]) -> _Guess | None:
        """None if the step was given a tensor that the caller did not pass as it is."""
        by_identity = {id(x): where for where, x in given.items() if isinstance(x, Tensor)}
        places = {i: by_identity.get(id(x)) for i, x in step.given.items()}
        if any(where is None for where in places.values()):
            return None
        return cls(step.begin, places, _looks(given, places.values()))  # pyright: ignore

    def begun(self, given: Mapping[Where, Any]) -> Begun | None:
        """What is launched for a call that looks like that."""
        if _looks(given, self.places.values()) != self.like:
            return None
        return self.begin({i: given[where] for i, where in self.places.items()})


class HeadStart:
    """Guesses the next call of a compiled callable; one thread at a time.

    Attributes:
        right, wrong: guesses that were, and were not, what came.
    """

    def __init__(self) -> None:
        self.right = 0
        self.wrong = 0
        self._guess: _Guess | None = None
        self._begun: Begun | None = None
        self._steps: list[Step] = []
        self._thread = 0

    @contextmanager
    def of_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Around a call: begins what it is guessed to replay, and learns from what it did."""
        guess, self._guess = self._guess, None
        self._thread, self._steps, self._begun = get_ident(), [], None
        given: dict[Where, Any] = {**dict(enumerate(args)), **kwargs}
        if guess is not None and self.wrong - self.right < MOST_FAILURES:
            self._begun = guess.begun(given)
        try:
            yield
        finally:
            self.wrong += self._begun is not None  # nobody asked for it
            steps, self._steps, self._begun = self._steps, [], None
        if len(steps) == 1:
            self._guess = _Guess.after(steps[0], given)

    def take(self, by: object, key: Hashable, copied: Mapping[int, Tensor]) -> list[Any] | None:
        """The results of the replay that was begun, if it is the one that ``by`` would make."""
        begun = self._begun
        if begun is None or self._thread != get_ident():
            return None
        self._begun = None
        if not begun.is_what(by, key, copied):
            self.wrong += 1
            return None
        self.right += 1
        return begun.outputs

    def note(self, step: Step) -> None:
        """The call has replayed a step."""
        if self._thread == get_ident():
            self._steps.append(step)


def _looks(given: Mapping[Where, Any], places: Collection[Where | None]) -> dict[Where, Any]:
    """What tells one call from another: the shapes of tensors at such places, and all that is no
    tensor, of which nothing is kept alive.
    """
    out: dict[Where, Any] = {}
    for where, x in given.items():
        if not isinstance(x, Tensor):
            out[where] = x if isinstance(x, (bool, int, float, str)) else id(x)
        elif where in places:
            out[where] = x.shape, x.dtype, x.device
    return out


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two are one tensor, or small ones of the host that are equal."""
    return a is b or (a.device.type == "cpu" == b.device.type and torch.equal(a, b))
