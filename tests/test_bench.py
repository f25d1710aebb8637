"""``squat-fx bench``: what it refuses, what it writes, what it draws."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

from squat_fx import cli

pytest.importorskip("transformers")

pytest.importorskip("triton")

from squat_fx.bench import generate, kernel, plot, record, tune
from squat_fx.codecs import Codec
from squat_fx.kernels import tuning
from squat_fx.kernels.triton_planes import stored_format
from tests.choose import full

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="the bench extra is not installed"
)


def squat(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["bench", *arguments])


def refused(result: Result) -> str:
    """The one sentence of an error."""
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "--case", "tiny:1:8"), "shape:batch:prompt tokens:new tokens"),
        (("generate", "--case", "tiny:one:8:4"), "tiny:one:8:4"),
        (("generate", "--case", "huge:1:8:4"), "choose one of llama-3.1-8b, llama-2-7b, tiny"),
        (("generate", "--case", "tiny:0:8:4"), "a batch, a prompt and 2 new tokens"),
        (("generate", "--case", "tiny:1:8:4", "--cache", "warm"), "choose from eager, compiled"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_it_is(
    arguments: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "measure", lambda *_: pytest.fail("measured"))
    assert words in refused(squat(*arguments))


def test_kernels_are_written_down_shape_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = {"backend": "FLASH_ATTENTION", "microseconds": 8.0, "TB/s": 1.0}
    times = {"microseconds": 4.0, "TB/s": 0.5, "error": 4e-4, "bits": 2.1}
    monkeypatch.setattr(kernel, "baseline", lambda *_: dict(dense))
    monkeypatch.setattr(kernel, "attend", lambda *_: dict(times))
    monkeypatch.setattr(kernel, "writes", lambda *_: {"append": {"microseconds": 3.0}})
    kept: list[int] = []
    found = kernel.measure(
        True, lambda _: None, keep=lambda result: kept.append(len(result["rows"]))
    )
    each = 1 + len(kernel.CODECS)
    assert kept == [each, 2 * each, 3 * each]
    assert {row.get("speedup") for row in found["rows"]} == {None, 2.0}
    attention, writing = kernel.tables(found)
    assert attention.row_count == 3 * each
    assert writing.row_count == len(kernel.WRITTEN)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["kernel", "tune"])
def test_kernels_are_measured_on_a_gpu_only(command: str) -> None:
    assert f"`bench {command}` needs a CUDA GPU" in refused(squat(command))


def test_tuning_keeps_the_fastest_tiles_of_each_class(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(shape: kernel.Shape, codec: Codec, bits: Any) -> dict[str, float]:
        formats = [stored_format(kernel.format_of(codec, role, bits)) for role in kernel.ROLES]
        row_bytes = max(fmt.row_size for fmt in formats)
        chosen = tuning.choice(codec.layout, row_bytes, shape.head_dim)
        if chosen.block_n == 32:
            raise RuntimeError("out of resource: shared memory")
        at_once = chosen.block_n * (chosen.stages - 1)
        return {"microseconds": abs(at_once - row_bytes) + abs(chosen.tiles - row_bytes % 5)}

    monkeypatch.setattr(kernel, "attend", attend)
    lines: list[str] = []
    names = [name for name, *_ in kernel.CODECS]
    found = tune.measure(lines.append, names)
    assert [(c.layout, c.row_bytes, c.head_dim) for c in found] == [
        ("planes/channel", 32, 128), ("planes/token", 32, 128), ("planes/token", 48, 128),
        ("planes/token", 64, 128),
    ]  # fmt: skip
    assert {(c.block_n, c.stages) for c in found} == {(64, 2)}
    assert [c.tiles for c in found] == [2, 2, 3, 4]
    assert any("does not run: out of resource" in line for line in lines)
    assert tuning.choice("planes/token", 32, 128) == tuning.TABLE[0]
    assert [c.row_bytes for c in tune.measure(lines.append, ["squat 4 bits"])] == [64]


def test_tuning_knows_the_caches_of_the_benchmark() -> None:
    assert "--cache must be one of squat 2 bits, squat" in refused(
        squat("tune", "--cache", "squat 5 bits")
    )


def test_a_picture_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    asked = squat("generate", "--case", "tiny:1:8:4", "--plot", str(tmp_path / "x.png"))
    assert "pip install 'squat_fx[bench]'" in refused(asked)


@needs_matplotlib
@pytest.mark.parametrize("compiler", ["none", *full("g++")])
def test_whole_models_are_measured_in_processes_of_their_own(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)  # without one, graphs run eagerly
    out, picture = tmp_path / "new" / "generate.json", tmp_path / "generate.png"
    done = squat(
        "generate", "--case", "tiny:2:16:6", "--cache", "eager", "--cache", "squat",
        "--together", "2", "--prefill-chunk", "8",
        "--out", str(out), "--plot", str(picture),
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "tiny:2:16:6" in done.stdout
    written = json.loads(out.read_text())
    assert written["command"].startswith("squat-fx bench generate --case tiny:2:16:6")
    assert written["versions"]["torch"] == torch.__version__
    assert written["device"] == record.device_name()
    eager, packed = written["rows"]
    assert (eager["cache"], packed["cache"]) == ("eager", "squat")
    for row in (eager, packed):
        assert row["tokens_per_second"] > 0
        assert row["step_ms"] > 0
    assert any("2 attentions rewritten" in line for line in packed["report"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_went_wrong_in_a_process_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate.sys, "executable", "/bin/false")
    result = generate.measure(
        [generate.Case("tiny", 1, 8, 4)], ["eager"], generate.Settings(), lambda _: None
    )
    assert result["rows"][0]["error"] == "exit status 1"
    assert "exit status 1" in printed(generate.table(result))


def printed(table: Any) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def kernel_row(cache: str, batch: int, **found: Any) -> dict[str, Any]:
    shape = {"num_heads": 32, "num_kv_heads": 8, "batch": batch, "tokens": 8192, "head_dim": 128}
    return shape | {"cache": cache, "microseconds": 930.0, "TB/s": 4.6} | found


KERNEL_ROWS = [
    kernel_row("fp16", 128, backend="CUDNN_ATTENTION"),
    kernel_row("squat 2 bits", 128, speedup=4.5, error=4e-4, bits=2.125),
    kernel_row("squat 4 bits", 128, speedup=2.5, error=4e-4, bits=4.125),
    kernel_row("squat 2 bits", 1, speedup=2.9, error=4e-4, microseconds_with_append=21.5),
    kernel_row("squat 2 bits", 1, tokens=2048, speedup=1.1, error=4e-4),
    kernel_row("squat 2 bits", 1, tokens=32768, speedup=3.5, error=4e-4),
]


def test_kernel_tables_say_everything_that_was_measured() -> None:
    written = {"squat": {"store": {"microseconds": 80.0, "codes_microseconds": 20.5}}}
    attention, writing = kernel.tables({"rows": KERNEL_ROWS, "write": written})
    text = printed(attention)
    for words in (
        "fp16, cudnn_attention",
        "squat 4 bits",
        "4.50",
        "4.0e-04",
        "2.125",
        "930.0",
        "21.5",
    ):
        assert words in text
    assert all(word in printed(writing) for word in ("store", "80.0", "20.5"))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures instead of files."""
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    monkeypatch.setattr(plot, "_save", lambda figure, _: drawn.append(figure))
    return drawn


