"""The built-in tasks: answers, traces, slips, splits, vocabulary, and that addition is what it was."""

from __future__ import annotations

import hashlib
import json
import random

import pytest
import torch

from grpo_kernels import rewards
from grpo_kernels.training.addition import TASKS, build_model, step_boundaries
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.task import load_task

# of json.dumps(build_rows(seed=0, num_eval=200)), from before there was more than one task
ADDITION_ROWS = "8c06b837ac526088065a0d11abf39b23cc357d34244d85d360b782aac2aee7d4"

every_task = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))


def problems(task, count=300, seed=0):
    """Some problems of a task."""
    train, _ = task.build_rows(seed, num_eval=0, num_traces=0)
    return [task.parse_prompt(row["prompt"]) for row in train[:count]]


def worked_out(prompt):
    """The answer to a task's question by other means than the task's."""
    return str(eval(prompt.removesuffix(" =").replace(" ", "")))  # digits and a sign


def right(row):
    return rewards.accuracy_reward([""], [row["completion"]], answer=[row["answer"]]) == [1.0]


def test_addition_is_what_recorded_results_were_made_with():
    rows = TASKS["addition"].build_rows(seed=0, num_eval=200)
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest() == ADDITION_ROWS
    words = ["<pad>", "<eos>", "<unk>", "<think>", "</think>", "<answer>", "</answer>", *"0123456789", "+", "="]
    tokenizer = TASKS["addition"].build_tokenizer()
    assert tokenizer.get_vocab() == {word: i for i, word in enumerate([*words, "units", "tens", "carry"])}
    assert build_model(tokenizer, seed=0).config.intermediate_size == 256


@every_task
def test_answers_are_right_and_the_whole_trace_reaches_them(task):
    for problem in problems(task):
        row = {**task.row(problem), "completion": task.trace(problem)}
        assert row["answer"] == worked_out(row["prompt"])
        assert right(row)
        assert rewards.format_reward([""], [row["completion"]]) == [1.0]
        assert task.is_worked(row)


@every_task
def test_a_slip_makes_the_answer_wrong_and_never_a_worked_solution(task):
    for seed in range(5):
        rng = random.Random(seed)
        for problem in problems(task, 100, seed):
            row = {**task.row(problem), "completion": task.trace(problem, rng)}
            assert not right(row), row
            assert not task.is_worked(row)
            assert rewards.format_reward([""], [row["completion"]]) == [1.0]


@every_task
def test_a_prompt_is_read_back_whatever_stands_around_the_question(task):
    for problem in problems(task, 100):
        assert task.parse_prompt(task.prompt(problem)) == problem
        assert task.parse_prompt(f"units {task.prompt(problem)} {task.trace(problem)}") == problem
    assert task.parse_prompt("What is left?") is None


@every_task
def test_no_wording_of_a_held_out_problem_is_in_the_training_set(task):
    for seed in range(3):
        train, held_out = task.build_rows(seed, num_eval=100)
        assert len(held_out) == 100
        assert not {task.key(row) for row in train} & {task.key(row) for row in held_out}
        assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
        assert len({row["prompt"] for row in train}) == len(train)


@every_task
def test_the_other_order_of_a_sum_is_the_same_problem(task):
    assert task.key({"prompt": "1 2 + 3 4 ="}) == task.key({"prompt": "3 4 + 1 2 ="})
    assert task.key({"prompt": "1 2 + 3 4 ="}) != task.key({"prompt": "1 4 + 3 2 ="})


@every_task
def test_rows_follow_from_the_seed(task):
    assert task.build_rows(0, 10, 50) == task.build_rows(0, 10, 50)
    assert task.build_rows(0, 10, 50)[1] != task.build_rows(1, 10, 50)[1]


@every_task
def test_traces_for_the_cold_start_have_slips_and_broken_tags(task):
    train, _ = task.build_rows(seed=0, num_eval=100, num_traces=1000)
    traces = [row["completion"] for row in train if "completion" in row]
    assert len(traces) == 1000
    assert all("completion" in row for row in train[:1000])
    broken = sum(rewards.format_reward([""], [trace]) == [0.0] for trace in traces) / 1000
    closed = [{**row, "completion": row["completion"] + " </answer>"} for row in train[:1000]]
    wrong = sum(not right(row) for row in closed if "<answer>" in row["completion"]) / 1000
    assert 0.2 < broken < 0.3
    assert 0.25 < wrong < 0.4


@every_task
def test_every_word_is_in_the_tokenizer_and_a_trace_fits_the_recipe(task):
    tokenizer = task.build_tokenizer()
    train, held_out = task.build_rows(seed=0, num_eval=10)
    texts = [row["prompt"] + " " + row.get("completion", "") for row in [*train, *held_out]]
    for problem in problems(task, 100):
        texts += [" ".join(map(str, row.values())) for row in task.intermediates(task.row(problem))]
        assert len(tokenizer(task.trace(problem))["input_ids"]) < 32
    for text in texts:
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text
    assert tokenizer.decode(tokenizer(texts[0])["input_ids"]) == texts[0]


