"""Objectives of pairs of completions, one of which is preferred: DPO, and reward models."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.loss.sequences import Sequences
from grpo_kernels.named_arguments import check_keywords
from grpo_kernels.validation import (
    check_cu_seqlens,
    check_device,
    check_float,
    check_mask,
    check_number,
    check_real,
    check_shape,
)


class PreferenceOutput(NamedTuple):
    """A scalar loss, the only differentiable field, and the implicit rewards of each pair."""

    loss: Tensor
    chosen_rewards: Tensor  # [B]
    rejected_rewards: Tensor  # [B]


@check_keywords()
def dpo_loss(
    logprobs: Tensor | None = None,  # [2 B, T], chosen before rejected; packed [N]
    ref_logprobs: Tensor | None = None,  # like logprobs
    completion_mask: Tensor | None = None,  # like logprobs
    *,
    chosen_logprobs: Tensor | None = None,  # [B, T], or [B] summed over tokens
    rejected_logprobs: Tensor | None = None,  # [B, T'] or [B]
    ref_chosen_logprobs: Tensor | None = None,  # like chosen_logprobs
    ref_rejected_logprobs: Tensor | None = None,  # like rejected_logprobs
    chosen_mask: Tensor | None = None,  # like chosen_logprobs; None for sums
    rejected_mask: Tensor | None = None,  # like rejected_logprobs; None for sums
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
    cu_seqlens: Tensor | None = None,  # [2 B + 1]
) -> PreferenceOutput:
    """Direct preference optimisation of pairs of completions.

    Example:
        >>> logprobs = torch.full((2, 3), -1.0, requires_grad=True)
        >>> dpo_loss(logprobs, torch.full((2, 3), -1.0), torch.ones(2, 3)).loss.item()
        0.6931471824645996
        >>> chosen, rejected = torch.tensor([-3.0, -4.0]), torch.tensor([-5.0, -4.0])  # summed over tokens
        >>> references = {"ref_chosen_logprobs": chosen, "ref_rejected_logprobs": rejected}
        >>> dpo_loss(chosen_logprobs=chosen, rejected_logprobs=rejected, **references).loss.item()
        0.6931471824645996

    With ``h = beta (sum_t log pi/pi_ref of the chosen - of the rejected)``,

        loss = -mean ((1 - eps) log sigmoid(h) + eps log sigmoid(-h))

    arXiv:2305.18290 eq. 7; ``length_normalized`` divides each sum by its number of tokens (TRL's "sigmoid_norm").

    The pairs are one batch, in the first three arguments, or four tensors by name: those of the chosen and of the
    rejected completions under the policy and under the reference.

    Args:
        logprobs: From ``linear_token_logprobs`` or ``token_logprobs``, in nats. Completions ``0 .. B - 1`` are chosen
            over ``B .. 2 B - 1``.
        ref_logprobs: The same tokens under the reference policy. Not differentiated.
        completion_mask: 0 excludes a token, whatever the other inputs hold there.
        chosen_logprobs, rejected_logprobs: Of each token, with their masks, or summed over each completion's tokens.
        ref_chosen_logprobs, ref_rejected_logprobs: The same under the reference policy. Not differentiated.
        chosen_mask, rejected_mask: 0 excludes a token, whatever the other inputs hold there.
        beta: Weight of the divergence from the reference.
        label_smoothing: ``eps``, the share of preferences that are wrong.
        length_normalized: Take the mean over tokens rather than the sum.
        cu_seqlens: Where each packed completion of one batch begins, and the end.

    Returns:
        The loss, and ``beta`` times each completion's log-ratio, detached.

    Raises:
        TypeError: A tensor has a dtype that does not fit.
        ValueError: Shapes or devices do not fit, completions are not pairs, pairs are given in both ways or in neither,
            or a number is out of its range.
    """
    check_number("beta", beta)
    check_number("label_smoothing", label_smoothing)
    if not beta > 0:
        raise ValueError(f"beta must be greater than 0, got {beta!r}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing!r}")
    batch = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "completion_mask": completion_mask}
    of_chosen = {
        "chosen_logprobs": chosen_logprobs,
        "ref_chosen_logprobs": ref_chosen_logprobs,
        "chosen_mask": chosen_mask,
    }
    of_rejected = {
        "rejected_logprobs": rejected_logprobs,
        "ref_rejected_logprobs": ref_rejected_logprobs,
        "rejected_mask": rejected_mask,
    }
    in_parts = [name for name, values in (of_chosen | of_rejected).items() if values is not None]
    if not in_parts:
        if logprobs is None:
            raise ValueError("logprobs must be given, or else chosen_logprobs and rejected_logprobs, got neither")
        chosen, rejected = _log_ratios(batch, cu_seqlens, length_normalized, False).chunk(2)
    elif any(values is not None for values in batch.values()) or cu_seqlens is not None:
        raise ValueError(f"{in_parts[0]} must be None beside one batch of pairs, got both")
    else:
        chosen = _log_ratios(of_chosen, None, length_normalized, True)
        rejected = _log_ratios(of_rejected, None, length_normalized, True)
        check_device(chosen.device, [("rejected_logprobs", rejected)])
        if rejected.shape != chosen.shape:
            counts = f"{chosen.shape[0]}, got {rejected.shape[0]}"
            raise ValueError(f"rejected_logprobs must be of as many completions as chosen_logprobs, {counts}")
    chosen, rejected = beta * chosen, beta * rejected
    margin = chosen - rejected
    right, wrong = (torch.nn.functional.logsigmoid(h) for h in (margin, -margin))
    loss = -((1 - label_smoothing) * right + label_smoothing * wrong).mean()
    return PreferenceOutput(loss, chosen.detach(), rejected.detach())


def _log_ratios(
    inputs: dict[str, Tensor | None], cu_seqlens: Tensor | None, length_normalized: bool, may_be_sums: bool
) -> Tensor:  # -> [S]
    """The log-ratio of each completion, summed over its tokens or their mean.

    Args:
        inputs: Log-probabilities, those of the reference, and the mask, by the names of the public arguments.
        cu_seqlens: Where packed completions begin, and the end.
        length_normalized: Take the mean.
        may_be_sums: Whether one dimension without ``cu_seqlens`` means sums over each completion's tokens.
    """
    name, ref_name, mask_name = inputs
    logprobs, reference, mask = inputs.values()
    check_float(name, logprobs)  # type: ignore[arg-type]
    check_float(ref_name, reference)  # type: ignore[arg-type]
    if logprobs.dim() not in (1, 2):
        wanted = "[B, T] or, summed over tokens, [B]" if may_be_sums else "[2 B, T] or, packed, [N]"
        raise ValueError(f"{name} must have shape {wanted}, got {list(logprobs.shape)}")
    check_shape(ref_name, reference, logprobs.shape)
    check_device(logprobs.device, [(ref_name, reference), (mask_name, mask)])
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    log_ratio = logprobs.to(dtype) - reference.detach().to(dtype)
    if may_be_sums and logprobs.dim() == 1:
        if mask is not None:
            raise ValueError(f"{mask_name} must be None with {name} summed over tokens, got a tensor")
        if length_normalized:
            raise ValueError(f"length_normalized must be False with {name} summed over tokens, got True")
        return log_ratio
    if mask is None:
        raise ValueError(f"{mask_name} must be given with {name} of each token, got None")
    check_mask(mask_name, mask)
    check_shape(mask_name, mask, logprobs.shape)
    check_cu_seqlens(cu_seqlens, logprobs, False)
    sequences = Sequences.of(logprobs, cu_seqlens)
    if not may_be_sums and sequences.count % 2:
        raise ValueError(f"{name} must be of pairs of completions, got {sequences.count} completions")
    mask = mask != 0
    totals = sequences.sum(torch.where(mask, log_ratio, 0))
    return totals / sequences.sum(mask.to(dtype)).clamp(min=1) if length_normalized else totals


@check_keywords()
def reward_model_loss(
    chosen_rewards: Tensor,  # [B]
    rejected_rewards: Tensor,  # [B]
    *,
    margins: Tensor | None = None,  # [B]
    center_coef: float = 0.0,
) -> Tensor:
    """Negative log-likelihood of preferences under the Bradley-Terry model.

        loss = mean (-log sigmoid(r_chosen - r_rejected - margin) + center_coef (r_chosen + r_rejected)^2)

    Example:
        >>> reward_model_loss(torch.tensor([1.0]), torch.tensor([1.0])).item()
        0.6931471824645996

    InstructGPT eq. 1 (arXiv:2203.02155), margins of Llama 2 (arXiv:2307.09288), centring of arXiv:2312.09244.
    Arithmetic is fp32, or fp64 for fp64 input.

    Args:
        chosen_rewards, rejected_rewards: The model's rewards of each pair.
        margins: How much better the chosen one is; None means 0.
        center_coef: Weight of the square of their sum, which keeps rewards around 0.

    Raises:
        TypeError: A tensor does not hold real numbers.
        ValueError: Shapes or devices do not fit.
    """
    check_number("center_coef", center_coef)
    check_real("chosen_rewards", chosen_rewards)
    if chosen_rewards.dim() != 1:
        raise ValueError(f"chosen_rewards must have shape [B], got {list(chosen_rewards.shape)}")
    check_real("rejected_rewards", rejected_rewards)
    check_shape("rejected_rewards", rejected_rewards, chosen_rewards.shape)
    if margins is not None:
        check_real("margins", margins)
        check_shape("margins", margins, chosen_rewards.shape)
    check_device(chosen_rewards.device, [("rejected_rewards", rejected_rewards), ("margins", margins)])
    dtype = torch.float64 if chosen_rewards.dtype == torch.float64 else torch.float32
    chosen, rejected = chosen_rewards.to(dtype), rejected_rewards.to(dtype)
    lead = chosen - rejected if margins is None else chosen - rejected - margins.to(dtype)
    loss = -torch.nn.functional.logsigmoid(lead)
    if center_coef:
        loss = loss + center_coef * (chosen + rejected).square()
    return loss.mean()
