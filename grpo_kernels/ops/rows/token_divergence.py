"""The public ``token_divergence``, its registered op and its autograd function."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import backends
from grpo_kernels.device_values import check_device_values
from grpo_kernels.dtypes import accumulation_dtype
from grpo_kernels.measured_backends import RowClass
from grpo_kernels.named_arguments import check_keywords
from grpo_kernels.ops.gradients import mark_written, named_gradients, refuse_double_backward, refuse_second_backward
from grpo_kernels.ops.registration import define, lazy_import
from grpo_kernels.ops.rows import reference
from grpo_kernels.ops.rows.calls import DivergenceCall
from grpo_kernels.ops.rows.reference import TokenDivergence
from grpo_kernels.ops.rows.token_logprobs import to_kernel_gradient, to_kernel_ids, to_kernel_logits, token_mask
from grpo_kernels.ops.rows.transform import Comparison, Transform
from grpo_kernels.validation import (
    check_device,
    check_float,
    check_id_range,
    check_logits,
    check_shape,
    check_writable,
)


def _fake(logits: Tensor, reference_logits: Tensor, call: DivergenceCall, dlogits: Tensor | None) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(logits.dtype)
    return tuple(torch.empty_like(call.ids, dtype=dtype) for _ in range(3))


#: Statistics of every row; and, if ``dlogits`` is given, the gradient written to it. ``dlogits`` may be ``logits``
#: itself, and may have another dtype if the backend supports that. The backward computes the statistics again, because
#: it reads both rows from memory anyway.
token_divergence_rows = define(
    "token_divergence",
    {"logits": "Tensor", "reference_logits": "Tensor", "call": DivergenceCall, "dlogits": "Tensor(a!)?"},
    "(Tensor logprobs, Tensor entropy, Tensor divergence)",
    _fake,
    {"triton": lazy_import("grpo_kernels.ops.rows.triton.token_divergence", "token_divergence")},
)


@named_gradients
class _TokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logits: Tensor,
        reference_logits: Tensor,
        ids: Tensor,
        call: DivergenceCall,
        inplace_backward: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        results = token_divergence_rows[backend](
            to_kernel_logits(logits), to_kernel_logits(reference_logits), call, None
        )
        ctx.save_for_backward(logits, reference_logits, call.ids, call.mask)
        ctx.options = (call.comparison, inplace_backward, backend)
        ctx.set_materialize_grads(False)
        return tuple(x.view(ids.shape) for x in results)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> dict[str, Tensor | None]:  # type: ignore[override]
        refuse_double_backward()
        if all(gradient is None for gradient in upstream):
            return {}
        comparison, inplace_backward, backend = ctx.options
        if inplace_backward:
            refuse_second_backward(ctx)
        logits, reference_logits, ids, mask = ctx.saved_tensors
        logits = logits.detach()
        dlogits = logits if inplace_backward else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        call = DivergenceCall(ids, mask, *(to_kernel_gradient(x, ids) for x in upstream), comparison)
        token_divergence_rows[backend](
            to_kernel_logits(logits),
            to_kernel_logits(reference_logits),
            call,
            dlogits if dlogits.dim() == 3 else dlogits[None],
        )
        if inplace_backward:
            mark_written(logits)
        return {"logits": dlogits}


@check_keywords()
def token_divergence(
    logits: Tensor,  # [B, T, V] or, with ids, [B, T + 1, V]; packed [N, V]
    reference_logits: Tensor,  # like logits
    *,
    divergence: str = "reverse_kl",
    mixture: float = 0.5,
    ids: Tensor | None = None,  # [B, T]; packed [N]
    mask: Tensor | None = None,  # like the tokens
    temperature: float = 1.0,
    divergence_temperature: float | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reference_softcap: float | None = None,
    reference_logit_scale: float = 1.0,
    inplace_backward: bool = False,
    debug: bool = False,
    backend: str = "auto",
) -> TokenDivergence:
    """Exact divergence of each token's distribution from a reference's, a sum over the whole vocabulary.

    Example:
        >>> uniform, peaked = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 3.0]]])
        >>> token_divergence(uniform, peaked).divergence
        tensor([[0.4338]])

    With ``p = softmax(y)`` of the logits and ``q`` of the reference's,

        "forward_kl"  KL(q || p) = sum q (log q - log p)      dy = p - q
        "reverse_kl"  KL(p || q) = sum p (log p - log q)      dy = p (log p - log q - KL)
        "js"          a KL(q || m) + (1 - a) KL(p || m)       dy = (1 - a) p (log p - log m - KL(p || m))

    where ``m = a q + (1 - a) p``: arXiv:2306.13649 eq. 1. Each pass reads both rows from memory once. Arithmetic is
    fp32, or fp64 for fp64 logits, and so are the results. A KL is infinite if the second distribution is 0 at a token
    where the first is not; its gradient is then NaN or infinite. "js" is always finite.

    Args:
        logits: Position ``t`` predicts token ``t``. With ``ids``, a ``T + 1``-th position is ignored, and its gradient
            is 0.
        reference_logits: Logits of the reference or teacher, in the same dtype. No gradient flows to them.
        divergence: One of the above.
        mixture: ``a``, in (0, 1), of "js".
        ids: Tokens whose log-probabilities are returned as well.
        mask: 0 excludes a token, whatever the logits and the id hold there: its results are 0.
        temperature: Divides both logits, last.
        divergence_temperature: The same for the divergence only, if it differs (distillation's soft targets).
        softcap: Bound of a tanh soft cap (Gemma) on the logits; a Hugging Face model's already include it.
        logit_scale: Multiplies the logits, first (Cohere, Granite); a Hugging Face model's already include it.
        reference_softcap, reference_logit_scale: The same for the reference.
        inplace_backward: As for ``token_logprobs``.
        debug: Check values on a GPU too, and the flags of earlier kernels (``check_device_values``): syncs.
        backend: "auto", or one of ``grpo_kernels.BACKENDS``.

    Returns:
        ``TokenDivergence``: divergence, the policy's entropy, and log-probabilities or None.

    Raises:
        TypeError: A tensor has a dtype that does not fit.
        ValueError: Shapes or devices do not fit, ``divergence`` is unknown, ``mixture`` is not in (0, 1), or an
            unmasked id is outside the vocabulary (read on the CPU, elsewhere with ``debug``).
        RuntimeError: The named backend cannot run here.
    """
    check_float("logits", logits)
    if logits.dim() not in (2, 3):
        raise ValueError(f"logits must have shape [B, T, V] or, packed, [N, V], got {list(logits.shape)}")
    wants_logprobs = ids is not None
    if ids is None:
        ids = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    check_logits(logits, ids)
    check_float("reference_logits", reference_logits)
    check_shape("reference_logits", reference_logits, logits.shape)
    if reference_logits.dtype != logits.dtype:
        raise TypeError(f"reference_logits must have the dtype of logits, {logits.dtype}, got {reference_logits.dtype}")
    check_device(logits.device, [("reference_logits", reference_logits), ("ids", ids), ("mask", mask)])
    comparison = Comparison.of(
        divergence,
        mixture,
        Transform.of(temperature, softcap, logit_scale),
        divergence_temperature,
        reference_softcap,
        reference_logit_scale,
    )
    if inplace_backward:
        check_writable("logits", logits, "inplace_backward=True")
    mask = token_mask(mask, ids)
    check_id_range("ids", ids, mask, logits.shape[-1], debug)
    if debug:
        check_device_values(logits.device)
    backend = backends.resolve("token_divergence", backend, logits.device, partial(RowClass.of_logits, logits))
    if backend == "torch":
        rows = [z if ids.dim() == 1 else z[:, : ids.shape[1]] for z in (logits, reference_logits)]
        results = reference.token_divergence(*rows, ids, mask, comparison)
    else:
        kernel_ids = to_kernel_ids(ids)
        kernel_mask = None if mask is None else mask.view(kernel_ids.shape)
        call = DivergenceCall(kernel_ids, kernel_mask, None, None, None, comparison)
        logprobs, entropy, values = _TokenDivergence.apply(
            logits, reference_logits.detach(), ids, call, inplace_backward, backend
        )
        results = TokenDivergence(values, entropy, logprobs)
    return results if wants_logprobs else results._replace(logprobs=None)
