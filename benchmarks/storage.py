"""What the packed cache of a long prompt takes, measured, and that no dense copy of it stays alive.

    python benchmarks/storage.py --text wikitext2_test_raw.txt --out benchmarks/results/storage.json

The prompt is prefilled once through ``squat_fx.compile(model)``. Then

* every byte of the cache is counted, by what it is: codes, scales, zero points, exact tokens
  (residual and sinks), means and factors of keys, start positions, and the room that is kept for
  the tokens to come;
* every tensor that Python can reach is listed, wrappers opened, parameters and buffers left out. A
  dense past would be a tensor with as many numbers as the keys of one layer, or any memory that
  large. The untouched model is listed first, to show that the list would have it.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import (
    command,
    innermost,
    load_model,
    model_folder,
    new_cache,
    prefill,
    stored_bytes,
    text_record,
    text_tokens,
    write_result,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import squat_fx
from squat_fx import QuantizedKV
from squat_fx.bench.record import versions
from squat_fx.cli import late_progress
from squat_fx.storage import Storage

PARTS = {
    "qdata": "codes",
    "scale": "scales",
    "zero_point": "zero points",
    "affine": "means and factors of keys",
    "basis": "calibrated bases",
    "dense": "exact tokens",
    "start": "start positions",
}
SPARE = "spare capacity"


def handles(cache: Any) -> Iterator[QuantizedKV]:
    """Keys and values of every layer."""
    for layer in cache.layers:
        yield from (x for x in (layer.keys, layer.values) if isinstance(x, QuantizedKV))


def bytes_by_part(storage: Storage) -> Counter[str]:
    """Every byte of a storage; rows are taken to start at position 0 (no padding)."""
    fmt, counted = storage.fmt, Counter()
    packed = storage.extent.packed(0, fmt)
    for name in fmt.arena_names:
        arena = storage[name]
        used = arena.nbytes
        if name in fmt.packed_names:
            used = used * (packed // fmt.tokens_per_slot(name)) // arena.shape[2]
            counted[SPARE] += arena.nbytes - used
        if used:
            counted[PARTS[name]] += used
    return counted


@dataclass(frozen=True)
class LiveTensor:
    """A tensor that Python can reach: its shape, its dtype, and the memory it keeps alive."""

    shape: tuple[int, ...]
    dtype: str
    memory: int  # bytes of the whole storage, of which it may be a view
    numel: int


def live_tensors(model: nn.Module) -> list[LiveTensor]:
    """Plain tensors besides the model's own, one for each piece of memory, the largest first."""
    owned = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    gc.collect()
    by_address: dict[int, LiveTensor] = {}
    for tensor in (x for x in gc.get_objects() if issubclass(type(x), Tensor)):
        for plain in innermost(tensor):
            if not holds_memory(plain):
                continue
            memory = plain.untyped_storage()
            found = LiveTensor(
                tuple(plain.shape), str(plain.dtype)[6:], memory.nbytes(), plain.numel()
            )
            if memory.data_ptr() not in owned:
                before = by_address.setdefault(memory.data_ptr(), found)
                if before.numel < found.numel:
                    by_address[memory.data_ptr()] = found
    return sorted(by_address.values(), key=lambda x: -x.memory)


