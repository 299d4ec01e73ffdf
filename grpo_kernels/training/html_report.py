"""A run's folder as one HTML page: curves, samples over time, configuration. It opens from disk and loads nothing."""

from __future__ import annotations

import html
import json
import math
import platform
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from grpo_kernels.files import replace_text
from grpo_kernels.training.html_page import page
from grpo_kernels.training.reporting import printable, read_lines
from grpo_kernels.training.svg_chart import COLORS, Series, line_chart, number
from grpo_kernels.version import __version__

Record = dict[str, Any]
Curves = dict[str, dict[float, float]]  # metric to step to value

#: Title, unit and lines of each chart. A line is a metric with its label; one that the run lacks is left out.
_PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Reward", "", (("reward", "mean"),)),
    ("Accuracy", "share of completions",
     (("rewards/accuracy/mean", "training samples"), ("eval_accuracy", "held out, temperature 1"),
      ("eval_accuracy_greedy", "held out, greedy"))),
    ("Spread of rewards", "", (("reward_std", "standard deviation"),)),
    ("Groups whose rewards are all equal", "share of groups", (("frac_reward_zero_std", "share"),)),
    ("Completion length", "tokens",
     (("completions/mean_length", "mean"), ("completions/min_length", "shortest"),
      ("completions/max_length", "longest"))),
    ("Cut at the length limit", "share of completions", (("completions/clipped_ratio", "share"),)),
    ("KL to the reference", "nats per token", (("kl", "KL"),)),
    ("Entropy", "nats per token", (("entropy", "entropy"),)),
    ("Clipped", "share of tokens",
     (("clip_ratio/region_mean", "either side"), ("clip_ratio/low_mean", "low"), ("clip_ratio/high_mean", "high"))),
    ("Loss", "", (("loss", "loss"),)),
    ("Gradient norm", "before clipping", (("grad_norm", "norm"),)),
    ("Learning rate", "", (("learning_rate", "rate"),)),
    ("Time of a step", "seconds", (("step_time", "time"),)),
)  # fmt: skip
_TILES = (
    ("eval_accuracy", "held-out accuracy, temperature 1"),
    ("eval_accuracy_greedy", "held-out accuracy, greedy"),
    ("reward", "reward"),
    ("completions/mean_length", "tokens of a completion"),
)
_MOST_STEPS, _MOST_SAMPLES = 100, 16  # that the page shows samples of, and of each of them
_SHORT = 60  # characters of a text that stands in a line with others


def write_report(run_dir: Path | str) -> Path:
    """Writes ``report.html`` into a run's folder, as a whole or not at all.

    It needs ``metrics.jsonl``. ``samples.jsonl``, ``config.yaml`` or ``config.json``, and ``versions.json`` are shown
    where they are there. A step that was trained twice, as after a resumption, shows what came last.

    Args:
        run_dir: The folder, of a run that may still be going on.

    Raises:
        FileNotFoundError: There is no ``metrics.jsonl``.
        ValueError: A file is damaged; the message names it, and the line.
    """
    folder = Path(run_dir)
    metrics, samples = read_lines(folder / "metrics.jsonl"), None
    if (folder / "samples.jsonl").exists():
        samples = read_lines(folder / "samples.jsonl")
    config = next((path for name in ("config.yaml", "config.json") if (path := folder / name).exists()), None)
    curves = _curves(metrics.records)
    name = folder.resolve().name
    parts = [f"<h1>{_text(name)}</h1>", _subtitle(curves)]
    parts += [_note(found.note) for found in (metrics, samples) if found is not None and found.note]
    if not curves:
        parts.append(_note("metrics.jsonl has no record yet"))
    parts += [_tiles(curves), _charts(curves)]
    if samples is not None:
        parts.append(_samples(samples.records))
    parts.append(_summary(curves))
    if config is not None:
        read = yaml.safe_load if config.suffix == ".yaml" else json.loads
        parts.append(_settings("Configuration", _mapping(config, read)))
    if (folder / "versions.json").exists():
        parts.append(_settings("Versions", _mapping(folder / "versions.json", json.loads)))
    text = page(printable(f"{name}: GRPO run"), "\n".join(filter(None, parts)))
    return replace_text(folder / "report.html", text)


