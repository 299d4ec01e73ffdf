"""The public ``linear_token_logprobs``, its registered ops and its autograd function."""

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
from grpo_kernels.ops.head import reference
from grpo_kernels.ops.head.gemm import Head, HeadGradients, held_ids, make_head, project_back, row_width
from grpo_kernels.ops.head.inputs import check_head, check_workspace, head_dtypes
from grpo_kernels.ops.head.rows import Rows, is_capturing, row_chunks
from grpo_kernels.ops.registration import KERNEL_BACKENDS, define
from grpo_kernels.ops.rows import reference as token_reference
from grpo_kernels.ops.rows.reference import TokenLogprobs
from grpo_kernels.ops.rows.token_logprobs import (
    empty_statistics,
    like_ids,
    outputs_code,
    pack_outputs,
    token_ids,
    token_logprobs_bwd,
    token_logprobs_fwd,
    token_mask,
)
from grpo_kernels.ops.rows.transform import TRANSFORM_SCHEMA, Transform
from grpo_kernels.validation import check_device, check_id_range

HEAD_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, ScalarType compute_dtype, ScalarType logits_dtype, int workspace_bytes"
)


def _retained_shape(rows: int, vocab: int, dtype: torch.dtype, device: torch.device, max_logits_bytes: int):  # type: ignore[no-untyped-def]
    width = row_width(vocab, dtype, device)
    return min(rows, max_logits_bytes // (width * dtype.itemsize)), width


def _fwd(  # type: ignore[no-untyped-def]
    backend, hidden, weight, bias, compute_dtype, logits_dtype, workspace_bytes, ids, mask, *options
) -> tuple[Tensor, ...]:
    *transform, outputs, max_logits_bytes, save_projection = options
    head = make_head(backend, weight, bias, compute_dtype, logits_dtype)
    rows = Rows.of(mask, None, ids)
    kept, _ = _retained_shape(len(ids), head.vocab, logits_dtype, head.device, max_logits_bytes)
    retained = head.workspace(kept)
    retained_ids = ids.new_full((kept,), -1)
    retained_ids[: rows.count] = torch.arange(len(ids), device=ids.device)[rows.part(slice(0, kept))]
    dtype = accumulation_dtype(compute_dtype)
    projection = hidden.new_zeros(hidden.shape if save_projection else (0,), dtype=dtype)
    chunks = [
        chunk
        for begin, end in ((0, min(kept, rows.count)), (kept, rows.count))
        for chunk in row_chunks(begin, end, head.row_bytes, workspace_bytes, head.multiple)
    ]
    workspace = head.workspace(max((c.stop - c.start for c in chunks if c.start >= kept), default=0))
    row_ids = rows.take(held_ids(backend, ids, mask, head.vocab))
    row_mask = None if mask is None else rows.unmasked()
    statistics = empty_statistics(hidden.new_empty(0, dtype=logits_dtype), (rows.count,), outputs)
    for chunk in chunks:
        inputs = head.inputs(hidden, rows, chunk)
        logits = head.logits(inputs, retained[chunk] if chunk.start < kept else workspace)
        chunk_ids, chunk_mask = row_ids[None, chunk], None if row_mask is None else row_mask[None, chunk]
        found = token_logprobs_fwd[backend](logits[None], chunk_ids, chunk_mask, *transform, outputs)
        for whole, piece in zip(statistics, found, strict=True):
            if whole.numel():
                whole[chunk] = piece[0]
        if save_projection:
            dlogits = head.gradient(workspace, logits.shape[0])
            ones = torch.ones_like(found[0])
            token_logprobs_bwd[backend](
                logits[None], chunk_ids, chunk_mask, *found[:3], ones, None, *transform, dlogits[None]
            )
            projection[rows.part(chunk)] = project_back(dlogits, head.weight, dtype).to(dtype)
    asked = (True, True, True, *(outputs >> bit & 1 for bit in (1, 2, 3)))
    whole = (rows.put_back(x, len(ids)) if wanted else x for x, wanted in zip(statistics, asked, strict=True))
    return (*whole, retained, retained_ids, projection)


def _bwd(  # type: ignore[no-untyped-def]
    backend, hidden, weight, bias, compute_dtype, logits_dtype, workspace_bytes, ids, mask, *options
) -> tuple[Tensor, ...]:
    logprobs, lse, entropy, dlogprobs, dentropy, *transform, retained, retained_ids = options[:-3]
    head = make_head(backend, weight, bias, compute_dtype, logits_dtype)
    ids = held_ids(backend, ids, mask, head.vocab)
    live = torch.stack([d != 0 for d in (dlogprobs, dentropy) if d is not None]).any(0)
    rows = Rows.of(live if mask is None else mask & live, None, ids)
    chunks = [*row_chunks(0, rows.count, head.row_bytes, workspace_bytes, head.multiple)]
    grads = HeadGradients(head, hidden, options[-3:], len(chunks))
    workspace = head.workspace(max((c.stop - c.start for c in chunks), default=0))
    place = _places(retained_ids, rows, len(ids))
    row_ids, *statistics = (rows.take(x) for x in (ids, logprobs, lse, entropy, dlogprobs, dentropy))
    per_token = [row_ids, rows.unmasked(), *statistics]
    for chunk in chunks:
        inputs = head.inputs(hidden, rows, chunk)
        logits = _chunk_logits(head, inputs, retained, None if place is None else place[chunk], workspace)
        dlogits = head.gradient(workspace, inputs.shape[0])
        token_logprobs_bwd[backend](
            logits[None], *(None if x is None else x[None, chunk] for x in per_token), *transform, dlogits[None]
        )
        grads.add(dlogits, inputs, rows.part(chunk))
    return grads.results()


def _places(retained_ids: Tensor, rows: Rows, count: int) -> Tensor | None:  # [kept] -> [rows.count]
    """Where the logits of rows are among the retained ones; -1 where they are not."""
    if retained_ids.shape[0] == 0 or is_capturing(retained_ids.device):
        return None
    places = retained_ids.new_full((count + 1,), -1)
    places[retained_ids] = torch.arange(len(retained_ids), device=retained_ids.device)  # -1 is the place past the last
    return rows.take(places[:count])


def _chunk_logits(head: Head, inputs: Tensor, retained: Tensor, place: Tensor | None, workspace: Tensor) -> Tensor:
    """The logits of a chunk's rows: retained ones read where they lie if they lie together, else copied, and the others
    projected again. Retained rows come first, and rise."""
    if place is None:
        return head.logits(inputs, workspace)
    reused, first, last = torch.stack([(place >= 0).sum(), place[0], place.max()]).tolist()
    if reused == place.shape[0] == last - first + 1:
        return retained[first : last + 1, : head.vocab]
    torch.index_select(retained, 0, place[:reused], out=workspace[:reused])
    if reused < place.shape[0]:
        head.logits(inputs[reused:], workspace[reused:])
    return workspace[: place.shape[0], : head.vocab]


def _fwd_fake(  # type: ignore[no-untyped-def]
    hidden, weight, bias, compute_dtype, logits_dtype, workspace_bytes, ids, mask, *options
):
    *_, outputs, max_logits_bytes, save_projection = options
    like = hidden.new_empty(0, dtype=logits_dtype)
    shape = _retained_shape(ids.shape[0], weight.shape[0], logits_dtype, weight.device, max_logits_bytes)
    dtype = accumulation_dtype(compute_dtype)
    projection = hidden.new_empty(hidden.shape if save_projection else (0,), dtype=dtype)
    statistics = empty_statistics(like, ids.shape, outputs)
    return (*statistics, like.new_empty(shape), ids.new_empty(shape[:1]), projection)


def _bwd_fake(hidden, weight, bias, *options):  # type: ignore[no-untyped-def]
    return gradient_fakes(hidden, weight, bias, options[-3:])


def gradient_fakes(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """Shapes of ``dX``, ``dW`` and ``db``; empty where not needed."""
    like = (hidden, weight, weight.new_empty(weight.shape[0]) if bias is None else bias)
    return tuple(x.new_empty(x.shape if need else (0,)) for x, need in zip(like, needs, strict=True))


linear_token_logprobs_fwd = define(
    "linear_token_logprobs_fwd",
    f"({HEAD_SCHEMA}, Tensor ids, Tensor? mask, {TRANSFORM_SCHEMA}, int outputs, int max_logits_bytes, "
    "bool save_projection) -> (Tensor logprobs, Tensor lse, Tensor entropy, Tensor log_sum_sq_probs, "
    "Tensor mean_logits, Tensor is_top1, Tensor retained, Tensor retained_ids, Tensor projection)",
    _fwd_fake,
    {backend: partial(_fwd, backend) for backend in KERNEL_BACKENDS},
)
linear_token_logprobs_bwd = define(
    "linear_token_logprobs_bwd",
    f"({HEAD_SCHEMA}, Tensor ids, Tensor? mask, Tensor logprobs, Tensor lse, Tensor entropy, Tensor? dlogprobs, "
    f"Tensor? dentropy, {TRANSFORM_SCHEMA}, Tensor retained, Tensor retained_ids, bool need_dhidden, "
    "bool need_dweight, bool need_dbias) -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
    _bwd_fake,
    {backend: partial(_bwd, backend) for backend in KERNEL_BACKENDS},
)


class LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtypes: tuple[torch.dtype, torch.dtype],
        workspace_bytes: int,
        ids: Tensor,
        mask: Tensor | None,
        transform: Transform,
        outputs: int,
        max_logits_bytes: int,
        save_projection: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        rows = hidden.detach().reshape(-1, hidden.shape[-1])
        flat_ids = token_ids(ids).view(-1)
        flat_mask = None if mask is None else mask.reshape(-1)
        bounds = (outputs, max_logits_bytes, save_projection)
        logprobs, lse, entropy, *extras, retained, retained_ids, projection = linear_token_logprobs_fwd[backend](
            rows, weight, bias, *dtypes, workspace_bytes, flat_ids, flat_mask, *transform, *bounds
        )
        statistics = (logprobs, lse, entropy, retained, retained_ids)
        projection = projection if save_projection else None
        ctx.save_for_backward(hidden, weight, bias, flat_ids, flat_mask, projection, *statistics)
        ctx.options = (dtypes, workspace_bytes, transform, backend)
        ctx.set_materialize_grads(False)
        shaped = [like_ids(x, ids) for x in (logprobs, entropy, *extras)]
        ctx.mark_non_differentiable(*shaped[2:])
        return tuple(shaped)

    @staticmethod
    def backward(ctx: Any, dlogprobs: Tensor | None, dentropy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_double_backward()
        if dlogprobs is None and dentropy is None:
            return (None,) * 12
        hidden, weight, bias, ids, mask, projection, *statistics, retained, retained_ids = ctx.saved_tensors
        if projection is not None and dentropy is None:
            c = dlogprobs.reshape(-1, 1)  # type: ignore[union-attr]
            live = c != 0 if mask is None else (c != 0) & mask[:, None]
            dhidden = torch.where(live, c * projection, 0).to(hidden.dtype).view(hidden.shape)
            return (dhidden, *(None,) * 11)
        dtypes, workspace_bytes, transform, backend = ctx.options
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2])
        dhidden, dweight, dbias = linear_token_logprobs_bwd[backend](
            hidden.detach().reshape(-1, hidden.shape[-1]),
            weight,
            bias,
            *dtypes,
            workspace_bytes,
            ids,
            mask,
            *statistics,
            None if dlogprobs is None else dlogprobs.reshape(-1).contiguous(),
            None if dentropy is None else dentropy.reshape(-1).contiguous(),
            *transform,
            retained,
            retained_ids,
            *needs,
        )
        grads = (dhidden.view(hidden.shape) if needs[0] else None, dweight, dbias)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 9)


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
    dtypes = head_dtypes(hidden_states, lm_head_weight, logits_dtype)
    workspace = check_workspace(
        workspace_bytes, max_logits_bytes, lm_head_weight.shape[0], dtypes[1], hidden_states.device
    )
    backend = backends.resolve(
        "linear_token_logprobs", backend, hidden_states.device, partial(RowClass.of_head, lm_head_weight)
    )
    if backend == "torch":
        logits = reference.project(hidden_states, lm_head_weight, bias, mask, *dtypes)
        return token_reference.token_logprobs(logits, ids, mask, temperature, softcap, logit_scale, tuple(outputs))
    needs = [
        torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden_states, lm_head_weight, bias)
    ]
    max_logits_bytes = max_logits_bytes if any(needs) else 0
    logprobs, entropy, *extras = LinearTokenLogprobs.apply(
        hidden_states,
        lm_head_weight,
        bias,
        dtypes,
        workspace,
        ids,
        mask,
        transform,
        code,
        max_logits_bytes,
        save_projection and needs == [True, False, False] and max_logits_bytes == 0,
        backend,
    )
    return pack_outputs(logprobs, entropy, tuple(extras), tuple(outputs))
