"""Attention in several orders of programs, tiles and shares; or, with ``ncu``, once for a profiler.

python benchmarks/probes/orders.py OUT.json | python benchmarks/probes/orders.py once 4
"""

import json
import sys
import time

import torch

from squat_fx.bench import kernel
from squat_fx.bench.kernel import ROLES, Extent, Shape, Squat, format_of, median_microseconds, randn
from squat_fx.kernels import launch, tuning
from squat_fx.kernels.tuning import Choice


class Work:
    """Storages of a shape, and attention over them."""

    def __init__(self, shape: Shape, bits: float, copies: int | None = None) -> None:
        self.shape = shape
        self.formats = [format_of(Squat(), role, bits, shape.head_dim) for role in ROLES]
        past = (shape.batch, shape.num_kv_heads, shape.tokens, shape.head_dim)
        sides = [
            kernel.stored(randn(*past, seed=seed), fmt, role)
            for seed, fmt, role in zip((1, 2), self.formats, ROLES, strict=True)
        ]
        self.query = randn(shape.batch, shape.num_heads, 1, shape.head_dim, seed=3)
        heads = (shape.batch, shape.num_kv_heads, 1, shape.head_dim)
        self.new = [randn(*heads, seed=s) for s in (4, 5)]
        self.extents = [Extent(0, 0).after(shape.tokens, fmt) for fmt in self.formats]
        rows = [[e.length, e.watermark] for e in self.extents]
        self.positions = torch.tensor(rows, device="cuda")
        nbytes = sum(t.nbytes for side in sides for t in side.packed)
        copies = copies or kernel.copies_for(nbytes)
        self.placed = [sides, *([kernel.copied(s) for s in sides] for _ in range(copies - 1))]
        self.options = {"mask": None, "sinks": None, "causal": 0, "softcap": 0.0}
        self.options["scale"] = shape.head_dim**-0.5

    def run(self, i: int, append: bool = False) -> torch.Tensor:
        placed = zip(self.placed[i], self.formats, strict=True)
        key, value = ((a, (self.positions, row), fmt) for row, (a, fmt) in enumerate(placed))
        out = launch.attend(self.query, *self.new, key, value, **self.options)
        if append:
            placed = zip(self.placed[i], self.new, self.formats, strict=True)
            writes = ((a, n, (self.positions, r), f) for r, (a, n, f) in enumerate(placed))
            launch.write_both(*writes, None)
        return out

    def time(self, append: bool = False) -> float:
        return median_microseconds(lambda i: self.run(i, append), len(self.placed))

    def error(self) -> float:
        return kernel.relative_error(
            self.run(0), self.query, self.new, self.placed[0], self.extents, self.formats,
            self.options,
        )  # fmt: skip


def main() -> None:
    if sys.argv[1] == "once":
        work = Work(Shape(32, 8, 128, 8192), int(sys.argv[2]), 1)
        for _ in range(3):
            work.run(0)
        torch.cuda.synchronize()
        return
    found = []
    began = time.perf_counter()
    for bits, tiles in ((4, [(64, 3), (64, 2)]), (2, [(128, 2)])):
        work = Work(Shape(32, 8, 128, 8192), bits)
        row_bytes = 16 * bits
        for order in (0, 1, 2):
            launch.ORDER = order
            for block_n, stages in tiles:
                for programs in (8, 16, 32, 64):
                    if order == 0 and programs == 64:
                        continue
                    chosen = Choice("planes/token", row_bytes, 128, block_n, stages, 4, programs)
                    tuning.prefer(chosen)
                    row = dict(bits=bits, order=order, block_n=block_n, stages=stages)
                    row |= dict(shares=programs // 8, us=round(work.time(), 1))
                    tuning.prefer()
                    if programs == 8:
                        row["error"] = work.error()
                    row["at"] = round(time.perf_counter() - began, 1)
                    print(row, flush=True)
                    found.append(row)
                    json.dump(found, open(sys.argv[1], "w"), indent=0)
        del work
        torch.cuda.empty_cache()


main()
