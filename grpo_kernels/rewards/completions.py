"""A completion as text: functions are given a string, or chat messages where the prompt is a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    return "\n".join(message_text(message) for message in completion if message.get("role") == "assistant")


def message_text(message: Mapping[str, Any]) -> str:
    """The text of a message; empty where it has none, as one that calls a tool."""
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        return "".join(part.get("text") or "" for part in content)
    return "" if content is None else str(content)


def plain_message(message: Any) -> dict[str, Any]:
    """A message whose parts, if they are all texts, are one text, as chat templates of texts want it.

    Raises:
        ValueError: It has no role, or a content that is no text.
    """
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"a chat message must have a role and a content, got {message!r:.80}")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message
    is_parts = isinstance(content, list) and len(content) > 0 and all(isinstance(part, dict) for part in content)
    if is_parts and all(part.get("type", "text") == "text" and isinstance(part.get("text"), str) for part in content):
        return {**message, "content": message_text(message)}
    if is_parts:  # images and the like, for a template that knows them
        return message
    raise ValueError(f"the content of a chat message must be a text or parts, got {content!r:.80}")
