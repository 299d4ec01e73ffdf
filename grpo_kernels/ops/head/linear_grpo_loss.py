"""The public ``linear_grpo_loss``, its registered op and its autograd function: one pass over chunks of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import backends
from grpo_kernels.calls import Call
from grpo_kernels.device_values import check_device_values
from grpo_kernels.dtypes import accumulation_dtype
from grpo_kernels.loss.config import GRPOLossConfig, LossCode, check_is_config
from grpo_kernels.loss.fields import TokenFields
from grpo_kernels.loss.inputs import PolicyInputs
from grpo_kernels.measured_backends import RowClass
from grpo_kernels.named_arguments import check_keywords
from grpo_kernels.ops.gradients import named_gradients
from grpo_kernels.ops.head import reference as head_reference
from grpo_kernels.ops.head.buffers import NeededGradients
from grpo_kernels.ops.head.driver import Chunk, HeadPass, RowOp, RowResults, clamp_ids
from grpo_kernels.ops.head.inputs import HeadOptions, check_head, flatten_hidden, predicting, shape_of_tokens
from grpo_kernels.ops.head.linear_divergence_loss import divergence_loss
from grpo_kernels.ops.head.linear_token_divergence import divergences
from grpo_kernels.ops.head.linear_token_logprobs import (
    HEAD_INPUTS,
    gradient_fakes,
    head_gradients,
    logprobs_and_entropy,
)
from grpo_kernels.ops.head.live_rows import may_be_clipped, may_be_live
from grpo_kernels.ops.head.reference_model import Reference
from grpo_kernels.ops.head.selection import SelectedRows
from grpo_kernels.ops.registration import KERNEL_BACKENDS, define
from grpo_kernels.ops.rows.calls import GroupRewards, LossRowsCall
from grpo_kernels.ops.rows.grpo_loss import (
    GRPOLossOutput,
    check_group_rewards,
    check_reference,
    grpo_loss_fwd,
    loss_of_tokens,
    reference_loss,
)
from grpo_kernels.ops.rows.token_logprobs import to_kernel_ids
from grpo_kernels.ops.rows.transform import Comparison, Transform
from grpo_kernels.ops.tokens.calls import PolicyLossCall
from grpo_kernels.ops.tokens.group_advantages import group_advantages
from grpo_kernels.ops.tokens.policy_loss import policy_loss_fwd, policy_metrics
from grpo_kernels.ops.tokens.scale import backward_of
from grpo_kernels.validation import check_id_range, check_integer

_REFERENCE_ARGUMENTS = "reference_logits, or reference_hidden_states with their head,"  # in messages


@dataclass(frozen=True)
class LinearLossCall(Call):
    """A token-local loss of tokens ``[N]``, and which of its gradients are formed."""

    options: HeadOptions
    ids: Tensor  # [N]
    fields: TokenFields  # of these tokens
    code: LossCode
    transform: Transform
    needs: NeededGradients
    max_live_rows: int | None


def _loss_rows(backend: str, call: LinearLossCall, reports_live: bool) -> RowOp:
    """Computes a chunk's log-probabilities and entropies, its gradient, and which rows have one."""

    def run(chunk: Chunk) -> RowResults:
        rows = LossRowsCall(
            call.ids[None, chunk.rows],
            call.fields.map_tokens(lambda values: values[chunk.rows]),
            GroupRewards(),
            call.code,
            call.transform,
        )
        dlogits = None if chunk.dlogits is None else chunk.dlogits[None]
        logprobs, entropy, live, _ = grpo_loss_fwd[backend](chunk.logits[None], rows, dlogits)
        return RowResults((logprobs[0], entropy[0]), live[0] if reports_live else None)

    return run


def _fwd(backend: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearLossCall) -> tuple[Tensor, ...]:
    options, fields = call.options, call.fields
    head = options.head(backend, weight, bias)
    has_kl = call.code.beta != 0 and fields.ref_logprobs is not None
    live = may_be_live(has_kl, fields) if call.needs.any else torch.zeros_like(fields.mask)
    rows = SelectedRows.of(fields.mask, live, call.ids, call.max_live_rows)
    selected = replace(
        call,
        ids=rows.gather(clamp_ids(backend, call.ids, fields.mask, head.vocab)),
        fields=fields.map_tokens(rows.gather),
    )
    reports_live = call.max_live_rows is None and may_be_clipped(has_kl, call.code.params, fields)
    head_pass = HeadPass(backend, head, hidden, rows, call.needs, options)
    dtype = accumulation_dtype(options.logits_dtype)
    values, gradients = head_pass.run(_loss_rows(backend, selected, reports_live), (dtype, dtype))
    return (*values, *gradients)


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearLossCall) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(call.options.logits_dtype)
    statistics = (hidden.new_empty(call.ids.shape, dtype=dtype) for _ in range(2))
    return (*statistics, *gradient_fakes(hidden, weight, bias, call.needs))


