"""Supervised objectives of training a reasoning model, on top of the fused head: SFT and distillation."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from grpo_kernels import backends
from grpo_kernels.loss.config import GRPOLossConfig
from grpo_kernels.loss.inputs import PolicyInputs
from grpo_kernels.measured_backends import RowClass
from grpo_kernels.named_arguments import check_keywords
from grpo_kernels.ops.head.inputs import HeadOptions, check_head, check_projection
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
    check_ids,
    check_number,
)

_IGNORED = -100  # a label that Hugging Face's losses leave out
_SFT_MEANS = {"token_mean": "token-mean", "sequence_mean": "seq-mean-token-mean"}


@check_keywords()
def sft_loss(
    hidden_states: Tensor,  # [B, T, H] or [B, T + 1, H]; packed [N, H]
    lm_head_weight: Tensor,  # [V, H]
    completion_ids: Tensor | None = None,  # [B, T]; packed [N]
    completion_mask: Tensor | None = None,  # like completion_ids
    *,
    labels: Tensor | None = None,  # [B, L] for hidden_states [B, L, H]; packed [N]
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

    Example:
        >>> hidden, head = torch.randn(2, 3, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
        >>> sft_loss(hidden, head, torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)).backward()
        >>> loss = sft_loss(hidden, head, labels=torch.tensor([[-100, 2, 5], [-100, -100, 7]]))

    It is the policy gradient at advantage 1. Every row's coefficient is known before its logits, so the head is
    projected once: ``6 N H V`` operations with both gradients.

    Args:
        hidden_states: Position ``t`` predicts token ``t``. A ``T + 1``-th position is ignored, and its gradient is 0.
        lm_head_weight: The head, of the same dtype.
        completion_ids: The tokens to be learnt.
        completion_mask: 0 excludes a token.
        labels: Instead of ids and mask, labels as Hugging Face's models take them: position ``t`` predicts label
            ``t + 1``, and -100 excludes a token.
        reduction: "token_mean", or "sequence_mean": the mean over completions of each one's token mean.
        num_items_in_batch: Tokens that "token_mean" divides by, over all micro-batches and processes of one step. None
            means the unmasked tokens given here. 0 only where all are masked.
        temperature: Divides the logits.
        softcap, logit_scale: As for ``token_logprobs``.
        cu_seqlens: Where each packed completion begins, and the end.
        loss_scale: Multiplies the loss and the gradient, before the gradient is rounded.
        bias, logits_dtype, workspace_bytes, debug, backend: As for ``linear_token_logprobs``.

    Returns:
        A scalar, differentiable once. Zero, with zero gradient, if nothing is unmasked.

    Raises:
        TypeError: A dtype does not fit.
        ValueError: As for ``linear_token_logprobs``, or ``reduction`` is unknown, ``num_items_in_batch`` is given for a
            mean over sequences, or neither or both of ``labels`` and ``completion_ids`` with their mask are given.
    """
    check_reduction(reduction, num_items_in_batch)
    check_float("hidden_states", hidden_states)
    if labels is not None:
        if completion_ids is not None or completion_mask is not None:
            raise ValueError("completion_ids and completion_mask must be None beside labels, got both")
        check_projection(hidden_states, lm_head_weight, bias)
        completion_ids, completion_mask = _shift_labels(labels, hidden_states, cu_seqlens)
        check_id_range("labels", labels, labels != _IGNORED, lm_head_weight.shape[0], debug)
    elif completion_ids is None or completion_mask is None:
        missing = "completion_ids" if completion_ids is None else "completion_mask"
        raise ValueError(f"{missing} must be given, got None; Hugging Face's labels are given as labels=... instead")
    config = GRPOLossConfig(loss_type="reinforce", loss_agg_mode=_SFT_MEANS[reduction], temperature=temperature)
    count = _count_completions(completion_ids, cu_seqlens)
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


@check_keywords()
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

    Example:
        >>> hidden, head = torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(8, 4)
        >>> ids, mask, teacher = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3), torch.randn(2, 3, 8)
        >>> distillation_loss(hidden, head, ids, mask, teacher_logits=teacher, temperature=2.0).loss.backward()

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
        divergence: "forward_kl", of the teacher from the student; "reverse_kl", of the student from the teacher; or
            "js", of both from their mixture. ``token_divergence`` has the equations; the teacher is its reference.
        mixture: The teacher's share, in (0, 1), of "js".
        temperature: ``T``, of the soft targets only.
        hard_weight: Share of the hard targets, in [0, 1).
        reduction: "token_mean", or "sequence_mean": the mean over completions of each one's token mean.
        num_items_in_batch: Tokens that "token_mean" divides by, over all micro-batches and processes of one step. None
            means the unmasked tokens given here. 0 only where all are masked.
        softcap, logit_scale, teacher_softcap, teacher_logit_scale: As for ``token_logprobs``.
        cu_seqlens: Where each packed completion begins, and the end.
        loss_scale: Multiplies the loss and the gradient, before the gradient is rounded.
        logits_dtype, workspace_bytes, debug, backend: As for ``linear_token_logprobs``.

    Returns:
        The loss, differentiable once, and metrics: "kl" is the mean divergence, without its weight, and "entropy" the
        student's. Zero, with zero gradient, if nothing is unmasked.

    Raises:
        TypeError: A dtype does not fit.
        ValueError: As for ``linear_token_logprobs``, or an option is unknown or out of its range,
            ``num_items_in_batch`` is given for a mean over sequences, or the teacher is not given in exactly one of the
            two ways.
    """
    _check_hard_weight(hard_weight)
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
    count = _count_completions(completion_ids, cu_seqlens)
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


def _check_hard_weight(hard_weight: float) -> None:
    check_number("hard_weight", hard_weight)
    if not 0 <= hard_weight < 1:
        raise ValueError(f"hard_weight must be in [0, 1), got {hard_weight!r}; sft_loss has hard targets alone")


def _count_completions(ids: Tensor, cu_seqlens: Tensor | None) -> int:
    check_ids("completion_ids", ids)
    if cu_seqlens is None:
        return ids.shape[0] if ids.dim() else 0
    check_ids("cu_seqlens", cu_seqlens)
    return cu_seqlens.numel() - 1


def _shift_labels(labels: Tensor, hidden: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The ids that the positions predict, and their mask: each completion's labels without the first.

    Packed labels have as many positions as ids have, so that the last of each completion is masked.
    """
    check_ids("labels", labels)
    if labels.shape != hidden.shape[:-1]:
        wanted = f"{list(hidden.shape[:-1])}, one a position of hidden_states"
        raise ValueError(f"labels must have shape {wanted}, got {list(labels.shape)}: position t predicts label t + 1")
    check_device(hidden.device, [("labels", labels)])
    check_cu_seqlens(cu_seqlens, labels, False)
    if cu_seqlens is None:
        ids = labels[:, 1:]
        return ids, ids != _IGNORED
    ids = torch.cat([labels[1:], labels.new_full((1,), _IGNORED)])
    is_first = labels.new_zeros(labels.shape[0] + 1, dtype=torch.bool)
    is_first[cu_seqlens.long()] = True
    return ids, (ids != _IGNORED) & ~is_first[1:]


def check_reduction(reduction: str, num_items_in_batch: float | Tensor | None) -> None:
    """Raises ValueError if the reduction is unknown, or is not over tokens although their number is given."""
    if reduction not in _SFT_MEANS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, _SFT_MEANS))}, got {reduction!r}")
    if reduction == "sequence_mean" and num_items_in_batch is not None:
        raise ValueError(f'num_items_in_batch has no effect with reduction="sequence_mean", got {num_items_in_batch!r}')
