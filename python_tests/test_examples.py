"""The examples do what their docstrings say."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from statistics import fmean

import pytest
import torch

from grpo_kernels import rewards
from grpo_kernels.cli import main as grpo_kernels_command

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run_example():
    """Runs an example's ``main`` on one thread, and leaves torch with as many as it had."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda name, *arguments: runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](list(map(str, arguments)))
    torch.set_num_threads(threads)


def test_the_minimal_loop_learns(run_example, capsys):
    curve = run_example("minimal_grpo", "--steps", 30, "--prompts", 16)
    assert fmean(curve[:5]) < 0.2 and fmean(curve[-5:]) > fmean(curve[:5]) + 0.1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["step", "10"], ["step", "20"], ["step", "30"]]
    assert float(lines[-1].split()[3]) == pytest.approx(fmean(curve[-10:]), abs=1e-3)


def test_the_minimal_loop_takes_a_model_and_a_kl_penalty(run_example, tmp_path):
    from grpo_kernels.training.addition import TASKS, build_model

    tokenizer = TASKS["addition"].build_tokenizer()
    build_model(tokenizer, 0, hidden_size=32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = ("--model", tmp_path, "--steps", 6, "--prompts", 8)
    free, held = (run_example("minimal_grpo", *options, "--beta", beta) for beta in (0, 10))
    assert free[0] == held[0] and free != held


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_minimal_loop_learns_to_sort_from_any_seed(seed, run_example):
    curve = run_example("minimal_grpo", "--seed", seed)
    assert fmean(curve[:5]) < 0.2 and fmean(curve[-10:]) > 0.75


def test_a_task_of_ones_own_is_a_file_of_rows_and_a_model(run_example, tmp_path, capsys):
    run_example("synthetic_task", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows) == 4095
    assert all(row["answer"] == str(eval(row["prompt"].removesuffix("=").replace(" ", ""))) for row in rows)
    worked = [row for row in rows if "completion" in row]
    answers = [row["answer"] for row in worked]
    texts = [row["completion"] for row in worked]
    right = fmean(rewards.accuracy_reward([""] * len(worked), texts, answer=answers))
    assert len(worked) == 1000 and 0.6 < right < 0.7
    assert fmean(rewards.format_reward([""] * len(worked), texts)) == 1
    command = ["train", "--recipe", "addition", "--dataset_name", tmp_path / "rows.jsonl"]
    command += ["--model_name_or_path", tmp_path / "model", "--sft_steps", 2, "--max_steps", 1]
    command += ["--max_completion_length", 32, "--output_dir", tmp_path / "run"]
    command += ["--num_eval_prompts", 4, "--eval_samples", 1, "--num_generations", 2, "--sft_batch_size", 4]
    command += [
        "--per_device_train_batch_size",
        2,
        "--gradient_accumulation_steps",
        1,
        "--device",
        "cpu",
        "--num_threads",
        1,
    ]
    assert grpo_kernels_command(list(map(str, command))) == 0
    assert "held-out accuracy" in capsys.readouterr().out
