"""Checkpoints that are whole or absent, Ctrl-C, and the command line."""

from __future__ import annotations

import errno
import json
import math
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_kernels import cli
from grpo_kernels.files import replace_text, replacing
from grpo_kernels.hub import load_tokenizer
from grpo_kernels.training.addition import TASKS, build_model
from grpo_kernels.training.checkpoint import clear_run, list_checkpoints, save_checkpoint, status_line
from grpo_kernels.training.report import append_records, read_records
from grpo_kernels.training.report.page import plot_curves


@pytest.fixture
def tokenizer():
    return TASKS["addition"].build_tokenizer()


@pytest.fixture
def model(tokenizer):
    return build_model(tokenizer, seed=0)


def test_a_checkpoint_loads_with_the_auto_classes(tmp_path, model, tokenizer):
    path = save_checkpoint(tmp_path, 3, model, tokenizer, keep=2)
    assert path == tmp_path / "checkpoint-3"
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(path)("1 + 1")["input_ids"] == tokenizer("1 + 1")["input_ids"]


def test_a_checkpoints_words_are_those_it_was_saved_with(tmp_path, model, tokenizer):
    """AutoTokenizer takes the class of the model's family, which joins words without spaces."""
    path = save_checkpoint(tmp_path, 3, model, tokenizer, keep=2)
    text = "<think> units 7 + 8 = 5 carry 1 </think>"
    loaded = load_tokenizer(str(path))
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(tokenizer(text)["input_ids"]) == text and loaded.padding_side == "left"


