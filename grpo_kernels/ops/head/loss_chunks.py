"""The registered op of ``linear_grpo_loss``: one pass over chunks of tokens, each projected once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from grpo_kernels.dtypes import accumulation_dtype
from grpo_kernels.loss.inputs import FLAT_COUNT, FLAT_SCHEMA
from grpo_kernels.loss.options import Param
from grpo_kernels.ops.head.gemm import HeadGradients, held_ids, make_head
from grpo_kernels.ops.head.linear_token_logprobs import HEAD_SCHEMA, gradient_fakes
from grpo_kernels.ops.head.reference_model import REFERENCE_COUNT, REFERENCE_SCHEMA, Reference, ReferenceRows
from grpo_kernels.ops.head.rows import Rows, is_capturing, pack_live, row_chunks
from grpo_kernels.ops.registration import KERNEL_BACKENDS, define
from grpo_kernels.ops.rows.grpo_loss import grpo_loss_fwd
from grpo_kernels.ops.rows.token_divergence import token_divergence_rows
from grpo_kernels.ops.rows.transform import COMPARISON_SCHEMA, Comparison
from grpo_kernels.ops.tokens.policy_loss import token_coefficients


def _fwd(  # type: ignore[no-untyped-def]
    backend, hidden, weight, bias, compute_dtype, logits_dtype, workspace_bytes, *options
) -> tuple[Tensor, ...]:
    reference, options = Reference(*options[:REFERENCE_COUNT]), options[REFERENCE_COUNT:]
    ids, mask, *per_token = options[: 1 + FLAT_COUNT]
    code, params, *comparison = options[1 + FLAT_COUNT : -4]
    *needs, max_live_rows = options[-4:]
    head = make_head(backend, weight, bias, compute_dtype, logits_dtype)
    has_kl = params[Param.BETA] != 0 and (reference.is_given or per_token[-1] is not None)
    may_be_live = _may_be_live(has_kl, *per_token) if any(needs) else torch.zeros_like(mask)
    rows = Rows.of(mask, may_be_live, ids, max_live_rows)
    others = ReferenceRows(reference, rows, logits_dtype) if reference.is_given else None
    row_bytes = head.row_bytes + (0 if others is None else others.row_bytes)
    chunks = [*row_chunks(0, rows.count, row_bytes, workspace_bytes, head.multiple)]
    grads = HeadGradients(head, hidden, needs, len(chunks))
    most = max((c.stop - c.start for c in chunks), default=0)
    workspace, other_workspace = head.workspace(most), None if others is None else others.workspace(most)
    ids = held_ids(backend, ids, mask, head.vocab)
    ids, row_mask, *per_token = (rows.take(x) for x in (ids, mask, *per_token))
    dtype = accumulation_dtype(logits_dtype)
    transform = Comparison(*comparison).transform
    results = [hidden.new_empty(rows.count, dtype=dtype) for _ in range(2 if others is None else 3)]
    for chunk in chunks:
        inputs = head.inputs(hidden, rows, chunk)
        logits = head.logits(inputs, workspace)
        compared = None if others is None else others.logits(chunk, other_workspace)
        for part, has_gradient in _parts(chunk, rows.live if any(needs) else 0):
            within = slice(part.start - chunk.start, part.stop - chunk.start)
            dlogits = head.gradient(workspace, within.stop)[within] if has_gradient else None
            tokens = [None if x is None else x[part] for x in (ids, row_mask, *per_token)]
            live = None
            if compared is None:
                *found, live = _rows_loss(backend, logits[within], tokens, code, params, transform, dlogits)
            else:
                pair = (logits[within], compared[within])
                found = _compared_rows_loss(backend, *pair, tokens, code, params, comparison, dlogits)
            for whole, piece in zip(results, found, strict=True):
                whole[part] = piece
            if dlogits is not None:
                is_asked = max_live_rows is None and _may_be_clipped(has_kl, params, *per_token)
                _add_live(backend, grads, dlogits, inputs[within], live if is_asked else None, rows.part(part))
    whole = [rows.put_back(x, mask.shape[0]) for x in results]
    divergence = whole[2] if others is not None else hidden.new_empty(0, dtype=dtype)
    return (*whole[:2], divergence, *grads.results())


def _parts(chunk: slice, live: int) -> Iterator[tuple[slice, bool]]:
    """The rows of a chunk that may have a gradient, the first ``live`` of all, and the others; not the empty ones."""
    end = min(max(live, chunk.start), chunk.stop)
    for part, has_gradient in ((slice(chunk.start, end), True), (slice(end, chunk.stop), False)):
        if part.start < part.stop:
            yield part, has_gradient


def _rows_loss(  # type: ignore[no-untyped-def]
    backend, logits, tokens, code, params, transform, dlogits
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and entropies of a chunk ``[n, V]``, its gradient, and which rows have one."""
    ids, mask, *per_token = tokens
    found = grpo_loss_fwd[backend](
        logits[None],
        ids[None],
        mask[None],
        *per_token,
        *(None, None, 1, False, 0.0),
        code,
        params,
        *transform,
        None if dlogits is None else dlogits[None],
    )
    return tuple(x[0] for x in found[:3])


