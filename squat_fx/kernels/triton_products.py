"""One row times up to three weights: what the linear layers of a step of batch 1 are.

    out[n] = sum over k of row[k] * weight[n, k]     # in fp32; the rows of all weights in turn

| argument | what |
|---|---|
| ``row`` | ``[K]`` |
| ``first``, ``second``, ``third`` | weights ``[rows, K]``, contiguous; the first ``COUNT`` exist |
| ``out`` | ``[rows of all]`` |

A program sums a few rows of one weight, a wide piece of each at a time, so that its loads are whole
cache lines of 16 bytes a thread. Nothing is shared between programs and nothing is reduced in a
second launch, which is what a matrix product with 8 or more columns costs here.

Measured on an H200 (torch 2.11, Triton 3.6, fp16, weights not in L2; ``benchmarks/probes/rows.py``;
microseconds, this kernel against cuBLAS): 1024 x 4096 4.0 and 6.9, 4096 x 4096 9.8 and 13.1,
14336 x 4096 28.4 and 31.7, 4096 x 14336 30.0 and 31.5, 28672 x 4096 53.4 and 55.8.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK_N, BLOCK_K, NUM_WARPS = 2, 1024, 4  # the fastest of ten on an H200, at all of these shapes


@triton.jit
def products_kernel(
    row, first, second, third, out, first_rows, second_rows, third_rows,
    K: tl.constexpr, COUNT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    weight, rows, before = first, first_rows, 0
    if COUNT > 1:
        blocks = tl.cdiv(first_rows, BLOCK_N)
        if block >= blocks:
            block -= blocks
            weight, rows, before = second, second_rows, first_rows
            if COUNT > 2:
                blocks = tl.cdiv(second_rows, BLOCK_N)
                if block >= blocks:
                    block -= blocks
                    weight, rows, before = third, third_rows, first_rows + second_rows
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    column = tl.arange(0, BLOCK_K)  # [K]
    pointers = weight + n[:, None].to(tl.int64) * K + column[None, :]  # [N, K]
    there = n < rows
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + column < K
        x = tl.load(row + start + column, mask=inside, other=0.0).to(tl.float32)
        keep = there[:, None] & inside[None, :]
        w = tl.load(pointers + start, mask=keep, other=0.0, eviction_policy="evict_first")
        acc += w.to(tl.float32) * x[None, :]
    tl.store(out + before + n, tl.sum(acc, 1).to(out.dtype.element_ty), mask=there)
