"""Supervised training: on worked completions, and on a teacher's distributions over tokens.

The latter is generalised knowledge distillation (arXiv:2306.13649), under the names of TRL's GKD and distillation
trainers, for two models with one vocabulary.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_kernels import distillation_loss, sft_loss
from grpo_kernels.integrations.transformers.model_head import Projection, open_head
from grpo_kernels.training.data.files import Row
from grpo_kernels.training.data.templates import PromptFormat, encode_prompts, remaining_completion, render_prompts
from grpo_kernels.training.models import base_model, check_trainable, context_length_of
from grpo_kernels.training.rollout import Rollout, Sampler, forward_with_head, teacher_forced

_LOGGER = logging.getLogger(__name__)


class SupervisedStep(NamedTuple):
    """What one optimizer step of a supervised training reports."""

    loss: float  # nats per token
    tokens: int  # that it was taken over


def train_supervised(
    model: PreTrainedModel,  # changed
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],  # those without a completion are passed over
    *,
    batch_size: int,  # rows in a step
    seed: int,  # of their order
    prompt_format: PromptFormat,
    **options: Any,  # of optimize
) -> Iterator[SupervisedStep]:
    """Trains on the completions of rows.

    Raises:
        ValueError: No row has a completion, or none fits into the model's context.
        RuntimeError: A gradient is not finite.
    """
    examples = [row for row in rows if row.get("completion")]
    if not examples:
        raise ValueError("no row has a completion to train on")
    examples = traces_that_fit(model, tokenizer, examples, prompt_format)
    rng = random.Random(seed)
    model = base_model(model)

    def next_batch() -> Rollout:
        return trace_batch(model, tokenizer, rng.choices(examples, k=batch_size), prompt_format)

    open_head(model)
    yield from optimize(model, next_batch, trace_loss, batch_size=batch_size, **options)


def distill(
    student: PreTrainedModel,  # changed
    teacher: PreTrainedModel,  # held fixed, on the same device; its width and dtype are its own
    tokenizer: PreTrainedTokenizerBase,  # of both
    rows: Sequence[Row],  # with completions, for the steps that are not on the student's own samples
    problems: Sequence[Row],  # what the student samples from in the others
    *,
    sampler: Sampler,  # draws its samples
    beta: float,
    lmbda: float,
    temperature: float,  # divides the logits of both
    batch_size: int,  # completions in a step
    seed: int,  # of their order
    prompt_format: PromptFormat,
    backend: str = "auto",
    **options: Any,  # of optimize
) -> Iterator[SupervisedStep]:
    """Trains the student towards the teacher's distributions.

    Args:
        beta: Of the divergence: 0 is KL from the teacher, 1 KL from the student, between them the generalised
            Jensen-Shannon divergence with that much of the teacher in the mixture.
        lmbda: The share of steps on the student's own samples.

    Raises:
        ValueError: No row fits into the student's context.
        RuntimeError: A gradient is not finite.
    """
    open_head(student)
    open_head(teacher)
    traces = traces_that_fit(student, tokenizer, rows, prompt_format) if rows else []
    rng = random.Random(seed)

    def next_batch() -> Rollout:
        if rng.random() < lmbda:
            return sampler(render_prompts(rng.choices(problems, k=batch_size), tokenizer, prompt_format))
        return trace_batch(student, tokenizer, rng.choices(traces, k=batch_size), prompt_format)

    def loss_of(model: PreTrainedModel, batch: Rollout, tokens: int) -> Tensor:
        divergence = {"beta": beta, "temperature": temperature, "backend": backend}
        return distillation_batch_loss(model, teacher, batch, num_items_in_batch=tokens, **divergence)

    yield from optimize(student, next_batch, loss_of, batch_size=batch_size, **options)


def optimize(
    model: PreTrainedModel,  # changed
    next_batch: Callable[[], Rollout],  # the completions of the next step
    loss_of: Callable[[PreTrainedModel, Rollout, int], Tensor],  # a micro-batch's part of the mean over so many tokens
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,  # at the first step
    accumulation_steps: int = 1,  # micro-batches that a batch is cut into
) -> Iterator[SupervisedStep]:
    """Steps of AdamW with linear decay, each on one batch.

    Raises:
        RuntimeError: A gradient is not finite.
        ValueError: The weights have 16 bits, which most updates are too small for.
    """
    check_trainable(model, "set dtype=float32")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    size = math.ceil(batch_size / accumulation_steps)
    for _ in range(steps):
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


def trace_loss(model: PreTrainedModel, batch: Rollout, tokens: int) -> Tensor:
    """A micro-batch's part of the mean cross-entropy of a step's ``tokens``."""

    def loss(hidden: Tensor, head: Projection) -> Tensor:
        return sft_loss(
            batch.predicting(hidden),
            head.weight,
            batch.completion_ids,
            batch.completion_mask,
            num_items_in_batch=tokens,
            backend="torch",  # the reference, so that GRPO starts from one model whatever its backend
            **head.options,
        )

    return forward_with_head(model, batch, loss)


def distillation_batch_loss(
    student: PreTrainedModel,  # both with heads that open_head has opened
    teacher: PreTrainedModel,
    batch: Rollout,  # on their device
    *,
    beta: float,  # as for distill
    num_items_in_batch: int | None = None,  # tokens that the mean divides by; by default the batch's
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """The mean divergence of both models' distributions over a batch's tokens, as TRL's ``generalized_jsd_loss``.

    From hidden states, without either model's logits as a whole. Of heads that are padded to unequal sizes the rows
    beyond the shorter one take no part.
    """

    def hidden_and_head(hidden: Tensor, head: Projection) -> tuple[Tensor, Projection]:
        return batch.predicting(hidden), head

    with torch.no_grad():
        targets, teacher_head = forward_with_head(teacher, batch, hidden_and_head)

    def loss(hidden: Tensor, head: Projection) -> Tensor:
        size = min(len(head.weight), len(teacher_head.weight))
        return distillation_loss(
            batch.predicting(hidden),
            head.weight[:size],
            batch.completion_ids,
            batch.completion_mask,
            teacher_hidden_states=targets,
            teacher_lm_head_weight=teacher_head.weight[:size],
            teacher_bias=None if teacher_head.bias is None else teacher_head.bias[:size],
            divergence={0: "forward_kl", 1: "reverse_kl"}.get(beta, "js"),
            mixture=beta,
            num_items_in_batch=num_items_in_batch,
            temperature=temperature,
            bias=None if head.bias is None else head.bias[:size],
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            teacher_softcap=teacher_head.softcap,
            teacher_logit_scale=teacher_head.logit_scale,
            loss_scale=temperature**-2,  # TRL's mean has no factor of temperature
            backend=backend,
        ).loss

    return forward_with_head(student, batch, loss)


def check_vocabularies(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises ValueError unless both tokenizers have the same tokens under the same ids."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        raise ValueError(
            f"beta must be None for a teacher with another vocabulary: of {len(ours)} tokens and the teacher's "
            f"{len(theirs)}, {len(ours.items() ^ theirs.items())} differ"
        )


def traces_that_fit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], prompt_format: PromptFormat
) -> list[Row]:
    """The rows whose prompt has a token, and with its completion no more than the model's context.

    What is left out is counted in a warning. Raises ValueError where no row is left.
    """
    bound = context_length_of(model)
    limit = math.inf if bound is None else bound - 1  # the end token comes after the completion
    prompts, completions = _prompts_and_completions(rows, tokenizer, prompt_format)
    prompt_ids, completion_ids = encode_prompts(prompts, tokenizer), tokenizer(completions, add_special_tokens=False)
    triples = zip(rows, prompt_ids, completion_ids["input_ids"], strict=True)
    fitting = [row for row, prompt, completion in triples if prompt and len(prompt) + len(completion) <= limit]
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


def trace_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], prompt_format: PromptFormat
) -> Rollout:
    """The completions of rows, on the model's device, without what their prompts already hold of them."""
    batch = teacher_forced(tokenizer, *_prompts_and_completions(rows, tokenizer, prompt_format))
    return Rollout(*(None if tensor is None else tensor.to(model.device) for tensor in batch))


def _prompts_and_completions(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat
) -> tuple[list[str], list[str]]:
    """The rendered prompts of rows, and what they leave of the completions."""
    prompts = render_prompts(rows, tokenizer, prompt_format)
    pairs = zip(rows, prompts, strict=True)
    return prompts, [remaining_completion(row, prompt, row["completion"]) for row, prompt in pairs]
