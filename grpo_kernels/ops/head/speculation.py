"""Log-probabilities whose gradients are formed in the forward, for callers that compute the loss themselves.

The caller says which loss it expects to compute from the log-probabilities. The forward forms ``dX`` and ``dW`` of that
loss while the logits exist. The backward compares the upstream gradient with the expected one. If they are equal up to
one scalar, it returns the gradients of the forward times that scalar; otherwise it projects again. So the result is
always right, and costs ``6 N H V`` operations if the expectation is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.loss.config import GRPOLossConfig, LossCode
from grpo_kernels.loss.fields import TokenFields
from grpo_kernels.loss.inputs import PolicyInputs
from grpo_kernels.ops.gradients import has_run_backward, named_gradients, refuse_double_backward
from grpo_kernels.ops.head.buffers import NeededGradients
from grpo_kernels.ops.head.linear_grpo_loss import LinearLossCall, linear_grpo_loss_fwd
from grpo_kernels.ops.head.linear_token_logprobs import (
    LinearGradientCall,
    LinearStatisticsCall,
    head_gradients,
    linear_token_logprobs_bwd,
    linear_token_logprobs_fwd,
)
from grpo_kernels.ops.rows.calls import GradientCall, StatisticsCall
from grpo_kernels.ops.tokens.policy_loss import token_coefficients
from grpo_kernels.ops.tokens.scale import scale_gradients

#: How much an upstream gradient may differ from the expected one, relative to itself and to the largest. Two correct
#: orders of the same fp32 operations differ this much, as they contain an exponential and a difference near 0.
_RELATIVE_TOLERANCE, _ABSOLUTE_TOLERANCE = 4e-6, 1e-6


@dataclass(frozen=True)
class ExpectedLoss:
    """A loss of some tokens ``[N]``, in which a token's coefficient depends on that token alone."""

    fields: TokenFields
    code: LossCode

    @classmethod
    def of(cls, inputs: PolicyInputs, config: GRPOLossConfig, rows: Tensor) -> ExpectedLoss | None:
        """The loss of the tokens ``rows [N]`` of the flattened inputs; None if a coefficient needs other tokens."""
        inputs, config = inputs.as_token_local(config)
        if not config.is_token_local or config.has_exact_divergence:
            return None
        return cls(inputs.flat_fields.map_tokens(lambda values: values[rows]), config.code())

    def to(self, device: torch.device, dtype: torch.dtype) -> ExpectedLoss:
        """The same loss on another device and in another dtype."""
        moved = self.fields.map(lambda x: x.to(device, dtype if x.is_floating_point() else x.dtype))
        return replace(self, fields=moved)


@named_gradients
class SpeculatedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,  # [N, H]
        weight: Tensor,
        bias: Tensor | None,
        call: LinearLossCall,  # of the expected loss
        backend: str,
        report: Callable[[bool], None] | None,
    ) -> tuple[Tensor, Tensor]:
        fields = call.fields
        logprobs, entropy, *gradients = linear_grpo_loss_fwd[backend](hidden.detach(), weight, bias, call)
        coefficients = token_coefficients(logprobs, entropy, fields, call.code, backend)
        entropy_weights = fields.entropy_weights
        if entropy_weights is not None:
            entropy_weights = fields.expand_to_tokens(entropy_weights).expand_as(coefficients)
        saved = head_gradients(gradients, call.needs, hidden.shape).values()
        ctx.save_for_backward(hidden, weight, bias, call.ids, fields.mask, coefficients, entropy_weights, *saved)
        ctx.options = (call.options, call.transform, call.needs, backend, report)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, dlogprobs: Tensor | None, dentropy: Tensor | None) -> dict[str, Tensor | None]:  # type: ignore[override]
        refuse_double_backward()
        if dlogprobs is None and dentropy is None:
            return {}
        hidden, weight, bias, ids, mask, coefficients, entropy_weights, *gradients = ctx.saved_tensors
        options, transform, needs, backend, report = ctx.options
        scale = None
        if not has_run_backward(ctx):  # the first backward gave the saved gradients away
            scale = _common_factor(dlogprobs, coefficients, dentropy, entropy_weights, mask)
        if report is not None:
            report(scale is not None)
        if scale is not None:
            dhidden, dweight, dbias = scale_gradients(ctx, scale, backend, gradients)
            return {"hidden": dhidden, "weight": dweight, "bias": dbias}
        head = (hidden.detach(), weight, bias)
        options, saved_bytes = options.with_saved_logits(options.head(backend, weight, bias), needs, ids.shape[0])
        call = LinearStatisticsCall(options, StatisticsCall(ids, mask, transform, 0), saved_bytes, False)
        logprobs, lse, entropy, _, _, _, saved_logits, saved_ids, _ = linear_token_logprobs_fwd[backend](*head, call)
        upstream = (None if x is None else x.contiguous() for x in (dlogprobs, dentropy))
        rows = GradientCall(ids, mask, logprobs, lse, entropy, *upstream, transform)
        forward_needs = (needs.need_dhidden, needs.need_dweight, needs.need_dbias)
        both = zip(forward_needs, ctx.needs_input_grad[:3], strict=True)
        needs = NeededGradients(*(in_forward and in_backward for in_forward, in_backward in both))
        gradient_call = LinearGradientCall(options, rows, saved_logits, saved_ids, needs)
        gradients = linear_token_logprobs_bwd[backend](*head, gradient_call, saved_logits)
        return head_gradients(gradients, needs, hidden.shape)


def _common_factor(
    dlogprobs: Tensor | None, coefficients: Tensor, dentropy: Tensor | None, weights: Tensor | None, mask: Tensor
) -> Tensor | None:
    """The scalar ``s`` for which the upstream gradients are ``s`` times the expected ones, if there is one. A sync.

    Masked rows are compared too: their upstream gradient must be 0.
    """
    zeros = torch.zeros_like(coefficients)
    upstream = torch.cat([zeros if x is None else x for x in (dlogprobs, dentropy)])
    expected = torch.where(
        mask, torch.stack([coefficients, zeros if weights is None else zeros - weights]), 0
    ).flatten()
    if upstream.numel() == 0:
        return torch.ones((), device=upstream.device)
    index = expected.abs().argmax()
    largest, its_upstream = expected.take(index), upstream.take(index)  # indexing would sync
    scale = torch.where(largest == 0, 1.0, its_upstream / largest)
    expected = scale * expected
    allowed = _RELATIVE_TOLERANCE * expected.abs() + _ABSOLUTE_TOLERANCE * expected.abs().amax()
    return scale if bool(((upstream - expected).abs() <= allowed).all()) else None
