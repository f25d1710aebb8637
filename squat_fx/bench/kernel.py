"""Attend, append and store on a GPU beside the fastest fp16 attention of torch, in one process.

    squat-fx bench kernel --out kernel.json --plot kernel.png

Random normal data, fp16, head_dim 128 unless said. Every time is the median of CUDA-graph replays
that walk through copies of the data which together exceed three times the L2 cache. Attend includes
everything that the op launches. The error is relative, against float64 attention over the stored
numbers, on the first sequence. The baseline is the faster of torch's cuDNN and FLASH attention on
the same dense shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from squat_fx.codecs import Codec, Format, Kivi, Role, Squat, SquatPaper, codec_spec, make_format
from squat_fx.kernels import launch, ops, reference
from squat_fx.kernels.reference import Arenas, Extent

Log = Callable[[str], None]
ROLES: tuple[Role, ...] = ("key", "value")
RESIDUAL_LENGTH, SINK_LENGTH = 32, 4
REPLAYS = 30
L2_MULTIPLE = 3


@dataclass(frozen=True)
class Shape:
    """One attention: ``tokens`` are stored, one new token attends."""

    num_heads: int
    num_kv_heads: int
    batch: int
    tokens: int
    head_dim: int = 128

    def __str__(self) -> str:
        return f"({self.num_heads}, {self.num_kv_heads}, {self.batch}, {self.tokens})"

    @property
    def dense_bytes(self) -> int:
        """Keys and values in fp16."""
        return 4 * self.batch * self.num_kv_heads * self.tokens * self.head_dim


SHAPES = (
    Shape(32, 8, 128, 8192),
    Shape(32, 32, 64, 4096),
    Shape(32, 8, 1, 131072),
    Shape(32, 8, 1, 32768),
    Shape(9, 3, 64, 4096, 64),
    Shape(4, 1, 64, 8192, 256),
)
CONTEXTS = (
    *(Shape(32, 8, 1, tokens) for tokens in (2048, 8192)),
    *(Shape(32, 8, 16, tokens) for tokens in (2048, 8192, 32768)),
)
"""Where else ``squat`` alone is measured, so that speedup can be drawn against context."""
CODECS: tuple[tuple[str, Codec, float | tuple[int, ...]], ...] = (
    ("squat 2 bits", Squat(), 2),
    ("squat 2 bits, mixed widths", Squat(), (4, 3, 2, 2, 2, 1, 1, 1)),
    ("squat 3 bits", Squat(), 3),
    ("squat 4 bits", Squat(), 4),
    ("kivi G=128, 2 bits", Kivi(128), 2),
    ("kivi G=32, 2 bits", Kivi(32), 2),
)


IN_CONTEXTS = ("squat 2 bits", "squat 4 bits")


def median_microseconds(run: Callable[[int], Any], copies: int) -> float:
    """Median time of one call; ``run(i)`` works on the i-th copy of the data."""
    for i in range(copies):
        run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            run(i)
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / copies)
    return median(times)


def copies_for(nbytes: int) -> int:
    """How many copies of ``nbytes`` exceed the cache."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, -(-L2_MULTIPLE * l2 // nbytes))


def randn(*shape: int, seed: int) -> Tensor:
    """Random normal fp16 numbers on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float16)


def format_of(
    codec: Codec, role: Role, bits: float | tuple[int, ...], head_dim: int = 128
) -> Format:
    """How ``role`` is stored."""
    spec = codec_spec(codec)
    return make_format(codec, spec, role, head_dim, bits, RESIDUAL_LENGTH, SINK_LENGTH)


def stored(x: Tensor, fmt: Format, role: Role) -> Arenas:
    """``x`` packed, without feedback: it moves codes, not time."""
    arenas = reference.empty_arenas(x, x.shape[2], fmt)
    launch.write(arenas, x, None, Extent(0, 0), fmt)
    return arenas


def copied(arenas: Arenas) -> Arenas:
    """The same numbers at other addresses."""
    return Arenas(
        tuple(t.clone() for t in arenas.packed),
        arenas.dense.clone(),
        arenas.start.clone(),
        dict(arenas.fixed),
    )


def baseline(shape: Shape, log: Log) -> dict[str, Any]:
    """The faster of torch's fp16 attentions, and what it reads a second."""
    copies = copies_for(shape.dense_bytes)
    past = (shape.batch, shape.num_kv_heads, shape.tokens, shape.head_dim)
    keys = [randn(*past, seed=1) for _ in range(copies)]
    values = [randn(*past, seed=2) for _ in range(copies)]
    query = randn(shape.batch, shape.num_heads, 1, shape.head_dim, seed=3)
    times: dict[str, float] = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

        def run(i: int) -> Tensor:
            return F.scaled_dot_product_attention(query, keys[i], values[i], enable_gqa=True)

        try:
            with sdpa_kernel(backend):
                times[backend.name] = median_microseconds(run, copies)
        except RuntimeError as error:
            log(f"{shape}: {backend.name} does not run: {error}")
    name, fastest = min(times.items(), key=lambda item: item[1])
    rate = shape.dense_bytes / fastest / 1e6
    return {"backend": name, "microseconds": round(fastest, 2), "TB/s": round(rate, 2)}