def test_an_interrupted_write_leaves_the_earlier_checkpoint(tmp_path, model, tokenizer, monkeypatch):
    save_checkpoint(tmp_path, 1, model, tokenizer, keep=1)

    def interrupted(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "save_pretrained", interrupted)  # the model's files are already written then
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 2, model, tokenizer, keep=1)
    assert list_checkpoints(tmp_path) == [tmp_path / "checkpoint-1"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    save_checkpoint(tmp_path, 2, model, tokenizer, keep=1)
    assert list_checkpoints(tmp_path) == [tmp_path / "checkpoint-2"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2"]


def test_an_interrupted_deletion_leaves_no_checkpoint_with_parts_missing(tmp_path, model, tokenizer, monkeypatch):
    save_checkpoint(tmp_path, 1, model, tokenizer, keep=1)

    def interrupted(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("grpo_kernels.training.checkpoint.shutil.rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 2, model, tokenizer, keep=1)
    assert list_checkpoints(tmp_path) == [tmp_path / "checkpoint-2"]
    save_checkpoint(tmp_path, 10, model, tokenizer, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]


def test_clearing_a_run_leaves_other_files(tmp_path, model, tokenizer):
    save_checkpoint(tmp_path, 1, model, tokenizer, keep=1)
    for name in ("metrics.jsonl", "curves.png", "notes.txt", "checkpoint-mine"):
        (tmp_path / name).write_text("")
    clear_run(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-mine", "notes.txt"]


def test_a_record_that_a_full_disk_has_no_room_for_is_not_there_in_part(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_records(path, [{"step": 1, "reward": 0.5}])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # a write beyond it is cut, and the next refused
    try:
        for size in (30_000, 19_980, 5_000_000):
            with pytest.raises(OSError, match="File too large"):
                append_records(path, [{"step": 2, "text": "a" * 10}, {"step": 2, "text": "b" * size}])
            assert path.read_bytes() == b'{"step": 1, "reward": 0.5}\n'
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    append_records(path, [{"step": 2, "reward": 0.25}, {"step": 3, "reward": math.nan}])
    assert read_records(path) == [
        {"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.25}, {"step": 3, "reward": None},
    ]  # fmt: skip
    with pytest.raises(ValueError, match="Out of range float"):
        append_records(path, [{"step": 4, "reward": math.inf}])
    assert len(read_records(path)) == 3
    full = Path("/dev/full")
    if full.exists():
        with pytest.raises(OSError, match="No space left on device"):
            append_records(full, [{"step": 1}])


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path, model, tokenizer, monkeypatch, error):
    save_checkpoint(tmp_path, 1, model, tokenizer, keep=1)

    def full(folder):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "save_pretrained", full)
        with pytest.raises(OSError, match=r"checkpoint-2 could not be written: .*No space left"):
            save_checkpoint(tmp_path, 2, model, tokenizer, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert status_line(tmp_path).startswith(f"last complete checkpoint: {tmp_path / 'checkpoint-1'}; metrics: ")
    AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")


def test_a_file_is_replaced_as_a_whole_or_stays(tmp_path):
    path = replace_text(tmp_path / "a.txt", "one")
    with pytest.raises(ValueError, match="stop"), replacing(path) as unfinished:
        unfinished.write_text("tw")
        raise ValueError("stop")
    assert path.read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    with replacing(path) as unfinished:
        unfinished.write_bytes(b"\x00two")
        assert path.read_text() == "one"
    assert path.read_bytes() == b"\x00two" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_curves_are_drawn_and_a_metric_that_no_record_has_is_named(tmp_path, monkeypatch):
    drawn, save = [], Figure.savefig

    def keep(figure, *arguments, **options):
        drawn.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    append_records(tmp_path / "metrics.jsonl", [{"step": s, "reward": s / 10, "eval_accuracy": 0.4} for s in range(5)])
    plot_curves(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    reward, accuracy, kl, clipped = drawn[0].axes
    assert all(axes.get_position().width > 0.3 and axes.get_position().height > 0.3 for axes in drawn[0].axes)
    assert reward.lines[0].get_xydata().tolist() == [[s, s / 10] for s in range(5)]
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["held out, temperature 1"]
    assert [axes.texts[0].get_text() for axes in (kl, clipped)] == [
        "no kl in this run", "no clip_ratio/region_mean in this run",
    ]  # fmt: skip


def start_endless_run(folder):
    command = [sys.executable, "-m", "grpo_kernels.cli", "train", "--recipe", "addition", "--output_dir", str(folder)]
    small = {
        "sft_steps": 2, "num_eval_prompts": 0, "max_steps": 100000, "save_steps": 1, "max_completion_length": 8,
        "per_device_train_batch_size": 8, "steps_per_generation": 1, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    arguments = [text for key, value in small.items() for text in (f"--{key}", str(value))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # a test run in a shell's background is deaf to SIGINT, and so would be what it starts
    return subprocess.Popen(
        [*command, *arguments], **pipes, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    )


def test_ctrl_c_leaves_a_usable_checkpoint_and_usable_metrics(tmp_path):
    process = start_endless_run(tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "checkpoint-5").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    latest = list_checkpoints(tmp_path)[-1]
    assert f"interrupted; last complete checkpoint: {latest}; metrics: {tmp_path / 'metrics.jsonl'}" in errors
    assert "Traceback" not in errors
    steps = [record["step"] for record in read_records(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert int(latest.name.removeprefix("checkpoint-")) in (len(steps), len(steps) - 1)
    tokenizer = AutoTokenizer.from_pretrained(latest)
    logits = AutoModelForCausalLM.from_pretrained(latest)(**tokenizer("1 2 + 3 4 =", return_tensors="pt")).logits
    assert logits.isfinite().all()


def test_bad_arguments_end_with_status_2_and_one_line(tmp_path, capsys):
    assert cli.main(["train", "--recipe", "addition", "--learning_rat", "1"]) == 2
    assert capsys.readouterr().err == (
        "error: command line: unknown key 'learning_rat'; the nearest known key is 'learning_rate'\n"
    )
    assert cli.main(["train", "--recipe", "nothing"]) == 2
    assert "no recipe 'nothing'" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    arguments = ["--output_dir", str(tmp_path), "--overwrite_output_dir", "false"]
    assert cli.main(["train", "--recipe", "addition", *arguments]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {}


REWARD = """
def typed(prompts, completions, **columns):
    return ["1"] * len(completions)
"""


def test_a_module_of_the_working_folder_is_found_and_its_error_says_what_is_left(tmp_path, capsys, monkeypatch):
    (tmp_path / "reward_of_the_folder.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # without the folder, as a console script has it
    arguments = ["train", "--num_eval_prompts", "0", "--device", "cpu", "--disable_tqdm", "true", "--output_dir", "out",
                 "--max_completion_length", "2", "--reward_funcs"]  # fmt: skip
    assert cli.main([*arguments, "nowhere_to_be_found:f"]) == 2
    assert "error: reward_funcs: 'nowhere_to_be_found:f' cannot be imported" in capsys.readouterr().err
    assert cli.main([*arguments, "reward_of_the_folder:typed"]) == 2
    errors = capsys.readouterr().err
    assert "stopped; last complete checkpoint: out/checkpoint-0" in errors
    assert "must return numbers or None, got str '1'" in errors and "Traceback" not in errors


def test_info_needs_no_training_extra():
    script = (
        "import sys; sys.modules.update(dict.fromkeys(['transformers', 'yaml', 'tqdm', 'datasets', 'matplotlib']));"
        "from grpo_kernels.cli import main; status = main(['info']);"
        "assert main(['train', '--recipe', 'addition']) == 2; sys.exit(status)"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert "torch" in finished.stdout
    assert "training needs the extra grpo-kernels[train]" in finished.stderr
