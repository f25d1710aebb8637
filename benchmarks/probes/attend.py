"""Attention over packed tokens, one shape after another, with and without the Gluon kernels.

    python benchmarks/probes/attend.py OUT.json [NAME ...]

Names choose among ``CASES``; ``NAME@block_n,stages,tiles,programs`` cuts tokens like that. Each
line: whole op in microseconds, TB/s of packed tokens and relative error, by the Gluon and by the
Triton kernel; cuDNN's and FLASH's fp16 beside it.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from squat_fx.bench import kernel
from squat_fx.bench.kernel import ROLES, Extent, Shape, Squat, format_of, median_microseconds, randn
from squat_fx.kernels import launch, tuning
from squat_fx.kernels.tuning import Choice

FULL, ONE = Shape(32, 8, 128, 8192), Shape(32, 8, 1, 32768)
LONG, MHA, SMALL = Shape(32, 8, 1, 131072), Shape(32, 32, 64, 4096), Shape(9, 3, 64, 4096, 64)
MIXED = (4, 3, 2, 2, 2, 1, 1, 1)


class Work:
    """Storages of a shape, and attention over them."""

    def __init__(
        self, shape: Shape, key_bits: Any = 2, value_bits: Any = None, q_len: int = 1,
        mask: str = "", softcap: float = 0.0, value_dim: int | None = None,
    ) -> None:  # fmt: skip
        dims = (shape.head_dim, value_dim or shape.head_dim)
        bits = (key_bits, key_bits if value_bits is None else value_bits)
        self.formats = [
            format_of(Squat(), role, b, d) for role, b, d in zip(ROLES, bits, dims, strict=True)
        ]
        past = (shape.batch, shape.num_kv_heads, shape.tokens)
        sides = [
            kernel.stored(randn(*past, d, seed=seed), fmt, role)
            for seed, fmt, role, d in zip((1, 2), self.formats, ROLES, dims, strict=True)
        ]
        self.query = randn(shape.batch, shape.num_heads, q_len, dims[0], seed=3)
        new = (shape.batch, shape.num_kv_heads, q_len)
        self.new = [randn(*new, d, seed=s) for s, d in zip((4, 5), dims, strict=True)]
        self.extents = [Extent(0, 0).after(shape.tokens, fmt) for fmt in self.formats]
        rows = [[e.length, e.watermark] for e in self.extents]
        self.positions = torch.tensor(rows, device="cuda")
        self.nbytes = sum(t.nbytes for side in sides for t in side.packed)
        copies = kernel.copies_for(self.nbytes)
        self.placed = [sides, *([kernel.copied(s) for s in sides] for _ in range(copies - 1))]
        masks = {"": None}
        if mask:
            length = shape.tokens + q_len
            seen = torch.ones(shape.batch, 1, q_len, length, dtype=torch.bool, device="cuda")
            seen[..., :70] = False
            masks |= {"bool": seen, "float": torch.where(seen, 0.0, -torch.inf).half()}
        self.options: dict[str, Any] = {"mask": masks[mask], "sinks": None, "softcap": softcap}
        self.options |= {"scale": dims[0] ** -0.5, "causal": 2 if q_len > 1 else 0}

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
        options = dict(self.options)
        if options["mask"] is not None:
            options["mask"] = options["mask"][:1]
        return kernel.relative_error(
            self.run(0), self.query, self.new, self.placed[0], self.extents, self.formats, options
        )


def baseline(shape: Shape, q_len: int = 1, value_dim: int | None = None) -> dict[str, float]:
    """Torch's fp16 attentions over the past alone."""
    dims = (shape.head_dim, value_dim or shape.head_dim)
    copies = kernel.copies_for(shape.dense_bytes)
    past = (shape.batch, shape.num_kv_heads, shape.tokens)
    keys = [randn(*past, dims[0], seed=1) for _ in range(copies)]
    values = [randn(*past, dims[1], seed=2) for _ in range(copies)]
    query = randn(shape.batch, shape.num_heads, q_len, dims[0], seed=3)
    found = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

        def run(i: int) -> torch.Tensor:
            return F.scaled_dot_product_attention(query, keys[i], values[i], enable_gqa=True)

        try:
            with sdpa_kernel(backend):
                found[backend.name[:5].lower()] = round(median_microseconds(run, copies), 1)
        except RuntimeError:
            pass
    return found


CASES: dict[str, tuple[Shape, dict[str, Any]]] = {
    "2": (FULL, {}),
    "4": (FULL, {"key_bits": 4}),
    "3": (FULL, {"key_bits": 3}),
    "K3V2": (FULL, {"key_bits": 3, "value_bits": 2}),
    "mixed": (FULL, {"key_bits": MIXED}),
    "bool mask": (FULL, {"mask": "bool"}),
    "float mask": (FULL, {"mask": "float"}),
    "softcap": (FULL, {"softcap": 30.0}),
    "2 queries": (FULL, {"q_len": 2}),
    "4 queries": (FULL, {"q_len": 4}),
    "4 queries, 4": (FULL, {"q_len": 4, "key_bits": 4}),
    "MHA": (MHA, {}),
    "d64": (SMALL, {}),
    "d64, 3": (SMALL, {"key_bits": 3}),
    "d64, K3V2": (SMALL, {"key_bits": 3, "value_bits": 2}),
    "d64, 4": (SMALL, {"key_bits": 4}),
    "d80": (Shape(32, 32, 16, 4096, 80), {}),
    "d80, 4": (Shape(32, 32, 16, 4096, 80), {"key_bits": 4}),
    "d96": (Shape(32, 32, 16, 4096, 96), {}),
    "d112": (Shape(32, 32, 16, 4096, 112), {}),
    "192/128": (Shape(32, 8, 32, 8192, 192), {"value_dim": 128}),
    "d256": (Shape(4, 1, 64, 8192, 256), {}),
    "one": (ONE, {}),
    "one, 4": (ONE, {"key_bits": 4}),
    "long": (LONG, {}),
}


def main() -> None:
    out, names = sys.argv[1], sys.argv[2:]
    found, began = [], time.perf_counter()
    for name in names:
        case, _, choice = name.partition("@")
        shape, options = CASES[case]
        tuning.prefer()
        if choice:
            tuning.prefer(Choice("planes/token", tuning.ANY, 256, *map(int, choice.split(","))))
        row: dict[str, Any] = {"case": name, "shape": str(shape), "head_dim": shape.head_dim}
        try:
            work = Work(shape, **options)
            runs_gluon = launch.runs_gluon
            for kind in ("gluon",) if choice else ("gluon", "triton"):
                if kind == "triton":
                    launch.runs_gluon = lambda _: False
                row[kind] = round(work.time(), 1)
                row[f"{kind} error"] = float(f"{work.error():.2g}")
                if shape.batch == 1 and kind == "gluon":
                    row["with append"] = round(work.time(append=True), 1)
            launch.runs_gluon = runs_gluon
            row["TB/s"] = round(work.nbytes / row["gluon"] / 1e6, 2)
            del work
            torch.cuda.empty_cache()
            if not choice:
                row |= baseline(shape, options.get("q_len", 1), options.get("value_dim"))
        except Exception as error:
            row["failed"] = str(error)[-300:]
        torch.cuda.empty_cache()
        row["at"] = round(time.perf_counter() - began, 1)
        print(row, flush=True)
        found.append(row)
        with open(out, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
