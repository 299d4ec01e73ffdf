"""The generated problems of reasoning-gym (arXiv:2505.24760) and their judges: ``reasoning_gym/leg_counting``."""

import difflib
import json
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

from grpo_kernels.errors import described
from grpo_kernels.rewards.completions import completion_text

PREFIX = "reasoning_gym/"


def generate_rows(dataset: str, config: str | None, seed: int) -> list[dict[str, Any]]:
    """1000 distinct problems, or ``size`` of ``config``, which holds the generator's options in JSON."""
    source, rows = {"dataset": dataset, "config": config or "{}", "seed": seed}, {}
    for index, problem in enumerate(_generate(**source)[1]):
        row = {"prompt": problem["question"], "answer": problem["answer"], "reasoning_gym": source | {"index": index}}
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


def reasoning_gym_reward(completions: Sequence[Any], reasoning_gym: Sequence[dict[str, Any]], **_: Any) -> list[float]:
    """The judge's score of the last ``<answer>`` element: 1 if right, 0, with a warning, where the judge fails."""
    return [
        _score(completion_text(completion), **row) for completion, row in zip(completions, reasoning_gym, strict=True)
    ]


def _score(completion: str, index: int, **source: Any) -> float:
    generator, problems = _generate(**source)
    _, tag, answer = completion.rpartition("</answer>")[0].rpartition("<answer>")
    try:
        return float(generator.score_answer(answer.strip() if tag else None, problems[index]))
    except Exception as error:  # as several judges do at an answer that is not of their form
        warnings.warn(
            f"{source['dataset']}: an answer scores 0, its judge failed: {type(error).__name__}", stacklevel=1
        )
        return 0.0


@cache
def _generate(dataset: str, config: str, seed: int) -> tuple[Any, list[dict[str, Any]]]:
    name = f"{PREFIX}{dataset}"
    try:
        import reasoning_gym as library
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ImportError(f'{name} needs reasoning-gym: pip install "grpo-kernels[reasoning-gym]" ({error})') from error
    if dataset not in DATASETS:
        near = difflib.get_close_matches(dataset, DATASETS) or sorted(DATASETS)
        raise ValueError(f"dataset_name must be a dataset of reasoning-gym, as {', '.join(near)}, got {name!r}")
    try:
        generator = library.create_dataset(dataset, **{"size": 1000, "seed": seed, **json.loads(config)})
        return generator, [generator[index] for index in range(len(generator))]
    except Exception as error:
        raise ValueError(
            f"dataset_config must be options of {name} in JSON, got {config!r}: {described(error)}"
        ) from error
