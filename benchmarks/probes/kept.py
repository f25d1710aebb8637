"""What keeping a part of a prompt costs and gains on a GPU: store, append and attention in µs.

    python benchmarks/probes/kept.py OUT.json

A prompt of 8192 tokens, 8 KV heads and 32 query heads of 128 channels, ``squat`` at 2 bits, whole
and with a budget; medians of 20 calls between events, after 3 that are not counted. The store is
that of keys and values, and of it the votes; attention with a mask also moves its columns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from squat_fx import QuantizedKV
from squat_fx.bench.record import device_name, versions
from squat_fx.codecs import Codec, Pruned, Role, Squat, codec_spec, make_format
from squat_fx.kernels import ops

TOKENS, HEADS, QUERIES, HEAD_DIM = 8192, 8, 32, 128
BUDGETS = (None, 1024)
ROLES: tuple[Role, ...] = ("key", "value")


def microseconds(call: Callable[[], Any], device: str) -> float:
    """The median time of a call."""
    times = []
    for number in range(23):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        if number >= 3:
            times.append(1e3 * begin.elapsed_time(end))
    return median(times)


def measure(codec: Codec, batch: int, device: str) -> dict[str, Any]:
    """One row."""
    torch.manual_seed(0)
    key, value = torch.randn(2, batch, HEADS, TOKENS, HEAD_DIM, device=device).half()
    query = torch.randn(batch, QUERIES, TOKENS, HEAD_DIM, device=device).half()
    formats = [make_format(codec, codec_spec(codec), r, HEAD_DIM, 2, 32, 4) for r in ROLES]
    keeps_part = formats[0].stored_layout.keeps_part

    def store() -> tuple[QuantizedKV, QuantizedKV]:
        keys = QuantizedKV.from_dense(key, formats[0], "key", query=query)
        guide = keys if keeps_part else None
        return keys, QuantizedKV.from_dense(value, formats[1], "value", keys=guide)

    row: dict[str, Any] = {"codec": codec_spec(codec), "batch": batch}
    row["store"] = microseconds(store, device)
    if isinstance(codec, Pruned):
        valid = torch.ones(batch, TOKENS, dtype=torch.bool, device=device)
        row["votes"] = microseconds(lambda: codec.votes(query, key, valid), device)
    storages = [handle.writable_storage(64) for handle in store()]
    both = (*storages[0].tensors, *storages[1].tensors)
    row["bytes"] = sum(s.nbytes for s in storages)
    row["of_fp16"] = row["bytes"] / (key.nbytes + value.nbytes)
    positions = torch.tensor([[s.length, s.watermark] for s in storages], device=device)
    new, names = key[:, :, :1], [fmt.layout for fmt in formats]
    ints = [fmt.to_ints() for fmt in formats]
    attend, append = (ops.overload(op, *names) for op in ("attend", "append_both_"))
    padding = torch.ones(batch, 1, 1, TOKENS + 1, dtype=torch.bool, device=device)
    for name, mask in (("attend", None), ("attend_masked", padding)):
        row[name] = microseconds(
            lambda mask=mask: attend(
                query[:, :, :1], new, new, *both, positions, 0, 1, -1, mask, None, 0.1, 0, 0.0,
                *ints,
            ),
            device,
        )  # fmt: skip
    tail = (new, new, None, positions, 0, 1, formats[0].codec, *ints)
    row["append"] = microseconds(lambda: append(*both, *tail), device)
    return row


def main(out: Path, device: str = "cuda") -> None:
    """Print a line for each row, and write all of them."""
    rows = []
    for batch in (1, 16):
        for budget in BUDGETS:
            codec = Squat() if budget is None else Pruned(budget)
            rows.append(measure(codec, batch, device))
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()})
            found = {"device": device_name(), "versions": versions(), "rows": rows}
            out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