def versions() -> dict[str, str]:
    """What a run depends on, by name, for ``versions.json``."""
    found = {"grpo_kernels": __version__, "python": platform.python_version(), "platform": platform.platform()}
    found["torch"] = torch.__version__
    for name in ("transformers", "accelerate", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def _curves(records: Sequence[Record]) -> Curves:
    """The numbers under each name by step, in the order of steps."""
    curves: Curves = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and type(value) in (int, float):
                curves.setdefault(name, {})[record["step"]] = float(value)
    return {name: dict(sorted(by_step.items())) for name, by_step in curves.items()}


def _subtitle(curves: Curves) -> str:
    steps = [step for name, by_step in curves.items() if not name.startswith("eval_") for step in by_step]
    if not steps:
        return ""
    time = f" in {sum(curves['step_time'].values()):.0f} s" if "step_time" in curves else ""
    return f'<p class="faint">{number(max(steps))} optimizer steps{time}</p>'


def _tiles(curves: Curves) -> str:
    tiles = []
    for name, title in _TILES:
        if name in curves:
            values = list(curves[name].values())
            change = number(values[0]) if len(values) == 1 else f"{number(values[0])} → {number(values[-1])}"
            tiles.append(f'<div class="tile"><span class="faint">{title}</span><strong>{change}</strong></div>')
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _charts(curves: Curves) -> str:
    """A chart for each panel that the run has metrics for, and behind a fold one for each other metric."""
    rewards = [(name, name.split("/")[1]) for name in curves if name.startswith("rewards/") and name.endswith("/mean")]
    shown_by_panels = {name for _, _, lines in _PANELS for name, _ in lines}
    held_out = [(name, name.removeprefix("eval_")) for name in curves if name.startswith("eval_")]
    held_out = [line for line in held_out if line[0] not in shown_by_panels and not _is_end(line[0], curves)]
    panels = [*_PANELS[:2], ("Rewards by function", "mean", tuple(rewards)), ("Held out", "", tuple(held_out)),
              *_PANELS[2:]]  # fmt: skip
    shown = {name for _, _, lines in panels for name, _ in lines}
    others = [(name, "", ((name, name),)) for name in curves if name not in shown and not _is_end(name, curves)]
    html_parts = []
    if charts := "".join(_chart(curves, *panel) for panel in panels):
        html_parts.append(f'<h2>Curves</h2><div class="charts">{charts}</div>')
    if charts := "".join(_chart(curves, *panel) for panel in others):
        html_parts.append(f'<details><summary>Other metrics</summary><div class="charts">{charts}</div></details>')
    return "\n".join(html_parts)


def _is_end(name: str, curves: Curves) -> bool:
    """Whether a metric is an end of another's interval."""
    return any(name.endswith(end) and name.removesuffix(end) in curves for end in ("_low", "_high"))


def _chart(curves: Curves, title: str, unit: str, lines: Iterable[tuple[str, str]]) -> str:
    series = []
    for name, label in lines:
        if name in curves:
            lows, highs = curves.get(f"{name}_low", {}), curves.get(f"{name}_high", {})
            bars = [(step, lows[step], highs[step]) for step in lows if step in highs]
            series.append(Series(label, list(curves[name].items()), name.startswith("eval_"), bars))
    drawing = line_chart(series, title=printable(title))
    if not drawing:
        return ""
    keys = [f'<span class="key s{k % COLORS}">{_text(line.label)}</span>' for k, line in enumerate(series)]
    legend = f"<div>{''.join(keys)}</div>" if len(series) > 1 else ""
    caption = f"<figcaption><b>{_text(title)}</b><span>{_text(unit)}</span>{legend}</figcaption>"
    return f"<figure>{caption}{drawing}</figure>"


def _summary(curves: Curves) -> str:
    heads = ("metric", "first", "last", "lowest", "highest")
    rows = []
    for name in sorted(curves):
        values = list(curves[name].values())
        finite = [value for value in values if abs(value) < math.inf] or values
        numbers = (values[0], values[-1], min(finite), max(finite))
        cells = "".join(f'<td class="number">{number(value)}</td>' for value in numbers)
        rows.append(f"<tr><td>{_text(name)}</td>{cells}</tr>")
    if not rows:
        return ""
    head = f"<th>{heads[0]}</th>" + "".join(f'<th class="number">{title}</th>' for title in heads[1:])
    return f'<h2>Metrics</h2><div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _samples(records: Sequence[Record]) -> str:
    """A fold for each step, the last one open. Of very many steps and samples some are left out, with a note."""
    by_step: dict[float, list[Record]] = {}
    before = -math.inf
    for record in records:
        step = record["step"]
        if step < before:  # the run was resumed from here: what an earlier one sampled at this step and later is void
            by_step = {kept: of_step for kept, of_step in by_step.items() if kept < step}
        before = step
        by_step.setdefault(step, []).append(record)
    if not by_step:
        return ""
    steps = sorted(by_step)
    last = len(steps) - 1
    chosen = sorted({round(k * last / (_MOST_STEPS - 1)) for k in range(_MOST_STEPS)} if last else {0})
    left_out = []
    if len(chosen) < len(steps):
        left_out.append(f"{len(chosen)} of {len(steps)} steps")
    if max(map(len, by_step.values())) > _MOST_SAMPLES:
        left_out.append(f"at most {_MOST_SAMPLES} completions of a step")
    parts = [f'<p class="faint">Shown: {", ".join(left_out)}; all are in samples.jsonl.</p>' if left_out else ""]
    for k in chosen:
        told = number(steps[k])
        cards = "".join(map(_sample, by_step[steps[k]][:_MOST_SAMPLES]))
        is_open = " open" if k == last else ""
        parts.append(f'<details data-step="{told}"{is_open}><summary>step {told}</summary>{cards}</details>')
    return f'<h2>Samples</h2><div id="samples">{"".join(parts)}</div>'


def _sample(record: Record) -> str:
    """One completion: its numbers and short texts in a line, every other text in a box of its own."""
    badges, boxes = [], []
    for name, value in record.items():
        if name == "step" or value is None:
            continue
        if isinstance(value, float):
            badges.append(f'<span class="badge">{_text(name)} {number(value)}</span>')
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if name not in ("prompt", "completion") and len(text) <= _SHORT and "\n" not in text:
            badges.append(f'<span class="badge">{_text(name)} {_text(text)}</span>')
        else:
            boxes.append(f'<div class="faint">{_text(name)}</div><pre>{_text(text)}</pre>')
    return f'<div class="sample"><div>{"".join(badges)}</div>{"".join(boxes)}</div>'


def _settings(title: str, values: dict[str, Any]) -> str:
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(_value(value))}</td></tr>" for name, value in values.items())
    table = f'<div class="wide"><table>{rows}</table></div>'
    return f"<details><summary><b>{title}</b></summary>{table}</details>"


def _value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (dict, list)) else str(value)


def _mapping(path: Path, read: Callable[[str], Any]) -> dict[str, Any]:
    """The mapping that a file holds.

    Raises:
        ValueError: It holds no mapping, or is damaged.
    """
    try:
        content = read(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of names to values, got {type(content).__name__}")
    return content


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>'


def _text(value: object) -> str:
    return html.escape(printable(str(value)))
