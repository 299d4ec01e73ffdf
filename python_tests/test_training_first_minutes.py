"""What somebody who knows TRL tries first, from the command line."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import transformers
from huggingface_hub import constants
from transformers import PreTrainedModel

from grpo_kernels import cli, hub
from grpo_kernels.training.addition import TASKS, build_model
from grpo_kernels.training.metrics import SilentRewards
from grpo_kernels.training.models import load_pretrained
from grpo_kernels.training.recipe import Recipe, load_recipe
from grpo_kernels.training.run import train
from grpo_kernels.training.stages import load_stage
from grpo_kernels.training.task import load_task_rows

REWARDS = """
def right(completions, prompts, answer, **kwargs):
    return [float(str(a) in c.split()) for c, a in zip(completions, answer)]

def silent(completions, **kwargs):
    return [None] * len(completions)

def broken(completions, **kwargs):
    return [kwargs["nowhere"]]

def logged(completions, trainer_state, log_metric, log_extra, **kwargs):
    log_metric("mine/step", trainer_state.global_step)
    log_extra("words", [len(c.split()) for c in completions])
    return [float(len(c)) for c in completions]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: a model, twenty rows, a reward function, a recipe; the commands run in another."""
    tokenizer = TASKS["addition"].build_tokenizer()
    build_model(tokenizer, 0, hidden_size=32).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{i % 10} + {i // 10} =", "answer": i % 10 + i // 10} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards_of_mine.py").write_text(REWARDS)
    recipe = {
        "model_name_or_path": str(tmp_path / "model"), "dataset_name": str(tmp_path / "rows.jsonl"), "device": "cpu",
        "reward_funcs": ["rewards_of_mine:right"], "num_generations": 4, "per_device_train_batch_size": 8,
        "max_completion_length": 6, "max_steps": 2, "learning_rate": 1e-5, "num_threads": 1, "disable_tqdm": True,
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(json.dumps(recipe))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.delitem(__import__("sys").modules, "rewards_of_mine", raising=False)
    return tmp_path


def command(kind: str, folder: Path, *more: str) -> int:
    return cli.main([kind, "--recipe", str(folder / "mine.yaml"), *more])


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_twenty_rows_and_a_reward_of_ones_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe is found, and the module beside it; a fifth of the rows is held out; the one's own reward judges."""
    assert command("train", folder) == 0
    printed = capsys.readouterr().out
    assert "16 training problems" in printed and "(4 problems, judged by rewards_of_mine:right)" in printed
    assert "right answers judged by: rewards_of_mine:right" in printed
    trained = str(folder / "run" / "checkpoint-2")
    assert command("eval", folder, "--model_name_or_path", trained) == 0  # the same file, which has keys of training
    printed = capsys.readouterr().out
    assert f"{trained}, 4 held-out problems, right answers judged by: rewards_of_mine:right" in printed
    assert (folder / "run" / "eval" / "done.json").is_file()
    assert command("train", folder, "--max_steps", "4", "--resume", "true", "--eval_batch_size", "3") == 0
    steps = [record["step"] for record in records(folder / "run" / "metrics.jsonl")]
    assert steps == [0, 1, 2, 3, 4, 4]
    assert command("train", folder, "--max_steps", "3", "--resume", "true") == 2
    assert "max_steps must be at least 4, the steps of checkpoint" in capsys.readouterr().err
    assert command("eval", folder, "--model_name_or_path", trained) == 0
    printed = capsys.readouterr().out
    assert "run/eval was done before: problems 4," in printed and "--overwrite_output_dir true runs it" in printed
    assert command("eval", folder, "--model_name_or_path", str(folder / "run"), "--output_dir", "x") == 2
    assert "has no config.json; there is one in checkpoint-0, " in capsys.readouterr().err
    assert command("train", folder, "--max_steps", "4", "--resume", "true", "--seed", "7") == 2
    assert "is of another run: seed 0, now 7" in capsys.readouterr().err


def test_what_a_reward_function_logs_is_kept(folder: Path) -> None:
    arguments = ["--reward_funcs", "[rewards_of_mine:logged]", "--completions_steps", "1", "--num_eval_prompts", "0"]
    assert command("train", folder, *arguments) == 0
    assert [record["mine/step"] for record in records(folder / "run" / "metrics.jsonl")] == [0.0, 1.0]
    samples = records(folder / "run" / "samples.jsonl")
    assert samples and all(sample["words"] == len(sample["completion"].split()) for sample in samples)


