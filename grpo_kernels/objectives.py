"""The other objectives of training a reasoning model: SFT, distillation, DPO, reward models.

They are short functions on top of the fused head. Whatever reads the vocabulary is ``linear_grpo_loss`` or
``linear_token_logprobs``; the rest is a few numbers per token or completion, in torch.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels import backends
from grpo_kernels.loss.config import GRPOLossConfig
from grpo_kernels.loss.inputs import PolicyInputs
from grpo_kernels.loss.sequences import Sequences
from grpo_kernels.measured_backends import RowClass
from grpo_kernels.ops.head.inputs import HeadOptions, check_head
from grpo_kernels.ops.head.linear_divergence_loss import divergence_loss
from grpo_kernels.ops.head.linear_grpo_loss import linear_grpo_loss
from grpo_kernels.ops.head.reference_model import Reference
from grpo_kernels.ops.rows.transform import Comparison, Transform
from grpo_kernels.ops.tokens.policy_loss import PolicyLossOutput
from grpo_kernels.validation import (
    check_cu_seqlens,
    check_device,
    check_float,
    check_id_range,
    check_mask,
    check_shape,
)

_SFT_MEANS = {"token_mean": "token-mean", "sequence_mean": "seq-mean-token-mean"}


class PreferenceOutput(NamedTuple):
    """A scalar loss, the only differentiable field, and the implicit rewards of each pair."""

    loss: Tensor
    chosen_rewards: Tensor  # [B]
    rejected_rewards: Tensor  # [B]


def sft_loss(
    hidden_states: Tensor,  # [B, T, H] or [B, T + 1, H]; packed [N, H]
    lm_head_weight: Tensor,  # [V, H]
    completion_ids: Tensor,  # [B, T]; packed [N]
    completion_mask: Tensor,  # like completion_ids
    *,
    reduction: str = "token_mean",
    num_items_in_batch: float | Tensor | None = None,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    loss_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    debug: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of the unmasked tokens, from hidden states, in chunks: the logits never exist as a whole.

    It is the policy gradient at advantage 1. Every row's coefficient is known before its logits, so the head is
    projected once: ``6 N H V`` operations with both gradients.

    Args:
        hidden_states: Position ``t`` predicts token ``t``. A ``T + 1``-th position is ignored, and its gradient is 0.
        lm_head_weight: The head, of the same dtype.
        completion_ids: The tokens to be learnt.
        completion_mask: 0 excludes a token.
        reduction: "token_mean", or "sequence_mean": the mean over completions of each one's token mean.
        num_items_in_batch: Tokens that "token_mean" divides by, over all micro-batches and processes of one step. None
            means the unmasked tokens given here.
        temperature: Divides the logits.
        bias, softcap, logit_scale, cu_seqlens, loss_scale, logits_dtype, workspace_bytes, debug, backend: As for
            ``linear_grpo_loss``.

    Returns:
        A scalar, differentiable once. Zero, with zero gradient, if nothing is unmasked.

    Raises:
        TypeError: As for ``linear_grpo_loss``.
        ValueError: ``reduction`` is unknown, ``num_items_in_batch`` is given for a mean over sequences, or as for
            ``linear_grpo_loss``.

    Example:
        >>> hidden, head = torch.randn(2, 3, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
        >>> sft_loss(hidden, head, torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)).backward()
    """
    check_reduction(reduction, num_items_in_batch)
    config = GRPOLossConfig(loss_type="reinforce", loss_agg_mode=_SFT_MEANS[reduction], temperature=temperature)
    count = completion_ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return linear_grpo_loss(
        hidden_states,
        lm_head_weight,
        completion_ids,
        torch.ones(count, device=hidden_states.device),
        completion_mask,
        bias=bias,
        num_items_in_batch=num_items_in_batch,
        cu_seqlens=cu_seqlens,
        loss_scale=loss_scale,
        config=config,
        softcap=softcap,
        logit_scale=logit_scale,
        logits_dtype=logits_dtype,
        workspace_bytes=workspace_bytes,
        debug=debug,
        backend=backend,
    ).loss