linear_grpo_loss_fwd = define(
    "linear_grpo_loss_fwd",
    HEAD_INPUTS | {"call": LinearLossCall},
    "(Tensor logprobs, Tensor entropy, Tensor dhidden, Tensor dweight, Tensor dbias)",
    _fake,
    {backend: partial(_fwd, backend) for backend in KERNEL_BACKENDS},
)


@named_gradients
class _LinearGRPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: LinearLossCall,
        policy: PolicyLossCall,
        backend: str,
    ) -> tuple[Tensor, ...]:
        logprobs, entropy, *gradients = linear_grpo_loss_fwd[backend](flatten_hidden(hidden), weight, bias, call)
        loss, _, partials = policy_loss_fwd[backend](logprobs, entropy, policy)
        ctx.save_for_backward(*head_gradients(gradients, call.needs, hidden.shape).values())
        ctx.backend = backend
        logprobs, entropy = (x.view(shape_of_tokens(hidden, x.shape[0])) for x in (logprobs, entropy))
        ctx.mark_non_differentiable(logprobs, entropy, partials)
        ctx.set_materialize_grads(False)
        return loss, logprobs, entropy, partials

    backward = staticmethod(backward_of("hidden", "weight", "bias"))


def _one_pass_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    options: HeadOptions,
    transform: Transform,
    inputs: PolicyInputs,
    config: GRPOLossConfig,
    backend: str,
    max_live_rows: int | None,
) -> GRPOLossOutput:
    """A token-local loss. The forward forms its gradient."""
    needs = NeededGradients.of(hidden, weight, bias)
    flat_ids = to_kernel_ids(ids).view(-1)
    call = LinearLossCall(options, flat_ids, inputs.flat_fields, config.code(), transform, needs, max_live_rows)
    policy = PolicyLossCall.of(inputs, config)
    loss, logprobs, entropy, partials = _LinearGRPOLoss.apply(hidden, weight, bias, call, policy, backend)
    return GRPOLossOutput(loss, logprobs, entropy, policy_metrics(partials, config, True))


