"""The public ``linear_token_logprobs``, its registered ops and its autograd function."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import backends
from grpo_kernels.calls import Call
from grpo_kernels.device_values import check_device_values
from grpo_kernels.measured_backends import RowClass
from grpo_kernels.ops.gradients import named_gradients, refuse_double_backward
from grpo_kernels.ops.head import reference
from grpo_kernels.ops.head.buffers import KeepingLogits, KeptLogits, Needs, kept_shape
from grpo_kernels.ops.head.driver import Chunk, HeadPass, RowOp, RowResults, clamp_ids
from grpo_kernels.ops.head.gemm import Head
from grpo_kernels.ops.head.inputs import HeadOptions, check_head, flat_rows
from grpo_kernels.ops.head.selection import SelectedRows
from grpo_kernels.ops.registration import KERNEL_BACKENDS, define
from grpo_kernels.ops.rows import reference as rows_reference
from grpo_kernels.ops.rows.calls import GradientCall, StatisticsCall, empty_statistics, statistics_dtypes
from grpo_kernels.ops.rows.reference import TokenLogprobs
from grpo_kernels.ops.rows.token_logprobs import (
    like_ids,
    like_rows,
    outputs_code,
    pack_outputs,
    token_ids,
    token_logprobs_bwd,
    token_logprobs_fwd,
    token_mask,
)
from grpo_kernels.ops.rows.transform import Transform
from grpo_kernels.validation import check_device, check_id_range


@dataclass(frozen=True)
class LinearStatisticsCall(Call):
    """Whose statistics are taken, ``[N]``, what is kept of the logits, and whether ``dlogits W`` is formed."""

    options: HeadOptions
    rows: StatisticsCall
    max_logits_bytes: int
    save_projection: bool


@dataclass(frozen=True)
class LinearGradientCall(Call):
    """Whose gradient is formed, ``[N]``, from which logits that were kept, and which gradients."""

    options: HeadOptions
    rows: GradientCall
    kept: Tensor  # [kept, row_width]
    kept_ids: Tensor  # [kept]
    needs: Needs


def _statistics_rows(backend: str, call: StatisticsCall) -> RowOp:
    """Takes the statistics of a chunk and, where its gradient is wanted, that of the sum of log-probabilities."""

    def run(chunk: Chunk) -> RowResults:
        rows = call.map(lambda x: x[None, chunk.rows])
        found = token_logprobs_fwd[backend](chunk.logits[None], rows)
        if chunk.dlogits is not None:
            gradient = GradientCall(rows.ids, rows.mask, *found[:3], torch.ones_like(found[0]), None, rows.transform)
            token_logprobs_bwd[backend](chunk.logits[None], gradient, chunk.dlogits[None])
        return RowResults(tuple(x[0] if x.numel() else x for x in found))

    return run


def _fwd(
    backend: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearStatisticsCall
) -> tuple[Tensor, ...]:
    options, ids, mask = call.options, call.rows.ids, call.rows.mask
    head = Head.of(backend, weight, bias, options.compute_dtype, options.logits_dtype)
    rows = SelectedRows.of(mask, None, ids)
    logits = KeepingLogits(head, ids, rows, call.max_logits_bytes)
    selected = replace(
        call.rows,
        ids=rows.gather(clamp_ids(backend, ids, mask, head.vocab)),
        mask=None if mask is None else rows.unmasked(),
    )
    run = HeadPass(
        backend,
        head,
        hidden,
        rows,
        Needs(call.save_projection, False, False),
        options.workspace_bytes,
        logits,
        dhidden_dtype=options.arithmetic_dtype,
    )
    dtypes = statistics_dtypes(options.logits_dtype, call.rows.outputs)
    statistics, (projection, *_) = run.run(_statistics_rows(backend, selected), dtypes)
    return (*statistics, logits.memory, logits.ids, projection.to(options.arithmetic_dtype))


def _gradient_rows(backend: str, call: GradientCall) -> RowOp:
    def run(chunk: Chunk) -> RowResults:
        rows = call.map(lambda x: x[None, chunk.rows])
        token_logprobs_bwd[backend](chunk.logits[None], rows, chunk.dlogits[None])  # type: ignore[index]
        return RowResults()

    return run


def _bwd(
    backend: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearGradientCall
) -> tuple[Tensor, ...]:
    options, given = call.options, call.rows
    head = Head.of(backend, weight, bias, options.compute_dtype, options.logits_dtype)
    live = torch.stack([d != 0 for d in (given.dlogprobs, given.dentropy) if d is not None]).any(0)
    rows = SelectedRows.of(live if given.mask is None else given.mask & live, None, given.ids)
    ids = clamp_ids(backend, given.ids, given.mask, head.vocab)
    selected = replace(replace(given, ids=ids, mask=None).map(rows.gather), mask=rows.unmasked())
    logits = KeptLogits(head, call.kept, call.kept_ids, rows, ids.shape[0])
    run = HeadPass(backend, head, hidden, rows, call.needs, options.workspace_bytes, logits)
    _, gradients = run.run(_gradient_rows(backend, selected), ())
    return gradients


def _fwd_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearStatisticsCall) -> tuple[Tensor, ...]:
    dtype, ids = call.options.logits_dtype, call.rows.ids
    like = hidden.new_empty(0, dtype=dtype)
    shape = kept_shape(ids.shape[0], weight.shape[0], dtype, weight.device, call.max_logits_bytes)
    projection = hidden.new_empty(hidden.shape if call.save_projection else (0,), dtype=call.options.arithmetic_dtype)
    statistics = empty_statistics(like, ids.shape, call.rows.outputs)
    return (*statistics, like.new_empty(shape), ids.new_empty(shape[0]), projection)


def gradient_fakes(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs) -> tuple[Tensor, ...]:
    """``dX``, ``dW`` and ``db`` as ops that form them return them, empty where not needed."""
    return (
        hidden.new_empty(hidden.shape if needs.need_dhidden else (0,)),
        weight.new_empty(weight.shape if needs.need_dweight else (0,)),
        (weight if bias is None else bias).new_empty(weight.shape[0] if needs.need_dbias else 0),
    )


#: The tensors that every op of a head takes first.
HEAD_INPUTS = {"hidden": "Tensor", "weight": "Tensor", "bias": "Tensor?"}
#: The statistics of every token, logits that are kept with the tokens they are of, and the projection of the gradient.
linear_token_logprobs_fwd = define(
    "linear_token_logprobs_fwd",
    HEAD_INPUTS | {"call": LinearStatisticsCall},
    "(Tensor logprobs, Tensor lse, Tensor entropy, Tensor log_sum_sq_probs, Tensor mean_logits, Tensor is_top1, "
    "Tensor kept, Tensor kept_ids, Tensor projection)",
    _fwd_fake,
    {backend: partial(_fwd, backend) for backend in KERNEL_BACKENDS},
)
linear_token_logprobs_bwd = define(
    "linear_token_logprobs_bwd",
    HEAD_INPUTS | {"call": LinearGradientCall},
    "(Tensor dhidden, Tensor dweight, Tensor dbias)",
    lambda hidden, weight, bias, call: gradient_fakes(hidden, weight, bias, call.needs),
    {backend: partial(_bwd, backend) for backend in KERNEL_BACKENDS},
)


@named_gradients
class LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearStatisticsCall, backend: str
    ) -> tuple[Tensor, ...]:
        logprobs, lse, entropy, *extras, kept, kept_ids, projection = linear_token_logprobs_fwd[backend](
            flat_rows(hidden), weight, bias, call
        )
        rows = call.rows
        ctx.save_for_backward(
            hidden, weight, bias, rows.ids, rows.mask, projection if call.save_projection else None,
            logprobs, lse, entropy, kept, kept_ids,
        )  # fmt: skip
        ctx.options = (call.options, rows.transform, backend)
        ctx.set_materialize_grads(False)
        ids = hidden[..., 0]  # for the shape
        shaped = [like_ids(x, ids) for x in (logprobs, entropy, *extras)]
        ctx.mark_non_differentiable(*shaped[2:])
        return tuple(shaped)

    @staticmethod
    def backward(ctx: Any, dlogprobs: Tensor | None, dentropy: Tensor | None, *_: Any) -> dict[str, Tensor | None]:  # type: ignore[override]
        refuse_double_backward()
        if dlogprobs is None and dentropy is None:
            return {}
        hidden, weight, bias, ids, mask, projection, *statistics, kept, kept_ids = ctx.saved_tensors
        if projection is not None and dentropy is None:
            c = dlogprobs.reshape(-1, 1)  # type: ignore[union-attr]
            live = c != 0 if mask is None else (c != 0) & mask[:, None]
            dhidden = torch.where(live, c * projection, 0).to(hidden.dtype).view(hidden.shape)
            return {"hidden": dhidden}
        options, transform, backend = ctx.options
        upstream = (like_rows(dlogprobs, ids), like_rows(dentropy, ids))
        rows = GradientCall(ids, mask, *statistics, *upstream, transform)
        needs = Needs(*ctx.needs_input_grad[:2], bias is not None and ctx.needs_input_grad[2])
        call = LinearGradientCall(options, rows, kept, kept_ids, needs)
        found = linear_token_logprobs_bwd[backend](flat_rows(hidden), weight, bias, call)
        return head_gradients(found, needs, hidden.shape)


def head_gradients(found: tuple[Tensor, ...], needs: Needs, shape: torch.Size) -> dict[str, Tensor | None]:
    """``dX`` in the shape of the hidden states, ``dW`` and ``db``, by the names of a function's inputs."""
    dhidden, dweight, dbias = found
    return {
        "hidden": dhidden.view(shape) if needs.need_dhidden else None,
        "weight": dweight if needs.need_dweight else None,
        "bias": dbias if needs.need_dbias else None,
    }


