"""What was rewritten, what was left alone and why, and how many bytes the caches hold."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_symbols

from squat_fx.codecs import Format
from squat_fx.joined import caches_in
from squat_fx.passes.records import AttentionSite, Rewriting, Skipped
from squat_fx.state import QuantizedKV
from squat_fx.storage import Storage


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of a cache.

    Attributes:
        stored: what is held, spare capacity, scales and exact tokens included.
        dense: what the same tokens would take as a dense tensor.
    """

    stored: int
    dense: int

    @property
    def ratio(self) -> float:
        """``dense / stored``."""
        return self.dense / self.stored if self.stored else float("nan")

    def __add__(self, other: CacheBytes) -> CacheBytes:
        return CacheBytes(self.stored + other.stored, self.dense + other.dense)


def cache_bytes(cache: Any) -> CacheBytes:
    """Bytes of every tensor in ``cache``: a Hugging Face cache object, or nested tuples, lists and
    dicts of tensors.
    """
    total, seen = CacheBytes(0, 0), set()
    for tensor in _tensors(cache):
        key = id(tensor._storage) if isinstance(tensor, QuantizedKV) else id(tensor)
        if key in seen:
            continue
        seen.add(key)
        dense = tensor.numel() * tensor.element_size()
        stored = tensor.storage_nbytes if isinstance(tensor, QuantizedKV) else dense
        total = total + CacheBytes(stored, dense)
    return total


