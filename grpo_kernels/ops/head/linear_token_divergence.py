"""The public ``linear_token_divergence``, its registered op and its autograd function."""

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
from grpo_kernels.measured_backends import RowClass
from grpo_kernels.named_arguments import check_keywords
from grpo_kernels.ops.gradients import named_gradients, refuse_double_backward
from grpo_kernels.ops.head import reference as head_reference
from grpo_kernels.ops.head.buffers import NeededGradients
from grpo_kernels.ops.head.driver import Chunk, HeadPass, RowOp, RowResults, clamp_ids
from grpo_kernels.ops.head.inputs import HeadOptions, check_head, flatten_hidden, predicting, shape_of_tokens
from grpo_kernels.ops.head.linear_token_logprobs import HEAD_INPUTS, gradient_fakes, head_gradients
from grpo_kernels.ops.head.reference_model import Reference, ReferenceRows
from grpo_kernels.ops.head.selection import SelectedRows
from grpo_kernels.ops.registration import KERNEL_BACKENDS, define
from grpo_kernels.ops.rows import reference as rows_reference
from grpo_kernels.ops.rows.calls import DivergenceCall
from grpo_kernels.ops.rows.reference import TokenDivergence
from grpo_kernels.ops.rows.token_divergence import token_divergence_rows
from grpo_kernels.ops.rows.token_logprobs import to_kernel_gradient, to_kernel_ids, token_mask
from grpo_kernels.ops.rows.transform import Comparison, Transform
from grpo_kernels.validation import check_device, check_float, check_id_range


@dataclass(frozen=True)
class LinearDivergenceCall(Call):
    """Tokens ``[N]`` whose divergences are computed, their reference, and which gradients are formed."""

    options: HeadOptions
    reference: Reference
    rows: DivergenceCall
    needs: NeededGradients


def _divergence_rows(backend: str, call: DivergenceCall) -> RowOp:
    def run(chunk: Chunk) -> RowResults:
        results = token_divergence_rows[backend](
            chunk.logits[None],
            chunk.reference_logits[None],  # type: ignore[index]
            call.map(lambda x: x[None, chunk.rows]),
            None if chunk.dlogits is None else chunk.dlogits[None],
        )
        return RowResults(tuple(x[0] for x in results))

    return run


def _run(
    backend: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearDivergenceCall
) -> tuple[Tensor, ...]:
    options, ids, mask = call.options, call.rows.ids, call.rows.mask
    head = options.head(backend, weight, bias)
    rows = SelectedRows.of(mask, None, ids)
    reference = ReferenceRows(call.reference, rows, options.logits_dtype)
    ids = clamp_ids(backend, ids, mask, head.vocab)
    selected = replace(call.rows, ids=ids, mask=None).map(rows.gather)
    selected = selected if mask is None else replace(selected, mask=rows.unmasked())
    head_pass = HeadPass(backend, head, hidden, rows, call.needs, options, reference=reference)
    dtype = accumulation_dtype(options.logits_dtype)
    values, gradients = head_pass.run(_divergence_rows(backend, selected), (dtype, dtype, dtype))
    return (*values, *gradients)


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearDivergenceCall) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(call.options.logits_dtype)
    results = (hidden.new_empty(call.rows.ids.shape, dtype=dtype) for _ in range(3))
    return (*results, *gradient_fakes(hidden, weight, bias, call.needs))


#: Log-probabilities, entropies and divergences; and, in the same pass, the needed gradients.
_OP = define(
    "linear_token_divergence",
    HEAD_INPUTS | {"call": LinearDivergenceCall},
    "(Tensor logprobs, Tensor entropy, Tensor divergence, Tensor dhidden, Tensor dweight, Tensor dbias)",
    _fake,
    {backend: partial(_run, backend) for backend in KERNEL_BACKENDS},
)


@named_gradients
class LinearTokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearDivergenceCall, backend: str
    ) -> tuple[Tensor, ...]:
        results = _OP[backend](flatten_hidden(hidden), weight, bias, call)
        rows, reference = call.rows, call.reference
        tensors = (reference.logits, reference.hidden, reference.weight, reference.bias)
        ctx.save_for_backward(hidden, weight, bias, rows.ids, rows.mask, *tensors)
        ctx.options = (call.options, reference.compute_dtype, rows.comparison, backend)
        ctx.set_materialize_grads(False)
        return tuple(x.view(shape_of_tokens(hidden, x.shape[0])) for x in results[:3])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> dict[str, Tensor | None]:  # type: ignore[override]
        refuse_double_backward()
        if all(x is None for x in upstream):
            return {}
        hidden, weight, bias, ids, mask, *tensors = ctx.saved_tensors
        options, reference_dtype, comparison, backend = ctx.options
        flat_upstream = [to_kernel_gradient(x, ids) for x in upstream]
        live = torch.stack([x != 0 for x in flat_upstream if x is not None]).any(0)
        rows = DivergenceCall(ids, live if mask is None else live & mask, *flat_upstream, comparison)
        needs = NeededGradients(*ctx.needs_input_grad[:2], bias is not None and ctx.needs_input_grad[2])
        call = LinearDivergenceCall(options, Reference(*tensors, reference_dtype), rows, needs)
        _, _, _, *gradients = _OP[backend](flatten_hidden(hidden), weight, bias, call)
        return head_gradients(gradients, needs, hidden.shape)


