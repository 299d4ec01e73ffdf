"""The public ``linear_token_logprobs``, its registered ops and its autograd function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import backends
from grpo_kernels.calls import Call
from grpo_kernels.device_values import check_device_values
from grpo_kernels.measured_backends import RowClass
from grpo_kernels.named_arguments import check_keywords
from grpo_kernels.ops.gradients import (
    has_run_backward,
    mark_backward_run,
    named_gradients,
    refuse_double_backward,
)
from grpo_kernels.ops.head import reference
from grpo_kernels.ops.head.buffers import NeededGradients
from grpo_kernels.ops.head.driver import Chunk, HeadPass, RowOp, RowResults, clamp_ids
from grpo_kernels.ops.head.inputs import HeadOptions, check_head, flatten_hidden, predicting, shape_of_tokens
from grpo_kernels.ops.head.selection import SelectedRows, token_positions
from grpo_kernels.ops.head.sources import SavedLogitsSource, SavingLogitsSource, saved_logits_shape
from grpo_kernels.ops.registration import KERNEL_BACKENDS, define
from grpo_kernels.ops.rows import reference as rows_reference
from grpo_kernels.ops.rows.calls import (
    GradientCall,
    StatisticsCall,
    empty_statistics,
    statistics_dtypes,
    wanted_statistics,
)
from grpo_kernels.ops.rows.reference import TokenLogprobs
from grpo_kernels.ops.rows.token_logprobs import (
    output_names,
    outputs_code,
    pack_outputs,
    to_kernel_gradient,
    to_kernel_ids,
    token_logprobs_bwd,
    token_logprobs_fwd,
    token_mask,
)
from grpo_kernels.ops.rows.transform import Transform
from grpo_kernels.validation import check_device, check_id_range


@dataclass(frozen=True)
class LinearStatisticsCall(Call):
    """Tokens ``[N]`` whose statistics are computed, how many logits are saved, and whether ``dlogits W`` is."""

    options: HeadOptions
    rows: StatisticsCall
    max_logits_bytes: int
    save_projection: bool


@dataclass(frozen=True)
class LinearGradientCall(Call):
    """Tokens ``[N]`` with their upstream gradients, the saved logits, and which gradients are formed."""

    options: HeadOptions
    rows: GradientCall
    saved_logits: Tensor  # [saved, row_width]
    saved_ids: Tensor  # [saved]
    needs: NeededGradients


def _statistics_rows(backend: str, call: StatisticsCall) -> RowOp:
    """Computes a chunk's statistics and, if wanted, the gradient of the sum of its log-probabilities."""

    def run(chunk: Chunk) -> RowResults:
        rows = call.map(lambda x: x[None, chunk.rows])
        results = token_logprobs_fwd[backend](chunk.logits[None], rows)
        if chunk.dlogits is not None:
            gradient = GradientCall(
                rows.ids, rows.mask, *results[:3], torch.ones_like(results[0]), None, rows.transform
            )
            token_logprobs_bwd[backend](chunk.logits[None], gradient, chunk.dlogits[None])
        return RowResults(tuple(x[0] if x.numel() else x for x in results))

    return run


def _fwd(
    backend: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearStatisticsCall
) -> tuple[Tensor, ...]:
    options, ids, mask = call.options, call.rows.ids, call.rows.mask
    head = options.head(backend, weight, bias)
    rows = SelectedRows.of(mask, None, ids)
    source = SavingLogitsSource(head, ids, rows, call.max_logits_bytes)
    selected = replace(
        call.rows,
        ids=rows.gather(clamp_ids(backend, ids, mask, head.vocab)),
        mask=None if mask is None else rows.unmasked(),
    )
    head_pass = HeadPass(
        backend,
        head,
        hidden,
        rows,
        NeededGradients(call.save_projection, False, False),
        options,
        source,
        dhidden_dtype=options.arithmetic_dtype,
    )
    wanted = wanted_statistics(call.rows.outputs)
    row_op, dtypes = _statistics_rows(backend, selected), statistics_dtypes(options.logits_dtype)
    statistics, (projection, *_) = head_pass.run(row_op, dtypes, wanted)
    return (*statistics, source.saved_logits, source.saved_ids, projection.to(options.arithmetic_dtype))


def _gradient_rows(backend: str, call: GradientCall) -> RowOp:
    def run(chunk: Chunk) -> RowResults:
        rows = call.map(lambda x: x[None, chunk.rows])
        token_logprobs_bwd[backend](chunk.logits[None], rows, chunk.dlogits[None])  # type: ignore[index]
        return RowResults()

    return run


