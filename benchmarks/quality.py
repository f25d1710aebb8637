"""What a small cache costs in quality: perplexity and KL, teacher-forced through the real cache.

    python benchmarks/quality.py --text wikitext2_test_raw.txt --text book_moby_dick.txt \\
        --calibration-text essays_federalist_papers.txt --prompt 1024

Each window of a text, after the token that the tokenizer puts before every text (if it does), is a
prompt, fed in one call, and then tokens, fed one by one with
``model(token, past_key_values=cache)``; the prediction after each such token is scored against the
token that follows in the text. Windows go through in batches; no row of a batch depends on its
neighbours. Every setting sees the same windows:

    full            the untouched model with a DynamicCache; the others are compared with it
    kivi, squat ... squat_fx.compile(model, ...), its packed cache
    simulation      kivi's rounding in one pass of plain torch (simulation.py); no cache
    HF quanto ...   transformers' QuantizedCache; needs `pip install optimum-quanto`

``KL`` is KL(full || setting) in nats, averaged over the tokens of a window; its standard error is
over windows. ``packed`` bits count codes, their padding, scales and zero points of the packed
tokens; ``all`` bits are everything that is held at the end of a window, measured: exact tokens in
the model's dtype, means, factors, bases and spare capacity too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from common import (
    command,
    leading_tokens,
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
from simulation import NAME, KiviSimulation
from torch import Tensor
from transformers import AutoConfig, QuantizedCache

import squat_fx
from squat_fx.bench.record import versions
from squat_fx.cli import late_progress
from squat_fx.codecs import Kivi, Squat, SquatPaper
from squat_fx.demo import Advance
from squat_fx.evaluate.measure import standard_error
from squat_fx.evaluate.texts import spread

GROUP_SIZE, RESIDUAL_LENGTH, SINK_LENGTH = 32, 32, 4

PACKED: dict[str, dict[str, Any]] = {
    "kivi G=32, 2 bits": {"codec": Kivi(32)},
    "kivi G=128, 2 bits": {"codec": Kivi(128)},
    "squat_paper G=32, 2 bits": {"codec": SquatPaper(32)},
    "hadamard alone, 2 bits": {"codec": Squat(strength=0, center=False, smooth=False)},
    "hadamard and mean, 2 bits": {"codec": Squat(strength=0, smooth=False)},
    "squat without feedback, 2 bits": {"codec": Squat(strength=0)},
    "squat without factors, 2 bits": {"codec": Squat(smooth=False)},
    "squat, 2 bits": {},
    "squat K3V2": {"key_bits": 3},
    "squat, 3 bits": {"bits": 3},
    "squat, 4 bits": {"bits": 4},
    "squat calibrated, 2 bits": {"calibrated": True},
    "squat calibrated K3V2": {"calibrated": True, "key_bits": 3},
    "kivi G=32, 4 bits": {"codec": Kivi(32), "bits": 4},
}
"""Options of ``squat_fx.compile``, by the name of the setting."""


@dataclass(frozen=True)
class Setup:
    """What is the same for every setting."""

    folder: Path
    windows: Tensor  # int64 [windows of all texts, prompt + tokens + 1]
    texts: tuple[str, ...]  # the text of each window
    prompt: int
    tokens: int
    inner: str
    device: str
    batch: int
    calibration_text: Path | None


@dataclass
class Row:
    """The results of one setting; lists have an entry per window."""

    name: str
    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    packed_bits: float | None = None
    all_bits: float | None = None
    seconds: float = 0.0
    note: str = ""

    def record(self, texts: tuple[str, ...]) -> dict[str, Any]:
        """This row for the json."""
        return {
            "name": self.name,
            "packed_bits": self.packed_bits and round(self.packed_bits, 4),
            "all_bits": self.all_bits and round(self.all_bits, 3),
            "texts": {text: self.of(text, texts).record() for text in dict.fromkeys(texts)},
            "seconds": round(self.seconds, 1),
            **({"note": self.note} if self.note else {}),
        }

    def of(self, text: str, texts: tuple[str, ...]) -> Scores:
        """The windows of one text."""
        mine = [i for i, name in enumerate(texts) if name == text]
        return Scores(*([numbers[i] for i in mine] for numbers in (self.nll, self.kl, self.top1)))


@dataclass(frozen=True)
class Scores:
    """One setting on one text, by window."""

    nll: list[float]
    kl: list[float]
    top1: list[float]

    @property
    def ppl(self) -> float:
        return math.exp(mean(self.nll))

    def record(self) -> dict[str, Any]:
        """For the json. The error of the perplexity is that of the mean log likelihood."""
        return {
            "ppl": round(self.ppl, 3),
            "ppl_standard_error": round(self.ppl * standard_error(self.nll), 3),
            "kl": round(mean(self.kl), 6),
            "kl_standard_error": round(standard_error(self.kl), 6),
            "top1": round(mean(self.top1), 4),
            "kl_by_window": [round(kl, 5) for kl in self.kl],
        }


Run = Iterator[Tensor]  # logits [batch, vocabulary], one per scored token
Method = Callable[[Setup, Row], Callable[[Tensor], Run]]


def through_cache(setup: Setup, model: Any, make_cache: Callable[[], Any], row: Row) -> Any:
    """Windows through a cache of the model, one token a call."""

    def run(windows: Tensor) -> Run:
        cache = prefill(model, windows[:, : setup.prompt], make_cache())
        for token in windows[:, setup.prompt : -1].split(1, dim=1):
            yield model(token, past_key_values=cache).logits[:, -1]
        held = [layer.keys for layer in cache.layers]
        numbers = 2 * sum(keys.numel() for keys in held if isinstance(keys, Tensor))
        row.all_bits = 8 * stored_bytes(cache).stored / numbers if numbers else None
        packed = [x for x in _tensors(cache) if isinstance(x, squat_fx.QuantizedKV)]
        if packed:
            row.packed_bits = mean(x.format.packed_bits_per_element() for x in packed)
            total = sum(x.storage_nbytes for x in packed)
            row.all_bits = 8 * total / sum(x.numel() for x in packed)
            dense = len(held) - len(packed) // 2
            row.note = f"{dense} layers left alone, not in the bits" if dense else ""

    return run


def _tensors(cache: Any) -> list[Tensor]:
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


def full(setup: Setup, row: Row) -> Callable[[Tensor], Run]:
    model = load_model(setup.folder).to(setup.device)
    return through_cache(setup, model, lambda: new_cache(model), row)


def packed(options: dict[str, Any]) -> Method:
    def method(setup: Setup, row: Row) -> Callable[[Tensor], Run]:
        model = load_model(setup.folder).to(setup.device)
        chosen: dict[str, Any] = {"bits": 2, **options}
        if chosen.pop("calibrated", False):
            assert setup.calibration_text is not None
            ids = text_tokens(setup.folder, setup.calibration_text)
            chosen["calibration"] = squat_fx.calibrate(model, ids)
        squat_fx.compile(
            model,
            residual_length=RESIDUAL_LENGTH,
            sink_length=SINK_LENGTH,
            inner=setup.inner,  # pyright: ignore[reportArgumentType]
            **chosen,
        )
        return through_cache(setup, model, lambda: new_cache(model), row)

    return method


def simulation(setup: Setup, row: Row) -> Callable[[Tensor], Run]:
    rounding = KiviSimulation(setup.prompt, 2, GROUP_SIZE, RESIDUAL_LENGTH, SINK_LENGTH)
    rounding.register()
    model = load_model(setup.folder, attention=NAME).to(setup.device)

    def run(windows: Tensor) -> Run:
        result = model(windows[:, :-1], use_cache=False, logits_to_keep=setup.tokens)
        yield from result.logits.unbind(1)

    return run


def quanto(**options: Any) -> Method:
    def method(setup: Setup, row: Row) -> Callable[[Tensor], Run]:
        model = load_model(setup.folder).to(setup.device)

        def make_cache() -> QuantizedCache:
            return QuantizedCache("quanto", model.config, nbits=2, **options)

        return through_cache(setup, model, make_cache, row)

    return method


def methods(setup: Setup) -> dict[str, Method]:
    """The settings, by name; ``full`` is the first because the others are compared with it."""
    found: dict[str, Method] = {"full": full}
    for name, options in PACKED.items():
        if options.get("calibrated") and setup.calibration_text is None:
            continue
        found[name] = packed(options)
    if "sliding_attention" not in _layer_types(setup.folder):
        found["simulation of kivi G=32, 2 bits"] = simulation  # it knows no windows
    if versions()["optimum-quanto"] == "not installed":
        typer.echo("no HF quanto settings: they need optimum-quanto", err=True)
        return found
    per_channel = {"axis_key": -1, "q_group_size": GROUP_SIZE, "residual_length": RESIDUAL_LENGTH}
    return found | {
        "HF quanto 2-bit default": quanto(),
        f"HF quanto 2-bit per-channel keys, g={GROUP_SIZE}": quanto(**per_channel),
    }


def _layer_types(folder: Path) -> Sequence[str]:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return getattr(config, "layer_types", None) or ()


def measure(
    name: str, method: Method, setup: Setup, reference: list[Tensor], advance: Advance
) -> Row:
    """Run one setting over all windows.

    ``reference`` holds log-probabilities ``[batch, vocabulary]`` of the full cache, a tensor per
    token and batch; it is filled if it is empty.
    """
    row = Row(name)
    run = method(setup, row)
    is_reference = not reference
    started = time.perf_counter()
    for number, windows in enumerate(setup.windows.split(setup.batch)):
        following = windows[:, setup.prompt + 1 :]
        sums = torch.zeros(3, len(windows), dtype=torch.float64, device=setup.device)
        for step, logits in enumerate(run(windows)):
            log_probs = logits.double().log_softmax(-1)
            if is_reference:
                reference.append(log_probs.float())
            truth = reference[number * setup.tokens + step].double()
            sums[0] -= log_probs.gather(1, following[:, step, None])[:, 0]
            sums[1] += (truth.exp() * (truth - log_probs)).sum(-1)
            sums[2] += truth.argmax(-1) == log_probs.argmax(-1)
            done = number * setup.batch * setup.tokens + (step + 1) * len(windows)
            advance(done / (len(setup.windows) * setup.tokens))
        for numbers, values in zip((row.nll, row.kl, row.top1), sums / setup.tokens, strict=True):
            numbers.extend(values.tolist())
    row.seconds = time.perf_counter() - started
    return row


def print_rows(rows: list[Row], setup: Setup, console: Console) -> None:
    for text in dict.fromkeys(setup.texts):
        title = f"{text}, prompt {setup.prompt}"
        table = Table("", "packed", "all", "ppl", "KL to full", "top-1", title=title, box=None)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            scores = row.of(text, setup.texts)
            table.add_row(
                row.name,
                f"{row.packed_bits:.3f}" if row.packed_bits else "–",
                f"{row.all_bits:.2f}" if row.all_bits else "–",
                f"{scores.ppl:.3f}",
                f"{mean(scores.kl):.4f} ± {standard_error(scores.kl):.4f}",
                f"{mean(scores.top1):.3f}",
            )
        console.print(table)


def main(
    text: Annotated[
        list[Path], typer.Option(help="UTF-8 text; repeat.", exists=True, dir_okay=False)
    ],
    model: Annotated[
        Path | None, typer.Option(help="Hugging Face model folder; SmolLM2-135M when left out.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows per text, spread over it.", min=1)] = 8,
    prompt: Annotated[int, typer.Option(help="Tokens fed in one call.", min=1)] = 1024,
    tokens: Annotated[int, typer.Option(help="Tokens then fed one by one.", min=1)] = 256,
    calibration_text: Annotated[
        Path | None, typer.Option(help="Another text, for the calibrated settings.", exists=True)
    ] = None,
    inner: Annotated[str, typer.Option(help="What compiles the rewritten graph.")] = "eager",
    only: Annotated[
        list[str] | None, typer.Option(help="Start of a setting's name besides full; repeat.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch: Annotated[int, typer.Option(help="Windows fed together.", min=1)] = 8,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the json.")] = None,
) -> None:
    """Perplexity, KL and bits of the packed cache, its simulation and its peers."""
    if threads:
        torch.set_num_threads(threads)
    folder = model_folder(model)
    leading = leading_tokens(folder)
    cut, names, records = [], [], []
    for path in text:
        ids = text_tokens(folder, path)
        try:
            found = spread(ids, windows, prompt + tokens + 1 - len(leading), path.name)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        cut.append(torch.cat([leading.expand(windows, -1), found], 1))
        names += [path.name] * windows
        records.append(text_record(path) | {"tokens": len(ids)})
    setup = Setup(
        folder,
        torch.cat(cut).to(device),
        tuple(names),
        prompt,
        tokens,
        inner,
        device,
        batch,
        calibration_text,
    )
    reference: list[Tensor] = []
    rows: list[Row] = []
    for name, method in methods(setup).items():
        if only and name != "full" and not name.startswith(tuple(only)):
            continue
        with torch.no_grad(), late_progress(name) as advance:
            row = measure(name, method, setup, reference, advance)
        rows.append(row)
        typer.echo(f"{name}: KL {mean(row.kl):.4f}, {row.seconds:.0f} s", err=True)
    print_rows(rows, setup, Console())
    options = {"windows": windows, "prompt": prompt, "tokens": tokens, "inner": inner}
    options |= {"device": device, "batch": batch, "calibration_text": calibration_text}
    result = {
        "command": command("quality.py", model, out, texts=text, **options),
        "versions": versions(),
        "model": folder.name,
        "dtype": "float32",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "residual_length": RESIDUAL_LENGTH,
        "sink_length": SINK_LENGTH,
        "texts": records,
        "settings": [row.record(setup.texts) for row in rows],
    }
    write_result(out, result)


if __name__ == "__main__":
    typer.run(main)