def divergences(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    options: HeadOptions,
    reference: Reference,
    comparison: Comparison,
    backend: str,
) -> TokenDivergence:
    """``linear_token_divergence`` of validated arguments."""
    flat_mask = None if mask is None else mask.reshape(-1)
    if backend == "torch":
        dtypes = (options.compute_dtype, options.logits_dtype)
        logits = head_reference.project(predicting(hidden, ids), weight, bias, mask, *dtypes)
        reference_logits = reference.all_logits(ids.numel(), flat_mask, options.logits_dtype).view(logits.shape)
        return rows_reference.token_divergence(logits, reference_logits, ids, mask, comparison)
    rows = DivergenceCall(to_kernel_ids(ids).view(-1), flat_mask, None, None, None, comparison)
    options.check_bound(backend, weight, bias, hidden, models=2)
    call = LinearDivergenceCall(options, reference, rows, NeededGradients(False, False, False))
    logprobs, entropy, values = LinearTokenDivergence.apply(hidden, weight, bias, call, backend)
    return TokenDivergence(values, entropy, logprobs)


@check_keywords()
def linear_token_divergence(
    hidden_states: Tensor,  # [B, T, H] or, with ids, [B, T + 1, H]; packed [N, H]
    lm_head_weight: Tensor,  # [V, H]
    *,
    reference_logits: Tensor | None = None,  # [B, T, V] or [B, T + 1, V]; packed [N, V]
    reference_hidden_states: Tensor | None = None,  # [B, T, H'] or [B, T + 1, H']; packed [N, H']
    reference_lm_head_weight: Tensor | None = None,  # [V, H']
    reference_bias: Tensor | None = None,  # [V]
    divergence: str = "reverse_kl",
    mixture: float = 0.5,
    ids: Tensor | None = None,  # [B, T]; packed [N]
    bias: Tensor | None = None,  # [V]
    mask: Tensor | None = None,  # like the tokens
    temperature: float = 1.0,
    divergence_temperature: float | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reference_softcap: float | None = None,
    reference_logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    debug: bool = False,
    backend: str = "auto",
) -> TokenDivergence:
    """``token_divergence`` of ``h W^T + b``, in chunks of tokens: neither model's logits exist as a whole.

    Example:
        >>> hidden, head = torch.zeros(1, 1, 2), torch.zeros(2, 2)
        >>> linear_token_divergence(hidden, head, reference_logits=torch.tensor([[[1.0, 3.0]]])).divergence
        tensor([[0.4338]])

    Masked rows are never projected. The backward projects both models again, in the same chunks, for the rows whose
    upstream gradient is not 0. With equal hidden sizes that is ``4 N H V`` operations forward and ``8 N H V f``
    backward at a live share ``f``, for every divergence.

    Args:
        hidden_states: Position ``t`` predicts token ``t``. With ``ids``, a ``T + 1``-th position, also of
            the reference, is ignored, and its gradient is 0.
        lm_head_weight, bias, logits_dtype, workspace_bytes: As for ``linear_token_logprobs``; the workspace is both
            models'.
        reference_logits: The reference's logits, if they exist. No gradient flows to the reference.
        reference_hidden_states, reference_lm_head_weight, reference_bias: Otherwise its last hidden states and head,
            which may have another hidden size and dtype.
        divergence, mixture, ids, mask, temperature, divergence_temperature, softcap, logit_scale, debug: As for
            ``token_divergence``.
        reference_softcap, reference_logit_scale: The same for the reference.
        backend: "auto", or one of ``grpo_kernels.BACKENDS``. "torch" forms the whole logits.

    Returns:
        ``TokenDivergence``, each field shaped like the tokens, in nats and differentiable.

    Raises:
        TypeError: A dtype does not fit.
        ValueError: As for ``token_divergence``, a bound is too small for one row, or the reference is not given in
            exactly one of the two ways.
        RuntimeError: The named backend cannot run here.
    """
    check_float("hidden_states", hidden_states)
    wants_logprobs = ids is not None
    if ids is None:
        ids = torch.zeros(hidden_states.shape[:-1], dtype=torch.int64, device=hidden_states.device)
    check_head(hidden_states, lm_head_weight, bias, ids)
    check_device(hidden_states.device, [("mask", mask)])
    vocab = lm_head_weight.shape[0]
    reference = Reference.of(
        ids, vocab, reference_logits, reference_hidden_states, reference_lm_head_weight, reference_bias
    )
    comparison = Comparison.of(
        divergence,
        mixture,
        Transform.of(temperature, softcap, logit_scale),
        divergence_temperature,
        reference_softcap,
        reference_logit_scale,
    )
    mask = token_mask(mask, ids)
    check_id_range("ids", ids, mask, vocab, debug)
    if debug:
        check_device_values(hidden_states.device)
    options = HeadOptions.of(hidden_states, lm_head_weight, logits_dtype, workspace_bytes)
    backend = backends.resolve(
        "linear_token_divergence", backend, hidden_states.device, partial(RowClass.of_head, lm_head_weight)
    )
    results = divergences(hidden_states, lm_head_weight, bias, ids, mask, options, reference, comparison, backend)
    return results if wants_logprobs else results._replace(logprobs=None)
