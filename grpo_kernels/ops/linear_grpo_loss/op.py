"""The public ``linear_grpo_loss``, its registered op and its autograd function."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import registry
from grpo_kernels.config import GRPOLossConfig, Param, PolicyLossCode
from grpo_kernels.ops.device_values import check_device_values
from grpo_kernels.ops.gradients import hand_over, refuse_double_backward
from grpo_kernels.ops.group_advantages import group_advantages
from grpo_kernels.ops.grpo_loss.op import (
    GRPOLossOutput,
    check_group_rewards,
    grpo_loss_fwd,
    loss_of_tokens,
    reference_loss,
)
from grpo_kernels.ops.library import KERNEL_BACKENDS, define
from grpo_kernels.ops.linear_token_logprobs import reference as linear_reference
from grpo_kernels.ops.linear_token_logprobs.head import HeadGradients, held_ids, make_head
from grpo_kernels.ops.linear_token_logprobs.inputs import check_head, check_workspace, head_dtypes
from grpo_kernels.ops.linear_token_logprobs.op import HEAD_SCHEMA, gradient_fakes, linear_token_logprobs
from grpo_kernels.ops.linear_token_logprobs.rows import Rows, is_capturing, pack_rows, row_chunks
from grpo_kernels.ops.policy_loss.inputs import FLAT_SCHEMA, PolicyInputs
from grpo_kernels.ops.policy_loss.op import policy_loss_fwd, policy_metrics
from grpo_kernels.ops.token_logprobs.op import accumulation_dtype, token_ids
from grpo_kernels.ops.token_logprobs.transform import TRANSFORM_SCHEMA, Transform
from grpo_kernels.ops.validation import check_id_range

#: A chunk with more dead rows than this is packed: below it moving the live ones costs more than their GEMMs save.
_WORTH_PACKING = 1 / 8


def _fwd(  # type: ignore[no-untyped-def]
    backend, hidden, weight, bias, compute_dtype, logits_dtype, workspace_bytes, ids, mask, *options
) -> tuple[Tensor, ...]:
    *per_token, code, params, temperature, softcap, logit_scale, need_dhidden, need_dweight, need_dbias = options
    needs = (need_dhidden, need_dweight, need_dbias)
    loss = (None, None, 1, False, 0.0, code, params, temperature, softcap, logit_scale)
    head = make_head(backend, weight, bias, compute_dtype, logits_dtype)
    grads = HeadGradients(head, hidden, needs)
    rows = Rows.of(mask, _may_be_live(params, *per_token) if any(needs) else torch.zeros_like(mask), ids)
    chunks = [
        chunk
        for begin, end in ((0, rows.live), (rows.live, rows.count))
        for chunk in row_chunks(begin, end, head.row_bytes, workspace_bytes, head.multiple)
    ]
    workspace = head.workspace(max((c.stop - c.start for c in chunks), default=0))
    ids = held_ids(backend, ids, mask, head.vocab)
    ids, row_mask, *per_token = (rows.take(x) for x in (ids, mask, *per_token))
    logprobs, entropy = (hidden.new_empty(rows.count, dtype=accumulation_dtype(logits_dtype)) for _ in range(2))
    for chunk in chunks:
        inputs = head.inputs(hidden, rows, chunk)
        logits = head.logits(inputs, workspace)
        has_gradient = any(needs) and chunk.start < rows.live
        dlogits = head.gradient(workspace, inputs.shape[0]) if has_gradient else None
        logprobs[chunk], entropy[chunk], live, _ = grpo_loss_fwd[backend](
            logits[None],
            ids[None, chunk],
            row_mask[None, chunk],
            *(None if x is None else x[chunk] for x in per_token),
            *loss,
            None if dlogits is None else dlogits[None],
        )
        if dlogits is not None:
            live = live[0] if _may_be_clipped(params, *per_token) else None
            _add_live(grads, dlogits, inputs, live, rows.part(chunk))
    return (*(rows.put_back(x, mask.shape[0]) for x in (logprobs, entropy)), *grads.results())


def _may_be_live(  # type: ignore[no-untyped-def]
    params, advantages, policy_weights, kl_weights, entropy_weights, old_logprobs, ref_logprobs
) -> Tensor:
    """The tokens whose coefficient is not known to be 0 before their logits are."""
    live = (advantages != 0) & (policy_weights != 0)
    if ref_logprobs is not None and params[Param.BETA] != 0:
        live = live | (kl_weights != 0)
    return live if entropy_weights is None else live | (entropy_weights != 0)


def _may_be_clipped(  # type: ignore[no-untyped-def]
    params, advantages, policy_weights, kl_weights, entropy_weights, old_logprobs, ref_logprobs
) -> bool:
    """Whether a token's coefficient may turn out to be 0 once its ratio is known."""
    has_other_terms = entropy_weights is not None or (ref_logprobs is not None and params[Param.BETA] != 0)
    is_off_policy = old_logprobs is not None or params[Param.DELTA] < 1
    return is_off_policy and not has_other_terms and not is_capturing(advantages.device)


