"""Reward functions, ``f(prompts, completions, **columns) -> list[float | None]``, and how the loop calls them.

One may also be asynchronous. A None abstains: the completion has no reward of this function.
"""

from grpo_kernels.training.rewards.answers import (
    accuracy_reward,
    exact_match_reward,
    extract_answer,
    math_accuracy_reward,
)
from grpo_kernels.training.rewards.code import CodeReward, extract_program
from grpo_kernels.training.rewards.language import LanguageConsistencyReward, reasoning_of
from grpo_kernels.training.rewards.length import CosineLengthReward, LengthReward, OverlongReward
from grpo_kernels.training.rewards.registry import BUILT_IN, resolve, reward_factory
from grpo_kernels.training.rewards.scoring import RewardFunction, columns_of, score, total
from grpo_kernels.training.rewards.text import RepetitionReward, format_reward, tag_count_reward

__all__ = [
    "BUILT_IN",
    "CodeReward",
    "CosineLengthReward",
    "LanguageConsistencyReward",
    "LengthReward",
    "OverlongReward",
    "RepetitionReward",
    "RewardFunction",
    "accuracy_reward",
    "columns_of",
    "exact_match_reward",
    "extract_answer",
    "extract_program",
    "format_reward",
    "math_accuracy_reward",
    "reasoning_of",
    "resolve",
    "reward_factory",
    "score",
    "tag_count_reward",
    "total",
]
