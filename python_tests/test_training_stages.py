"""Recipes of several stages: what they refuse, that they go on where they stopped, and that each uses the others."""

from __future__ import annotations

import errno
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from grpo_kernels import cli
from grpo_kernels.rewards import extract_answer
from grpo_kernels.training.addition import TASKS
from grpo_kernels.training.data.templates import join_texts
from grpo_kernels.training.stages import Stage, load_stage, load_stages
from grpo_kernels.training.stages.runner import run_stage, run_stages

SMALL = """
common: {dataset_name: addition-mixed, num_eval_prompts: 4, eval_samples: 2, sft_batch_size: 4, sft_steps: 2,
         num_generations: 4, per_device_train_batch_size: 4, max_completion_length: 12, device: cpu, num_threads: 1,
         disable_tqdm: true, reward_funcs: [accuracy, format, language_consistency,
                                              "overlong(max_completion_len=12, soft_punish_cache=4)"]}
stages:
  cold-start: {kind: sft, sft_steps: 30, sft_learning_rate: 3e-3}
  grpo: {kind: grpo, model: cold-start, max_steps: 2, learning_rate: 1e-4}
  samples: {kind: sample, model: grpo, prompts: 6, samples: 2, keep: {language_consistency: 0}}
  student: {kind: sft, data: samples, hidden_size: 32}
"""
#: Every kind that SMALL has not: problems made of the dataset's traces, failed ones too, and of samples; two students.
FURTHER = """
  made: {kind: augment, data: TRACES.jsonl, num_rows: 9}
  made-of-samples: {kind: augment, data: samples, ways: [goal]}
  on-made: {kind: grpo, model: cold-start, data: made, max_steps: 2, max_completion_length: 16, completions_steps: 1}
  learner: {kind: distill, teacher: grpo, prompts: 6, samples: 2, keep: {language_consistency: 0}, hidden_size: 32}
  soft: {kind: distill, teacher: grpo, prompts: 6, samples: 2, hidden_size: 32, beta: 0.5, lmbda: 0.5}
  measured: {kind: eval, model: learner, eval_samples: 4, ks: [1, 2]}
"""


def written(folder: Path, text: str = SMALL) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text + f"\noutput_dir: {folder / 'run'}\n")
    return str(path)


def test_the_recipe_that_ships_is_the_whole_pipeline() -> None:
    root, stages = load_stages("r1-mini", ["--seed", "3"])
    assert root == Path("runs/r1-mini")
    assert [stage.kind for stage in stages] == ["sft", "grpo", "sample", "sft", "grpo", "sample", "sft", "sft"]
    assert {stage.options.seed for stage in stages} == {3}
    by_name = {stage.name: stage for stage in stages}
    assert by_name["sft"].options.model is None and by_name["sft"].options.data == "rejection"  # a fresh base
    assert by_name["student"].options.hidden_size < by_name["sft"].options.hidden_size
    assert by_name["student"].options.sft_steps == by_name["student-cold-start"].options.sft_steps