def _add_live(
    grads: HeadGradients, dlogits: Tensor, inputs: Tensor, live: Tensor | None, which: Tensor | slice
) -> None:
    """Adds a chunk, without its dead rows if they are known and many."""
    index = None if live is None else live.nonzero()[:, 0]
    if index is None or index.shape[0] >= (1 - _WORTH_PACKING) * inputs.shape[0]:
        grads.add(dlogits, inputs, which)
        return
    rows = index + which.start if isinstance(which, slice) else which[index]
    grads.add(pack_rows(dlogits, index), inputs[index], rows)


def _fake(hidden, weight, bias, compute_dtype, logits_dtype, workspace_bytes, ids, *options):  # type: ignore[no-untyped-def]
    dtype = accumulation_dtype(logits_dtype)
    statistics = (torch.empty_like(ids, dtype=dtype) for _ in range(2))
    return (*statistics, *gradient_fakes(hidden, weight, bias, options[-3:]))


_FWD = define(
    "linear_grpo_loss_fwd",
    f"({HEAD_SCHEMA}, Tensor ids, {FLAT_SCHEMA}, int[] options, float[] params, {TRANSFORM_SCHEMA}, "
    "bool need_dhidden, bool need_dweight, bool need_dbias) -> "
    "(Tensor logprobs, Tensor entropy, Tensor dhidden, Tensor dweight, Tensor dbias)",
    _fake,
    {backend: partial(_fwd, backend) for backend in KERNEL_BACKENDS},
)


class _LinearGRPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtypes: tuple[torch.dtype, torch.dtype],
        workspace_bytes: int,
        ids: Tensor,
        inputs: PolicyInputs,
        code: PolicyLossCode,
        transform: Transform,
        needs: tuple[bool, bool, bool],
        backend: str,
    ) -> tuple[Tensor, ...]:
        logprobs, entropy, *grads = _FWD[backend](
            hidden.detach().reshape(-1, hidden.shape[-1]),
            weight,
            bias,
            *dtypes,
            workspace_bytes,
            token_ids(ids).view(-1),
            *inputs.flat(),
            code.options,
            code.params,
            *transform,
            *needs,
        )
        loss, _, partials = policy_loss_fwd(logprobs, entropy, inputs, code, backend)
        logprobs, entropy = logprobs.view(ids.shape), entropy.view(ids.shape)
        ctx.save_for_backward(*(grad if need else None for grad, need in zip(grads, needs, strict=True)))
        ctx.options = (hidden.shape, backend)
        ctx.mark_non_differentiable(logprobs, entropy, partials)
        ctx.set_materialize_grads(False)
        return loss, logprobs, entropy, partials

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_double_backward()
        if dloss is None:
            return (None,) * 11
        shape, backend = ctx.options
        grads = hand_over(ctx, dloss, backend)
        dhidden = None if grads[0] is None else grads[0].view(shape)
        return (dhidden, *grads[1:], *(None,) * 8)


