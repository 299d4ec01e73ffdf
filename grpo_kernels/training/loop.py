"""The GRPO loop: sample groups, score them, take optimizer steps on them, in one process or many.

Given the same completions its losses and gradient norms are TRL's, with two exceptions: every iteration over a
generation has an order of its own, and a mean over local tokens (``loss_type="bnpo"``, the entropy bonus of means over
tokens) is one over the whole step, where TRL takes each micro-batch's. ``metrics.py`` says where metrics depart. Unlike
TRL's trainer it has no tools and images.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import get_scheduler

from grpo_kernels import PolicyMetrics, check_device_values, group_advantages, mask_truncated
from grpo_kernels.rewards import total
from grpo_kernels.training.checkpoint import TrainingState, load_weights, read_state
from grpo_kernels.training.data.files import Row
from grpo_kernels.training.data.rows import RowOrder
from grpo_kernels.training.metrics import (
    SilentRewards,
    correction_metrics,
    correction_statistics,
    informative_groups,
    length_metrics,
    mean_of_logged,
    reward_metrics,
)
from grpo_kernels.training.models import (
    backward,
    build_accelerator,
    build_optimizer,
)
from grpo_kernels.training.policy import Policy, training_mode
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.report import SampleRecord
from grpo_kernels.training.rollout import Rollout, Sampler, Scored, concat_scored, ends, score_rollout
from grpo_kernels.training.task import Task, build_sampler, fitting_rows

_LOGGER = logging.getLogger(__name__)


class Batch(NamedTuple):
    """B scored completions, ready for the loss."""

    rollout: Rollout
    advantages: Tensor  # [B]
    old_logprobs: Tensor | None  # [B, T]; None where every ratio is 1
    ref_logprobs: Tensor | None  # [B, T]; None at beta 0
    num_items: float | None = None  # what an optimizer step's loss is divided by; None: its own tokens or sequences

    def select(self, indices: Tensor) -> Batch:
        """The completions at ``indices``."""
        rollout = self.rollout.select(indices)
        length = rollout.completion_ids.shape[1]
        old, ref = (None if t is None else t[indices, :length] for t in (self.old_logprobs, self.ref_logprobs))
        return Batch(rollout, self.advantages[indices], old, ref, self.num_items)


class Step(NamedTuple):
    """What one optimizer step reports."""

    number: int  # from 1
    metrics: dict[str, float]  # under TRL's names
    samples: list[SampleRecord]  # of this process alone where they are not to be printed
    ends_generation: bool = True  # nothing that was sampled is left to train on


class GRPOLoop:
    """Trains ``task.model`` in place.

    Args:
        task: The model, its tokenizer, the rows and the reward functions; the same in every process.
        recipe: The hyper-parameters. Batch sizes are per process.
        accelerator: Of the processes; by default one on the model's device.
        sampler: Draws the completions; by default the recipe's. Its log-probabilities, if it gives any, correct the
            loss as ``vllm_importance_sampling_mode`` says.
    """

    def __init__(
        self, task: Task, recipe: Recipe, accelerator: Accelerator | None = None, sampler: Sampler | None = None
    ) -> None:
        self.model, self.tokenizer = task.model, task.tokenizer
        self.accelerator = accelerator or build_accelerator(bf16=recipe.bf16, cpu=task.model.device.type == "cpu")
        self.recipe = recipe
        self.sampler = sampler or build_sampler(task, recipe, self.accelerator, recipe.temperature)
        self.config = recipe.loss_config(corrected=self.sampler.gives_logprobs)
        self.reward_functions = task.reward_functions
        self.policy = Policy(self.model, self.config, backend=recipe.backend, packing=recipe.packing,
                             aux_loss_coef=recipe.router_aux_loss_coef)  # fmt: skip
        optimizer = build_optimizer(
            self.model,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            betas=(recipe.adam_beta1, recipe.adam_beta2),
            epsilon=recipe.adam_epsilon,
        )
        self.optimizer = self.policy.wrap(
            optimizer,
            self.accelerator,
            bf16=recipe.bf16,
            micro_batch_size=recipe.per_device_train_batch_size,
            max_grad_norm=recipe.max_grad_norm,
        )
        self.schedule = get_scheduler(recipe.lr_scheduler_type, self.optimizer, recipe.warmup_steps, recipe.max_steps)
        self.rows = fitting_rows(
            task, task.train_rows, recipe, least=recipe.prompts_per_generation, sampler=self.sampler
        )
        self.row_order = RowOrder(self.rows, recipe.seed)
        self.global_step = 0  # of the last optimizer step
        self.num_tokens = 0  # of prompts and completions, of all processes, so far
        self._silent = SilentRewards(list(self.reward_functions))

    def training_state(self) -> TrainingState:
        """What a checkpoint keeps beside the model."""
        place = {
            "step": self.global_step,
            "rows_drawn": self.row_order.drawn,
            "rows": self.row_order.digest,
            "schedule": self.schedule.state_dict(),
            "num_tokens": self.num_tokens,
        }
        return TrainingState(self.policy.wrapped, self.optimizer, self.accelerator, place, asdict(self.recipe))

    def restore(self, checkpoint: Path) -> None:
        """Goes on from a checkpoint; raises ValueError where that is of another run, or cut short."""
        load_weights(checkpoint, self.model, self.policy.wrapped)
        place = read_state(checkpoint, self.training_state())
        if place["rows"] != self.row_order.digest:
            raise ValueError(f"checkpoint {checkpoint} is of another run: the training rows are others now")
        self.schedule.load_state_dict(place["schedule"])
        self.row_order.take(place["rows_drawn"])
        self.global_step, self.num_tokens = place["step"], place["num_tokens"]

    def steps(self) -> Iterator[Step]:
        """Generations and their optimizer steps, until ``max_steps``."""
        while self.global_step < self.recipe.max_steps:
            start = time.perf_counter()
            batch, generation_metrics, samples = self.collect()
            steps = list(self.optimizer_batches(batch))
            for k, micro_batches in enumerate(steps, start=1):
                self.global_step += 1
                metrics = {**generation_metrics, **self.optimizer_step(micro_batches)}
                metrics["step_time"] = time.perf_counter() - start
                yield Step(self.global_step, metrics, samples, ends_generation=k == len(steps))
                start = time.perf_counter()
                if self.global_step == self.recipe.max_steps:
                    break
        self._silent.raise_if_all_silent()

    def collect(self) -> tuple[Batch, dict[str, float], list[SampleRecord]]:
        """Samples ``num_generations`` completions of each of the next prompts and scores them.

        The batch is this process's own, metrics are of all, and so are samples that will be printed. With
        ``dynamic_sampling`` rewards and lengths are of everything that was sampled, samples of what is trained on.
        """
        rounds, missing = [self._sample()], 0
        sampled = chosen = rounds[0]
        if self.recipe.dynamic_sampling:
            sampled, chosen, missing = self._sample_until_informative(rounds)
        all_rewards = self._gather(sampled.rewards)
        self._silent.note(all_rewards, self.global_step + 1)
        metrics = self._reward_metrics(all_rewards) | self._length_metrics(sampled.rollout)
        metrics |= mean_of_logged(gather_object([sampled.metrics]))
        if self.recipe.dynamic_sampling:
            all_rewards = self._gather(chosen.rewards)
            metrics |= self._sampling_metrics(len(rounds), missing)
        batch = self._make_batch(chosen.rollout, all_rewards, missing * self.recipe.num_generations)
        if self.config.rollout_correction is not None:
            metrics |= self._correction_metrics(chosen.rollout, batch)
        totals, advantages = total(chosen.rewards, self.recipe.reward_weights).tolist(), batch.advantages.tolist()
        samples = list(map(SampleRecord, chosen.prompts, chosen.completions, totals, advantages, chosen.extras))
        return batch, metrics, gather_object(samples) if self._will_show() else samples

    def optimizer_batches(self, batch: Batch) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step: every iteration is a new permutation of the generation."""
        size = self.recipe.per_device_train_batch_size
        for _ in range(self.recipe.num_iterations):
            order = torch.randperm(len(batch.advantages)).to(batch.advantages.device)
            for indices in order.split(size * self.recipe.gradient_accumulation_steps):
                yield [batch.select(part) for part in indices.split(size)]

    def optimizer_step(self, micro_batches: list[Batch]) -> dict[str, float]:
        """One step of AdamW on the micro-batches of all processes as if they were one batch.

        Raises:
            RuntimeError: The gradient is not finite.
        """
        metrics = self.accumulate_gradients(micro_batches)
        limit = self.recipe.max_grad_norm or float("inf")
        norm = self.accelerator.clip_grad_norm_(self.policy.wrapped.parameters(), limit)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not math.isfinite(norm):
            raise RuntimeError(f"the gradient norm of step {self.global_step} is {norm}")
        metrics |= {"grad_norm": norm, "learning_rate": self.schedule.get_last_lr()[0]}
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return metrics

    def accumulate_gradients(self, micro_batches: list[Batch]) -> dict[str, float]:
        """Adds the gradient of the loss over all micro-batches to the parameters; returns the loss and its metrics.

        Each micro-batch's mean counts by its share of the step's tokens, or of its sequences where the loss type
        averages over those: the normaliser is global, however the step is cut, over micro-batches or processes. It is
        the batch's ``num_items`` where that is known.
        """
        by_token = self.config.aggregation == "token-mean"
        sizes = [int(b.rollout.completion_mask.sum()) if by_token else len(b.advantages) for b in micro_batches]
        processes = self.accelerator.num_processes
        num_items = micro_batches[0].num_items
        if num_items is None:
            num_items = self.accelerator.reduce(torch.tensor(sum(sizes), device=self.model.device), "sum").item()
        losses, parts, aux_losses = [], [], []
        with training_mode(self.policy.wrapped, self.recipe.gradient_checkpointing):
            for k, (batch, size) in enumerate(zip(micro_batches, sizes, strict=True), start=1):
                is_last = k == len(micro_batches)
                with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.policy.wrapped):
                    loss, output, aux_loss = self.policy.loss(
                        batch.rollout,
                        batch.advantages,
                        old_logprobs=batch.old_logprobs,
                        ref_logprobs=batch.ref_logprobs,
                        sampling_logprobs=batch.rollout.sampling_logprobs,
                        loss_scale=processes * size / max(num_items, 1),  # gradients are averaged over processes
                        aux_loss_scale=1 / len(micro_batches),
                    )
                    backward(loss, self.accelerator, is_last)
                losses.append(loss.detach())
                parts.append(output.metrics)
                aux_losses += [] if aux_loss is None else [aux_loss.detach()]
        check_device_values(self.model.device)
        metrics = PolicyMetrics.combined(parts)
        if processes > 1:
            metrics = metrics.reduce()
        results = {"loss": self.accelerator.reduce(torch.stack(losses).sum(), "mean")} | dict(metrics)
        if aux_losses:
            results["aux_loss"] = self.accelerator.reduce(torch.stack(aux_losses).mean(), "mean")
        return {name: value.item() for name, value in results.items()}

    def _sample(self) -> Scored:
        """Completions of the next prompts, with their rewards."""
        recipe = self.recipe
        scored = score_rollout(
            self.sampler,
            self.tokenizer,
            [row for row in self._next_rows() for _ in range(recipe.num_generations)],
            self.reward_functions,
            prompt_format=recipe.prompt_format,
            step=self.global_step,
            max_steps=recipe.max_steps,
            group_size=recipe.num_generations,
        )
        if recipe.shuffle_rewards:
            scored = scored._replace(rewards=scored.rewards[torch.randperm(len(scored.rewards))])
        return scored

    def _sample_until_informative(self, rounds: list[Scored]) -> tuple[Scored, Scored, int]:
        """Adds rounds until every process has a batch of groups whose rewards differ, or they are as many as may be.

        Returns:
            All that was sampled here, this process's batch, and how many groups at its end are there for want of
            better ones.
        """
        recipe, wanted = self.recipe, self.recipe.prompts_per_generation
        while True:
            sampled = concat_scored(rounds)
            differs = informative_groups(
                sampled.rewards, recipe.num_generations, recipe.reward_weights, recipe.multi_objective_aggregation
            )
            missing = max(0, wanted - int(differs.sum()))
            is_full = not self._gather(torch.tensor([missing])).any()
            if is_full or len(rounds) == recipe.max_generation_batches:
                break
            rounds.append(self._sample())
        order = torch.cat([differs.nonzero()[:, 0], (~differs).nonzero()[:, 0]])[:wanted]
        return sampled, sampled.groups(order, recipe.num_generations), missing

    def _make_batch(self, rollout: Rollout, all_rewards: Tensor, dropped: int = 0) -> Batch:
        """This process's part of the batch, with advantages from the rewards of all.

        Args:
            rollout: B completions.
            all_rewards: The rewards ``[B * processes, K]`` of all processes.
            dropped: How many at the end stay out of the loss.
        """
        recipe = self.recipe
        device = self.model.device
        weights = None if recipe.reward_weights is None else torch.tensor(recipe.reward_weights, device=device)
        advantages = group_advantages(
            all_rewards.to(device),
            recipe.num_generations,
            scale_rewards=recipe.scale_rewards,
            reward_weights=weights,
            aggregation=recipe.multi_objective_aggregation,
            backend=recipe.backend,
        )
        first = self.accelerator.process_index * len(rollout.completion_ids)
        advantages = advantages[first : first + len(rollout.completion_ids)]
        size = recipe.per_device_train_batch_size
        needs_old = not recipe.is_on_policy or self.config.rollout_correction is not None
        old_logprobs = self.policy.logprobs(rollout, size) if needs_old else None
        ref_logprobs = None if self.policy.reference is None else self.policy.logprobs(rollout, size, reference=True)
        if recipe.mask_truncated_completions:
            mask = mask_truncated(rollout.completion_ids, rollout.completion_mask, self.sampler.end_ids)
            rollout = rollout._replace(completion_mask=mask)
        if dropped:
            kept = torch.arange(len(advantages), device=device) < len(advantages) - dropped
            rollout = rollout._replace(completion_mask=rollout.completion_mask * kept[:, None])
        return Batch(rollout, advantages, old_logprobs, ref_logprobs, self._num_items(rollout))

    def _num_items(self, rollout: Rollout) -> float | None:
        """The generation's tokens, of all processes, over its optimizer steps; None unless the loss is their mean.

        As in TRL, so that a token counts alike in whichever step of the generation it comes.
        """
        if self.config.aggregation != "token-mean" or self.config.loss_type in ("bnpo", "ppo"):
            return None
        steps = self.recipe.steps_per_generation // self.recipe.gradient_accumulation_steps
        return self.accelerator.reduce(rollout.completion_mask.sum(), "sum").item() / steps

    def _next_rows(self) -> list[Row]:
        """This process's part of the next prompts; every process draws all of them."""
        count = self.recipe.prompts_per_generation
        rows = self.row_order.take(count * self.accelerator.num_processes)
        return rows[self.accelerator.process_index * count :][:count]

    def _gather(self, values: Tensor) -> Tensor:
        """Rows of all processes, in their order, on the host."""
        return self.accelerator.gather(values.to(self.model.device)).cpu()

    def _will_show(self) -> bool:
        """Whether samples are printed after one of the generation's optimizer steps."""
        recipe, interval = self.recipe, self.recipe.completions_steps
        if not interval or not recipe.num_completions_to_print:
            return False
        steps = recipe.num_iterations * recipe.steps_per_generation // recipe.gradient_accumulation_steps
        return (self.global_step + steps) // interval > self.global_step // interval

    def _reward_metrics(self, rewards: Tensor) -> dict[str, float]:
        recipe = self.recipe
        options = (recipe.num_generations, recipe.reward_weights, recipe.multi_objective_aggregation)
        return reward_metrics(rewards, list(self.reward_functions), *options)

    def _length_metrics(self, rollout: Rollout) -> dict[str, float]:
        """Of all completions; adds up the tokens."""
        ended = self._gather(ends(rollout, self.sampler.end_ids).long()).bool()
        masks = (rollout.prompt_mask, rollout.completion_mask)
        prompt_lengths, lengths = (self._gather(mask.sum(dim=1)) for mask in masks)
        self.num_tokens += int(prompt_lengths.sum() + lengths.sum())
        return {"num_tokens": float(self.num_tokens)} | length_metrics(lengths, ended)

    def _sampling_metrics(self, rounds: int, missing: int) -> dict[str, float]:
        """Of dynamic sampling; groups are counted over all processes."""
        processes, prompts = self.accelerator.num_processes, self.recipe.prompts_per_generation
        all_missing = int(self._gather(torch.tensor([missing])).sum())
        if all_missing and self.accelerator.is_main_process:
            _LOGGER.warning(
                "step %d: after max_generation_batches=%d batches of prompts %d of %d groups still have equal rewards; "
                "they stay out of the loss", self.global_step + 1, rounds, all_missing, prompts * processes,
            )  # fmt: skip
        return {
            "dynamic_sampling/generation_batches": float(rounds),
            "dynamic_sampling/groups_dropped": float((rounds - 1) * prompts * processes + all_missing),
            "dynamic_sampling/groups_missing": float(all_missing),
        }

    def _correction_metrics(self, rollout: Rollout, batch: Batch) -> dict[str, float]:
        """Over the tokens of the loss, as TRL's, and how many completions of the rollout have none."""
        mask, sampling_logprobs = batch.rollout.completion_mask, batch.rollout.sampling_logprobs
        statistics = correction_statistics(batch.old_logprobs, sampling_logprobs, mask, self.config)
        empty = self._gather((rollout.completion_mask.sum(dim=1) == 0).long()).sum()
        return {"sampling/empty_completions": float(empty)} | correction_metrics(self._gather(statistics))