def test_a_reward_of_nothing_but_none_is_no_success(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert command("train", folder, "--reward_funcs", "rewards_of_mine:silent", "--num_eval_prompts", "0") == 2
    assert "step 1: reward function 'rewards_of_mine:silent' returned None for all 8 completions" in caplog.text
    assert (
        "no completion of 2 generations has a reward: rewards_of_mine:silent returned None" in capsys.readouterr().err
    )


def test_a_run_ends_early_where_nothing_is_ever_scored() -> None:
    import torch

    silent = SilentRewards(["a", "b"])
    for step in range(9):
        silent.note(torch.full((4, 2), float("nan")), step)
    with pytest.raises(ValueError, match="no completion of 10 generations has a reward: a, b returned None"):
        silent.note(torch.full((4, 2), float("nan")), 9)
    some = SilentRewards(["a", "b"])
    some.note(torch.tensor([[float("nan"), 1.0]]), 0)
    for step in range(20):
        some.note(torch.full((4, 2), float("nan")), step)
    some.raise_if_all_silent()


@pytest.mark.parametrize("key", ["reward_funcs", "check"])
def test_a_function_that_fails_is_called_by_its_name(
    folder: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    assert command("train", folder, f"--{key}", "rewards_of_mine:broken") == 2
    errors = capsys.readouterr().err
    line = REWARDS[: REWARDS.index('kwargs["nowhere"]')].count("\n") + 1
    where = f"KeyError: 'nowhere' (rewards_of_mine.py:{line}, in broken)"
    assert f"reward function 'rewards_of_mine:broken' failed on " in errors and where in errors  # noqa: F541
    assert "Traceback" not in errors
    assert command("train", folder, "--debug", f"--{key}", "rewards_of_mine:broken") == 2
    shown = capsys.readouterr().err.partition("Traceback")[2]
    assert "in broken" in shown and "scoring.py" not in shown  # from the user's frames on


def test_a_stage_that_failed_before_its_first_row_does_not_block(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output_dir", str(folder / "eval")]
    assert command("eval", folder, "--check", "rewards_of_mine:nothing", *out) == 2
    assert "has no function 'nothing'" in capsys.readouterr().err and not (folder / "eval").exists()
    assert command("eval", folder, "--check", "rewards_of_mine:broken", *out) == 2
    assert command("eval", folder, "--model_name_or_path", str(folder / "no" / "such"), *out) == 2
    assert command("eval", folder, *out) == 0
    assert command("eval", folder, "--eval_samples", "2", *out) == 2  # what is done stays
    assert "holds a stage with another eval_samples" in capsys.readouterr().err
    assert command("train", folder, "--reward_funcs", "rewards_of_mine:broken", "--num_eval_prompts", "0") == 2
    (folder / "run" / "checkpoint-0").rename(folder / "gone")
    assert command("train", folder, "--num_eval_prompts", "0") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_name_or_path", "runs/mine/checkpoint-9"],
         "model_name_or_path 'runs/mine/checkpoint-9' cannot be loaded: no such folder"),
        (["--model_name_or_path", "./model"], "'./model' cannot be loaded: no such folder"),
        (["--dataset_name", "data/sums/train"], "dataset_name 'data/sums/train' cannot be loaded: no such folder"),
        (["--reward_funcs", "nowhere_at_all:f"], "No module named 'nowhere_at_all' among the installed packages or in"),
        (["--optim", "sgd"], "unknown key 'optim'; grpo-kernels train --help lists the keys"),
        (["--learing_rate", "1"], "unknown key 'learing_rate'; the nearest known key is 'learning_rate'"),
        (["--reward_funcs", "[a, [b]]"], "reward_funcs must be a list of single values, got '[a, [b]]'"),
        (["--reward_funcs", "[a, b"], "reward_funcs must be a list in YAML, got '[a, b'"),
        (["--scale_rewards", "sometimes"], "scale_rewards must be group, batch, none, true or false, got 'sometimes'"),
        (["--lr", "1"], "unknown key 'lr'; the nearest known key is 'learning_rate'"),
        (["--num_threads", "0"], "num_threads must be at least 1, got 0"),
        (["--num_eval_prompts", "20"], "give more rows, or set a smaller num_eval_prompts"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert command("train", folder, *arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors and "Traceback" not in errors
    if "nowhere_at_all:f" in arguments:
        assert str(folder) in errors and str(folder / "elsewhere") in errors
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: [1", "bad.yaml cannot be read: while parsing"),
        (b"system_prompt: You are: a helper", "bad.yaml cannot be read: mapping values are not allowed here"),
        (b"a: \xff", "bad.yaml cannot be read: 'utf-8' codec"),
        (b"- a", "bad.yaml: expected a mapping of keys to values, got list"),
        (b"stages: {}", "bad.yaml is a recipe of several stages: grpo-kernels recipe "),
    ],
)
def test_a_recipe_that_cannot_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes, message: str
) -> None:
    (tmp_path / "bad.yaml").write_bytes(text)
    for kind in ("train", "eval") if b"stages" not in text else ("train",):
        assert cli.main([kind, "--recipe", str(tmp_path / "bad.yaml")]) == 2
        errors = capsys.readouterr().err
        assert message in errors and errors.count("\n") == 1


def test_a_home_folder_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = Recipe(model_name_or_path="~/model", dataset_name="~/rows.jsonl", output_dir="~/run")
    assert (recipe.model_name_or_path, recipe.dataset_name, recipe.output_dir) == (
        str(tmp_path / "model"), str(tmp_path / "rows.jsonl"), str(tmp_path / "run"),
    )  # fmt: skip


def test_train_without_a_recipe_is_the_recipe_addition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--max_steps", "1", "--sft_steps", "1", "--num_eval_prompts", "2", "--disable_tqdm", "true"]
    assert cli.main(["train", *small]) == 0
    assert "training by --recipe addition" in capsys.readouterr().out
    assert (tmp_path / "runs" / "addition" / "checkpoint-1").is_dir()
    assert cli.main(["train", "--dataset_name", "addition"]) == 2  # what the defaults of a recipe do not fit
    assert "max_completion_length must be less than the context of 128 tokens" in capsys.readouterr().err


def test_supervised_training_of_narrow_weights_is_refused_as_reinforcement_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--sft_steps", "1", "--dtype", "bfloat16", "--device", "cpu", "--max_completion_length", "8",
                 "--output_dir", str(tmp_path / "sft")]  # fmt: skip
    assert cli.main(["sft", *arguments]) == 2
    assert "weights of torch.bfloat16 cannot be trained: most updates would be rounded away" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "expected"),
    [("false", "none"), ("False", "none"), ("none", "none"), ("true", "group"), ("group", "group"), ("batch", "batch")],
)
def test_scale_rewards_is_what_trl_takes(tmp_path: Path, value: str, expected: str) -> None:
    (tmp_path / "r.yaml").write_text(f"scale_rewards: {value}\n")
    assert load_recipe(str(tmp_path / "r.yaml")).scale_rewards == expected
    assert load_recipe(None, ["--scale_rewards", value]).scale_rewards == expected
    assert Recipe(scale_rewards={"false": False, "true": True}.get(value, value)).scale_rewards == expected


