"""Augmentation: every new row is right, says where it came from, and is no held-out problem."""

from __future__ import annotations

import copy
import random

import pytest
from test_training_tasks import every_task, problems, right, worked_out

from grpo_kernels import rewards
from grpo_kernels.training.addition import TASKS
from grpo_kernels.training.augmentation import augment, is_right, relabel, vary_goal, vary_start
from grpo_kernels.training.data import templates
from grpo_kernels.training.data.rows import worked_completion

SEEDS = range(6)
SOLUTION = "He has 3*4 = <<3*4=12>>12 apples.\nHe eats half, <<12/2=6>>6 of them.\nSo 12-6-1 = <<12-6-1=5>>5 are left."


def material(task, seed, num_eval=50):
    """A task's rows with traces, imperfect ones and whole ones in turn, and its held-out rows."""
    train, held_out = task.build_rows(seed, num_eval, num_traces=200)
    for row in train[:200:2]:
        row["completion"] = task.trace(task.parse_prompt(row["prompt"]))
    return train[:250], held_out


def rules(task, held_out):
    return {"held_out": held_out, "key": task.key}


@every_task
def test_a_start_in_the_middle_goes_on_from_a_whole_step_of_a_right_trace(task):
    tokenizer = task.build_tokenizer()
    for seed in SEEDS:
        rows, held_out = material(task, seed)
        found = vary_start(
            rows, random.Random(seed), boundaries=task.boundaries, is_good=task.is_worked, **rules(task, held_out)
        )
        assert len(found) > 90
        for row in found:
            assert row["source"] == "start"
            assert row["prompt"] == f"{row['seed_prompt']} {row['completion_prefix']}"
            assert row["answer"] == worked_out(row["seed_prompt"])
            whole = templates.whole_completion(row, row["prompt"], row["completion"])
            assert whole == task.trace(task.parse_prompt(row["seed_prompt"]))
            next_word = row["completion"].split()[0]
            assert next_word == "</think>" or next_word in task.step_words
            assert templates.render_prompt(row, tokenizer) == row["prompt"]
        assert len({row["completion_prefix"].split()[-1] for row in found}) > 1


@every_task
def test_an_intermediate_goal_is_right_and_its_reasoning_stops_there(task):
    for seed in SEEDS:
        rows, held_out = material(task, seed)
        found = vary_goal(rows, random.Random(seed), intermediates=task.intermediates, **rules(task, held_out))
        assert len(found) > 100
        for row in found:
            assert row["source"] == "goal"
            assert row["answer"] == goal_by_hand(task, row["prompt"])
            assert right(row)
            assert rewards.format_reward([""], [row["completion"]]) == [1.0]
            reasoning = row["completion"].split(" </think>")[0]
            assert task.trace(task.parse_prompt(row["seed_prompt"])).startswith(reasoning)


def goal_by_hand(task, prompt):
    """The answer to an intermediate question, by arithmetic."""
    goal, question = prompt.split(" ", 1)
    a, b = task.parse_prompt(question)
    units = a % 10 + b % 10
    return str(units % 10) if goal == "units" else str(int(units > 9))


@every_task
def test_in_hindsight_a_failed_trace_solves_the_question_whose_answer_it_reached(task):
    for seed in SEEDS:
        rng = random.Random(seed)
        asked, solved = problems(task, 150, seed), problems(task, 150, seed + 100)
        rows = [
            {**task.row(problem), "completion": task.trace(other)} for problem, other in zip(asked, solved, strict=True)
        ]
        found = relabel(rows, rng, restate=task.restate, key=task.key)
        assert len(found) > 30
        for row in found:
            assert row["source"] == "hindsight"
            assert row["prompt"] != row["seed_prompt"]
            assert row["answer"] == worked_out(row["prompt"])
            assert right(row)
            assert task.parse_trace(row["completion"]) == task.parse_prompt(row["prompt"])


def test_a_trace_with_a_wrong_step_is_the_solution_of_nothing():
    task = TASKS["addition"]
    rng = random.Random(0)
    rows = [{**task.row(problem), "completion": task.trace(problem, rng)} for problem in problems(task)]
    assert relabel(rows, rng, restate=task.restate) == []
    row = {**task.row((78, 45)), "completion": task.trace((78, 46))}
    assert [found["prompt"] for found in relabel([row], rng, restate=task.restate)] == ["7 8 + 4 6 ="]
    for written, wrong in (("carry 1", "carry 0"), ("= 1 2 </think>", "= 1 3 </think>"), ("units 8 +", "units 9 +")):
        assert written in row["completion"]
        changed = {**row, "completion": row["completion"].replace(written, wrong)}
        assert relabel([changed], rng, restate=task.restate) == []


@every_task
def test_nothing_that_is_held_out_comes_back(task):
    for seed in SEEDS:
        rows, held_out = material(task, seed)
        leaked = [{**row, "completion": task.trace(task.parse_prompt(row["prompt"]))} for row in held_out]
        failed = [{**row, "completion": other["completion"]} for row, other in zip(rows, leaked, strict=False)]
        everything = [*rows, *leaked, *failed]
        excluded = {task.key(row) for row in held_out}
        found = augment(everything, random.Random(seed), task=task, held_out=held_out)
        new = [row for row in found if row["source"] != "seed"]
        assert {row["source"] for row in new} >= {"start", "goal"}
        assert not excluded & {task.key(row) for row in new}
        assert not excluded & {task.key({"prompt": row["seed_prompt"]}) for row in new}
        unguarded = augment(everything, random.Random(seed), task=task, held_out=[])
        assert excluded & {task.key(row) for row in unguarded if row["source"] != "seed"}


