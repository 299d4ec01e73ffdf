"""A stage that is done is not run again, and says so where what it read has changed since."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from grpo_kernels import cli
from grpo_kernels.training.addition import TASKS, build_model
from grpo_kernels.training.recipe import load_recipe
from grpo_kernels.training.stages import load_stages
from grpo_kernels.training.stages.runner import fingerprints, run_stages

ROWS = "".join(json.dumps({"prompt": f"{i} + 1 =", "answer": i + 1, "completion": str(i + 1)}) + "\n" for i in range(8))
REWARD = "def right(completions, **kwargs):\n    return [1.0] * len(completions)\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model, a teacher, rows, a dataset in parts and the module of a reward function."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stage_reward", raising=False)  # of another test's folder
    for name in ("model", "teacher"):
        tokenizer = TASKS["addition"].build_tokenizer()
        build_model(tokenizer, seed=0, hidden_size=32).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for name in ("sums.jsonl", "rows.jsonl", "parts/a/train-0.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(ROWS)
    (tmp_path / "stage_reward.py").write_text(REWARD)
    return tmp_path


def command(kind: str, *arguments: str) -> list[str]:
    small = ["--num_eval_prompts", "2", "--device", "cpu", "--num_threads", "1", "--disable_tqdm", "true"]
    return [kind, *small, "--output_dir", f"runs/{kind}", *arguments]


EVAL = command("eval", "--model_name_or_path", "model", "--dataset_name", "sums.jsonl", "--eval_samples", "1",
               "--reward_funcs", "[accuracy, 'stage_reward:right']", "--max_completion_length", "4")  # fmt: skip
SFT = command("sft", "--dataset_name", "parts", "--data", "rows.jsonl", "--sft_steps", "1", "--max_completion_length",
              "4", "--model_name_or_path", "model", "--eval_samples", "1")  # fmt: skip
DISTILL = command("distill", "--teacher_model_name_or_path", "teacher", "--model_name_or_path", "model", "--beta", "0",
                  "--dataset_name", "sums.jsonl", "--data", "rows.jsonl", "--sft_steps", "1", "--eval_samples", "1",
                  "--max_completion_length", "4")  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        (EVAL, {"model/config.json": "model", "model/more.safetensors": "model", "sums.jsonl": "sums.jsonl",
                "stage_reward.py": "stage_reward:right"}),
        (SFT, {"parts/a/train-0.jsonl": "parts", "rows.jsonl": "rows.jsonl"}),
        (DISTILL, {"teacher/model.safetensors": "teacher"}),
    ],
    ids=["eval", "sft", "distill"],
)  # fmt: skip
def test_a_stage_that_is_done_says_what_has_changed(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], changes: dict[str, str]
) -> None:
    assert cli.main(arguments) == 0
    for file, name in changes.items():
        path, content = folder / file, (folder / file).read_bytes() if (folder / file).exists() else None
        path.write_bytes((content or b"") + b" ")
        capsys.readouterr()
        assert cli.main(arguments) == 2
        out, err = capsys.readouterr()
        assert f"holds a stage that read {name}, which has changed since; delete it to run it again, or set" in err
        assert err.count("\n") == 1 and "accuracy" not in out
        path.write_bytes(content) if content is not None else path.unlink()
    for path in folder.rglob("*"):  # times alone are no change
        os.utime(path, (1, 1))
    (folder / "model" / ".DS_Store").write_text("x")
    assert cli.main(arguments) == 0
    assert "was done before" in capsys.readouterr().out
    used = folder / "runs" / arguments[0] / "used.json"
    (folder / "rows.jsonl").write_text(ROWS * 2)
    (folder / "sums.jsonl").write_text(ROWS * 2)
    used.write_text("{}")  # of a version that kept no record of files
    assert cli.main(arguments) == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, content) for name in ("done.json", "used.json", "config.yaml")
          for content in (b"[]", b"3", b"\xff", b"a: [", b"[" * 9999)),
        ("done.json", b'{"config": [], "line": {}}'),
        ("done.json", b'{"config": {}}'),
        ("used.json", b'{"files": 3}'),
    ],
)  # fmt: skip
def test_a_record_of_a_stage_that_cannot_be_read_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes
) -> None:
    rows = "".join(ROWS.replace('": "', '": "<think>a. b.</think><answer>').replace('"}', '</answer>"}'))
    (folder / "rows.jsonl").write_text(rows)
    arguments = ["augment", "--dataset_name", "rows.jsonl", "--ways", "[start]", "--output_dir", "run"]
    assert cli.main(arguments) == 0
    if name == "config.yaml":
        (folder / "run" / "done.json").unlink()
    (folder / "run" / name).write_bytes(content)
    capsys.readouterr()
    assert cli.main(arguments) == 2
    errors = capsys.readouterr().err
    assert f"run/{name}" in errors and errors.count("\n") == 1
    assert "cannot be read" in errors or "expected a mapping" in errors


def test_a_stage_that_is_run_again_has_new_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(EVAL) == 0
    (folder / "sums.jsonl").write_text(ROWS * 2)
    assert cli.main([*EVAL, "--overwrite_output_dir", "true"]) == 0
    capsys.readouterr()
    assert cli.main(EVAL) == 0
    assert "was done before" in capsys.readouterr().out


def test_rows_of_an_earlier_stage_that_were_edited_are_noticed(folder: Path) -> None:
    content = {
        "output_dir": "runs/two",
        "common": {"dataset_name": "addition-mixed", "num_eval_prompts": 0, "device": "cpu", "disable_tqdm": True,
                   "max_completion_length": 12},
        "stages": {"made": {"kind": "augment", "num_rows": 3}, "sft": {"kind": "sft", "data": "made", "sft_steps": 1}},
    }  # fmt: skip
    (folder / "two.yaml").write_text(yaml.safe_dump(content))
    root, stages = load_stages("two.yaml")
    run_stages(root, stages)
    rows = root / "made" / "rows.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(
        ValueError, match=r"two.sft holds a stage that read runs.two.made.rows\.jsonl, which has changed"
    ):
        run_stages(root, stages)


def test_a_reward_function_may_be_mended_before_a_run_goes_on_and_that_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {
        "output_dir": "runs/grpo",
        "common": {"dataset_name": "addition", "num_eval_prompts": 0, "device": "cpu", "disable_tqdm": True,
                   "num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 4},
        "stages": {"grpo": {"kind": "grpo", "max_steps": 2, "save_steps": 1, "reward_funcs": ["stage_reward:right"]}},
    }  # fmt: skip
    (folder / "grpo.yaml").write_text(yaml.safe_dump(content))
    import stage_reward

    calls = []

    def fails_at_the_second_step(completions, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("answer")
        return [1.0] * len(completions)

    with monkeypatch.context() as patch:
        patch.setattr(stage_reward, "right", fails_at_the_second_step)
        with pytest.raises(RuntimeError, match="KeyError"):
            run_stages(*load_stages("grpo.yaml"))
    (folder / "stage_reward.py").write_text(REWARD + "\n")
    (line,) = run_stages(*load_stages("grpo.yaml"))
    assert "goes on with stage_reward:right, which has changed since the run began" in capsys.readouterr().out
    assert line["stage"] == "grpo" and run_stages(*load_stages("grpo.yaml")) == [line]


def test_what_stages_write_beside_a_dataset_is_no_part_of_it(folder: Path) -> None:
    config = {"dataset_name": str(folder), "output_dir": str(folder / "runs" / "sft")}
    before = fingerprints(config)
    for written in ("runs/sft/metrics.jsonl", "runs/eval/metrics.jsonl"):
        (folder / written).parent.mkdir(parents=True)
        (folder / written).write_text("{}")
    assert fingerprints(config) == before and before.keys() == {str(folder)}
    (folder / "parts" / "b.jsonl").write_text(ROWS)
    assert fingerprints(config) != before


def test_names_of_ours_and_of_the_hub_have_no_files(folder: Path) -> None:
    for name in ("addition", "accuracy"):  # not read, whatever stands there
        (folder / name).mkdir()
    recipe = load_recipe("addition")
    config = {"dataset_name": recipe.dataset_name, "model_name_or_path": "owner/model", "output_dir": "runs/x",
              "reward_funcs": ["accuracy", "repetition(n=3)", "owner/reward"], "keep": None, "check": None}  # fmt: skip
    assert fingerprints(config) == {}
    assert fingerprints(config | {"reward_funcs": ["teacher"]}).keys() == {"teacher"}


def test_of_a_large_file_size_and_time_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_kernels.training.stages.runner._HASHED", 10)
    config = {"data": "rows.jsonl", "output_dir": "runs/x"}
    os.utime(folder / "rows.jsonl", ns=(10**18, 10**18))
    before = fingerprints(config)
    os.utime(folder / "rows.jsonl", ns=(10**18, 10**18 + 1))
    assert fingerprints(config) != before
    os.utime(folder / "rows.jsonl", ns=(10**18, 10**18))
    assert fingerprints(config) == before
