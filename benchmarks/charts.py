"""Results as PNG charts. Each holds a digest of the rows it was drawn from, so that a stale one is found."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from records import Results, Row
from tables import OURS, scaling

from grpo_kernels.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DIGEST = "Description"  # a keyword that the PNG format has
#: What the bars of time and error show, with a heading for each.
_PANELS = {
    "hidden": "hidden states to loss, dX, dW",
    "logprobs": "hidden states to log-probs",
    "upstream": "log-probs under any gradient",
    "logits": "logits to loss, dlogits",
}


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes the charts that the results have rows for; returns their paths."""
    written = []
    for name, (rows_of, plot) in _CHARTS.items():
        rows = rows_of(results)
        if rows:
            written.append(folder / f"{name}.png")
            _save(rows, plot, written[-1])
    return written


def stale(results: Results, folder: Path) -> list[str]:
    """Names of the charts that are missing or were drawn from other rows."""
    from PIL import Image

    found = []
    for name, (rows_of, _) in _CHARTS.items():
        rows, path = rows_of(results), folder / f"{name}.png"
        if not rows:
            continue
        if not path.exists() or Image.open(path).info.get(_DIGEST) != _digest(rows):
            found.append(name)
    return found


def _digest(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps([asdict(row) for row in rows], sort_keys=True).encode()).hexdigest()


def _save(rows: Sequence[Row], plot: Callable[[Sequence[Row]], object], path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = plot(rows)
        with replacing(path) as unfinished:
            figure.savefig(unfinished, dpi=130, format="png", metadata={_DIGEST: _digest(rows), "Software": None})


def _largest(results: Results) -> list[Row]:
    """Of each panel's work the title that most providers were timed for, dense, in fp32 where there is a choice."""
    chosen = []
    for work in _PANELS:
        rows = [row for row in results.rows if row.work == work and row.live == 1 and row.status == "ok"]
        if rows:
            titles = Counter(row.title for row in rows)
            most = max(rows, key=lambda row: (titles[row.title], row.dtype == "float32", row.shape["N"]))
            chosen += [row for row in rows if row.title == most.title]
    return chosen


def _bars(rows: Sequence[Row], value: Callable[[Row], float], unit: str, log: bool) -> object:
    from matplotlib.figure import Figure

    panels = [(work, [row for row in rows if row.work == work]) for work in _PANELS]
    panels = [(work, found) for work, found in panels if found]
    columns = min(2, len(panels))
    height = sum(max(len(found) for _, found in panels[i : i + columns]) for i in range(0, len(panels), columns))
    figure = Figure(figsize=(5.2 * columns, 0.26 * height + 1.2 * -(-len(panels) // columns)), layout="constrained")
    for k, (work, found) in enumerate(panels):
        axes = figure.add_subplot(-(-len(panels) // columns), columns, k + 1)
        found = sorted(found, key=value, reverse=True)
        colours = ["#c0392b" if row.provider.startswith(OURS) else "#9aa5b1" for row in found]
        axes.barh([row.provider for row in found], [value(row) for row in found], color=colours, height=0.7)
        for y, row in enumerate(found):
            text = f" {value(row):.1e}" if log else f" {value(row):.2f}x"
            axes.text(value(row), y, text, va="center", fontsize=8)
        axes.set(title=f"{_PANELS[work]}\n{_shape(found[0])}", xlabel=unit)
        axes.title.set_fontsize(9)
        axes.margins(x=0.2)
        if log:
            axes.set_xscale("log")
        else:
            axes.axvline(1, color="black", linewidth=0.8)
    return figure


def _shape(row: Row) -> str:
    return " ".join(f"{letter}={size}" for letter, size in row.shape.items()) + f" {row.dtype}"


def _time_over_floor(rows: Sequence[Row]) -> object:
    return _bars(rows, lambda row: row.over_floor, "time over the floor of the same run", log=False)


def _error(rows: Sequence[Row]) -> object:
    return _bars(rows, lambda row: max(row.errors.values()), "largest error against fp64", log=True)


#: None like that of ours.
_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#17becf", "#7f7f7f", "#bcbd22")


def _lines(axes: Axes, rows: Sequence[Row], x: Callable[[Row], float], y: Callable[[Row], float]) -> None:
    """A line for each provider: ours red, whole or in another pattern for each of its settings."""
    providers = list(dict.fromkeys(row.provider for row in rows))
    settings = [name for name in providers if name.startswith(f"{OURS},")]
    colours = dict(zip((name for name in providers if not name.startswith(OURS)), itertools.cycle(_COLOURS)))
    for provider in providers:
        points = sorted((x(row), y(row)) for row in rows if row.provider == provider)
        dashes = ("--", ":", "-.")[settings.index(provider) % 3] if provider in settings else "-"
        is_ours = provider.startswith(OURS)
        axes.plot(*zip(*points, strict=True), dashes, marker="o", markersize=3.5, linewidth=2 if is_ours else 1.2,
                  label=provider, color="#c0392b" if is_ours else colours[provider])  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _memory_over_tokens(rows: Sequence[Row]) -> object:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    _lines(axes, rows, lambda row: row.shape["N"], lambda row: row.peak_bytes / 1e9)
    head = f"H={rows[0].shape['H']} V={rows[0].shape['V']} {rows[0].dtype}"
    axes.set(title=f"hidden states to loss, dX, dW, {head}", xlabel="tokens", ylabel="peak memory beyond inputs, GB")
    axes.set_ylim(bottom=0)
    return figure


def _time_over_live_share(rows: Sequence[Row]) -> object:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    _lines(axes, rows, lambda row: row.live, lambda row: row.over_floor)
    axes.set(title=f"hidden states to loss, dX, dW, {_shape(rows[0])}", xlabel="share of rows that have a gradient",
             ylabel="time over the dense floor")  # fmt: skip
    axes.set_ylim(bottom=0)
    return figure


def _of_axis(axis: str) -> Callable[[Results], list[Row]]:
    return lambda results: [row for rows in scaling(results)[axis].values() for row in rows]


#: By file name: which rows, and how they are drawn.
_CHARTS: dict[str, tuple[Callable[[Results], list[Row]], Callable[[Sequence[Row]], object]]] = {
    "time-over-floor": (lambda results: [r for r in _largest(results) if r.provider != r.floor], _time_over_floor),
    "memory-over-tokens": (
        lambda results: [row for row in _of_axis("N")(results) if row.peak_bytes is not None],
        _memory_over_tokens,
    ),
    "time-over-live-share": (_of_axis("live"), _time_over_live_share),
    "error": (lambda results: [row for row in _largest(results) if row.errors], _error),
}
