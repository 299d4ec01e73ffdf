"""The public ``group_advantages`` and its registered ops."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import backends
from grpo_kernels.device_values import check_device_values
from grpo_kernels.named_arguments import check_keywords
from grpo_kernels.ops.registration import define, lazy_import
from grpo_kernels.ops.tokens import reference
from grpo_kernels.ops.tokens.advantage_estimators import ESTIMATORS, NEED_LENGTHS, NEED_TWO, Groups
from grpo_kernels.validation import check_device, check_integer, check_number, check_real, check_shape, may_read

SCALE_REWARDS = ("group", "batch", "none")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
EPS = 1e-4  # TRL's
FLATTEN_TABLE = "flatten a table of prompts and their completions, rewards.flatten()"  # in messages


_OPS = define(
    "group_advantages",
    {
        "rewards": "Tensor",
        "weights": "Tensor",
        "num_generations": "int",
        "scale_rewards": "int",
        "aggregation": "int",
        "eps": "float",
    },
    "Tensor",
    lambda rewards, *_: rewards.new_empty(rewards.shape[0]),
    {"triton": lazy_import("grpo_kernels.ops.tokens.triton.group_advantages", "group_advantages")},
)


@check_keywords()
def group_advantages(
    rewards: Tensor,  # [B] or [B, K]
    num_generations: int,
    *,
    scale_rewards: str = "group",
    reward_weights: Tensor | None = None,  # [K]
    aggregation: str = "sum_then_normalize",
    estimator: str = "grpo",
    completion_lengths: Tensor | None = None,  # [B]
    baseline_rewards: Tensor | None = None,  # [B / num_generations]
    eps: float = EPS,
    debug: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Advantage of each completion: its reward, normalised within its group.

        A_i = (r_i - mean_group r) / (std_group r + eps)

    Example:
        >>> group_advantages(torch.tensor([0.0, 1.0, 1.0, 1.0]), num_generations=2, scale_rewards="none")
        tensor([-0.5000,  0.5000,  0.0000,  0.0000])

    DeepSeekMath section 4.1.2 (arXiv:2402.03300); the deviation is unbiased, as in TRL. Arithmetic is fp32, or fp64 for
    fp64 input; weighted sums are fp64 and rounded once. Not differentiable.

    Args:
        rewards: Unitless; ``num_generations`` consecutive completions are a group. With ``K`` reward functions, one
            column each. A table of prompts and their completions, ``[P, num_generations]``, must be flattened: where
            ``num_generations`` divides ``P``, its columns are taken for reward functions. NaN marks a missing reward:
            such a completion does not enter the group's mean and deviation, and its advantage is 0.
        num_generations: Completions per prompt; divides ``B``.
        scale_rewards: Divide by the deviation of the "group", of the whole "batch", or by nothing ("none",
            Dr. GRPO, arXiv:2503.20783).
        reward_weights: Weight of each reward function; None means 1.
        aggregation: "sum_then_normalize", or "normalize_then_sum" (GDPO, arXiv:2601.05242): every reward function is
            normalised within the group, then their weighted sum within the batch.
        estimator: "grpo"; or, in torch on every device, "dr_grpo" (no deviation), "rloo" (leave one out), "gpg"
            (divided by the share of nonzero rewards), "passk" (the best's lead over the second), "opo" (a baseline
            weighted by length), "remax" (a greedy completion's reward as baseline), "reinforce++" and
            "reinforce++_baseline" (whitened over the batch's tokens). ``advantage_estimators.py`` has the equations.
        completion_lengths: Tokens of each completion, for "opo" and the "reinforce++" ones.
        baseline_rewards: Reward of each prompt's greedy completion, for "remax".
        eps: Added to the deviation.
        debug: Check values on a GPU too, and the flags of earlier kernels (``check_device_values``): syncs.
        backend: "auto", or one of ``grpo_kernels.BACKENDS``.

    Returns:
        Advantages ``[B]``, fp32 or fp64. Exactly 0 for a group whose rewards are all equal.

    Raises:
        TypeError: ``rewards`` is not a tensor of real numbers.
        ValueError: Shapes do not fit, ``num_generations`` does not divide ``B``, an option is unknown, or a reward is
            infinite (read on the CPU, elsewhere with ``debug``).
        RuntimeError: The named backend cannot run here.
    """
    _check_choice("scale_rewards", scale_rewards, SCALE_REWARDS)
    _check_choice("aggregation", aggregation, AGGREGATIONS)
    _check_choice("estimator", estimator, ("grpo", *ESTIMATORS))
    check_number("eps", eps)
    check_rewards(rewards, num_generations, debug)
    _check_estimator(estimator, num_generations, scale_rewards, aggregation)
    _check_optional("completion_lengths", completion_lengths, estimator, NEED_LENGTHS, rewards, rewards.shape[0])
    groups = rewards.shape[0] // num_generations
    _check_optional("baseline_rewards", baseline_rewards, estimator, ("remax",), rewards, groups)
    if debug:
        check_device_values(rewards.device)
    with torch.no_grad():
        dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
        table = rewards.to(dtype).reshape(rewards.shape[0], -1)
        if reward_weights is None:
            weights = table.new_ones(table.shape[1])
        else:
            check_device(rewards.device, [("reward_weights", reward_weights)])
            check_shape("reward_weights", reward_weights, (table.shape[1],))
            weights = reward_weights.to(dtype)
        if estimator != "grpo":
            if backend not in ("auto", "torch"):
                raise RuntimeError(f"backend {backend!r} cannot run group_advantages: {estimator!r} has torch's alone")
            total = reference.weighted_sum(table, weights, table.isnan())
            shape = (groups, num_generations)
            lengths = torch.ones_like(total) if completion_lengths is None else completion_lengths.to(dtype)
            baselines = total[:0] if baseline_rewards is None else baseline_rewards.to(dtype)
            inputs = Groups(total.view(shape), lengths.view(shape), baselines, scale_rewards == "group", eps)
            return ESTIMATORS[estimator](inputs).reshape(-1).nan_to_num(nan=0.0)
        backend = backends.resolve("group_advantages", backend, rewards.device)
        if backend == "torch":
            return reference.group_advantages(table, weights, num_generations, scale_rewards, aggregation, eps)
        return _OPS[backend](
            table.contiguous(),
            weights.contiguous(),
            num_generations,
            SCALE_REWARDS.index(scale_rewards),
            AGGREGATIONS.index(aggregation),
            eps,
        )