@pytest.mark.parametrize("written", ["-0.00001", "-1e-5", "-1.0e-05", "-.00001"])
def test_a_small_negative_number_is_a_number_in_a_list(tmp_path: Path, written: str) -> None:
    (tmp_path / "r.yaml").write_text(f"reward_funcs: [accuracy, repetition]\nreward_weights: [1.0, {written}]\n")
    assert load_recipe(str(tmp_path / "r.yaml")).reward_weights == [1.0, -1e-5]
    both = ["--reward_funcs", "accuracy", "repetition", "--reward_weights"]
    assert load_recipe(None, [*both, "1", written]).reward_weights == [1.0, -1e-5]
    assert load_recipe(None, [*both, f"[1, {written}]"]).reward_weights == [1.0, -1e-5]


def test_lists_on_the_command_line_are_yaml_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for arguments in (["--reward_funcs", "[format, 'repetition(n=2, max_penalty=-0.5)']"],
                      ["--reward-funcs=[format, 'repetition(n=2, max_penalty=-0.5)']"],
                      ["--reward_funcs", "format", "repetition(n=2, max_penalty=-0.5)"]):  # fmt: skip
        found = load_recipe(None, [*arguments, "--seed", "3"])
        assert found.reward_funcs == ["format", "repetition(n=2, max_penalty=-0.5)"] and found.seed == 3
    (tmp_path / "r.yaml").write_text("reward_funcs: [accuracy, format]\nreward_weights: [1.0, 0.5]\n")
    found = load_recipe(str(tmp_path / "r.yaml"), ["--reward_funcs", "[format]"])
    assert found.reward_weights is None  # those were of other functions
    assert "its reward_weights are of its own reward_funcs and are left out" in caplog.text


@pytest.mark.parametrize(("rows", "held_out"), [(4, 0), (20, 4), (150, 30), (2000, 200)])
def test_what_is_held_out_by_default_leaves_rows_to_train_on(tmp_path: Path, rows: int, held_out: int) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}", "answer": i}) + "\n" for i in range(rows)))
    train_rows, eval_rows = load_task_rows(Recipe(dataset_name=str(path), model_name_or_path="m"))
    assert (len(train_rows), len(eval_rows)) == (rows - held_out, held_out)