def distillation_loss(
    hidden_states: Tensor,  # [B, T, H] or [B, T + 1, H]; packed [N, H]
    lm_head_weight: Tensor,  # [V, H]
    completion_ids: Tensor,  # [B, T]; packed [N]
    completion_mask: Tensor,  # like completion_ids
    *,
    teacher_logits: Tensor | None = None,  # [B, T, V] or [B, T + 1, V]; packed [N, V]
    teacher_hidden_states: Tensor | None = None,  # [B, T, H'] or [B, T + 1, H']; packed [N, H']
    teacher_lm_head_weight: Tensor | None = None,  # [V, H']
    teacher_bias: Tensor | None = None,  # [V]
    divergence: str = "forward_kl",
    mixture: float = 0.5,
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    reduction: str = "token_mean",
    num_items_in_batch: float | Tensor | None = None,
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    loss_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    debug: bool = False,
    backend: str = "auto",
) -> PolicyLossOutput:
    """Distillation from a teacher's soft targets over the whole vocabulary, mixed with the tokens as hard targets.

        loss = mean ((1 - hard_weight) T^2 D(p_T, q_T) - hard_weight log p_1)

    with ``D`` a divergence of student and teacher at temperature ``T`` (arXiv:1503.02531, section 2). It works from
    hidden states in chunks: the gradient of a chunk is formed from both models' logits while they exist. With equal
    hidden sizes that is ``8 N H V`` operations; neither model's logits exist as a whole.

    Args:
        hidden_states, lm_head_weight, bias: The student's. Position ``t`` predicts token ``t``. A ``T + 1``-th
            position, also of the teacher, is ignored, and its gradient is 0.
        completion_ids: The hard targets; the student's own samples (arXiv:2306.13649) or the teacher's.
        completion_mask: 0 excludes a token.
        teacher_logits: The teacher's logits, if they exist. No gradient flows to the teacher.
        teacher_hidden_states, teacher_lm_head_weight, teacher_bias: Otherwise its last hidden states and head, which
            may have another hidden size and dtype.
        divergence, mixture: As for ``token_divergence``; the teacher is the reference.
        temperature: ``T``, of the soft targets only.
        hard_weight: Share of the hard targets, in [0, 1).
        reduction, num_items_in_batch: As for ``sft_loss``.
        softcap, logit_scale, teacher_softcap, teacher_logit_scale: As for ``token_logprobs``.
        cu_seqlens, loss_scale, logits_dtype, workspace_bytes, debug, backend: As for ``linear_grpo_loss``.

    Returns:
        The loss, differentiable once, and metrics: "kl" is the mean divergence, without its weight, and "entropy" the
        student's. Zero, with zero gradient, if nothing is unmasked.

    Raises:
        TypeError: As for ``linear_token_divergence``.
        ValueError: As for ``linear_token_divergence`` and ``sft_loss``, or ``hard_weight`` is not in [0, 1).

    Example:
        >>> hidden, head = torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(8, 4)
        >>> ids, mask, teacher = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3), torch.randn(2, 3, 8)
        >>> distillation_loss(hidden, head, ids, mask, teacher_logits=teacher, temperature=2.0).loss.backward()
    """
    if not 0 <= hard_weight < 1:
        raise ValueError(f"hard_weight must be in [0, 1), got {hard_weight!r}; sft_loss has hard targets alone")
    check_reduction(reduction, num_items_in_batch)
    check_head(hidden_states, lm_head_weight, bias, completion_ids, "completion_ids")
    comparison = Comparison.of(
        divergence,
        mixture,
        Transform.of(1.0, softcap, logit_scale),
        temperature,
        teacher_softcap,
        teacher_logit_scale,
        prefix="teacher_",
    )
    teacher = Reference.of(
        completion_ids,
        lm_head_weight.shape[0],
        teacher_logits,
        teacher_hidden_states,
        teacher_lm_head_weight,
        teacher_bias,
        prefix="teacher_",
    )
    options = HeadOptions.of(hidden_states, lm_head_weight, logits_dtype, workspace_bytes)
    backend = backends.resolve(
        "linear_token_divergence", backend, hidden_states.device, partial(RowClass.of_head, lm_head_weight)
    )
    options.check_bound(backend, lm_head_weight, bias, hidden_states, models=2)
    config = GRPOLossConfig(
        loss_type="reinforce",
        loss_agg_mode=_SFT_MEANS[reduction],
        beta=(1 - hard_weight) * temperature**2,
        kl_estimator=divergence,
    )
    count = completion_ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    inputs = PolicyInputs.of(
        completion_ids,
        options.arithmetic_dtype,
        torch.full((count,), hard_weight, device=hidden_states.device),
        completion_mask,
        num_items_in_batch=num_items_in_batch,
        cu_seqlens=cu_seqlens,
        loss_scale=loss_scale,
        config=config,
        debug=debug,
    )
    check_id_range("completion_ids", completion_ids, inputs.mask, lm_head_weight.shape[0], debug)
    output = divergence_loss(
        hidden_states,
        lm_head_weight,
        bias,
        completion_ids,
        options,
        teacher,
        comparison,
        inputs,
        config,
        backend,
    )
    return PolicyLossOutput(output.loss, output.metrics)


def check_reduction(reduction: str, num_items_in_batch: float | Tensor | None) -> None:
    """Raises ValueError if the reduction is unknown, or is not over tokens although their number is given."""
    if reduction not in _SFT_MEANS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, _SFT_MEANS))}, got {reduction!r}")
    if reduction == "sequence_mean" and num_items_in_batch is not None:
        raise ValueError(f'num_items_in_batch has no effect with reduction="sequence_mean", got {num_items_in_batch!r}')


