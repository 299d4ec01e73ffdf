"""Changes to rewards and masks before advantages are computed: a KL penalty, and masking of truncated completions."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.loss.options import KL_ESTIMATORS
from grpo_kernels.loss.reference import kl_estimate
from grpo_kernels.loss.sequences import Sequences
from grpo_kernels.named_arguments import check_keywords
from grpo_kernels.validation import (
    check_cu_seqlens,
    check_device,
    check_float,
    check_ids,
    check_mask,
    check_number,
    check_real,
    check_shape,
    is_bool,
)


@check_keywords()
@torch.no_grad()
def kl_penalized_rewards(
    rewards: Tensor,  # [B] or [B, T]; packed [S] or [N]
    logprobs: Tensor,  # [B, T]; packed [N]
    ref_logprobs: Tensor,  # like logprobs
    completion_mask: Tensor,  # like logprobs
    *,
    beta: float,
    kl_estimator: str = "k1",
    kl_clamp: float | None = None,
    cu_seqlens: Tensor | None = None,  # [S + 1]
) -> Tensor:
    """Rewards minus a KL penalty to the reference policy: ``r - beta sum_t k_t``, or ``r_t - beta k_t`` per token.

    Example:
        >>> logprobs, reference = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -2.5]])
        >>> kl_penalized_rewards(torch.tensor([1.0]), logprobs, reference, torch.ones(1, 2), beta=0.1)
        tensor([0.9000])

    InstructGPT eq. 2 (arXiv:2203.02155), as in RLOO, REINFORCE++ and PPO. GRPO has its penalty in the loss instead.

    Args:
        rewards: One per completion, or one per token, unitless.
        logprobs: Log-probabilities of the sampled tokens under the policy that sampled them, in nats.
        ref_logprobs: The same tokens under the frozen reference policy.
        completion_mask: 0 excludes a token, whatever the other inputs hold there.
        beta: Weight of the penalty.
        kl_estimator: One of ``GRPOLossConfig``'s estimators.
        kl_clamp: Bound of a token's estimate on either side; None means none.
        cu_seqlens: Where each packed completion begins, and the end.

    Returns:
        New rewards, like ``rewards``, in fp32, or fp64 for fp64 log-probabilities; without a gradient.

    Raises:
        TypeError: A tensor has a dtype that does not fit.
        ValueError: Shapes or devices do not fit, the estimator is unknown, or a number is out of its range.
    """
    check_real("rewards", rewards)
    check_float("logprobs", logprobs)
    check_float("ref_logprobs", ref_logprobs)
    check_mask("completion_mask", completion_mask)
    for name, values in (("ref_logprobs", ref_logprobs), ("completion_mask", completion_mask)):
        check_shape(name, values, logprobs.shape)
    check_device(
        logprobs.device,
        [("rewards", rewards), ("ref_logprobs", ref_logprobs), ("completion_mask", completion_mask)],
    )
    check_cu_seqlens(cu_seqlens, logprobs, False)
    sequences = Sequences.of(logprobs, cu_seqlens)
    check_shape("rewards", rewards, (sequences.count,), logprobs.shape)
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator must be one of {', '.join(map(repr, KL_ESTIMATORS))}, got {kl_estimator!r}")
    check_number("beta", beta)
    if not (beta >= 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be finite and at least 0, got {beta!r}")
    if kl_clamp is not None:
        check_number("kl_clamp", kl_clamp)
        if not kl_clamp > 0:
            raise ValueError(f"kl_clamp must be None or greater than 0, got {kl_clamp!r}")
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    kl = kl_estimate(logprobs.to(dtype) - ref_logprobs.to(dtype), kl_estimator)
    kl = torch.where(completion_mask != 0, kl if kl_clamp is None else kl.clamp(-kl_clamp, kl_clamp), 0)
    per_completion = rewards.shape == (sequences.count,) and rewards.shape != logprobs.shape
    if per_completion:
        return rewards.to(dtype) - beta * sequences.sum(kl)
    return torch.where(completion_mask != 0, rewards.to(dtype), 0) - beta * kl


@check_keywords()
def mask_truncated(
    completion_ids: Tensor,  # [B, T]; packed [N]
    completion_mask: Tensor,  # like completion_ids
    eos_token_id: int | Sequence[int] | Tensor,
    *,
    cu_seqlens: Tensor | None = None,  # [S + 1]
) -> Tensor:  # like completion_mask
    """The mask without truncated completions, whose last unmasked token is not an end-of-text token.

    Example:
        >>> mask_truncated(torch.tensor([[5, 2, 0], [5, 6, 7]]), torch.tensor([[1, 1, 0], [1, 1, 1]]), 2)
        tensor([[1, 1, 0],
                [0, 0, 0]])

    DAPO's overlong filtering (arXiv:2503.14476), TRL's ``mask_truncated_completions``.

    Args:
        completion_ids: The sampled tokens.
        completion_mask: 0 excludes a token.
        eos_token_id: The id of the end-of-text token, or several; integers of Python, NumPy or torch.
        cu_seqlens: Where each packed completion begins, and the end.

    Returns:
        A mask of the dtype of ``completion_mask``, 0 at every token of such a completion.

    Raises:
        TypeError: A tensor has a dtype that does not fit.
        ValueError: Shapes or devices do not fit, or there is no id.
    """
    check_ids("completion_ids", completion_ids)
    check_mask("completion_mask", completion_mask)
    check_shape("completion_mask", completion_mask, completion_ids.shape)
    check_device(completion_ids.device, [("completion_mask", completion_mask)])
    check_cu_seqlens(cu_seqlens, completion_ids, False)
    ends = torch.tensor(_eos_ids(eos_token_id), device=completion_ids.device)
    sequences = Sequences.of(completion_ids, cu_seqlens)
    mask = completion_mask != 0
    counts = sequences.sum(mask.to(torch.int64))
    rank = mask.flatten().cumsum(0).view(mask.shape)  # of each unmasked token, counted over all completions
    is_last = mask & (rank == sequences.spread(counts.cumsum(0)))
    is_complete = sequences.sum((is_last & torch.isin(completion_ids, ends)).to(torch.int64)) > 0
    return torch.where(sequences.spread(is_complete), completion_mask, completion_mask.new_zeros(()))


def _eos_ids(eos_token_id: Any) -> list[int]:
    ids = eos_token_id.flatten().tolist() if hasattr(eos_token_id, "flatten") else eos_token_id  # a tensor or an array
    ids = list(ids) if isinstance(ids, (list, tuple, set)) else [ids]
    try:
        indices = [operator.index(token) for token in ids if not is_bool(token)]
    except TypeError:  # of text, a fraction or a nested list
        indices = []
    if not ids or len(indices) < len(ids):
        raise ValueError(f"eos_token_id must be an id, or several, got {eos_token_id!r}")
    return indices