def test_bars_are_speedups_of_shapes_that_every_cache_has(figures: list[Any]) -> None:
    plot.plot_kernel(KERNEL_ROWS, Path("unused"))
    bars, _ = figures[0].axes
    assert [[bar.get_height() for bar in group] for group in bars.containers] == [[4.5], [2.5]]
    labels = [label.get_text() for label in bars.get_xticklabels()]
    assert labels == ["32\n8\n128\n8192\n128"]


def test_a_line_goes_through_three_contexts_or_more_in_order(figures: list[Any]) -> None:
    plot.plot_kernel(KERNEL_ROWS, Path("unused"))
    _, contexts = figures[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in contexts.lines[:-1]}
    points = [[2048, 1.1], [8192, 2.9], [32768, 3.5]]
    assert lines == {"squat 2 bits, batch 1, heads 32 / 8": points}


def test_lines_go_through_batches_in_order_and_leave_errors_out(figures: list[Any]) -> None:
    lengths = {"shape": "tiny", "prompt": 16, "new": 6, "cache": "squat"}
    rows: list[dict[str, Any]] = [
        lengths | {"batch": 8, "tokens_per_second": 80.0, "peak_gib": 3.0},
        lengths | {"batch": 2, "tokens_per_second": 20.0, "peak_gib": 1.0},
        lengths | {"batch": 16, "error": "out of memory"},
    ]
    plot.plot_generate(rows, Path("unused"))
    throughput, memory = figures[0].axes
    assert throughput.lines[0].get_xydata().tolist() == [[2, 20], [8, 80]]
    assert memory.lines[0].get_xydata().tolist() == [[2, 1], [8, 3]]
