"""Recipes of several stages: what they refuse, that they go on where they stopped, and that each uses the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_kernels import cli
from grpo_kernels.training.stages import Stage, load_stages, run_stages

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


def written(folder: Path, text: str = SMALL) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text + f"\noutput_dir: {folder / 'run'}\n")
    return str(path)


def test_the_recipe_that_ships_is_the_whole_pipeline() -> None:
    root, stages = load_stages("r1-mini", ["--seed", "3"])
    assert root == Path("runs/r1-mini")
    assert [stage.kind for stage in stages] == ["sft", "grpo", "sample", "sft", "grpo", "sample", "sft", "sft"]
    assert {stage.recipe.seed for stage in stages} == {3}
    by_name = {stage.name: stage for stage in stages}
    assert by_name["sft"].model is None and by_name["sft"].data == "rejection"  # a fresh base
    assert by_name["student"].recipe.hidden_size < by_name["sft"].recipe.hidden_size
    assert by_name["student"].recipe.sft_steps == by_name["student-cold-start"].recipe.sft_steps


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
    assert cli.main(["recipe", path, "--seed", "1"]) == 2
    assert "holds a stage with another seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: sample, model: grpo", "kind: tune, model: grpo", "kind must be one of sft, grpo, sample, got 'tune'"),
        ("model: cold-start", "model: student", r"model must be one of \['cold-start'\], got 'student'"),
        ("data: samples", "data: grpo", r"data must be one of \['samples'\], got 'grpo'"),
        ("max_steps: 2", "max_step: 2", "stage grpo: unknown key 'max_step'; the nearest known key is 'max_steps'"),
        ("keep: {language_consistency: 0}", "seed: 0", "keep must say what a completion must earn"),
        ("kind: grpo, model", "kind: grpo, data: samples, model", "data must be one of|data has no effect"),
        ("kind: sft, data", "kind: sft, keep: {format: 1}, data", "keep has no effect on kind 'sft'"),
        ("stages:", "phases:", "expected output_dir, common and stages, got phases"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in SMALL
    with pytest.raises(ValueError, match=message):
        load_stages(written(tmp_path, SMALL.replace(old, new)))


def test_rejection_that_keeps_nothing_is_an_error(tmp_path: Path) -> None:
    text = SMALL.replace("keep: {language_consistency: 0}", "keep: {accuracy: 2}")
    root, stages = load_stages(written(tmp_path, text))
    with pytest.raises(ValueError, match=r"stage 'samples': none of 12 completions earned \{'accuracy': 2\}"):
        run_stages(root, stages)
    assert all(isinstance(stage, Stage) for stage in stages)
    assert (root / "grpo" / "done.json").exists() and not (root / "samples" / "done.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_pipeline_gains_at_its_stages(tmp_path: Path, seed: int) -> None:
    root, stages = load_stages("r1-mini", ["--output_dir", str(tmp_path), "--seed", str(seed)])
    lines = {line["stage"]: line for line in run_stages(root, stages)}
    assert lines["grpo"]["eval_accuracy"] >= lines["cold-start"]["eval_accuracy"] + 0.2
    assert lines["student"]["eval_accuracy"] > lines["student-cold-start"]["eval_accuracy"]
    assert sum(line["seconds"] for line in lines.values()) < 600
