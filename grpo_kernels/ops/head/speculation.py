"""Log-probabilities whose gradients are formed before anyone asks: for callers that keep a loss of their own.

The caller says which loss it expects to be taken of the log-probabilities. The forward then forms ``dX`` and ``dW``
while the logits are alive, and the backward compares the gradient that autograd hands over with the expected one. Equal
up to one scalar, it hands over what the forward formed, times that scalar; else it projects again. Never wrong, and
``6 N H V`` operations when right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels.loss.config import GRPOLossConfig, PolicyLossCode
from grpo_kernels.loss.inputs import PolicyInputs
from grpo_kernels.ops.gradients import refuse_double_backward
from grpo_kernels.ops.head.linear_token_logprobs import linear_token_logprobs_bwd, linear_token_logprobs_fwd
from grpo_kernels.ops.head.loss_chunks import linear_grpo_loss_fwd
from grpo_kernels.ops.head.reference_model import NO_REFERENCE
from grpo_kernels.ops.rows.transform import Comparison, Transform
from grpo_kernels.ops.tokens.policy_loss import token_coefficients
from grpo_kernels.ops.tokens.scale import hand_over

#: By how much a gradient may differ from the expected one, relative to itself and to the largest: what two correct
#: orders of the same fp32 operations differ by, with an exponential and a difference near 0 among them.
_RELATIVE, _ABSOLUTE = 4e-6, 1e-6


class ExpectedLoss(NamedTuple):
    """A token-local loss of some rows: its tensors ``[N]`` in the order of ``PolicyInputs.flat``, and its code."""

    flat: tuple[Tensor | None, ...]
    code: PolicyLossCode

    @classmethod
    def of(cls, inputs: PolicyInputs, config: GRPOLossConfig, rows: Tensor) -> ExpectedLoss | None:
        """The loss of those tokens ``rows [N]`` of the flattened inputs; None where coefficients wait for others."""
        inputs, config = inputs.token_local(config)
        if not config.is_token_local or config.has_exact_divergence:
            return None
        return cls(tuple(None if x is None else x[rows] for x in inputs.flat()), config.code())

    def to(self, device: torch.device, dtype: torch.dtype) -> ExpectedLoss:
        """The same where a head is, in the dtype of its arithmetic."""

        def moved(x: Tensor | None) -> Tensor | None:
            return x if x is None else x.to(device, dtype if x.is_floating_point() else x.dtype)

        return self._replace(flat=tuple(map(moved, self.flat)))

    @property
    def has_policy_term(self) -> Tensor:
        """Which rows have an advantage and a weight."""
        return (self.flat[1] != 0) & (self.flat[2] != 0)  # type: ignore[operator]

    @property
    def mask(self) -> Tensor:
        return self.flat[0]  # type: ignore[return-value]

    @property
    def entropy_weights(self) -> Tensor | None:
        return self.flat[4]


class SpeculatedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,  # [N, H]
        weight: Tensor,
        bias: Tensor | None,
        dtypes: tuple[torch.dtype, torch.dtype],
        workspace_bytes: int,
        ids: Tensor,  # [N]
        expected: ExpectedLoss,
        transform: Transform,
        needs: tuple[bool, bool, bool],
        backend: str,
        report: Callable[[bool], None] | None,
    ) -> tuple[Tensor, Tensor]:
        comparison = Comparison(1.0, *transform, transform.temperature, 0.0, 1.0)
        code = (expected.code.options, expected.code.params)
        logprobs, entropy, _, *grads = linear_grpo_loss_fwd[backend](
            hidden.detach(), weight, bias, *dtypes, workspace_bytes, *NO_REFERENCE, ids, *expected.flat, *code,
            *comparison, *needs, None,
        )  # fmt: skip
        coefficients = token_coefficients(logprobs, entropy, expected.flat, code, backend)
        mask, entropy_weights = expected.mask, expected.entropy_weights
        kept = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        ctx.save_for_backward(hidden, weight, bias, ids, mask, coefficients, entropy_weights, *kept)
        ctx.options = (dtypes, workspace_bytes, transform, needs, backend, report)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, dlogprobs: Tensor | None, dentropy: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_double_backward()
        if dlogprobs is None and dentropy is None:
            return (None,) * 11
        hidden, weight, bias, ids, mask, coefficients, entropy_weights, *grads = ctx.saved_tensors
        dtypes, workspace_bytes, transform, needs, backend, report = ctx.options
        is_first = not getattr(ctx, "handed_over", False)  # a second backward finds nothing that is still its own
        scale = _common_factor(dlogprobs, coefficients, dentropy, entropy_weights, mask) if is_first else None
        if report is not None:
            report(scale is not None)
        if scale is not None:
            return (*hand_over(ctx, scale, backend, grads), *(None,) * 8)
        needs = tuple(need and asked for need, asked in zip(needs, ctx.needs_input_grad[:3], strict=True))
        head = (hidden.detach(), weight, bias, *dtypes, workspace_bytes, ids, mask)
        statistics = linear_token_logprobs_fwd[backend](*head, *transform, 0, 0, False)
        upstream = (None if x is None else x.contiguous() for x in (dlogprobs, dentropy))
        grads = linear_token_logprobs_bwd[backend](
            *head, *statistics[:3], *upstream, *transform, *statistics[6:8], *needs
        )
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 8)


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