def check_rewards(rewards: Tensor, num_generations: int, debug: bool) -> None:
    """Raises TypeError or ValueError unless rewards are whole groups of ``num_generations``, finite or NaN."""
    check_real("rewards", rewards)
    if rewards.dim() not in (1, 2) or rewards.numel() == 0:
        raise ValueError(f"rewards must have shape [B] or [B, K], none of them 0, got {list(rewards.shape)}")
    check_integer("num_generations", num_generations)
    if num_generations < 1 or rewards.shape[0] % num_generations:
        is_table = rewards.dim() == 2 and rewards.shape[1] == num_generations
        way_out = f": {FLATTEN_TABLE}" if is_table else ""
        if not is_table and rewards.dim() == 2 and num_generations > 0 and rewards.shape[1] % num_generations == 0:
            way_out = ": a row is a completion and a column a reward function, rewards.T"
        raise ValueError(
            f"num_generations must be at least 1 and divide the batch of {rewards.shape[0]} rewards, "
            f"got {num_generations}{way_out}"
        )
    if not may_read(rewards, debug):
        return
    infinite = rewards.isinf()
    if infinite.any():
        at = infinite.nonzero()[0].tolist()
        raise ValueError(f"rewards must be finite or NaN, got {rewards[tuple(at)].item()} at {at}")


def _check_estimator(estimator: str, num_generations: int, scale_rewards: str, aggregation: str) -> None:
    if estimator in NEED_TWO and num_generations < 2:
        raise ValueError(f'num_generations must be at least 2 with estimator="{estimator}", got {num_generations}')
    if estimator == "grpo":
        return
    if scale_rewards != "group" and not (estimator == "passk" and scale_rewards == "none"):
        raise ValueError(f'scale_rewards has no effect with estimator="{estimator}", got {scale_rewards!r}')
    if aggregation != "sum_then_normalize":
        raise ValueError(f'aggregation must be "sum_then_normalize" with estimator="{estimator}", got {aggregation!r}')


def _check_optional(
    name: str, values: Tensor | None, estimator: str, needed_by: tuple[str, ...], rewards: Tensor, count: int
) -> None:
    if (values is not None) != (estimator in needed_by):
        verb, got = ("must be given", "None") if values is None else ("must be None", "a tensor")
        raise ValueError(f'{name} {verb} with estimator="{estimator}", got {got}')
    if values is not None:
        check_device(rewards.device, [(name, values)])
        check_shape(name, values, (count,))


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