def _tensors(cache: Any) -> Iterator[Tensor]:
    if isinstance(cache, Tensor):
        yield from caches_in(cache)
    elif isinstance(cache, dict):
        for item in cache.values():
            yield from _tensors(item)
    elif isinstance(cache, (list, tuple)):
        for item in cache:
            yield from _tensors(item)
    elif hasattr(cache, "layers"):
        for layer in cache.layers:
            yield from _tensors([x for x in vars(layer).values() if isinstance(x, Tensor)])
    else:
        for name in ("self_attention_cache", "cross_attention_cache"):
            if hasattr(cache, name):
                yield from _tensors(getattr(cache, name))


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph.

    Attributes:
        kind: ``"prefill"``, ``"decode"``, ``"mixed"`` or ``"untouched"``.
        sites, skipped, notes: see :class:`squat_fx.passes.records.Rewriting`.
        inner: what compiled the rewritten graph.
        static: whether no size symbol is among the inner graph's inputs, arena capacities aside.
        text: the rewritten graph, as Python code.
    """

    kind: str
    sites: tuple[AttentionSite, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    inner: str = "eager"
    static: bool = False
    text: str = ""

    @classmethod
    def of(cls, rewriting: Rewriting, inner: str, static: bool) -> GraphReport:
        """The report of a graph that went through the pipeline."""
        kinds = {site.kind for site in rewriting.sites} | {e.kind for e in rewriting.lone_edges}
        kinds = {"decode" if kind == "read" else kind for kind in kinds}
        kind = kinds.pop() if len(kinds) == 1 else ("mixed" if kinds else "untouched")
        text = rewriting.module.code
        return cls(
            kind,
            tuple(rewriting.sites),
            tuple(rewriting.skipped),
            tuple(rewriting.notes),
            inner,
            static,
            text,
        )

    def __str__(self) -> str:
        shape = "static" if self.static else "dynamic"
        lines = [
            f"{self.kind} graph ({self.inner}, {shape}): {len(self.sites)} attentions rewritten"
        ]
        groups: dict[str, list[int]] = {}
        for site in self.sites:
            text = f"keys {_describe(site.key.fmt)}; values {_describe(site.value.fmt)}"
            groups.setdefault(text, []).append(site.layer)
        lines += [f"  layers {ranges(layers)}: {text}" for text, layers in groups.items()]
        reasons: dict[str, list[Skipped]] = {}
        for skipped in self.skipped:
            reasons.setdefault(skipped.reason, []).append(skipped)
        for reason, items in reasons.items():
            layers = [s.layer for s in items if s.layer is not None]
            where = f"layers {ranges(layers)}" if layers else items[0].node
            lines.append(f"  left alone, {where}: {reason}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


@dataclass
class Report:
    """Everything known about one compiled model or function.

    Attributes:
        graphs: one entry per compiled graph, in order.
        notes: what happened outside graphs: eager fallbacks, copies that are not compiled.
        eager_calls: calls in which no compiled graph ran.
        runs: calls of compiled graphs, replayed ones among them.
        recordings, replays: of CUDA graphs.
        begun: replays that were launched when a call came in; see :mod:`squat_fx.head_start`.
        raised: layers that got more bits because they lost too much, and how many, 16 for all.
        arriving: errors that are still on their way from a GPU: when they are there, and what takes
            them.
    """

    graphs: list[GraphReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    eager_calls: int = 0
    runs: int = 0
    recordings: int = 0
    replays: int = 0
    begun: int = 0
    raised: dict[int, float] = field(default_factory=dict)
    arriving: tuple[Any, Callable[[], None]] | None = field(default=None, repr=False)
    _errors: dict[int, float] = field(default_factory=dict, repr=False)
    _runs_by_thread: dict[int, int] = field(default_factory=dict, repr=False)
    _storages: weakref.WeakSet[Storage] = field(default_factory=weakref.WeakSet, repr=False)

    @property
    def rewritten(self) -> int:
        """Attentions rewritten, over all graphs."""
        return sum(len(graph.sites) for graph in self.graphs)

    @property
    def skipped(self) -> list[Skipped]:
        """Attentions left alone, over all graphs."""
        return [s for graph in self.graphs for s in graph.skipped]

    @property
    def attention_errors(self) -> dict[int, float]:
        """By layer: how far what attention finds in the packed tokens of a prompt was from what was
        there, as a share of that; the largest of all prompts. See :mod:`squat_fx.guard`.
        """
        self.read_arrived(wait=True)
        return self._errors

    def read_arrived(self, wait: bool = False) -> None:
        """Take the errors that came from a GPU, or wait for them."""
        if self.arriving is None:
            return
        there, take = self.arriving
        if wait:
            there.synchronize()
        if there.query():
            self.arriving = None
            take()

    @property
    def live_bytes(self) -> CacheBytes:
        """Bytes of the caches that are alive now."""
        total = CacheBytes(0, 0)
        for storage in self._storages:
            dense = storage["dense"]
            size = (
                dense.shape[0]
                * dense.shape[1]
                * (storage.length - storage.first_read)
                * dense.shape[3]
                * dense.element_size()
            )
            total = total + CacheBytes(storage.nbytes, size)
        return total

    def count_run(self) -> None:
        """One more call of a compiled graph, by this thread."""
        self.runs += 1
        self._runs_by_thread[get_ident()] = self.runs_here + 1

    @property
    def runs_here(self) -> int:
        """Calls of compiled graphs by this thread."""
        return self._runs_by_thread.get(get_ident(), 0)

    def track(self, handle: QuantizedKV) -> QuantizedKV:
        """Count a handle's storage among the live caches."""
        if handle._storage.counted_by is not self:
            handle._storage.counted_by = self
            self._storages.add(handle._storage)
        return handle

    def note(self, text: str) -> None:
        """Add a note once."""
        if text not in self.notes:
            self.notes.append(text)

    def __str__(self) -> str:
        if not self.graphs and not self.notes and not self.eager_calls:
            return "squat_fx: nothing was compiled yet; call the model once"
        errors = self.attention_errors
        lines = [str(graph) for graph in self.graphs]
        if errors:
            numbers = ", ".join(f"{errors[layer]:.2f}" for layer in sorted(errors))
            where = ranges(errors)
            lines.append(f"error of attention over packed tokens, layers {where}: {numbers}")
        if self.eager_calls:
            lines.append(
                f"{self.eager_calls} calls ran eagerly, their caches were packed afterwards"
            )
        if self.recordings:
            lines.append(
                f"CUDA graphs: {self.replays} of {self.runs} calls were replays of "
                f"{self.recordings} recordings"
                + f", {self.begun} of them begun when the call came in"
                * bool(self.begun)
            )
        lines += [f"note: {note}" for note in self.notes]
        live = self.live_bytes
        if live.stored:
            lines.append(
                f"live caches: {live.stored / 2**20:.2f} MiB stored, "
                f"{live.dense / 2**20:.2f} MiB if dense ({live.ratio:.2f}x)"
            )
        return "\n".join(lines)


def _describe(fmt: Format) -> str:
    if fmt.layout == "dense":
        return "exact"
    name = fmt.codec.split(" ")[0]
    if fmt.latent:
        name += " calibrated"
    return (
        f"{name} {fmt.bits:g} bits per {fmt.stored_layout.describe(fmt)} "
        f"({fmt.packed_bits_per_element():.2f} stored bits, "
        f"{fmt.residual_length} newest and {fmt.sink_length} first tokens exact)"
    )


def ranges(numbers: Iterable[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    out: list[list[int]] = []
    for n in sorted(set(numbers)):
        if out and n == out[-1][-1] + 1:
            out[-1][1:] = [n]
        else:
            out.append([n])
    return ", ".join("-".join(map(str, r)) for r in out)


def is_static(
    examples: Sequence[Any], inputs: Sequence[Any], besides: AbstractSet[Any] = frozenset()
) -> bool:
    """Whether what feeds the inner graph holds no symbolic size, arena capacities aside, and those
    that depend on the symbols ``besides`` alone.
    """
    for fed in inputs:
        if fed.kind not in ("argument", "dense"):
            continue
        example = examples[fed.index]
        sizes = example.shape if isinstance(example, Tensor) else (example,)
        symbolic = [size for size in sizes if isinstance(size, torch.SymInt)]
        if any(not (besides and free_symbols(size) <= besides) for size in symbolic):
            return False
    return True
