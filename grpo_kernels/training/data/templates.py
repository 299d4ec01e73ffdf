"""Prompt templates: how a row's question becomes the text that a completion continues.

A rendered prompt may hold the beginning of the completion, its *opening*: a ``<think>`` that the template ends in, the
assistant's own words that a conversation ends in, or the ``completion_prefix`` of a row that starts in the middle of a
solution. What a model samples lacks it; a reward that looks at the form of a completion needs ``whole_completion``.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import yaml
from transformers import PreTrainedTokenizerBase

from grpo_kernels.errors import ThirdPartyError, third_party_error
from grpo_kernels.rewards.completions import message_text
from grpo_kernels.training.data.files import Row

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
_LOGGER = logging.getLogger(__name__)


class PromptFormat(NamedTuple):
    """How prompts are rendered: the keys of a recipe that say so."""

    template: str | None = None
    system_prompt: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None


class ChatText(str):
    """A prompt that a chat template rendered: the special tokens that it begins with stand in the text already."""


def mapping(name: str, value: Any) -> dict[str, Any]:
    """A mapping, or the one that a text in YAML or JSON says; raises ValueError, with the name, for anything else."""
    try:
        content = yaml.safe_load(value) if isinstance(value, str) else value
    except (yaml.YAMLError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{name} must be a mapping, got {value!r}")
    return content


def check_template(template: str | None) -> None:
    """Raises ValueError unless a template is None, a name, or a text with ``{prompt}`` in it."""
    if template is not None and template not in TEMPLATES and "{prompt}" not in template:
        raise ValueError(
            f"prompt_template must be one of {', '.join(TEMPLATES)}, or a text with {{prompt}} in it, got {template!r}"
        )


def render_prompts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat) -> list[str]:
    """The text that each row's completion continues; as ``render_prompt``."""
    return [render_prompt(row, tokenizer, *prompt_format) for row in rows]


