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
from grpo_kernels.ops.gradients import named_gradients, refuse_double_backward
from grpo_kernels.ops.head import reference as head_reference
from grpo_kernels.ops.head.buffers import Needs
from grpo_kernels.ops.head.driver import Chunk, HeadPass, RowOp, RowResults, clamp_ids
from grpo_kernels.ops.head.gemm import Head
from grpo_kernels.ops.head.inputs import HeadOptions, check_head, flat_rows
from grpo_kernels.ops.head.linear_token_logprobs import HEAD_INPUTS, gradient_fakes, head_gradients
from grpo_kernels.ops.head.reference_model import Reference, ReferenceRows
from grpo_kernels.ops.head.selection import SelectedRows
from grpo_kernels.ops.registration import KERNEL_BACKENDS, define
from grpo_kernels.ops.rows import reference as rows_reference
from grpo_kernels.ops.rows.calls import DivergenceCall
from grpo_kernels.ops.rows.reference import TokenDivergence
from grpo_kernels.ops.rows.token_divergence import token_divergence_rows
from grpo_kernels.ops.rows.token_logprobs import like_rows, token_ids, token_mask
from grpo_kernels.ops.rows.transform import Comparison, Transform
from grpo_kernels.validation import check_device, check_id_range


@dataclass(frozen=True)
class LinearDivergenceCall(Call):
    """Whose divergences are taken, ``[N]``, from which reference, and which gradients are formed."""

    options: HeadOptions
    reference: Reference
    rows: DivergenceCall
    needs: Needs


def _divergence_rows(backend: str, call: DivergenceCall) -> RowOp:
    def run(chunk: Chunk) -> RowResults:
        found = token_divergence_rows[backend](
            chunk.logits[None],
            chunk.reference_logits[None],  # type: ignore[index]
            call.map(lambda x: x[None, chunk.rows]),
            None if chunk.dlogits is None else chunk.dlogits[None],
        )
        return RowResults(tuple(x[0] for x in found))

    return run


def _run(
    backend: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearDivergenceCall
) -> tuple[Tensor, ...]:
    options, ids, mask = call.options, call.rows.ids, call.rows.mask
    head = Head.of(backend, weight, bias, options.compute_dtype, options.logits_dtype)
    rows = SelectedRows.of(mask, None, ids)
    others = ReferenceRows(call.reference, rows, options.logits_dtype)
    ids = clamp_ids(backend, ids, mask, head.vocab)
    selected = replace(call.rows, ids=ids, mask=None).map(rows.gather)
    selected = selected if mask is None else replace(selected, mask=rows.unmasked())
    run = HeadPass(backend, head, hidden, rows, call.needs, options.workspace_bytes, reference=others)
    dtype = accumulation_dtype(options.logits_dtype)
    values, gradients = run.run(_divergence_rows(backend, selected), (dtype, dtype, dtype))
    return (*values, *gradients)


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearDivergenceCall) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(call.options.logits_dtype)
    results = (hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(3))
    return (*results, *gradient_fakes(hidden, weight, bias, call.needs))


#: Log-probabilities, entropies and divergences and, where any of the gradients is needed, those that the upstream ones
#: make, in the same pass.
_RUN = define(
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
        results = _RUN[backend](flat_rows(hidden), weight, bias, call)
        rows, reference = call.rows, call.reference
        tensors = (reference.logits, reference.hidden, reference.weight, reference.bias)
        ctx.save_for_backward(hidden, weight, bias, rows.ids, rows.mask, *tensors)
        ctx.options = (call.options, reference.compute_dtype, rows.comparison, backend)
        ctx.set_materialize_grads(False)
        return tuple(x.view(hidden.shape[:-1]) for x in results[:3])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> dict[str, Tensor | None]:  # type: ignore[override]
        refuse_double_backward()
        if all(x is None for x in upstream):
            return {}
        hidden, weight, bias, ids, mask, *tensors = ctx.saved_tensors
        options, reference_dtype, comparison, backend = ctx.options
        gradients = [like_rows(x, ids) for x in upstream]
        live = torch.stack([x != 0 for x in gradients if x is not None]).any(0)
        rows = DivergenceCall(ids, live if mask is None else live & mask, *gradients, comparison)
        needs = Needs(*ctx.needs_input_grad[:2], bias is not None and ctx.needs_input_grad[2])
        call = LinearDivergenceCall(options, Reference(*tensors, reference_dtype), rows, needs)
        _, _, _, *found = _RUN[backend](flat_rows(hidden), weight, bias, call)
        return head_gradients(found, needs, hidden.shape)


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
        logits = head_reference.project(hidden, weight, bias, mask, options.compute_dtype, options.logits_dtype)
        others = reference.all_logits(flat_mask, options.logits_dtype).view(logits.shape)
        return rows_reference.token_divergence(logits, others, ids, mask, comparison)
    rows = DivergenceCall(token_ids(ids).view(-1), flat_mask, None, None, None, comparison)
    call = LinearDivergenceCall(options, reference, rows, Needs(False, False, False))
    logprobs, entropy, values = LinearTokenDivergence.apply(hidden, weight, bias, call, backend)
    return TokenDivergence(values, entropy, logprobs)


def linear_token_divergence(
    hidden_states: Tensor,  # [B, T, H]; packed [N, H]
    lm_head_weight: Tensor,  # [V, H]
    *,
    reference_logits: Tensor | None = None,  # [B, T, V]; packed [N, V]
    reference_hidden_states: Tensor | None = None,  # [B, T, H']; packed [N, H']
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

    Masked rows are never projected; the backward projects those with an upstream gradient other than 0 again, both
    models' in the same chunks. With equal hidden sizes that is ``4 N H V`` operations forward and ``8 N H V f``
    backward at a live share ``f``, for every divergence.

    Args:
        hidden_states, lm_head_weight, bias, logits_dtype, workspace_bytes: As for ``linear_token_logprobs``; the
            workspace is both models'.
        reference_logits: The reference's, where they are at hand; else
        reference_hidden_states, reference_lm_head_weight, reference_bias: its last hidden states and head, whose width
            and dtype are its own. All are constants: no gradient flows there.
        divergence, mixture, ids, mask, temperature, divergence_temperature, softcap, logit_scale, reference_softcap,
            reference_logit_scale, debug: As for ``token_divergence``.
        backend: "auto", or one of ``grpo_kernels.backends.BACKENDS``. "torch" forms the whole logits.

    Returns:
        ``TokenDivergence``, each field shaped like the tokens, in nats and differentiable.

    Raises:
        TypeError: A dtype does not fit.
        ValueError: As for ``linear_token_logprobs`` and ``token_divergence``, or not either reference logits or both
            hidden states and head are given.
        RuntimeError: The named backend cannot run here.

    Example:
        >>> hidden, head = torch.zeros(1, 1, 2), torch.zeros(2, 2)
        >>> linear_token_divergence(hidden, head, reference_logits=torch.tensor([[[1.0, 3.0]]])).divergence
        tensor([[0.4338]])
    """
    given_ids = ids
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
    options = HeadOptions.of(hidden_states, lm_head_weight, logits_dtype, workspace_bytes, models=2)
    backend = backends.resolve(
        "linear_token_divergence", backend, hidden_states.device, partial(RowClass.of_head, lm_head_weight)
    )
    found = divergences(hidden_states, lm_head_weight, bias, ids, mask, options, reference, comparison, backend)
    return found._replace(logprobs=None) if given_ids is None else found
