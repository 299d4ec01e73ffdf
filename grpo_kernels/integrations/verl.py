"""verl through these kernels: its registries of policy losses and advantage estimators, and its fused head's hook.

    import grpo_kernels.integrations.verl as kernels
    kernels.register()  # policy_loss.loss_mode=grpo_kernels_vanilla, algorithm.adv_estimator=grpo_kernels_grpo
    kernels.apply()     # model.use_fused_kernels=True with impl_backend=triton

in every worker, before it builds its model. Nothing of verl is replaced by ``register``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.loss.config import GRPOLossConfig
from grpo_kernels.ops.head.linear_token_logprobs import linear_token_logprobs
from grpo_kernels.ops.tokens.group_advantages import group_advantages
from grpo_kernels.ops.tokens.policy_loss import policy_loss

__all__ = ["apply", "linear_cross_entropy", "register", "unapply"]

TESTED = "0.9.1"
LOSS_MODES = ("vanilla", "gspo", "gpg", "sapo", "cispo", "geo_mean", "clip_cov", "kl_cov")
#: verl's name of an estimator, ours, and what verl adds to a deviation.
ESTIMATORS = {
    "grpo": ("grpo", 1e-6),
    "grpo_passk": ("passk", 1e-6),
    "rloo": ("rloo", None),
    "opo": ("opo", None),
    "gpg": ("gpg", None),
    "remax": ("remax", None),
    "reinforce_plus_plus": ("reinforce++", None),
    "reinforce_plus_plus_baseline": ("reinforce++_baseline", None),
}
_PREFIX = "grpo_kernels_"


def register(*, backend: str = "auto") -> None:
    """Registers ``grpo_kernels_<name>`` for verl's loss modes and advantage estimators of those names.

    Args:
        backend: Of the losses: "auto", or one of ``grpo_kernels.BACKENDS``.

    Raises:
        ImportError: verl is not installed.
        ValueError: An estimator of such a name, not ours, is registered.
    """
    core = _core_algos()
    for mode in LOSS_MODES:
        core.register_policy_loss(_PREFIX + mode)(partial(compute_policy_loss, loss_mode=mode, backend=backend))
    for name in ESTIMATORS:
        core.register_adv_est(_PREFIX + name)(_ESTIMATES[name])


def _core_algos() -> Any:
    try:
        from verl.trainer.ppo import core_algos
    except ImportError as error:
        raise ImportError(f"grpo_kernels.integrations.verl needs verl, tested with {TESTED}: {error}") from error
    return core_algos


def compute_policy_loss(
    old_log_prob: Tensor,  # [B, T]
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    loss_mode: str = "vanilla",
    backend: str = "auto",
) -> tuple[Tensor, dict[str, float]]:
    """verl's policy loss of a mode, by verl's arguments: the loss over the global batch, and verl's metrics.

    Args:
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, rollout_is_weights: verl's.
        config: verl's ``ActorConfig``, which holds the clip range and the global batch's counts.
        loss_mode: One of ``LOSS_MODES``.
        backend: As for ``policy_loss``.
    """
    is_sum = loss_agg_mode == "token-sum"
    mode = "token-mean" if is_sum else loss_agg_mode
    loss_config = _loss_config(config, loss_mode, mode, response_mask.shape[-1])
    counts = dict(config.global_batch_info) | ({"batch_num_tokens": 1} if is_sum else {})
    num_items, scale = _normaliser(counts, loss_config, response_mask)
    # verl gives one value a token, also of what is one a completion
    per_completion = loss_config.loss_type == "gmpo"
    loss, metrics = policy_loss(
        log_prob,
        (advantages * response_mask).sum(-1) / response_mask.sum(-1).clamp(min=1) if per_completion else advantages,
        response_mask,
        old_logprobs=old_log_prob,
        rollout_is_weights=rollout_is_weights,
        num_items_in_batch=num_items,
        loss_scale=scale,
        config=loss_config,
        backend=backend,
    )
    with torch.no_grad():
        kept = response_mask != 0
        approx_kl = torch.where(kept, old_log_prob - log_prob, 0).sum() / kept.sum().clamp(min=1)
        found = {"actor/ppo_kl": approx_kl}
        if "clip_ratio/region_mean" in metrics:
            found["actor/pg_clipfrac"] = metrics["clip_ratio/region_mean"]
        if loss_config.delta is not None:
            is_lower = kept & (advantages < 0) & (log_prob - old_log_prob > math.log(loss_config.delta))
            found["actor/pg_clipfrac_lower"] = is_lower.sum() / kept.sum().clamp(min=1)
        return loss, {name: value.item() for name, value in found.items()}


def _loss_config(config: Any, loss_mode: str, loss_agg_mode: str, length: int) -> GRPOLossConfig:
    of_loss = config.policy_loss
    return GRPOLossConfig.verl(
        loss_mode=loss_mode,
        loss_agg_mode="seq-mean-token-mean" if loss_mode == "sapo" else loss_agg_mode,
        loss_scale_factor=config.global_batch_info.get("loss_scale_factor") or length,
        clip_ratio=config.clip_ratio,
        clip_ratio_low=config.clip_ratio_low,
        clip_ratio_high=config.clip_ratio_high,
        clip_ratio_c=config.get("clip_ratio_c", 3.0),
        tau_pos=config.tau_pos,
        tau_neg=config.tau_neg,
        clip_cov_ratio=of_loss.clip_cov_ratio,
        clip_cov_lb=of_loss.clip_cov_lb,
        clip_cov_ub=of_loss.clip_cov_ub,
        kl_cov_ratio=of_loss.kl_cov_ratio,
        ppo_kl_coef=of_loss.ppo_kl_coef,
    )


def _normaliser(counts: Mapping[str, Any], config: GRPOLossConfig, mask: Tensor) -> tuple[float | Tensor | None, float]:
    """What a mean over tokens divides by, and the scale that makes a local mean a share of the global one."""
    processes = counts.get("dp_size", 1)
    if config.aggregation == "token-mean":
        if counts.get("batch_num_tokens") is None and processes > 1:
            raise ValueError("batch_num_tokens must be given when dp_size > 1, got None")
        return counts.get("batch_num_tokens"), float(processes)
    if config.loss_agg_mode is None:  # gmpo's mean is local, as verl's is
        return None, 1.0
    if counts.get("global_batch_size") is None:
        if processes > 1:
            raise ValueError("global_batch_size must be given when dp_size > 1, got None")
        return None, 1.0
    local = (mask.sum(-1) > 0).sum().item()
    return None, processes * local / counts["global_batch_size"]


def _estimate(name: str, token_level_rewards: Tensor, response_mask: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """Advantages ``[B, T]`` and returns of verl's estimator of this name, by verl's arguments."""
    ours, eps = ESTIMATORS[name]
    scores = token_level_rewards.sum(-1)
    config = given.get("config")
    options: dict[str, Any] = {} if eps is None else {"eps": given.get("epsilon", eps)}
    if name in ("grpo", "grpo_passk") and not _option(given, config, "norm_adv_by_std_in_grpo", True):
        options = {"scale_rewards": "none"}
    if ours == "reinforce++" and (config is not None and config.gamma != 1):
        raise ValueError(f"gamma must be 1 for this estimator, got {config.gamma!r}")
    lengths = response_mask.sum(-1)
    if ours in ("remax", "reinforce++"):
        _check_outcome(token_level_rewards, response_mask)
    advantages = torch.zeros_like(scores)
    for rows, size in _groups(given.get("index"), scores.shape[0], ours):
        extra = dict(options)
        if ours in ("opo", "reinforce++", "reinforce++_baseline"):
            extra["completion_lengths"] = lengths[rows]
        if ours == "remax":
            extra["baseline_rewards"] = given["reward_baselines"][rows][::size]
        is_alone = size == 1 and ours in ("grpo", "rloo", "opo")  # to verl its advantage is its reward
        found = scores[rows] if is_alone else group_advantages(scores[rows], size, estimator=ours, **extra)
        advantages[rows] = found.to(advantages.dtype)
    spread = advantages[:, None] * response_mask
    return spread, spread


def _check_outcome(rewards: Tensor, mask: Tensor) -> None:
    """Raises ValueError where tokens before the last have rewards, which verl adds up from the end for these two."""
    is_last = mask.flip(-1).cumsum(-1).flip(-1) == 1
    if bool(((rewards != 0) & (mask != 0) & ~is_last).any()):
        raise ValueError("token_level_rewards must be 0 but at a completion's last token for this estimator")


def _option(given: Mapping[str, Any], config: Any, name: str, default: Any) -> Any:
    if name in given:
        return given[name]
    return default if config is None else config.get(name, default)


def _groups(index: Any, count: int, estimator: str) -> list[tuple[Tensor, int]]:
    """Rows whose groups have one size, members next to each other, and that size."""
    if index is None or estimator in ("remax", "reinforce++"):  # of which each completion is its own group
        return [(torch.arange(count), 1)]
    members: dict[Any, list[int]] = {}
    for row, key in enumerate(index):
        members.setdefault(key, []).append(row)
    by_size: dict[int, list[int]] = {}
    for rows in members.values():
        by_size.setdefault(len(rows), []).extend(rows)
    if estimator in ("gpg", "reinforce++_baseline") and len(by_size) > 1:
        raise ValueError(f"groups must be of one size to be scaled together, got sizes {sorted(by_size)}")
    return [(torch.tensor(rows), size) for size, rows in by_size.items()]


_ESTIMATES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {name: partial(_estimate, name) for name in ESTIMATORS}


def linear_cross_entropy(
    hidden: Tensor,  # [B, T, H] or [N, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [B, T] or [N]
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies ``[N]``, flattened, as verl's function of this name gives them.

    Raises:
        ValueError: The reduction is not "none", or a vocabulary divided over processes is asked for.
    """
    if reduction.lower() != "none":
        raise ValueError(f'reduction must be "none", got {reduction!r}')
    if dist_process_group is not None:
        raise ValueError("dist_process_group must be None: a vocabulary divided over processes is not served")
    found = linear_token_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        temperature=temperature,
        outputs=("entropy",),
    )
    return found.logprobs, found.entropy  # type: ignore[return-value]


_REPLACED: list[Any] = []


def apply() -> None:
    """Puts ``linear_cross_entropy`` where verl's model forwards look theirs up; a second call changes nothing.

    Raises:
        ImportError: verl is not installed.
    """
    if _REPLACED:
        return
    module = _kernel_module()
    _REPLACED.append(module.linear_cross_entropy)
    module.linear_cross_entropy = linear_cross_entropy


def unapply() -> None:
    """Puts verl's own back."""
    if _REPLACED:
        _kernel_module().linear_cross_entropy = _REPLACED.pop()


def _kernel_module() -> Any:
    try:
        from verl.utils.kernel import linear_cross_entropy as module
    except ImportError as error:
        raise ImportError(f"grpo_kernels.integrations.verl needs verl, tested with {TESTED}: {error}") from error
    return module
