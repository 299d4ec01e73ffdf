"""The public ``linear_grpo_loss``, its registered op and its autograd function."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import backends
from grpo_kernels.device_values import check_device_values
from grpo_kernels.dtypes import accumulation_dtype
from grpo_kernels.loss.config import GRPOLossConfig
from grpo_kernels.loss.inputs import PolicyInputs
from grpo_kernels.measured_backends import RowClass
from grpo_kernels.ops.gradients import refuse_double_backward
from grpo_kernels.ops.head import reference as linear_reference
from grpo_kernels.ops.head.inputs import check_head, check_workspace, head_dtypes
from grpo_kernels.ops.head.linear_token_divergence import linear_token_divergence
from grpo_kernels.ops.head.linear_token_logprobs import linear_token_logprobs
from grpo_kernels.ops.head.loss_chunks import linear_grpo_loss_fwd
from grpo_kernels.ops.head.reference_model import NO_REFERENCE, Reference
from grpo_kernels.ops.rows import reference as divergence_reference
from grpo_kernels.ops.rows.grpo_loss import (
    GRPOLossOutput,
    check_group_rewards,
    check_reference,
    loss_of_tokens,
    reference_loss,
)
from grpo_kernels.ops.rows.token_logprobs import token_ids
from grpo_kernels.ops.rows.transform import Comparison, Transform
from grpo_kernels.ops.tokens.group_advantages import group_advantages
from grpo_kernels.ops.tokens.policy_loss import policy_loss_fwd, policy_metrics
from grpo_kernels.ops.tokens.scale import hand_over
from grpo_kernels.validation import check_id_range


class _LinearGRPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtypes: tuple[torch.dtype, torch.dtype],
        workspace_bytes: int,
        reference: Reference,
        ids: Tensor,
        inputs: PolicyInputs,
        config: GRPOLossConfig,
        comparison: Comparison,
        needs: tuple[bool, bool, bool],
        max_live_rows: int | None,
        backend: str,
    ) -> tuple[Tensor, ...]:
        code = config.code()
        logprobs, entropy, divergence, *grads = linear_grpo_loss_fwd[backend](
            hidden.detach().reshape(-1, hidden.shape[-1]),
            weight,
            bias,
            *dtypes,
            workspace_bytes,
            *reference,
            token_ids(ids).view(-1),
            *inputs.flat(),
            code.options,
            code.params,
            *comparison,
            *needs,
            max_live_rows,
        )
        loss, _, partials = policy_loss_fwd(logprobs, entropy, inputs, code, backend)
        if reference.is_given:
            loss, partials = inputs.add_divergence(loss, partials, divergence.view(ids.shape), config)
        logprobs, entropy = logprobs.view(ids.shape), entropy.view(ids.shape)
        ctx.save_for_backward(*(grad if need else None for grad, need in zip(grads, needs, strict=True)))
        ctx.options = (hidden.shape, backend)
        ctx.mark_non_differentiable(logprobs, entropy, partials)
        ctx.set_materialize_grads(False)
        return loss, logprobs, entropy, partials

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_double_backward()
        if dloss is None:
            return (None,) * 13
        shape, backend = ctx.options
        grads = hand_over(ctx, dloss, backend)
        dhidden = None if grads[0] is None else grads[0].view(shape)
        return (dhidden, *grads[1:], *(None,) * 10)


def one_pass_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    workspace_bytes: int,
    reference: Reference,
    ids: Tensor,
    inputs: PolicyInputs,
    config: GRPOLossConfig,
    comparison: Comparison,
    backend: str,
    max_live_rows: int | None = None,
) -> GRPOLossOutput:
    """A token-local loss of inputs that are already validated, its gradient formed in the forward."""
    if backend == "torch":
        logits = linear_reference.project(hidden, weight, bias, inputs.mask, *dtypes)
        if not reference.is_given:
            softcap, logit_scale = comparison.softcap or None, comparison.logit_scale
            return reference_loss(logits, ids, inputs, softcap, logit_scale, config)
        others = reference.whole(inputs.mask.reshape(-1), dtypes[1]).view(logits.shape)
        tokens = divergence_reference.token_divergence(logits, others, ids, inputs.mask, comparison)
        return loss_of_tokens(tokens, inputs, config, backend)
    grad = torch.is_grad_enabled()
    needs = tuple(grad and x is not None and x.requires_grad for x in (hidden, weight, bias))
    loss, logprobs, entropy, partials = _LinearGRPOLoss.apply(
        hidden, weight, bias, dtypes, workspace_bytes, reference, ids, inputs, config, comparison, needs,
        max_live_rows, backend,
    )  # fmt: skip
    return GRPOLossOutput(loss, logprobs, entropy, policy_metrics(partials, config, True))


def linear_grpo_loss(
    hidden_states: Tensor,  # [B, T, H]; packed [N, H]
    lm_head_weight: Tensor,  # [V, H]
    completion_ids: Tensor,  # [B, T]; packed [N]
    advantages: Tensor | None,  # [B] or [B, T]; packed [S] or [N]
    completion_mask: Tensor,  # like completion_ids
    *,
    bias: Tensor | None = None,  # [V]
    rewards: Tensor | None = None,  # [B] or [B, K]
    num_generations: int | None = None,
    scale_rewards: str = "group",
    old_logprobs: Tensor | None = None,  # like completion_ids
    ref_logprobs: Tensor | None = None,  # like completion_ids
    reference_logits: Tensor | None = None,  # [B, T, V]; packed [N, V]
    reference_hidden_states: Tensor | None = None,  # [B, T, H']; packed [N, H']
    reference_lm_head_weight: Tensor | None = None,  # [V, H']
    reference_bias: Tensor | None = None,  # [V]
    sampling_logprobs: Tensor | None = None,  # like completion_ids
    rollout_is_weights: Tensor | None = None,  # like completion_ids, or [B, 1]; packed [N] or [S, 1]
    entropy_threshold: Tensor | float | None = None,
    num_items_in_batch: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    loss_scale: float = 1.0,
    config: GRPOLossConfig = GRPOLossConfig(),  # noqa: B008  frozen
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    max_logits_bytes: int = 0,
    workspace_bytes: int | None = None,
    max_live_rows: int | None = None,
    debug: bool = False,
    backend: str = "auto",
) -> GRPOLossOutput:
    """The GRPO loss from hidden states, in chunks of tokens: the logits never exist as a whole.

    ``grpo_loss`` of ``h W^T + b``. At token level each chunk is projected once, its rows become their own gradient
    while they are at hand, and ``dX`` and ``dW`` are formed from the live rows, those whose coefficient is not 0:
    ``2 N H V (1 + 2 f)`` operations at a live share ``f``, a frozen head ``2 N H V (1 + f)``. Masked rows are not
    projected at all. A sequence-level ratio, and weights that wait for log-probabilities (VESPO's, the masks by entropy
    and by policy), are ``linear_token_logprobs`` followed by ``policy_loss``.

    Args:
        hidden_states: Position ``t`` predicts token ``t``.
        lm_head_weight: The head, tied or not, of the same dtype; under autocast both are rounded to its dtype.
        completion_ids, advantages, completion_mask, rewards, num_generations, scale_rewards, old_logprobs,
            ref_logprobs, sampling_logprobs, rollout_is_weights, entropy_threshold, num_items_in_batch,
            cu_seqlens, loss_scale, config, softcap,
            logit_scale, debug: As for ``grpo_loss``.
        reference_logits, reference_hidden_states, reference_lm_head_weight, reference_bias: As for
            ``linear_token_divergence``, of the frozen reference policy, transformed as the policy's; for an exact
            ``kl_estimator``, instead of ``ref_logprobs``. The reference is projected as often as the policy: once where
            one pass runs, ``2 N H' V`` operations more, else once more for the backward.
        bias, logits_dtype, workspace_bytes: As for ``linear_token_logprobs``.
        max_logits_bytes: As for ``linear_token_logprobs``, where that is what runs; no effect where one pass does, or
            the divergence is exact.
        max_live_rows: At most so many rows may have a gradient: unmasked, with an advantage and a weight that are not
            0, a KL term or an entropy bonus. Nothing is then read back, where otherwise their number is, and the
            backward is of so many rows; masked rows are projected as others are. None reads the number. More than
            these are told by ``check_device_values``, on a CPU at once. No effect for the "torch" backend.
        backend: "auto", or one of ``grpo_kernels.backends.BACKENDS``. "torch" forms the whole logits.

    Returns:
        ``GRPOLossOutput``; only ``loss`` is differentiable. A second backward is refused.

    Raises:
        TypeError: A dtype does not fit.
        ValueError: As for ``grpo_loss`` and ``linear_token_logprobs``.
        RuntimeError: The named backend cannot run here.

    Example:
        >>> hidden, head = torch.randn(2, 3, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
        >>> ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)
        >>> linear_grpo_loss(hidden, head, ids, torch.tensor([1.0, -1.0]), mask).loss.backward()
    """
    check_head(hidden_states, lm_head_weight, bias, completion_ids, "completion_ids")
    transform = Transform.of(config.temperature, softcap, logit_scale)
    dtypes = head_dtypes(hidden_states, lm_head_weight, logits_dtype)
    workspace = check_workspace(
        workspace_bytes,
        max_logits_bytes,
        lm_head_weight.shape[0],
        dtypes[1],
        hidden_states.device,
        models=2 if config.has_exact_divergence else 1,
    )
    given = (reference_logits, reference_hidden_states, reference_lm_head_weight, reference_bias)
    is_compared = any(x is not None for x in given)
    op = "linear_token_divergence" if is_compared else "linear_grpo_loss"
    backend = backends.resolve(op, backend, hidden_states.device, partial(RowClass.of_head, lm_head_weight))
    check_reference(is_compared, ref_logprobs, config, "reference_logits, or reference_hidden_states with their head,")
    vocab = lm_head_weight.shape[0]
    reference = Reference.of(completion_ids, vocab, *given) if is_compared else NO_REFERENCE
    check_group_rewards(advantages, rewards, num_generations, scale_rewards, completion_ids, cu_seqlens, debug)
    if rewards is not None:
        advantages = group_advantages(rewards, num_generations, scale_rewards=scale_rewards, backend=backend)
    inputs = PolicyInputs.of(
        completion_ids,
        accumulation_dtype(dtypes[0]),
        advantages,
        completion_mask,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampling_logprobs=sampling_logprobs,
        rollout_is_weights=rollout_is_weights,
        entropy_threshold=entropy_threshold,
        num_items_in_batch=num_items_in_batch,
        cu_seqlens=cu_seqlens,
        loss_scale=loss_scale,
        config=config,
        debug=debug,
    )
    check_id_range("completion_ids", completion_ids, inputs.mask, vocab, debug)
    if max_live_rows is not None and max_live_rows < 0:
        raise ValueError(f"max_live_rows must be at least 0, got {max_live_rows}")
    if debug:
        check_device_values(hidden_states.device)
    if backend != "torch":
        inputs, config = inputs.token_local(config)
    divergence = config.kl_estimator if is_compared else "reverse_kl"
    comparison = Comparison.of(divergence, 0.5, transform, None, softcap, logit_scale)
    if backend == "torch" or config.is_token_local:
        return one_pass_loss(
            hidden_states,
            lm_head_weight,
            bias,
            dtypes,
            workspace,
            reference,
            completion_ids,
            inputs,
            config,
            comparison,
            backend,
            max_live_rows,
        )
    if max_live_rows is not None:
        raise ValueError(f"max_live_rows must be None where a ratio waits for its sequence, got {max_live_rows}")
    common = {
        "bias": bias,
        "temperature": config.temperature,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "mask": inputs.mask,
        "logits_dtype": logits_dtype,
        "workspace_bytes": workspace_bytes,
        "backend": backend,
    }
    head = (hidden_states, lm_head_weight)
    if is_compared:
        tokens = linear_token_divergence(
            *head,
            reference_logits=reference_logits,
            reference_hidden_states=reference_hidden_states,
            reference_lm_head_weight=reference_lm_head_weight,
            reference_bias=reference_bias,
            divergence=divergence,
            ids=completion_ids,
            reference_softcap=softcap,
            reference_logit_scale=logit_scale,
            **common,
        )
    else:
        tokens = linear_token_logprobs(
            *head, completion_ids, outputs=("entropy",), max_logits_bytes=max_logits_bytes, **common
        )
    return loss_of_tokens(tokens, inputs, config, backend)
