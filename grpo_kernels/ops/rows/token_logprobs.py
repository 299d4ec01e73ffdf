"""The public ``token_logprobs``, its registered ops and its autograd function."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import backends
from grpo_kernels.device_values import check_device_values
from grpo_kernels.measured_backends import RowClass
from grpo_kernels.named_arguments import check_keywords
from grpo_kernels.ops.gradients import mark_written, named_gradients, refuse_double_backward, refuse_second_backward
from grpo_kernels.ops.registration import define, lazy_import
from grpo_kernels.ops.rows import reference
from grpo_kernels.ops.rows.calls import GradientCall, StatisticsCall, empty_statistics
from grpo_kernels.ops.rows.reference import OUTPUTS, TokenLogprobs
from grpo_kernels.ops.rows.transform import Transform
from grpo_kernels.validation import (
    check_device,
    check_id_range,
    check_logits,
    check_mask,
    check_shape,
    check_writable,
)

#: The statistics of every row, each like the ids: log-prob, log-sum-exp and entropy always, the others if wanted.
token_logprobs_fwd = define(
    "token_logprobs_fwd",
    {"logits": "Tensor", "call": StatisticsCall},
    "(Tensor logprobs, Tensor lse, Tensor entropy, Tensor log_sum_sq_probs, Tensor mean_logits, Tensor is_top1)",
    lambda logits, call: empty_statistics(logits, call.ids.shape, call.outputs),
    {"triton": lazy_import("grpo_kernels.ops.rows.triton.token_logprobs", "token_logprobs_fwd")},
)
#: Writes the gradient of every row to ``dlogits``, which may be ``logits`` itself.
token_logprobs_bwd = define(
    "token_logprobs_bwd",
    {"logits": "Tensor", "call": GradientCall, "dlogits": "Tensor(a!)"},
    "()",
    lambda logits, call, dlogits: None,
    {"triton": lazy_import("grpo_kernels.ops.rows.triton.token_logprobs", "token_logprobs_bwd")},
)


def output_names(outputs: str | Sequence[str]) -> tuple[str, ...]:
    """The wanted outputs, of which a single one may stand alone.

    Raises:
        TypeError: They are no names.
    """
    if isinstance(outputs, str):
        return (outputs,)
    if not isinstance(outputs, (tuple, list, set, frozenset)):
        raise TypeError(f"outputs must be a name or a sequence of names, got {outputs!r}")
    return tuple(outputs)


def outputs_code(outputs: tuple[str, ...]) -> int:
    """The wanted outputs as bits.

    Raises:
        ValueError: An output is unknown.
    """
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown:
        raise ValueError(f"outputs must be among {', '.join(map(repr, OUTPUTS))}, got {unknown[0]!r}")
    return sum(1 << OUTPUTS.index(name) for name in set(outputs))


def pack_outputs(
    logprobs: Tensor, entropy: Tensor, extras: tuple[Tensor, ...], outputs: tuple[str, ...]
) -> TokenLogprobs:
    """A ``TokenLogprobs`` with None for every output that is not wanted."""
    statistics = dict(zip(OUTPUTS, (entropy, *extras), strict=True))
    return TokenLogprobs(logprobs, *(statistics[name] if name in outputs else None for name in OUTPUTS))


def to_kernel_logits(logits: Tensor) -> Tensor:  # -> [B, T or T + 1, V]
    """Logits in the form for kernels: three dimensions, the last one dense. They are copied only if it is not dense."""
    rows = logits if logits.dim() == 3 else logits[None]
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def to_kernel_ids(ids: Tensor) -> Tensor:  # [B, T] or [N] -> [B, T] int64
    """Ids in the form for kernels: contiguous int64. Packed tokens become one row."""
    rows = ids if ids.dim() == 2 else ids[None]
    return (rows if rows.dtype == torch.int64 else rows.to(torch.int64)).contiguous()


def reshape_like_ids(values: Tensor, ids: Tensor) -> Tensor:
    """A statistic in the shape of the ids. It is returned itself if it has that shape or is empty."""
    return values if values.shape == ids.shape or values.numel() != ids.numel() else values.view(ids.shape)


def token_mask(mask: Tensor | None, ids: Tensor) -> Tensor | None:
    """The mask as booleans, checked against the ids.

    Raises:
        TypeError: It is not a tensor that can be a mask.
        ValueError: Its shape is not that of the ids.
    """
    if mask is None:
        return None
    check_mask("mask", mask)
    check_shape("mask", mask, ids.shape)
    return (mask != 0).contiguous()


def to_kernel_gradient(values: Tensor | None, rows: Tensor) -> Tensor | None:
    """An upstream gradient in the form for kernels: contiguous, in the shape of ``to_kernel_ids``."""
    return None if values is None else values.reshape(rows.shape).contiguous()


@named_gradients
class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, ids: Tensor, call: StatisticsCall, inplace_backward: bool, backend: str
    ) -> tuple[Tensor, ...]:
        logprobs, lse, entropy, *extras = token_logprobs_fwd[backend](to_kernel_logits(logits), call)
        ctx.save_for_backward(logits, call.ids, call.mask, logprobs, lse, entropy)
        ctx.options = (call.transform, inplace_backward, backend)
        ctx.set_materialize_grads(False)
        shaped = [reshape_like_ids(x, ids) for x in (logprobs, entropy, *extras)]
        ctx.mark_non_differentiable(*shaped[2:])
        return tuple(shaped)

    @staticmethod
    def backward(ctx: Any, dlogprobs: Tensor | None, dentropy: Tensor | None, *_: Any) -> dict[str, Tensor | None]:  # type: ignore[override]
        refuse_double_backward()
        if dlogprobs is None and dentropy is None:
            return {}
        transform, inplace_backward, backend = ctx.options
        if inplace_backward:
            refuse_second_backward(ctx)
        logits, ids, mask, *statistics = ctx.saved_tensors
        logits = logits.detach()
        dlogits = logits if inplace_backward else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        upstream = (to_kernel_gradient(dlogprobs, ids), to_kernel_gradient(dentropy, ids))
        call = GradientCall(ids, mask, *statistics, *upstream, transform)
        token_logprobs_bwd[backend](to_kernel_logits(logits), call, dlogits if dlogits.dim() == 3 else dlogits[None])
        if inplace_backward:
            mark_written(logits)
        return {"logits": dlogits}


@check_keywords()
def token_logprobs(
    logits: Tensor,  # [B, T, V] or [B, T + 1, V]; packed [N, V]
    ids: Tensor,  # [B, T]; packed [N]
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,  # like ids
    outputs: str | Sequence[str] = (),
    inplace_backward: bool = False,
    debug: bool = False,
    backend: str = "auto",
) -> TokenLogprobs:
    """Log-probability of each token and, on request, the entropy and other statistics of its distribution.

        y = softcap tanh(logit_scale z / softcap) / temperature
        logprobs = log_softmax(y)[id],  p = softmax(y),  entropy = -sum p log p

    Example:
        >>> token_logprobs(torch.zeros(1, 1, 4), torch.tensor([[2]])).logprobs
        tensor([[-1.3863]])

    One read of the logits forward; one read and one write backward. Arithmetic is fp32, or fp64 for fp64 logits, and
    so are the results.

    Args:
        logits: Position ``t`` predicts token ``t``. A ``T + 1``-th position, as ``logits_to_keep=T + 1`` gives it, is
            ignored, and its gradient is 0.
        ids: Token ids.
        temperature: Divides the logits, last.
        softcap: Bound of a tanh soft cap (Gemma); a Hugging Face model's logits already include it.
        logit_scale: Multiplies the logits, first (Cohere, Granite); a Hugging Face model's logits already include it.
        mask: 0 excludes a token, whatever the logits and the id hold there: its statistics are 0.
        outputs: One or more of "entropy", "log_sum_sq_probs", "mean_logits", "is_top1".
        inplace_backward: Overwrite the logits with their gradient in the backward; their last dimension must be dense.
            A second backward is then refused. The "torch" backend does not overwrite them.
        debug: Check values on a GPU too, and the flags of earlier kernels (``check_device_values``): syncs.
        backend: "auto", or one of ``grpo_kernels.BACKENDS``.

    Returns:
        ``TokenLogprobs``, each field shaped like ``ids``; ``logprobs`` and ``entropy`` are in nats and differentiable.

    Raises:
        TypeError: A tensor has a dtype that does not fit.
        ValueError: Shapes or devices do not fit, the vocabulary is empty, or an unmasked id is outside it (read on
            the CPU, elsewhere with ``debug``).
        RuntimeError: The named backend cannot run here.
    """
    check_logits(logits, ids)
    check_device(logits.device, [("ids", ids), ("mask", mask)])
    transform = Transform.of(temperature, softcap, logit_scale)
    if inplace_backward:
        check_writable("logits", logits, "inplace_backward=True")
    outputs = output_names(outputs)
    code = outputs_code(outputs)
    mask = token_mask(mask, ids)
    check_id_range("ids", ids, mask, logits.shape[-1], debug)
    if debug:
        check_device_values(logits.device)
    backend = backends.resolve("token_logprobs", backend, logits.device, partial(RowClass.of_logits, logits))
    if backend == "torch":
        rows = logits if ids.dim() == 1 else logits[:, : ids.shape[1]]
        return reference.token_logprobs(rows, ids, mask, temperature, softcap, logit_scale, outputs)
    kernel_ids = to_kernel_ids(ids)
    call = StatisticsCall(kernel_ids, None if mask is None else mask.view(kernel_ids.shape), transform, code)
    logprobs, entropy, *extras = _TokenLogprobs.apply(logits, ids, call, inplace_backward, backend)
    return pack_outputs(logprobs, entropy, tuple(extras), outputs)
