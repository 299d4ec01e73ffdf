"""How rendered prompts become tokens, and which rows are left out for their length, wherever a model reads them."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from testing.training import completion_logits
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from grpo_kernels.training.addition import TASKS, build_model
from grpo_kernels.training.data.templates import PromptFormat, encode_prompts, render_prompt, rows_that_fit
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.rollout import teacher_forced
from grpo_kernels.training.run import train
from grpo_kernels.training.samplers import ContinuousSampler, ModelSampler
from grpo_kernels.training.samplers.server import ServerSampler
from grpo_kernels.training.samplers.vllm_client import Completion
from grpo_kernels.training.supervised import trace_batch, traces_that_fit
from grpo_kernels.training.task import Task, held_out_rows, load_task, train_on_traces

CHAT = "{{ bos_token }} {% for m in messages %}{{ m['content'] }}{% endfor %}"
SETTINGS: dict[str, Any] = {"device": "cpu", "max_completion_length": 12, "num_eval_prompts": 4, "num_threads": 1}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """Puts a token before every text by itself, as Llama's and Gemma's do, and its chat template does too."""
    found = TASKS["addition"].build_tokenizer()
    found.add_special_tokens({"bos_token": "<bos>"})
    found.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", found.bos_token_id)]
    )
    found.chat_template = CHAT
    return found


def test_a_chat_prompt_begins_with_what_its_template_says(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"prompt": "1 + 1 ="}
    plain = tokenizer("1 + 1 =", add_special_tokens=False)["input_ids"]
    expected = [tokenizer.bos_token_id, *plain]
    rendered = [render_prompt(row, tokenizer, template) for template in ("chat", "none")]
    assert encode_prompts(rendered, tokenizer) == [expected, expected]
    opened = render_prompt(row | {"completion_prefix": "<think>"}, tokenizer, "chat")
    assert encode_prompts([opened], tokenizer)[0].count(tokenizer.bos_token_id) == 1


def test_every_reader_of_a_chat_prompt_sees_the_same_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    recipe = Recipe(**SETTINGS, prompt_template="chat", use_transformers_continuous_batching=True)
    row = {"prompt": "1 + 1 =", "completion": "2"}
    prompt = render_prompt(row, tokenizer, "chat")
    (expected,) = encode_prompts([prompt], tokenizer)
    model = build_model(tokenizer, 0).eval()
    server = object.__new__(ServerSampler)  # without a server: what it would answer is given
    vars(server).update(
        model=model,
        tokenizer=tokenizer,
        temperature=1.0,
        end_ids=[tokenizer.eos_token_id],
        accelerator=Accelerator(cpu=True),
        _sent_step=0,
        _call_on_main=lambda _: [Completion([5], [0.0])],
    )
    for found in (
        ModelSampler(model, tokenizer, max_completion_length=2, temperature=0)([prompt]),
        teacher_forced(tokenizer, [prompt], ["2"]),
        trace_batch(model, tokenizer, [row], recipe.prompt_format),
        ContinuousSampler(model, tokenizer, max_completion_length=12)([prompt]),
        server([prompt]),
    ):
        assert found.prompt_ids[0].tolist() == expected and found.prompt_mask.all()
    options = {"prompt_format": recipe.prompt_format, "max_completion_length": 12}
    assert rows_that_fit([row], tokenizer, context_length=12 + len(expected), **options) == [row]
    with pytest.raises(ValueError, match="got 0 of 1"):
        rows_that_fit([row], tokenizer, context_length=12 + len(expected) - 1, **options)


def with_rows(**rows: list[dict[str, Any]]) -> Task:
    return load_task(Recipe(**SETTINGS))._replace(**rows)


def of_lengths(*lengths: int, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": " ".join("1" * n), "answer": "1"} | more for n in lengths]


def test_an_empty_prompt_is_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows, tokenizer = of_lengths(3, 0, 5), TASKS["addition"].build_tokenizer()
    with caplog.at_level(logging.WARNING):
        found = rows_that_fit(rows, tokenizer, PromptFormat(), max_completion_length=12)
    assert found == [rows[0], rows[2]]
    assert "1 of 3 training prompts have no token and are left out" in caplog.text
    with pytest.raises(ValueError, match=r"at least 1 training prompts must have a token, got 0 of 1"):
        rows_that_fit(rows[1:2], tokenizer, PromptFormat(), max_completion_length=12)


def test_held_out_prompts_that_leave_no_room_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    task, recipe = with_rows(eval_rows=of_lengths(3, 117, 116, 0)), Recipe(**SETTINGS)  # 12 of a completion
    sampler = ModelSampler(task.model, task.tokenizer, max_completion_length=12)  # a context of 128
    with caplog.at_level(logging.WARNING):
        assert [len(row["prompt"].split()) for row in held_out_rows(task, recipe, sampler)] == [3, 116]
    assert "1 of 4 held-out prompts are longer than 116 tokens and left out" in caplog.text
    with pytest.raises(ValueError, match="at least 1 held-out prompts"):
        held_out_rows(with_rows(eval_rows=of_lengths(117)), recipe, sampler)
    assert held_out_rows(with_rows(eval_rows=[]), recipe, sampler) == []
    sampler.context_length = 15  # a server's may be less than the model's
    assert [len(row["prompt"].split()) for row in held_out_rows(task, recipe, sampler)] == [3]


def test_a_run_evaluates_and_filters_what_fits(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    long = of_lengths(120)
    task = load_task(Recipe(**SETTINGS))
    task = task._replace(train_rows=task.train_rows[:9] + long, eval_rows=task.eval_rows + long)
    monkeypatch.setattr("grpo_kernels.training.run.load_task", lambda recipe, rows: task)
    original: Callable[..., Any] = ModelSampler.__call__

    def recorded(self: ModelSampler, prompts: list[str], **options: Any) -> Any:
        asked.extend(len(prompt.split()) for prompt in prompts)
        return original(self, prompts, **options)

    monkeypatch.setattr(ModelSampler, "__call__", recorded)
    settings = {"max_steps": 1, "num_generations": 4, "max_pass_rate": 1.0, "pass_rate_samples": 2, "eval_samples": 1}
    train(Recipe(**SETTINGS, **settings, output_dir=str(tmp_path), disable_tqdm=True))
    assert len(asked) == 2 * 4 * 2 + 9 * 2 + 8 and max(asked) < 120  # two evaluations, the filter, a generation


def test_traces_beyond_the_context_are_not_trained_on(caplog: pytest.LogCaptureFixture) -> None:
    recipe = Recipe(**SETTINGS, sft_steps=1)
    task = with_rows()
    rows = of_lengths(116, 117, 0, completion="1 1 1 1 1 1 1 1 1 1 1")  # 11, and the end token: 128
    with caplog.at_level(logging.WARNING):
        assert traces_that_fit(task.model, task.tokenizer, rows, recipe.prompt_format) == rows[:1]
    assert "2 of 3 traces are left out" in caplog.text
    (step,) = train_on_traces(task.model, task.tokenizer, rows, recipe)
    assert step.tokens == 12 * recipe.sft_batch_size
    with pytest.raises(ValueError, match="no longer than the context of 128 tokens, got 2 others"):
        list(train_on_traces(task.model, task.tokenizer, rows[1:], recipe))


def test_micro_batches_of_a_supervised_step_add_up() -> None:
    task = with_rows()
    found = []
    for count in (1, 7):
        model = build_model(task.tokenizer, 0).eval()
        recipe = Recipe(**SETTINGS, sft_steps=3, gradient_accumulation_steps=count)
        steps = list(train_on_traces(model, task.tokenizer, task.train_rows, recipe))
        found.append(([step.loss for step in steps], model))
        assert "forward" not in vars(model)  # a copy of it must not go on to the model it was made from
    (whole, one), (cut, other) = found
    assert whole == pytest.approx(cut, rel=1e-5)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_supervised_step_forms_no_logits_as_a_whole() -> None:
    task, seen = with_rows(), []

    def note(module: Any, given: Any, output: torch.Tensor) -> None:
        seen.append(output.shape)

    note.__module__ = "torch.utils.notes"  # hooks of others are refused
    task.model.get_output_embeddings().register_forward_hook(note)
    recipe = Recipe(**SETTINGS, sft_steps=1, sft_batch_size=8)
    list(train_on_traces(task.model, task.tokenizer, task.train_rows, recipe))
    assert seen[-1][0] == 8 and seen[-1][-1] == 1


def test_a_supervised_loss_is_the_mean_cross_entropy_of_completions() -> None:
    task, recipe = with_rows(), Recipe(**SETTINGS, sft_steps=1, sft_batch_size=8, per_device_train_batch_size=8)
    rows = random.Random(recipe.seed).choices([row for row in task.train_rows if row.get("completion")], k=8)
    batch = trace_batch(task.model, task.tokenizer, rows, recipe.prompt_format)
    with torch.no_grad():
        logits = completion_logits(task.model, batch)[:, :-1]
    kept = batch.completion_mask.bool()
    expected = torch.nn.functional.cross_entropy(logits[kept], batch.completion_ids[kept])
    (step,) = train_on_traces(task.model, task.tokenizer, task.train_rows, recipe)
    assert step.loss == pytest.approx(expected.item(), rel=1e-5) and step.tokens == kept.sum()
