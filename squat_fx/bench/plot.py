"""Pictures of what was measured, as PNG files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
LEAST_KL = 1e-6  # as far down as it is drawn: an exact cache has none


def plot_kernel(rows: Rows, out: Path) -> None:
    """Speedup over the fastest fp16 attention: bars by shape, and lines against the context.

    Args:
        rows: of ``bench kernel``; those without a speedup are the baselines.
        out: the PNG file.
    """
    packed = [row for row in rows if "speedup" in row]
    figure, axes = _axes(2)
    _plot_bars(packed, axes[0])
    _plot_contexts(packed, axes[1])
    for axis in axes:
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylim(bottom=0)
        axis.set_ylabel("speedup over fp16")
        axis.legend(fontsize=7)
    _save(figure, out)


def _plot_bars(packed: Rows, axis: Any) -> None:
    """One group of bars for each shape that every cache was measured at."""
    caches = list(dict.fromkeys(row["cache"] for row in packed))
    found = {(_shape(row), row["cache"]): row["speedup"] for row in packed}
    shapes = list(dict.fromkeys(shape for shape, _ in found))
    shapes = [s for s in shapes if all((s, cache) in found for cache in caches)]
    width = 0.8 / max(len(caches), 1)
    for i, cache in enumerate(caches):
        places = [x + (i - (len(caches) - 1) / 2) * width for x in range(len(shapes))]
        axis.bar(places, [found[shape, cache] for shape in shapes], width, label=cache)
    axis.set_xticks(range(len(shapes)), [s.replace(", ", "\n") for s in shapes], fontsize=7)
    axis.set_xlabel("query heads, KV heads, batch, tokens, head_dim")


def _plot_contexts(packed: Rows, axis: Any) -> None:
    """One line for each cache and batch that was measured at three contexts or more."""
    lines: dict[tuple[Any, ...], list[tuple[int, float]]] = {}
    for row in packed:
        heads = (row["num_heads"], row["num_kv_heads"], row["head_dim"])
        line = lines.setdefault((*heads, row["batch"], row["cache"]), [])
        line.append((row["tokens"], row["speedup"]))
    for (num_heads, num_kv_heads, _, batch, cache), points in lines.items():
        if len(points) > 2:
            label = f"{cache}, batch {batch}, heads {num_heads} / {num_kv_heads}"
            axis.plot(*zip(*sorted(points), strict=True), "o-", label=label)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("tokens")


def plot_generate(rows: Rows, out: Path) -> None:
    """Throughput and peak memory against the batch, a line for each model, lengths and cache.

    Args:
        rows: of ``bench generate``; those with an error have no point.
        out: the PNG file.
    """
    done = [row for row in rows if "error" not in row]
    figure, axes = _axes(2)
    for name in dict.fromkeys(_line(row) for row in done):
        line = sorted((row for row in done if _line(row) == name), key=lambda row: row["batch"])
        batches = [row["batch"] for row in line]
        axes[0].plot(batches, [row["tokens_per_second"] for row in line], "o-", label=name)
        peaks = [(row["batch"], row["peak_gib"]) for row in line if "peak_gib" in row]
        axes[1].plot(*zip(*peaks, strict=True) if peaks else ((), ()), "o-", label=name)
    for axis, label in zip(axes, ("tokens a second", "peak GiB"), strict=True):
        axis.set_xlabel("batch")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    if done:
        axes[0].legend(fontsize=7)
    _save(figure, out)


def plot_eval(rows: Rows, out: Path) -> None:
    """KL against the bits of an element, the best at each size joined; errors layer by layer.

    Args:
        rows: of ``eval``; the first is the full cache.
        out: the PNG file.
    """
    layered = [row for row in rows if row["attention_error"]]
    figure, axes = _axes(2, height=max(4.5, 0.14 * len(layered)))
    _plot_front(rows[1:], axes[0])
    _plot_layers(layered, axes[1])
    _save(figure, out)


def _plot_front(rows: Rows, axis: Any) -> None:
    """A line for each cache through its widths; one more through those that nothing beats.

    A point is the mean over texts.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        kls = [scores["kl"] for scores in row["texts"].values()]
        name, _, rest = row["name"].partition(", ")
        name += ", calibrated" * rest.endswith("calibrated")
        point = row["effective_bits"], max(sum(kls) / len(kls), LEAST_KL)
        lines.setdefault(name, []).append(point)
    marks = itertools.cycle("osD^vP*X<>")
    for name, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), next(marks) + ":", label=name,
                  linewidth=0.6, markersize=4)  # fmt: skip
    points = [point for line in lines.values() for point in line]
    front = [p for p in sorted(points) if all(p[1] <= q[1] for q in points if q[0] <= p[0])]
    axis.plot(*zip(*front, strict=True), "-", color="black", linewidth=1, label="front")
    axis.set_xlabel("bits an element, everything counted")
    axis.set_ylabel("KL to the full cache, nats a token")
    axis.set_yscale("log")
    axis.legend(fontsize=6)


def _plot_layers(rows: Rows, axis: Any) -> None:
    """A row for each cache, a column for each layer: the relative error of attention's output."""
    layers = sorted({int(layer) for row in rows for layer in row["attention_error"]})
    if not layers:
        axis.set_visible(False)
        return
    errors = [[row["attention_error"].get(str(n), float("nan")) for n in layers] for row in rows]
    image = axis.imshow(errors, aspect="auto", vmin=0, vmax=1, interpolation="nearest")
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=6)
    axis.set_xticks(range(len(layers)), [str(n) for n in layers], fontsize=6)
    axis.set_xlabel("layer")
    axis.set_title("relative error of attention's output", fontsize=8)
    axis.figure.colorbar(image, ax=axis)


def _shape(row: dict[str, Any]) -> str:
    names = ("num_heads", "num_kv_heads", "batch", "tokens", "head_dim")
    return ", ".join(str(row[name]) for name in names)


def _line(row: dict[str, Any]) -> str:
    return f"{row['shape']}, {row['prompt']} + {row['new']}, {row['cache']}"


def _axes(count: int, height: float = 4.5) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 + 4 * count, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _save(figure: Any, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png", dpi=150)
