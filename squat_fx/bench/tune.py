"""Find the fastest tiles of attention on this GPU, for ``squat_fx.kernels.tuning``.

    squat-fx bench tune --out tuning.json
    SQUAT_FX_TUNING=tuning.json python ...

For each cache of ``bench kernel`` that one of the Gluon kernels takes: tokens of a tile and stages
where the GPU is full, then tiles of a share where one sequence has it for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from squat_fx.bench import kernel
from squat_fx.bench.kernel import CODECS, ROLES, SHAPES, Shape, format_of
from squat_fx.bench.record import device_name
from squat_fx.kernels import tuning
from squat_fx.kernels.triton_planes import stored_format
from squat_fx.kernels.tuning import Choice

FULL, ALONE = SHAPES[0], SHAPES[3]
TILES = [(128, 2), (128, 3), (64, 2), (64, 3), (64, 4), (32, 3), (32, 4)]
TILES_OF_SHARES = (1, 2, 3, 4, 8)


def measure(log: Callable[[str], None], caches: Sequence[str]) -> list[Choice]:
    """The fastest choice for each class of shapes; what was preferred before is forgotten.

    Args:
        log: is told what is timed.
        caches: names of ``bench.kernel.CODECS``.
    """
    found: dict[tuple[str, int, int], Choice] = {}
    tuning.prefer()
    for name, codec, bits in (row for row in CODECS if row[0] in caches):
        formats = [stored_format(format_of(codec, role, bits, FULL.head_dim)) for role in ROLES]
        row_bytes = max(fmt.row_size for fmt in formats)
        shape = (codec.layout, row_bytes, FULL.head_dim)
        if shape in found:
            continue

        def timed(where: Shape, chosen: Choice) -> float:
            tuning.prefer(chosen)
            try:
                return kernel.attend(where, codec, bits)["microseconds"]  # noqa: B023
            except Exception as error:  # too much memory or too many registers for this GPU
                log(f"{chosen} does not run: {error}")
                return float("inf")
            finally:
                tuning.prefer()

        start = replace(
            tuning.choice(*shape), row_bytes=row_bytes, head_dim=FULL.head_dim,
            measured=f"{device_name()}, {name}",
        )  # fmt: skip
        tiles = (replace(start, block_n=n, stages=stages) for n, stages in TILES)
        best = fastest(tiles, lambda c: timed(FULL, c), log)
        shares = (replace(best, tiles=n) for n in TILES_OF_SHARES)
        found[shape] = fastest(shares, lambda c: timed(ALONE, c), log)
    return sorted(found.values(), key=lambda c: (c.layout, c.row_bytes))


def fastest(
    choices: Iterable[Choice], timed: Callable[[Choice], float], log: Callable[[str], None]
) -> Choice:
    """The choice that takes the least time."""
    times: dict[Choice, Any] = {}
    for chosen in choices:
        times[chosen] = timed(chosen)
        log(f"{chosen}: {times[chosen]} us")
    return min(times, key=lambda chosen: times[chosen])
