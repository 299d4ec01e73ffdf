"""A short supervised start, so that the first rollouts of GRPO earn a reward now and then."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_kernels import sft_loss
from grpo_kernels.integrations.transformers.model_head import Projection, open_head
from grpo_kernels.training.data import Row
from grpo_kernels.training.policy import base_model
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.rollout import Rollout, headed, teacher_forced
from grpo_kernels.training.sampling import context_length_of
from grpo_kernels.training.templates import encode_prompts, remaining_completion, render_prompts
from grpo_kernels.training.wrapping import check_trainable

_LOGGER = logging.getLogger(__name__)


class SupervisedStep(NamedTuple):
    """What one optimizer step of a supervised training reports."""

    loss: float  # nats per token
    tokens: int  # that it was taken over


def cold_start(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], recipe: Recipe
) -> Iterator[SupervisedStep]:
    """Trains on the rows that have a ``completion``, for ``sft_steps`` steps of AdamW with linear decay.

    Raises:
        ValueError: No row has a completion, or none fits into the model's context.
        RuntimeError: A gradient is not finite.
    """
    if not recipe.sft_steps:
        return
    examples = [row for row in rows if row.get("completion")]
    if not examples:
        raise ValueError(f"sft_steps is {recipe.sft_steps}, but no row of {recipe.dataset_name!r} has a completion")
    examples = traces_that_fit(model, tokenizer, examples, recipe)
    rng = random.Random(recipe.seed)
    model = base_model(model)

    def next_batch() -> Rollout:
        return worked_batch(model, tokenizer, rng.choices(examples, k=recipe.sft_batch_size), recipe)

    open_head(model)
    yield from descend(model, next_batch, worked_loss, recipe)


def worked_loss(model: PreTrainedModel, batch: Rollout, tokens: int) -> Tensor:
    """A micro-batch's part of the mean cross-entropy of a step's ``tokens``."""
    length = batch.completion_ids.shape[1]

    def loss(hidden: Tensor, head: Projection) -> Tensor:
        return sft_loss(
            hidden[:, -(length + 1) : -1],
            head.weight,
            batch.completion_ids,
            batch.completion_mask,
            num_items_in_batch=tokens,
            bias=head.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            backend="torch",  # the reference, so that GRPO starts from one model whatever its backend
        )

    return headed(model, batch, loss)


def traces_that_fit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], recipe: Recipe
) -> list[Row]:
    """The rows whose prompt has a token, and with its completion no more than the model's context.

    What is left out is counted in a warning.

    Raises:
        ValueError: No row is left.
    """
    bound = context_length_of(model)
    limit = math.inf if bound is None else bound - 1  # the end token comes after the completion
    prompts, completions = _texts(rows, tokenizer, recipe)
    prompt_ids, completion_ids = encode_prompts(prompts, tokenizer), tokenizer(completions, add_special_tokens=False)
    pairs = zip(rows, prompt_ids, completion_ids["input_ids"], strict=True)
    fitting = [row for row, prompt, completion in pairs if prompt and len(prompt) + len(completion) <= limit]
    if len(fitting) < len(rows):
        _LOGGER.warning(
            "%d of %d traces are left out, whose prompt has no token or which are longer than the context of %s tokens",
            len(rows) - len(fitting), len(rows), bound,
        )  # fmt: skip
    if not fitting:
        raise ValueError(
            f"a trace must have a prompt and be no longer than the context of {bound} tokens, got {len(rows)} others"
        )
    return fitting


def worked_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], recipe: Recipe
) -> Rollout:
    """The completions of rows, on the model's device, without what their prompts already hold of them."""
    batch = teacher_forced(tokenizer, *_texts(rows, tokenizer, recipe))
    return Rollout(*(None if tensor is None else tensor.to(model.device) for tensor in batch))


def _texts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> tuple[list[str], list[str]]:
    """The rendered prompts of rows, and what they leave of the completions."""
    prompts = render_prompts(rows, tokenizer, recipe.prompt_format)
    pairs = zip(rows, prompts, strict=True)
    return prompts, [remaining_completion(row, prompt, row["completion"]) for row, prompt in pairs]


def descend(
    model: PreTrainedModel,
    next_batch: Callable[[], Rollout],
    loss_of: Callable[[PreTrainedModel, Rollout, int], Tensor],
    recipe: Recipe,
) -> Iterator[SupervisedStep]:
    """``sft_steps`` steps of AdamW with linear decay, each on one batch.

    Args:
        model: What is trained.
        next_batch: The completions of the next step.
        loss_of: A micro-batch's part of the loss, a mean over the step's tokens, of which the last argument says how
            many there are. A step has ``gradient_accumulation_steps`` micro-batches.
        recipe: Says the steps, the learning rate and the micro-batches.

    Raises:
        RuntimeError: A gradient is not finite.
        ValueError: The weights have 16 bits, which most updates are too small for.
    """
    check_trainable(model, "set dtype=float32")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.sft_learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / recipe.sft_steps)
    size = math.ceil(recipe.sft_batch_size / recipe.gradient_accumulation_steps)
    for _ in range(recipe.sft_steps):
        batch = next_batch()
        tokens, losses = int(batch.completion_mask.sum()), []
        for part in torch.arange(len(batch.completion_ids), device=batch.completion_ids.device).split(size):
            loss = loss_of(model, batch.select(part), tokens)
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        yield SupervisedStep(sum(losses), tokens)
