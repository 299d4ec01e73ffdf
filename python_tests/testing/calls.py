"""Every public op called on a case's inputs, its outputs and gradients by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from grpo_kernels import backends
from grpo_kernels.ops.head import reference as linear_reference
from grpo_kernels.ops.head.linear_grpo_loss import linear_grpo_loss
from grpo_kernels.ops.head.linear_token_divergence import linear_token_divergence
from grpo_kernels.ops.head.linear_token_logprobs import linear_token_logprobs
from grpo_kernels.ops.rows.grpo_loss import grpo_loss
from grpo_kernels.ops.rows.reference import OUTPUTS
from grpo_kernels.ops.rows.token_divergence import token_divergence
from grpo_kernels.ops.rows.token_logprobs import token_logprobs
from grpo_kernels.ops.tokens.policy_loss import policy_loss
from testing.cases import ALL_CASES, FAMILY_CASES, VARIANT_CASES, Case
from testing.inputs import Inputs

#: The backends that run on the CPU, here and now.
BACKENDS = tuple(name for name in backends.BACKENDS if backends.supports("grpo_loss", name, torch.device("cpu")))
#: What each op takes log-probabilities from, hence what it is differentiated by.
SOURCES = {
    "token_logprobs": "logits",
    "linear_token_logprobs": "hidden",
    "token_divergence": "logits",
    "linear_token_divergence": "hidden",
    "policy_loss": "logprobs",
    "grpo_loss": "logits",
    "linear_grpo_loss": "hidden",
}
LEAVES = {
    "logits": ("logits",),
    "hidden": ("hidden", "weight", "bias"),
    "logprobs": ("logprobs", "entropy", "divergence"),
}


#: What is given to ops that take log-probabilities, to those that make them, and to those of divergences.
_OF_TOKENS = ("batch", "length", "lengths", "layout", "mask", "dirty")
_OF_A_LOSS = ("config", "advantages", "scale_rewards", "old", "ref", "sampling", "rollout", "num_items", "loss_scale",
              "on_bound", "grad_output")  # fmt: skip
_OF_LOGITS = ("vocab", "hidden", "logits", "softcap", "logit_scale", "bias", "coarse")
_OF_A_DIVERGENCE = ("divergence", "soft")


def applies(op: str, case: Case) -> bool:
    """Whether an op can be called on a case."""
    source = SOURCES[op]
    if op.endswith("token_divergence") and case.divergence is None:
        return False
    if source == "hidden" and case.logits != "normal":
        return False
    if source != "hidden" and case.bias:
        return False
    if source == "logprobs":
        transformed = case.softcap is not None or case.logit_scale != 1
        return not (transformed or case.advantages == "rewards" or case.layout == "next" or case.logits != "normal")
    return True


@cache
def cases_of(op: str, among: tuple[Case, ...] = ALL_CASES) -> tuple[Case, ...]:
    """Of some cases, all if not given, those whose inputs to an op differ from those of every one before them.

    An op without a loss sees a shape, a layout, a mask, logits and their transform; ``policy_loss`` sees no logits.
    """
    cases = {}
    for case in among:
        if "loss" not in op and case in (*VARIANT_CASES, *FAMILY_CASES):
            continue
        if applies(op, case):
            cases.setdefault(_inputs_of(op, case), case)
    return tuple(cases.values())


def _inputs_of(op: str, case: Case) -> tuple[Any, ...]:
    """What an op is given of a case."""
    fields = list(_OF_TOKENS)
    if "loss" in op:
        fields += _OF_A_LOSS
    if op != "policy_loss":
        fields += _OF_LOGITS
    if "divergence" in op:
        fields += _OF_A_DIVERGENCE
    return (case.config.temperature, *(getattr(case, name) for name in fields))


def leaves(op: str, inputs: Inputs) -> dict[str, Tensor]:
    """The op's differentiable inputs, sharing the inputs' memory."""
    given = inputs.tensors()
    names = [name for name in LEAVES[SOURCES[op]] if name in given]
    if not inputs.case.config.has_exact_divergence:
        names = [name for name in names if name != "divergence"]
    return {name: given[name].detach().requires_grad_() for name in names}


def call(op: str, inputs: Inputs, leaf: dict[str, Tensor], backend: str, **options: Any) -> Any:
    """The op's own result.

    Args:
        op: Its name.
        inputs: What it is given.
        leaf: Its differentiable inputs, as ``leaves`` gives them.
        backend: The backend.
        **options: Further arguments, over those of the case.
    """
    case = inputs.case
    transform = {"softcap": case.softcap, "logit_scale": case.logit_scale}
    if op.endswith("token_logprobs"):
        arguments = {
            "mask": inputs.mask,
            "temperature": case.config.temperature,
            "outputs": OUTPUTS,
            **transform,
            "backend": backend,
            **options,
        }
        if op == "token_logprobs":
            return token_logprobs(leaf["logits"], inputs.ids, **arguments)
        return linear_token_logprobs(leaf["hidden"], leaf["weight"], inputs.ids, bias=leaf.get("bias"), **arguments)
    if op.endswith("token_divergence"):
        soft = {"divergence_temperature": 2.0, "reference_softcap": 20.0, "reference_logit_scale": 0.8}
        arguments = {
            "divergence": case.divergence or "js",
            "mixture": 0.3,
            "ids": inputs.ids,
            "mask": inputs.mask,
            "temperature": case.config.temperature,
            **transform,
            **(soft if case.soft else {}),
            "backend": backend,
            **options,
        }
        if op == "token_divergence":
            return token_divergence(leaf["logits"], inputs.reference_logits, **arguments)
        reference = _reference(inputs, "hidden")
        return linear_token_divergence(leaf["hidden"], leaf["weight"], bias=leaf.get("bias"), **reference, **arguments)
    arguments = {
        "old_logprobs": inputs.old,
        "ref_logprobs": None if case.config.has_exact_divergence else inputs.ref,
        "sampling_logprobs": inputs.sampling,
        "rollout_is_weights": inputs.rollout,
        "num_items_in_batch": inputs.num_items,
        "cu_seqlens": inputs.cu_seqlens,
        "loss_scale": case.loss_scale,
        "config": case.config,
        "backend": backend,
        **options,
    }
    if op == "policy_loss":
        divergence = leaf["divergence"] if case.config.has_exact_divergence else None
        arguments |= {"entropy": leaf["entropy"], "divergence": divergence}
        return policy_loss(leaf["logprobs"], inputs.advantages, inputs.mask, **arguments)
    if case.config.has_exact_divergence:
        arguments |= _reference(inputs, SOURCES[op])
    if inputs.rewards is not None:
        arguments |= {"rewards": inputs.rewards, "num_generations": 2, "scale_rewards": case.scale_rewards}
    common = (inputs.ids, inputs.advantages, inputs.mask)
    if op == "grpo_loss":
        return grpo_loss(leaf["logits"], *common, **transform, **arguments)
    return linear_grpo_loss(leaf["hidden"], leaf["weight"], *common, bias=leaf.get("bias"), **transform, **arguments)


def _reference(inputs: Inputs, source: str) -> dict[str, Tensor]:
    """What a policy is compared with, as the ops take it that have logits or hidden states."""
    if source == "logits":
        return {"reference_logits": inputs.reference_logits}
    return {
        "reference_hidden_states": inputs.reference_hidden,
        "reference_lm_head_weight": inputs.reference_weight,
    }


def run(op: str, inputs: Inputs, backend: str, **options: Any) -> dict[str, Tensor]:
    """Outputs by name, metrics among them, and the gradient of every differentiable input as ``d<input>``."""
    leaf = leaves(op, inputs)
    result = call(op, inputs, leaf, backend, **options)
    outputs = {name: value for name, value in result._asdict().items() if isinstance(value, Tensor)}
    if "loss" in outputs:
        outputs |= result.metrics
        result.loss.backward(torch.full_like(result.loss, inputs.case.grad_output))
    else:
        wanted = [(result.logprobs, inputs.dlogprobs), (result.entropy, inputs.dentropy)]
        wanted += [(result.divergence, inputs.ddivergence)] if "divergence" in outputs else []
        wanted = [(y, dy.to(y.dtype)) for y, dy in wanted if y is not None]
        torch.autograd.backward([y for y, _ in wanted], [dy for _, dy in wanted])
    gradients = {f"d{name}": x.grad for name, x in leaf.items() if x.grad is not None}
    return {name: value.detach() for name, value in (outputs | gradients).items()}


@contextmanager
def rounded_dlogits(dtype: torch.dtype) -> Iterator[None]:
    """Within it the "torch" backend of the linear ops rounds the gradient of logits to ``dtype`` before the GEMMs that
    follow, as a head does whose GEMMs are in that dtype."""
    project = linear_reference.project

    def rounding(*arguments: Any) -> Tensor:
        logits = project(*arguments)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: gradient.to(dtype).to(gradient.dtype))
        return logits

    with mock.patch.object(linear_reference, "project", rounding):
        yield
