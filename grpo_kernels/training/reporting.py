"""What a run shows and keeps: the progress bar, the table, sample completions, metrics.jsonl and the curves."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from grpo_kernels.training.loop import Sample

COLUMNS = (
    "step", "reward", "reward_std", "frac_reward_zero_std", "rewards/accuracy/mean", "rewards/format/mean",
    "completions/mean_length", "completions/clipped_ratio", "kl", "entropy", "clip_ratio/region_mean", "grad_norm",
    "learning_rate", "step_time",
)  # fmt: skip
_SCIENTIFIC = ("kl", "learning_rate")
_HEADING_EVERY = 12


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line. A record is there as a whole or not at all, whenever the run ends."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record by one system call."""
        self._file.write((json.dumps(record) + "\n").encode())

    def close(self) -> None:
        """Closes the file; nothing is buffered."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Table:
    """Rows of metrics under their names, printed above a progress bar. Names break at slashes and underscores."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar
        self._rows = 0
        self._columns: list[str] = []

    def row(self, metrics: dict[str, float]) -> None:
        """Prints the columns that ``metrics`` has, with the heading every dozen rows."""
        if self._rows % _HEADING_EVERY == 0:
            reward_means = [n for n in metrics if n.startswith("rewards/") and n.endswith("/mean") and n not in COLUMNS]
            self._columns = [name for name in COLUMNS if name in metrics] + reward_means
            self._bar.write("\n" + heading(self._columns))
        self._rows += 1
        cells = [_cell(name, metrics[name]).rjust(_width(name)) for name in self._columns]
        self._bar.write(" ".join(cells))


def heading(columns: Sequence[str]) -> str:
    """Column names over as many lines as the most broken one needs, aligned to the bottom, and a rule."""
    broken = [_break(name) for name in columns]
    height = max(map(len, broken))
    padded = [[""] * (height - len(lines)) + lines for lines in broken]
    widths = [_width(name) for name in columns]
    lines = [" ".join(cell[i].rjust(w) for cell, w in zip(padded, widths, strict=True)) for i in range(height)]
    return "\n".join([*lines, " ".join("-" * w for w in widths)])


def sample_text(step: int, samples: Sequence[Sample]) -> str:
    """Sample completions with their rewards, for the terminal."""
    lines = [f"\nsample completions at step {step}"]
    for sample in samples:
        lines.append(f"  {sample.prompt} {sample.completion}    [reward {sample.reward:.2f}]")
    return "\n".join(lines)


def plot_curves(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws reward, accuracy, KL and clip fraction over optimizer steps into a PNG.

    Args:
        records: Those of ``metrics.jsonl``; a panel whose metric no record has says so.
        path: Written as a whole, then renamed into place.
    """
    from matplotlib.figure import Figure  # seconds of import that only the end of a run needs

    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = (
        ("reward", "reward", "reward"),
        ("rewards/accuracy/mean", "accuracy", "accuracy"),
        ("kl", "KL to the reference", "nats per token"),
        ("clip_ratio/region_mean", "clip fraction", "share of tokens"),
    )
    for axes, (name, title, unit) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        points = [(r["step"], r[name]) for r in records if name in r]
        if points:
            axes.plot(*zip(*points, strict=True), linewidth=1.2, label="training samples")
        else:
            axes.text(0.5, 0.5, f"no {name} in this run", ha="center", transform=axes.transAxes)
        axes.set(title=title, xlabel="optimizer step", ylabel=unit)
        axes.grid(alpha=0.3)
        if title == "accuracy":
            for key, label in (("eval_accuracy", "held out, T = 1"), ("eval_accuracy_greedy", "held out, greedy")):
                held_out = [(r["step"], r[key]) for r in records if key in r]
                if held_out:
                    axes.plot(*zip(*held_out, strict=True), "o--", label=label)
        if axes.lines:
            axes.legend()
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, dpi=120, format="png")
    unfinished.replace(path)


def _break(name: str) -> list[str]:
    """A name cut after slashes and underscores into the fewest lines of at most 8 characters, or one word."""
    lines = [""]
    for word in re.findall(r"[^/_]+[/_]?", name):
        if lines[-1] and len(lines[-1] + word) > 8:
            lines.append("")
        lines[-1] += word
    return lines


def _width(name: str) -> int:
    return max(7 if name in _SCIENTIFIC else 5, *map(len, _break(name)))


def _cell(name: str, value: float) -> str:
    if name == "step":
        return str(int(value))
    if name in _SCIENTIFIC:
        return f"{value:.1e}"
    return f"{value:.3f}"
