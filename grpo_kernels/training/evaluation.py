"""Held-out accuracy, sampled at temperature 1 and greedy, and what else the samples say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_kernels.training.data import Row
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.rewards import RewardFunction, accuracy_reward, extract_answer, score
from grpo_kernels.training.rollout import completion_texts, generate
from grpo_kernels.training.scores import Score, cons_at_k, pass_at_k, pass_rates
from grpo_kernels.training.templates import render_prompt, whole_completion


class EvalSample(NamedTuple):
    """One completion of a held-out problem."""

    prompt: str  # as the model saw it
    completion: str
    answer: str | None  # what was extracted; None where there is none
    right: bool


class EvalReport(NamedTuple):
    """Everything that an evaluation found, in the order of the P rows that it was given."""

    samples: list[list[EvalSample]]  # [P][n], at temperature 1
    greedy: list[EvalSample]  # [P]
    pass_rates: list[float]  # [P], of the samples at temperature 1
    scores: dict[str, Score]  # by name: pass@k and cons@k at temperature 1, and greedy

    def metrics(self) -> dict[str, float]:
        """The scores as a record for ``metrics.jsonl``; the two accuracies also with the ends of their intervals."""
        names = {"pass@1": "eval_accuracy", "greedy": "eval_accuracy_greedy"}
        found = {}
        for name, score_ in self.scores.items():
            key = names.get(name, f"eval_{name}")
            found[key] = score_.value
            if name in names:
                found |= {f"{key}_low": score_.low, f"{key}_high": score_.high}
        return found


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], recipe: Recipe
) -> dict[str, float]:
    """The share of right answers: ``eval_samples`` completions a row at temperature 1, and one greedy.

    The random state is put back afterwards, so that evaluating changes no training curve; samples depend on the
    recipe's seed alone.

    Raises:
        ValueError: There are no rows.
    """
    report = evaluate_samples(model, tokenizer, rows, recipe, ks=(1,))
    return {
        "eval_accuracy": sum(s.right for group in report.samples for s in group) / (len(rows) * recipe.eval_samples),
        "eval_accuracy_greedy": report.scores["greedy"].value,
    }


def evaluate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    recipe: Recipe,
    *,
    ks: Sequence[int] | None = None,
    check: RewardFunction = accuracy_reward,
    extract: Callable[[str], str | None] = extract_answer,
) -> EvalReport:
    """Samples ``eval_samples`` completions a row at temperature 1 and one greedy, and scores them.

    The samples are those of ``evaluate``; the random state is put back afterwards.

    Args:
        model: Any causal language model, on any device.
        tokenizer: Must have a pad token.
        rows: P held-out problems.
        recipe: Says the number of samples, their length, the batch size, the seed and the system prompt.
        ks: pass@k for each of these, and cons@k for those above 1; by default 1 and ``eval_samples``.
        check: A completion is right where this reward is 1; less, or an abstention, is wrong.
        extract: A completion's answer, in one spelling, for the vote of cons@k; None where it gives none.

    Raises:
        ValueError: There are no rows, a k is not between 1 and ``eval_samples``, or ``check`` returns bad rewards.
    """
    samples = recipe.eval_samples
    ks = sorted({1, samples}) if ks is None else list(ks)
    if not rows:
        raise ValueError("rows must have at least one problem to evaluate, got none")
    for k in ks:
        if not 1 <= k <= samples:
            raise ValueError(f"ks must be at least 1 and at most eval_samples ({samples}), got {k}")
    sampler = _Sampler(model, tokenizer, recipe, check, extract)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed + 1)
        drawn = sampler.sample(list(rows) * samples, temperature=1.0)
        greedy = sampler.sample(rows, temperature=0.0)
    by_row = [drawn[i :: len(rows)] for i in range(len(rows))]
    right = [[sample.right for sample in group] for group in by_row]
    answers = [[sample.answer for sample in group] for group in by_row]
    scores = [pass_at_k(right, k) for k in ks]
    scores += [cons_at_k(answers, right, k) for k in ks if k > 1]
    scores.append(pass_at_k([[sample.right] for sample in greedy])._replace(name="greedy"))
    return EvalReport(by_row, greedy, pass_rates(right), {found.name: found for found in scores})


class _Sampler(NamedTuple):
    """Completions of rows, checked."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    check: RewardFunction
    extract: Callable[[str], str | None]

    def sample(self, rows: Sequence[Row], *, temperature: float) -> list[EvalSample]:
        """One completion a row."""
        size = self.recipe.eval_batch_size
        batches = [self._batch(rows[start : start + size], temperature) for start in range(0, len(rows), size)]
        return [sample for batch in batches for sample in batch]

    def _batch(self, rows: Sequence[Row], temperature: float) -> list[EvalSample]:
        prompts = [
            render_prompt(row, self.tokenizer, self.recipe.prompt_template, self.recipe.system_prompt) for row in rows
        ]
        rollout = generate(
            self.model,
            self.tokenizer,
            prompts,
            max_completion_length=self.recipe.max_completion_length,
            temperature=temperature,
        )
        sampled = completion_texts(rollout, self.tokenizer)
        completions = [whole_completion(*found) for found in zip(rows, prompts, sampled, strict=True)]
        names = {name for row in rows for name in row} - {"prompt", "completion"}
        columns = {name: [row.get(name) for row in rows] for name in names}
        rewards = score({"check": self.check}, [row["prompt"] for row in rows], completions, columns)
        right = (rewards[:, 0] == 1).tolist()
        answers = map(self.extract, completions)
        return [EvalSample(*found) for found in zip(prompts, completions, answers, right, strict=True)]
