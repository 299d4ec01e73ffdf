"""The public ``policy_loss``, its registered op and its autograd function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels import backends
from grpo_kernels.device_values import check_device_values, first_bad
from grpo_kernels.loss import reference
from grpo_kernels.loss.aggregation import CLIPPED_LOSSES
from grpo_kernels.loss.config import GRPOLossConfig, LossCode, check_is_config
from grpo_kernels.loss.fields import TokenFields
from grpo_kernels.loss.finish_weights import finish_weights
from grpo_kernels.loss.inputs import PolicyInputs
from grpo_kernels.loss.metrics import CLIP_METRICS, KERNEL_PARTIALS, Partial, PolicyMetrics
from grpo_kernels.named_arguments import check_keywords
from grpo_kernels.ops.gradients import named_gradients, refuse_double_backward
from grpo_kernels.ops.registration import define, lazy_import
from grpo_kernels.ops.tokens.calls import PolicyLossCall
from grpo_kernels.validation import check_device, check_float, check_no_nan, check_real, check_shape

# at import: memory made at first use might be a fake tensor's, under tracing
if backends.supports("policy_loss", "cpu", _CPU := torch.device("cpu")):
    torch.ops.grpo_kernels.cpu_keep_first_bad(first_bad(_CPU))


class PolicyLossOutput(NamedTuple):
    """A scalar loss, differentiable, and metrics under TRL's names."""

    loss: Tensor
    metrics: PolicyMetrics


def _fake(logprobs: Tensor, entropy: Tensor | None, call: PolicyLossCall) -> tuple[Tensor, ...]:
    return logprobs.new_empty(()), torch.empty_like(logprobs), logprobs.new_empty(KERNEL_PARTIALS)


#: Loss, ``dloss/dlogprobs`` and the partials of the metrics, from contiguous log-probabilities.
policy_loss_fwd = define(
    "policy_loss_fwd",
    {"logprobs": "Tensor", "entropy": "Tensor?", "call": PolicyLossCall},
    "(Tensor loss, Tensor dlogprobs, Tensor partials)",
    _fake,
    {"triton": lazy_import("grpo_kernels.ops.tokens.triton.policy_loss", "policy_loss_fwd")},
)


def token_coefficients(
    logprobs: Tensor,  # [n]
    entropy: Tensor,  # [n]
    fields: TokenFields,  # of these tokens
    code: LossCode,
    backend: str,
) -> Tensor:  # [n]
    """``dloss/dlogprobs`` of some of the tokens of a token-local loss."""
    return policy_loss_fwd[backend](logprobs, entropy, PolicyLossCall(fields, None, 1, code, False))[1]


