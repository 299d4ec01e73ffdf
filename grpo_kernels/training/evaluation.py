"""Held-out accuracy: pass@k and cons@k of samples at temperature 1, and greedy, by any sampler."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo_kernels.rewards import RewardFunction
from grpo_kernels.rewards.answers import extract_of
from grpo_kernels.training.data.files import Row
from grpo_kernels.training.data.templates import PromptFormat
from grpo_kernels.training.rollout import Sampler, completion_tokens, score_rollout
from grpo_kernels.training.scores import Score, cons_at_k, pass_at_k, pass_rates

_METRICS = {"pass@1": "eval_accuracy", "greedy": "eval_accuracy_greedy"}  # the two that have names of their own


class EvalSample(NamedTuple):
    """One completion of a held-out problem."""

    prompt: str  # as the model saw it
    completion: str
    answer: str | None  # what was extracted; None where there is none
    right: bool


class EvalReport(NamedTuple):
    """Everything that an evaluation found, in the order of the P rows that it was given."""

    samples: list[list[EvalSample]]  # [P][n], at temperature 1
    greedy: list[EvalSample]  # [P]; empty where none was asked for
    pass_rates: list[float]  # [P], of the samples at temperature 1
    scores: dict[str, Score]  # by name: pass@k and cons@k at temperature 1, and greedy
    completion_ids: Sequence[Sequence[list[int]]] = ()  # [P][n], the tokens of ``samples``, with the end token

    def metrics(self, all_intervals: bool = False) -> dict[str, float]:
        """The scores as a record for ``metrics.jsonl``, with the ends of the two accuracies' intervals, or of all."""
        metrics = {}
        for name, score in self.scores.items():
            key = _METRICS.get(name, f"eval_{name}")
            metrics[key] = score.value
            if all_intervals or name in _METRICS:
                metrics |= {f"{key}_low": score.low, f"{key}_high": score.high}
        return metrics


def evaluate(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    accelerator: Accelerator | None = None,
    *,
    num_samples: int,
    **options: Any,
) -> dict[str, float]:
    """The share of right answers: ``num_samples`` completions a row at temperature 1, and one greedy.

    Samples depend on the seed and the number of processes alone.

    Args:
        sampler: Draws the completions.
        tokenizer: Of prompts and completions.
        rows: The same in every process.
        accelerator: Of the processes that have a share of the rows each, and know what was right in all.
        num_samples: Completions of a row.
        options: Further ones of ``evaluate_samples``.

    Raises:
        ValueError: There are no rows.
    """
    counts = right_counts(sampler, tokenizer, rows, accelerator, num_samples=num_samples, **options)
    sampled, greedy = counts.sum(dim=0).tolist()
    return {"eval_accuracy": sampled / (len(rows) * num_samples), "eval_accuracy_greedy": greedy / len(rows)}


def right_counts(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    accelerator: Accelerator | None = None,
    **options: Any,
) -> Tensor:  # [P, 2]
    """How many samples of each row are right, and whether the greedy one is; the arguments are ``evaluate``'s."""
    count, rank = (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
    share = math.ceil(len(rows) / count)  # of each process alike, where the last rows come round to the first
    own_rows = [rows[(rank + k * count) % len(rows)] for k in range(share)] if rows else []
    report = evaluate_samples(sampler, tokenizer, own_rows, ks=(1,), **options)
    greedy = [sample.right for sample in report.greedy] or [False] * share
    counts = [[sum(s.right for s in group), right] for group, right in zip(report.samples, greedy, strict=True)]
    if count == 1:
        return torch.tensor(counts)
    gathered = accelerator.gather(torch.tensor(counts, device=accelerator.device)).cpu()
    return gathered.view(count, share, 2).transpose(0, 1).reshape(-1, 2)[: len(rows)]


def evaluate_samples(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    check: RewardFunction,
    num_samples: int,
    check_name: str = "check",
    batch_size: int = 256,
    seed: int = 0,
    step: int = 0,
    prompt_format: PromptFormat = PromptFormat(),  # noqa: B008 - immutable
    ks: Sequence[int] | None = None,
    extract: Callable[[str], str | None] | None = None,
    greedy: bool = True,
) -> EvalReport:
    """Samples completions of each row at temperature 1 and a greedy one, and scores them.

    The random state is put back afterwards, so that evaluating changes no training curve.

    Args:
        sampler: Draws the completions.
        tokenizer: Of prompts and completions.
        rows: P held-out problems.
        check: A completion is right where this reward is 1; less, or an abstention, is wrong.
        num_samples: Completions of a row at temperature 1.
        check_name: Names it in errors.
        batch_size: Completions to sample at once.
        seed: Of the samples.
        step: Optimizer steps that the model has had.
        prompt_format: How prompts are rendered.
        ks: pass@k for each of these, and cons@k for those above 1; by default 1 and ``num_samples``.
        extract: A completion's answer, in one spelling, for the vote of cons@k; None where it gives none. By default
            that which ``check`` has; where it has none, as a judge of programs, there is no cons@k.
        greedy: Whether to sample the greedy completions, too.

    Raises:
        ValueError: There are no rows, a k is not between 1 and ``num_samples``, or ``check`` returns bad rewards.
    """
    ks = sorted({1, num_samples}) if ks is None else list(ks)
    if not rows:
        raise ValueError("rows must have at least one problem to evaluate, got none")
    for k in ks:
        if not 1 <= k <= num_samples:
            raise ValueError(f"ks must be at least 1 and at most eval_samples ({num_samples}), got {k}")
    extract = extract or extract_of(check)

    def sample(asked: Sequence[Row], temperature: float) -> tuple[list[EvalSample], list[list[int]]]:
        samples, ids = [], []
        for begin in range(0, len(asked), batch_size):
            batch = asked[begin : begin + batch_size]
            scored = score_rollout(
                sampler,
                tokenizer,
                batch,
                {check_name: check},
                prompt_format=prompt_format,
                step=step,
                temperature=temperature,
            )
            answers = [None if extract is None else extract(completion) for completion in scored.completions]
            right = (scored.rewards[:, 0] == 1).tolist()
            samples += map(EvalSample, scored.prompts, scored.completions, answers, right)
            ids += completion_tokens(scored.rollout)
        return samples, ids

    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        drawn, drawn_ids = sample(list(rows) * num_samples, 1.0)
        greedy_samples = sample(rows, 0.0)[0] if greedy else []
    by_row, ids_by_row = ([values[i :: len(rows)] for i in range(len(rows))] for values in (drawn, drawn_ids))
    right = [[sample.right for sample in group] for group in by_row]
    scores = [pass_at_k(right, k) for k in ks]
    if extract is not None:
        answers = [[sample.answer for sample in group] for group in by_row]
        scores += [cons_at_k(answers, right, k) for k in ks if k > 1]
    if greedy:
        scores.append(pass_at_k([[sample.right] for sample in greedy_samples])._replace(name="greedy"))
    by_name = {score.name: score for score in scores}
    return EvalReport(by_row, greedy_samples, pass_rates(right), by_name, ids_by_row)
