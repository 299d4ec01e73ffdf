"""What tests of the loop share: a model's own logits on a rollout, and samplers and evaluations by a recipe."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from grpo_kernels import token_logprobs
from grpo_kernels.training.evaluation import evaluate, evaluate_samples
from grpo_kernels.training.rollout import Rollout, end_token_ids, forward_arguments, teacher_forced
from grpo_kernels.training.task import build_sampler, evaluation_options


def completion_logits(model: Any, rollout: Rollout) -> torch.Tensor:  # [B, T+1, V]
    """Logits whose position t predicts completion token t; the last position predicts what would follow."""
    length = rollout.completion_ids.shape[1]
    logits = model(**forward_arguments(inspect.signature(model.forward).parameters, rollout)).logits
    return logits if logits.shape[1] == length + 1 else logits[:, -(length + 1) :]


@torch.no_grad()
def completion_logprobs(
    model: Any, rollout: Rollout, *, temperature: float, batch_size: int, backend: str
) -> torch.Tensor:  # [B, T]
    """Log-probabilities, in nats, of the sampled tokens under ``model``, from its logits; 0 on padding."""
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    logprobs = torch.zeros(rollout.completion_ids.shape, dtype=dtype, device=rollout.completion_ids.device)
    for indices in torch.arange(len(logprobs), device=logprobs.device).split(batch_size):
        part = rollout.select(indices)
        logits, ids, mask = completion_logits(model, part), part.completion_ids, part.completion_mask
        values = token_logprobs(logits, ids, temperature=temperature, mask=mask, backend=backend).logprobs
        logprobs[indices, : values.shape[1]] = values
    return logprobs


class ScriptedSampler:
    """Says what a function makes of each prompt, and keeps the temperatures that it was asked at.

    Args:
        task: Whose tokenizer and model it stands for.
        say: From a prompt and a temperature to a completion.
    """

    context_length, gives_logprobs = None, False

    def __init__(self, task: Any, say: Callable[[str, float], str]) -> None:
        self.task, self.say = task, say
        self.end_ids = end_token_ids(task.model, task.tokenizer)
        self.temperatures: list[float | None] = []

    def __call__(
        self, prompts: Sequence[str], *, step: int = 0, group_size: int = 1, temperature: float | None = None
    ) -> Rollout:
        self.temperatures.append(temperature)
        texts = [self.say(prompt, temperature) for prompt in prompts]
        return teacher_forced(self.task.tokenizer, prompts, texts)


def sampler_of(task: Any, recipe: Any) -> Any:
    """The sampler that a recipe asks for, in one process."""
    return build_sampler(task, recipe, Accelerator(cpu=True), recipe.temperature)


def report_of(task: Any, rows: Any, recipe: Any, sampler: Any = None, **options: Any) -> Any:
    """``evaluate_samples`` by a recipe's options, unless ``options`` say otherwise."""
    return evaluate_samples(
        sampler or sampler_of(task, recipe), task.tokenizer, rows, **{**evaluation_options(recipe), **options}
    )


def accuracies_of(task: Any, rows: Any, recipe: Any, sampler: Any = None) -> dict[str, float]:
    """``evaluate`` by a recipe's options."""
    return evaluate(sampler or sampler_of(task, recipe), task.tokenizer, rows, **evaluation_options(recipe))
