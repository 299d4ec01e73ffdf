"""Every metric of the loop against plain fp64 arithmetic: what is sampled, a step, its time, an evaluation."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from test_training_loop import loop_of, one_thread, recipe_of  # noqa: F401  (a fixture)
from torch import Tensor

from grpo_kernels import GRPOLossConfig, group_advantages
from grpo_kernels.training import evaluation
from grpo_kernels.training.evaluation import EvalReport, EvalSample, evaluate
from grpo_kernels.training.loop import Batch, GRPOLoop
from grpo_kernels.training.metrics import (
    correction_metrics,
    correction_statistics,
    informative_groups,
    length_metrics,
    reward_metrics,
)
from grpo_kernels.training.rollout import Rollout
from grpo_kernels.training.run import train
from grpo_kernels.training.samplers import ModelSampler
from grpo_kernels.training.stages import Sample, Stage
from grpo_kernels.training.stages import work as stage_work
from grpo_kernels.training.task import evaluation_options, load_task

NAN = math.nan
GIVEN: list[list[list[float | None]]] = []  # by call of a function, the rewards of a group


def drawn_groups(rng: random.Random, groups: int) -> list[list[float | None]]:
    """Of four: some all alike, some with an abstention or nothing else."""
    kinds = (
        [1.2] * 4,
        [0.1, 0.7, 0.1, 0.2],
        [None, 0.3, 0.3, 0.3],
        [None] * 4,
        [0.7, None, None, None],
        [0.2, 0.9] * 2,
    )
    return [list(rng.choice(kinds)) for _ in range(groups)]


def first_reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    GIVEN.append(drawn_groups(random.Random(len(GIVEN)), len(prompts) // 4))
    return [value for group in GIVEN[-1] for value in group]


def second_reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return first_reward(prompts, completions)


def of_one(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [1.0] * len(prompts)


def a_fifth(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [0.2] * len(prompts)


def never(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [None] * len(prompts)


def named(*names: str) -> list[str]:
    return [f"test_training_metrics:{name}" for name in names]


def deviation(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else NAN


def plain_rewards(table: list[list[float | None]], weights: list[float], names: list[str]) -> dict[str, float]:
    """By Python floats; a completion's reward is the sum of the fp32 parts, as fp32 has it."""
    single = [[None if x is None else float(numpy.float32(x)) for x in row] for row in table]
    totals: list[float | None] = []
    for row in single:
        parts = [x * float(numpy.float32(w)) for x, w in zip(row, weights, strict=True) if x is not None]
        totals.append(float(numpy.float32(math.fsum(parts))) if parts else None)
    known = [x for x in totals if x is not None]
    groups = [{x for x in totals[k : k + 4] if x is not None} for k in range(0, len(totals), 4)]
    found = {"reward": fmean(known), "reward_std": deviation(known)}
    found["frac_reward_zero_std"] = sum(len(values) < 2 for values in groups) / len(groups)
    for k, name in enumerate(names):
        own = [row[k] for row in single if row[k] is not None]
        found |= {f"rewards/{name}/mean": fmean(own) if own else NAN, f"rewards/{name}/std": deviation(own)}
    return found


def test_reward_metrics_of_drawn_runs_are_the_plain_ones() -> None:
    GIVEN.clear()
    names, weights = named("first_reward", "second_reward"), [1.0, 0.3]
    loop = loop_of(reward_funcs=names, reward_weights=weights, max_completion_length=3)
    shares = set()
    for _ in range(6):
        metrics = loop.collect()[1]
        first, second = ([value for group in call for value in group] for call in GIVEN[-2:])
        expected = plain_rewards([list(row) for row in zip(first, second, strict=True)], weights, names)
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-12, abs=1e-15, nan_ok=True)
        shares.add(metrics["frac_reward_zero_std"])
    assert len(shares) > 2