def dpo_loss(
    logprobs: Tensor,  # [2 B, T], chosen before rejected; packed [N]
    ref_logprobs: Tensor,  # like logprobs
    completion_mask: Tensor,  # like logprobs
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
    cu_seqlens: Tensor | None = None,  # [2 B + 1]
) -> PreferenceOutput:
    """Direct preference optimisation of pairs of completions.

    With ``h = beta (sum_t log pi/pi_ref of the chosen - of the rejected)``,

        loss = -mean ((1 - eps) log sigmoid(h) + eps log sigmoid(-h))

    arXiv:2305.18290 eq. 7; ``length_normalized`` divides each sum by its number of tokens (TRL's "sigmoid_norm").

    Args:
        logprobs: From ``linear_token_logprobs`` or ``token_logprobs``, in nats. Completions ``0 .. B - 1`` are chosen
            over ``B .. 2 B - 1``.
        ref_logprobs: The same tokens under the reference policy. Not differentiated.
        completion_mask: 0 excludes a token, whatever the other inputs hold there.
        beta: Weight of the divergence from the reference.
        label_smoothing: ``eps``, the share of preferences that are wrong.
        length_normalized: Take the mean over tokens rather than the sum.
        cu_seqlens: Where each packed completion begins, and the end.

    Returns:
        The loss, and ``beta`` times each completion's log-ratio, detached.

    Raises:
        TypeError: A tensor has a dtype that does not fit.
        ValueError: Shapes or devices do not fit, completions are not pairs, or a number is out of its range.

    Example:
        >>> logprobs = torch.full((2, 3), -1.0, requires_grad=True)
        >>> dpo_loss(logprobs, torch.full((2, 3), -1.0), torch.ones(2, 3)).loss.item()
        0.6931471824645996
    """
    check_float("logprobs", logprobs)
    if logprobs.dim() not in (1, 2):
        raise ValueError(f"logprobs must have shape [2 B, T] or, packed, [N], got {list(logprobs.shape)}")
    check_float("ref_logprobs", ref_logprobs)
    check_shape("ref_logprobs", ref_logprobs, logprobs.shape)
    check_mask("completion_mask", completion_mask)
    check_shape("completion_mask", completion_mask, logprobs.shape)
    check_device(logprobs.device, [("ref_logprobs", ref_logprobs), ("completion_mask", completion_mask)])
    check_cu_seqlens(cu_seqlens, logprobs, False)
    if not beta > 0:
        raise ValueError(f"beta must be greater than 0, got {beta!r}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing!r}")
    sequences = Sequences.of(logprobs, cu_seqlens)
    if sequences.count % 2:
        raise ValueError(f"logprobs must be of pairs of completions, got {sequences.count} completions")
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    mask = completion_mask != 0
    log_ratio = torch.where(mask, logprobs.to(dtype) - ref_logprobs.detach().to(dtype), 0)
    totals = sequences.sum(log_ratio)
    if length_normalized:
        totals = totals / sequences.sum(mask.to(dtype)).clamp(min=1)
    chosen, rejected = (beta * totals).chunk(2)
    margin = chosen - rejected
    right, wrong = (torch.nn.functional.logsigmoid(h) for h in (margin, -margin))
    loss = -((1 - label_smoothing) * right + label_smoothing * wrong).mean()
    return PreferenceOutput(loss, chosen.detach(), rejected.detach())


def reward_model_loss(
    chosen_rewards: Tensor,  # [B]
    rejected_rewards: Tensor,  # [B]
    *,
    margins: Tensor | None = None,  # [B]
    center_coef: float = 0.0,
) -> Tensor:
    """Negative log-likelihood of preferences under the Bradley-Terry model.

        loss = mean (-log sigmoid(r_chosen - r_rejected - margin) + center_coef (r_chosen + r_rejected)^2)

    InstructGPT eq. 1 (arXiv:2203.02155), margins of Llama 2 (arXiv:2307.09288), centring of arXiv:2312.09244.
    Arithmetic is fp32, or fp64 for fp64 input.

    Args:
        chosen_rewards, rejected_rewards: The model's rewards of each pair.
        margins: How much better the chosen one is; None means 0.
        center_coef: Weight of the square of their sum, which keeps rewards around 0.

    Raises:
        TypeError: A tensor is not floating point.
        ValueError: Shapes or devices do not fit.

    Example:
        >>> reward_model_loss(torch.tensor([1.0]), torch.tensor([1.0])).item()
        0.6931471824645996
    """
    check_float("chosen_rewards", chosen_rewards)
    if chosen_rewards.dim() != 1:
        raise ValueError(f"chosen_rewards must have shape [B], got {list(chosen_rewards.shape)}")
    for name, values in (("rejected_rewards", rejected_rewards), ("margins", margins)):
        if values is not None:
            check_float(name, values)
            check_shape(name, values, chosen_rewards.shape)
            check_device(chosen_rewards.device, [(name, values)])
    dtype = torch.float64 if chosen_rewards.dtype == torch.float64 else torch.float32
    chosen, rejected = chosen_rewards.to(dtype), rejected_rewards.to(dtype)
    lead = chosen - rejected if margins is None else chosen - rejected - margins.to(dtype)
    loss = -torch.nn.functional.logsigmoid(lead)
    if center_coef:
        loss = loss + center_coef * (chosen + rejected).square()
    return loss.mean()