def _bwd(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    call: LinearGradientCall,
    overwritten: Tensor | None,
) -> tuple[Tensor, ...]:
    options, inputs = call.options, call.rows
    head = options.head(backend, weight, bias)
    live = torch.stack([d != 0 for d in (inputs.dlogprobs, inputs.dentropy) if d is not None]).any(0)
    rows = SelectedRows.of(live if inputs.mask is None else inputs.mask & live, None, inputs.ids)
    ids = clamp_ids(backend, inputs.ids, inputs.mask, head.vocab)
    selected = replace(replace(inputs, ids=ids, mask=None).map(rows.gather), mask=rows.unmasked())
    saved_logits = call.saved_logits if overwritten is None else overwritten
    source = SavedLogitsSource(head, saved_logits, call.saved_ids, rows, ids.shape[0], overwritten is not None)
    head_pass = HeadPass(backend, head, hidden, rows, call.needs, options, source)
    _, gradients = head_pass.run(_gradient_rows(backend, selected), ())
    return gradients


def _fwd_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearStatisticsCall) -> tuple[Tensor, ...]:
    dtype, ids = call.options.logits_dtype, call.rows.ids
    like = hidden.new_empty(0, dtype=dtype)
    shape = saved_logits_shape(ids.shape[0], weight.shape[0], dtype, weight.device, call.max_logits_bytes)
    projection = hidden.new_empty(hidden.shape if call.save_projection else (0,), dtype=call.options.arithmetic_dtype)
    statistics = empty_statistics(like, ids.shape, call.rows.outputs)
    return (*statistics, like.new_empty(shape), ids.new_empty(shape[0]), projection)


def gradient_fakes(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: NeededGradients) -> tuple[Tensor, ...]:
    """Fake ``dX``, ``dW`` and ``db``, empty where not needed."""
    return (
        hidden.new_empty(hidden.shape if needs.need_dhidden else (0,)),
        weight.new_empty(weight.shape if needs.need_dweight else (0,)),
        (weight if bias is None else bias).new_empty(weight.shape[0] if needs.need_dbias else 0),
    )


#: The first arguments of every op of a head.
HEAD_INPUTS = {"hidden": "Tensor", "weight": "Tensor", "bias": "Tensor?"}
#: The statistics of every token; the saved logits and their tokens; and ``dlogits W``, which a backward may scale.
linear_token_logprobs_fwd = define(
    "linear_token_logprobs_fwd",
    HEAD_INPUTS | {"call": LinearStatisticsCall},
    "(Tensor logprobs, Tensor lse, Tensor entropy, Tensor log_sum_sq_probs, Tensor mean_logits, Tensor is_top1, "
    "Tensor saved_logits, Tensor saved_ids, Tensor projection)",
    _fwd_fake,
    {backend: partial(_fwd, backend) for backend in KERNEL_BACKENDS},
)
#: ``overwritten`` is the saved logits again if they are not needed afterwards, so that no other memory is; else None.
linear_token_logprobs_bwd = define(
    "linear_token_logprobs_bwd",
    HEAD_INPUTS | {"call": LinearGradientCall, "overwritten": "Tensor(a!)?"},
    "(Tensor dhidden, Tensor dweight, Tensor dbias)",
    lambda hidden, weight, bias, call, overwritten: gradient_fakes(hidden, weight, bias, call.needs),
    {backend: partial(_bwd, backend) for backend in KERNEL_BACKENDS},
)


