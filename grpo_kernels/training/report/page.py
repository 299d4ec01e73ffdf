"""A run's folder as one HTML page, which opens from disk and loads nothing; and its curves as a picture."""

from __future__ import annotations

import io
import json
import re
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from grpo_kernels.files import replace_text, replacing
from grpo_kernels.training.report import METRICS, SAMPLES, Record, read_records
from grpo_kernels.training.report.terminal import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curves = dict[str, dict[float, float]]  # metric to step to value


class Panel(NamedTuple):
    """A chart."""

    title: str
    unit: str
    labels: dict[str, str]  # by metric


_PANELS = (
    Panel("Reward", "", {"reward": "mean"}),
    Panel("Accuracy", "share of completions", {
        "rewards/accuracy/mean": "training samples", "eval_accuracy": "held out, temperature 1",
        "eval_accuracy_greedy": "held out, greedy"}),
    Panel("Spread of rewards", "", {"reward_std": "standard deviation"}),
    Panel("Groups whose rewards are all equal", "share of groups", {"frac_reward_zero_std": "share"}),
    Panel("Completion length", "tokens", {
        "completions/mean_length": "mean", "completions/min_length": "shortest", "completions/max_length": "longest"}),
    Panel("Cut at the length limit", "share of completions", {"completions/clipped_ratio": "share"}),
    Panel("KL to the reference", "nats per token", {"kl": "KL"}),
    Panel("Entropy", "nats per token", {"entropy": "entropy"}),
    Panel("Clipped", "share of tokens", {
        "clip_ratio/region_mean": "either side", "clip_ratio/low_mean": "low", "clip_ratio/high_mean": "high"}),
    Panel("Loss", "", {"loss": "loss"}),
    Panel("Gradient norm", "before clipping", {"grad_norm": "norm"}),
    Panel("Learning rate", "", {"learning_rate": "rate"}),
    Panel("Time of a step", "seconds", {"step_time": "time"}),
)  # fmt: skip
_PICTURE = ("Reward", "Accuracy", "KL to the reference", "Clipped")  # of curves.png
_TILES = {
    "eval_accuracy": "held-out accuracy, temperature 1", "eval_accuracy_greedy": "held-out accuracy, greedy",
    "reward": "reward", "completions/mean_length": "tokens of a completion",
}  # fmt: skip
#: A chart is drawn in these colours. In a page they are variables of its CSS, which has dark ones beside them.
_COLORS = {
    "paper": "#ffffff", "faint": "#59636e", "rule": "#d8dee4", "s0": "#2563eb", "s1": "#c2410c", "s2": "#15803d",
    "s3": "#7e22ce", "s4": "#be123c", "s5": "#0e7490",
}  # fmt: skip
_ENDS = ("_low", "_high")  # of a metric's interval


def write_report(run_dir: Path | str) -> Path:
    """Writes ``report.html`` into a run's folder, as a whole or not at all.

    It needs ``metrics.jsonl``; samples, configuration and versions are shown where they are there, also while the run
    goes on. Of a metric that a step has twice, the last value counts.

    Raises:
        FileNotFoundError: There is no ``metrics.jsonl``.
        ValueError: A line is damaged; the message names it.
    """
    import jinja2

    folder, notes = Path(run_dir), []
    curves = _curves(read_records(folder / METRICS, notes))
    samples = read_records(folder / SAMPLES, notes) if (folder / SAMPLES).exists() else []
    names = ("config.yaml", "versions.json")
    settings = [path for path in map(folder.joinpath, names) if path.exists()]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(autoescape=True, loader=loader, undefined=jinja2.StrictUndefined)
    environment.filters["number"] = number
    environment.filters["sha256"] = lambda text: b64encode(sha256(text.encode()).digest()).decode()
    panels, other_panels = _panels(curves)
    text = environment.get_template("page.html.jinja").render(
        name=folder.resolve().name,
        notes=notes if curves else [*notes, f"{METRICS} has no record yet"],
        curves=curves,
        trained=[step for name, by_step in curves.items() if not name.startswith("eval_") for step in by_step],
        colors=_COLORS,
        tiles=_TILES,
        charts=[(panel, _svg(panel, curves)) for panel in panels],
        other_charts=[(panel, _svg(panel, curves)) for panel in other_panels],
        samples=_samples(samples),
        settings={path.name: path.read_text(encoding="utf-8", errors="replace") for path in settings},
    )
    return replace_text(folder / "report.html", printable(text))


def plot_curves(run_dir: Path | str) -> None:
    """Draws reward, accuracy, KL and clip fraction into ``curves.png``; a panel without its metric says so."""
    from matplotlib.figure import Figure

    curves = _curves(read_records(Path(run_dir) / METRICS))
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = [panel for panel in _PANELS if panel.title in _PICTURE]
    for axes, panel in zip(figure.subplots(2, 2).flat, panels, strict=True):
        axes.set(title=panel.title, ylabel=panel.unit)
        _draw(axes, panel, curves)
        if axes.lines:
            axes.legend()
        else:
            axes.text(0.5, 0.5, f"no {next(iter(panel.labels))} in this run", ha="center", transform=axes.transAxes)
    with replacing(Path(run_dir) / "curves.png") as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")


