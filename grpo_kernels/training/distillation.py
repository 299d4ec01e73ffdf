"""Distillation on logits: a student learns a teacher's distributions over tokens, where both have one vocabulary.

Generalised knowledge distillation (arXiv:2306.13649), under the names of TRL's GKD and distillation trainers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_kernels import distillation_loss
from grpo_kernels.integrations.transformers.model_head import Projection, open_head
from grpo_kernels.training.cold_start import SupervisedStep, descend, traces_that_fit, worked_batch
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.rollout import Rollout, generate, headed
from grpo_kernels.training.tasks import Row
from grpo_kernels.training.templates import render_prompts


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    problems: Sequence[Row],
    recipe: Recipe,
    *,
    beta: float,
    lmbda: float = 0.0,
) -> Iterator[SupervisedStep]:
    """``sft_steps`` steps of the student towards the teacher, each on ``sft_batch_size`` completions.

    Args:
        student: What is trained.
        teacher: Held fixed, on the same device; its width and dtype are its own.
        tokenizer: Of both.
        rows: With a ``completion``, for the steps that are not on the student's own samples.
        problems: What the student samples from in the others.
        recipe: Says the steps, the batch, the learning rate, and the temperature of samples and distributions.
        beta: Of the divergence: 0 is KL from the teacher, 1 KL from the student, between them the generalised
            Jensen-Shannon divergence with that much of the teacher in the mixture.
        lmbda: The share of steps on the student's own samples.

    Raises:
        ValueError: No row fits into the student's context.
        RuntimeError: A gradient is not finite.
    """
    open_head(student)
    open_head(teacher)
    traces = traces_that_fit(student, tokenizer, rows, recipe) if rows else []
    rng = random.Random(recipe.seed)

    def next_batch() -> Rollout:
        if rng.random() < lmbda:
            return _own_samples(student, tokenizer, rng.choices(problems, k=recipe.sft_batch_size), recipe)
        return worked_batch(student, tokenizer, rng.choices(traces, k=recipe.sft_batch_size), recipe)

    def loss_of(model: PreTrainedModel, batch: Rollout, tokens: int) -> Tensor:
        ways = {"beta": beta, "temperature": recipe.temperature, "backend": recipe.backend}
        return teaching_loss(model, teacher, batch, num_items_in_batch=tokens, **ways)

    yield from descend(student, next_batch, loss_of, recipe)


def check_vocabularies(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises ValueError unless both tokenizers have the same tokens under the same ids."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        differing = len(ours.items() ^ theirs.items())
        raise ValueError(
            f"beta must be None for a teacher with another vocabulary: of {len(ours)} tokens and the teacher's "
            f"{len(theirs)}, {differing} differ"
        )


def teaching_loss(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: Rollout,
    *,
    beta: float,
    num_items_in_batch: int | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """The mean divergence of both models' distributions over a batch's tokens, as TRL's ``generalized_jsd_loss``.

    From hidden states, without either model's logits as a whole. Of heads that are padded to unequal sizes the rows
    beyond the shorter one take no part.

    Args:
        student, teacher: With heads that ``open_head`` has opened.
        batch: Completions on their device.
        beta: As for ``distill``.
        num_items_in_batch: Tokens that the mean divides by; by default the batch's.
        temperature: Divides both models' logits.
        backend: Of the kernels.
    """
    length = batch.completion_ids.shape[1]

    def hidden_and_head(hidden: Tensor, head: Projection) -> tuple[Tensor, Projection]:
        return hidden[:, -(length + 1) : -1], head

    with torch.no_grad():
        targets, taught = headed(teacher, batch, hidden_and_head)

    def loss(hidden: Tensor, head: Projection) -> Tensor:
        size = min(len(head.weight), len(taught.weight))
        return distillation_loss(
            hidden[:, -(length + 1) : -1],
            head.weight[:size],
            batch.completion_ids,
            batch.completion_mask,
            teacher_hidden_states=targets,
            teacher_lm_head_weight=taught.weight[:size],
            teacher_bias=None if taught.bias is None else taught.bias[:size],
            divergence={0: "forward_kl", 1: "reverse_kl"}.get(beta, "js"),
            mixture=beta,
            num_items_in_batch=num_items_in_batch,
            temperature=temperature,
            bias=None if head.bias is None else head.bias[:size],
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            teacher_softcap=taught.softcap,
            teacher_logit_scale=taught.logit_scale,
            loss_scale=temperature**-2,  # TRL's mean has no factor of temperature
            backend=backend,
        ).loss

    return headed(student, batch, loss)


def _own_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], recipe: Recipe
) -> Rollout:
    prompts = render_prompts(rows, tokenizer, recipe.prompt_format)
    return generate(
        model,
        tokenizer,
        prompts,
        max_completion_length=recipe.max_completion_length,
        temperature=recipe.temperature,
    )
