"""How attention of one or a few query tokens is cut into tiles and shares: a table, not a search.

Nothing is measured while a model runs. A row serves a class of shapes; the first that fits is
taken, your own before these: :func:`prefer` them, or name a JSON file of them, as ``squat-fx bench
tune`` writes it, in the environment variable ``SQUAT_FX_TUNING``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

VARIABLE = "SQUAT_FX_TUNING"
ANY = 2**30
BLOCKS = (16, 32, 64, 128)


@dataclass(frozen=True)
class Choice:
    """One row: a class of shapes, and what serves it.

    Attributes:
        layout: the stored layout.
        row_bytes, head_dim: the largest code row of a token, in bytes, and head dimension it is
            for.
        block_n: tokens of a tile: 16, 32, 64 or 128; a group of keys may be shorter.
        stages: tiles in memory, being copied and being worked on; 2 or more.
        tiles: tiles of a share, at least; fewer tokens are not split.
        programs: shares of all heads that a multiprocessor is given, at most.
        measured: where these were the fastest.
    """

    layout: str
    row_bytes: int
    head_dim: int
    block_n: int
    stages: int
    tiles: int = 4
    programs: int = 8
    measured: str = ""

    def __post_init__(self) -> None:
        if self.block_n not in BLOCKS:
            raise ValueError(f"block_n must be one of {BLOCKS}, got {self.block_n}")
        if self.stages < 2 or min(self.tiles, self.programs) < 1:
            raise ValueError(
                f"a choice needs 2 stages, a tile and a program at least, got {self.stages} "
                f"stages, {self.tiles} tiles and {self.programs} programs"
            )

    def serves(self, layout: str, row_bytes: int, head_dim: int) -> bool:
        """Whether a shape is of this row's class."""
        return layout == self.layout and row_bytes <= self.row_bytes and head_dim <= self.head_dim

    def for_group(self, tokens: int) -> Choice:
        """The same with tiles that lie in groups of so many tokens: shorter ones, more at once."""
        return self.halved((self.block_n // math.gcd(tokens, self.block_n)).bit_length() - 1)

    def halved(self, times: int = 1) -> Choice:
        """The same with shorter tiles, more of them at once; none is shorter than 16 tokens."""
        times = min(times, (self.block_n // min(BLOCKS)).bit_length() - 1)
        return replace(self, block_n=self.block_n >> times, stages=self.stages + times)


H200 = "H200, Triton 3.6, (32, 8, 128, 8192)"
COMPILED = "registers and shared memory on sm_90, Triton 3.6; not timed"
TABLE = (
    Choice("planes/token", 32, 256, 128, 2, measured=f"{H200}, 2 bits, head_dim 128"),
    Choice("planes/token", 64, 256, 64, 3, measured=f"{H200}, 4 bits, head_dim 128"),
    Choice("planes/token", ANY, 128, 64, 3, measured=COMPILED),
    Choice("planes/token", ANY, ANY, 32, 4, measured=COMPILED),
    Choice("planes/channel", 32, 256, 128, 2, measured=f"{H200}, 2 bits, head_dim 128"),
    Choice("planes/channel", ANY, ANY, 64, 3, measured=COMPILED),
)

_preferred: list[Choice] = []


def choice(layout: str, row_bytes: int, head_dim: int) -> Choice:
    """The row that serves a shape.

    Args:
        layout: ``"planes/token"`` or ``"planes/channel"``.
        row_bytes: bytes of the codes of a token, the larger of keys and values.
        head_dim: channels, likewise.
    """
    return _choice(layout, row_bytes, head_dim, os.environ.get(VARIABLE))


@lru_cache(maxsize=256)
def _choice(layout: str, row_bytes: int, head_dim: int, path: str | None) -> Choice:
    own = read(Path(path)) if path else ()
    rows = (*_preferred, *own, *TABLE)
    return next(row for row in rows if row.serves(layout, row_bytes, head_dim))


def prefer(*choices: Choice) -> None:
    """Take these before all others from now on; without any, forget those that were preferred."""
    _preferred[:] = [*choices, *_preferred] if choices else []
    _choice.cache_clear()


def read(path: Path) -> tuple[Choice, ...]:
    """The rows of a file.

    Raises:
        ValueError: it is not a JSON list of rows; the message names what is wrong.
    """
    known = {field.name for field in fields(Choice)}
    try:
        rows: Any = json.loads(path.read_text(encoding="utf-8"))
        return tuple(Choice(**row) for row in rows)
    except (OSError, json.JSONDecodeError, TypeError) as error:
        raise ValueError(
            f"{path} must hold a JSON list of objects with {', '.join(sorted(known))}, "
            f"as squat-fx bench tune writes it: {error}"
        ) from error


def write(path: Path, choices: Sequence[Choice]) -> None:
    """Undo :func:`read`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(row) for row in choices]
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