def number(value: float) -> str:
    """A number in at most four digits, or whole where it is a whole number."""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"


def _curves(records: Sequence[Record]) -> Curves:
    """The numbers under each name by step, in the order of steps; not NaN, nor what is too large to be squared."""
    curves: Curves = {}
    for record in sorted(records, key=lambda record: record["step"]):
        for name, value in record.items():
            if name != "step" and type(value) in (int, float) and abs(value) < 1e150:
                curves.setdefault(name, {})[record["step"]] = value
    return curves


def _panels(curves: Curves) -> tuple[list[Panel], list[Panel]]:
    """The panels that a run has metrics for, and one for each other metric; ends of intervals are drawn with theirs."""
    ends = {name + end for name in curves for end in _ENDS}
    rewards = {name: name.split("/")[1] for name in curves if re.fullmatch("rewards/.*/mean", name, re.DOTALL)}
    shown = ends.union(rewards, *(panel.labels for panel in _PANELS))
    held_out = {name: name.removeprefix("eval_") for name in curves if name.startswith("eval_") and name not in shown}
    others = [Panel(name, "", {name: name}) for name in curves if name not in shown | held_out.keys()]
    own = [Panel("Rewards by function", "mean", rewards), Panel("Held out", "", held_out)]
    panels = [panel for panel in (*_PANELS[:2], *own, *_PANELS[2:]) if panel.labels.keys() & curves.keys()]
    return panels, others


def _draw(axes: Axes, panel: Panel, curves: Curves) -> None:
    """A line for each metric; a mark for each evaluation, with its value as a hint, and a bar for its interval."""
    axes.set_xlabel("optimizer step", color=_COLORS["faint"])
    axes.locator_params(axis="x", integer=True)
    axes.yaxis.set_major_formatter("{x:.6g}")
    axes.tick_params(color=_COLORS["rule"], labelcolor=_COLORS["faint"])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=_COLORS["rule"], clip_on=False)
    axes.spines[:].set_visible(False)
    for k, name in enumerate(name for name in panel.labels if name in curves):
        style = {"color": _COLORS[f"s{k % 6}"], "linewidth": 1.5, "clip_on": False, "in_layout": False}
        points = curves[name].items()
        axes.plot(*zip(*points, strict=True), marker="" if len(points) > 1 else ".", label=panel.labels[name], **style)
        for step, value in points if name.startswith("eval_") else ():
            ends = [values[step] for end in _ENDS if step in (values := curves.get(name + end, {}))]
            axes.plot([step] * len(ends), ends, marker="_", **style)
            hint = f"hint {panel.labels[name]}, step {number(step)}: {number(value)}"
            axes.plot(step, value, "o", markerfacecolor=_COLORS["paper"], gid=hint, **style)


def _svg(panel: Panel, curves: Curves) -> str:
    """A chart for a page: colours are variables, and no style is left that its content security policy refuses."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": printable(panel.title), "path.simplify_threshold": 1.0}
    with matplotlib.rc_context(settings), io.StringIO() as file:
        figure = Figure(figsize=(420 / 72, 220 / 72))
        _draw(figure.add_axes((0.13, 0.17, 0.85, 0.8)), panel, curves)
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
        svg = file.getvalue().split("</defs>", 1)[1]  # without its prolog and style
    svg = re.sub(r"<g id=([\"'])hint (.*?)\1>", r"<g><title>\2</title>", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[\w.]*"', "<g", svg)
    svg = re.sub(r'style="(.*?)"', lambda style: re.sub(r"([\w-]+): ([^;]+);?", r'\1="\2"', style[1]), svg)
    for name, color in _COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return f'<svg viewBox="0 0 420 220">{svg}'


def _samples(records: Sequence[Record]) -> dict[str, Any]:
    """The samples to show by step, and a note on those of very many that are left out."""
    by_step: dict[float, list[Any]] = {}
    for record in sorted(records, key=lambda record: record["step"]):
        by_step.setdefault(record["step"], []).append(_sample(record))
    steps, last, left_out = list(by_step), len(by_step) - 1, []
    if last >= 100:
        steps = [steps[round(k * last / 99)] for k in range(100)]
        left_out.append(f"100 of {last + 1} steps")
    if any(len(of_step) > 16 for of_step in by_step.values()):
        left_out.append("at most 16 completions of a step")
    note = f"Shown: {', '.join(left_out)}; all are in {SAMPLES}." if left_out else ""
    return {"by_step": {step: by_step[step][:16] for step in steps}, "note": note}


def _sample(record: Record) -> dict[str, dict[str, str]]:
    """One completion: its numbers and short texts for a line, every other text for a box of its own."""
    texts = {name: number(value) if isinstance(value, float) else value for name, value in record.items()}
    texts = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in texts.items()}
    del texts["step"]
    boxes = {k: v for k, v in texts.items() if k in ("prompt", "completion") or len(v) > 60 or "\n" in v}
    return {"badges": {k: v for k, v in texts.items() if k not in boxes and record[k] is not None}, "boxes": boxes}