def test_rewards_of_one_and_a_fifth_have_no_spread_at_all() -> None:
    """Their deviation in fp32 is 1e-7, and was reported; their groups were thrown away as equal, and not counted."""
    options: dict[str, Any] = {"reward_funcs": named("of_one", "a_fifth"), "max_completion_length": 2}
    options |= {"num_generations": 8}
    assert torch.full((8,), 1.2).std() > 1e-8
    for dynamic in ({}, {"dynamic_sampling": True, "max_generation_batches": 2}):
        batch, metrics, _ = loop_of(**options, **dynamic).collect()
        assert metrics["frac_reward_zero_std"] == 1 and metrics["reward_std"] == 0
        assert metrics[f"rewards/{named('a_fifth')[0]}/std"] == 0
        assert (batch.advantages == 0).all()
        assert metrics.get("dynamic_sampling/groups_missing", 2) == 2


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 0.3], [0.3, 0.3, 0.3], [1.0, 0.0, 0.0]], ids=str)
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_what_is_counted_what_is_thrown_away_and_what_has_no_advantage_are_the_same(
    aggregation: str, weights: list[float] | None
) -> None:
    """Of 200 groups whose completions have the same three parts in one order or another, or one more."""
    rng = random.Random(0)
    rows: list[list[float]] = []
    for _ in range(200):
        parts = [rng.choice((0.1, 0.2, 0.3, 0.7, NAN)) for _ in range(3)]
        group = [list(parts) for _ in range(4)]
        if rng.random() < 0.6:
            group = [rng.sample(parts, 3) for _ in range(4)]
        if rng.random() < 0.3:
            group[1][0] = 5.0
        rows += group
    rewards = torch.tensor(rows)
    differs = informative_groups(rewards, 4, weights, aggregation)
    share = reward_metrics(rewards, ["a", "b", "c"], 4, weights, aggregation)["frac_reward_zero_std"]
    assert share == (~differs).sum().item() / 200 and 0.2 < share < 0.9
    for backend in ("torch", "auto"):
        given = None if weights is None else torch.tensor(weights)
        options = {"reward_weights": given, "aggregation": aggregation, "backend": backend}
        advantages = group_advantages(rewards, 4, **options).view(-1, 4)
        assert (advantages[~differs] == 0).all()
        if aggregation == "sum_then_normalize":  # normalised parts may cancel
            assert (advantages[differs] != 0).any(dim=1).all()


