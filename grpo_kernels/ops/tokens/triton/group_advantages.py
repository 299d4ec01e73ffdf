"""Triton kernels of ``group_advantages`` and their launcher: one program per group, in fp64 as rewards are few."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.device_values import first_bad
from grpo_kernels.ops.tokens.triton.launch import check_tokens

_BLOCK = 256  # rewards per block
_WARPS = 8  # one reward per thread; with two, registers spill around the calls of the fp64 division
_GROUP, _BATCH, _NONE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # in the order of SCALE_REWARDS
_NORMALIZE_THEN_SUM = 1  # in the order of AGGREGATIONS


@triton.jit
def _rewards(table_ptr, weights_ptr, rows, inside, functions, first, count):
    """Weighted sum of each row over ``count`` reward functions from ``first``, rounded once; NaN if all are NaN."""
    total = tl.zeros(rows.shape, tl.float64)
    scored = tl.zeros(rows.shape, tl.int32)
    for k in range(first, first + count):
        value = tl.load(table_ptr + rows * functions + k, mask=inside, other=float("nan")).to(tl.float64)
        weight = scored.to(tl.float64) * 0.0 + 1.0
        if weights_ptr is not None:
            weight = weight * tl.load(weights_ptr + k).to(tl.float64)
        total += tl.where(value == value, value * weight, 0.0)
        scored += (value == value).to(tl.int32)
    total = total.to(table_ptr.dtype.element_ty).to(tl.float64)
    return tl.where(scored > 0, total, float("nan"))


@triton.jit
def moments(table_ptr, weights_ptr, begin, size, functions, first, count, BLOCK: tl.constexpr):
    """Mean, unbiased standard deviation (0 for fewer than two), minimum and maximum of the rewards that are not NaN."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    present = tl.zeros([BLOCK], tl.float64)
    low = tl.full([BLOCK], float("inf"), tl.float64)
    high = tl.full([BLOCK], float("-inf"), tl.float64)
    for start in range(0, size, BLOCK):
        inside = start + lanes < size
        value = _rewards(table_ptr, weights_ptr, begin + start + lanes, inside, functions, first, count)
        is_present = value == value
        total += tl.where(is_present, value, 0.0)
        present += is_present.to(tl.float64)
        low = tl.where(value < low, value, low)
        high = tl.where(value > high, value, high)
    number = tl.sum(present, 0)
    mean = tl.sum(total, 0) / tl.where(number > 0, number, 1.0)
    squares = tl.zeros([BLOCK], tl.float64)
    for start in range(0, size, BLOCK):
        inside = start + lanes < size
        value = _rewards(table_ptr, weights_ptr, begin + start + lanes, inside, functions, first, count)
        squares += tl.where(value == value, (value - mean) * (value - mean), 0.0)
    std = tl.sqrt(tl.sum(squares, 0) / tl.where(number > 1, number - 1.0, 1.0))
    return mean, std, tl.min(low, 0), tl.max(high, 0)


@triton.jit
def normalized(value, mean, std, low, high, eps, IS_SCALED: tl.constexpr):
    """``(value - mean) / (std + eps)``; 0 if all rewards of the group are equal. NaN stays NaN."""
    centred = tl.where(low >= high, value * 0.0, value - mean)
    return centred / (std + eps) if IS_SCALED else centred


