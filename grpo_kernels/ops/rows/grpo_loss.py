"""The public ``grpo_loss``, its registered op and its autograd function."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels import backends
from grpo_kernels.device_values import check_device_values
from grpo_kernels.dtypes import accumulation_dtype
from grpo_kernels.loss.config import GRPOLossConfig, check_is_config
from grpo_kernels.loss.inputs import PolicyInputs
from grpo_kernels.loss.metrics import PolicyMetrics
from grpo_kernels.measured_backends import RowClass
from grpo_kernels.named_arguments import check_keywords
from grpo_kernels.ops.gradients import mark_written, named_gradients
from grpo_kernels.ops.registration import define, lazy_import
from grpo_kernels.ops.rows import reference
from grpo_kernels.ops.rows.calls import GroupRewards, LossRowsCall
from grpo_kernels.ops.rows.reference import TokenDivergence, TokenLogprobs
from grpo_kernels.ops.rows.token_divergence import token_divergence
from grpo_kernels.ops.rows.token_logprobs import to_kernel_ids, to_kernel_logits, token_logprobs
from grpo_kernels.ops.rows.transform import Transform
from grpo_kernels.ops.tokens.calls import PolicyLossCall
from grpo_kernels.ops.tokens.group_advantages import EPS, FLATTEN_TABLE, check_rewards, group_advantages
from grpo_kernels.ops.tokens.policy_loss import policy_loss_fwd, policy_loss_of, policy_metrics
from grpo_kernels.ops.tokens.scale import backward_of
from grpo_kernels.validation import check_cu_seqlens, check_device, check_id_range, check_logits, check_writable


class GRPOLossOutput(NamedTuple):
    """A scalar loss, the only differentiable field; log-probs and entropy in nats, like the ids; metrics as in TRL."""

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    metrics: PolicyMetrics


def _fake(logits: Tensor, call: LossRowsCall, dlogits: Tensor | None) -> tuple[Tensor, ...]:
    dtype, ids, rewards = accumulation_dtype(logits.dtype), call.ids, call.group.rewards
    statistics = (torch.empty_like(ids, dtype=dtype) for _ in range(2))
    advantages = ids.new_empty(0 if rewards is None else rewards.shape[0], dtype=dtype)
    return (*statistics, torch.empty_like(ids, dtype=torch.bool), advantages)


#: Statistics of every row; and the gradient of the loss, written to ``dlogits``. ``dlogits`` may be ``logits`` itself,
#: and may have another dtype if the backend supports that. ``live`` marks the rows with a nonzero coefficient; the
#: gradient of all others is 0. ``advantages`` are ``[S]`` with rewards, ``[0]`` without.
grpo_loss_fwd = define(
    "grpo_loss_fwd",
    {"logits": "Tensor", "call": LossRowsCall, "dlogits": "Tensor(a!)?"},
    "(Tensor logprobs, Tensor entropy, Tensor live, Tensor advantages)",
    _fake,
    {"triton": lazy_import("grpo_kernels.ops.rows.triton.grpo_loss", "grpo_loss_fwd")},
)


@named_gradients
class _GRPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logits: Tensor,
        rows: LossRowsCall,
        policy: PolicyLossCall,
        form_gradient: bool,
        inplace: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        values = logits.detach()
        dlogits = None
        if form_gradient:
            dlogits = values if inplace else torch.empty(values.shape, dtype=values.dtype, device=values.device)
        logprobs, entropy, _, advantages = grpo_loss_fwd[backend](
            to_kernel_logits(values), rows, dlogits if dlogits is None or dlogits.dim() == 3 else dlogits[None]
        )
        if rows.group.rewards is not None:
            policy = replace(policy, fields=replace(policy.fields, advantages=advantages))
        loss, _, partials = policy_loss_fwd[backend](logprobs, entropy, policy)
        if logits.dim() == 2:  # packed tokens are one long row
            logprobs, entropy = logprobs[0], entropy[0]
        if dlogits is not None and inplace:
            mark_written(values)
        ctx.save_for_backward(dlogits)
        ctx.backend = backend
        ctx.mark_non_differentiable(logprobs, entropy, partials)
        ctx.set_materialize_grads(False)
        return loss, logprobs, entropy, partials

    backward = staticmethod(backward_of("logits"))


@check_keywords(GRPOLossConfig)
def grpo_loss(
    logits: Tensor,  # [B, T, V] or [B, T + 1, V]; packed [N, V]
    completion_ids: Tensor,  # [B, T]; packed [N]
    advantages: Tensor | None,  # [B] or [B, T]; packed [S] or [N]
    completion_mask: Tensor,  # like completion_ids
    *,
    rewards: Tensor | None = None,  # [B] or [B, K]
    num_generations: int | None = None,
    scale_rewards: str = "group",
    old_logprobs: Tensor | None = None,  # like completion_ids
    ref_logprobs: Tensor | None = None,  # like completion_ids
    reference_logits: Tensor | None = None,  # like logits
    sampling_logprobs: Tensor | None = None,  # like completion_ids
    rollout_is_weights: Tensor | None = None,  # like completion_ids, or [B, 1]; packed [N] or [S, 1]
    entropy_threshold: Tensor | float | None = None,
    num_items_in_batch: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    loss_scale: float = 1.0,
    config: GRPOLossConfig = GRPOLossConfig(),  # noqa: B008  frozen
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace: bool = False,
    debug: bool = False,
    backend: str = "auto",
) -> GRPOLossOutput:
    """The GRPO loss from logits, its gradient formed in the same pass.

    Example:
        >>> logits = torch.zeros(2, 3, 8, requires_grad=True)
        >>> ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)
        >>> out = grpo_loss(logits, ids, None, mask, rewards=torch.tensor([0.0, 1.0]), num_generations=2)
        >>> out.loss.backward()

    ``token_logprobs`` at the configuration's temperature, then ``policy_loss``; see there for the equations. At token
    level the forward reads the logits once and writes their gradient once. The backward multiplies it by the upstream
    scalar, unless that is 1. A sequence-level ratio first needs a pass for the statistics.

    Args:
        logits: Position ``t`` predicts token ``t``. A ``T + 1``-th position, as ``logits_to_keep=T + 1`` gives it, is
            ignored, and its gradient is 0.
        completion_ids: The sampled tokens.
        advantages: One per completion, unitless; or one per token; or None, with ``rewards``.
        completion_mask: 0 excludes a token, whatever the other inputs hold there.
        rewards: Instead of advantages, which are then ``group_advantages`` of these: one per completion, or one column
            for each reward function. Whole groups, on this process.
        num_generations: Completions per prompt, with ``rewards``.
        scale_rewards: "group" or "none", with ``rewards``.
        old_logprobs: The same tokens under the policy that sampled them. None means on-policy: ratio 1.
        ref_logprobs: The same tokens under the frozen reference policy; needed, and read, if beta is not 0.
        sampling_logprobs: The same tokens as scored by the inference engine; NaN for a token that it did not score.
            Needed for ``rollout_correction``; the off-policy mask takes them rather than ``old_logprobs``.
        rollout_is_weights: Old policy over the inference engine's, a correction that multiplies the policy term.
        entropy_threshold: Tokens with a lower entropy lose their policy term. Pass it if several processes must share
            one threshold; by default it is the quantile of the unmasked tokens given here.
        num_items_in_batch: Tokens that a mean over tokens divides by, over all micro-batches and processes of one step;
            not used by "bnpo" and "ppo". None means the unmasked tokens given here. 0 only where all are masked.
        cu_seqlens: Where each packed completion begins, and the end.
        reference_logits: Logits of the frozen reference policy, in the dtype of ``logits`` and with the same transform;
            for an exact ``kl_estimator``, instead of ``ref_logprobs``. The loss then first computes the statistics of
            both rows, and reads them once more for the gradient.
        loss_scale: Multiplies the loss and the gradient, before the gradient is rounded to the logits' dtype.
        config: The loss.
        softcap: Bound of a tanh soft cap (Gemma); a Hugging Face model's logits already include it.
        logit_scale: Multiplies the logits, first (Cohere, Granite); a Hugging Face model's logits already include it.
        inplace: Overwrite the logits with their gradient; their last dimension must be dense. The "torch" backend does
            not overwrite them.
        debug: Check values on a GPU too, and for NaN where unmasked, and the flags of earlier kernels
            (``check_device_values``): syncs.
        backend: "auto", or one of ``grpo_kernels.BACKENDS``.

    Returns:
        ``GRPOLossOutput``; only ``loss`` is differentiable, and only once. A second backward is refused.

    Raises:
        TypeError: A tensor has a dtype that does not fit.
        ValueError: Shapes or devices do not fit, an input that the configuration needs is missing, both or neither of
            ``advantages`` and ``rewards`` are given, or an unmasked id is outside the vocabulary (read on the CPU,
            elsewhere with ``debug``).
        RuntimeError: The named backend cannot run here.
    """
    check_logits(logits, completion_ids, "completion_ids")
    check_is_config(config)
    check_device(logits.device, [("completion_ids", completion_ids)])
    transform = Transform.of(config.temperature, softcap, logit_scale)
    if inplace:
        check_writable("logits", logits, "inplace=True")
    op = "grpo_loss" if reference_logits is None else "token_divergence"
    backend = backends.resolve(op, backend, logits.device, partial(RowClass.of_logits, logits))
    dtype = accumulation_dtype(logits.dtype)
    check_group_rewards(advantages, rewards, num_generations, scale_rewards, completion_ids, cu_seqlens, debug)
    check_reference(reference_logits is not None, ref_logprobs, config, "reference_logits")
    in_kernel = rewards is not None and rewards.dim() == 1 and config.is_token_local and backend != "torch"
    in_kernel = in_kernel and not config.has_exact_divergence
    if rewards is not None and not in_kernel:
        advantages = group_advantages(rewards, num_generations, scale_rewards=scale_rewards, backend=backend)
    inputs = PolicyInputs.of(
        completion_ids,
        dtype,
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
    group = GroupRewards()
    if in_kernel:
        values = rewards.detach().to(dtype).contiguous()
        group = GroupRewards(values, num_generations, scale_rewards == "group", EPS)
    check_id_range("completion_ids", completion_ids, inputs.mask, logits.shape[-1], debug)
    if debug:
        check_device_values(logits.device)
    return _loss_of_logits(logits, reference_logits, completion_ids, inputs, group, transform, config, inplace, backend)


def _loss_of_logits(
    logits: Tensor,
    reference_logits: Tensor | None,
    ids: Tensor,
    inputs: PolicyInputs,
    group: GroupRewards,
    transform: Transform,
    config: GRPOLossConfig,
    inplace: bool,
    backend: str,
) -> GRPOLossOutput:
    """``grpo_loss`` of validated arguments, in one pass if the loss is token-local."""
    softcap, logit_scale = transform.softcap or None, transform.logit_scale
    options = {"temperature": config.temperature, "softcap": softcap, "logit_scale": logit_scale, "mask": inputs.mask}
    if reference_logits is not None:
        tokens = token_divergence(
            logits,
            reference_logits,
            divergence=config.kl_estimator,
            ids=ids,
            reference_softcap=softcap,
            reference_logit_scale=logit_scale,
            inplace_backward=inplace,
            backend=backend,
            **options,
        )
        return loss_of_tokens(tokens, inputs, config, backend)
    if backend == "torch":
        rows = logits if ids.dim() == 1 else logits[:, : ids.shape[1]]
        return reference_loss(rows, ids, inputs, softcap, logit_scale, config)
    inputs, config = inputs.as_token_local(config)
    if not config.is_token_local:
        tokens = token_logprobs(logits, ids, outputs=("entropy",), inplace_backward=inplace, backend=backend, **options)
        return loss_of_tokens(tokens, inputs, config, backend)
    call = LossRowsCall(to_kernel_ids(ids), inputs.row_fields, group, config.code(), transform)
    policy = PolicyLossCall.of(inputs, config)
    form_gradient = torch.is_grad_enabled() and logits.requires_grad
    loss, logprobs, entropy, partials = _GRPOLoss.apply(logits, call, policy, form_gradient, inplace, backend)
    return GRPOLossOutput(loss, logprobs, entropy, policy_metrics(partials, config, True))


def reference_loss(
    logits: Tensor,
    ids: Tensor,
    inputs: PolicyInputs,
    softcap: float | None,
    logit_scale: float,
    config: GRPOLossConfig,
) -> GRPOLossOutput:
    """The "torch" backend."""
    loss, logprobs, entropy, partials = reference.grpo_loss(logits, ids, inputs, softcap, logit_scale, config)
    return GRPOLossOutput(loss, logprobs.detach(), entropy.detach(), policy_metrics(partials, config, True))


def loss_of_tokens(
    tokens: TokenLogprobs | TokenDivergence, inputs: PolicyInputs, config: GRPOLossConfig, backend: str
) -> GRPOLossOutput:
    """A loss from the statistics of all rows; the backward of the statistics forms the gradient."""
    divergence = tokens.divergence if isinstance(tokens, TokenDivergence) else None
    loss, metrics = policy_loss_of(tokens.logprobs, tokens.entropy, divergence, inputs, config, backend)
    return GRPOLossOutput(loss, tokens.logprobs.detach(), tokens.entropy.detach(), metrics)


def check_reference(has_reference: bool, ref_logprobs: Tensor | None, config: GRPOLossConfig, name: str) -> None:
    """Raises ValueError unless a reference's distributions are given exactly if the divergence needs them."""
    if has_reference and ref_logprobs is not None:
        raise ValueError(f"ref_logprobs must be None beside {name.rstrip(',')}, got both")
    if has_reference != config.has_exact_divergence:
        raise ValueError(
            f'{name} must be {"None" if has_reference else "given"} with kl_estimator="{config.kl_estimator}" and '
            f"beta={config.beta}, got {'a tensor' if has_reference else 'None'}"
        )


