"""The public ``linear_token_logprobs``, its registered ops and its autograd function."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import registry
from grpo_kernels.ops.gradients import refuse_double_backward
from grpo_kernels.ops.library import KERNEL_BACKENDS, define
from grpo_kernels.ops.linear_token_logprobs import reference
from grpo_kernels.ops.linear_token_logprobs.chunks import (
    DEFAULT_WORKSPACE_BYTES,
    Head,
    HeadGradients,
    count_rows,
    part,
    row_chunks,
    unmasked_rows,
)
from grpo_kernels.ops.token_logprobs import reference as token_reference
from grpo_kernels.ops.token_logprobs.op import (
    TokenLogprobs,
    accumulation_dtype,
    empty_statistics,
    like_ids,
    outputs_code,
    pack_outputs,
    token_logprobs_bwd,
    token_logprobs_fwd,
    token_mask,
)
from grpo_kernels.ops.token_logprobs.transform import TRANSFORM_SCHEMA, Transform
from grpo_kernels.ops.validation import (
    FLOAT_DTYPES,
    check_device,
    check_float,
    check_id_range,
    check_ids,
    check_shape,
)

HEAD_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, ScalarType compute_dtype, ScalarType logits_dtype, int workspace_bytes"
)


def _retained_rows(rows: int, vocab: int, dtype: torch.dtype, max_logits_bytes: int) -> int:
    return min(rows, max_logits_bytes // (vocab * dtype.itemsize))


def _fwd(  # type: ignore[no-untyped-def]
    backend, hidden, weight, bias, compute_dtype, logits_dtype, workspace_bytes, ids, mask, *options
) -> tuple[Tensor, ...]:
    *transform, outputs, max_logits_bytes = options
    head = Head(weight, bias, compute_dtype, logits_dtype)
    statistics = tuple(x.zero_() for x in empty_statistics(hidden.new_empty(0, dtype=logits_dtype), ids.shape, outputs))
    kept = _retained_rows(ids.shape[0], head.vocab, logits_dtype, max_logits_bytes)
    retained = head.workspace(kept)
    rows = unmasked_rows(mask, ids.shape[0])
    n_rows = count_rows(rows)
    chunks = [*row_chunks(min(kept, n_rows), head.vocab, logits_dtype.itemsize, workspace_bytes)]
    chunks += [
        slice(c.start + kept, c.stop + kept)
        for c in row_chunks(max(n_rows - kept, 0), head.vocab, logits_dtype.itemsize, workspace_bytes)
    ]
    workspace = head.workspace(max((c.stop - c.start for c in chunks if c.start >= kept), default=0))
    for chunk in chunks:
        which = part(rows, chunk)
        out = retained[chunk] if chunk.stop <= kept else workspace[: chunk.stop - chunk.start]
        logits = head.logits(head.cast(hidden[which]), out)
        chunk_statistics = token_logprobs_fwd[backend](logits[None], ids[which][None], None, *transform, outputs)
        for whole, piece in zip(statistics, chunk_statistics, strict=True):
            if whole.numel():
                whole[which] = piece[0]
    return (*statistics, retained)


def _bwd(  # type: ignore[no-untyped-def]
    backend, hidden, weight, bias, compute_dtype, logits_dtype, workspace_bytes, ids, mask, *options
) -> tuple[Tensor, ...]:
    logprobs, lse, entropy, dlogprobs, dentropy, *transform, retained, need_dhidden, need_dweight, need_dbias = options
    head = Head(weight, bias, compute_dtype, logits_dtype)
    grads = HeadGradients(head, hidden, (need_dhidden, need_dweight, need_dbias))
    rows = unmasked_rows(mask, ids.shape[0])
    live = _live_positions(rows, dlogprobs, dentropy)  # positions in rows, hence in retained
    index = live if isinstance(rows, slice) else rows[live]
    chunks = [*row_chunks(live.shape[0], head.vocab, logits_dtype.itemsize, workspace_bytes)]
    workspace = head.workspace(max((c.stop - c.start for c in chunks), default=0))
    for chunk in chunks:
        which = index[chunk]
        inputs = head.cast(hidden[which])
        dlogits = workspace[: which.shape[0]]
        logits = _chunk_logits(head, inputs, retained, live[chunk], dlogits)
        token_logprobs_bwd[backend](
            logits[None],
            ids[which][None],
            None,
            logprobs[which],
            lse[which],
            entropy[which],
            None if dlogprobs is None else dlogprobs[which],
            None if dentropy is None else dentropy[which],
            *transform,
            dlogits[None],
        )
        grads.add(dlogits, inputs, which)
    return grads.results()


def _chunk_logits(head: Head, inputs: Tensor, retained: Tensor, positions: Tensor, out: Tensor) -> Tensor:
    """The logits of the live rows at ``positions``: retained ones read where they lie if they lie together, else
    copied into ``out``, and the others projected again."""
    reused = int((positions < retained.shape[0]).sum())
    first, last = int(positions[0]), int(positions[-1])
    if reused == positions.shape[0] == last - first + 1:
        return retained[first : last + 1]
    torch.index_select(retained, 0, positions[:reused], out=out[:reused])
    if reused < positions.shape[0]:
        head.logits(inputs[reused:], out[reused:])
    return out


def _live_positions(rows: Tensor | slice, dlogprobs: Tensor | None, dentropy: Tensor | None) -> Tensor:
    """Positions, among the unmasked rows, of those with an upstream gradient other than 0."""
    flags = [(d[rows] != 0) for d in (dlogprobs, dentropy) if d is not None]
    return torch.stack(flags).any(0).nonzero()[:, 0]


def _fwd_fake(  # type: ignore[no-untyped-def]
    hidden, weight, bias, compute_dtype, logits_dtype, workspace_bytes, ids, mask, *options
):
    *_, outputs, max_logits_bytes = options
    like = hidden.new_empty(0, dtype=logits_dtype)
    kept = _retained_rows(ids.shape[0], weight.shape[0], logits_dtype, max_logits_bytes)
    return (*empty_statistics(like, ids.shape, outputs), like.new_empty(kept, weight.shape[0]))


def _bwd_fake(hidden, weight, bias, *options):  # type: ignore[no-untyped-def]
    return gradient_fakes(hidden, weight, bias, options[-3:])


def gradient_fakes(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """Shapes of ``dX``, ``dW`` and ``db``; empty where not needed."""
    like = (hidden, weight, weight.new_empty(weight.shape[0]) if bias is None else bias)
    return tuple(x.new_empty(x.shape if need else (0,)) for x, need in zip(like, needs, strict=True))


_FWD = define(
    "linear_token_logprobs_fwd",
    f"({HEAD_SCHEMA}, Tensor ids, Tensor? mask, {TRANSFORM_SCHEMA}, int outputs, int max_logits_bytes) -> "
    "(Tensor logprobs, Tensor lse, Tensor entropy, Tensor log_sum_sq_probs, Tensor mean_logits, Tensor is_top1, "
    "Tensor retained)",
    _fwd_fake,
    {backend: partial(_fwd, backend) for backend in KERNEL_BACKENDS},
)
_BWD = define(
    "linear_token_logprobs_bwd",
    f"({HEAD_SCHEMA}, Tensor ids, Tensor? mask, Tensor logprobs, Tensor lse, Tensor entropy, Tensor? dlogprobs, "
    f"Tensor? dentropy, {TRANSFORM_SCHEMA}, Tensor retained, bool need_dhidden, bool need_dweight, bool need_dbias) -> "
    "(Tensor dhidden, Tensor dweight, Tensor dbias)",
    _bwd_fake,
    {backend: partial(_bwd, backend) for backend in KERNEL_BACKENDS},
)


class _LinearTokenLogprobs(torch.autograd.Function):
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
        backend: str,
    ) -> tuple[Tensor, ...]:
        rows = hidden.detach().reshape(-1, hidden.shape[-1])
        flat_ids = ids.reshape(-1).to(torch.int64)
        flat_mask = None if mask is None else mask.reshape(-1)
        logprobs, lse, entropy, *extras, retained = _FWD[backend](
            rows, weight, bias, *dtypes, workspace_bytes, flat_ids, flat_mask, *transform, outputs, max_logits_bytes
        )
        ctx.save_for_backward(hidden, weight, bias, flat_ids, flat_mask, logprobs, lse, entropy, retained)
        ctx.options = (dtypes, workspace_bytes, transform, backend)
        ctx.set_materialize_grads(False)
        shaped = [like_ids(x, ids) for x in (logprobs, entropy, *extras)]
        ctx.mark_non_differentiable(*shaped[2:])
        return tuple(shaped)

    @staticmethod
    def backward(ctx: Any, dlogprobs: Tensor | None, dentropy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_double_backward()
        if dlogprobs is None and dentropy is None:
            return (None,) * 11
        hidden, weight, bias, ids, mask, logprobs, lse, entropy, retained = ctx.saved_tensors
        dtypes, workspace_bytes, transform, backend = ctx.options
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2])
        dhidden, dweight, dbias = _BWD[backend](
            hidden.detach().reshape(-1, hidden.shape[-1]),
            weight,
            bias,
            *dtypes,
            workspace_bytes,
            ids,
            mask,
            logprobs,
            lse,
            entropy,
            None if dlogprobs is None else dlogprobs.reshape(-1),
            None if dentropy is None else dentropy.reshape(-1),
            *transform,
            retained,
            *needs,
        )
        grads = (dhidden.view(hidden.shape) if needs[0] else None, dweight, dbias)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 8)


def head_dtypes(hidden: Tensor, weight: Tensor, logits_dtype: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
    """The compute dtype (autocast's, where on) and the logits' (fp32 or fp64, unless one is given).

    Raises:
        TypeError: The dtypes of the two inputs differ outside autocast, or ``logits_dtype`` does not fit.
    """
    device = hidden.device.type
    is_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if is_autocast and hidden.dtype != torch.float64:
        compute_dtype = torch.get_autocast_dtype(device)
    elif hidden.dtype != weight.dtype:
        raise TypeError(f"lm_head_weight must have the dtype of hidden_states, {hidden.dtype}, got {weight.dtype}")
    else:
        compute_dtype = hidden.dtype
    wide = accumulation_dtype(compute_dtype)
    if logits_dtype is None:
        return compute_dtype, wide
    if logits_dtype not in FLOAT_DTYPES or logits_dtype not in (compute_dtype, wide):
        raise TypeError(f"logits_dtype must be None, {compute_dtype} or {wide}, got {logits_dtype}")
    return compute_dtype, logits_dtype


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, name: str = "ids") -> None:
    """Raises TypeError or ValueError unless hidden states, head and ids fit."""
    check_float("hidden_states", hidden)
    check_float("lm_head_weight", weight)
    check_ids(name, ids)
    if ids.dim() not in (1, 2):
        raise ValueError(f"{name} must have shape [B, T] or, packed, [N], got {list(ids.shape)}")
    size = hidden.shape[-1] if hidden.dim() else 0
    if size == 0:
        raise ValueError(f"hidden_states must have a last dimension of at least 1, got {list(hidden.shape)}")
    check_shape("hidden_states", hidden, (*ids.shape, size))
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"lm_head_weight must have shape [V, H] with V at least 1, got {list(weight.shape)}")
    check_shape("lm_head_weight", weight, (weight.shape[0], size))
    if bias is not None:
        check_float("bias", bias)
        check_shape("bias", bias, (weight.shape[0],))
    check_device(hidden.device, [("lm_head_weight", weight), ("bias", bias), (name, ids)])


def check_workspace(workspace_bytes: int | None, max_logits_bytes: int) -> int:
    """The workspace's bound in bytes.

    Raises:
        ValueError: A bound is negative.
    """
    if max_logits_bytes < 0:
        raise ValueError(f"max_logits_bytes must be at least 0, got {max_logits_bytes}")
    if workspace_bytes is not None and workspace_bytes < 1:
        raise ValueError(f"workspace_bytes must be None or at least 1, got {workspace_bytes}")
    return DEFAULT_WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes


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
        workspace_bytes: Bound of the logits that exist at once beside those; None means 1 GiB. One row at least.
        backend: "auto", or one of ``grpo_kernels.registry.BACKENDS``. "torch" forms the whole logits.

    Returns:
        ``TokenLogprobs``, each field shaped like ``ids``; ``logprobs`` and ``entropy`` are in nats and differentiable.

    Raises:
        TypeError: A dtype does not fit.
        ValueError: Shapes or devices do not fit, a bound is negative, or an unmasked id is outside the vocabulary
            (read on the CPU alone).
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
    check_id_range("ids", ids, mask, lm_head_weight.shape[0])
    dtypes = head_dtypes(hidden_states, lm_head_weight, logits_dtype)
    workspace = check_workspace(workspace_bytes, max_logits_bytes)
    backend = registry.resolve("linear_token_logprobs", backend, hidden_states.device)
    if backend == "torch":
        logits = reference.project(hidden_states, lm_head_weight, bias, mask, *dtypes)
        return token_reference.token_logprobs(logits, ids, mask, temperature, softcap, logit_scale, tuple(outputs))
    inputs = (hidden_states, lm_head_weight, bias)
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)):
        max_logits_bytes = 0
    logprobs, entropy, *extras = _LinearTokenLogprobs.apply(
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
        backend,
    )
    return pack_outputs(logprobs, entropy, tuple(extras), tuple(outputs))