@named_gradients
class LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearStatisticsCall, backend: str
    ) -> tuple[Tensor, ...]:
        logprobs, lse, entropy, *extras, saved_logits, saved_ids, projection = linear_token_logprobs_fwd[backend](
            flatten_hidden(hidden), weight, bias, call
        )
        rows = call.rows
        ctx.save_for_backward(
            hidden, weight, bias, rows.ids, rows.mask, projection if call.save_projection else None,
            logprobs, lse, entropy, saved_logits, saved_ids,
        )  # fmt: skip
        ctx.options = (call.options, rows.transform, backend)
        ctx.set_materialize_grads(False)
        shape = shape_of_tokens(hidden, rows.ids.shape[0])
        results = (logprobs, entropy, *extras)  # empty where not wanted
        shaped = [x.view(shape) if len(shape) > 1 and x.shape == rows.ids.shape else x for x in results]
        ctx.mark_non_differentiable(*shaped[2:])
        return tuple(shaped)

    @staticmethod
    def backward(ctx: Any, dlogprobs: Tensor | None, dentropy: Tensor | None, *_: Any) -> dict[str, Tensor | None]:  # type: ignore[override]
        refuse_double_backward()
        if dlogprobs is None and dentropy is None:
            return {}
        hidden, weight, bias, ids, mask, projection, *statistics, saved_logits, saved_ids = ctx.saved_tensors
        if projection is not None and dentropy is None:
            c = dlogprobs.reshape(-1)  # type: ignore[union-attr]
            c = c if mask is None else torch.where(mask, c, 0)
            positions = token_positions(projection, ids.shape[0])
            c = (c if positions is None else c.new_zeros(len(projection)).index_copy(0, positions, c))[:, None]
            dhidden = torch.where(c != 0, c * projection, 0).to(hidden.dtype).view(hidden.shape)
            return {"hidden": dhidden}
        options, transform, backend = ctx.options
        upstream = (to_kernel_gradient(dlogprobs, ids), to_kernel_gradient(dentropy, ids))
        rows = GradientCall(ids, mask, *statistics, *upstream, transform)
        needs = NeededGradients(*ctx.needs_input_grad[:2], bias is not None and ctx.needs_input_grad[2])
        overwritten = None
        if has_run_backward(ctx):  # the first overwrote the saved logits
            saved_logits, saved_ids = saved_logits[:0], saved_ids[:0]
        elif not torch.compiler.is_compiling():  # a traced graph may run its backward twice
            overwritten = saved_logits.data  # with a version of its own: a second backward may unpack, and reads none
            mark_backward_run(ctx)
        call = LinearGradientCall(options, rows, saved_logits, saved_ids, needs)
        gradients = linear_token_logprobs_bwd[backend](flatten_hidden(hidden), weight, bias, call, overwritten)
        return head_gradients(gradients, needs, hidden.shape)