@check_keywords(GRPOLossConfig)
def linear_grpo_loss(
    hidden_states: Tensor,  # [B, T, H] or [B, T + 1, H]; packed [N, H]
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
    reference_logits: Tensor | None = None,  # [B, T, V] or [B, T + 1, V]; packed [N, V]
    reference_hidden_states: Tensor | None = None,  # [B, T, H'] or [B, T + 1, H']; packed [N, H']
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
    max_logits_bytes: int | None = None,
    workspace_bytes: int | None = None,
    max_live_rows: int | None = None,
    debug: bool = False,
    backend: str = "auto",
) -> GRPOLossOutput:
    """The GRPO loss from hidden states, in chunks of tokens: the logits never exist as a whole.

    Example:
        >>> hidden, head = torch.randn(2, 3, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
        >>> ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)
        >>> linear_grpo_loss(hidden, head, ids, torch.tensor([1.0, -1.0]), mask).loss.backward()

    ``grpo_loss`` of ``h W^T + b``. At token level each chunk is projected once, and its gradient is computed while its
    logits exist. ``dX`` and ``dW`` are formed from the live rows, those whose coefficient is not 0. That is
    ``2 N H V (1 + 2 f)`` operations at a live share ``f``, or ``2 N H V (1 + f)`` with a frozen head. Masked rows are
    not projected. A sequence-level ratio, and weights that need log-probabilities (VESPO's, the masks by entropy and
    by policy), are computed as ``linear_token_logprobs`` followed by ``policy_loss``.

    Args:
        hidden_states: Position ``t`` predicts token ``t``. A ``T + 1``-th position is ignored, and its gradient is 0.
        lm_head_weight: The head, tied or not, of the same dtype; under autocast both are rounded to its dtype.
        completion_ids, advantages, completion_mask, rewards, num_generations, scale_rewards, old_logprobs,
            ref_logprobs, sampling_logprobs, rollout_is_weights, entropy_threshold, num_items_in_batch, cu_seqlens,
            loss_scale, config, softcap, logit_scale, debug: As for ``grpo_loss``.
        reference_logits: The logits of the frozen reference policy, if they exist, transformed as the policy's; for an
            exact ``kl_estimator``, instead of ``ref_logprobs``. No gradient flows to them.
        reference_hidden_states, reference_lm_head_weight, reference_bias: Otherwise its last hidden states and head,
            which may have another hidden size and dtype. They are projected as often as the policy's: once in a
            one-pass loss, ``2 N H' V`` operations more, and otherwise once more for the backward.
        bias, logits_dtype, workspace_bytes: As for ``linear_token_logprobs``.
        max_logits_bytes: As for ``linear_token_logprobs``, if that is what runs. No effect on a one-pass loss or one
            with an exact divergence.
        max_live_rows: Bound of the rows that may have a gradient: unmasked, with an advantage and a weight that are not
            0, a KL term or an entropy bonus. With a bound there is no sync: the backward covers this many rows, and
            masked rows are projected too. With None their number is read back. If there are more rows than the bound,
            ``check_device_values`` raises; on a CPU this call does. No effect for the "torch" backend.
        backend: "auto", or one of ``grpo_kernels.BACKENDS``. "torch" forms the whole logits.

    Returns:
        ``GRPOLossOutput``; only ``loss`` is differentiable. A second backward is refused.

    Raises:
        TypeError: A dtype does not fit.
        ValueError: As for ``grpo_loss``, or a bound is negative or too small for one row.
        RuntimeError: The named backend cannot run here.
    """
    check_head(hidden_states, lm_head_weight, bias, completion_ids, "completion_ids")
    check_is_config(config)
    transform = Transform.of(config.temperature, softcap, logit_scale)
    options = HeadOptions.of(hidden_states, lm_head_weight, logits_dtype, workspace_bytes, max_logits_bytes)
    reference_tensors = (reference_logits, reference_hidden_states, reference_lm_head_weight, reference_bias)
    has_reference = any(x is not None for x in reference_tensors)
    op = "linear_token_divergence" if has_reference else "linear_grpo_loss"
    backend = backends.resolve(op, backend, hidden_states.device, partial(RowClass.of_head, lm_head_weight))
    options.check_bound(backend, lm_head_weight, bias, hidden_states, models=2 if has_reference else 1)
    check_reference(has_reference, ref_logprobs, config, _REFERENCE_ARGUMENTS)
    reference = Reference.of(completion_ids, lm_head_weight.shape[0], *reference_tensors) if has_reference else None
    check_group_rewards(advantages, rewards, num_generations, scale_rewards, completion_ids, cu_seqlens, debug)
    if rewards is not None:
        advantages = group_advantages(rewards, num_generations, scale_rewards=scale_rewards, backend=backend)
    inputs = PolicyInputs.of(
        completion_ids,
        options.arithmetic_dtype,
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
    check_id_range("completion_ids", completion_ids, inputs.mask, lm_head_weight.shape[0], debug)
    if max_live_rows is not None:
        check_integer("max_live_rows", max_live_rows)
        if max_live_rows < 0:
            raise ValueError(f"max_live_rows must be at least 0, got {max_live_rows}")
    if debug:
        check_device_values(hidden_states.device)
    if backend != "torch":
        inputs, config = inputs.as_token_local(config)
    head, ids = (hidden_states, lm_head_weight, bias), completion_ids
    if reference is not None:
        comparison = Comparison.of(config.kl_estimator, 0.5, transform, None, softcap, logit_scale)
        if config.is_token_local:
            return divergence_loss(*head, ids, options, reference, comparison, inputs, config, backend, max_live_rows)
    elif backend == "torch":
        dtypes = (options.compute_dtype, options.logits_dtype)
        logits = head_reference.project(predicting(hidden_states, ids), *head[1:], inputs.mask, *dtypes)
        return reference_loss(logits, ids, inputs, softcap, logit_scale, config)
    elif config.is_token_local:
        return _one_pass_loss(*head, ids, options, transform, inputs, config, backend, max_live_rows)
    if max_live_rows is not None and backend != "torch":
        raise ValueError(f"max_live_rows must be None where a ratio waits for its sequence, got {max_live_rows}")
    if reference is not None:
        tokens = divergences(*head, ids, inputs.mask, options, reference, comparison, backend)
    else:
        tokens = logprobs_and_entropy(*head, ids, inputs.mask, options, transform, max_logits_bytes, backend)
    return loss_of_tokens(tokens, inputs, config, backend)
