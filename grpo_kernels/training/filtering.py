"""The pass-rate filter: which problems are neither too hard nor too easy to train on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from grpo_kernels.files import replace_text
from grpo_kernels.training.data.files import Row
from grpo_kernels.training.evaluation import right_counts
from grpo_kernels.training.rollout import Sampler

PASS_RATES = "pass_rates.json"


def filter_by_pass_rate(
    rows: Sequence[Row],
    rates: Sequence[float],
    *,
    min_pass_rate: float | None,
    max_pass_rate: float | None,
    least: int,
    accelerator: Accelerator,
) -> list[Row]:
    """The rows whose pass rate lies strictly between the bounds; None leaves a side open.

    Args:
        rows: P problems.
        rates: The share of right answers to each.
        min_pass_rate: A row must have more.
        max_pass_rate: A row must have less.
        least: Rows that must be left.
        accelerator: Prints how many are left.

    Raises:
        ValueError: Fewer are left.
    """
    low = float("-inf") if min_pass_rate is None else min_pass_rate
    high = float("inf") if max_pass_rate is None else max_pass_rate
    kept = [row for row, rate in zip(rows, rates, strict=True) if low < rate < high]
    accelerator.print(
        f"pass-rate filter: {len(kept)} of {len(rates)} training problems are left, {sum(r <= low for r in rates)} "
        f"were too hard and {sum(r >= high for r in rates)} too easy"
    )
    if len(kept) < least:
        raise ValueError(
            f"at least {least} training problems (one generation's) must have a pass rate between "
            f"min_pass_rate={min_pass_rate} and max_pass_rate={max_pass_rate}, got {len(kept)}"
        )
    return kept


def measure_pass_rates(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    folder: Path,
    accelerator: Accelerator,
    *,
    num_samples: int,
    **options: Any,
) -> list[float]:
    """The share of right answers to each row among ``num_samples`` at temperature 1, also kept in ``folder``.

    Every process calls it and tries its share of the rows; ``options`` are ``right_counts``'s.
    """
    counts = right_counts(sampler, tokenizer, rows, accelerator, num_samples=num_samples, greedy=False, **options)
    rates = (counts[:, 0].double() / num_samples).tolist()
    if accelerator.is_main_process:
        replace_text(folder / PASS_RATES, json.dumps(rates))
    return rates


def read_pass_rates(folder: Path) -> list[float]:
    """The rates that a run has measured, so that it has the same rows when it is resumed, with another model.

    Raises:
        ValueError: They cannot be read.
    """
    path = folder / PASS_RATES
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read, which says what rows the run has: {error}") from error
