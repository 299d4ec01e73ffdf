"""A loss with the exact divergence from a reference: a pass over chunks of both models' logits.

Three GEMMs of the policy's head and one of the reference's: a chunk's coefficients are known once its divergences are,
and its logits are still at hand then.
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
from grpo_kernels.ops.gradients import named_gradients, refuse_double_backward
from grpo_kernels.ops.head.buffers import Needs
from grpo_kernels.ops.head.driver import Chunk, HeadPass, RowOp, RowResults, clamp_ids
from grpo_kernels.ops.head.gemm import Head
from grpo_kernels.ops.head.inputs import HeadOptions, flat_rows
from grpo_kernels.ops.head.linear_token_divergence import divergences
from grpo_kernels.ops.head.linear_token_logprobs import HEAD_INPUTS, gradient_fakes, head_gradients
from grpo_kernels.ops.head.live_rows import may_be_live
from grpo_kernels.ops.head.reference_model import Reference, ReferenceRows
from grpo_kernels.ops.head.selection import SelectedRows
from grpo_kernels.ops.registration import KERNEL_BACKENDS, define
from grpo_kernels.ops.rows.calls import DivergenceCall
from grpo_kernels.ops.rows.grpo_loss import GRPOLossOutput, loss_of_tokens
from grpo_kernels.ops.rows.token_divergence import token_divergence_rows
from grpo_kernels.ops.rows.token_logprobs import token_ids
from grpo_kernels.ops.rows.transform import Comparison
from grpo_kernels.ops.tokens.calls import PolicyLossCall
from grpo_kernels.ops.tokens.policy_loss import add_divergence, policy_loss_fwd, policy_metrics, token_coefficients
from grpo_kernels.ops.tokens.scale import scale_gradients


@dataclass(frozen=True)
class LinearDivergenceLossCall(Call):
    """The loss of tokens ``[N]`` that is token-local but for its divergence, and which of its gradients are formed."""

    options: HeadOptions
    reference: Reference
    ids: Tensor  # [N]
    fields: TokenFields  # of these tokens
    code: LossCode
    comparison: Comparison
    needs: Needs
    max_live_rows: int | None


def _divergence_loss_rows(backend: str, call: LinearDivergenceLossCall) -> RowOp:
    """Takes log-probabilities, entropies and divergences of a chunk, and then its gradient, which needs them."""

    def run(chunk: Chunk) -> RowResults:
        fields = call.fields.of_tokens(lambda values: values[chunk.rows])
        logits = (chunk.logits[None], chunk.reference_logits[None])  # type: ignore[index]
        rows = DivergenceCall(call.ids[None, chunk.rows], fields.mask[None], None, None, None, call.comparison)
        found = tuple(x[0] for x in token_divergence_rows[backend](*logits, rows, None))
        if chunk.dlogits is not None:

            def upstream(weights: Tensor | None, factor: float) -> Tensor | None:  # [1, n]
                if weights is None:
                    return None
                return (factor * fields.at_tokens(weights)).expand(found[0].shape).contiguous()[None]

            upstream_rows = replace(
                rows,
                dlogprobs=token_coefficients(found[0], found[1], fields, call.code, backend)[None],
                dentropy=upstream(fields.entropy_weights, -1.0),
                ddivergence=upstream(fields.weights, call.code.beta),
            )
            token_divergence_rows[backend](*logits, upstream_rows, chunk.dlogits[None])
        return RowResults(found)

    return run


def _fwd(
    backend: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearDivergenceLossCall
) -> tuple[Tensor, ...]:
    options, fields = call.options, call.fields
    head = Head.of(backend, weight, bias, options.compute_dtype, options.logits_dtype)
    has_kl = call.code.beta != 0
    live = may_be_live(has_kl, fields) if call.needs.any else torch.zeros_like(fields.mask)
    rows = SelectedRows.of(fields.mask, live, call.ids, call.max_live_rows)
    selected = replace(
        call,
        ids=rows.gather(clamp_ids(backend, call.ids, fields.mask, head.vocab)),
        fields=fields.of_tokens(rows.gather),
    )
    others = ReferenceRows(call.reference, rows, options.logits_dtype)
    run = HeadPass(backend, head, hidden, rows, call.needs, options.workspace_bytes, reference=others)
    dtype = accumulation_dtype(options.logits_dtype)
    values, gradients = run.run(_divergence_loss_rows(backend, selected), (dtype, dtype, dtype))
    return (*values, *gradients)


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearDivergenceLossCall) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(call.options.logits_dtype)
    statistics = (hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(3))
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
        logprobs, entropy, divergence, *found = _FWD[backend](flat_rows(hidden), weight, bias, call)
        loss, _, partials = policy_loss_fwd[backend](logprobs, entropy, policy)
        weights = call.fields.at_tokens(call.fields.weights)
        loss, partials = add_divergence(loss, partials, divergence, call.fields.mask, weights, call.code.beta)
        gradients = head_gradients(found, call.needs, hidden.shape)
        ctx.save_for_backward(*gradients.values())
        ctx.backend = backend
        logprobs, entropy = (x.view(hidden.shape[:-1]) for x in (logprobs, entropy))
        ctx.mark_non_differentiable(logprobs, entropy, partials)
        ctx.set_materialize_grads(False)
        return loss, logprobs, entropy, partials

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> dict[str, Tensor | None]:  # type: ignore[override]
        refuse_double_backward()
        if dloss is None:
            return {}
        dhidden, dweight, dbias = scale_gradients(ctx, dloss, ctx.backend)
        return {"hidden": dhidden, "weight": dweight, "bias": dbias}


def divergence_loss(
    hidden_states: Tensor,  # [B, T, H]; packed [N, H]
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
    """A loss that is token-local but for its divergence, of validated inputs; its gradient is formed in the forward."""
    head = (hidden_states, lm_head_weight, bias)
    if backend == "torch":
        tokens = divergences(*head, ids, inputs.mask, options, reference, comparison, backend)
        return loss_of_tokens(tokens, inputs, config, backend)
    call = LinearDivergenceLossCall(
        options,
        reference,
        token_ids(ids).view(-1),
        inputs.gathered_fields,
        config.code(),
        comparison,
        Needs.of(*head),
        max_live_rows,
    )
    policy = PolicyLossCall.of(inputs, config)
    loss, logprobs, entropy, partials = _LinearDivergenceLoss.apply(*head, call, policy, backend)
    return GRPOLossOutput(loss, logprobs, entropy, policy_metrics(partials, config, True))