def _statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    options: HeadOptions,
    transform: Transform,
    outputs: int,
    max_logits_bytes: int,
    save_projection: bool,
    backend: str,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Log-probabilities, entropies and what else is wanted, of validated arguments."""
    needs = Needs.of(hidden, weight, bias)
    max_logits_bytes = max_logits_bytes if needs.any else 0
    rows = StatisticsCall(token_ids(ids).view(-1), None if mask is None else mask.reshape(-1), transform, outputs)
    is_head_frozen = needs == Needs(True, False, False)
    save_projection = save_projection and is_head_frozen and max_logits_bytes == 0
    call = LinearStatisticsCall(options, rows, max_logits_bytes, save_projection)
    logprobs, entropy, *extras = LinearTokenLogprobs.apply(hidden, weight, bias, call, backend)
    return logprobs, entropy, tuple(extras)


def logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor,
    options: HeadOptions,
    transform: Transform,
    max_logits_bytes: int,
    backend: str,
) -> TokenLogprobs:
    """``linear_token_logprobs`` of validated arguments."""
    code = outputs_code(("entropy",))
    found = _statistics(hidden, weight, bias, ids, mask, options, transform, code, max_logits_bytes, True, backend)
    return TokenLogprobs(*found[:2])


def linear_token_logprobs(
    hidden_states: Tensor,  # [B, T, H]; packed [N, H]
    lm_head_weight: Tensor,  # [V, H]
    ids: Tensor,  # [B, T]; packed [N]
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,  # like ids
    outputs: tuple[str, ...] = (),
    logits_dtype: torch.dtype | None = None,
    max_logits_bytes: int = 0,
    workspace_bytes: int | None = None,
    save_projection: bool = True,
    debug: bool = False,
    backend: str = "auto",
) -> TokenLogprobs:
    """``token_logprobs`` of ``h W^T + b``, in chunks of tokens: the logits never exist as a whole.

    Masked rows are never projected. The backward projects again, forms the gradient and multiplies it, for the rows
    with an upstream gradient other than 0 alone: ``2 N H V (1 + 3 f)`` operations at a live share ``f``,
    ``2 N H V (1 + 2 f)`` for the rows whose logits were retained, and ``2 N H V f`` less where the head is frozen.
    Gradients accumulate in fp32 (fp64) and are rounded once, to their parameter's dtype.

    Args:
        hidden_states: Position ``t`` predicts token ``t``.
        lm_head_weight: The head, tied or not, of the same dtype; under autocast both are rounded to its dtype.
        ids: Token ids.
        bias: The head's bias.
        temperature, softcap, logit_scale, mask, outputs: As for ``token_logprobs``.
        logits_dtype: What logits are rounded to: None means fp32 (fp64 for fp64 inputs); the inputs' dtype gives
            log-probabilities off by the rounding of a logit. On a CPU neither saves memory: no GEMM there writes fp32
            from half-precision inputs, so either the weight or each chunk's gradient is widened, ``4 V H`` bytes or
            twice the chunk's, beside the workspace.
        max_logits_bytes: Retain as many logits as fit in so many bytes from the forward to the backward.
        workspace_bytes: Bound of the logits that exist at once beside those, one row at least. None means 1 GiB on a
            CPU; on a GPU 1.5 GB, and 1,024 rows at least.
        save_projection: Where the head is frozen and nothing is retained: save ``(onehot - p) f'(z) W`` of every row,
            ``4 N H`` bytes, in the forward. The backward of a log-probability is then a product with it: ``4 N H V``
            operations in all. False is the better where less than half of the rows will have a gradient. A gradient
            of the entropy projects again either way.
        debug: Check values on a GPU too, and what kernels met since (``check_device_values``): syncs.
        backend: "auto", or one of ``grpo_kernels.backends.BACKENDS``. "torch" forms the whole logits.

    Returns:
        ``TokenLogprobs``, each field shaped like ``ids``; ``logprobs`` and ``entropy`` are in nats and differentiable.

    Raises:
        TypeError: A dtype does not fit.
        ValueError: Shapes or devices do not fit, a bound is negative, or an unmasked id is outside the vocabulary
            (read on the CPU, elsewhere with ``debug``).
        RuntimeError: The named backend cannot run here.

    Example:
        >>> linear_token_logprobs(torch.zeros(1, 1, 2), torch.zeros(4, 2), torch.tensor([[2]])).logprobs
        tensor([[-1.3863]])
    """
    check_head(hidden_states, lm_head_weight, bias, ids)
    check_device(hidden_states.device, [("mask", mask)])
    transform = Transform.of(temperature, softcap, logit_scale)
    code = outputs_code(outputs)
    mask = token_mask(mask, ids)
    check_id_range("ids", ids, mask, lm_head_weight.shape[0], debug)
    if debug:
        check_device_values(hidden_states.device)
    options = HeadOptions.of(hidden_states, lm_head_weight, logits_dtype, workspace_bytes, max_logits_bytes)
    backend = backends.resolve(
        "linear_token_logprobs", backend, hidden_states.device, partial(RowClass.of_head, lm_head_weight)
    )
    if backend == "torch":
        dtypes = (options.compute_dtype, options.logits_dtype)
        logits = reference.project(hidden_states, lm_head_weight, bias, mask, *dtypes)
        return rows_reference.token_logprobs(logits, ids, mask, temperature, softcap, logit_scale, tuple(outputs))
    head = (hidden_states, lm_head_weight, bias)
    found = _statistics(*head, ids, mask, options, transform, code, max_logits_bytes, save_projection, backend)
    return pack_outputs(*found, tuple(outputs))