@triton.jit
def write_group_advantages(
    rewards_ptr,  # [S], in whole groups
    advantages_ptr,  # [S]
    sequences,
    size,  # of a group
    eps,
    first_bad_ptr,  # [4]
    IS_SCALED: tl.constexpr,
    LANES: tl.constexpr,
):
    """Writes the advantage of every completion; 0 if its reward is missing.

    Each lane handles one completion and reads the whole group: rewards are few, and no thread waits for another.
    """
    for start in range(0, sequences, LANES):
        s = start + tl.arange(0, LANES).to(tl.int64)
        inside = s < sequences
        group_ptr = rewards_ptr + s // size * size
        total = tl.zeros([LANES], tl.float64)
        present = tl.zeros([LANES], tl.int32)
        low = tl.full([LANES], float("inf"), tl.float64)
        high = tl.full([LANES], float("-inf"), tl.float64)
        for i in range(0, size):
            value = tl.load(group_ptr + i, mask=inside, other=0.0).to(tl.float64)
            is_present = value == value
            total += tl.where(is_present, value, 0.0)
            present += is_present.to(tl.int32)
            low = tl.where(value < low, value, low)
            high = tl.where(value > high, value, high)
        mean = total / tl.maximum(present, 1).to(tl.float64)
        squares = tl.zeros([LANES], tl.float64)
        for i in range(0, size):
            value = tl.load(group_ptr + i, mask=inside, other=0.0).to(tl.float64)
            squares += tl.where(value == value, (value - mean) * (value - mean), 0.0)
        std = tl.sqrt(squares / tl.maximum(present - 1, 1).to(tl.float64))
        reward = tl.load(rewards_ptr + s, mask=inside, other=0.0).to(tl.float64)
        tl.atomic_min(first_bad_ptr + 1 + s * 0, s, mask=inside & (tl.abs(reward) == float("inf")))
        value = normalized(reward, mean, std, low, high, eps, IS_SCALED)
        value = tl.where(value == value, value, 0.0)
        tl.store(advantages_ptr + s, value.to(advantages_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch", "size", "functions", "summed"])
def _normalize_kernel(
    table_ptr,  # [batch, functions]
    weights_ptr,  # [functions] or None
    out_ptr,  # [batch, functions / summed]
    first_bad_ptr,  # [4]
    batch,
    size,  # of a group
    functions,
    summed,  # number of adjacent functions that are summed to one reward
    eps: tl.float64,
    SCALE: tl.constexpr,
    MEAN_IS_ZERO: tl.constexpr,  # whether to take every mean to be 0
    NAN_TO_ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = functions // summed
    column = tl.program_id(0) % columns
    first = column * summed
    begin = (tl.program_id(0) // columns).to(tl.int64) * size
    mean, std, low, high = moments(table_ptr, weights_ptr, begin, size, functions, first, summed, BLOCK)
    if MEAN_IS_ZERO:
        mean = mean * 0.0  # a constant 0 makes Triton 3.9 use stack memory
    if SCALE == _BATCH:
        _, std, _, _ = moments(table_ptr, weights_ptr, begin * 0, batch, functions, first, summed, BLOCK)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, size, BLOCK):
        inside = start + lanes < size
        rows = begin + start + lanes
        value = _rewards(table_ptr, weights_ptr, rows, inside, functions, first, summed)
        tl.atomic_min(first_bad_ptr + 1 + rows * 0, rows, mask=inside & (tl.abs(value) == float("inf")))
        value = normalized(value, mean, std, low, high, tl.full([], eps, tl.float64), SCALE != _NONE)
        if NAN_TO_ZERO:
            value = tl.where(value == value, value, 0.0)
        tl.store(out_ptr + rows * columns + column, value.to(out_ptr.dtype.element_ty), mask=inside)


def group_advantages(
    rewards: Tensor,  # [B, K]
    weights: Tensor,  # [K]
    num_generations: int,
    scale_rewards: int,
    aggregation: int,
    eps: float,
) -> Tensor:  # [B]
    """The registered op."""
    if rewards.dim() != 2 or num_generations < 1 or rewards.shape[0] % num_generations:
        raise ValueError(f"rewards [B, K] must be whole groups of {num_generations}, got {list(rewards.shape)}")
    check_tokens(rewards.numel(), rewards.dtype, rewards=rewards)
    check_tokens(rewards.shape[1], rewards.dtype, weights=weights)
    batch, functions = rewards.shape
    advantages = rewards.new_empty(batch)
    bad = first_bad(rewards.device)
    groups = batch // num_generations
    options = {"BLOCK": _BLOCK, "num_warps": _WARPS}
    mean_is_zero = aggregation == _NORMALIZE_THEN_SUM
    if mean_is_zero:
        table = torch.empty_like(rewards)
        sizes = (batch, num_generations, functions, 1)
        column_options = options | {"SCALE": _GROUP.value, "MEAN_IS_ZERO": False, "NAN_TO_ZERO": False}
        _normalize_kernel[(groups * functions,)](rewards, None, table, bad, *sizes, eps, **column_options)
        rewards, groups, num_generations, scale_rewards = table, 1, batch, _GROUP.value
    sizes = (batch, num_generations, functions, functions)
    options |= {"SCALE": scale_rewards, "MEAN_IS_ZERO": mean_is_zero, "NAN_TO_ZERO": True}
    _normalize_kernel[(groups,)](rewards, weights, advantages, bad, *sizes, eps, **options)
    return advantages
