"""Chat templates as users have them: prefilled answers, their own arguments, tools, refusals; special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from grpo_kernels import cli
from grpo_kernels.errors import ThirdPartyError
from grpo_kernels.rewards import accuracy_reward, format_reward
from grpo_kernels.training.addition import TASKS, build_model
from grpo_kernels.training.data.rows import load_rows
from grpo_kernels.training.data.templates import (
    PromptFormat,
    encode_prompts,
    render_prompt,
    render_prompts,
    whole_completion,
)
from grpo_kernels.training.recipe import load_recipe
from grpo_kernels.training.rollout import completion_texts, teacher_forced

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
CHAT = TURNS + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
#: As Qwen3's: thinking can be turned off, and reasoning is taken out of what the assistant said.
QWEN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT
TOOLS = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}" + CHAT
USER = {"role": "user", "content": "1 + 1 ="}
TOOL = {"type": "function", "function": {"name": "calculator", "parameters": {"type": "object", "properties": {}}}}


def tokenizer_of(template: str) -> PreTrainedTokenizerBase:
    found = TASKS["addition"].build_tokenizer()
    found.chat_template = template
    return found


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("text", ["Let me think.", "<think>\n1 + 1", "two\n", "x" * 40, "{% raw %}"])
def test_a_conversation_that_ends_with_the_assistant_is_continued(text: str) -> None:
    tokenizer, messages = tokenizer_of(CHAT), [USER, said(text)]
    rendered = render_prompt({"prompt": messages}, tokenizer)
    assert rendered == tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert rendered.startswith(f"<|user|>1 + 1 =<|end|><|assistant|>{text.rstrip()}") and "<|end|>" not in rendered[24:]
    whole = whole_completion({"prompt": messages}, rendered, " it is 2")
    assert whole == text + " it is 2"


def test_a_prefilled_reasoning_counts_as_the_completions_own() -> None:
    row = {"prompt": [USER, said("<think>\n")]}
    rendered = render_prompt(row, tokenizer_of(CHAT))
    whole = whole_completion(row, rendered, "1 + 1 = 2</think><answer>2</answer>")
    assert format_reward(prompts=[row["prompt"]], completions=[[said(whole)]]) == [1.0]


@pytest.mark.parametrize("content", ["<think>\nso", "<think>a</think>b", "<think>a</think>"])
def test_a_template_that_strips_reasoning_does_not_strip_what_is_continued(content: str) -> None:
    rendered = render_prompt({"prompt": [USER, said(content)]}, tokenizer_of(QWEN))
    assert rendered.replace(" <think>", "<think>") == f"<|user|>1 + 1 =<|end|><|assistant|>{content}"


@pytest.mark.parametrize("content", ["", " ", "\n", None])
def test_an_assistants_message_that_says_nothing_is_left_out(content: str | None) -> None:
    for template in (CHAT, QWEN):
        rendered = render_prompt({"prompt": [USER, {"role": "assistant", "content": content}]}, tokenizer_of(template))
        assert rendered == "<|user|>1 + 1 =<|end|><|assistant|>"
        row = {"prompt": [USER, {"role": "assistant", "content": content}]}
        assert render_prompt(row, tokenizer_of(template), "Q: {prompt} A:") == "Q: 1 + 1 = A:"
    only_thoughts = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    with pytest.raises(ValueError, match="a conversation cannot end with the assistant's reasoning_content"):
        render_prompt({"prompt": [USER, only_thoughts]}, tokenizer_of(CHAT))


def test_a_template_that_adds_reasoning_does_not_add_it_before_a_prefilled_one() -> None:
    """As Qwen3's does, in front of what the assistant said last."""
    adds = CHAT.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    )
    row = {"prompt": [USER, said("<think>\n")]}
    assert render_prompt(row, tokenizer_of(adds)) == "<|user|>1 + 1 =<|end|><|assistant|><think>\n"
    opens = CHAT.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}")
    row = {"prompt": [USER, said("<think>\nso")]}
    assert render_prompt(row, tokenizer_of(opens)) == "<|user|>1 + 1 =<|end|><|assistant|><think>\nso"


