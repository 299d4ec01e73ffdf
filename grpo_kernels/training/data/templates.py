"""Prompt templates: how a row's question becomes the text that a completion continues.

A rendered prompt may hold the beginning of the completion, its *opening*: a template that ends in ``<think>``, a chat
template that adds ``<think>`` to the assistant's turn, a conversation that ends in the assistant's own words, or a row
that starts in the middle of a solution. What a model samples then lacks that beginning. A reward that looks at the
whole form of a completion, as the format reward does, must be given ``whole_completion(...)``, or it calls every such
sample malformed.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from grpo_kernels.errors import ThirdPartyError, third_party_error
from grpo_kernels.rewards.completions import message_text, plain_message
from grpo_kernels.training.arguments import mapping
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

    __slots__ = ()


def check_template(template: str | None) -> None:
    """Raises ValueError unless ``template`` is None, a name, or a text with ``{prompt}`` in it."""
    if template is not None and template not in TEMPLATES and "{prompt}" not in template:
        raise ValueError(
            f"prompt_template must be one of {', '.join(TEMPLATES)}, or a text with {{prompt}} in it, got {template!r}"
        )


def render_prompts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat) -> list[str]:
    """The text that each row's completion continues; arguments and errors are ``render_prompt``'s."""
    return [render_prompt(row, tokenizer, *prompt_format) for row in rows]


def render_prompt(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The text that a row's completion continues.

    A conversation that ends with the assistant is continued in its last message. A template that takes something out of
    that message, as reasoning, is not given it: the message then stands, as it is, after the generation prompt.

    Args:
        row: Its ``prompt`` is a text or a list of chat messages. A ``completion_prefix`` is taken from the end of the
            prompt, if it stands there, and put after the rendered question: in a chat, into the assistant's turn.
            A chat template is given its ``tools``, JSON schemas, and its ``chat_template_kwargs``.
        tokenizer: Its chat template renders messages.
        template: "none" (the text as it is), "r1_zero", "chat" (the tokenizer's chat template), or a text in which
            ``{prompt}`` is replaced and other braces stay. None is "chat" for messages, and for a text with a system
            prompt, arguments of a chat template or tools; for any other text it is "none".
        system_prompt: Put before messages that do not begin with a system message of their own; a text template has
            its own words and takes none.
        chat_template_kwargs: What a chat template is given, as Qwen3's ``{"enable_thinking": False}``. A row's own
            win over these.

    Raises:
        ValueError: The template is unknown, takes no system prompt or no conversation of several messages, or the
            tokenizer has no chat template.
        ThirdPartyError: The tokenizer's chat template refuses the messages, as one that knows no system role does.
    """
    check_template(template)
    prompt = question(row)
    own = {name: _decoded(row, name) for name in ("chat_template_kwargs", "tools") if row.get(name)}
    if template is None:
        is_text = isinstance(prompt, str) and system_prompt is None and not chat_template_kwargs and not own
        template = "none" if is_text else "chat"
    if template == "chat":
        kwargs = mapping("column chat_template_kwargs", own.pop("chat_template_kwargs", {}))
        chat = _Chat(tokenizer, {**(chat_template_kwargs or {}), **kwargs, **own})
        return ChatText(chat.rendered(prompt, system_prompt, row.get("completion_prefix") or ""))
    for name, value in (("system_prompt", system_prompt), ("chat_template_kwargs", chat_template_kwargs)):
        if value:
            raise ValueError(f"{name} must be None for the text template {template!r}, got {value!r}")
    text, prefix = _text(prompt, template), row.get("completion_prefix") or _prefilled(prompt)
    return _continued(TEXT_TEMPLATES.get(template, template).replace("{prompt}", text), prefix)


