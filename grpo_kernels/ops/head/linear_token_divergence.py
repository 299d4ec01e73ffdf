"""The public ``linear_token_divergence``, its registered op and its autograd function."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import backends
from grpo_kernels.device_values import check_device_values
from grpo_kernels.dtypes import accumulation_dtype
from grpo_kernels.measured_backends import RowClass
from grpo_kernels.ops.gradients import refuse_double_backward
from grpo_kernels.ops.head import reference as linear_reference
from grpo_kernels.ops.head.gemm import HeadGradients, held_ids, make_head
from grpo_kernels.ops.head.inputs import check_head, check_workspace, head_dtypes
from grpo_kernels.ops.head.linear_token_logprobs import HEAD_SCHEMA, gradient_fakes
from grpo_kernels.ops.head.reference_model import REFERENCE_COUNT, REFERENCE_SCHEMA, Reference, ReferenceRows
from grpo_kernels.ops.head.rows import Rows, row_chunks
from grpo_kernels.ops.registration import KERNEL_BACKENDS, define
from grpo_kernels.ops.rows import reference as token_reference
from grpo_kernels.ops.rows.reference import TokenDivergence
from grpo_kernels.ops.rows.token_divergence import token_divergence_rows
from grpo_kernels.ops.rows.token_logprobs import token_ids, token_mask
from grpo_kernels.ops.rows.transform import COMPARISON_SCHEMA, Comparison, Transform
from grpo_kernels.validation import check_device, check_id_range


def _run(  # type: ignore[no-untyped-def]
    backend, hidden, weight, bias, compute_dtype, logits_dtype, workspace_bytes, *options
) -> tuple[Tensor, ...]:
    reference, options = Reference(*options[:REFERENCE_COUNT]), options[REFERENCE_COUNT:]
    ids, mask, *upstream = options[:5]
    comparison, needs = options[5:-3], options[-3:]
    head = make_head(backend, weight, bias, compute_dtype, logits_dtype)
    rows = Rows.of(mask, None, ids)
    others = ReferenceRows(reference, rows, logits_dtype)
    chunks = [*row_chunks(0, rows.count, head.row_bytes + others.row_bytes, workspace_bytes, head.multiple)]
    grads = HeadGradients(head, hidden, needs, len(chunks))
    most = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    workspace, other_workspace = head.workspace(most), others.workspace(most)
    ids, *upstream = (rows.take(x) for x in (held_ids(backend, ids, mask, head.vocab), *upstream))
    row_mask = None if mask is None else rows.unmasked()
    dtype = accumulation_dtype(logits_dtype)
    results = [hidden.new_empty(rows.count, dtype=dtype) for _ in range(3)]
    for chunk in chunks:
        inputs = head.inputs(hidden, rows, chunk)
        logits = head.logits(inputs, workspace)
        dlogits = head.gradient(workspace, inputs.shape[0]) if any(needs) else None
        found = token_divergence_rows[backend](
            logits[None],
            others.logits(chunk, other_workspace)[None],
            *(None if x is None else x[None, chunk] for x in (ids, row_mask, *upstream)),
            *comparison,
            None if dlogits is None else dlogits[None],
        )
        for whole, piece in zip(results, found, strict=True):
            whole[chunk] = piece[0]
        if dlogits is not None:
            grads.add(dlogits, inputs, rows.part(chunk))
    return (*(rows.put_back(x, hidden.shape[0]) for x in results), *grads.results())


def _fake(hidden, weight, bias, compute_dtype, logits_dtype, *options):  # type: ignore[no-untyped-def]
    dtype = accumulation_dtype(logits_dtype)
    results = (hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(3))
    return (*results, *gradient_fakes(hidden, weight, bias, options[-3:]))


#: Log-probabilities, entropies and divergences and, where any of the gradients is needed, those that the upstream ones
#: make, in the same pass.
_RUN = define(
    "linear_token_divergence",
    f"({HEAD_SCHEMA}, {REFERENCE_SCHEMA}, Tensor ids, Tensor? mask, Tensor? dlogprobs, Tensor? dentropy, "
    f"Tensor? ddivergence, {COMPARISON_SCHEMA}, bool need_dhidden, bool need_dweight, bool need_dbias) -> "
    "(Tensor logprobs, Tensor entropy, Tensor divergence, Tensor dhidden, Tensor dweight, Tensor dbias)",
    _fake,
    {backend: partial(_run, backend) for backend in KERNEL_BACKENDS},
)


class LinearTokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtypes: tuple[torch.dtype, torch.dtype],
        workspace_bytes: int,
        reference: Reference,
        ids: Tensor,
        mask: Tensor | None,
        comparison: Comparison,
        backend: str,
    ) -> tuple[Tensor, ...]:
        rows, flat_ids = hidden.detach().reshape(-1, hidden.shape[-1]), token_ids(ids).view(-1)
        flat_mask = None if mask is None else mask.reshape(-1)
        results = _RUN[backend](
            rows, weight, bias, *dtypes, workspace_bytes, *reference, flat_ids, flat_mask,
            None, None, None, *comparison, False, False, False,
        )  # fmt: skip
        ctx.save_for_backward(hidden, weight, bias, flat_ids, flat_mask, *reference[:-1])
        ctx.options = (dtypes, workspace_bytes, reference.compute_dtype, comparison, backend)
        ctx.set_materialize_grads(False)
        return tuple(x.view(ids.shape) for x in results[:3])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_double_backward()
        given = [None if x is None else x.reshape(-1).contiguous() for x in upstream]
        if all(x is None for x in given):
            return (None,) * 10
        hidden, weight, bias, ids, mask, *reference = ctx.saved_tensors
        dtypes, workspace_bytes, reference_dtype, comparison, backend = ctx.options
        live = torch.stack([x != 0 for x in given if x is not None]).any(0)
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2])
        *_, dhidden, dweight, dbias = _RUN[backend](
            hidden.detach().reshape(-1, hidden.shape[-1]),
            weight,
            bias,
            *dtypes,
            workspace_bytes,
            *reference,
            reference_dtype,
            ids,
            live if mask is None else live & mask,
            *given,
            *comparison,
            *needs,
        )
        grads = (dhidden.view(hidden.shape) if needs[0] else None, dweight, dbias)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 7)


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
    dtypes = head_dtypes(hidden_states, lm_head_weight, logits_dtype)
    workspace = check_workspace(workspace_bytes, 0, vocab, dtypes[1], hidden_states.device, models=2)
    backend = backends.resolve(
        "linear_token_divergence", backend, hidden_states.device, partial(RowClass.of_head, lm_head_weight)
    )
    if backend == "torch":
        logits = linear_reference.project(hidden_states, lm_head_weight, bias, mask, *dtypes)
        others = reference.whole(None if mask is None else mask.reshape(-1), dtypes[1]).view(logits.shape)
        found = token_reference.token_divergence(logits, others, ids, mask, comparison)
    else:
        logprobs, entropy, values = LinearTokenDivergence.apply(
            hidden_states, lm_head_weight, bias, dtypes, workspace, reference, ids, mask, comparison, backend
        )
        found = TokenDivergence(values, entropy, logprobs)
    return found._replace(logprobs=None) if given_ids is None else found
