"""Runs stages in order: what is done stays, what was interrupted goes on or begins again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from grpo_kernels import info
from grpo_kernels.files import replace_text
from grpo_kernels.training.checkpoint import MAY_DIFFER, MAY_DIFFER_ON_RESUME, clear_run, list_checkpoints
from grpo_kernels.training.options import read_yaml
from grpo_kernels.training.report import METRICS, SAMPLES, has_records, tracker_names
from grpo_kernels.training.stages.config import Stage, is_file
from grpo_kernels.training.stages.inputs import fingerprints
from grpo_kernels.training.stages.work import ROWS, STAGE_RUNNERS, Outcome

CONFIG, DONE, SUMMARY = "config.yaml", "done.json", "summary.jsonl"
USED = "used.json"  # by key, the digest of the stage that was used; under "files", of what was read beside


def run_stages(root: Path, stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Runs what is not done yet, in order; returns a line of the summary for each.

    Raises:
        ValueError: A stage that is done was another one, used one that has been redone since, or read files that have
            changed since; delete its folder to run it again. Or there are several processes, which would write into
            one folder.
        FileExistsError: A stage's folder holds another run that was not finished.
        OSError: A file cannot be written, as on a full disk; the message names the stage.
    """
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for stage in stages:
        lines.append(run_stage(stage, {before.name: before for before in stages}))
        replace_text(root / SUMMARY, "".join(json.dumps(found) + "\n" for found in lines))
    print("\n" + summary_table(lines))
    return lines


def run_stage(stage: Stage, stages: dict[str, Stage] | None = None) -> dict[str, Any]:
    """Runs one stage, unless it is done; returns its line of the summary.

    Args:
        stage: The stage.
        stages: Those that it may name, by name; they are done.

    Raises:
        As ``run_stages``.
    """
    _check_alone(stage.options)
    options, config = _resolved(stage, stages or {})
    used = _used(stage, stages or {}) | {"files": fingerprints(config)}
    line = None if options.overwrite_output_dir else _finished(stage.folder, config, used)
    if line is not None:
        return line
    print(f"\n== {stage.name} ({stage.kind})", flush=True)
    disable_progress_bar()
    tracker_names(options.report_to)  # before any work
    start = time.perf_counter()
    try:
        _begin(stage, options, config, used)
        if options.num_threads is not None:
            torch.set_num_threads(options.num_threads)
        set_seed(options.seed)
        outcome: Outcome = STAGE_RUNNERS[stage.kind](stage, options, config)
        seconds = round(time.perf_counter() - start, 1)
        line = {"stage": stage.name, "kind": stage.kind, **outcome.line, "seconds": seconds}
        model = None if outcome.checkpoint is None else outcome.checkpoint.name
        replace_text(stage.folder / DONE, json.dumps({"config": config, "line": line, "model": model}, indent=1))
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(f"stage {stage.name!r} in {stage.folder} was not finished: {error}") from error
    print("  " + ", ".join(f"{name} {value}" for name, value in line.items() if name not in ("stage", "kind")))
    return line


def _check_alone(options: Any) -> None:
    count = PartialState(cpu=options.device == "cpu").num_processes
    if count > 1:
        raise ValueError(f"stages run in one process, got {count}: launch a GRPO stage's config.yaml with train")


def _used(stage: Stage, stages: dict[str, Stage]) -> dict[str, str]:
    """By key, the digest of what another stage left when it was done."""
    names = {key: getattr(stage.options, key) for key in stage.options.roles}
    return {
        key: hashlib.sha256((stages[name].folder / DONE).read_bytes()).hexdigest()
        for key, name in names.items() if name in stages
    }  # fmt: skip


def _resolved(stage: Stage, stages: dict[str, Stage]) -> tuple[Any, dict[str, Any]]:
    """The stage's options, and the file of it alone, with what it takes from other stages."""
    options, paths = stage.options, {}
    model, teacher, data = (getattr(options, role, None) for role in ("model", "teacher", "data"))
    if stage.kind == "grpo":  # from its newest checkpoint, if there is one
        options = replace(options, resume=True, sft_steps=0)
    if model is not None:
        options = replace(options, model_name_or_path=str(_model_of(stages[model])))
    if teacher is not None:
        paths["teacher_model_name_or_path"] = str(_model_of(stages[teacher]))
    if data is not None:
        paths["data"] = str(Path(data).expanduser() if is_file(data) else stages[data].folder / ROWS)
    return options, json.loads(json.dumps(stage.written(options, **paths)))


def _model_of(stage: Stage) -> Path:
    path = stage.folder / _done(stage.folder)["model"]
    if not path.is_dir():
        raise ValueError(f"stage {stage.name!r} is done, but {path} is gone; delete {stage.folder} to run it again")
    return path


def _done(folder: Path) -> dict[str, Any]:
    return _read_record(folder / DONE, ("config", "line"))


