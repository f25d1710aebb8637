"""Compile the launchers' kernels for a GPU that is not there, and say what became of them.

    python -m squat_fx.kernels.aot [80] [90]

A launcher runs on small CPU tensors with its launches recorded instead of run; each recorded launch
is compiled with the types, alignments and constants it would have had. Triton's wheel carries the
assembler and the disassembler, so no driver is needed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

from squat_fx.codecs import Codec, Format, Kivi, Role, Squat, SquatPaper, codec_spec, make_format
from squat_fx.kernels import fit, launch
from squat_fx.kernels.reference import Arenas, Extent, empty_arenas
from squat_fx.layouts.rotary import Rotation

ROLES: tuple[Role, ...] = ("key", "value")
CAPABILITIES = (80, 90)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "launch_pdl")


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its arguments by name, and compiler options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: spills and shared memory in bytes, instructions in all."""

    kernel: str
    capability: int
    registers: int
    spills: int
    shared: int
    instructions: int


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect the launches of a ``with`` block; nothing runs."""
    launches: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | named
        launches.append(Launch(kernel, arguments, options))

    original = JITFunction.run
    JITFunction.run = record  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield launches
    finally:
        JITFunction.run = original


@contextmanager
def _capable(gpu: str) -> Iterator[None]:
    """Launches as they are for a GPU that is not there."""
    originals = launch.runs_gluon, launch.launches_early
    launch.runs_gluon = lambda _: gpu in ("ampere", "hopper")
    launch.launches_early = lambda _: gpu == "hopper"
    try:
        yield
    finally:
        launch.runs_gluon, launch.launches_early = originals


def compile_launch(launched: Launch, capability: int) -> Resources:
    """What a launch takes on ``("cuda", capability, 32)``."""
    return resources_of(compiled_kernel(launched, capability))


def compiled_kernel(launched: Launch, capability: int) -> Any:
    """Triton's compiled kernel for ``("cuda", capability, 32)``."""
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    signature = {}
    for parameter in launched.kernel.params:
        value = launched.arguments[parameter.name]
        path = (parameter.num,)
        if parameter.is_constexpr:
            signature[parameter.name], constants[path] = "constexpr", value
        else:
            specialize = not parameter.do_not_specialize
            signature[parameter.name] = _type(value, path, specialize, constants, attributes)
    made_of = GluonASTSource if launched.kernel.is_gluon() else ASTSource
    source = made_of(launched.kernel, signature, constants, attributes)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=launched.options
    )


def _type(
    value: Any, path: tuple[int, ...], specialize: bool, constants: dict, attributes: dict
) -> Any:
    """Triton's name for the type of ``value``; notes constants and alignment as a launch would."""
    if isinstance(value, tuple):
        types = [
            _type(v, (*path, i), specialize, constants, attributes) for i, v in enumerate(value)
        ]
        return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
    if value is None or (specialize and isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, Tensor) or (specialize and isinstance(value, int) and value % 16 == 0):
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


def resources_of(compiled: Any) -> Resources:
    """What a compiled kernel takes."""
    usage = _disassembled(compiled, "--dump-resource-usage")
    numbers = {
        name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)
    }
    return Resources(
        kernel=compiled.metadata.name,
        capability=compiled.metadata.target.arch,
        registers=numbers["REG"],
        spills=numbers["STACK"] + numbers["LOCAL"],
        shared=compiled.metadata.shared,
        instructions=len(machine_code(compiled)),
    )


def machine_code(compiled: Any) -> list[tuple[int, str]]:
    """The instructions of a kernel, by address."""
    sass = _disassembled(compiled, "--dump-sass")
    found = re.findall(r"^\s*/\*([0-9a-f]{4,5})\*/\s*([^;]*)", sass, re.MULTILINE)
    return [(int(address, 16), text.strip()) for address, text in found]


def main_loop(code: list[tuple[int, str]]) -> list[str]:
    """The loop that does the work of a kernel: the innermost one with the most tensor core
    instructions, the longest of several; empty if there is none.
    """
    multiplying = [address for address, text in code if re.search(r"\b[HIQ]G?MMA", text)]
    loops = []
    for address, text in code:
        target = re.search(r"\bBRA(?:\.\w+)* .*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) <= address:
            loops.append((int(target[1], 16), address))
    loops = [
        (first, last)
        for first, last in loops
        if any(first <= address <= last for address in multiplying)
    ]
    innermost = [
        (first, last)
        for first, last in loops
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in loops)
    ]
    first, last = max(
        innermost,
        key=lambda loop: (sum(loop[0] <= a <= loop[1] for a in multiplying), loop[1] - loop[0]),
        default=(0, -1),
    )
    return [text for address, text in code if first <= address <= last]


def instructions_per_code(compiled: Any, codes_per_trip: int) -> float:
    """How many instructions a lane issues in the main loop for each code that a program unpacks
    there; branches count as taken.

    Args:
        compiled: of :func:`compiled_kernel`.
        codes_per_trip: key and value elements of one pass of the loop.
    """
    threads = 32 * compiled.metadata.num_warps
    return len(main_loop(machine_code(compiled))) * threads / codes_per_trip


