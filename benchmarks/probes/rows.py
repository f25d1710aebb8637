"""Products of one row with a weight, as a step of batch 1 computes them: microseconds and TB/s.

    python benchmarks/probes/rows.py OUT.json

cuBLAS by ``F.linear``; Inductor's reduction, ``(weight * x).sum(-1)``, as it is and after
coordinate descent; a Triton kernel written for it, with several tiles. Weights rotate through more
memory than L2 holds; CUDA-graph replay, median.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

SHAPES = [(1024, 4096), (4096, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336)]
TILES = [
    (1, 2048, 4), (2, 1024, 4), (4, 512, 4), (4, 1024, 4), (8, 512, 4), (2, 2048, 8), (16, 256, 4),
    (8, 256, 2), (4, 256, 1), (8, 1024, 8),
]  # fmt: skip
ROTATED = 300 * 2**20


@triton.jit
def row_kernel(x, weight, out, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        w = tl.load(
            weight + row[:, None].to(tl.int64) * K + (start + column)[None, :],
            eviction_policy="evict_first",
        )
        acc += w.to(tl.float32) * tl.load(x + start + column).to(tl.float32)[None, :]
    tl.store(out + row, tl.sum(acc, 1).to(out.dtype.element_ty))


def by_triton(tile: tuple[int, int, int]) -> Callable[[Tensor, Tensor], Tensor]:
    """The product with one choice of rows, columns and warps."""
    rows, columns, warps = tile

    def call(x: Tensor, weight: Tensor) -> Tensor:
        out = x.new_empty((1, weight.shape[0]))
        row_kernel[(weight.shape[0] // rows,)](
            x, weight, out, weight.shape[1], rows, columns, num_warps=warps
        )
        return out

    return call


def as_sum(x: Tensor, weight: Tensor) -> Tensor:
    """Inductor makes a reduction of it."""
    return (weight.float() * x.float()).sum(-1, keepdim=True).mT.to(x.dtype)


def microseconds(call: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: Tensor) -> float:
    """Median of a replay over all weights, divided."""
    for weight in weights[:2]:
        call(x, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            call(x, weight)
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 1e3 * median(times) / len(weights)


def main(out: str) -> None:
    """See above."""
    found: dict[str, Any] = {}
    for n, k in SHAPES:
        count = max(4, ROTATED // (2 * n * k))
        weights = torch.randn((count, n, k), device="cuda", dtype=torch.float16) * k**-0.5
        x = torch.randn((1, k), device="cuda", dtype=torch.float16)
        torch._dynamo.reset()
        calls: dict[str, Any] = {"cublas": F.linear, "inductor": torch.compile(as_sum)}
        if n in (1024, 4096):
            options = {"coordinate_descent_tuning": True}
            calls["inductor, tuned"] = torch.compile(as_sum, options=options)
        calls |= {f"triton {tile}": by_triton(tile) for tile in TILES if k % tile[1] == 0}
        truth = x.double() @ weights[0].double().mT
        row: dict[str, Any] = {}
        for name, call in calls.items():
            try:
                error = (call(x, weights[0]).double() - truth).norm() / truth.norm()
                us = microseconds(call, x, weights)
                row[name] = [round(us, 2), round(2 * n * k / us / 1e6, 2), float(f"{error:.1e}")]
            except Exception as reason:
                row[name] = f"{type(reason).__name__}: {reason}"[:200]
        found[f"{n}x{k}"] = row
        print(n, k, json.dumps(row), flush=True)
        Path(out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
