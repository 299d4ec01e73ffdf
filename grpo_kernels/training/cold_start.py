"""A short supervised start, so that the first rollouts of GRPO earn a reward now and then."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_kernels import token_logprobs
from grpo_kernels.training.data import Row
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.rollout import Rollout, completion_logits, teacher_forced
from grpo_kernels.training.templates import remaining_completion, render_prompt


def cold_start(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], recipe: Recipe
) -> Iterator[float]:
    """Trains on the rows that have a ``completion``, for ``sft_steps`` steps of AdamW with linear decay.

    Yields:
        The loss of each step, in nats per token.

    Raises:
        ValueError: No row has a completion.
    """
    if not recipe.sft_steps:
        return
    examples = [row for row in rows if row.get("completion")]
    if not examples:
        raise ValueError(f"sft_steps is {recipe.sft_steps}, but no row of {recipe.dataset_name!r} has a completion")
    rng = random.Random(recipe.seed)

    def next_loss() -> Tensor:
        batch = worked_batch(model, tokenizer, rng.choices(examples, k=recipe.sft_batch_size), recipe)
        logprobs = token_logprobs(  # by the reference, so that GRPO starts from one model whatever its backend
            completion_logits(model, batch), batch.completion_ids, mask=batch.completion_mask, backend="torch"
        ).logprobs
        return -logprobs.sum() / batch.completion_mask.sum()

    yield from descend(model, next_loss, recipe)


def worked_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], recipe: Recipe
) -> Rollout:
    """The completions of rows, on the model's device, without what their prompts already hold of them."""
    prompts = [render_prompt(row, tokenizer, recipe.prompt_template, recipe.system_prompt) for row in rows]
    pairs = zip(rows, prompts, strict=True)
    rest = [remaining_completion(row, prompt, row["completion"]) for row, prompt in pairs]
    batch = teacher_forced(tokenizer, prompts, rest)
    return Rollout(*(None if tensor is None else tensor.to(model.device) for tensor in batch))


def descend(model: PreTrainedModel, next_loss: Callable[[], Tensor], recipe: Recipe) -> Iterator[float]:
    """``sft_steps`` steps of AdamW with linear decay, each on one loss; yields it.

    Raises:
        RuntimeError: A gradient is not finite.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.sft_learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / recipe.sft_steps)
    for _ in range(recipe.sft_steps):
        loss = next_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        yield loss.item()