def test_stages_use_each_other_and_are_not_run_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path)
    assert cli.main(["recipe", path]) == 0
    root = tmp_path / "run"
    lines = [json.loads(line) for line in (root / "summary.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["cold-start", "grpo", "samples", "student"]
    for line in lines:
        scores = {"eval_accuracy", "eval_accuracy_greedy", "eval_format", "eval_language_consistency"}
        assert (line.keys() >= scores) == (line["stage"] != "samples")
    rows = [json.loads(line) for line in (root / "samples" / "rows.jsonl").read_text().splitlines()]
    assert 0 < len(rows) == lines[2]["kept"] <= lines[2]["sampled"] == 12
    assert all(row["completion"] and row["prompt"] and row["answer"] for row in rows)
    config = json.loads((root / "student" / "checkpoint-2" / "config.json").read_text())
    assert config["hidden_size"] == 32 and (root / "grpo" / "report.html").exists()
    capsys.readouterr()
    (root / "student" / "done.json").unlink()
    _, stages = load_stages(path)
    again = run_stages(root, stages)
    printed = capsys.readouterr().out
    assert "== student" in printed and "== grpo" not in printed
    assert again[:3] == lines[:3]
    assert {k: v for k, v in again[3].items() if k != "seconds"} == {
        k: v for k, v in lines[3].items() if k != "seconds"
    }
    for key in ("seed", "max_steps"):  # a longer run of one that is done would be another
        assert cli.main(["recipe", path, f"--{key}", "7"]) == 2
        assert f"holds a stage with another {key}" in capsys.readouterr().err


@pytest.fixture(scope="module")
def further(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe with every kind of stage."""
    folder = tmp_path_factory.mktemp("further")
    task, rng = TASKS["addition-mixed"], random.Random(0)
    problems = [task.parse_prompt(row["prompt"]) for row in task.build_rows(0, 4)[0][-30:]]
    rows = [task.row(problem) | {"completion": task.trace(problem)} for problem in problems[:20]]
    slips = [task.row(problem) | {"completion": task.trace(problem, rng)} for problem in problems[20:25]]
    misread = [
        task.row(problem) | {"completion": task.trace((*problem[:1], problem[1] - 1))} for problem in problems[25:]
    ]
    (folder / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *slips, *misread]))
    text = (SMALL + FURTHER).replace("TRACES", str(folder / "traces"))
    root, stages = load_stages(written(folder, text))
    run_stages(root, stages)
    return root


def rows_of(folder: Path, name: str = "rows.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_every_stage_leaves_its_files(further: Path) -> None:
    lines = {line["stage"]: line for line in rows_of(further, "summary.jsonl")}
    for name, line in lines.items():
        folder = further / name
        files = {path.name for path in folder.iterdir()}
        assert files >= {"config.yaml", "versions.json", "metrics.jsonl", "samples.jsonl", "done.json"}, name
        assert rows_of(folder, "metrics.jsonl"), name
        assert (line["kind"] in ("sample", "augment")) <= ("rows.jsonl" in files)
        assert (line["kind"] in ("sft", "grpo", "distill")) == any(file.startswith("checkpoint-") for file in files)
        assert not any(file.startswith(".") for file in files), name
    assert rows_of(further / "on-made", "samples.jsonl") and len(rows_of(further / "soft", "samples.jsonl")) == 4 * 3


def test_distillation_on_samples_is_sampling_and_training_on_what_was_kept(further: Path) -> None:
    assert rows_of(further / "learner") == rows_of(further / "samples")
    one, other = (load_file(further / name / "checkpoint-2" / "model.safetensors") for name in ("learner", "student"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    soft = load_file(further / "soft" / "checkpoint-2" / "model.safetensors")
    assert not all(torch.equal(one[name], soft[name]) for name in one)


def test_augmentation_makes_problems_of_samples(further: Path) -> None:
    task, (_, held_out) = TASKS["addition-mixed"], TASKS["addition-mixed"].build_rows(0, 4)
    rows = rows_of(further / "made")
    found = dict(Counter(row["source"] for row in rows))
    line = next(line for line in rows_of(further, "summary.jsonl") if line["stage"] == "made")
    assert {name: line[name] for name in found} == found and line["kept"] == len(rows)
    assert found == {"seed": 20, "start": 9, "goal": 9, "hindsight": 5}
    assert {row["source"] for row in rows_of(further / "made-of-samples")} <= {"seed", "goal"}
    asked = {task.key(row) for row in held_out}
    for row in rows:
        whole = join_texts(row["completion_prefix"], row["completion"])
        assert extract_answer(whole) == row["answer"] and task.key({"prompt": row["seed_prompt"]}) not in asked
    trained_on = {sample["prompt"] for sample in rows_of(further / "on-made", "samples.jsonl")}
    assert trained_on and trained_on <= {row["prompt"] for row in rows}


def test_an_evaluation_has_intervals(further: Path) -> None:
    (record,) = rows_of(further / "measured", "metrics.jsonl")
    for name in ("accuracy", "accuracy_greedy", "pass@2", "cons@2"):
        assert record[f"eval_{name}_low"] <= record[f"eval_{name}"] <= record[f"eval_{name}_high"]
    assert record["eval_accuracy_low"] < record["eval_accuracy_high"]
    samples = rows_of(further / "measured", "samples.jsonl")
    assert len(samples) == 4 * (4 + 1) and all(isinstance(sample["right"], bool) for sample in samples)


def test_a_stages_config_runs_it_alone(further: Path, tmp_path: Path) -> None:
    config = str(further / "learner" / "config.yaml")
    assert cli.main(["distill", "--recipe", config, "--output_dir", str(tmp_path)]) == 0
    one, other = (
        load_file(folder / "checkpoint-2" / "model.safetensors") for folder in (tmp_path, further / "learner")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_folder_of_another_run_is_not_written_over(tmp_path: Path) -> None:
    root, stages = load_stages(written(tmp_path))
    (root / "cold-start").mkdir(parents=True)
    (root / "cold-start" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    with pytest.raises(FileExistsError, match="cold-start holds another run"):
        run_stages(root, stages)
    (root / "cold-start" / "config.yaml").write_text("sft_steps: 31\n")
    with pytest.raises(FileExistsError, match="another sft_steps that was not finished"):
        run_stages(root, stages)
    assert (root / "cold-start" / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'


def test_a_stage_says_which_one_a_full_disk_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, stages = load_stages(written(tmp_path))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("grpo_kernels.training.checkpoint.write_state", full)
        with pytest.raises(OSError, match=r"stage 'grpo' in .*grpo was not finished: .*checkpoint-0 could not .*space"):
            run_stages(root, stages)
    lines = run_stages(root, stages)  # and it goes on where there is space again
    assert [line["stage"] for line in lines] == [stage.name for stage in stages]


def test_a_stage_on_one_that_was_made_anew_is_not_done(tmp_path: Path) -> None:
    root, stages = load_stages(written(tmp_path, SMALL.replace("max_steps: 2", "max_steps: 1")))
    lines = run_stages(root, stages)
    first, second = (root / name / "done.json" for name in ("cold-start", "grpo"))
    left = {path: path.read_text() for path in (first, second)}
    first.write_text(left[first].replace('"seconds": ', '"seconds": 1'))  # as when it has been run again
    with pytest.raises(ValueError, match="grpo holds a stage on a model that was made anew since; delete it"):
        run_stages(root, stages)
    second.unlink()  # as of one that was interrupted
    with pytest.raises(FileExistsError, match="grpo holds a stage on a model that was made anew since"):
        run_stages(root, stages)
    first.write_text(left[first])
    second.write_text(left[second].replace('"seconds": ', '"seconds": 1'))
    with pytest.raises(ValueError, match="samples holds a stage on a model that was made anew"):
        run_stages(root, stages)
    (root / "samples" / "done.json").unlink()  # it begins again by itself
    again = run_stage(stages[2], {stage.name: stage for stage in stages})
    assert again["kept"] == lines[2]["kept"]


@pytest.mark.parametrize(
    "given", [["--output_dir", "X"], ["--output_dir=X"], ["--output-dir", "X"], ["--output-dir=X"]]
)
def test_the_folder_of_all_stages_is_given_in_any_spelling(given: list[str], tmp_path: Path) -> None:
    root, stages = load_stages("r1-mini", [*given, "--seed", "3"])
    assert root == Path("X") and [stage.folder for stage in stages] == [root / stage.name for stage in stages]
    assert {stage.options.seed for stage in stages} == {3}
    with pytest.raises(ValueError, match="expected one argument"):
        load_stages("r1-mini", ["--output_dir"])


def test_the_recipe_command_has_a_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["recipe", "--help"])
    assert stopped.value.code == 0 and "r1-mini" in capsys.readouterr().out


def test_several_processes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Two(NamedTuple):
        num_processes: int = 2

    monkeypatch.setattr("grpo_kernels.training.stages.runner.PartialState", lambda cpu: Two())
    path = written(tmp_path)
    assert cli.main(["recipe", path]) == 2
    assert "stages run in one process, got 2" in capsys.readouterr().err
    assert cli.main(["sft", "--sft_steps", "1", "--output_dir", str(tmp_path / "sft"), "--device", "cpu"]) == 2
    assert not (tmp_path / "sft").exists() and not (tmp_path / "run" / "cold-start").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: sft, data", "kind: sft, max_steps: 3, data", "stage student: max_steps has no effect on kind 'sft'"),
        ("kind: grpo, model", "kind: grpo, sft_steps: 3, model", "sft_steps has no effect on kind 'grpo'"),
        (
            "kind: sample, model: grpo",
            "kind: tune, model: grpo",
            "kind must be one of sft, grpo, sample, augment, distill, eval, got 'tune'",
        ),
        ("model: cold-start", "model: student", r"model must be one of \['cold-start'\], got 'student'"),
        ("data: samples", "data: grpo", r"data must be one of \['samples'\], got 'grpo'"),
        ("max_steps: 2", "max_step: 2", "stage grpo: unknown key 'max_step'; the nearest known key is 'max_steps'"),
        ("keep: {language_consistency: 0}", "seed: 0", "keep must say what a completion must earn"),
        ("kind: grpo, model", "kind: grpo, data: samples, model", "data must be one of|data has no effect"),
        ("kind: sft, data", "kind: sft, keep: {format: 1}, data", "keep has no effect on kind 'sft'"),
        ("stages:", "phases:", "expected output_dir, common and stages, got phases"),
        ("kind: sft, data: samples", "data: samples", "stage student: expected keys and values with a kind"),
        ("prompts: 6", "prompts: many", "stage 'samples': prompts must be an integer of at least 1, got 'many'"),
        ("keep: {language_consistency: 0}", "keep: {fluency: 0}", "keep: expected one of accuracy, .* got 'fluency'"),
        ("kind: sft, data: samples", "kind: distill", "either teacher or teacher_model_name_or_path must be given"),
        (
            "kind: sft, data: samples",
            "kind: distill, teacher: samples",
            r"teacher must be one of \['cold-start', 'grpo'\]",
        ),
        ("kind: sft, data: samples", "kind: distill, teacher: grpo, lmbda: 1", "lmbda needs a beta, got 1 without one"),
        (
            "kind: sft, data: samples",
            "kind: distill, teacher: grpo, beta: 2",
            "beta must be a number between 0 and 1, got 2",
        ),
        (
            "kind: sft, data: samples",
            "kind: distill, teacher: grpo, data: samples",
            "teacher has no effect on rows of data",
        ),
        (
            "kind: sft, data: samples, hidden_size: 32",
            "kind: augment, ways: [sideways]",
            "ways must be a list of some of start, goal, hind",
        ),
        ("kind: sft, data: samples", "kind: eval, ks: [3]", r"ks must be at most eval_samples \(2\), got 3"),
        ("kind: sft, data: samples", "kind: eval, lmbda: 1", "lmbda has no effect on kind 'eval'"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in SMALL
    with pytest.raises(ValueError, match=message):
        load_stages(written(tmp_path, SMALL.replace(old, new)))


STAGE = "stages: {a: {kind: augment, dataset_name: addition, num_rows: 2}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((STAGE.replace("a:", f"{name}:", 1), "the name of a stage must be a text that can name its folder, got")
          for name in ("1", "1.5", "null", "yes", "a/b", "/a", "..", ".", "''", '"a\\nb"', '"a\\0b"', "summary.jsonl")),
        ("stages: [{kind: augment}]", "stages must be a mapping, got [{'kind': 'augment'}]"),
        ("stages: augment", "stages must be a mapping, got 'augment'"),
        ("stages: {a: {kind: [augment]}}", "stage a: expected keys and values with a kind, got"),
        ("stages: {a: {kind: {}}}", "stage a: expected keys and values with a kind, got"),
        (STAGE + "common:", "common must be a mapping, got None"),
        (STAGE + "common: [1]", "common must be a mapping, got [1]"),
        (STAGE + "output_dir:", "output_dir must be a text, got None"),
        (STAGE + "output_dir: 5", "output_dir must be a text, got 5"),
        (STAGE + "1: 2", "expected output_dir, common and stages, got 1"),
        (STAGE + "common: {output_dir: x}", "output_dir has no effect in common"),
        (STAGE.replace("num_rows: 2", "output_dir: x"), "output_dir has no effect in a"),
        (STAGE.replace("}}", "}, a: {kind: augment}}"), "found the key 'a' twice"),
        (STAGE.replace("num_rows: 2", "num_rows: 2, num_rows: 3"), "found the key 'num_rows' twice"),
        ("stages: {a: {kind: sft, sft_steps: 1}, b: {kind: eval, model: a, model_name_or_path: x}}", "got both"),
        ("stages: {a: {kind: sample, keep: {1: 1}}}", "keep must be a mapping of reward functions to numbers"),
        ("stages: {a: {kind: sample, keep: {accuracy: .nan}}}", "keep must be a mapping of reward functions to"),
        ("stages: " + "[" * 5000, "cannot be read: maximum recursion depth"),
    ],
    ids=lambda value: repr(value)[:60],
)  # fmt: skip
def test_a_file_of_stages_that_has_other_values_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stages.yaml").write_text(text)
    assert cli.main(["recipe", "stages.yaml"]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_rows_may_be_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    traces = [f"<think>a. b.</think><answer>{i}</answer>" for i in range(3)]
    rows = [{"prompt": f"{i} =", "answer": i, "completion": trace} for i, trace in enumerate(traces)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ["--data", "~/rows.jsonl", "--dataset_name", "~/rows.jsonl", "--output_dir", "~/run"]
    stage = load_stage("augment", None, [*names, "--ways", "[start]", "--device", "cpu", "--num_eval_prompts", "0"])
    assert run_stage(stage)["seed"] == 3


def test_the_folder_of_all_stages_may_be_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The summary went into a folder that is called ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "stages.yaml").write_text("output_dir: ~/run\n" + STAGE)
    for overrides, name in (([], "run"), (["--output_dir", "~/other"], "other")):
        root, stages = load_stages(str(tmp_path / "stages.yaml"), overrides)
        assert root == tmp_path / name and stages[0].folder == root / "a"


def test_rejection_that_keeps_nothing_is_an_error(tmp_path: Path) -> None:
    text = SMALL.replace("keep: {language_consistency: 0}", "keep: {accuracy: 2}")
    root, stages = load_stages(written(tmp_path, text))
    with pytest.raises(ValueError, match=r"stage 'samples': none of 12 completions earned \{'accuracy': 2\}"):
        run_stages(root, stages)
    assert all(isinstance(stage, Stage) for stage in stages)
    assert (root / "grpo" / "done.json").exists() and not (root / "samples" / "done.json").exists()


@pytest.mark.early
@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_pipeline_gains_at_its_stages(tmp_path: Path, seed: int) -> None:
    root, stages = load_stages("r1-mini", ["--output_dir", str(tmp_path), "--seed", str(seed)])
    lines = {line["stage"]: line for line in run_stages(root, stages)}
    assert lines["grpo"]["eval_accuracy"] >= lines["cold-start"]["eval_accuracy"] + 0.2
    assert lines["student"]["eval_accuracy"] > lines["student-cold-start"]["eval_accuracy"]
    assert sum(line["seconds"] for line in lines.values()) < 600