def test_hindsight_on_a_held_out_question_is_dropped():
    task = TASKS["addition"]
    row = {**task.row((78, 45)), "completion": task.trace((78, 46))}
    arguments = {"restate": task.restate, "key": task.key}
    assert len(relabel([row], random.Random(0), held_out=[task.row((10, 10))], **arguments)) == 1
    assert relabel([row], random.Random(0), held_out=[task.row((46, 78))], **arguments) == []  # in the other order


@every_task
def test_rows_stay_as_they_are_and_the_same_seed_gives_the_same_rows(task):
    rows, held_out = material(task, 0)
    before = copy.deepcopy((rows, held_out))
    first = augment(rows, random.Random(0), task=task, held_out=held_out)
    assert (rows, held_out) == before
    assert first == augment(rows, random.Random(0), task=task, held_out=held_out)
    assert first != augment(rows, random.Random(1), task=task, held_out=held_out)
    assert {frozenset(row.keys() - {"completion"}) for row in first} == {frozenset(first[0].keys() - {"completion"})}
    assert [row["prompt"] for row in first[: len(rows)]] == [row["prompt"] for row in rows]


def test_num_rows_bounds_each_kind_and_no_prompt_comes_twice():
    task = TASKS["addition"]
    rows, held_out = material(task, 0)
    found = augment(rows * 2, random.Random(0), task=task, held_out=held_out, num_rows=20)
    new = [row["source"] for row in found[2 * len(rows) :]]
    assert (new.count("start"), new.count("goal")) == (20, 20)
    every = vary_goal(rows * 4, random.Random(0), intermediates=task.intermediates)
    assert len({row["prompt"] for row in every}) == len(every)


def test_a_row_that_starts_in_the_middle_is_not_augmented_again():
    task = TASKS["addition"]
    rows, _ = material(task, 0)
    started = vary_start(rows, random.Random(0), boundaries=task.boundaries, is_good=task.is_worked)
    again = augment(started, random.Random(0), task=task, held_out=[])
    assert [row["source"] for row in again] == ["start"] * len(started)


def word_problem():
    return {
        "prompt": "How many apples are left?",
        "answer": "5",
        "solution": SOLUTION,
        "completion": worked_completion(SOLUTION, "5"),
        "level": 1,
    }


def test_a_solution_in_prose_starts_at_the_end_of_a_sentence():
    prefixes = set()
    for seed in range(20):
        (row,) = vary_start([word_problem()], random.Random(seed))
        assert (row["answer"], row["level"], row["solution"]) == ("5", 1, SOLUTION)
        assert row["completion_prefix"] + row["completion"] == word_problem()["completion"]
        prefixes.add(row["completion_prefix"].rsplit("\n", 1)[-1])
    assert prefixes == {"He has 3*4 = 12 apples.", "He eats half, 6 of them.", "So 12-6-1 = 5 are left."}


def test_a_chat_goes_on_in_an_assistants_message():
    chat = {**word_problem(), "prompt": [{"role": "user", "content": "How many apples are left?"}]}
    (row,) = vary_start([chat], random.Random(0))
    assert row["prompt"][:-1] == chat["prompt"]
    assert row["prompt"][-1] == {"role": "assistant", "content": row["completion_prefix"]}
    assert templates.prompt_key(row) == templates.prompt_key(chat) == ("how many apples are left?",)
    assert vary_start([chat], random.Random(0), held_out=[{"prompt": "How many  apples are left?"}]) == []


def test_a_wrong_or_malformed_trace_is_no_start():
    row = word_problem()
    assert is_right(row)
    for completion in (
        row["completion"].replace("<answer>5", "<answer>6"),
        row["completion"].replace("</think>", ""),
        None,
    ):
        assert vary_start([{**row, "completion": completion}], random.Random(0)) == []


def test_hindsight_takes_a_function_for_other_tasks_and_holds_it_to_the_completion():
    row = {
        "prompt": "the capital of Italy?",
        "answer": "Rome",
        "completion": "<think> a </think> <answer> Paris </answer>",
    }

    def restate(row):
        return {"prompt": "the capital of France?", "answer": "Paris"}

    (found,) = relabel([row], random.Random(0), restate=restate)
    assert (found["prompt"], found["answer"], found["source"]) == ("the capital of France?", "Paris", "hindsight")
    assert relabel([{**row, "answer": "Paris"}], random.Random(0), restate=restate) == []
    reached = {**row, "answer": 5.0, "completion": "<think> a </think> <answer> 5 </answer>"}
    assert relabel([reached], random.Random(0), restate=restate) == []  # numbers are compared by value
    assert relabel([row], random.Random(0), restate=lambda row: None) == []
    with pytest.raises(ValueError, match="restate must give the answer that the completion reaches, got 'Lyon'"):
        relabel([row], random.Random(0), restate=lambda row: {"prompt": "Lyon?", "answer": "Lyon"})


def test_an_intermediate_that_its_completion_does_not_reach_is_an_error():
    bad = [{"prompt": "half?", "answer": "7", "completion": "<think> a </think> <answer> 6 </answer>"}]
    with pytest.raises(ValueError, match="intermediates must give the answer that the completion reaches, got '7'"):
        vary_goal([word_problem()], random.Random(0), intermediates=lambda row: bad)
