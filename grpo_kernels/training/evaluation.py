"""Held-out accuracy, sampled at temperature 1 and greedy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_kernels.training.data import Row, render_prompt
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.rewards import accuracy_reward
from grpo_kernels.training.rollout import completion_texts, generate


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], recipe: Recipe
) -> dict[str, float]:
    """The share of right answers: ``eval_samples`` completions a row at temperature 1, and one greedy.

    The random state is put back afterwards, so that evaluating changes no training curve; samples depend on the
    recipe's seed alone.
    """
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed + 1)
        return {
            "eval_accuracy": _accuracy(model, tokenizer, list(rows) * recipe.eval_samples, recipe, temperature=1.0),
            "eval_accuracy_greedy": _accuracy(model, tokenizer, rows, recipe, temperature=0.0),
        }


def _accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    recipe: Recipe,
    *,
    temperature: float,
) -> float:
    right = 0.0
    for start in range(0, len(rows), recipe.eval_batch_size):
        batch = rows[start : start + recipe.eval_batch_size]
        prompts = [render_prompt(row, tokenizer, recipe.system_prompt) for row in batch]
        rollout = generate(
            model,
            tokenizer,
            prompts,
            max_completion_length=recipe.max_completion_length,
            temperature=temperature,
        )
        answers = [row["answer"] for row in batch]
        right += sum(accuracy_reward(prompts, completion_texts(rollout, tokenizer), answer=answers))
    return right / len(rows)