def _disassembled(compiled: Any, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        return subprocess.run(
            [TOOLS / "cuobjdump", option, path], capture_output=True, text=True, check=True
        ).stdout


# representative launches -------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What a few rows of the table are compiled for."""

    head_dim: int
    bits: float | tuple[int, ...]
    queries_per_kv: int = 4
    q_len: int = 1
    dtype: torch.dtype = torch.float16
    codec: Codec = field(default_factory=Kivi)
    latent: bool = False  # keys have a calibrated basis
    rotation: Rotation | None = None  # keys are turned back, for codecs that ask for it

    def format(self, role: Role) -> Format:
        """How ``role`` is stored."""
        latent = self.latent and role == "key"
        fmt = make_format(
            self.codec, codec_spec(self.codec), role, self.head_dim, self.bits, 32, 4, latent
        )
        if self.rotation is None or "rotary" not in self.codec.taps(role):
            return fmt
        return fmt.stored_layout.with_rotation(fmt, self.rotation)

    def tokens(self, count: int, heads: int = 2) -> Tensor:
        """``[batch, heads, count, head_dim]``."""
        return torch.zeros(2, heads, count, self.head_dim, dtype=self.dtype)

    def arenas(self, role: Role) -> Arenas:
        """Storage of ``role``."""
        basis = None
        if self.latent and role == "key":
            basis = torch.zeros(2, 2, self.head_dim, self.head_dim)
        return empty_arenas(self.tokens(1), 256, self.format(role), basis)


SHAPES = (
    *(Shape(head_dim, bits, codec=Squat()) for head_dim in (64, 128, 256) for bits in (2, 4)),
    Shape(64, 3, codec=Squat()),
    *(Shape(head_dim, 2, codec=SquatPaper()) for head_dim in (64, 128)),
)
POSITIONS = torch.zeros(2, 2, dtype=torch.int64)


def attend_launches(
    shape: Shape,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    gpu: str = "",
    softcap: float = 0.0,
    window: bool = False,
) -> list[Launch]:
    """Attention of ``q_len`` queries over a past and as many new tokens.

    Args:
        shape: what it works on.
        mask: of scores.
        sinks: logits of the heads.
        gpu: ``""`` has Triton's kernels alone, ``"ampere"`` Gluon's too where they apply,
            ``"hopper"`` also launches that begin early.
        softcap: of scores.
        window: whether the older tokens are not seen.
    """
    key, value = (
        (shape.arenas(role), (POSITIONS, i), shape.format(role)) for i, role in enumerate(ROLES)
    )
    query, new = shape.tokens(shape.q_len, 2 * shape.queries_per_kv), shape.tokens(shape.q_len)
    with recorded() as launches, _capable(gpu):
        launch.attend(
            query, new, new, key, value, first=1 if window else -1,
            mask=mask, sinks=sinks, scale=1.0, causal=0, softcap=softcap,
        )  # fmt: skip
    return launches


def write_launches(
    shape: Shape,
    role: Role,
    new_len: int,
    valid: Tensor | None = None,
    with_feedback: bool = False,
    gpu: str = "",
) -> list[Launch]:
    """``new_len`` tokens into the storage of ``role``."""
    arenas, new = shape.arenas(role), shape.tokens(new_len)
    feedback = new.new_zeros((*new.shape[:2], shape.head_dim, shape.head_dim), dtype=torch.float32)
    with recorded() as launches, _capable(gpu):
        launch.write(
            arenas,
            new,
            valid,
            (POSITIONS, 0),
            shape.format(role),
            feedback if with_feedback else None,
        )
    return launches


def learn_launches(shape: Shape, tokens: int = 256, valid: Tensor | None = None) -> list[Launch]:
    """What the codec learns from a prompt of keys."""
    arenas, query = shape.arenas("key"), shape.tokens(tokens, 2 * shape.queries_per_kv)
    with recorded() as launches:
        fit.learn(arenas, shape.tokens(tokens), valid, query, shape.format("key"), "key")
    return launches


def dequantize_launches(shape: Shape, role: Role) -> list[Launch]:
    """The stored tokens of ``role`` as numbers."""
    with recorded() as launches:
        launch.dense_past(shape.arenas(role), Extent(200, 160), shape.format(role))
    return launches


def feeds_back(shape: Shape, role: Role) -> bool:
    """Whether prompts of ``role`` are rounded with feedback."""
    return "query" in shape.codec.taps(role)


def representative(shape: Shape) -> Iterator[tuple[str, Launch]]:
    """Every kernel at ``shape``, with what it works on."""
    yield from (("both", launched) for launched in attend_launches(shape))
    for launched in attend_launches(shape, gpu="ampere"):
        if launched.kernel.is_gluon():
            yield "both", launched
    for role in ROLES:
        for launches in (write_launches(shape, role, 1), write_launches(shape, role, 64)):
            yield from ((role, launched) for launched in launches)
        if feeds_back(shape, role):
            for launched in write_launches(shape, role, 64, with_feedback=True):
                if launched.kernel.__name__ == "pack_kernel":
                    yield f"{role}, feedback", launched
            yield from ((role, launched) for launched in learn_launches(shape))
        yield from ((role, launched) for launched in dequantize_launches(shape, role))


def main() -> None:
    """Print what each kernel takes, by shape."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "capability",
        "codec",
        "head_dim",
        "bits",
        "kernel",
        "works on",
        "registers",
        "spills",
        "shared",
        "instructions",
        "per code",
    )
    for capability in [int(a) for a in sys.argv[1:]] or CAPABILITIES:
        for shape in SHAPES:
            for what, launched in representative(shape):
                compiled = compiled_kernel(launched, capability)
                r, per_code = resources_of(compiled), ""
                if r.kernel.endswith("attend_kernel"):
                    codes = 2 * shape.head_dim * launched.arguments["BLOCK_N"]
                    per_code = f"{instructions_per_code(compiled, codes):.2f}"
                numbers = (r.registers, r.spills, r.shared, r.instructions)
                table.add_row(
                    str(capability),
                    shape.codec.name,
                    str(shape.head_dim),
                    str(shape.bits),
                    r.kernel,
                    what,
                    *map(str, numbers),
                    per_code,
                )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
