"""A loss with the exact divergence from a reference: one pass over chunks of both models' logits.

It takes three GEMMs of the policy's head and one of the reference's. A chunk's coefficients follow from its statistics,
while its logits are still in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.calls import Call
from grpo_kernels.dtypes import accumulation_dtype
from grpo_kernels.loss.config import GRPOLossConfig, LossCode
from grpo_kernels.loss.fields import TokenFields
from grpo_kernels.loss.inputs import PolicyInputs
from grpo_kernels.ops.gradients import named_gradients
from grpo_kernels.ops.head.buffers import NeededGradients
from grpo_kernels.ops.head.driver import Chunk, HeadPass, RowOp, RowResults, clamp_ids
from grpo_kernels.ops.head.inputs import HeadOptions, flatten_hidden, shape_of_tokens
from grpo_kernels.ops.head.linear_token_divergence import divergences
from grpo_kernels.ops.head.linear_token_logprobs import HEAD_INPUTS, gradient_fakes, head_gradients
from grpo_kernels.ops.head.live_rows import may_be_live
from grpo_kernels.ops.head.reference_model import Reference, ReferenceRows
from grpo_kernels.ops.head.selection import SelectedRows
from grpo_kernels.ops.registration import KERNEL_BACKENDS, define
from grpo_kernels.ops.rows.calls import DivergenceCall
from grpo_kernels.ops.rows.grpo_loss import GRPOLossOutput, loss_of_tokens
from grpo_kernels.ops.rows.token_divergence import token_divergence_rows
from grpo_kernels.ops.rows.token_logprobs import to_kernel_ids
from grpo_kernels.ops.rows.transform import Comparison
from grpo_kernels.ops.tokens.calls import PolicyLossCall
from grpo_kernels.ops.tokens.policy_loss import add_divergence, policy_loss_fwd, policy_metrics, token_coefficients
from grpo_kernels.ops.tokens.scale import backward_of


@dataclass(frozen=True)
class LinearDivergenceLossCall(Call):
    """A loss of tokens ``[N]`` that is token-local, with a divergence, and which of its gradients are formed."""

    options: HeadOptions
    reference: Reference
    ids: Tensor  # [N]
    fields: TokenFields  # of these tokens
    code: LossCode
    comparison: Comparison
    needs: NeededGradients
    max_live_rows: int | None


def _divergence_loss_rows(backend: str, call: LinearDivergenceLossCall) -> RowOp:
    """Computes a chunk's log-probabilities, entropies and divergences; then, from these, its gradient."""

    def run(chunk: Chunk) -> RowResults:
        fields = call.fields.map_tokens(lambda values: values[chunk.rows])
        logits = (chunk.logits[None], chunk.reference_logits[None])  # type: ignore[index]
        rows = DivergenceCall(call.ids[None, chunk.rows], fields.mask[None], None, None, None, call.comparison)
        logprobs, entropy, divergence = (x[0] for x in token_divergence_rows[backend](*logits, rows, None))
        if chunk.dlogits is not None:

            def upstream(weights: Tensor | None, factor: float) -> Tensor | None:  # [1, n]
                if weights is None:
                    return None
                return (factor * fields.expand_to_tokens(weights)).expand(logprobs.shape).contiguous()[None]

            upstream_rows = replace(
                rows,
                dlogprobs=token_coefficients(logprobs, entropy, fields, call.code, backend)[None],
                dentropy=upstream(fields.entropy_weights, -1.0),
                ddivergence=upstream(fields.weights, call.code.beta),
            )
            token_divergence_rows[backend](*logits, upstream_rows, chunk.dlogits[None])
        return RowResults((logprobs, entropy, divergence))

    return run


def _fwd(
    backend: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearDivergenceLossCall
) -> tuple[Tensor, ...]:
    options, fields = call.options, call.fields
    head = options.head(backend, weight, bias)
    has_kl = call.code.beta != 0
    live = may_be_live(has_kl, fields) if call.needs.any else torch.zeros_like(fields.mask)
    rows = SelectedRows.of(fields.mask, live, call.ids, call.max_live_rows)
    selected = replace(
        call,
        ids=rows.gather(clamp_ids(backend, call.ids, fields.mask, head.vocab)),
        fields=fields.map_tokens(rows.gather),
    )
    reference = ReferenceRows(call.reference, rows, options.logits_dtype)
    head_pass = HeadPass(backend, head, hidden, rows, call.needs, options, reference=reference)
    dtype = accumulation_dtype(options.logits_dtype)
    values, gradients = head_pass.run(_divergence_loss_rows(backend, selected), (dtype, dtype, dtype))
    return (*values, *gradients)


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearDivergenceLossCall) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(call.options.logits_dtype)
    statistics = (hidden.new_empty(call.ids.shape, dtype=dtype) for _ in range(3))
    return (*statistics, *gradient_fakes(hidden, weight, bias, call.needs))


_FWD = define(
    "linear_divergence_loss_fwd",
    HEAD_INPUTS | {"call": LinearDivergenceLossCall},
    "(Tensor logprobs, Tensor entropy, Tensor divergence, Tensor dhidden, Tensor dweight, Tensor dbias)",
    _fake,
    {backend: partial(_fwd, backend) for backend in KERNEL_BACKENDS},
)


@named_gradients
class _LinearDivergenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: LinearDivergenceLossCall,
        policy: PolicyLossCall,
        backend: str,
    ) -> tuple[Tensor, ...]:
        logprobs, entropy, divergence, *gradients = _FWD[backend](flatten_hidden(hidden), weight, bias, call)
        loss, _, partials = policy_loss_fwd[backend](logprobs, entropy, policy)
        weights = call.fields.expand_to_tokens(call.fields.weights)
        loss, partials = add_divergence(loss, partials, divergence, call.fields.mask, weights, call.code.beta)
        ctx.save_for_backward(*head_gradients(gradients, call.needs, hidden.shape).values())
        ctx.backend = backend
        logprobs, entropy = (x.view(shape_of_tokens(hidden, x.shape[0])) for x in (logprobs, entropy))
        ctx.mark_non_differentiable(logprobs, entropy, partials)
        ctx.set_materialize_grads(False)
        return loss, logprobs, entropy, partials

    backward = staticmethod(backward_of("hidden", "weight", "bias"))


def divergence_loss(
    hidden_states: Tensor,  # [B, T, H] or [B, T + 1, H]; packed [N, H]
    lm_head_weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    ids: Tensor,  # [B, T]; packed [N]
    options: HeadOptions,
    reference: Reference,
    comparison: Comparison,
    inputs: PolicyInputs,
    config: GRPOLossConfig,
    backend: str,
    max_live_rows: int | None = None,
) -> GRPOLossOutput:
    """A token-local loss with a divergence, of validated inputs. The forward forms its gradient."""
    head = (hidden_states, lm_head_weight, bias)
    if backend == "torch":
        tokens = divergences(*head, ids, inputs.mask, options, reference, comparison, backend)
        return loss_of_tokens(tokens, inputs, config, backend)
    needs, flat_ids = NeededGradients.of(*head), to_kernel_ids(ids).view(-1)
    call = LinearDivergenceLossCall(
        options, reference, flat_ids, inputs.flat_fields, config.code(), comparison, needs, max_live_rows
    )
    policy = PolicyLossCall.of(inputs, config)
    loss, logprobs, entropy, partials = _LinearDivergenceLoss.apply(*head, call, policy, backend)
    return GRPOLossOutput(loss, logprobs, entropy, policy_metrics(partials, config, True))
