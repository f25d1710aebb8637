"""Pictures of what was measured, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def plot_kernel(rows: Rows, out: Path) -> None:
    """Speedup over the fastest fp16 attention, one group of bars for each shape.

    Args:
        rows: of ``bench kernel``; those without a speedup are the baselines.
        out: the PNG file.
    """
    packed = [row for row in rows if "speedup" in row]
    shapes = list(dict.fromkeys(_shape(row) for row in packed))
    caches = list(dict.fromkeys(row["cache"] for row in packed))
    figure, axes = _axes(1)
    width = 0.8 / max(len(caches), 1)
    for i, cache in enumerate(caches):
        speedup = {_shape(row): row["speedup"] for row in packed if row["cache"] == cache}
        places = [x + (i - (len(caches) - 1) / 2) * width for x in range(len(shapes))]
        axes[0].bar(places, [speedup.get(shape, 0) for shape in shapes], width, label=cache)
    axes[0].axhline(1, color="black", linewidth=0.8)
    axes[0].set_xticks(range(len(shapes)), shapes, fontsize=8)
    axes[0].set_xlabel("query heads, KV heads, batch, tokens, head_dim")
    axes[0].set_ylabel("speedup over fp16")
    axes[0].legend(fontsize=8)
    _save(figure, out)


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


def _shape(row: dict[str, Any]) -> str:
    names = ("num_heads", "num_kv_heads", "batch", "tokens", "head_dim")
    return ", ".join(str(row[name]) for name in names)


def _line(row: dict[str, Any]) -> str:
    return f"{row['shape']}, {row['prompt']} + {row['new']}, {row['cache']}"


def _axes(count: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 + 4 * count, 4.5), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _save(figure: Any, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png", dpi=150)
