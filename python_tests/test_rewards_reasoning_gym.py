"""reasoning-gym as a dataset: rows by the seed, no question on both sides, its judges; by the library and a stub."""

from __future__ import annotations

import importlib.util
import json
import pickle
import random
import sys
import time
import types

import pytest

from grpo_kernels import rewards
from grpo_kernels.cli import main
from grpo_kernels.rewards import reasoning_gym
from grpo_kernels.training.data.rows import read_rows
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.task import columns_needed, load_task_rows

INSTALLED = importlib.util.find_spec("reasoning_gym") is not None
NEEDED = pytest.mark.skipif(not INSTALLED, reason="reasoning-gym is not installed: it needs pycosat, a C extension")


class StubGenerator:
    """Sums of two numbers up to ``max_value``, of which some come twice, with a judge as strict as some are."""

    def __init__(self, size, seed, max_value=99):
        self.size, self.seed, self.max_value = size, seed, max_value

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        rng = random.Random(self.seed + index)
        a, b = rng.randint(0, self.max_value), rng.randint(0, self.max_value)
        return {"question": f"{a} + {b}?", "answer": str(a + b), "metadata": {}}

    def score_answer(self, answer, entry):
        return 0.0 if answer is None else float(int(answer) == int(entry["answer"]))


@pytest.fixture(params=["stub", pytest.param("installed", marks=NEEDED)])
def library(request, monkeypatch):
    """The library, or a stub in its place."""
    reasoning_gym._generate.cache_clear()
    if request.param == "stub":
        names = ("leg_counting", "prime_factorization", "graph_color")
        parts = {
            "reasoning_gym": {"create_dataset": lambda name, **options: StubGenerator(**options)},
            "reasoning_gym.factory": {"DATASETS": dict.fromkeys(names)},
        }
        for name, contents in parts.items():
            module = types.ModuleType(name)
            vars(module).update(contents)
            monkeypatch.setitem(sys.modules, name, module)
    yield
    reasoning_gym._generate.cache_clear()


def recipe_of(name="leg_counting", **options):
    return Recipe(dataset_name=f"reasoning_gym/{name}", reward_funcs=["reasoning_gym"], **options)


@pytest.mark.usefixtures("library")
def test_rows_follow_from_the_seed_and_no_question_is_on_both_sides():
    train, held_out = load_task_rows(recipe_of(seed=1))
    assert (train, held_out) == load_task_rows(recipe_of(seed=1))
    assert load_task_rows(recipe_of(seed=2))[1] != held_out
    questions = [row["prompt"] for row in [*train, *held_out]]
    assert len(questions) == len(set(questions)) > 900 and len(held_out) in (len(questions) // 5, 200)
    assert all(isinstance(row["prompt"], str) and isinstance(row["answer"], str) for row in train)
    train, held_out = load_task_rows(recipe_of(dataset_config='{"size": 50}', num_eval_prompts=8))
    assert len(held_out) == 8 and 30 < len(train) <= 42
    assert len(load_task_rows(recipe_of(dataset_split="train[:100]", num_eval_prompts=0))[0]) == 100


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("config", ['{"size": 20}', None])
def test_the_datasets_own_judge_scores_rows_that_went_through_a_file(tmp_path, config):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in load_task_rows(recipe_of(dataset_config=config))[0][:16]))
    rows = read_rows(path, ("prompt", "answer"))
    texts = [f"<think> a </think> <answer> {row['answer']} </answer>" for row in rows]
    columns = rewards.columns_of(rows, [[]] * len(rows))
    reward = {"reasoning_gym": rewards.resolve("reasoning_gym")}
    prompts = [row["prompt"] for row in rows]
    assert rewards.score(reward, prompts, texts, columns).tolist() == [[1.0]] * len(rows)
    wrong = [text.replace("<answer> ", "<answer> 9") for text in texts]
    assert (rewards.score(reward, prompts, wrong, columns) < 1).all()
    assert not rewards.score(reward, prompts, ["12"] * len(rows), columns).any()


@pytest.mark.usefixtures("library")
def test_messages_are_read_as_text_the_last_answer_counts_and_degenerate_text_takes_no_time():
    row = load_task_rows(recipe_of(dataset_config='{"size": 5}', num_eval_prompts=0))[0][0]
    right = f"<answer>no</answer> <answer>\n{row['answer']}\n</answer> is it"
    reward = pickle.loads(pickle.dumps(rewards.resolve("reasoning_gym")))
    texts = [right, "", "<answer>" * 20_000, "<answer>1" + "</answer>" * 20_000, "</answer> 1 <answer>"]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    begin = time.monotonic()
    for completions in (texts, chats):
        scores = reward(completions=completions, reasoning_gym=[row["reasoning_gym"]] * len(texts))
        assert scores[0] == 1 and max(scores[1:]) < 0.1
    assert time.monotonic() - begin < 2.5


@pytest.mark.usefixtures("library")
def test_an_answer_at_which_the_judge_fails_scores_0_with_a_warning():
    rows, _ = load_task_rows(recipe_of("prime_factorization", dataset_config='{"size": 5}', num_eval_prompts=0))
    with pytest.warns(UserWarning, match="prime_factorization: an answer scores 0, its judge failed: ValueError"):
        scores = rewards.resolve("reasoning_gym")(
            completions=["<answer>two</answer>"], reasoning_gym=[rows[0]["reasoning_gym"]]
        )
    assert scores == [0.0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("leg_countin", {}, r"must be a dataset of reasoning-gym, as leg_counting.*, got 'reasoning_gym/leg_countin'"),
        (
            "leg_counting",
            {"dataset_config": '{"legs": 3}'},
            r"dataset_config must be options of .*leg_counting.*'legs'",
        ),
        ("leg_counting", {"dataset_config": "size=3"}, r"in JSON, got 'size=3': JSONDecodeError"),
        ("leg_counting", {"dataset_split": "test"}, "has no split 'test'; it has train"),
        ("leg_counting", {"eval_dataset_split": "test"}, "eval_dataset_split must be None .* has one split"),
    ],
)
@pytest.mark.usefixtures("library")
def test_what_is_not_there_is_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_task_rows(recipe_of(name, **options))


def test_a_library_that_is_not_installed_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    reasoning_gym._generate.cache_clear()
    assert main(["train", "--dataset_name", "reasoning_gym/leg_counting", "--model_name_or_path", "x"]) == 2
    error = capsys.readouterr().err
    assert 'reasoning_gym/leg_counting needs reasoning-gym: pip install "grpo-kernels[reasoning-gym]"' in error
    assert error.count("\n") == 1


def test_the_reward_judges_and_needs_no_answer_column():
    recipe = Recipe(dataset_name="reasoning_gym/graph_color", reward_funcs=["format", "reasoning_gym"])
    assert rewards.check_name(None, recipe.reward_funcs) == "reasoning_gym"
    assert columns_needed(recipe) == ("prompt",)


@NEEDED
def test_a_dataset_whose_answers_are_several_has_rows():
    rows, _ = load_task_rows(recipe_of("graph_color", dataset_config='{"size": 5}', num_eval_prompts=0))
    assert [row["answer"] for row in rows] == [None] * 5
