"""Which architectures of transformers get a packed cache: measured on tiny random models.

:func:`cover` generates with an untouched tiny model and with the same model compiled with an exact
cache (``codec="none"``), without and with padding, and compares. :func:`sweep` does that for many
architectures, each in a process of its own; :func:`table` writes the rows down.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import connection
from typing import Any

import torch
from torch import Tensor, nn

import squat_fx
from squat_fx import tiny
from squat_fx.codecs import Lossless
from squat_fx.packed import PackedTensor

ATTENTIONS = ("sdpa", "eager")
PROMPT, STEPS, PADS = 12, 10, 5
TOLERANCE = 1e-4  # of logits, fp32, where a near tie gives another token
SECONDS = 300  # after which a process is given up
DIED, LATE = "the process died", "no end in sight"

_KINDS = {
    "DynamicLayer": "full",
    "DynamicSlidingWindowLayer": "sliding",
    "DynamicIndexedLayer": "indexed",
    "LinearAttentionLayer": "linear",
    "LinearAttentionAndFullAttentionLayer": "full",
}


@dataclass
class Row:
    """One architecture with one attention implementation.

    Attributes:
        architecture, attention: the model type; ``"sdpa"`` or ``"eager"``.
        layers: how many cache layers of each kind: ``full``, ``sliding``, ``latent`` (MLA), ...
        packed: how many of them hold packed keys and values after generating.
        left: why attentions were left alone, each reason with the number of layers in one graph.
        graphs: compiled graphs of a generation without a mask, and how many more with padding.
        equal: whether both generations are as the untouched model's; None if nothing ran.
        difference: the largest difference of logits up to the first token that differs.
        not_run: why the untouched model does not build or run like this.
        error: what went wrong with ours that did not with the untouched model.
    """

    architecture: str
    attention: str
    layers: dict[str, int] = field(default_factory=dict)
    packed: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    graphs: tuple[int, ...] = ()
    equal: bool | None = None
    difference: float = 0.0
    not_run: str = ""
    error: str = ""

    @property
    def has_full(self) -> bool:
        """Whether there are full-attention layers to rewrite."""
        return self.layers.get("full", 0) > 0

    @property
    def is_full_packed(self) -> bool:
        """Whether all full-attention layers are packed."""
        return self.packed.get("full", 0) == self.layers.get("full", 0)

    @property
    def is_unexplained(self) -> bool:
        """Whether full-attention layers are not packed, and no reason is given."""
        return self.has_full and not self.is_full_packed and not self.left

    def facts(self) -> dict[str, Any]:
        """The row without what depends on the machine."""
        return {k: v for k, v in asdict(self).items() if k != "difference"}


def cover(architecture: str, attention: str) -> Row:
    """Measure one architecture in this process."""
    row = Row(architecture, attention)
    try:
        config = tiny.tiny_config(architecture, attention)
        model = tiny.tiny_model(architecture, config)
        prompts = [_prompt(model, padded) for padded in (False, True)]
        expected = [_generate(model, *prompt) for prompt in prompts]
    except Exception as error:
        row.not_run = _in_a_line(error)
        return row
    row.layers = _layers(expected[0][2], config)
    try:
        codec = Lossless(group_size=4)
        squat_fx.compile(model, codec=codec, residual_length=4, sink_length=2, inner="eager")
        report, graphs = squat_fx.report(model), 0
        for prompt, wanted in zip(prompts, expected, strict=True):
            found = _generate(model, *prompt)
            row.graphs = (*row.graphs, len(report.graphs) - graphs)
            graphs = len(report.graphs)
            row.difference = max(row.difference, _difference(wanted, found))
            row.packed = _layers(found[2], config, packed=True)
            del found
        row.equal = row.difference <= TOLERANCE
        row.left = _left(report)
        if failed := [note for note in report.notes if "failed" in note]:
            row.error = failed[0]
    except Exception as error:
        row.error = _in_a_line(error)
    return row


def sweep(
    names: Sequence[str] | None = None, attentions: Sequence[str] = ATTENTIONS, jobs: int = 1
) -> Iterator[Row]:
    """A row for each architecture (all of them, if none are named) and attention implementation, as
    they get ready in ``jobs`` processes at a time.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    fork = multiprocessing.get_context("fork")  # so that nothing is imported anew
    waiting = [(n, a) for n in names or tiny.architectures() for a in attentions]
    running: dict[Any, tuple[Any, Row, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            row = Row(*waiting.pop(0))
            receive, send = fork.Pipe(duplex=False)
            process = fork.Process(target=_cover_and_send, args=(row, send))
            process.start()
            send.close()
            running[receive] = process, row, time.monotonic()
        ready = connection.wait(list(running), timeout=1.0)
        late = [r for r, (*_, began) in running.items() if time.monotonic() - began > SECONDS]
        for receive in {*ready, *late}:
            process, row, _ = running.pop(receive)
            try:
                row = receive.recv() if receive in ready else replace(row, error=LATE)
            except EOFError:
                row = replace(row, error=DIED)
            process.kill()
            process.join()
            yield row


def _cover_and_send(row: Row, send: Any) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    send.send(cover(row.architecture, row.attention))
    send.close()
    os._exit(0)


def _in_a_line(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:160]}"


def _prompt(model: nn.Module, padded: bool) -> tuple[Tensor, Tensor | None]:
    """Two prompts, and a mask if the second one is shorter."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(6, tiny.VOCABULARY, (2, PROMPT), generator=generator)
    if not padded:
        return ids, None
    mask = torch.ones_like(ids)
    mask[1, :PADS] = 0
    return ids * mask, mask


def _generate(model: Any, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Any]:
    """Tokens ``[batch, STEPS]``, their logits, and the cache."""
    given = {} if mask is None else {"attention_mask": mask}
    with torch.no_grad():
        out = model.generate(
            ids, **given, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False,
            num_beams=1, use_cache=True, pad_token_id=0, eos_token_id=None,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    return out.sequences[:, -STEPS:], torch.stack(out.logits, 1), out.past_key_values


def _difference(expected: tuple[Tensor, Tensor, Any], found: tuple[Tensor, Tensor, Any]) -> float:
    """The largest difference of logits up to the first token that differs, and there."""
    differs = (expected[0] != found[0]).any(0).nonzero()
    steps = STEPS if not len(differs) else int(differs[0]) + 1
    difference = (expected[1][:, :steps] - found[1][:, :steps]).abs().max().item()
    return difference if difference == difference else float("inf")


def _layers(cache: Any, config: Any, packed: bool = False) -> dict[str, int]:
    """How many layers of a cache are of each kind; with ``packed``, those that are packed."""
    cache = getattr(cache, "self_attention_cache", cache)
    counts: Counter[str] = Counter()
    for layer in getattr(cache, "layers", None) or ():
        keys = getattr(layer, "keys", None)
        name = _KINDS.get(type(layer).__name__, type(layer).__name__)
        if name != "linear" and not (isinstance(keys, Tensor) and keys.numel()):
            continue  # a layer that caches nothing, such as an MLP, or reads another one's cache
        if name == "full" and getattr(config, "kv_lora_rank", None):
            name = "latent"
        if not packed or isinstance(keys, PackedTensor):
            counts[name] += 1
    return dict(counts)


def _left(report: Any) -> dict[str, int]:
    """Reasons, and the largest number of attentions in one graph that were left for it."""
    counts: Counter[str] = Counter()
    for graph in report.graphs:
        counts |= Counter(skipped.reason for skipped in graph.skipped)
    return dict(sorted(counts.items()))


# writing it down ----------------------------------------------------------------------------------


def summary(rows: Sequence[Row]) -> list[str]:
    """The counts, a sentence each."""
    lines = []
    for attention in ATTENTIONS:
        mine = [r for r in rows if r.attention == attention]
        ran = [r for r in mine if not r.not_run]
        full = [r for r in ran if r.has_full]
        packed = [r for r in full if r.is_full_packed and not r.error]
        wrong = [r for r in ran if r.equal is False]
        failed = [r for r in ran if r.error]
        share = f"{len(packed) / len(full):.1%}" if full else "none"
        lines.append(
            f"`{attention}`: {len(ran)} of {len(mine)} architectures build tiny and generate; "
            f"{len(full)} have full-attention layers, and in {len(packed)} of these ({share}) all "
            f"of them are packed. Wrong outputs: {len(wrong)}. Failures: {len(failed)}."
        )
    return lines


def table(rows: Sequence[Row]) -> list[str]:
    """A line of Markdown for each row that ran, with its head."""
    lines = [
        "| architecture | attention | layers packed | graphs | as the dense cache | left alone |",
        "|---|---|---|---|---|---|",
    ]
    return lines + [line(row) for row in rows if not row.not_run]


def line(row: Row) -> str:
    """A row of :func:`table`."""
    layers = ", ".join(
        f"{row.packed.get(kind, 0)} of {count} {kind}" for kind, count in row.layers.items()
    )
    left = "; ".join(f"{reason} ({count})" for reason, count in row.left.items())
    graphs = " + ".join(map(str, row.graphs))
    equal = row.error or {True: "yes", False: "**no**", None: ""}[row.equal]
    cells = (row.architecture, row.attention, layers or "no cache", graphs, equal, left)
    return "| " + " | ".join(cells) + " |"


def to_json(rows: Sequence[Row], versions: Any) -> dict[str, Any]:
    """What is kept of a sweep."""
    return {"versions": dict(versions), "rows": [asdict(row) for row in rows]}


def from_json(kept: dict[str, Any]) -> tuple[list[Row], dict[str, str]]:
    """The rows and versions of :func:`to_json`."""
    rows = [Row(**row | {"graphs": tuple(row["graphs"])}) for row in kept["rows"]]
    return rows, kept["versions"]


def document(rows: Sequence[Row], versions: dict[str, str]) -> str:
    """``docs/supported-models.md``."""
    not_run = [f"| {r.architecture} | {r.attention} | {r.not_run} |" for r in rows if r.not_run]
    not_run += [f"| {name} | | {reason} |" for name, reason in sorted(tiny.NOT_BUILT.items())]
    lines = [HEAD, *(f"* {text}" for text in summary(rows)), "", *table(rows), "", TAIL, *not_run]
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    return "\n".join(lines).format(versions=names, steps=STEPS, prompt=PROMPT) + "\n"


HEAD = """# Supported models

Generated by `python benchmarks/coverage.py` with {versions}; a test compares a sample with what is
measured there. For every causal-LM architecture of transformers a tiny random model was built from
its config, with one layer of each kind, and generated {steps} tokens for two prompts of {prompt},
first as it is and then compiled with the exact codec `none`, so that whatever differs is a fault
of the rewriting. *As the dense cache*: all logits within 1e-4 in fp32, and the same greedy tokens
up to near ties, without a mask and with left padding. *Graphs*: compiled for a generation without
a mask, and how many more with padding. *Left alone*: reasons, each with its attentions in one
graph. `squat-fx explain NAME` prints the whole report for one architecture.
"""
TAIL = """## Not measured

These have no such attention implementation in transformers, do not generate with an untouched
model, or are not built from a config alone.

| architecture | attention | why |
|---|---|---|"""