def check_group_rewards(
    advantages: Tensor | None,
    rewards: Tensor | None,
    num_generations: int | None,
    scale_rewards: str,
    ids: Tensor,
    cu_seqlens: Tensor | None,
    debug: bool,
) -> None:
    """Raises ValueError unless either advantages or rewards are given. Rewards are whole groups, one per completion."""
    if advantages is not None:
        if rewards is not None:
            raise ValueError("rewards must be None where advantages are given, got both")
        if num_generations is not None or scale_rewards != "group":
            name, value = (
                ("scale_rewards", scale_rewards) if num_generations is None else ("num_generations", num_generations)
            )
            raise ValueError(
                f"{name} has no effect where advantages are given, got {value!r}: rewards to be normalised within "
                "their groups are given as rewards=..., with advantages=None"
            )
        return
    if rewards is None:
        raise ValueError("advantages must be given, or else rewards with num_generations, got neither")
    if num_generations is None:
        raise ValueError("num_generations must be given with rewards, got None")
    if scale_rewards not in ("group", "none"):
        raise ValueError(f"scale_rewards must be 'group' or 'none' with rewards, got {scale_rewards!r}")
    check_rewards(rewards, num_generations, debug)
    check_device(ids.device, [("rewards", rewards)])
    check_cu_seqlens(cu_seqlens, ids, debug)
    count = ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if rewards.shape[0] != count:
        way_out = f": {FLATTEN_TABLE}" if rewards.dim() == 2 and rewards.numel() == count else ""
        raise ValueError(
            f"rewards must have a row for each of the {count} completions, got {list(rewards.shape)}{way_out}"
        )
