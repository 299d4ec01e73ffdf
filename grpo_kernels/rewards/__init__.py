"""Reward functions, and how the loop calls them: as TRL does, by keyword.

    f(prompts=..., completions=..., completion_ids=..., **columns) -> list[float | None]

``columns`` are the dataset's other columns and ``trainer_state``, ``log_metric`` and ``log_extra``. A completion is a
string, or a list of one message where the prompt is a chat. A function may be asynchronous. A None abstains: the
completion has no reward of this function. A sequence classifier is a reward model.
"""

from typing import TYPE_CHECKING, Any

from grpo_kernels.reward_shaping import kl_penalized_rewards, mask_truncated
from grpo_kernels.rewards.completions import completion_text
from grpo_kernels.rewards.registry import (
    BUILT_IN,
    RewardFunction,
    check_name,
    import_function,
    look_in,
    resolve,
    reward_factory,
)  # fmt: skip

if TYPE_CHECKING:
    from grpo_kernels.rewards.answers import accuracy_reward, exact_match_reward, extract_answer, math_accuracy_reward
    from grpo_kernels.rewards.code import CodeReward
    from grpo_kernels.rewards.language import LanguageConsistencyReward, reasoning_of
    from grpo_kernels.rewards.length import CosineLengthReward, LengthReward, OverlongReward
    from grpo_kernels.rewards.program_text import extract_program
    from grpo_kernels.rewards.reward_model import RewardModel
    from grpo_kernels.rewards.scoring import RewardLog, columns_of, score, total
    from grpo_kernels.rewards.text import RepetitionReward, format_reward, tag_count_reward

__all__ = [
    "BUILT_IN", "CodeReward", "CosineLengthReward", "LanguageConsistencyReward", "LengthReward", "OverlongReward",
    "RepetitionReward", "RewardFunction", "RewardLog", "RewardModel", "accuracy_reward", "check_name", "columns_of",
    "completion_text", "exact_match_reward", "extract_answer", "extract_program", "format_reward",
    "kl_penalized_rewards", "look_in", "mask_truncated", "math_accuracy_reward", "reasoning_of", "resolve",
    "reward_factory", "score", "tag_count_reward", "total",
]  # fmt: skip

# Where __getattr__ finds the names that are imported above for type checkers alone.
_LAZY = (*BUILT_IN.values(), *(f"grpo_kernels.rewards.{name}" for name in (
    "answers:extract_answer", "language:reasoning_of", "program_text:extract_program", "reward_model:RewardModel",
    "scoring:RewardLog", "scoring:columns_of", "scoring:score", "scoring:total",
)))  # fmt: skip


def __getattr__(name: str) -> Any:
    for path in _LAZY:
        if path.partition(":")[2] == name:
            return import_function(path)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