@pytest.mark.full
def test_a_function_that_always_abstains_is_null_in_the_file(tmp_path: Path) -> None:
    """JSON has no NaN: readers that keep to it would refuse the whole record."""
    names = [*named("first_reward", "never"), "test_training_loop:odd_token_reward"]
    train(recipe_of(output_dir=str(tmp_path), reward_funcs=names, max_steps=1, max_completion_length=2))

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    (record,) = [
        json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert record[f"rewards/{names[1]}/mean"] is None and record[f"rewards/{names[1]}/std"] is None
    assert isinstance(record["reward"], float) and "rewards" in (tmp_path / "report.html").read_text()


# lengths and tokens


def test_lengths_of_drawn_runs_are_the_plain_ones() -> None:
    rng = random.Random(0)
    for _ in range(20):
        count = rng.randrange(1, 30)
        lengths, ended = [rng.randrange(50) for _ in range(count)], [rng.random() < 0.7 for _ in range(count)]
        terminated = [n for n, is_ended in zip(lengths, ended, strict=True) if is_ended] or [0]
        expected = {"completions/clipped_ratio": ended.count(False) / count}
        for name, values in (("length", lengths), ("terminated_length", terminated)):
            for statistic, value in (("mean", fmean(values)), ("min", min(values)), ("max", max(values))):
                expected[f"completions/{statistic}_{name}"] = value
        found = length_metrics(torch.tensor(lengths), torch.tensor(ended))
        assert found == pytest.approx(expected, rel=1e-15)


def test_tokens_are_counted_one_by_one_beyond_what_fp32_can() -> None:
    """Three completions of 2^23 + 1 tokens: their sum is odd and above 2^24."""
    loop, length = loop_of(), 2**23 + 1
    ones, ids = torch.ones(1, 1, dtype=torch.long).expand(3, length), torch.full((1, 1), 5).expand(3, length)
    metrics = loop._length_metrics(Rollout(ids[:, :2], ones[:, :2], ids, ones))
    assert metrics["num_tokens"] == loop.num_tokens == 3 * length + 6
    assert metrics["completions/mean_length"] == metrics["completions/max_length"] == length


# a step


def plain_step(loop: GRPOLoop, batch: Batch, log_eps: tuple[float, float]) -> dict[str, float]:
    """Loss, metrics and gradient norm from whole fp64 logits, for DAPO's loss with a KL term at token level."""
    rollout, mask = batch.rollout, batch.rollout.completion_mask.bool()
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1)
    attention = torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1)
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
    hidden = loop.model.model(input_ids=ids, attention_mask=attention, position_ids=positions).last_hidden_state
    logits = loop.model.lm_head(hidden)[:, -rollout.completion_ids.shape[1] - 1 : -1] / loop.recipe.temperature
    every = logits.log_softmax(-1)
    logprobs = every.gather(-1, rollout.completion_ids[..., None])[..., 0]
    entropy = -(every.exp() * every).sum(-1)[mask]
    advantages = batch.advantages.double()[:, None].expand(mask.shape)[mask]
    ratio = (logprobs - batch.old_logprobs)[mask].exp()
    gap = (batch.ref_logprobs - logprobs)[mask]
    kl = (gap.exp() - gap - 1) * ratio
    low, high = log_eps
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    loss = (loop.recipe.beta * kl - surrogate).sum() / mask.sum()
    gradients = torch.autograd.grad(loss, list(loop.model.parameters()))
    is_low, is_high = (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
    lengths = mask.sum(dim=1).tolist()
    shares = [
        [part.double().mean().item() for part in which.split(lengths) if len(part)] for which in (is_low, is_high)
    ]
    return {
        "loss": loss.item(), "kl": kl.mean().item(), "entropy": entropy.mean().item(),
        "clip_ratio/low_mean": is_low.double().mean().item(), "clip_ratio/high_mean": is_high.double().mean().item(),
        "clip_ratio/region_mean": (is_low | is_high).double().mean().item(),
        "clip_ratio/low_min": min(shares[0]), "clip_ratio/high_max": max(shares[1]),
        "grad_norm": math.sqrt(sum(g.square().sum().item() for g in gradients)),
    }  # fmt: skip


@pytest.mark.parametrize("packing", [False, True])
def test_a_steps_metrics_are_those_of_one_plain_batch(packing: bool) -> None:
    """However unequal its micro-batches are; one has no token, and truncated completions are left out."""
    loop = loop_of(beta=0.1, epsilon=0.02, epsilon_high=0.03, temperature=0.8, packing=packing, max_grad_norm=0.0)
    loop.model.double()
    loop.policy.reference.double()
    for seed in range(3):
        torch.manual_seed(seed)
        batch, _, _ = loop.collect()
        mask = batch.rollout.completion_mask * (torch.rand(16) < 0.7)[:, None]
        mask[:2] = 0
        noise = 0.05 * torch.randn(batch.ref_logprobs.shape, dtype=torch.float64)
        batch = batch._replace(
            rollout=batch.rollout._replace(completion_mask=mask), old_logprobs=batch.ref_logprobs + noise,
            ref_logprobs=batch.ref_logprobs + noise.flip(0), num_items=None,
        )  # fmt: skip
        expected = plain_step(loop, batch, (0.98, 1.03))
        parts = [batch.select(rows) for rows in torch.arange(16).split([2, 1, 9, 4])]
        rate = loop.schedule.get_last_lr()[0]
        found = loop.optimizer_step(parts)
        assert found.pop("learning_rate") == rate and found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert expected["clip_ratio/low_mean"] > 0 and expected["clip_ratio/high_max"] > 0


def test_the_time_of_a_step_is_its_own_and_the_first_has_the_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done with a step before the next, as evaluating and saving, is nobody's."""
    loop = loop_of(num_iterations=2, max_steps=2, max_completion_length=2)
    clock = [0.0]
    monkeypatch.setattr("grpo_kernels.training.loop.time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def taking(seconds: float, function: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            clock[0] += seconds
            return function(*arguments)

        return timed

    monkeypatch.setattr(loop, "collect", taking(5.0, loop.collect))
    monkeypatch.setattr(loop, "optimizer_step", taking(2.0, loop.optimizer_step))
    times = []
    for step in loop.steps():
        times.append(step.metrics["step_time"])
        clock[0] += 100
    assert times == [7.0, 2.0]


# the engine that sampled


def plain_correction(
    old: Tensor, sampled: Tensor, mask: Tensor, mode: str, low: float, high: float
) -> dict[str, float]:
    gaps, ratios = [], []
    for i in range(len(mask)):
        at = mask[i].bool()
        pairs = list(zip(old[i][at].tolist(), sampled[i][at].tolist(), strict=True))
        gaps += [abs(a - b) for a, b in pairs if not math.isnan(b)]
        logs = [0.0 if math.isnan(b) else a - b for a, b in pairs]
        own = [math.exp(x) for x in ([math.fsum(logs)] * bool(logs) if mode.startswith("sequence") else logs)]
        is_mask = mode.endswith("mask")
        ratios += [(r if low <= r <= high else 0.0) if is_mask else min(max(r, low), high) for r in own]
    prefix = "sampling/importance_sampling_ratio"
    found = {f"{prefix}/min": min(ratios), f"{prefix}/mean": fmean(ratios), f"{prefix}/max": max(ratios)}
    prefix = "sampling/sampling_logp_difference"
    return found | {f"{prefix}/mean": fmean(gaps), f"{prefix}/max": max(gaps)}


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_samplers_metrics_are_the_plain_ones(mode: str) -> None:
    """Completions of unequal length, one of no token, and tokens that the sampler did not score."""
    config = GRPOLossConfig(rollout_correction=mode, rollout_clip_min=0.7, rollout_clip_max=1.5)
    for seed in range(6):
        rng = torch.Generator().manual_seed(seed)
        old = -torch.rand(8, 6, generator=rng).double()
        sampled = old + 0.2 * torch.randn(8, 6, generator=rng)
        mask = torch.arange(6) < torch.randint(1, 7, (8, 1), generator=rng)
        mask[seed] = False
        sampled = sampled.masked_fill((torch.rand(8, 6, generator=rng) < 0.1) | ~mask, NAN)
        parts = [correction_statistics(old[r], sampled[r], mask[r], config) for r in torch.arange(8).split([3, 1, 4])]
        expected = plain_correction(old, sampled, mask, mode, 0.7, 1.5)
        assert correction_metrics(torch.cat(parts)) == pytest.approx(expected, rel=1e-12)
    nothing = correction_statistics(old, sampled, torch.zeros_like(mask), config)
    assert correction_metrics(nothing) == {}


# an evaluation


def test_the_accuracy_of_several_processes_counts_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 7 rows three processes have three each; two of these are others' rows once more."""
    rows = [{"prompt": str(k)} for k in range(7)]
    sampled = {str(k): [j < count for j in range(4)] for k, count in enumerate((1, 0, 2, 3, 1, 4, 2))}
    greedy = {str(k): k in (2, 5) for k in range(7)}

    def evaluated(sampler: Any, tokenizer: Any, mine: list[dict[str, str]], **_: Any) -> EvalReport:
        def sample(is_right: bool) -> EvalSample:
            return EvalSample("", "", None, is_right)

        prompts = [row["prompt"] for row in mine]
        return EvalReport(
            [[sample(x) for x in sampled[p]] for p in prompts], [sample(greedy[p]) for p in prompts], [], {}
        )

    monkeypatch.setattr(evaluation, "evaluate_samples", evaluated)
    own: list[Tensor] = []
    for rank in range(3):
        processes = SimpleNamespace(
            num_processes=3, process_index=rank, device="cpu", gather=lambda x: own.append(x) or x.repeat(3, 1)
        )
        evaluate(None, None, rows, processes, num_samples=4)
    processes = SimpleNamespace(num_processes=3, process_index=1, device="cpu", gather=lambda x: torch.cat(own))
    expected = {
        "eval_accuracy": sum(map(sum, sampled.values())) / 28,
        "eval_accuracy_greedy": sum(greedy.values()) / 7,
    }
    found = [evaluate(None, None, rows, accelerator, num_samples=4) for accelerator in (processes, None)]
    assert found == [expected] * 2


def test_a_stages_scores_reward_the_tokens_that_were_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end token too, as in training; the text encoded again has none, and may have others."""
    task = load_task(recipe_of(num_eval_prompts=6, reward_funcs=["accuracy"]))
    recipe = recipe_of(num_eval_prompts=6, eval_samples=3, eval_batch_size=4, reward_funcs=["accuracy"])
    lengths: list[list[int]] = []
    sample = ModelSampler.__call__

    def recorded(self: ModelSampler, prompts: list[str], **options: Any) -> Rollout:
        rollout = sample(self, prompts, **options)
        if options["temperature"]:
            lengths.append(rollout.completion_mask.sum(dim=1).tolist())
        return rollout

    def tokens(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(len(ids)) for ids in completion_ids]

    monkeypatch.setattr(ModelSampler, "__call__", recorded)
    found, report = stage_work._evaluate(
        task._replace(reward_functions={"tokens": tokens}), stage_work._build_sampler(task, recipe), recipe
    )
    every = [n for batch in lengths for n in batch]
    assert len(every) == 18 and len(set(every)) > 1
    assert found["eval_tokens"] == round(fmean(every), 4)
    assert report.rewards == {"tokens": fmean(every)}


def test_a_stages_scores_call_each_function_once_a_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge, which may run programs, too; greedy completions are judged and have no other reward."""
    judged: list[str] = []
    scored: list[str] = []

    def judge(completions: list[str], **_: Any) -> list[float]:
        judged.extend(completions)
        return [0.0] * len(completions)

    def other(completions: list[str], **_: Any) -> list[float]:
        scored.extend(completions)
        return [0.5] * len(completions)

    recipe = recipe_of(num_eval_prompts=6, eval_samples=3, eval_batch_size=4, reward_funcs=["accuracy"])
    task = load_task(recipe)._replace(reward_functions={"accuracy": judge, "other": other})
    options = evaluation_options(recipe) | {"check": judge}
    monkeypatch.setattr(stage_work, "evaluation_options", lambda _: options)
    found, _ = stage_work._evaluate(task, stage_work._build_sampler(task, recipe), recipe)
    assert (len(judged), len(scored)) == (6 * 3 + 6, 6 * 3)
    assert (found["eval_accuracy"], found["eval_other"]) == (0.0, 0.5)


def test_a_sample_that_no_function_scored_has_no_reward(tmp_path: Path) -> None:
    """It was shown with 0, as one that was scored and earned nothing."""
    keep = {"test_training_metrics:never": 0.0}
    options = Sample(
        keep=keep, prompts=2, samples=2, eval_batch_size=4, num_completions_to_print=4, max_completion_length=3,
        device="cpu", num_eval_prompts=0, output_dir=str(tmp_path),
    )  # fmt: skip
    task, stage = load_task(options, least=1), Stage("samples", options)
    with pytest.raises(ValueError, match="none of 4 completions earned"):
        stage_work._sample(stage, task, stage_work._build_sampler(task, stage.options), task.train_rows)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["reward"] for sample in samples] == [None] * 4
