"""Trackers through accelerate: what they are told, and that one which is not installed is refused before any work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from grpo_kernels import cli
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.report import read_records, tracker_names
from grpo_kernels.training.run import tracked, train
from grpo_kernels.training.stages import KINDS

SETTINGS: dict[str, Any] = {
    "num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 6, "num_eval_prompts": 2,
    "eval_samples": 1, "max_steps": 2, "device": "cpu", "num_threads": 1, "disable_tqdm": True,
}  # fmt: skip


class Recorder(GeneralTracker):
    """Keeps what it is told."""

    name = "recorder"
    requires_logging_directory = True
    made: list[Recorder]

    def __init__(self, project: str, logging_dir: str, **kwargs: Any) -> None:
        super().__init__()
        self.project, self.logging_dir, self.is_finished = project, Path(logging_dir), False
        self.config: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        self.made.append(self)

    @property
    def tracker(self) -> list[dict[str, Any]]:
        return self.records

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.records.append({"step": step, **values})

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    Recorder.made = []
    return Recorder


def test_a_tracker_is_told_what_metrics_has(tmp_path: Path, recorder: type[Recorder]) -> None:
    train(Recipe(output_dir=str(tmp_path), report_to=["recorder"], project="sums", **SETTINGS))
    (found,) = recorder.made
    assert found.records == read_records(tmp_path / "metrics.jsonl") and len(found.records) == 4
    assert found.project == "sums" and found.logging_dir == tmp_path / "tracker_logs" and found.is_finished
    assert found.config["learning_rate"] == 1e-6 and json.loads(found.config["reward_funcs"]) == ["accuracy", "format"]


def test_a_tracker_of_the_callers_accelerator_is_told_too(tmp_path: Path, recorder: type[Recorder]) -> None:
    own = recorder("mine", str(tmp_path / "mine"))
    train(Recipe(output_dir=str(tmp_path / "run"), **SETTINGS), Accelerator(cpu=True, log_with=[own]))
    assert own.records == read_records(tmp_path / "run" / "metrics.jsonl") and own.is_finished


def test_an_accelerator_without_trackers_is_not_asked_for_one(tmp_path: Path, recorder: type[Recorder]) -> None:
    recipe = Recipe(output_dir=str(tmp_path / "run"), report_to=["recorder"], **SETTINGS)
    with pytest.raises(ValueError, match=r"report_to is \['recorder'\], but the accelerator was made without log_with"):
        train(recipe, Accelerator(cpu=True))


def test_a_stage_tells_them_and_a_failed_run_ends_theirs(
    tmp_path: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {name: value for name, value in SETTINGS.items() if name in KINDS["sft"].keys()}  # noqa: SIM118 - a class, no dict
    options |= {"sft_steps": 2, "sft_batch_size": 2, "report_to": "recorder", "output_dir": tmp_path / "sft"}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert cli.main(["sft", *arguments]) == 0
    assert recorder.made[0].records == read_records(tmp_path / "sft" / "metrics.jsonl")
    assert [record["step"] for record in recorder.made[0].records] == [1, 2, 2]

    def failed(*_: object, **__: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("grpo_kernels.training.run.save_checkpoint", failed)
    with pytest.raises(OSError, match="no space; stopped after step 0; no checkpoint yet"):
        train(Recipe(output_dir=str(tmp_path / "run"), report_to=["recorder"], **SETTINGS))
    assert recorder.made[1].is_finished


def test_none_and_all_stand_alone() -> None:
    assert tracker_names(["none"]) == [] and not tracked(Recipe(device="cpu")).log_with
    assert tracker_names(["all"]) == [str(name) for name in get_available_trackers()]
    with pytest.raises(ValueError, match=r"report_to must be none alone, all alone, or some of .*wandb.*, got 'all'"):
        tracker_names(["all", "none"])


def test_a_tracker_that_is_not_installed_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("grpo_kernels.training.report.get_available_trackers", lambda: [])
    for command in ("train", "sft"):
        folder = tmp_path / command
        assert cli.main([command, "--sft_steps", "1", "--report_to", "comet_ml", "--output_dir", str(folder)]) == 2
        assert capsys.readouterr().err == (
            "error: report_to names 'comet_ml', whose package is not installed: comet-ml\n"
        )
        assert not folder.exists()


def test_tensorboard_writes_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(Recipe(output_dir=str(tmp_path), report_to=["tensorboard"], **SETTINGS))
    assert list((tmp_path / "tracker_logs" / "grpo-kernels").rglob("events.out.tfevents*"))
    assert "tensorboard" in sys.modules