def head_gradients(
    gradients: tuple[Tensor, ...], needs: NeededGradients, shape: torch.Size
) -> dict[str, Tensor | None]:
    """``dX`` in the shape of the hidden states, ``dW`` and ``db``, by the names of the autograd functions' inputs."""
    dhidden, dweight, dbias = gradients
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
    max_logits_bytes: int | None,
    save_projection: bool,
    backend: str,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Log-probabilities, entropies and the other wanted statistics, of validated arguments."""
    rows = StatisticsCall(to_kernel_ids(ids).view(-1), None if mask is None else mask.reshape(-1), transform, outputs)
    call = statistics_call(hidden, weight, bias, rows, options, max_logits_bytes, save_projection, backend)
    logprobs, entropy, *extras = LinearTokenLogprobs.apply(hidden, weight, bias, call, backend)
    return logprobs, entropy, tuple(extras)


def statistics_call(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: StatisticsCall,
    options: HeadOptions,
    max_logits_bytes: int | None,
    save_projection: bool,
    backend: str,
) -> LinearStatisticsCall:
    """The call for these tokens, with what is saved for the backward; checks the bound of its memory."""
    needs = NeededGradients.of(hidden, weight, bias)
    options.check_bound(backend, weight, bias, hidden)
    is_head_frozen = needs == NeededGradients(True, False, False)
    save_projection = save_projection and is_head_frozen and not max_logits_bytes
    if not needs.any or save_projection:
        max_logits_bytes = 0
    elif max_logits_bytes is None:
        options, max_logits_bytes = options.with_saved_logits(
            options.head(backend, weight, bias), needs, rows.ids.shape[0]
        )
    return LinearStatisticsCall(options, rows, max_logits_bytes, save_projection)


def logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor,
    options: HeadOptions,
    transform: Transform,
    max_logits_bytes: int | None,
    backend: str,
) -> TokenLogprobs:
    """``linear_token_logprobs`` of validated arguments."""
    code = outputs_code(("entropy",))
    logprobs, entropy, _ = _statistics(
        hidden, weight, bias, ids, mask, options, transform, code, max_logits_bytes, True, backend
    )
    return TokenLogprobs(logprobs, entropy)


@check_keywords()
def linear_token_logprobs(
    hidden_states: Tensor,  # [B, T, H] or [B, T + 1, H]; packed [N, H]
    lm_head_weight: Tensor,  # [V, H]
    ids: Tensor,  # [B, T]; packed [N]
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,  # like ids
    outputs: str | Sequence[str] = (),
    logits_dtype: torch.dtype | None = None,
    max_logits_bytes: int | None = None,
    workspace_bytes: int | None = None,
    save_projection: bool = True,
    debug: bool = False,
    backend: str = "auto",
) -> TokenLogprobs:
    """``token_logprobs`` of ``h W^T + b``, in chunks of tokens: the logits never exist as a whole.

    Example:
        >>> linear_token_logprobs(torch.zeros(1, 1, 2), torch.zeros(4, 2), torch.tensor([[2]])).logprobs
        tensor([[-1.3863]])

    Masked rows are never projected. The backward forms the gradient and multiplies it, only for the rows whose upstream
    gradient is not 0, and projects those again whose logits were not saved. That is ``2 N H V (1 + 2 f)`` operations at
    a live share ``f``, ``2 N H V (1 + 3 f)`` without saved logits, and ``2 N H V f`` less if the head is frozen.
    Gradients accumulate in fp32 (fp64) and are rounded once, to their parameter's dtype.

    Args:
        hidden_states: Position ``t`` predicts token ``t``. A ``T + 1``-th position is ignored, and its gradient is 0.
        lm_head_weight: The head, tied or not, of the same dtype; under autocast both are rounded to its dtype.
        ids: Token ids.
        bias: The head's bias.
        temperature, softcap, logit_scale, mask, outputs: As for ``token_logprobs``.
        logits_dtype: The dtype of the logits. None means fp32 (fp64 for fp64 inputs). With the inputs' dtype,
            log-probabilities have the rounding error of a logit. On a CPU neither saves memory: no GEMM there writes
            fp32 from half-precision inputs, so either the weight or each chunk's gradient is widened. That takes
            ``4 V H`` bytes, or twice the chunk's, beside the workspace.
        max_logits_bytes: Save as many logits as fit into this many bytes from the forward to the backward, beside the
            workspace. The first backward writes over them; with ``retain_graph`` later ones project again. None saves
            them within the workspace on a CPU: all if they fit, else in one half of it if the other then holds 512
            rows. On a GPU None saves none: memory that is free now may not be at the next step.
        workspace_bytes: Bound of what a pass takes beside inputs, results and what has their size, and up to 16 MB of
            copies: logits; their gradients, if these have another dtype, as bf16 beside fp32 logits on a GPU; and the
            fp32 sums of ``dW``, ``4 V H`` bytes, if the weight is not fp32 and not all gradients fit at once. If they
            do, ``dW`` is one GEMM. None means, with the sums beside it, 1 GiB of logits on a CPU; on a GPU 512 rows of
            logits and ``min(s N V, 4 V H + 1e9)`` bytes of gradients, ``s`` the size of one, or these bytes for both if
            they have one dtype. That is 2.36 GB for bf16 at N = 8192, H = 4096, V = 128256. No effect for "torch".
        save_projection: With a frozen head and no saved logits: save ``(onehot - p) f'(z) W`` of every row, ``4 N H``
            bytes, in the forward. The backward of a log-probability is then a product with it: ``4 N H V`` operations
            in all. False is faster if less than half of the rows will have a gradient. A gradient of the entropy
            projects again in any case.
        debug: Check values on a GPU too, and the flags of earlier kernels (``check_device_values``): syncs.
        backend: "auto", or one of ``grpo_kernels.BACKENDS``. "torch" forms the whole logits.

    Returns:
        ``TokenLogprobs``, each field shaped like ``ids``; ``logprobs`` and ``entropy`` are in nats and differentiable.

    Raises:
        TypeError: A dtype does not fit.
        ValueError: Shapes or devices do not fit, a bound is negative or too small for one row, or an unmasked id is
            outside the vocabulary (read on the CPU, elsewhere with ``debug``).
        RuntimeError: The named backend cannot run here.
    """
    check_head(hidden_states, lm_head_weight, bias, ids)
    check_device(hidden_states.device, [("mask", mask)])
    transform = Transform.of(temperature, softcap, logit_scale)
    outputs = output_names(outputs)
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
        logits = reference.project(predicting(hidden_states, ids), lm_head_weight, bias, mask, *dtypes)
        return rows_reference.token_logprobs(logits, ids, mask, temperature, softcap, logit_scale, outputs)
    head = (hidden_states, lm_head_weight, bias)
    statistics = _statistics(*head, ids, mask, options, transform, code, max_logits_bytes, save_projection, backend)
    return pack_outputs(*statistics, outputs)
