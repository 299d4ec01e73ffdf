"""What a run shows and keeps: progress, the table, sample completions, metrics.jsonl, samples.jsonl and the curves."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import rich.table
from rich.console import Console
from rich.text import Text
from tqdm import tqdm

from grpo_kernels.files import replacing

if TYPE_CHECKING:  # a page is written from files alone, without a model's imports
    from grpo_kernels.training.loop import Sample

COLUMNS = (
    "step", "reward", "reward_std", "frac_reward_zero_std", "rewards/accuracy/mean", "rewards/format/mean",
    "completions/mean_length", "completions/clipped_ratio", "kl", "entropy", "clip_ratio/region_mean", "grad_norm",
    "learning_rate", "step_time",
)  # fmt: skip
_SCIENTIFIC = ("kl", "learning_rate")
_HEADING_EVERY = 12
_RATE_STEPS = 10  # that completions and tokens a second are taken over
_LONGEST_TEXT = 1000  # characters of a text that a terminal shows
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class _LinesFile:
    """One JSON object a line. A record is there as a whole or not at all, whenever the run or the disk ends."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def close(self) -> None:
        """Closes the file; nothing is buffered."""
        self._file.close()

    def _append(self, records: Sequence[dict[str, Any]]) -> None:
        text = "".join(json.dumps(_without_nan(record), allow_nan=False) + "\n" for record in records).encode()
        before, left = os.fstat(self._file.fileno()).st_size, memoryview(text)
        try:
            while left:  # a disk that fills up takes a part of a system call's bytes, and refuses the next
                left = left[self._file.write(left) :]
        except OSError:
            if len(left) < len(text):
                self._file.truncate(before)
            raise


class MetricsFile(_LinesFile):
    """``metrics.jsonl``: a record of each optimizer step and each evaluation; null for the mean of nothing."""

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record by one system call."""
        self._append([record])


class SamplesFile(_LinesFile):
    """``samples.jsonl``: a record of each completion kept, with its step and all that a sample has."""

    def write(self, step: int, samples: Sequence[Sample]) -> None:
        """Appends the samples of a step by one system call, each with all its fields, and those that rewards logged."""
        fields = [sample._asdict() for sample in samples]
        self._append([{"step": step, **(record.pop("extra", None) or {}), **record} for record in fields])


class Lines(NamedTuple):
    """What a file of JSON lines holds."""

    records: list[dict[str, Any]]
    note: str | None  # on a last line that was cut; None where every line is whole


def has_records(path: Path) -> bool:
    """Whether a file of lines is there and has any."""
    return path.is_file() and path.stat().st_size > 0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_lines(path: Path) -> Lines:
    """The records of a ``metrics.jsonl`` or ``samples.jsonl``, however the run that wrote it ended.

    A last line that cannot be read was cut by the end of the run or of the disk, and is left out with a note.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another line is not a JSON object with a number under ``step``; the message names it.
    """
    lines = [(number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), start=1) if line.strip()]
    records = []
    for number, line in lines:
        record = _record(line)
        if record is not None:
            records.append(record)
        elif number == lines[-1][0]:
            return Lines(records, f"{path.name}: line {number}, the last one, was cut and is left out")
        else:
            shown = line[:60].decode(errors="replace")
            raise ValueError(f"{path}:{number}: expected a JSON object with a number under 'step', got {shown!r}")
    return Lines(records, None)


def _without_nan(record: dict[str, Any]) -> dict[str, Any]:
    """None for NaN, which JSON has not; what is infinite is refused."""
    return {name: None if isinstance(value, float) and value != value else value for name, value in record.items()}


def _record(line: bytes) -> dict[str, Any] | None:
    """A line's record, or None where it is none."""
    try:
        record = json.loads(line)
    except ValueError:  # JSON or UTF-8 that stops in the middle; the caller says what comes of it
        return None
    is_record = isinstance(record, dict) and type(record.get("step")) in (int, float)
    return record if is_record and record["step"] * 0 == 0 else None  # finite


