"""Held-out accuracy, sampled at temperature 1 and greedy, and what else the samples say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_kernels.rewards import RewardFunction, check_name, columns_of, resolve, score
from grpo_kernels.rewards.answers import extract_of
from grpo_kernels.training.data import Row, Task
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.rollout import completion_texts, completion_tokens, end_token_ids, generate
from grpo_kernels.training.sampling import context_length_of, rows_that_fit
from grpo_kernels.training.scores import Score, cons_at_k, pass_at_k, pass_rates
from grpo_kernels.training.templates import render_prompts, whole_completion


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
    completion_ids: Sequence[Sequence[list[int]]] = ()  # [P][n], the tokens of ``samples``, with the end token

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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    recipe: Recipe,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """The share of right answers: ``eval_samples`` completions a row at temperature 1, and one greedy.

    The random state is put back afterwards, so that evaluating changes no training curve; samples depend on the
    recipe's seed and the number of processes alone.

    Args:
        model: As for ``evaluate_samples``.
        tokenizer: As there.
        rows: The same in every process.
        recipe: As there.
        accelerator: Of the processes that have a share of the rows each, and know what was found in all.

    Raises:
        ValueError: There are no rows.
    """
    count, rank = (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
    share = math.ceil(len(rows) / count)  # of each alike, where the last rows come round to the first
    mine = [rows[(rank + k * count) % len(rows)] for k in range(share)] if rows else []
    report = evaluate_samples(model, tokenizer, mine, recipe, ks=(1,), synced=count > 1)
    found = zip(report.samples, report.greedy, strict=True)
    right = torch.tensor([[sum(s.right for s in group), one.right] for group, one in found], device=model.device)
    if count > 1:
        right = accelerator.gather(right).view(count, share, 2).transpose(0, 1).reshape(-1, 2)[: len(rows)]
    sampled, greedy = right.sum(dim=0).tolist()
    return {
        "eval_accuracy": sampled / (len(rows) * recipe.eval_samples),
        "eval_accuracy_greedy": greedy / len(rows),
    }


def evaluate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    recipe: Recipe,
    *,
    ks: Sequence[int] | None = None,
    check: RewardFunction | None = None,
    extract: Callable[[str], str | None] | None = None,
    synced: bool = False,
) -> EvalReport:
    """Samples ``eval_samples`` completions a row at temperature 1 and one greedy, and scores them.

    The samples are those of ``evaluate``; the random state is put back afterwards.

    Args:
        model: Any causal language model, on any device.
        tokenizer: Must have a pad token.
        rows: P held-out problems.
        recipe: Says the number of samples, their length, the batch size, the seed and the system prompt.
        ks: pass@k for each of these, and cons@k for those above 1; by default 1 and ``eval_samples``.
        check: A completion is right where this reward is 1; less, or an abstention, is wrong. By default the recipe's.
        extract: A completion's answer, in one spelling, for the vote of cons@k; None where it gives none. By default
            that which ``check`` has; where it has none, as a judge of programs, there is no cons@k.
        synced: Every process evaluates as many rows, and goes on sampling until the last is done, as models whose
            parameters are divided need.

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
    name = judge_name(recipe) if check is None else getattr(check, "__name__", "check")
    check = check or judge(recipe)
    extract = extract or extract_of(check)
    sampler = _Sampler(model, tokenizer, recipe, check, name, extract, synced)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed + 1)
        drawn, drawn_ids = sampler.sample(list(rows) * samples, temperature=1.0)
        greedy, _ = sampler.sample(rows, temperature=0.0)
    by_row, ids_by_row = ([every[i :: len(rows)] for i in range(len(rows))] for every in (drawn, drawn_ids))
    right = [[sample.right for sample in group] for group in by_row]
    answers = [[sample.answer for sample in group] for group in by_row]
    scores = [pass_at_k(right, k) for k in ks]
    if extract is not None:
        scores += [cons_at_k(answers, right, k) for k in ks if k > 1]
    scores.append(pass_at_k([[sample.right] for sample in greedy])._replace(name="greedy"))
    return EvalReport(by_row, greedy, pass_rates(right), {found.name: found for found in scores}, ids_by_row)


def judge(recipe: Recipe) -> RewardFunction:
    """The reward function that says which answers are right; raises ValueError where the recipe names none there is."""
    return resolve(judge_name(recipe))


def judge_name(recipe: Recipe) -> str:
    """Its name, to be said wherever accuracy is."""
    return check_name(recipe.check, recipe.reward_funcs)


def held_out(task: Task, recipe: Recipe) -> list[Row]:
    """The held-out rows whose prompt fits into the model's context beside a completion, of which one must be left."""
    if not task.eval_rows:
        return []
    context_length = context_length_of(task.model)
    return rows_that_fit(task.eval_rows, task.tokenizer, recipe, context_length, what="held-out", least=1)


class _Sampler(NamedTuple):
    """Completions of rows, checked."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    check: RewardFunction
    judge: str  # its name
    extract: Callable[[str], str | None] | None
    synced: bool

    def sample(self, rows: Sequence[Row], *, temperature: float) -> tuple[list[EvalSample], list[list[int]]]:
        """One completion a row, and its tokens."""
        size = self.recipe.eval_batch_size
        batches = [self._batch(rows[start : start + size], temperature) for start in range(0, len(rows), size)]
        samples, ids = ([found for batch in batches for found in batch[k]] for k in (0, 1))
        return samples, ids

    def _batch(self, rows: Sequence[Row], temperature: float) -> tuple[list[EvalSample], list[list[int]]]:
        prompts = render_prompts(rows, self.tokenizer, self.recipe.prompt_format)
        rollout = generate(
            self.model,
            self.tokenizer,
            prompts,
            max_completion_length=self.recipe.max_completion_length,
            temperature=temperature,
            synced=self.synced,
        )
        sampled = completion_texts(rollout, self.tokenizer, end_token_ids(self.model, self.tokenizer))
        completions = [whole_completion(*found) for found in zip(rows, prompts, sampled, strict=True)]
        ids = completion_tokens(rollout)
        columns = columns_of(rows, ids)
        rewards = score({self.judge: self.check}, [row["prompt"] for row in rows], completions, columns)
        right = (rewards[:, 0] == 1).tolist()
        answers = [None if self.extract is None else self.extract(completion) for completion in completions]
        return [EvalSample(*found) for found in zip(prompts, completions, answers, right, strict=True)], ids