def holds_memory(tensor: Tensor) -> bool:
    """Not what Dynamo traced with: fake and meta tensors have a shape and no memory."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"


def print_bytes(parts: Counter[str], tokens: int, numbers: int, console: Console) -> None:
    total = parts.total()
    table = Table("", "bytes", "share", "bits a number", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, count in parts.items():
        table.add_row(name, f"{count:,}", f"{count / total:.1%}", f"{8 * count / numbers:.3f}")
    table.add_row("all", f"{total:,}", "100.0%", f"{8 * total / numbers:.3f}", style="bold")
    for name, width in (("dense fp16", 2), ("dense fp32", 4)):
        ratio = f"{width * numbers / total:.2f} ×"
        table.add_row(name, f"{width * numbers:,}", ratio, f"{8 * width:.3f}")
    table.title = f"{tokens} tokens, {numbers:,} numbers"
    console.print(table)


def print_live(live: list[LiveTensor], dense_numel: int, control: int, console: Console) -> None:
    kinds = Counter((x.shape, x.dtype, x.memory) for x in live)
    table = Table("live tensors", "dtype", "how many", "MB each", box=None)
    for (shape, dtype, memory), count in kinds.most_common():
        if memory * count >= 1e4:
            table.add_row(str(list(shape)), dtype, str(count), f"{memory / 1e6:.3f}")
    console.print(table)
    console.print(
        f"{len(live)} pieces of memory besides parameters, {sum(x.memory for x in live) / 1e6:.2f} "
        f"MB. As large as dense keys of one layer ({dense_numel:,} numbers): "
        f"{len(dense_pasts(live, dense_numel))}; after the same prefill of the untouched model: "
        f"{control}.",
        highlight=False,
    )


def dense_pasts(live: list[LiveTensor], dense_numel: int) -> list[LiveTensor]:
    """What could be the keys or the values of a layer: their size in numbers, or in fp16 bytes."""
    return [x for x in live if x.numel == dense_numel or x.memory >= 2 * dense_numel]


def main(
    text: Annotated[Path, typer.Option(help="UTF-8 text.", exists=True, dir_okay=False)],
    model: Annotated[
        Path | None, typer.Option(help="Hugging Face model folder; SmolLM2-135M when left out.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to prefill.", min=2)] = 4096,
    bits: Annotated[int, typer.Option(help="Bits per cached number.", min=1, max=8)] = 2,
    codec: Annotated[str, typer.Option(help="Codec of the cache, by name.")] = "squat",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    inner: Annotated[str, typer.Option(help="What compiles the rewritten graph.")] = "inductor",
    out: Annotated[Path | None, typer.Option(help="Where to write the json.")] = None,
) -> None:
    """Bytes of the packed cache after a prefill, and the tensors that are alive then."""
    folder = model_folder(model)
    prompt = text_tokens(folder, text)[None, :tokens].clone()  # not a view of the whole text
    loaded = load_model(folder, getattr(torch, dtype))
    with torch.no_grad(), late_progress(f"Prefill of {tokens} tokens, untouched"):
        cache: Any = prefill(loaded, prompt, new_cache(loaded))
    dense_numel = cache.layers[0].keys.numel()
    control = len(dense_pasts(live_tensors(loaded), dense_numel))
    del cache
    squat_fx.compile(loaded, bits, codec=codec, inner=inner, strict=True)  # pyright: ignore
    with torch.no_grad(), late_progress(f"Prefill of {tokens} tokens"):
        cache = prefill(loaded, prompt, new_cache(loaded))
    live = live_tensors(loaded)
    parts: Counter[str] = Counter()
    for handle in handles(cache):
        parts += bytes_by_part(handle.writable_storage())
    numbers = sum(handle.numel() for handle in handles(cache))
    assert parts.total() == stored_bytes(cache).stored, "a part of the cache was not counted"

    console = Console()
    print_bytes(parts, tokens, numbers, console)
    print_live(live, dense_numel, control, console)
    options = {"tokens": tokens, "bits": bits, "codec": codec, "dtype": dtype, "inner": inner}
    total = parts.total()
    result = {
        "command": command("storage.py", model, out, text=text, **options),
        "versions": versions(),
        "model": folder.name,
        "text": text_record(text),
        "bytes": dict(parts) | {"all": total},
        "bits_per_number": round(8 * total / numbers, 3),
        "dense_fp16_bytes": 2 * numbers,
        "dense_fp32_bytes": 4 * numbers,
        "fp16_ratio": round(2 * numbers / total, 3),
        "fp32_ratio": round(4 * numbers / total, 3),
        "live_bytes_besides_parameters": sum(x.memory for x in live),
        "live_dense_pasts": len(dense_pasts(live, dense_numel)),
        "live_dense_pasts_untouched": control,
    }
    write_result(out, result)


if __name__ == "__main__":
    typer.run(main)