class Progress:
    """A progress bar over optimizer steps, with completions and tokens a second and tqdm's remaining time.

    Args:
        total: Optimizer steps.
        title: Stands before the bar.
        disable: No bar; None for none where standard error is no terminal.
        clock: Seconds.
    """

    def __init__(
        self, total: int, title: str, *, disable: bool | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.bar = tqdm(total=total, desc=title, disable=disable, dynamic_ncols=True)
        self._clock = clock
        self._done = deque([(clock(), 0.0, 0.0)], maxlen=_RATE_STEPS + 1)  # time, completions and tokens so far

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def update(self, *, completions: float, tokens: float, **values: float) -> None:
        """Counts one optimizer step.

        Args:
            completions: Those that it trained on.
            tokens: Of these completions.
            values: Shown beside the rates, under their names.
        """
        _, completions_before, tokens_before = self._done[-1]
        self._done.append((self._clock(), completions_before + completions, tokens_before + tokens))
        shown = [f"{name}={value:.3f}" for name, value in values.items()]
        completion_rate, token_rate = self.rates()
        shown += [f"{tqdm.format_sizeof(completion_rate)} completions/s", f"{tqdm.format_sizeof(token_rate)} tokens/s"]
        self.bar.set_postfix_str(", ".join(shown), refresh=False)
        self.bar.update()

    def rates(self) -> tuple[float, float]:
        """Completions and tokens a second over the last steps, sampling, evaluating and saving included; 0 at first."""
        (start, *before), (now, *after) = self._done[0], self._done[-1]
        if now <= start:
            return 0.0, 0.0
        completions, tokens = ((b - a) / (now - start) for a, b in zip(before, after, strict=True))
        return completions, tokens


class Table:
    """Rows of metrics under their names, printed above a progress bar. Names break at slashes and underscores."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar
        self._rows = 0
        self._columns: list[str] = []

    def row(self, metrics: dict[str, float]) -> None:
        """Prints the columns that ``metrics`` has, with the heading every dozen rows."""
        if self._rows % _HEADING_EVERY == 0:
            reward_means = [n for n in metrics if n.startswith("rewards/") and n.endswith("/mean") and n not in COLUMNS]
            self._columns = [name for name in COLUMNS if name in metrics] + reward_means
            self.bar.write("\n" + heading(self._columns))
        self._rows += 1
        cells = [_cell(name, metrics[name]).rjust(_width(name)) for name in self._columns]
        self.bar.write(" ".join(cells))


def heading(columns: Sequence[str]) -> str:
    """Column names over as many lines as the most broken one needs, aligned to the bottom, and a rule."""
    broken = [_break(name) for name in columns]
    height = max(map(len, broken))
    padded = [[""] * (height - len(lines)) + lines for lines in broken]
    widths = [_width(name) for name in columns]
    lines = [" ".join(cell[i].rjust(w) for cell, w in zip(padded, widths, strict=True)) for i in range(height)]
    return "\n".join([*lines, " ".join("-" * w for w in widths)])


def sample_text(step: int, samples: Sequence[Sample]) -> str:
    """Sample completions with their rewards, as plain text."""
    lines = [f"\nsample completions at step {step}"]
    for sample in samples:
        scores = [f"reward {sample.reward:.2f}"]
        if (advantage := sample.advantage) is not None:
            scores.append(f"advantage {advantage:+.2f}")
        lines.append(f"  {_shown(sample.prompt)} {_shown(sample.completion)}    [{', '.join(scores)}]")
    return "\n".join(lines)


def sample_table(step: int, samples: Sequence[Sample], width: int) -> str:
    """Sample completions as a table of ``width`` columns for a terminal, long texts folded into their column."""
    table = rich.table.Table(title=f"sample completions at step {step}", show_lines=True, width=width)
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("completion", ratio=5, overflow="fold")
    table.add_column("reward", justify="right", no_wrap=True)
    has_advantages = any(sample.advantage is not None for sample in samples)
    if has_advantages:
        table.add_column("advantage", justify="right", no_wrap=True)
    for sample in samples:
        cells = [Text(_shown(sample.prompt)), Text(_shown(sample.completion)), Text(f"{sample.reward:.2f}")]
        advantage = sample.advantage
        if has_advantages:
            cells.append(Text("" if advantage is None else f"{advantage:+.2f}"))
        table.add_row(*cells)
    buffer = io.StringIO()
    Console(file=buffer, width=width, force_terminal=True).print(table)
    return "\n" + buffer.getvalue().rstrip("\n")


def show_samples(step: int, samples: Sequence[Sample], bar: tqdm) -> None:
    """Prints sample completions above a progress bar: a table on a terminal, else plain text."""
    if sys.stdout.isatty():
        bar.write(sample_table(step, samples, shutil.get_terminal_size().columns))
    else:
        bar.write(sample_text(step, samples) + "\n")


def printable(text: str) -> str:
    """The text with control characters and lone surrogates spelled out, so that they steer no terminal or page."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def _shown(text: str) -> str:
    """A text for the terminal: the middle of a very long one is left out."""
    if len(text) > _LONGEST_TEXT:
        half = _LONGEST_TEXT // 2
        text = f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
    return printable(text)


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
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
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
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")


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
