"""A completion as text: functions are given a string, or chat messages where the prompt is a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def completion_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """What the model wrote: the string itself, or the contents of the assistant's messages, a line break between two.

    Args:
        completion: A string, or messages as TRL hands them to reward functions: ``[{"role": "assistant", "content":
            "..."}]``. Content in parts counts by its texts; other roles, as a tool's, do not count.

    Example:
        >>> completion_text([{"role": "assistant", "content": "<answer>4</answer>"}])
        '<answer>4</answer>'
    """
    if isinstance(completion, str):
        return completion
    return "\n".join(_content(message) for message in completion if message.get("role") == "assistant")


def _content(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)
