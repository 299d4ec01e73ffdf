"""A run that is killed and resumed is bit-equal to one that was not; a checkpoint that does not fit is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_kernels.training.addition import TASKS
from grpo_kernels.training.checkpoint import list_checkpoints
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.report import read_records
from grpo_kernels.training.run import train

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "num_generations": 4, "per_device_train_batch_size": 4, "steps_per_generation": 2,
    "gradient_accumulation_steps": 1, "max_completion_length": 8, "learning_rate": 1e-3, "beta": 0.1, "sft_steps": 3,
    "sft_batch_size": 4, "num_eval_prompts": 4, "eval_samples": 1, "max_steps": 8, "save_steps": 2, "device": "cpu",
    "num_threads": 1, "disable_tqdm": True, "lr_scheduler_type": "cosine", "warmup_steps": 2,
}  # fmt: skip


def recipe_of(folder: Path, **changes: object) -> Recipe:
    return Recipe(output_dir=str(folder), **(SETTINGS | changes))


def command(folder: Path, **changes: object) -> list[str]:
    options = SETTINGS | {"output_dir": folder, "resume": True} | changes
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "grpo_kernels.cli", "train", *arguments]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(folder)[-1] / "model.safetensors")


def same_run(one: Path, other: Path) -> None:
    """Equal parameters, to the bit, and equal metrics but for the clock."""
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    records = [
        [
            {name: value for name, value in record.items() if name != "step_time"}
            for record in read_records(path / "metrics.jsonl")
        ]
        for path in (one, other)
    ]
    assert records[0] == records[1] and len(records[0]) == SETTINGS["max_steps"] + 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, in a process of its own as the others are."""
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run(command(folder), check=True, capture_output=True, timeout=300)
    return folder


@pytest.mark.early
@pytest.mark.full
@pytest.mark.parametrize("checkpoint", [0, 2, 4])
def test_a_run_killed_after_a_checkpoint_goes_on_as_if_nothing_had_been(
    whole: Path, tmp_path: Path, checkpoint: int
) -> None:
    process = subprocess.Popen(command(tmp_path, save_total_limit=9), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / f"checkpoint-{checkpoint}").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / f"checkpoint-{checkpoint}").exists()
    done = subprocess.run(command(tmp_path), check=True, capture_output=True, text=True, timeout=300)
    assert "resumed after step" in done.stdout
    same_run(whole, tmp_path)


@pytest.mark.early
@pytest.mark.full
def test_a_run_killed_at_ten_random_moments_is_the_same_run(whole: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    subprocess.run(command(tmp_path / "timed"), check=True, capture_output=True, timeout=300)
    seconds = time.monotonic() - start
    generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(4)))
    for _ in range(10):
        process = subprocess.Popen(command(tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds * torch.rand((), generator=generator).item())
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(tmp_path / "killed"), check=True, capture_output=True, timeout=300)
    same_run(whole, tmp_path / "killed")


def test_a_run_resumed_in_its_middle_is_the_same_run(tmp_path: Path) -> None:
    """In this process; those that are killed are left to ``make test-full``."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(recipe_of(whole, save_total_limit=9))
    shutil.copytree(whole, again)
    for checkpoint in list_checkpoints(again)[-2:]:
        shutil.rmtree(checkpoint)
    assert list_checkpoints(again)[-1].name == "checkpoint-4"
    train(recipe_of(again, save_total_limit=9, resume=True))
    same_run(whole, again)


def test_resuming_a_finished_run_writes_nothing_new(tmp_path: Path) -> None:
    train(recipe_of(tmp_path))
    before = weights(tmp_path)
    result = train(recipe_of(tmp_path, resume=True))
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path).items())
    assert result.checkpoint == tmp_path / "checkpoint-8" and result.before and result.after
    assert len(read_records(tmp_path / "metrics.jsonl")) == 10


def test_a_checkpoint_of_another_run_or_cut_short_is_refused(tmp_path: Path) -> None:
    train(recipe_of(tmp_path, max_steps=2))
    with pytest.raises(ValueError, match=r"is of another run: .*learning_rate 0\.001, now 0\.5"):
        train(recipe_of(tmp_path, max_steps=2, learning_rate=0.5, resume=True))
    newest = list_checkpoints(tmp_path)[-1]
    for name in ("optimizer.safetensors", "trainer_state.json", "random-0.json", "model.safetensors"):
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match="cannot be read, it may be cut short"):
            train(recipe_of(tmp_path, max_steps=2, resume=True))
        (newest / name).write_bytes(content)
    train(recipe_of(tmp_path, max_steps=2, resume=True))


def test_a_state_of_another_shape_is_named(tmp_path: Path) -> None:
    train(recipe_of(tmp_path, max_steps=2))
    newest = list_checkpoints(tmp_path)[-1]
    for name, spoiled, message in (
        ("trainer_state.json", [], "expected a mapping, got list"),
        ("trainer_state.json", {"step": "2"}, "expected 'step' to be of type int, got '2'"),
        ("trainer_state.json", {"step": 2, "rows_drawn": 4, "schedule": {}}, "'param_groups' to be of type list"),
        ("random-0.json", {"python": []}, "expected 'numpy' to be of type list, got None"),
    ):
        content = (newest / name).read_bytes()
        (newest / name).write_text(json.dumps(spoiled))
        with pytest.raises(ValueError, match=f"checkpoint-2 cannot be read.*{message}"):
            train(recipe_of(tmp_path, max_steps=2, resume=True))
        (newest / name).write_bytes(content)


def test_a_checkpoint_that_lacks_weights_or_saw_other_rows_is_refused(tmp_path: Path) -> None:
    rows, _ = TASKS["addition"].build_rows(0, 4)
    train(recipe_of(tmp_path, max_steps=2), rows=rows[:50])
    with pytest.raises(ValueError, match=r"is of another run: the training rows are others now"):
        train(recipe_of(tmp_path, max_steps=2, resume=True), rows=rows[1:51])
    with pytest.raises(ValueError, match=r"is of another run: hidden_size 96, now 64"):
        train(recipe_of(tmp_path, max_steps=2, resume=True, hidden_size=64), rows=rows[:50])
    for checkpoint in list_checkpoints(tmp_path):
        path = checkpoint / "model.safetensors"
        content = path.read_bytes()
        save_file({k: v for k, v in load_file(path).items() if "norm" not in k}, path, metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=rf"{checkpoint.name} cannot be read, .* lacks weights of the model: .*and 2"
        ):
            train(recipe_of(tmp_path, max_steps=2, resume=True), rows=rows[:50])
        path.write_bytes(content)
    before = weights(tmp_path)
    train(recipe_of(tmp_path, max_steps=2, resume=True), rows=rows[:50])
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path).items())


def test_a_damaged_line_of_metrics_is_named_on_resuming(tmp_path: Path) -> None:
    train(recipe_of(tmp_path, max_steps=2))
    metrics = tmp_path / "metrics.jsonl"
    whole = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join([whole[0], whole[1][:9], *whole[1:]]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: expected a JSON object"):
        train(recipe_of(tmp_path, max_steps=2, resume=True))


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    train(recipe_of(tmp_path, max_steps=2))
    names = {path.suffix for path in list_checkpoints(tmp_path)[-1].rglob("*") if path.is_file()}
    assert names <= {".json", ".safetensors", ".jinja"}
    state = json.loads((list_checkpoints(tmp_path)[-1] / "trainer_state.json").read_text())
    assert state["step"] == 2 and state["recipe"]["learning_rate"] == 1e-3
