"""A run's metrics, in its folder and in the trackers that accelerate knows: tensorboard, wandb, trackio and others."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration

from grpo_kernels.training.distributed import build_accelerator
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.reporting import MetricsFile

METRICS = "metrics.jsonl"
LOGS = "tracker_logs"  # of trackers that write to disk
_PACKAGES = {"comet_ml": "comet-ml"}  # where it is not called as the tracker is
_RUN_NAME = {"wandb": "name", "trackio": "name", "mlflow": "run_name"}  # the argument of a tracker


def tracked(recipe: Recipe) -> Accelerator:
    """An accelerator on the recipe's device, with the trackers of ``report_to``, which are not started yet.

    Raises:
        ValueError: A tracker is unknown or not installed.
    """
    folder = Path(recipe.output_dir)
    directories = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / LOGS))
    names = tracker_names(recipe.report_to)
    return build_accelerator(
        bf16=getattr(recipe, "bf16", False),
        cpu=recipe.device == "cpu",
        log_with=names or None,
        project_config=directories,
    )


def tracker_names(report_to: Sequence[str]) -> list[str]:
    """The trackers that ``report_to`` asks for, all of which can run here.

    Raises:
        ValueError: One is unknown or not installed, or "none" or "all" does not stand alone.
    """
    installed = [str(name) for name in get_available_trackers()]
    if list(report_to) == ["none"]:
        return []
    if list(report_to) == ["all"]:
        return installed
    for name in report_to:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(LOGGER_TYPE_TO_CLASS)
            raise ValueError(f"report_to must be none alone, all alone, or some of {known}, got {name!r}")
        if name in LoggerType and name not in installed:
            raise ValueError(f"report_to names {name!r}, whose package is not installed: {_PACKAGES.get(name, name)}")
    return list(report_to)


class MetricsLog:
    """Records of metrics: lines of ``metrics.jsonl`` by the main process, and what its trackers show.

    Args:
        recipe: Says the folder, and the run's name and hyper-parameters, which the trackers are told.
        accelerator: Its trackers are started, unless they are already.

    Raises:
        ValueError: ``report_to`` asks for trackers, and the accelerator has none.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator) -> None:
        if tracker_names(recipe.report_to) and not accelerator.log_with:
            raise ValueError(f"report_to is {recipe.report_to}, but the accelerator was made without log_with")
        self._accelerator = accelerator
        path = Path(recipe.output_dir) / METRICS
        self._file = MetricsFile(path if accelerator.is_main_process else Path(os.devnull))
        if accelerator.log_with and not accelerator.trackers:
            run_name = recipe.run_name or path.parent.resolve().name
            config = {name: _simple(value) for name, value in asdict(recipe).items()}
            names = {tracker: {argument: run_name} for tracker, argument in _RUN_NAME.items()}
            accelerator.init_trackers(recipe.project, config, names)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends a record by one system call, then tells the trackers."""
        self._file.write({"step": step, **metrics})
        self._accelerator.log(metrics, step=step)

    def close(self) -> None:
        """Closes the file and ends the trackers' run, and with it the accelerator's training."""
        self._file.close()
        if self._accelerator.log_with:
            self._accelerator.end_training()


def _simple(value: object) -> str | float | bool:
    """What every tracker takes as a hyper-parameter."""
    return value if isinstance(value, (str, int, float, bool)) else json.dumps(value)