def add_divergence(
    loss: Tensor,
    partials: Tensor,
    divergence: Tensor,  # like the mask
    mask: Tensor,
    weights: Tensor,  # like the mask, or []; not read where masked
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Adds the penalty of an exact divergence to the loss, and its sum to the partials of ``PolicyMetrics``."""
    values = torch.where(mask, divergence.to(loss.dtype), 0)
    partials = partials.clone()
    partials[Partial.KL] += values.detach().sum()
    return loss + beta * (torch.where(mask, weights, 0) * values).sum(), partials


def policy_metrics(partials: Tensor, config: GRPOLossConfig, has_entropy: bool) -> PolicyMetrics:
    """The metrics that a configuration defines."""
    names = ("kl",) if config.beta != 0 else ()
    names += ("entropy",) if has_entropy else ()
    if config.loss_type in (*CLIPPED_LOSSES, "gmpo"):
        names += CLIP_METRICS
    names += {"cispo": ("cispo_clip_ratio",), "vespo": ("vespo/phi_seq_mean",)}.get(config.loss_type, ())
    return PolicyMetrics(partials, names)


@named_gradients
class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logprobs: Tensor,
        entropy: Tensor | None,
        call: PolicyLossCall,
        entropy_weights: Tensor | None,  # like the tokens
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        dtype = call.fields.weights.dtype
        dense = [None if x is None else x.detach().to(dtype).contiguous() for x in (logprobs, entropy)]
        loss, dlogprobs, partials = policy_loss_fwd[backend](*dense, call)
        ctx.mark_non_differentiable(partials)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dlogprobs, entropy_weights)
        ctx.dtypes = (logprobs.dtype, None if entropy is None else entropy.dtype)
        return loss, partials

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, _: Tensor | None) -> dict[str, Tensor | None]:  # type: ignore[override]
        refuse_double_backward()
        if dloss is None:
            return {}
        dlogprobs, entropy_weights = ctx.saved_tensors
        logprobs_dtype, entropy_dtype = ctx.dtypes
        dentropy = None
        if ctx.needs_input_grad[1] and entropy_weights is not None:
            dentropy = (-entropy_weights * dloss).to(entropy_dtype)
        return {"logprobs": (dlogprobs * dloss).to(logprobs_dtype), "entropy": dentropy}


@check_keywords(GRPOLossConfig)
def policy_loss(
    logprobs: Tensor,  # [B, T], or packed [N]
    advantages: Tensor,  # [B] or [B, T]; packed [S] or [N]
    completion_mask: Tensor,  # like logprobs
    *,
    old_logprobs: Tensor | None = None,  # like logprobs
    ref_logprobs: Tensor | None = None,  # like logprobs
    sampling_logprobs: Tensor | None = None,  # like logprobs
    rollout_is_weights: Tensor | None = None,  # like logprobs, or [B, 1]; packed [N] or [S, 1]
    entropy: Tensor | None = None,  # like logprobs
    divergence: Tensor | None = None,  # like logprobs
    entropy_threshold: Tensor | float | None = None,
    num_items_in_batch: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    loss_scale: float = 1.0,
    config: GRPOLossConfig = GRPOLossConfig(),  # noqa: B008  frozen
    debug: bool = False,
    backend: str = "auto",
) -> PolicyLossOutput:
    """Policy-gradient loss with a KL penalty and an entropy bonus, weighted and summed over tokens.

    Example:
        >>> logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> loss, metrics = policy_loss(logprobs, torch.tensor([1.0]), torch.tensor([[1, 1]]))
        >>> loss.backward()
        >>> logprobs.grad
        tensor([[-0.5000, -0.5000]])

    With ``rho = exp(logprobs - old_logprobs)``, or its geometric mean over a sequence,

        loss = sum_it w_it (-min(rho_it A_i, clip(rho_it, 1 - eps_low, 1 + eps_high) A_i) + beta k_it) - coef mean H

    DeepSeekMath eq. 3 (arXiv:2402.03300) with the two clip bounds of DAPO (arXiv:2503.14476). ``GRPOLossConfig``
    describes the other objectives, the divergences ``k`` and the weights ``w``. Arithmetic is fp32, or fp64 for fp64
    input.

    If a ratio overflows or is 0, loss and gradient are their mathematical limits. TRL gives NaN there. A token with an
    infinite loss is flagged for ``check_device_values``.

    Args:
        logprobs: Log-probabilities, in nats, of the sampled tokens under the policy being trained.
        advantages: One per completion, unitless; or one per token.
        completion_mask: 0 excludes a token, whatever the other inputs hold there.
        old_logprobs: The same tokens under the policy that sampled them. None means on-policy: ratio 1.
        ref_logprobs: The same tokens under the frozen reference policy; needed, and read, if beta is not 0.
        sampling_logprobs: The same tokens as scored by the inference engine; NaN for a token that it did not score.
            Needed for ``rollout_correction``; the off-policy mask takes them rather than ``old_logprobs``.
        rollout_is_weights: Old policy over the inference engine's, a correction that multiplies the policy term.
        entropy: Entropy of each token's distribution, in nats; needed if ``entropy_coef`` is not 0. The bonus is on its
            mean over the unmasked tokens given here, whatever ``num_items_in_batch``, as in TRL.
        divergence: Each token's divergence from the reference, in nats, from ``token_divergence``; needed for an exact
            ``kl_estimator``.
        entropy_threshold: Tokens with a lower entropy lose their policy term. Pass it if several processes must share
            one threshold; by default it is the quantile of the unmasked tokens given here.
        num_items_in_batch: Tokens that a mean over tokens divides by, over all micro-batches and processes of one step;
            not used by "bnpo" and "ppo". None means the unmasked tokens given here. 0 only where all are masked.
        cu_seqlens: Where each packed completion begins, and the end.
        loss_scale: Multiplies the loss and the gradient.
        config: The loss. Its temperature has no effect here.
        debug: Check values on a GPU too, and for NaN where unmasked, and the flags of earlier kernels
            (``check_device_values``): syncs.
        backend: "auto", or one of ``grpo_kernels.BACKENDS``.

    Returns:
        Scalar loss, and metrics as 0-dim tensors under TRL's names. Zero, with zero gradient, if nothing is unmasked.

    Raises:
        TypeError: A tensor has a dtype that does not fit.
        ValueError: Shapes or devices do not fit, or an input that the configuration needs is missing.
        RuntimeError: The named backend cannot run here.
    """
    check_float("logprobs", logprobs)
    check_is_config(config)
    check_real("advantages", advantages)
    if logprobs.dim() not in (1, 2):
        raise ValueError(f"logprobs must have shape [B, T] or, packed, [N], got {list(logprobs.shape)}")
    if entropy is not None:
        check_float("entropy", entropy)
        check_shape("entropy", entropy, logprobs.shape)
        check_device(logprobs.device, [("entropy", entropy)])
    elif config.entropy_coef != 0:
        raise ValueError(f"entropy must be given when entropy_coef is not 0 ({config.entropy_coef}), got None")
    elif config.top_entropy_quantile < 1:
        quantile = config.top_entropy_quantile
        raise ValueError(f"entropy must be given when top_entropy_quantile is below 1 ({quantile}), got None")
    if config.has_exact_divergence != (divergence is not None):
        raise ValueError(
            f'divergence must be {"given" if divergence is None else "None"} with kl_estimator="{config.kl_estimator}" '
            f"and beta={config.beta}, got {'None' if divergence is None else 'a tensor'}"
        )
    if divergence is not None:
        if ref_logprobs is not None:
            raise ValueError("ref_logprobs must be None beside divergence, got both")
        check_float("divergence", divergence)
        check_shape("divergence", divergence, logprobs.shape)
        check_device(logprobs.device, [("divergence", divergence)])
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    inputs = PolicyInputs.of(
        logprobs,
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
    if debug:
        for name, values in (("logprobs", logprobs), ("entropy", entropy)):
            if values is not None:
                check_no_nan(name, values, inputs.mask)
        check_device_values(logprobs.device)
    backend = backends.resolve("policy_loss", backend, logprobs.device)
    return policy_loss_of(logprobs, entropy, divergence, inputs, config, backend)


def policy_loss_of(
    logprobs: Tensor,
    entropy: Tensor | None,
    divergence: Tensor | None,
    inputs: PolicyInputs,
    config: GRPOLossConfig,
    backend: str,
) -> PolicyLossOutput:
    """``policy_loss`` of validated inputs, on a resolved backend."""
    if backend == "torch":
        dtype = inputs.weights.dtype
        wide_entropy = None if entropy is None else entropy.to(dtype)
        loss, partials = reference.policy_loss(logprobs.to(dtype), inputs, wide_entropy, config)
    else:
        inputs, weight_partials = finish_weights(inputs, logprobs, entropy, config)
        has_bonus = entropy is not None and inputs.entropy_weights is not None
        entropy_weights = inputs.expand_to_tokens(inputs.entropy_weights) if has_bonus else None
        call = PolicyLossCall.of(inputs, config)
        loss, partials = _PolicyLoss.apply(logprobs, entropy, call, entropy_weights, backend)
        partials = partials if weight_partials is None else torch.cat([partials, weight_partials])
    if divergence is not None:
        weights = inputs.expand_to_tokens(inputs.weights)
        loss, partials = add_divergence(loss, partials, divergence, inputs.mask, weights, config.beta)
    return PolicyLossOutput(loss, policy_metrics(partials, config, entropy is not None))