def _read_record(path: Path, mappings: Sequence[str], **defaults: Any) -> dict[str, Any]:
    """What a stage wrote as JSON, with mappings under these keys; raises ValueError where it is anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        record = defaults | content if isinstance(content, dict) else {}
        if not all(isinstance(record.get(key), dict) for key in mappings):
            raise ValueError(f"expected a mapping with {' and '.join(mappings)}")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return record


def _finished(folder: Path, config: dict[str, Any], used: dict[str, Any]) -> dict[str, Any] | None:
    """The line of a stage that is done; None if it is not."""
    if not (folder / DONE).exists():
        return None
    done = _done(folder)
    differing = _differing(done["config"], config)
    if differing:
        raise ValueError(
            f"{folder} holds a stage with another {', '.join(differing)}; delete it to run it again, or name another "
            "output_dir"
        )
    redone = _redone(folder, used)
    if redone:
        raise ValueError(f"{folder} holds a stage on a {redone} that was made anew since; delete it to run it again")
    changed = _changed(folder, used)
    if changed:
        raise ValueError(
            f"{folder} holds a stage that read {changed}, which has changed since; delete it to run it again, or set "
            "overwrite_output_dir, with which every stage of a recipe is run again"
        )
    return done["line"]


def _redone(folder: Path, used: dict[str, Any]) -> str:
    """The keys, in words, whose stage is not the one that a folder's was begun on."""
    recorded = _recorded(folder)
    return " and ".join(key for key in used if key != "files" and recorded.get(key) != used[key])


def _changed(folder: Path, used: dict[str, Any]) -> str:
    """The names, in words, of what is not as a folder's stage read it; of what it has no record of nothing is known."""
    recorded = _recorded(folder)["files"]
    return " and ".join(name for name, value in used["files"].items() if recorded.get(name, value) != value)


def _recorded(folder: Path) -> dict[str, Any]:
    """What ``used.json`` has, which versions of before wrote without files or not at all."""
    path = folder / USED
    return _read_record(path, ("files",), files={}) if path.exists() else {"files": {}}


def _differing(found: dict[str, Any], config: dict[str, Any]) -> list[str]:
    names = (found.keys() | config.keys()) - MAY_DIFFER
    return sorted(name for name in names if found.get(name) != config.get(name))


def _begin(stage: Stage, options: Any, config: dict[str, Any], used: dict[str, Any]) -> None:
    """An empty folder but for the stage's configuration, or that of a GRPO stage to go on with.

    Raises:
        FileExistsError: The folder holds something else, and the recipe does not say to replace it.
    """
    folder = stage.folder
    if options.overwrite_output_dir:
        clear_run(folder)
    elif _is_begun(folder) and (folder / CONFIG).exists():
        begun = read_yaml(folder / CONFIG)
        differing = [name for name in _differing(begun, config) if name in begun]  # a run of GRPO has no stage's
        differing = [name for name in differing if stage.kind != "grpo" or name not in MAY_DIFFER_ON_RESUME]
        if differing:
            raise FileExistsError(f"{folder} holds a stage with another {', '.join(differing)} that was not finished; "
                                  "delete it, name another output_dir or set overwrite_output_dir")  # fmt: skip
        redone = _redone(folder, used) if stage.kind == "grpo" else ""  # any other begins again
        if redone:
            raise FileExistsError(f"{folder} holds a stage on a {redone} that was made anew since; delete it")
        changed = _changed(folder, used) if stage.kind == "grpo" else ""
        if changed:  # a reward function that was mended, say
            print(f"  goes on with {changed}, which has changed since the run began", flush=True)
    elif _is_begun(folder):
        raise FileExistsError(f"{folder} holds another run; name another output_dir or set overwrite_output_dir")
    (folder / DONE).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / USED, json.dumps(used))
    if stage.kind == "grpo":
        return  # the run looks after its folder itself
    clear_run(folder)
    for name in (ROWS, SAMPLES):
        (folder / name).unlink(missing_ok=True)
    replace_text(folder / CONFIG, yaml.safe_dump(config, sort_keys=False))
    replace_text(folder / "versions.json", json.dumps(info.versions(), indent=1))


def _is_begun(folder: Path) -> bool:
    """Whether a folder has more than what a stage writes before its first row."""
    files = (folder / METRICS, folder / SAMPLES, folder / ROWS)
    return any(map(has_records, files)) or bool(list_checkpoints(folder))


def summary_table(lines: Sequence[dict[str, Any]]) -> str:
    """The stages under each other, with what was measured of each."""
    names = ["eval_accuracy", "eval_accuracy_greedy"]
    names += [name for line in lines for name in line if name.startswith(("eval_format", "eval_language"))]
    names = [*dict.fromkeys(names), "kept", "seconds"]
    width = max(len(line["stage"]) for line in lines)
    head = " ".join([" " * width, *(name.removeprefix("eval_").rjust(len(name)) for name in names)])
    rows = [
        " ".join([line["stage"].ljust(width), *(str(line.get(name, "")).rjust(len(name)) for name in names)])
        for line in lines
    ]
    return "\n".join([head, *rows])