def test_an_evaluation_takes_every_key_of_a_recipe_that_trains(tmp_path: Path) -> None:
    recipe = {field.name: getattr(Recipe(), field.name) for field in fields(Recipe)}
    recipe |= {"output_dir": "runs/mine", "eval_samples": 3, "learning_rate": 0.5}
    (tmp_path / "r.yaml").write_text(json.dumps({k: v for k, v in recipe.items() if v is not None}))
    stage = load_stage("eval", str(tmp_path / "r.yaml"))
    assert stage.folder == Path("runs/mine/eval") and stage.options.eval_samples == 3
    assert load_stage("eval", str(tmp_path / "r.yaml"), ["--output_dir", "x"]).folder == Path("x")
    with pytest.raises(ValueError, match="learning_rate has no effect on kind 'eval'"):
        load_stage("eval", None, ["--learning_rate", "1"])
    (tmp_path / "e.yaml").write_text("output_dir: measured\neval_samples: 3\n")
    assert load_stage("eval", str(tmp_path / "e.yaml")).folder == Path("measured")  # one that only measures


def test_without_a_connection_a_hub_name_fails_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub._answers.cache_clear()
    try:
        with pytest.raises(ValueError, match="the Hub cannot be reached, and its cache has no model of this name"):
            load_pretrained("nobody/nothing-at-all")
        assert constants.is_offline_mode()
        out = ["--output_dir", str(tmp_path)]
        assert cli.main(["train", "--dataset_name", "nobody/nothing-at-all", "--model_name_or_path", "x", *out]) == 2
        assert "got 'nobody/nothing-at-all': " in capsys.readouterr().err
    finally:
        hub._answers.cache_clear()
        if "datasets" in __import__("sys").modules:
            __import__("datasets").config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE


def small_model(name: str, vocab_size: int) -> PreTrainedModel:
    common = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}  # fmt: skip
    options: dict[str, Any] = {
        "Gemma2": common | {"query_pre_attn_scalar": 8},
        "GptOss": common | {"num_local_experts": 2, "num_experts_per_tok": 1},
        "Bloom": {"hidden_size": 16, "n_layer": 1, "n_head": 2},
        "Mamba": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
        "Mpt": {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 64},
        "XGLM": {"d_model": 16, "attention_heads": 2, "num_layers": 1, "ffn_dim": 16, "max_position_embeddings": 64},
    }[name]
    config = getattr(transformers, f"{name}Config")(vocab_size=vocab_size, **options)
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize("name", ["Gemma2", "GptOss", "Bloom", "Mamba", "Mpt", "XGLM"])
def test_a_model_takes_the_attention_of_its_class(tmp_path: Path, name: str) -> None:
    tokenizer = TASKS["addition"].build_tokenizer()
    small_model(name, len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = Recipe(
        model_name_or_path=str(tmp_path / "model"), output_dir=str(tmp_path / "run"), device="cpu", max_steps=1,
        max_completion_length=3, num_eval_prompts=0, disable_tqdm=True, completions_steps=0,
    )  # fmt: skip
    assert train(recipe).checkpoint.name == "checkpoint-1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "mine.yaml"], "train takes a recipe by name: --recipe mine.yaml"),
        (["eval", "mine.yaml", "--ks", "1"], "eval takes a recipe by name: --recipe mine.yaml"),
        (
            ["recipe", "--recipe", "mine.yaml"],
            "recipe takes a file of stages without an option: grpo-kernels recipe mine",
        ),
    ],
)
def test_a_recipe_in_the_other_commands_way_is_told(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out


UNTIL_THE_FIRST_STEP = """
import sys
from grpo_kernels import cli
from grpo_kernels.training.loop import GRPOLoop
def stop(self, micro_batches):
    sys.stdout.write("MODULES " + " ".join(name for name in sys.modules if name.startswith("grpo_kernels.")))
    sys.exit()
GRPOLoop.optimizer_step = stop
cli.main(["train", "--recipe", "addition", "--sft_steps", "1", "--num_eval_prompts", "2", "--disable_tqdm", "true"])
"""


def test_a_run_imports_what_it_uses(tmp_path: Path) -> None:
    """Before the first step of the demo: no server, no sandbox, no page, no reward that is not asked for."""
    done = subprocess.run(
        [sys.executable, "-c", UNTIL_THE_FIRST_STEP], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    modules = done.stdout.partition("MODULES ")[2].split()
    training = {name.removeprefix("grpo_kernels.") for name in modules if ".training" in name or ".rewards" in name}
    assert len(training) <= 30, sorted(training)
    parts = {part for name in training for part in name.split(".")}
    assert not parts & {"server", "vllm_client", "bubblewrap", "code", "language", "stages", "augmentation", "page"}
