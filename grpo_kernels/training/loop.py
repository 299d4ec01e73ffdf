"""The GRPO loop: sample groups, score them, take optimizer steps on them.

What it leaves out, compared with TRL's trainer: several processes, adapters, an inference engine, tools. The model
stays in eval mode (no dropout), so that recomputed log-probs agree with the sampled ones.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import get_scheduler

from grpo_kernels import check_device_values, group_advantages, grpo_loss
from grpo_kernels.ops.policy_loss.metrics import PolicyMetrics
from grpo_kernels.training.data import Row, Task, render_prompt
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.rewards import score, total
from grpo_kernels.training.rollout import (
    Rollout,
    completion_logits,
    completion_logprobs,
    completion_texts,
    end_token_ids,
    ends,
    generate,
)


class Batch(NamedTuple):
    """B scored completions, ready for the loss."""

    rollout: Rollout
    advantages: Tensor  # [B]
    old_logprobs: Tensor | None  # [B, T]; None where every ratio is 1
    ref_logprobs: Tensor | None  # [B, T]; None at beta 0

    def select(self, indices: Tensor) -> Batch:
        """The completions at ``indices``."""
        rollout = self.rollout.select(indices)
        length = rollout.completion_ids.shape[1]
        old, ref = (None if t is None else t[indices, :length] for t in (self.old_logprobs, self.ref_logprobs))
        return Batch(rollout, self.advantages[indices], old, ref)


class Sample(NamedTuple):
    """One completion as text, for people to read."""

    prompt: str
    completion: str
    reward: float


class Step(NamedTuple):
    """What one optimizer step reports."""

    number: int  # from 1
    metrics: dict[str, float]  # under TRL's names
    samples: list[Sample]


class GRPOLoop:
    """Trains ``task.model`` in place.

    Args:
        task: The model, its tokenizer, the rows and the reward functions.
        recipe: The hyper-parameters.
    """

    def __init__(self, task: Task, recipe: Recipe) -> None:
        self.model, self.tokenizer, self.rows = task.model, task.tokenizer, task.train_rows
        self.recipe = recipe
        self.config = recipe.loss_config()
        self.reward_functions = task.reward_functions
        self.reference = copy.deepcopy(self.model).requires_grad_(False) if recipe.beta else None
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=recipe.learning_rate,
            betas=(recipe.adam_beta1, recipe.adam_beta2),
            eps=recipe.adam_epsilon,
            weight_decay=recipe.weight_decay,
        )
        self.schedule = get_scheduler(recipe.lr_scheduler_type, self.optimizer, recipe.warmup_steps, recipe.max_steps)
        self._row_order = _shuffled_forever(self.rows, recipe.seed)

    def run(self) -> Iterator[Step]:
        """Generations and their optimizer steps, until ``max_steps``."""
        number = 0
        while True:
            start = time.perf_counter()
            batch, generation_metrics, samples = self.collect()
            for micro_batches in self.optimizer_batches(batch):
                number += 1
                metrics = {**generation_metrics, **self.optimizer_step(micro_batches)}
                metrics["step_time"] = time.perf_counter() - start
                yield Step(number, metrics, samples)
                if number == self.recipe.max_steps:
                    return
                start = time.perf_counter()

    def collect(self) -> tuple[Batch, dict[str, float], list[Sample]]:
        """Samples ``num_generations`` completions of each of the next prompts and scores them."""
        recipe = self.recipe
        rows = [row for row in self._next_rows() for _ in range(recipe.num_generations)]
        texts = [render_prompt(row, self.tokenizer, recipe.system_prompt) for row in rows]
        rollout = generate(
            self.model,
            self.tokenizer,
            texts,
            max_completion_length=recipe.max_completion_length,
            temperature=recipe.temperature,
        )
        completions = completion_texts(rollout, self.tokenizer)
        columns = {name: [row.get(name) for row in rows] for name in rows[0] if name not in ("prompt", "completion")}
        rewards = score(self.reward_functions, [row["prompt"] for row in rows], completions, columns)
        if recipe.shuffle_rewards:
            rewards = rewards[torch.randperm(len(rewards))]
        totals = total(rewards, recipe.reward_weights)
        metrics = self._reward_metrics(rewards, totals) | self._length_metrics(rollout)
        samples = [Sample(*s) for s in zip(texts, completions, totals.tolist(), strict=True)]
        return self._batch(rollout, rewards), metrics, samples

    def optimizer_batches(self, batch: Batch) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step: every iteration is a new permutation of the generation."""
        size = self.recipe.per_device_train_batch_size
        for _ in range(self.recipe.num_iterations):
            order = torch.randperm(len(batch.advantages)).to(batch.advantages.device)
            for indices in order.split(size * self.recipe.gradient_accumulation_steps):
                yield [batch.select(part) for part in indices.split(size)]

    def optimizer_step(self, micro_batches: list[Batch]) -> dict[str, float]:
        """One step of AdamW on the micro-batches as if they were one batch."""
        metrics = self.accumulate_gradients(micro_batches)
        limit = self.recipe.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit, error_if_nonfinite=True)
        metrics |= {"grad_norm": norm.item(), "learning_rate": self.schedule.get_last_lr()[0]}
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return metrics

    def accumulate_gradients(self, micro_batches: list[Batch]) -> dict[str, float]:
        """Adds the gradient of the loss over all micro-batches to the parameters; returns the loss and its metrics.

        Each micro-batch's mean counts by its share of the step's tokens, or of its sequences where the loss type
        averages over those: the normaliser is global, however the step is cut.
        """
        by_token = self.config.aggregation == "token-mean"
        sizes = [int(b.rollout.completion_mask.sum()) if by_token else len(b.advantages) for b in micro_batches]
        loss, parts = 0.0, []
        for batch, size in zip(micro_batches, sizes, strict=True):
            output = grpo_loss(
                completion_logits(self.model, batch.rollout),
                batch.rollout.completion_ids,
                batch.advantages,
                batch.rollout.completion_mask,
                old_logprobs=batch.old_logprobs,
                ref_logprobs=batch.ref_logprobs,
                loss_scale=size / max(sum(sizes), 1),
                config=self.config,
                inplace=True,
                backend=self.recipe.backend,
            )
            output.loss.backward()
            loss += output.loss.item()
            parts.append(output.metrics)
        check_device_values(self.model.device)
        metrics = PolicyMetrics.combined(parts)
        return {"loss": loss, **{name: value.item() for name, value in metrics.items()}}

    def _batch(self, rollout: Rollout, rewards: Tensor) -> Batch:
        recipe = self.recipe
        device = self.model.device
        weights = None if recipe.reward_weights is None else torch.tensor(recipe.reward_weights, device=device)
        advantages = group_advantages(
            rewards.to(device),
            recipe.num_generations,
            scale_rewards=recipe.scale_rewards,
            reward_weights=weights,
            aggregation=recipe.multi_objective_aggregation,
            backend=recipe.backend,
        )
        old_logprobs = None if recipe.is_on_policy else self._logprobs(self.model, rollout)
        ref_logprobs = None if self.reference is None else self._logprobs(self.reference, rollout)
        if recipe.mask_truncated_completions:
            ended = ends(rollout, end_token_ids(self.model, self.tokenizer))
            rollout = rollout._replace(completion_mask=rollout.completion_mask * ended[:, None])
        return Batch(rollout, advantages, old_logprobs, ref_logprobs)

    def _logprobs(self, model: torch.nn.Module, rollout: Rollout) -> Tensor:  # [B, T]
        return completion_logprobs(
            model,
            rollout,
            temperature=self.recipe.temperature,
            batch_size=self.recipe.per_device_train_batch_size,
            backend=self.recipe.backend,
        )

    def _next_rows(self) -> list[Row]:
        return [next(self._row_order) for _ in range(self.recipe.prompts_per_generation)]

    def _reward_metrics(self, rewards: Tensor, totals: Tensor) -> dict[str, float]:
        groups = totals.view(-1, self.recipe.num_generations)
        metrics = {
            "reward": totals.nanmean().item(),
            "reward_std": _nanstd(totals),
            "frac_reward_zero_std": sum(_nanstd(group) < 1e-8 for group in groups) / len(groups),
        }
        for k, name in enumerate(self.reward_functions):
            metrics[f"rewards/{name}/mean"] = rewards[:, k].nanmean().item()
            metrics[f"rewards/{name}/std"] = _nanstd(rewards[:, k])
        return metrics

    def _length_metrics(self, rollout: Rollout) -> dict[str, float]:
        lengths = rollout.completion_mask.sum(dim=1).float()
        ended = ends(rollout, end_token_ids(self.model, self.tokenizer))
        return {
            "completions/mean_length": lengths.mean().item(),
            "completions/min_length": lengths.min().item(),
            "completions/max_length": lengths.max().item(),
            "completions/clipped_ratio": 1.0 - ended.float().mean().item(),
        }


def _shuffled_forever(rows: list[Row], seed: int) -> Iterator[Row]:
    rng = random.Random(seed)
    while True:
        yield from rng.sample(rows, len(rows))


def _nanstd(values: Tensor) -> float:
    """The unbiased standard deviation of what is not NaN; 0 for fewer than two values."""
    known = values[~values.isnan()]
    return known.std().item() if len(known) > 1 else 0.0