def encode_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of rendered prompts.

    The tokenizer adds its special ones to all but those of a chat template. A prompt that begins with the
    begin-of-text token already, as one that was rendered beforehand does, does not get a second.

    Raises:
        ThirdPartyError: The tokenizer failed.
    """
    ids: dict[int, list[int]] = {}
    for is_chat in (False, True):
        own = [i for i, prompt in enumerate(prompts) if isinstance(prompt, ChatText) == is_chat]
        if own:
            texts = [str(prompts[i]) for i in own]
            try:
                encoded = tokenizer(texts, add_special_tokens=not is_chat)["input_ids"]
            except Exception as error:
                whose = f"the tokenizer {tokenizer.name_or_path!r} failed on {len(texts)} prompts"
                raise third_party_error(whose, error) from error
            ids |= zip(own, encoded, strict=True)
    return [_without_second_bos(ids[i], tokenizer.bos_token_id) for i in range(len(prompts))]


def rows_that_fit(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    *,
    max_completion_length: int,
    max_prompt_length: int | None = None,
    context_length: int | None = None,
    what: str = "training",
    least: int = 1,
) -> list[Row]:
    """The rows whose prompt has a token, is no longer than ``max_prompt_length`` and leaves room for a completion.

    What is left out is counted in a warning.

    Args:
        rows: Problems.
        tokenizer: Of their prompts.
        prompt_format: How they are rendered.
        max_completion_length: Tokens that a completion must have room for.
        max_prompt_length: Tokens of a prompt at most; None where there is no bound but the context.
        context_length: Tokens of a prompt and its completion; None where there is no bound.
        what: Names the rows in messages.
        least: How many must be left.

    Raises:
        ValueError: There is no room for a prompt, or fewer rows are left.
    """
    limits = [] if max_prompt_length is None else [max_prompt_length]
    if context_length is not None:
        room = context_length - max_completion_length
        if room < 1:
            raise ValueError(
                f"max_completion_length must be less than the context of {context_length} tokens, "
                f"got {max_completion_length}"
            )
        limits.append(room)
    limit = min(limits, default=math.inf)
    texts = render_prompts(rows, tokenizer, prompt_format)
    lengths = [len(ids) for ids in encode_prompts(texts, tokenizer)]
    empty, long = lengths.count(0), sum(length > limit for length in lengths)
    if empty:
        _LOGGER.warning("%d of %d %s prompts have no token and are left out", empty, len(rows), what)
    if long:
        _LOGGER.warning("%d of %d %s prompts are longer than %d tokens and left out; the longest has %d",
                        long, len(rows), what, limit, max(lengths))  # fmt: skip
    fitting = [row for row, length in zip(rows, lengths, strict=True) if 0 < length <= limit]
    if len(fitting) < least:
        at_most = f" and at most {limit} tokens" if limits else ""
        raise ValueError(
            f"at least {least} {what} prompts must have a token{at_most}, got {len(fitting)} of {len(rows)}"
        )
    return fitting


def _without_second_bos(ids: list[int], bos: int | None) -> list[int]:
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


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

    That is the row's ``completion_prefix``, the assistant's message that its conversation ends with, or else a
    ``<think>`` that the prompt ends in. A ``<think>`` in the middle of a prompt, as in instructions, opens nothing.
    """
    opening = row.get("completion_prefix") or _prefilled(row["prompt"])
    return opening or (OPENING_TAG if _opens_reasoning(rendered_prompt) else "")


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


def _continued(rendered: str, prefix: str, join: Callable[[str, str], str] = join_texts) -> str:
    """A rendered prompt and the beginning of its completion; a ``<think>`` that both have stands there once."""
    if _opens_reasoning(rendered) and prefix.lstrip().startswith(OPENING_TAG):
        prefix = prefix.lstrip().removeprefix(OPENING_TAG).lstrip()
    return join(rendered, prefix)


def _follow(first: str, second: str) -> str:
    return first + second


def _opens_reasoning(rendered_prompt: str) -> bool:
    return rendered_prompt.rstrip().endswith(OPENING_TAG)


def _prefilled(prompt: str | Sequence[dict[str, Any]]) -> str:
    """The assistant's words that a conversation ends with; empty if it does not."""
    is_begun = not isinstance(prompt, str) and len(prompt) > 0 and prompt[-1]["role"] == "assistant"
    text = message_text(prompt[-1]) if is_begun else ""
    return text if text.strip() else ""


def _without_empty_end(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation without an assistant's message that says nothing yet.

    Raises:
        ValueError: That message calls a tool or only reasons, which no template can go on with.
    """
    if messages[-1]["role"] != "assistant":
        return messages
    others = [name for name, value in messages[-1].items() if name not in ("role", "content") and value]
    if others:
        raise ValueError(f"a conversation cannot end with the assistant's {' and '.join(others)}, which has no text")
    return messages[:-1]


def _plain(prompt: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [plain_message(message) for message in _without_none(prompt)]


def _text(prompt: str | list[dict[str, Any]], template: str) -> str:
    if isinstance(prompt, str):
        return prompt
    asked = prompt[:-1] if _prefilled(prompt) else prompt
    if len(asked) != 1 or asked[0]["role"] != "user":
        roles = ", ".join(message["role"] for message in prompt)
        raise ValueError(f"the template {template!r} takes a text or one user message, got messages of {roles}")
    return message_text(asked[0])


def _decoded(row: Row, column: str) -> Any:
    """What a column holds, where it may be JSON text, and fields that other rows have may be filled up with None."""
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"column {column} must be JSON, got {value!r:.80}") from error
    return _without_none(value)


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, (list, tuple)) else value


class _Chat(NamedTuple):
    """A tokenizer's chat template and what it is given beside the messages."""

    tokenizer: PreTrainedTokenizerBase
    options: dict[str, Any]

    def rendered(self, prompt: str | list[dict[str, Any]], system_prompt: str | None, prefix: str) -> str:
        """Messages up to where the completion begins."""
        if self.tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template: set prompt_template, and no system_prompt")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _plain(prompt)
        if system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system_prompt}, *messages]
        prefilled = _prefilled(messages)
        if prefilled.lstrip().startswith(OPENING_TAG):  # which templates take out, or put another before
            return _continued(self._applied(messages[:-1], add_generation_prompt=True), prefilled, _follow)
        if not prefilled:
            return _continued(self._applied(_without_empty_end(messages), add_generation_prompt=True), prefix)
        try:
            return self._applied(messages, continue_final_message=True)
        except ThirdPartyError as error:
            if not isinstance(error.__cause__, ValueError):  # transformers', where the template leaves the message out
                raise
        return _continued(self._applied(messages[:-1], add_generation_prompt=True), prefilled, _follow)

    def _applied(self, messages: list[dict[str, Any]], **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **self.options, **options)
        except Exception as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            name = self.tokenizer.name_or_path or type(self.tokenizer).__name__
            raise third_party_error(f"the chat template of {name!r} failed on messages of {roles}", error) from error
