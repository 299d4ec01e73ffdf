"""What rewards read of a completion: its text, its tokens, the scripts of its letters."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

# The first word of a letter's Unicode name is its script, but for these. Chinese and Japanese share theirs.
_SAME_SCRIPT = dict.fromkeys(("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "BOPOMOFO"), "HAN")
#: Scripts written without spaces: each letter is a word.
UNSPACED = frozenset({"HAN", "THAI", "LAO", "KHMER", "MYANMAR"})


def completion_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """What the model wrote: the string itself, or the texts of the assistant's messages, a line break between two.

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
    """A message whose parts, if all are texts, are one text; raises ValueError where it has no role, text or parts."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"a chat message must have a role and a content, got {message!r:.80}")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        raise ValueError(f"the content of a chat message must be a text or parts, got {content!r:.80}")
    is_text = all(part.get("type", "text") == "text" and isinstance(part.get("text"), str) for part in content)
    return {**message, "content": message_text(message)} if is_text else message


def completion_tokens(reward: str, columns: Mapping[str, Any]) -> list[list[int]]:  # [B]
    """The column ``completion_ids``; raises ValueError, naming the reward, where it is not there."""
    if columns.get("completion_ids") is None:
        names = ", ".join(sorted(columns)) or "none"
        raise ValueError(f"{reward} needs the column completion_ids, one list of tokens per completion; it has {names}")
    return columns["completion_ids"]


@lru_cache(maxsize=4096)
def script_of(character: str) -> str:
    """The script of a letter; empty for anything else."""
    if unicodedata.category(character)[0] != "L":
        return ""
    name = unicodedata.name(unicodedata.normalize("NFKC", character)[0], "").partition(" ")[0]
    return _SAME_SCRIPT.get(name, name)