def _compared_rows_loss(  # type: ignore[no-untyped-def]
    backend, logits, others, tokens, code, params, comparison, dlogits
) -> list[Tensor]:
    """Log-probabilities, entropies and divergences of a chunk ``[n, V]``, and its gradient, whose coefficients wait for
    the first of them."""
    ids, mask, *per_token = tokens
    rows = (logits[None], others[None], ids[None], mask[None])
    found = [x[0] for x in token_divergence_rows[backend](*rows, None, None, None, *comparison, None)]
    if dlogits is not None:
        _, _, kl_weights, entropy_weights, *_ = per_token
        coefficients = token_coefficients(found[0], found[1], (mask, *per_token), (code, params), backend)
        upstream = (
            coefficients,
            None if entropy_weights is None else -entropy_weights,
            params[Param.BETA] * kl_weights,
        )
        upstream = (None if x is None else x[None] for x in upstream)
        token_divergence_rows[backend](*rows, *upstream, *comparison, dlogits[None])
    return found


def _may_be_live(  # type: ignore[no-untyped-def]
    has_kl, advantages, policy_weights, kl_weights, entropy_weights, old_logprobs, ref_logprobs
) -> Tensor:
    """The tokens whose coefficient is not known to be 0 before their logits are."""
    live = (advantages != 0) & (policy_weights != 0)
    if has_kl:
        live = live | (kl_weights != 0)
    return live if entropy_weights is None else live | (entropy_weights != 0)


def _may_be_clipped(  # type: ignore[no-untyped-def]
    has_kl, params, advantages, policy_weights, kl_weights, entropy_weights, old_logprobs, ref_logprobs
) -> bool:
    """Whether a token's coefficient may turn out to be 0 once its ratio is known."""
    is_off_policy = old_logprobs is not None or params[Param.DELTA] < 1
    return is_off_policy and not has_kl and entropy_weights is None and not is_capturing(advantages.device)


def _add_live(  # type: ignore[no-untyped-def]
    backend, grads, dlogits, inputs, live, which
) -> None:
    """Adds a chunk, without its dead rows if they are known."""
    index = None
    if live is not None:
        dlogits, index = pack_live(backend, dlogits, live)
    if index is not None:
        inputs, which = inputs[index], index + which.start if isinstance(which, slice) else which[index]
    grads.add(dlogits, inputs, which)


def _fake(hidden, weight, bias, compute_dtype, logits_dtype, workspace_bytes, *options):  # type: ignore[no-untyped-def]
    dtype = accumulation_dtype(logits_dtype)
    rows = hidden.shape[0]
    counts = (rows, rows, rows if Reference(*options[:REFERENCE_COUNT]).is_given else 0)
    statistics = (hidden.new_empty(count, dtype=dtype) for count in counts)
    return (*statistics, *gradient_fakes(hidden, weight, bias, options[-4:-1]))


linear_grpo_loss_fwd = define(
    "linear_grpo_loss_fwd",
    f"({HEAD_SCHEMA}, {REFERENCE_SCHEMA}, Tensor ids, {FLAT_SCHEMA}, int[] options, float[] params, "
    f"{COMPARISON_SCHEMA}, bool need_dhidden, bool need_dweight, bool need_dbias, int? max_live_rows) -> "
    "(Tensor logprobs, Tensor entropy, Tensor divergence, Tensor dhidden, Tensor dweight, Tensor dbias)",
    _fake,
    {backend: partial(_fwd, backend) for backend in KERNEL_BACKENDS},
)
