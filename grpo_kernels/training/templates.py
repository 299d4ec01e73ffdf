"""Prompt templates: how a row's question becomes the text that a completion continues.

A rendered prompt may hold the beginning of the completion, its *opening*: a template that ends in ``<think>``, a chat
template that adds ``<think>`` to the assistant's turn, or a row that starts in the middle of a solution. What a model
samples then lacks that beginning. A reward that looks at the whole form of a completion, as the format reward does,
must be given ``whole_completion(...)``, or it calls every such sample malformed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo_kernels.training.tasks import Row

# The structure of DeepSeek-R1-Zero's template (arXiv:2501.12948, table 1) in other words. It ends without <think>.
R1_ZERO = (
    "The following is a conversation between User and Assistant. User poses a problem, and Assistant solves it. Before "
    "replying, Assistant works the problem out step by step. The reasoning stands between <think> and </think>, the "
    "result alone between <answer> and </answer>, in this order: <think> the reasoning </think> <answer> the result "
    "</answer>. User: {prompt} Assistant:"
)

TEXT_TEMPLATES = {"none": "{prompt}", "r1_zero": R1_ZERO}
TEMPLATES = (*TEXT_TEMPLATES, "chat")
OPENING_TAG = "<think>"


class ChatText(str):
    """A prompt that a chat template rendered: the special tokens that it begins with stand in the text already."""

    __slots__ = ()


def check_template(template: str | None) -> None:
    """Raises ValueError unless ``template`` is None, a name, or a text with ``{prompt}`` in it."""
    if template is not None and template not in TEMPLATES and "{prompt}" not in template:
        raise ValueError(
            f"prompt_template must be one of {', '.join(TEMPLATES)}, or a text with {{prompt}} in it, got {template!r}"
        )


def render_prompt(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    system_prompt: str | None = None,
) -> str:
    """The text that a row's completion continues.

    Args:
        row: Its ``prompt`` is a text or a list of chat messages. A ``completion_prefix`` is taken from the end of the
            prompt, if it stands there, and put after the rendered question: in a chat, into the assistant's turn.
        tokenizer: Its chat template renders messages.
        template: "none" (the text as it is), "r1_zero", "chat" (the tokenizer's chat template), or a text in which
            ``{prompt}`` is replaced and other braces stay. None is "chat" for messages and for a text with a system
            prompt, and "none" for a text without one.
        system_prompt: Put before the messages; a text template has its own words and takes none.

    Raises:
        ValueError: The template is unknown, takes no system prompt or no conversation of several messages, or the
            tokenizer has no chat template.
    """
    check_template(template)
    prompt, prefix = question(row), row.get("completion_prefix") or ""
    if template is None:
        template = "none" if isinstance(prompt, str) and system_prompt is None else "chat"
    if template == "chat":
        rendered = _chat(prompt, tokenizer, system_prompt)
    else:
        if system_prompt is not None:
            raise ValueError(f"system_prompt must be None for the text template {template!r}, got {system_prompt!r}")
        rendered = TEXT_TEMPLATES.get(template, template).replace("{prompt}", _text(prompt, template))
    if _opens_reasoning(rendered) and prefix.startswith(OPENING_TAG):
        prefix = prefix.removeprefix(OPENING_TAG).lstrip()
    found = joined(rendered, prefix)
    return ChatText(found) if template == "chat" else found


def encode_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of rendered prompts; the tokenizer adds its special ones to all but those of a chat template."""
    found: dict[int, list[int]] = {}
    for is_chat in (False, True):
        own = [i for i, prompt in enumerate(prompts) if isinstance(prompt, ChatText) == is_chat]
        if own:
            texts = [str(prompts[i]) for i in own]
            found |= zip(own, tokenizer(texts, add_special_tokens=not is_chat)["input_ids"], strict=True)
    return [found[i] for i in range(len(prompts))]


def question(row: Row) -> str | list[dict[str, Any]]:
    """A row's prompt without the ``completion_prefix`` at its end."""
    prompt, prefix = row["prompt"], row.get("completion_prefix")
    if not prefix:
        return prompt
    if isinstance(prompt, str):
        return prompt.removesuffix(prefix).removesuffix(" ") if prompt.endswith(prefix) else prompt
    ends_in_prefix = prompt[-1]["role"] == "assistant" and prompt[-1]["content"] == prefix
    return prompt[:-1] if ends_in_prefix else prompt


def completion_opening(row: Row, rendered_prompt: str) -> str:
    """What of the completion already stands at the end of its rendered prompt; empty if nothing does.

    That is the row's ``completion_prefix``, or else a ``<think>`` that the prompt ends in. A ``<think>`` in the middle
    of a prompt, as in instructions, opens nothing.
    """
    return row.get("completion_prefix") or (OPENING_TAG if _opens_reasoning(rendered_prompt) else "")


def whole_completion(row: Row, rendered_prompt: str, completion: str) -> str:
    """A sampled completion with its opening before it: what format and language rewards must look at."""
    return joined(completion_opening(row, rendered_prompt), completion)


def remaining_completion(row: Row, rendered_prompt: str, completion: str) -> str:
    """A worked completion without its opening, if it has one that its rendered prompt has too: what to teach."""
    return completion.removeprefix(completion_opening(row, rendered_prompt))


def _opens_reasoning(rendered_prompt: str) -> bool:
    return rendered_prompt.rstrip().endswith(OPENING_TAG)


def joined(first: str, second: str) -> str:
    """Both texts, with a space between them where neither brings white space."""
    if not first or not second or first[-1].isspace() or second[0].isspace():
        return first + second
    return f"{first} {second}"


def _text(prompt: str | list[dict[str, Any]], template: str) -> str:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) != 1 or prompt[0]["role"] != "user":
        roles = ", ".join(message["role"] for message in prompt)
        raise ValueError(f"the template {template!r} takes a text or one user message, got messages of {roles}")
    return prompt[0]["content"]


def _chat(prompt: str | list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> str:
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: set prompt_template, and no system_prompt")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system_prompt is not None:
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