@every_task
def test_a_recipe_names_a_task_and_gets_its_rows_and_a_model_of_its_words(task):
    loaded = load_task(Recipe(dataset_name=task.name, num_eval_prompts=7, device="cpu"))
    assert (loaded.train_rows, loaded.eval_rows) == task.build_rows(0, 7)
    assert loaded.model.config.vocab_size == len(task.words) == len(set(task.words))


def test_a_chat_tokenizer_keeps_the_ids_of_the_words_and_adds_its_roles():
    task = TASKS["addition"]
    plain, chat = task.build_tokenizer(), task.build_tokenizer(chat=True)
    assert plain.chat_template is None
    assert {word: chat.get_vocab()[word] for word in plain.get_vocab()} == plain.get_vocab()
    text = chat.apply_chat_template(
        [{"role": "user", "content": "7 3 + 4 5 ="}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<user> 7 3 + 4 5 = <assistant>"
    assert chat.unk_token_id not in chat(text)["input_ids"]


def test_a_student_is_smaller_and_a_width_without_four_even_heads_is_refused():
    tokenizer = TASKS["addition"].build_tokenizer()
    student, teacher = build_model(tokenizer, 0, hidden_size=64), build_model(tokenizer, 0)
    assert student.num_parameters() < 0.6 * teacher.num_parameters()
    assert student(torch.tensor([[3, 4]])).logits.shape == (1, 2, len(tokenizer))
    with pytest.raises(ValueError, match="hidden_size must be a multiple of 8 and at least 8, got 60"):
        build_model(tokenizer, 0, hidden_size=60)


def test_mixed_addition_has_the_problems_of_addition_and_mixes_half_of_the_words_of_half_of_the_traces():
    task = TASKS["addition-mixed"]
    train, held_out = task.build_rows(seed=0, num_eval=100)
    sums, held_out_sums = TASKS["addition"].build_rows(seed=0, num_eval=100)
    assert [row["prompt"] for row in held_out] == [row["prompt"] for row in held_out_sums]
    assert {task.key(row) for row in train} == {task.key(row) for row in sums}
    assert all(
        row["target_words"] == [*"0123456789", "+", "=", "units", "tens", "carry"] for row in [*train, *held_out]
    )
    traces = [row["completion"] for row in train if "completion" in row]
    french = [sum(word in task.french.values() for word in trace.split()) for trace in traces]
    assert 0.39 < sum(n > 0 for n in french) / len(traces) < 0.48  # half, but for 1 in 8 that draws no word
    assert 0.21 < sum(french) / (3 * len(traces)) < 0.29


def test_the_language_reward_sees_the_mixing_of_a_trace_and_nothing_else():
    task = TASKS["addition-mixed"]
    train, _ = task.build_rows(seed=0, num_eval=100)
    reward = rewards.LanguageConsistencyReward(vocabulary=train[0]["target_words"])
    traces = [row["completion"] for row in train if "completion" in row]
    formed = [trace for trace in traces if rewards.format_reward([""], [trace]) == [1.0]]
    mixed = [bool(set(trace.split()) & set(task.french.values())) for trace in formed]
    assert [score < 1 for score in reward([""] * len(formed), formed)] == mixed
    assert 0.3 < sum(mixed) / len(mixed) < 0.6


def test_a_mixed_trace_is_understood_but_is_no_model_solution():
    task = TASKS["addition-mixed"]
    mixed = task.trace((78, 45)).replace("carry", "retenue")
    assert task.parse_trace(mixed) == (78, 45)
    assert not task.is_worked({"prompt": task.prompt((78, 45)), "completion": mixed})
    assert task.is_worked({"prompt": task.prompt((78, 45)), "completion": task.trace((78, 45))})


@pytest.mark.parametrize(
    ("problem", "trace"),
    [
        ((78, 45), "units 8 + 5 = 3 carry 1 tens 7 + 4 + 1 = 1 2 </think> <answer> 1 2 3 </answer>"),
        ((20, 13), "units 0 + 3 = 3 carry 0 tens 2 + 1 + 0 = 3 </think> <answer> 3 3 </answer>"),
    ],
)
def test_a_trace_reads_as_documented(problem, trace):
    assert TASKS["addition"].trace(problem) == f"<think> {trace}"


def test_steps_end_before_the_next_one_begins():
    trace = "<think> units 8 + 5 = 3 carry 1 tens 7 + 4 + 1 = 1 2 </think> <answer> 1 2 3 </answer>"
    ends = [trace[:cut] for cut in step_boundaries(trace, ["units", "carry", "tens"])]
    assert ends == [
        "<think> units 8 + 5 = 3",
        "<think> units 8 + 5 = 3 carry 1",
        "<think> units 8 + 5 = 3 carry 1 tens 7 + 4 + 1 = 1 2",
    ]
    prose = "<think>\nShe sold 3.5 kg. That is half.\nSo 7 kg.\n</think>\n<answer>7</answer>"
    ends = [prose[:cut] for cut in step_boundaries(prose)]
    assert ends == [
        "<think>\nShe sold 3.5 kg.",
        "<think>\nShe sold 3.5 kg. That is half.",
        "<think>\nShe sold 3.5 kg. That is half.\nSo 7 kg.",
    ]
    assert step_boundaries("no reasoning. At all.") == step_boundaries("</think> a. b. <think>") == []
