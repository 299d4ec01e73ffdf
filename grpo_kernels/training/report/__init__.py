"""The records of a run: ``metrics.jsonl``, ``samples.jsonl``, and accelerate's trackers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
Record = dict[str, Any]
_RUN_NAME = {"wandb": "name", "trackio": "name", "mlflow": "run_name"}  # the argument of a tracker


class SampleRecord(NamedTuple):
    """One completion as text, for people to read."""

    prompt: str
    completion: str
    reward: float
    advantage: float | None = None  # None where nothing was trained on it
    extra: dict[str, Any] | None = None  # what reward functions logged of it


def append_records(path: Path, records: Sequence[Record]) -> None:
    """Adds a line for each record, with null for NaN. On a full disk the file stays as it was, and the error is raised.

    Raises:
        ValueError: A number is infinite.
    """
    records = [{name: None if value != value else value for name, value in record.items()} for record in records]
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(lines)
    except OSError:
        if path.is_file():
            os.truncate(path, size)
        raise


def append_samples(path: Path, step: int, samples: Sequence[SampleRecord]) -> None:
    """Adds the samples of a step, each with all its fields and what reward functions logged of it."""
    fields = [sample._asdict() for sample in samples]
    append_records(path, [{"step": step, **(record.pop("extra", None) or {}), **record} for record in fields])


def has_records(path: Path) -> bool:
    """Whether a file of lines is there and has any."""
    return path.is_file() and path.stat().st_size > 0


def read_records(path: Path, notes: list[str] | None = None) -> list[Record]:
    """The records of a ``metrics.jsonl`` or ``samples.jsonl``, however the run that wrote it ended.

    A last line that was cut by the end of the run or of the disk is left out, with a note in ``notes``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another line is not a JSON object with a number under ``step``; the message names it.
    """
    lines = [(number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), start=1) if line.strip()]
    records: list[Record] = []
    for number, line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # JSON or UTF-8 that stops in the middle
            record = None
        step = record.get("step") if isinstance(record, dict) else None
        if type(step) in (int, float) and abs(step) < 2**53:
            records.append(record)
        elif number != lines[-1][0]:
            shown = line[:60].decode(errors="replace")
            raise ValueError(f"{path}:{number}: expected a JSON object with a number under 'step', got {shown!r}")
        elif notes is not None:
            notes.append(f"{path.name}: line {number}, the last one, was cut and is left out")
    return records


def tracker_names(report_to: Sequence[str]) -> list[str]:
    """The trackers that ``report_to`` asks for, all of which can run here.

    Raises:
        ValueError: One is unknown or not installed, or "none" or "all" does not stand alone.
    """
    installed = [str(name) for name in get_available_trackers()]
    if list(report_to) in (["none"], ["all"]):
        return installed if report_to[0] == "all" else []
    for name in report_to:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(LOGGER_TYPE_TO_CLASS)
            raise ValueError(f"report_to must be none alone, all alone, or some of {known}, got {name!r}")
        if name in LoggerType and name not in installed:
            raise ValueError(f"report_to names {name!r}, whose package is not installed: {name.replace('_', '-')}")
    return list(report_to)


def tracker_options(report_to: Sequence[str], output_dir: Path | str) -> dict[str, Any]:
    """Arguments of an ``Accelerator`` with these trackers, whose files go into ``output_dir/tracker_logs``."""
    directories = ProjectConfiguration(str(output_dir), logging_dir=str(Path(output_dir) / "tracker_logs"))
    return {"log_with": tracker_names(report_to) or None, "project_config": directories}


class MetricsLog:
    """Records of metrics: lines of ``metrics.jsonl`` by the main process, and what the accelerator's trackers show.

    The trackers are started, unless they are already; without a ``run_name`` they call the run by its folder.

    Raises:
        ValueError: ``report_to`` asks for trackers, and the accelerator has none.
    """

    def __init__(
        self, accelerator: Accelerator, output_dir: Path | str, *, project: str, run_name: str | None,
        hyper_parameters: Mapping[str, Any], report_to: Sequence[str],
    ) -> None:  # fmt: skip
        if tracker_names(report_to) and not accelerator.log_with:
            raise ValueError(f"report_to is {report_to}, but the accelerator was made without log_with")
        self._accelerator, self._path = accelerator, Path(output_dir) / METRICS
        if accelerator.log_with and not accelerator.trackers:
            run_name = run_name or self._path.parent.resolve().name
            simple = (str, int, float, bool)  # what every tracker takes
            config = {k: v if isinstance(v, simple) else json.dumps(v) for k, v in hyper_parameters.items()}
            accelerator.init_trackers(project, config, {name: {key: run_name} for name, key in _RUN_NAME.items()})

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Adds a record to the file, then tells the trackers."""
        if self._accelerator.is_main_process:
            append_records(self._path, [{"step": step, **metrics}])
        self._accelerator.log(metrics, step=step)

    def close(self) -> None:
        """Ends the trackers' run, and with it the accelerator's training."""
        if self._accelerator.log_with:
            self._accelerator.end_training()