def test_arguments_of_a_chat_template_make_a_text_a_chat() -> None:
    off = {"enable_thinking": False}
    chat = "<|user|>a<|end|><|assistant|><think>\n\n</think>\n\n"
    assert render_prompt({"prompt": "a"}, tokenizer_of(QWEN), None, None, off) == chat
    assert render_prompt({"prompt": "a", "chat_template_kwargs": off}, tokenizer_of(QWEN)) == chat
    assert render_prompt({"prompt": "a", "tools": [TOOL]}, tokenizer_of(TOOLS)).startswith("[calculator]<|user|>a")
    with pytest.raises(ValueError, match="chat_template_kwargs must be None for the text template 'none'"):
        render_prompt({"prompt": "a"}, tokenizer_of(QWEN), "none", None, off)
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        render_prompt({"prompt": "a"}, TASKS["addition"].build_tokenizer(), None, None, off)


def test_a_text_template_takes_a_question_with_a_prefilled_answer() -> None:
    row = {"prompt": [USER, said("Well,")]}
    assert render_prompt(row, tokenizer_of(CHAT), "Q: {prompt} A:") == "Q: 1 + 1 = A: Well,"


def test_a_recipe_and_a_row_say_what_the_template_is_given(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("chat_template_kwargs: {enable_thinking: false}\nsystem_prompt: Add.\n")
    off = load_recipe(str(tmp_path / "mine.yaml"))
    for recipe in (
        off,
        load_recipe(None, ["--chat_template_kwargs", '{"enable_thinking": false}', "--system_prompt=Add."]),
    ):
        assert recipe.prompt_format == PromptFormat(None, "Add.", {"enable_thinking": False})
    rows: list[dict[str, Any]] = [
        {"prompt": "a"},
        {"prompt": "b", "chat_template_kwargs": {"enable_thinking": True}},
        {"prompt": "c", "chat_template_kwargs": '{"enable_thinking": true}'},  # as a .csv file has it
        {"prompt": "d", "chat_template_kwargs": None},
    ]
    rendered = render_prompts(rows, tokenizer_of(QWEN), off.prompt_format)
    assert ["<think>" in text for text in rendered] == [True, False, False, True]
    assert all(text.startswith("<|system|>Add.<|end|><|user|>") for text in rendered)


@pytest.mark.parametrize("value", ["[1]", "text", "{cut", "3"])
def test_what_is_no_mapping_of_arguments_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="chat_template_kwargs must be a mapping, got"):
        load_recipe(None, ["--chat_template_kwargs", value])
    with pytest.raises(ValueError, match="column chat_template_kwargs must be"):
        render_prompt({"prompt": [USER], "chat_template_kwargs": value}, tokenizer_of(CHAT))


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [{**TOOL, "strict": None}]])
def test_a_rows_tools_reach_the_template(tools: Any) -> None:
    rendered = render_prompt({"prompt": [USER], "tools": tools}, tokenizer_of(TOOLS))
    assert rendered == "[calculator]<|user|>1 + 1 =<|end|><|assistant|>"
    assert render_prompt({"prompt": [USER], "tools": None}, tokenizer_of(TOOLS)).startswith("<|user|>")


def test_a_conversations_own_system_message_is_the_only_one() -> None:
    row = {"prompt": [{"role": "system", "content": "Mine."}, USER]}
    assert render_prompt(row, tokenizer_of(CHAT), None, "Add.").count("<|system|>") == 1


def test_fields_that_a_table_filled_up_do_not_reach_the_template(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}{% if m.tool_calls is defined %}!{% endif %}{% endfor %}"
        "{% for t in tools or [] %}{% if t.strict is defined %}!{% endif %}{% endfor %}"
    )
    row = {"prompt": [{**USER, "tool_calls": None}], "tools": [{**TOOL, "strict": None}], "answer": "2"}
    for tools in (row["tools"], json.dumps(row["tools"])):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"tools": tools}))
        (read,) = load_rows(str(tmp_path / "rows.jsonl"))
        assert render_prompt(read, tokenizer_of(template)) == "user"


