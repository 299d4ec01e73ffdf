"""What a run prints: a bar, a table of metrics and sample completions. A log file gets the same as plain text."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from grpo_kernels.training.report import SampleRecord

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "step", "reward", "reward_std", "frac_reward_zero_std", "rewards/accuracy/mean", "rewards/format/mean",
    "completions/mean_length", "completions/clipped_ratio", "kl", "entropy", "clip_ratio/region_mean", "grad_norm",
    "learning_rate", "step_time",
)  # fmt: skip
_FORMATS = {"step": "{:5.0f}", "kl": "{:7.1e}", "learning_rate": "{:7.1e}"}  # of the others: three decimals
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def progress_bar(total: int, title: str, *, is_hidden: bool) -> tqdm:
    """A bar over optimizer steps, on a terminal only."""
    return tqdm(total=total, desc=title, disable=is_hidden or None, dynamic_ncols=True)


def count_step(bar: tqdm, *, completions: float, tokens: float, **values: float) -> None:
    """Counts an optimizer step; shows ``values``, and completions and tokens a second at the rate of the last steps."""
    if not bar.disable:
        timing = bar.format_dict
        steps_per_second = timing["rate"] or (bar.n + 1) / max(timing["elapsed"], 1e-9)
        shown = [f"{name}={value:.3f}" for name, value in values.items()]
        for unit, count in (("completions", completions), ("tokens", tokens)):
            shown.append(f"{tqdm.format_sizeof(count * steps_per_second)} {unit}/s")
        bar.set_postfix_str(", ".join(shown), refresh=False)
    bar.update()


class MetricsTable:
    """Rows of metrics under their names, printed above a bar, with the heading every dozen rows."""

    def __init__(self) -> None:
        self._rows = 0

    def row(self, metrics: dict[str, float]) -> None:
        """Prints those of ``COLUMNS`` that ``metrics`` has, and the mean of every other reward function."""
        from rich.table import Table

        columns = [name for name in COLUMNS if name in metrics]
        columns += [name for name in metrics if re.fullmatch("rewards/.*/mean", name) and name not in columns]
        table = Table(box=None, padding=(0, 1, 0, 0))
        for name in columns:
            table.add_column(re.sub("([/_])", r"\1\n", printable(name)), justify="right", vertical="bottom")
        table.add_row(*(_FORMATS.get(name, "{:5.3f}").format(metrics[name]) for name in columns))
        lines = _rendered(table, width=10_000).splitlines()
        tqdm.write("\n".join(lines[-1:] if self._rows % 12 else ["", *lines]))
        self._rows += 1


def show_samples(step: int, samples: Sequence[SampleRecord]) -> None:
    """Prints sample completions above a bar, long texts folded into their column."""
    from rich import box
    from rich.table import Table

    table = Table(title=f"sample completions at step {step}", show_lines=True, box=box.ASCII2, expand=True)
    for name, ratio in (("prompt", 2), ("completion", 5), ("reward", None), ("advantage", None)):
        table.add_column(name, ratio=ratio, overflow="fold", no_wrap=ratio is None)
    for sample in samples:
        advantage = "" if sample.advantage is None else f"{sample.advantage:+.2f}"
        table.add_row(_shortened(sample.prompt), _shortened(sample.completion), f"{sample.reward:.2f}", advantage)
    tqdm.write("\n" + _rendered(table, shutil.get_terminal_size((120, 24)).columns))


def printable(text: str) -> str:
    """The text with control characters and lone surrogates spelled out, so that they steer no terminal or page."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def _shortened(text: str) -> str:
    """A printable text, of a very long one both ends."""
    left_out = len(text) - 1000
    return printable(text if left_out <= 0 else f"{text[:500]} [... {left_out} characters ...] {text[-500:]}")


def _rendered(table: Table, width: int) -> str:
    """A table as text, in bold type on a terminal alone; no text in it is read as markup."""
    from rich.console import Console

    plain = {"markup": False, "emoji": False, "highlight": False}
    console = Console(width=width, force_terminal=sys.stdout.isatty(), **plain)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