def render_prompt(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The text that a row's completion continues.

    Args:
        row: Its ``prompt`` is a text or a list of chat messages. A last message of the assistant's is continued, and
            stands as it is after the generation prompt if the template would change it. A ``completion_prefix`` is
            taken from the end of the prompt, if it stands there, and put after the rendered question. A chat template
            is given the row's ``tools``, JSON schemas, and ``chat_template_kwargs``.
        tokenizer: Its chat template renders messages.
        template: "none" (the text as it is), "r1_zero", "chat" (the tokenizer's chat template), or a text in which
            ``{prompt}`` is replaced and other braces stay. None is "chat" for messages, and for a text with a system
            prompt, arguments of a chat template or tools; for any other text it is "none".
        system_prompt: Put before messages that do not begin with a system message; a text template takes none.
        chat_template_kwargs: As Qwen3's ``{"enable_thinking": False}``; a row's own win over these.

    Raises:
        ValueError: The template is unknown or missing, or takes no system prompt or no conversation.
        ThirdPartyError: The tokenizer's chat template refuses the messages, as one that knows no system role does.
    """
    check_template(template)
    prompt, prefix = question(row), row.get("completion_prefix") or ""
    own = {name: _decoded(name, row[name]) for name in ("chat_template_kwargs", "tools") if row.get(name)}
    if template is None:
        is_text = isinstance(prompt, str) and system_prompt is None and not chat_template_kwargs and not own
        template = "none" if is_text else "chat"
    if template == "chat":
        kwargs = mapping("column chat_template_kwargs", own.pop("chat_template_kwargs", {}))
        options = {**(chat_template_kwargs or {}), **kwargs, **own}
        if tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template: set prompt_template, and no system_prompt")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system_prompt}, *messages]
        return ChatText(_render_chat(messages, prefix, partial(_apply_template, tokenizer, options)))
    for name, value in (("system_prompt", system_prompt), ("chat_template_kwargs", chat_template_kwargs)):
        if value:
            raise ValueError(f"{name} must be None for the text template {template!r}, got {value!r}")
    request, answer_start = _split_answer(prompt)
    if not isinstance(request, str):
        if len(request) != 1 or request[0]["role"] != "user":
            roles = ", ".join(message["role"] for message in prompt)
            raise ValueError(f"the template {template!r} takes a text or one user message, got messages of {roles}")
        request = message_text(request[0])
    rendered = TEXT_TEMPLATES.get(template, template).replace("{prompt}", request)
    return join_texts(rendered, _without_opened_tag(prefix or answer_start, rendered))


def encode_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of rendered prompts: all but a chat template's get special ones, none a second begin-of-text token."""
    ids: list[list[int]] = []
    for kind, group in groupby(prompts, key=type):
        texts = [str(prompt) for prompt in group]
        try:
            ids += tokenizer(texts, add_special_tokens=kind is not ChatText)["input_ids"]
        except Exception as error:
            whose = f"the tokenizer {tokenizer.name_or_path!r} failed on {len(texts)} prompts"
            raise third_party_error(whose, error) from error
    bos = tokenizer.bos_token_id
    return [tokens[1:] if bos is not None and tokens[:2] == [bos, bos] else tokens for tokens in ids]


def rows_that_fit(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    *,
    max_completion_length: int,
    max_prompt_length: int | None = None,
    context_length: int | None = None,  # of a prompt and its completion
    what: str = "training",  # names the rows in messages
    least: int = 1,
) -> list[Row]:
    """The rows whose prompt has a token, is no longer than ``max_prompt_length`` and leaves room for a completion.

    What is left out is counted in a warning. Raises ValueError where fewer rows than ``least`` are left.
    """
    limit = math.inf if max_prompt_length is None else max_prompt_length
    if context_length is not None:
        if max_completion_length >= context_length:
            raise ValueError(
                f"max_completion_length must be less than the context of {context_length} tokens, "
                f"got {max_completion_length}"
            )
        limit = min(limit, context_length - max_completion_length)
    lengths = [len(ids) for ids in encode_prompts(render_prompts(rows, tokenizer, prompt_format), tokenizer)]
    empty, long = lengths.count(0), sum(length > limit for length in lengths)
    if empty:
        _LOGGER.warning("%d of %d %s prompts have no token and are left out", empty, len(rows), what)
    if long:
        _LOGGER.warning("%d of %d %s prompts are longer than %d tokens and left out; the longest has %d",
                        long, len(rows), what, limit, max(lengths))  # fmt: skip
    fitting = [row for row, length in zip(rows, lengths, strict=True) if 0 < length <= limit]
    if len(fitting) < least:
        at_most = "" if limit == math.inf else f" and at most {limit} tokens"
        raise ValueError(
            f"at least {least} {what} prompts must have a token{at_most}, got {len(fitting)} of {len(rows)}"
        )
    return fitting


def question(row: Row) -> str | list[dict[str, Any]]:
    """A row's prompt without the ``completion_prefix`` at its end."""
    prompt, prefix = row["prompt"], row.get("completion_prefix")
    if not prefix:
        return prompt
    if isinstance(prompt, str):
        return prompt.removesuffix(prefix).removesuffix(" ") if prompt.endswith(prefix) else prompt
    return prompt[:-1] if prompt[-1]["role"] == "assistant" and prompt[-1]["content"] == prefix else prompt


def prompt_key(row: Row) -> Hashable:
    """A row's question up to white space and letter case; of a chat, every message."""
    prompt = question(row)
    texts = [prompt] if isinstance(prompt, str) else [message_text(message) for message in prompt]
    return tuple(" ".join(text.split()).casefold() for text in texts)


def completion_opening(row: Row, rendered_prompt: str) -> str:
    """What of the completion already stands at the end of its rendered prompt; empty if nothing does."""
    opening = row.get("completion_prefix") or _split_answer(row["prompt"])[1]
    return opening or (OPENING_TAG if rendered_prompt.rstrip().endswith(OPENING_TAG) else "")


def whole_completion(row: Row, rendered_prompt: str, completion: str) -> str:
    """A sampled completion with its opening before it: what format and language rewards must look at."""
    return join_texts(completion_opening(row, rendered_prompt), completion)


def remaining_completion(row: Row, rendered_prompt: str, completion: str) -> str:
    """A worked completion without its opening, if it has one that its rendered prompt has too: what to teach."""
    return completion.removeprefix(completion_opening(row, rendered_prompt))


def join_texts(first: str, second: str) -> str:
    """Both texts, with a space between them where neither brings white space."""
    if not first or not second or first[-1].isspace() or second[0].isspace():
        return first + second
    return f"{first} {second}"


def _without_opened_tag(opening: str, rendered_prompt: str) -> str:
    """The beginning of a completion without the ``<think>`` that its prompt ends in already."""
    if rendered_prompt.rstrip().endswith(OPENING_TAG) and opening.lstrip().startswith(OPENING_TAG):
        return opening.lstrip().removeprefix(OPENING_TAG).lstrip()
    return opening


def _split_answer(prompt: str | list[dict[str, Any]]) -> tuple[str | list[dict[str, Any]], str]:
    """A prompt without the assistant's message that a conversation ends with, and the text of that message."""
    if isinstance(prompt, str) or not prompt or prompt[-1]["role"] != "assistant":
        return prompt, ""
    text = message_text(prompt[-1])
    others = [name for name, value in prompt[-1].items() if name not in ("role", "content") and value]
    if others and not text.strip():  # a call of a tool, or reasoning alone, which no template can go on with
        raise ValueError(f"a conversation cannot end with the assistant's {' and '.join(others)}, which has no text")
    return prompt[:-1], text if text.strip() else ""


def _decoded(column: str, value: Any) -> Any:
    """A column's value, which may be JSON text; there too a field that is null is not there."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_hook=lambda fields: {k: v for k, v in fields.items() if v is not None})
    except ValueError as error:
        raise ValueError(f"column {column} must be JSON, got {value!r:.80}") from error


def _render_chat(messages: list[dict[str, Any]], prefix: str, apply: Callable[..., str]) -> str:
    """Messages up to where the completion begins, and the beginning that it has, by a tokenizer's template."""
    history, answer_start = _split_answer(messages)
    # a template may take <think> out of an answer, or put another before it
    if answer_start and not answer_start.lstrip().startswith(OPENING_TAG):
        try:
            return apply(messages, continue_final_message=True)
        except ThirdPartyError as error:
            if not isinstance(error.__cause__, ValueError):  # transformers', where the template leaves the message out
                raise
    rendered = apply(history, add_generation_prompt=True)
    opening = _without_opened_tag(answer_start or prefix, rendered)
    return rendered + opening if answer_start else join_texts(rendered, opening)


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], messages: list[dict[str, Any]], **more: bool
) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options, **more)
    except Exception as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise third_party_error(f"the chat template of {name!r} failed on messages of {roles}", error) from error
