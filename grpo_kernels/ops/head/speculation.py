"""Log-probabilities whose gradients are formed before anyone asks: for callers that keep a loss of their own.

The caller says which loss it expects to be taken of the log-probabilities. The forward then forms ``dX`` and ``dW``
while the logits are alive, and the backward compares the gradient that autograd hands over with the expected one. Equal
up to one scalar, it hands over what the forward formed, times that scalar; else it projects again. Never wrong, and
``6 N H V`` operations when right.
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
from grpo_kernels.ops.head.buffers import Needs
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

#: By how much a gradient may differ from the expected one, relative to itself and to the largest: what two correct
#: orders of the same fp32 operations differ by, with an exponential and a difference near 0 among them.
_RELATIVE, _ABSOLUTE = 4e-6, 1e-6


@dataclass(frozen=True)
class ExpectedLoss:
    """A token-local loss of some tokens ``[N]``."""

    fields: TokenFields
    code: LossCode

    @classmethod
    def of(cls, inputs: PolicyInputs, config: GRPOLossConfig, rows: Tensor) -> ExpectedLoss | None:
        """The loss of those tokens ``rows [N]`` of the flattened inputs; None where coefficients wait for others."""
        inputs, config = inputs.token_local(config)
        if not config.is_token_local or config.has_exact_divergence:
            return None
        return cls(inputs.gathered_fields.of_tokens(lambda values: values[rows]), config.code())

    def to(self, device: torch.device, dtype: torch.dtype) -> ExpectedLoss:
        """The same where a head is, in the dtype of its arithmetic."""
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
        logprobs, entropy, *found = linear_grpo_loss_fwd[backend](hidden.detach(), weight, bias, call)
        coefficients = token_coefficients(logprobs, entropy, fields, call.code, backend)
        entropy_weights = None if fields.entropy_weights is None else fields.at_tokens(fields.entropy_weights)
        gradients = head_gradients(found, call.needs, hidden.shape)
        ctx.save_for_backward(
            hidden, weight, bias, call.ids, fields.mask, coefficients, entropy_weights, *gradients.values()
        )
        ctx.options = (call.options, call.transform, call.needs, backend, report)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, dlogprobs: Tensor | None, dentropy: Tensor | None) -> dict[str, Tensor | None]:  # type: ignore[override]
        refuse_double_backward()
        if dlogprobs is None and dentropy is None:
            return {}
        hidden, weight, bias, ids, mask, coefficients, entropy_weights, *formed = ctx.saved_tensors
        options, transform, needs, backend, report = ctx.options
        scale = None
        if not has_run_backward(ctx):  # a second backward finds nothing that is still its own
            scale = _common_factor(dlogprobs, coefficients, dentropy, entropy_weights, mask)
        if report is not None:
            report(scale is not None)
        if scale is not None:
            dhidden, dweight, dbias = scale_gradients(ctx, scale, backend, formed)
            return {"hidden": dhidden, "weight": dweight, "bias": dbias}
        head = (hidden.detach(), weight, bias)
        call = LinearStatisticsCall(options, StatisticsCall(ids, mask, transform, 0), 0, False)
        logprobs, lse, entropy, _, _, _, kept, kept_ids, _ = linear_token_logprobs_fwd[backend](*head, call)
        upstream = (None if x is None else x.contiguous() for x in (dlogprobs, dentropy))
        rows = GradientCall(ids, mask, logprobs, lse, entropy, *upstream, transform)
        asked = zip((needs.need_dhidden, needs.need_dweight, needs.need_dbias), ctx.needs_input_grad[:3], strict=True)
        needs = Needs(*(need and is_asked for need, is_asked in asked))
        found = linear_token_logprobs_bwd[backend](*head, LinearGradientCall(options, rows, kept, kept_ids, needs))
        return head_gradients(found, needs, hidden.shape)


def _common_factor(
    dlogprobs: Tensor | None, coefficients: Tensor, dentropy: Tensor | None, weights: Tensor | None, mask: Tensor
) -> Tensor | None:
    """The scalar that the expected gradients are to be multiplied by to be those handed over, if there is one. A sync.

    Masked rows are compared too: nobody may want a gradient there.
    """
    zeros = torch.zeros_like(coefficients)
    got = torch.cat([zeros if x is None else x for x in (dlogprobs, dentropy)])
    expected = torch.where(mask, torch.stack([coefficients, zeros if weights is None else -weights]), 0).flatten()
    if got.numel() == 0:
        return torch.ones((), device=got.device)
    largest = expected.abs().argmax()
    one, other = expected.take(largest), got.take(largest)  # an index would be read back
    scale = torch.where(one == 0, 1.0, other / one)
    expected = scale * expected
    allowed = _RELATIVE * expected.abs() + _ABSOLUTE * expected.abs().amax()
    return scale if bool(((got - expected).abs() <= allowed).all()) else None