def attend(shape: Shape, codec: Codec, bits: float | tuple[int, ...]) -> dict[str, Any]:
    """Time without and with the append that follows, bytes read a second and error of our
    attention.
    """
    if isinstance(bits, tuple) and len(bits) * 16 != shape.head_dim:
        bits = sum(bits) / len(bits)
    formats = [format_of(codec, role, bits, shape.head_dim) for role in ROLES]
    past = (shape.batch, shape.num_kv_heads, shape.tokens, shape.head_dim)
    sides = [
        stored(randn(*past, seed=seed), fmt, role)
        for seed, fmt, role in zip((1, 2), formats, ROLES, strict=True)
    ]
    query = randn(shape.batch, shape.num_heads, 1, shape.head_dim, seed=3)
    new = [randn(shape.batch, shape.num_kv_heads, 1, shape.head_dim, seed=s) for s in (4, 5)]
    extents = [Extent(0, 0).after(shape.tokens, fmt) for fmt in formats]
    positions = torch.tensor([[e.length, e.watermark] for e in extents], device="cuda")
    nbytes = sum(t.nbytes for side in sides for t in side.packed)
    copies = copies_for(nbytes)
    placed = [sides, *([copied(s) for s in sides] for _ in range(copies - 1))]
    options = {"mask": None, "sinks": None, "causal": 0, "softcap": 0.0}
    options["scale"] = shape.head_dim**-0.5

    def run(i: int) -> Tensor:
        key, value = (
            (arenas, (positions, row), fmt)
            for row, (arenas, fmt) in enumerate(zip(placed[i], formats, strict=True))
        )
        return launch.attend(query, new[0], new[1], key, value, **options)

    error = relative_error(run(0), query, new, sides, extents, formats, options)
    taken = median_microseconds(run, copies)

    def run_and_append(i: int) -> None:
        key, value = (
            (arenas, n, (positions, row), fmt)
            for row, (arenas, n, fmt) in enumerate(zip(placed[i], new, formats, strict=True))
        )
        run(i)
        launch.write_both(key, value, None)

    return {
        "microseconds": round(taken, 2),
        "microseconds_with_append": round(median_microseconds(run_and_append, copies), 2),
        "TB/s": round(nbytes / taken / 1e6, 2),
        "error": float(f"{error:.2g}"),
        "bits": round(8 * nbytes / (shape.dense_bytes // 2), 3),
    }


def relative_error(
    found: Tensor,
    query: Tensor,
    new: list[Tensor],
    sides: list[Arenas],
    extents: list[Extent],
    formats: list[Format],
    options: dict[str, Any],
) -> float:
    """Of the first sequence, against float64 over the stored numbers."""
    full = []
    for arenas, extent, fmt, n in zip(sides, extents, formats, new, strict=True):
        one = Arenas(
            tuple(t[:1] for t in arenas.packed),
            arenas.dense[:1].double(),
            arenas.start[:1],
            arenas.fixed_of(slice(0, 1), fmt),
        )
        full.append(torch.cat([reference.dense_past(one, extent, fmt), n[:1].double()], 2))
    expected = reference.attention(query[:1].double(), *full, **options)
    return float((found[:1].double() - expected).norm() / expected.norm())


def append(batch: int, heads: int, codec: Codec, bits: float) -> dict[str, Any]:
    """One token of keys and one of values into storage."""
    head_dim, tokens = 128, 1024
    past = randn(batch, heads, tokens, head_dim, seed=1)
    new = randn(batch, heads, 1, head_dim, seed=2)
    formats = [format_of(codec, role, bits) for role in ROLES]
    extents = [Extent(0, 0).after(tokens - 64, fmt) for fmt in formats]
    positions = torch.tensor([[e.length, e.watermark] for e in extents], device="cuda")
    key, value = (
        (stored(past, fmt, role), new, (positions, row), fmt)
        for row, (fmt, role) in enumerate(zip(formats, ROLES, strict=True))
    )

    def run(_: int) -> None:
        launch.write_both(key, value, None)

    return {"microseconds": round(median_microseconds(run, 20), 2)}


def store(tokens: int, heads: int, num_heads: int, codec: Codec, bits: float) -> dict[str, Any]:
    """A prompt's keys and values: everything, and the packing alone."""
    head_dim = 128
    x = randn(1, heads, tokens, head_dim, seed=1)
    query = randn(1, num_heads, tokens, head_dim, seed=2)
    fmts: dict[Role, Format] = {role: format_of(codec, role, bits) for role in ROLES}
    arenas = {role: reference.empty_arenas(x, tokens, fmt) for role, fmt in fmts.items()}
    feedback = reference.learn(arenas["key"], x, None, query, fmts["key"], "key").feedback

    def everything(_: int) -> None:
        for role, fmt in fmts.items():
            taps = query if "query" in codec.taps(role) else None
            ops.overload("store", fmt.layout)(
                x, None, taps, None, role, codec_spec(codec), fmt.to_ints()
            )

    def codes(_: int) -> None:
        for role, fmt in fmts.items():
            f = feedback if role == "key" else None
            launch.write(arenas[role], x, None, Extent(0, 0), fmt, f)

    return {
        "microseconds": round(median_microseconds(everything, 2), 1),
        "codes_microseconds": round(median_microseconds(codes, 2), 1),
    }


Case = tuple[Shape, tuple[tuple[str, Codec, float | tuple[int, ...]], ...]]
WRITTEN: tuple[tuple[str, Codec], ...] = (
    ("squat", Squat()),
    ("kivi G=32", Kivi(32)),
    ("kivi G=128", Kivi(128)),
    ("squat_paper G=32", SquatPaper(32)),
)
"""Codecs whose append and store are measured, at 2 bits."""


def cases(quick: bool) -> list[Case]:
    """Each shape with the codecs that are measured on it."""
    work: list[Case] = [(shape, CODECS) for shape in SHAPES]
    work += [(shape, tuple(c for c in CODECS if c[0] in IN_CONTEXTS)) for shape in CONTEXTS]
    if quick:
        work = [(Shape(32, 8, 2, 2048, s.head_dim), codecs) for s, codecs in work[3:6]]
    return work


def writes(codec: Codec, quick: bool) -> dict[str, Any]:
    """Append and store of a codec."""
    return {
        "append, batch 64, 8 kv heads": append(64, 8, codec, 2),
        "store, 8192 tokens, 8 kv heads": store(8192 if not quick else 1024, 8, 32, codec, 2),
    }


def compile_together(quick: bool, together: int) -> None:
    """Leave every kernel in Triton's cache on disk, from so many processes."""
    with ProcessPoolExecutor(together, mp_context=get_context("spawn")) as pool:
        running: list[Future[Any]] = [
            pool.submit(attend, shape, codec, bits)
            for shape, codecs in cases(quick)
            for _, codec, bits in codecs
        ]
        running.extend(pool.submit(writes, codec, quick) for _, codec in WRITTEN)
        for future in running:
            future.result()


def measure(
    quick: bool, log: Log, together: int = 1, keep: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Everything, as json takes it.

    Args:
        quick: small shapes only, to see that it runs.
        log: is told what is done: most of the time kernels are compiled.
        together: how many processes compile them, before anything is measured.
        keep: is given what there is after each shape.
    """
    result: dict[str, Any] = {"residual_length": RESIDUAL_LENGTH, "sink_length": SINK_LENGTH}
    rows, written = result["rows"], result["write"] = [], {}
    if together > 1:
        began = time.perf_counter()
        compile_together(quick, together)
        log(f"compiled in {together} processes, {time.perf_counter() - began:.1f} s")
    for name, codec in WRITTEN:
        written[name] = writes(codec, quick)
        log(f"{name}: {written[name]}")
    for shape, codecs in cases(quick):
        dense = baseline(shape, log)
        log(f"{shape} fp16: {dense}")
        torch.cuda.empty_cache()
        rows.append(asdict(shape) | {"cache": "fp16"} | dense)
        for name, codec, bits in codecs:
            began = time.perf_counter()
            found = attend(shape, codec, bits)
            log(f"{shape} {name}: {found}, {time.perf_counter() - began:.1f} s in all")
            torch.cuda.empty_cache()
            speedup = dense["microseconds"] / found["microseconds"]
            rows.append(asdict(shape) | {"cache": name, "speedup": round(speedup, 3)} | found)
        if keep is not None:
            keep(result)
    return result


def tables(result: dict[str, Any]) -> tuple[Table, Table]:
    """What :func:`measure` found: attention, and writing."""
    names = ("shape", "head_dim", "cache", "bits", "µs", "with append", "TB/s", "speedup", "error")
    attention = Table(*names, box=None)
    for row in result["rows"]:
        numbers = (row["num_heads"], row["num_kv_heads"], row["batch"], row["tokens"])
        cache = row["cache"] + (f", {row['backend'].lower()}" if "backend" in row else "")
        attention.add_row(
            str(numbers), str(row["head_dim"]), cache, f"{row.get('bits', 16):g}",
            f"{row['microseconds']:.1f}",
            f"{row['microseconds_with_append']:.1f}" if "microseconds_with_append" in row else "",
            f"{row['TB/s']:.2f}", f"{row.get('speedup', 1):.2f}",
            f"{row['error']:.1e}" if "error" in row else "",
        )  # fmt: skip
    writing = Table("cache", "what", "µs", "codes alone, µs", box=None)
    for cache, found in result["write"].items():
        for what, times in found.items():
            alone = times.get("codes_microseconds", "")
            writing.add_row(cache, what, str(times["microseconds"]), str(alone))
    return attention, writing