@pytest.mark.parametrize(
    ("template", "row", "system_prompt", "message"),
    [
        (NO_SYSTEM, {"prompt": "a"}, "Add.",
         "failed on messages of system, user: TemplateError: System role not supported (line 1 of the template)"),
        ("{{ messages[5].content }}", {"prompt": [USER]}, None, "failed on messages of user: UndefinedError"),
        ("{% if %}", {"prompt": [USER]}, None, "failed on messages of user: TemplateSyntaxError"),
        ("{{ 1 / 0 }}", {"prompt": [USER, said("a"), USER]}, None,
         "failed on messages of user, assistant, user: ZeroDivisionError"),
    ],
)  # fmt: skip
def test_what_a_template_refuses_is_told_in_one_line(
    template: str, row: dict[str, Any], system_prompt: str | None, message: str
) -> None:
    with pytest.raises(ThirdPartyError) as caught:
        render_prompt(row, tokenizer_of(template), None, system_prompt)
    assert message in str(caught.value) and "\n" not in str(caught.value) and caught.value.__cause__ is not None


def test_a_tokenizer_that_fails_is_named() -> None:
    class Broken:
        name_or_path, bos_token_id = "mine", None

        def __call__(self, *_: Any, **__: Any) -> None:
            raise OverflowError("too long")

    with pytest.raises(
        ThirdPartyError, match=r"the tokenizer 'mine' failed on 1 prompts: OverflowError: too long \(test_"
    ):
        encode_prompts(["a"], Broken())


def test_a_prompt_begins_once() -> None:
    tokenizer = TASKS["addition"].build_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer.chat_template = "<bos> " + CHAT
    for text, template in (("<bos> 1 +", None), ("1 +", "<bos> {prompt}"), ("1 +", None), ("1 +", "chat")):
        (ids,) = encode_prompts([render_prompt({"prompt": text}, tokenizer, template)], tokenizer)
        assert ids.count(bos) == 1 and ids[0] == bos


@pytest.mark.parametrize(
    "tags", [("<think>", "</think>", "<answer>", "</answer>"), ("[THINK]", "[/THINK]"), ("<|begin_of_thought|>",)]
)
def test_a_tag_that_is_a_special_token_stays_in_the_text(tags: tuple[str, ...]) -> None:
    tokenizer = TASKS["addition"].build_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [*tags, "<|im_end|>"], "bos_token": "<bos>"})
    rollout = teacher_forced(tokenizer, ["1"], [" 2 ".join(tags) + " 2 <|im_end|>"])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (text,) = completion_texts(rollout, tokenizer, [end])
    assert text.split() == (" 2 ".join(tags) + " 2").split()  # without what ends a completion
    (text,) = completion_texts(teacher_forced(tokenizer, ["1"], ["<bos> 2 <pad> <eos>"]), tokenizer)
    assert text.strip() == "2"


def test_tags_that_are_special_tokens_earn_their_rewards() -> None:
    tokenizer = TASKS["addition"].build_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<think>", "</think>", "<answer>", "</answer>"]})
    rollout = teacher_forced(tokenizer, ["1 + 1 ="], ["<think> 1 + 1 = 2 </think> <answer> 2 </answer>"])
    texts = completion_texts(rollout, tokenizer)
    assert format_reward([""], texts) == accuracy_reward([""], texts, answer=["2"]) == [1.0]


@pytest.mark.parametrize("debug", [False, True])
def test_a_command_says_whose_error_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str], debug: bool) -> None:
    tokenizer = tokenizer_of(NO_SYSTEM)
    build_model(tokenizer, 0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": [{"role": "user", "content": f"{i}"}], "answer": "2"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model_name_or_path": tmp_path / "model", "dataset_name": tmp_path / "rows.jsonl",
               "system_prompt": "Add.", "max_completion_length": 4, "device": "cpu",
               "output_dir": tmp_path / "run"}  # fmt: skip
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert cli.main(["train", *arguments, *(["--debug"] if debug else [])]) == 2
    errors = capsys.readouterr().err
    assert (
        f"error: the chat template of '{tmp_path / 'model'}' failed on messages of system, user: TemplateError"
        in errors
    )
    assert ("Traceback" in errors) == debug and ("--debug shows the traceback" in errors) != debug