def linear_grpo_loss(
    hidden_states: Tensor,  # [B, T, H]; packed [N, H]
    lm_head_weight: Tensor,  # [V, H]
    completion_ids: Tensor,  # [B, T]; packed [N]
    advantages: Tensor | None,  # [B] or [B, T]; packed [S] or [N]
    completion_mask: Tensor,  # like completion_ids
    *,
    bias: Tensor | None = None,  # [V]
    rewards: Tensor | None = None,  # [B] or [B, K]
    num_generations: int | None = None,
    scale_rewards: str = "group",
    old_logprobs: Tensor | None = None,  # like completion_ids
    ref_logprobs: Tensor | None = None,  # like completion_ids
    sampling_logprobs: Tensor | None = None,  # like completion_ids
    rollout_is_weights: Tensor | None = None,  # like completion_ids, or [B, 1]; packed [N] or [S, 1]
    entropy_threshold: Tensor | float | None = None,
    num_items_in_batch: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    loss_scale: float = 1.0,
    config: GRPOLossConfig = GRPOLossConfig(),  # noqa: B008  frozen
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    max_logits_bytes: int = 0,
    workspace_bytes: int | None = None,
    debug: bool = False,
    backend: str = "auto",
) -> GRPOLossOutput:
    """The GRPO loss from hidden states, in chunks of tokens: the logits never exist as a whole.

    ``grpo_loss`` of ``h W^T + b``. At token level each chunk is projected once, its rows become their own gradient
    while they are at hand, and ``dX`` and ``dW`` are formed from the live rows, those whose coefficient is not 0:
    ``2 N H V (1 + 2 f)`` operations at a live share ``f``, a frozen head ``2 N H V (1 + f)``. Masked rows are not
    projected at all. A sequence-level ratio, and weights that wait for log-probabilities (VESPO's, the masks by entropy
    and by policy), are ``linear_token_logprobs`` followed by ``policy_loss``.

    Args:
        hidden_states: Position ``t`` predicts token ``t``.
        lm_head_weight: The head, tied or not, of the same dtype; under autocast both are rounded to its dtype.
        completion_ids, advantages, completion_mask, rewards, num_generations, scale_rewards, old_logprobs,
            ref_logprobs, sampling_logprobs, rollout_is_weights, entropy_threshold, num_items_in_batch,
            cu_seqlens, loss_scale, config, softcap,
            logit_scale, debug: As for ``grpo_loss``.
        bias, logits_dtype, workspace_bytes: As for ``linear_token_logprobs``.
        max_logits_bytes: As for ``linear_token_logprobs``, where that is what runs; no effect where one pass does.
        backend: "auto", or one of ``grpo_kernels.registry.BACKENDS``. "torch" forms the whole logits.

    Returns:
        ``GRPOLossOutput``; only ``loss`` is differentiable. A second backward is refused.

    Raises:
        TypeError: A dtype does not fit.
        ValueError: As for ``grpo_loss`` and ``linear_token_logprobs``.
        RuntimeError: The named backend cannot run here.

    Example:
        >>> hidden, head = torch.randn(2, 3, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
        >>> ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)
        >>> linear_grpo_loss(hidden, head, ids, torch.tensor([1.0, -1.0]), mask).loss.backward()
    """
    check_head(hidden_states, lm_head_weight, bias, completion_ids, "completion_ids")
    transform = Transform.of(config.temperature, softcap, logit_scale)
    dtypes = head_dtypes(hidden_states, lm_head_weight, logits_dtype)
    workspace = check_workspace(
        workspace_bytes, max_logits_bytes, lm_head_weight.shape[0], dtypes[1], hidden_states.device
    )
    backend = registry.resolve("linear_grpo_loss", backend, hidden_states.device)
    check_group_rewards(advantages, rewards, num_generations, scale_rewards, completion_ids, cu_seqlens, debug)
    if rewards is not None:
        advantages = group_advantages(rewards, num_generations, scale_rewards=scale_rewards, backend=backend)
    inputs = PolicyInputs.of(
        completion_ids,
        accumulation_dtype(dtypes[0]),
        advantages,
        completion_mask,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampling_logprobs=sampling_logprobs,
        rollout_is_weights=rollout_is_weights,
        entropy_threshold=entropy_threshold,
        num_items_in_batch=num_items_in_batch,
        cu_seqlens=cu_seqlens,
        loss_scale=loss_scale,
        config=config,
        debug=debug,
    )
    check_id_range("completion_ids", completion_ids, inputs.mask, lm_head_weight.shape[0], debug)
    if debug:
        check_device_values(hidden_states.device)
    if backend == "torch":
        logits = linear_reference.project(hidden_states, lm_head_weight, bias, inputs.mask, *dtypes)
        return reference_loss(logits, completion_ids, inputs, softcap, logit_scale, config)
    inputs, config = inputs.token_local(config)
    if not config.is_token_local:
        tokens = linear_token_logprobs(
            hidden_states,
            lm_head_weight,
            completion_ids,
            bias=bias,
            temperature=config.temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            mask=inputs.mask,
            outputs=("entropy",),
            logits_dtype=logits_dtype,
            max_logits_bytes=max_logits_bytes,
            workspace_bytes=workspace_bytes,
            backend=backend,
        )
        return loss_of_tokens(tokens, inputs, config, backend)
    grad = torch.is_grad_enabled()
    needs = tuple(grad and x is not None and x.requires_grad for x in (hidden_states, lm_head_weight, bias))
    loss, logprobs, entropy, partials = _LinearGRPOLoss.apply(
        hidden_states,
        lm_head_weight,
        bias,
        dtypes,
        workspace,
        completion_ids,
        inputs,
        config.code(),
        transform,
        needs,
        backend,
    )
    return GRPOLossOutput(loss, logprobs, entropy, policy_metrics(partials, config, True))
