"""Held-out accuracy: pass@k and cons@k of samples at temperature 1, and greedy, by any sampler, with intervals.

``right[i][j]`` says whether sample j of problem i is right. Problems may differ in their number of samples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from statistics import NormalDist, fmean, variance
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo_kernels.rewards import RewardFunction
from grpo_kernels.rewards.answers import extract_of
from grpo_kernels.training.data.files import Row
from grpo_kernels.training.data.templates import PromptFormat
from grpo_kernels.training.rollout import Sampler, score_rollout

_CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf(0.5 + _CONFIDENCE / 2)
_METRICS = {"pass@1": "eval_accuracy", "greedy": "eval_accuracy_greedy"}  # the two that have names of their own


class Score(NamedTuple):
    """A share of problems between 0 and 1, and the interval that holds it with 95% confidence."""

    name: str
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.name} {self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


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
    scores: dict[str, Score]  # by name: pass@k and cons@k at temperature 1, and greedy
    rewards: dict[str, float]  # means over ``samples`` of the reward functions that were asked for

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
    rows: Sequence[Row],  # the same in every process
    accelerator: Accelerator | None = None,
    *,
    num_samples: int,
    **options: Any,  # further ones of evaluate_samples
) -> dict[str, float]:
    """The share of right answers: ``num_samples`` completions a row at temperature 1, and one greedy.

    Each process has a share of the rows, and knows what was right in all. Samples depend on the seed and the number of
    processes alone. Raises ValueError where there are no rows.
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
    share = math.ceil(len(rows) / count)  # of each process; the last may repeat the first rows, which are cut off below
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
    rows: Sequence[Row],  # P held-out problems
    *,
    check: RewardFunction,
    num_samples: int,  # completions of a row at temperature 1
    check_name: str = "check",
    batch_size: int = 256,  # completions to sample at once
    seed: int = 0,
    step: int = 0,  # optimizer steps that the model has had
    prompt_format: PromptFormat = PromptFormat(),  # noqa: B008 - immutable
    ks: Sequence[int] | None = None,
    greedy: bool = True,
    reward_functions: Mapping[str, RewardFunction] | None = None,  # further ones, of the samples at temperature 1
) -> EvalReport:
    """Samples completions of each row at temperature 1 and a greedy one, and scores them.

    Restores the random state afterwards, so that an evaluation does not change the training.

    Args:
        check: A completion is right where this reward is 1; less, or an abstention, is wrong. Its attribute ``extract``
            reads a completion's answer, in one spelling or None, for the vote of cons@k; without it, as for a judge of
            programs, there is no cons@k.
        ks: pass@k for each of these, and cons@k for those above 1; by default 1 and ``num_samples``.
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
    extract = extract_of(check)

    def sample(
        problems: Sequence[Row], temperature: float, functions: Mapping[str, RewardFunction]
    ) -> tuple[list[EvalSample], Tensor]:
        samples, rewards = [], []
        for begin in range(0, len(problems), batch_size):
            batch = problems[begin : begin + batch_size]
            scored = score_rollout(
                sampler,
                tokenizer,
                batch,
                functions,
                prompt_format=prompt_format,
                step=step,
                temperature=temperature,
            )
            answers = [None if extract is None else extract(completion) for completion in scored.completions]
            right = (scored.rewards[:, 0] == 1).tolist()
            samples += map(EvalSample, scored.prompts, scored.completions, answers, right)
            rewards.append(scored.rewards)
        return samples, torch.cat(rewards)

    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        judge = {check_name: check}
        functions = judge | {n: f for n, f in (reward_functions or {}).items() if n not in judge}
        drawn, rewards = sample(list(rows) * num_samples, 1.0, functions)
        greedy_samples = sample(rows, 0.0, judge)[0] if greedy else []
    by_row = [drawn[i :: len(rows)] for i in range(len(rows))]
    right = [[sample.right for sample in group] for group in by_row]
    scores = [pass_at_k(right, k) for k in ks]
    if extract is not None:
        answers = [[sample.answer for sample in group] for group in by_row]
        scores += [cons_at_k(answers, right, k) for k in ks if k > 1]
    if greedy:
        scores.append(pass_at_k([[sample.right] for sample in greedy_samples])._replace(name="greedy"))
    by_name = {score.name: score for score in scores}
    means = dict(zip(functions, rewards.double().nanmean(dim=0).tolist(), strict=True))
    return EvalReport(by_row, greedy_samples, by_name, {name: means[name] for name in reward_functions or {}})


def measure_pass_rates(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    accelerator: Accelerator | None = None,
    *,
    num_samples: int,
    **options: Any,
) -> list[float]:
    """The share of right answers to each row among ``num_samples`` at temperature 1; as ``evaluate``."""
    counts = right_counts(sampler, tokenizer, rows, accelerator, num_samples=num_samples, greedy=False, **options)
    return (counts[:, 0].double() / num_samples).tolist()


def pass_at_k(right: Sequence[Sequence[bool]], k: int = 1) -> Score:
    """The chance that at least one of k samples is right, without bias, averaged over problems.

    With c of n samples right, ``1 - C(n-c, k) / C(n, k)``, as the product ``1 - prod_{i=n-c+1}^{n} (1 - k/i)``, whose
    factors neither overflow nor cancel: Chen et al., section 2.1 (arXiv:2107.03374). pass@1 is the mean.

    Args:
        right: At least k samples of each problem.
        k: Samples that a problem is tried with, at least 1.

    Raises:
        ValueError: There is no problem, or k is not between 1 and the number of samples.

    Example:
        >>> pass_at_k([[True, False], [False, False]], 2).value
        0.5
    """
    _check(right, k)
    values = [_pass_at_k(len(samples), sum(samples), k) for samples in right]
    low, high = interval(values, min(map(len, right)) / k)
    return Score(f"pass@{k}", fmean(values), low, high)


def cons_at_k(answers: Sequence[Sequence[Hashable | None]], right: Sequence[Sequence[bool]], k: int) -> Score:
    """The share of votes by k samples whose winner is right, averaged over problems: with k = 64 DeepSeek-R1's cons@64.

    The answer that most samples give wins (arXiv:2501.12948; Wang et al., arXiv:2203.11171); of equals the one that was
    sampled first. A missing answer never wins. Each k samples after one another are a vote; what is left over, fewer
    than k, does not vote.

    Args:
        answers: What each sample answers, in one spelling; None where it gives no answer.
        right: Whether it is right, in the same shape. An answer is judged by the first sample that gives it.
        k: Samples in a vote, at least 1.

    Raises:
        ValueError: There is no problem, the shapes differ, or k is not between 1 and the number of samples.

    Example:
        >>> cons_at_k([["7", "12", "12"]], [[False, True, True]], 3).value
        1.0
    """
    _check(right, k)
    if [len(own) for own in answers] != [len(samples) for samples in right]:
        raise ValueError(
            f"answers must have one answer for each sample in right ({sum(map(len, right))} of {len(right)} problems), "
            f"got {sum(map(len, answers))} of {len(answers)} problems"
        )
    values = []
    for said, samples in zip(answers, right, strict=True):
        starts = range(0, len(samples) - k + 1, k)
        values.append(fmean([float(_vote(said[s : s + k], samples[s : s + k])) for s in starts]))
    low, high = interval(values, min(map(len, right)) // k)
    return Score(f"cons@{k}", fmean(values), low, high)


def interval(values: Sequence[float], observations: float = 1.0) -> tuple[float, float]:
    """The 95% confidence interval of the mean over problems: another draw of problems, and of their samples.

    Samples of one problem go together, so the standard error is that of the problems' values, which is the one
    clustered by problem (Miller, arXiv:2411.00640). The normal interval around it has no width where every problem is
    right, and with few problems holds the truth too rarely (Bowyer et al., arXiv:2503.01747). This is Wilson's, with
    the number of right-or-wrong problems that would have this standard error, as surveys take it (Korn and Graubard,
    1998): ``p (1-p) / se^2 (z / t)^2``, Student's t standing for a standard error that is itself estimated. That number
    is at least the number of problems, and at most as many times ``observations``.

    Simulated with 10 problems of 4 samples at Beta(20, 1) pass rates it holds the truth 98 times in 100, the normal
    interval 84 times.

    Args:
        values: One per problem, between 0 and 1.
        observations: Independent right-or-wrong observations that a problem's value is the mean of, at most.

    Raises:
        ValueError: There is no value.
    """
    if not values:
        raise ValueError("values must have one value per problem, got none")
    problems, mean = len(values), fmean(values)
    count = float(problems)
    if problems > 1 and 0 < mean < 1:
        spread = variance(values)
        most = problems * max(observations, 1.0)
        bernoulli = problems * mean * (1 - mean) * (_Z / _student(problems - 1)) ** 2
        count = most if bernoulli >= most * spread else max(count, bernoulli / spread)
    centre = mean + _Z**2 / (2 * count)
    half = _Z * math.sqrt(mean * (1 - mean) / count + _Z**2 / (4 * count**2))
    low, high = (centre - half) / (1 + _Z**2 / count), (centre + half) / (1 + _Z**2 / count)
    return max(0.0, min(low, mean)), min(1.0, max(high, mean))  # rounding apart, they hold already


def _student(freedom: int) -> float:
    """Student's quantile beside the normal ``_Z``, by its expansion in 1/freedom (Abramowitz and Stegun, 26.7.5).

    Within 1% from 3 degrees of freedom on; too small by 3% at 2 and by a quarter at 1.
    """
    polynomials = ((1, 1), (3, 16, 5), (-15, 17, 19, 3))  # in odd powers of _Z
    terms = [sum(c * _Z ** (2 * i + 1) for i, c in enumerate(coefficients)) for coefficients in polynomials]
    return _Z + terms[0] / (4 * freedom) + terms[1] / (96 * freedom**2) + terms[2] / (384 * freedom**3)


def _pass_at_k(samples: int, right: int, k: int) -> float:
    if samples - right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - right + 1, samples + 1))


def _vote(answers: Sequence[Hashable | None], right: Sequence[bool]) -> bool:
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return False
    winner = max(votes, key=votes.__getitem__)  # the first of equals, and a Counter keeps the order of first sight
    return bool(right[list(answers).index(winner)])


def _check(right: Sequence[Sequence[bool]], k: int) -> None:
    if not right:
        raise ValueError("right must have at least one problem, got none")
    fewest = min(map(len, right))
    if not 1 <= k <= fewest:
        raise ValueError(f"k must be at least 1 and at most the samples of each problem ({fewest}), got {k}")
