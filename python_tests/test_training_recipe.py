"""Recipes, rewards and data: what a run is told, and what it says to bad input."""

from __future__ import annotations

import datasets
import pytest

from grpo_kernels import rewards
from grpo_kernels.training.addition import TASKS, build_model
from grpo_kernels.training.recipe import Recipe, load_recipe
from grpo_kernels.training.task import load_task


def write_recipe(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_the_packaged_recipe_loads_by_name():
    recipe = load_recipe("addition")
    assert recipe.dataset_name == "addition"
    assert recipe.num_threads == 1
    assert recipe.loss_config().epsilon_high == 0.28


def test_file_values_are_converted_and_the_command_line_wins(tmp_path):
    path = write_recipe(tmp_path, "learning_rate: 1e-4\nreward_funcs: [format]\nbeta: 0.5\nepsilon_high: null\n")
    recipe = load_recipe(path, ["--beta", "0.25", "--shuffle_rewards", "true", "--reward_weights", "2"])
    assert recipe.learning_rate == 1e-4  # YAML reads 1e-4 as text
    assert recipe.reward_funcs == ["format"]
    assert recipe.reward_weights == [2.0]
    assert recipe.beta == 0.25
    assert recipe.shuffle_rewards is True
    assert recipe.epsilon_high is None


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("learning_rat", "learning_rate"), ("epsilon_hi", "epsilon_high"), ("num_generation", "num_generations")],
)
def test_an_unknown_key_names_the_nearest_known_one(tmp_path, key, nearest):
    with pytest.raises(ValueError, match=f"unknown key '{key}'; the nearest known key is '{nearest}'"):
        load_recipe(write_recipe(tmp_path, f"{key}: 1\n"))
    with pytest.raises(ValueError, match=f"unknown key '{key}'; the nearest known key is '{nearest}'"):
        load_recipe("addition", [f"--{key}", "1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: many\n", "max_steps.*many"),
        ("max_steps: 0\n", "max_steps must be at least 1, got 0"),
        ("vllm_group_port: 0\n", "vllm_group_port must be at least 1, got 0"),
        ("max_steps: {a: 1}\n", "max_steps must be a single value or a list"),
        ("loss_type: gpro\n", "loss_type must be one of .* got 'gpro'"),
        ("backend: gpu\n", "backend must be one of auto, .* got 'gpu'"),
        ("lr_scheduler_type: exponential\n", "lr_scheduler_type.*exponential"),
        ("temperature: 0\n", "temperature must be finite and greater than 0"),
        ("num_generations: 3\n", r"num_generations \(3\) must divide .* \(8\)"),
        ("num_generations: 1\n", "num_generations must be at least 2, got 1"),
        ("gradient_accumulation_steps: 2\nsteps_per_generation: 3\n", r"gradient_accumulation_steps \(2\) must divide"),
        ("reward_weights: [1, 2, 3]\n", r"reward_weights must have one weight per reward function \(2\), got 3"),
        ("- a\n- list\n", "expected a mapping"),
    ],
)
def test_a_bad_value_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write_recipe(tmp_path, text))


def test_a_missing_recipe_lists_those_that_ship():
    with pytest.raises(FileNotFoundError, match=r"no recipe 'substraction'.*addition"):
        load_recipe("substraction")


def test_batch_sizes_follow_from_the_recipe():
    recipe = Recipe(per_device_train_batch_size=16, gradient_accumulation_steps=2, steps_per_generation=4)
    assert (recipe.generation_batch_size, recipe.prompts_per_generation, recipe.is_on_policy) == (64, 8, False)
    assert Recipe(per_device_train_batch_size=16, gradient_accumulation_steps=2).is_on_policy


def test_accuracy_and_format_rewards():
    completions = [
        "<think> 1 + 1 </think> <answer> 2 </answer>",
        "<think>a</think>\n<answer>3</answer>",
        "<answer> 2 </answer>",
        "<think> a </think> <answer> 2 </answer> 7",
        "<think> <think> a </think> <answer> 2 </answer>",
        "<think> a </think> <answer> 2",
    ]
    prompts = ["1 + 1 ="] * len(completions)
    assert rewards.accuracy_reward(prompts, completions, answer=["2", "2", 2, "2", "2", "2"]) == [1, 0, 1, 1, 1, 0]
    assert rewards.format_reward(prompts, completions) == [1, 1, 0, 0, 0, 0]


def test_accuracy_compares_the_last_answer_up_to_white_space():
    completions = ["<answer> 1 2 </answer> <answer> 1 3 </answer>", "<answer>13</answer>"]
    assert rewards.accuracy_reward(["", ""], completions, answer=["13", " 1 3"]) == [1.0, 1.0]


def test_a_dataset_folder_gives_its_splits(tmp_path):
    tokenizer = TASKS["addition"].build_tokenizer()
    build_model(tokenizer, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(9)]
    train, test = datasets.Dataset.from_list(rows), datasets.Dataset.from_list(rows[:3])
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "both")
    train.save_to_disk(tmp_path / "one")
    settings = {"model_name_or_path": str(tmp_path / "model"), "device": "cpu", "num_eval_prompts": 2}
    task = load_task(Recipe(dataset_name=str(tmp_path / "both"), eval_dataset_split="test", **settings))
    assert task.train_rows == rows
    assert task.eval_rows == rows[:2]
    task = load_task(Recipe(dataset_name=str(tmp_path / "one"), **settings))
    assert len(task.train_rows) == 7
    assert sorted([*task.train_rows, *task.eval_rows], key=lambda row: row["prompt"]) == rows


def test_a_dataset_without_a_model_is_refused(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text('{"prompt": "1 + 1 =", "answer": 2}\n' * 4)
    with pytest.raises(ValueError, match="model_name_or_path must be given"):
        load_task(Recipe(dataset_name=str(path), num_eval_prompts=0))
    with pytest.raises(ValueError, match=r"at least 1 training rows .* got 0"):
        load_task(Recipe(dataset_name=str(path), num_eval_prompts=4))


def test_names_and_defaults_of_rollouts_are_trls():
    trl = pytest.importorskip("trl")
    ours = Recipe()
    theirs = {field.name: field.default for field in trl.GRPOConfig.__dataclass_fields__.values()}
    for name in theirs.keys() & vars(ours).keys():
        if name.startswith(("vllm_", "use_vllm", "use_transformers", "transformers_")) and name != "vllm_mode":
            assert getattr(ours, name) == theirs[name], name
    assert theirs.keys() >= {name for name in vars(ours) if name.startswith("vllm_")} - {"vllm_generation_timeout"}
