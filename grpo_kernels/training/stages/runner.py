"""Runs stages in order: what is done stays, what was interrupted goes on or begins again."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from grpo_kernels import info
from grpo_kernels.files import replace_text
from grpo_kernels.rewards import BUILT_IN
from grpo_kernels.training.addition import TASKS
from grpo_kernels.training.checkpoint import MAY_DIFFER, MAY_DIFFER_ON_RESUME, clear_run, list_checkpoints
from grpo_kernels.training.options import read_yaml
from grpo_kernels.training.report import METRICS, SAMPLES, has_records, tracker_names
from grpo_kernels.training.stages import MODEL_PATHS, SOURCES, Stage, is_file
from grpo_kernels.training.stages.work import ROWS, STAGE_RUNNERS, write_records

CONFIG, DONE, SUMMARY = "config.yaml", "done.json", "summary.jsonl"
USED = "used.json"  # by key, the digest of the stage that was used; under "files", of what was read beside
_HASHED = 2**24  # bytes: of larger files, as weights are, the size and the time of the last change must do


def run_stages(root: Path, stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Runs what is not done yet, in order; returns a line of the summary for each.

    Raises:
        ValueError: A stage that is done was another one, or what it used has changed since. Or there are several
            processes, which would write into one folder.
        FileExistsError: A stage's folder holds another run that was not finished.
        OSError: A file cannot be written, as on a full disk; the message names the stage.
    """
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for stage in stages:
        lines.append(run_stage(stage, {other.name: other for other in stages}))
        write_records(root / SUMMARY, lines)
    print("\n" + summary_table(lines))
    return lines


def run_stage(stage: Stage, stages: Mapping[str, Stage] = {}) -> dict[str, Any]:
    """Runs one stage, unless it is done, on what other ones by name left; returns its line, and raises as above."""
    count = PartialState(cpu=stage.options.device == "cpu").num_processes
    if count > 1:
        raise ValueError(f"stages run in one process, got {count}: launch a GRPO stage's config.yaml with train")
    sources = {key: stages[name] for key in SOURCES if (name := getattr(stage.options, key, None)) in stages}
    stage = _resolve(stage, sources)
    options, folder = stage.options, stage.folder
    config = {name: value for name, value in asdict(options).items() if name not in options.hidden}
    config = json.loads(json.dumps(config))  # as it will be read
    used: dict[str, Any] = {key: _digest((source.folder / DONE).read_bytes()) for key, source in sources.items()}
    used["files"] = fingerprints(config)
    if (folder / DONE).exists() and not options.overwrite_output_dir:
        return _done_line(folder, config, used)
    print(f"\n== {stage.name} ({stage.kind})", flush=True)
    disable_progress_bar()
    tracker_names(options.report_to)  # before any work
    start = time.perf_counter()
    try:
        _prepare_folder(stage, config, used)
        if options.num_threads is not None:
            torch.set_num_threads(options.num_threads)
        set_seed(options.seed)
        outcome = STAGE_RUNNERS[stage.kind](stage)
        seconds = round(time.perf_counter() - start, 1)
        line = {"stage": stage.name, "kind": stage.kind, **outcome.line, "seconds": seconds}
        model = None if outcome.checkpoint is None else outcome.checkpoint.name
        replace_text(folder / DONE, json.dumps({"config": config, "line": line, "model": model}, indent=1))
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(f"stage {stage.name!r} in {folder} was not finished: {error}") from error
    print("  " + ", ".join(f"{name} {value}" for name, value in line.items() if name not in ("stage", "kind")))
    return line


def _resolve(stage: Stage, sources: Mapping[str, Stage]) -> Stage:
    """The stage with what earlier ones left in the place of their names, by the keys that name them."""
    values: dict[str, Any] = {}
    if stage.kind == "grpo":  # from its newest checkpoint, if there is one
        values |= {"resume": True, "sft_steps": 0}
    for key in (key for key in MODEL_PATHS if key in sources):
        name, folder = sources[key].name, sources[key].folder
        path = folder / _read_record(folder / DONE, "config", "line")["model"]
        if not path.is_dir():
            raise ValueError(f"stage {name!r} is done, but {path} is gone; delete {folder} to run it again")
        values |= {key: None, MODEL_PATHS[key]: str(path)}
    data = getattr(stage.options, "data", None)
    if data is not None:
        values["data"] = str(Path(data).expanduser() if is_file(data) else sources["data"].folder / ROWS)
    return stage._replace(options=replace(stage.options, **values))


def _done_line(folder: Path, config: dict[str, Any], used: dict[str, Any]) -> dict[str, Any]:
    """The line of a stage that is done; raises ValueError where it was another one, or its inputs have changed."""
    done = _read_record(folder / DONE, "config", "line")
    keys = _differing(done["config"], config, (done["config"].keys() | config.keys()) - MAY_DIFFER)
    if keys:
        names = ", ".join(sorted(keys))
        raise ValueError(f"{folder} holds a stage with another {names}; delete it to run it again, or name another "
                         "output_dir")  # fmt: skip
    remade, changed = _changed_inputs(folder, used)
    if remade:
        raise ValueError(f"{folder} holds a stage on a {remade} that was made anew since; delete it to run it again")
    if changed:
        raise ValueError(
            f"{folder} holds a stage that read {changed}, which has changed since; delete it to run it again, or set "
            "overwrite_output_dir, with which every stage of a recipe is run again"
        )
    return done["line"]


def _prepare_folder(stage: Stage, config: dict[str, Any], used: dict[str, Any]) -> None:
    """Leaves a folder with the stage's configuration alone, or the GRPO run to go on with.

    Raises:
        FileExistsError: The folder holds something else, and the recipe does not say to replace it.
    """
    folder, resumes = stage.folder, stage.kind == "grpo"  # any other kind begins again
    if stage.options.overwrite_output_dir:
        clear_run(folder)
    elif list_checkpoints(folder) or any(has_records(folder / name) for name in (METRICS, SAMPLES, ROWS)):
        if not (folder / CONFIG).exists():
            raise FileExistsError(f"{folder} holds another run; name another output_dir or set overwrite_output_dir")
        recorded = read_yaml(folder / CONFIG)  # of a GRPO run, which has no key of a stage
        keys = _differing(recorded, config, recorded.keys() - (MAY_DIFFER_ON_RESUME if resumes else MAY_DIFFER))
        if keys:
            raise FileExistsError(
                f"{folder} holds a stage with another {', '.join(sorted(keys))} that was not finished; delete it, name "
                "another output_dir or set overwrite_output_dir"
            )
        remade, changed = _changed_inputs(folder, used) if resumes else ("", "")
        if remade:
            raise FileExistsError(f"{folder} holds a stage on a {remade} that was made anew since; delete it")
        if changed:  # a reward function that was mended, say
            print(f"  goes on with {changed}, which has changed since the run began", flush=True)
    (folder / DONE).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / USED, json.dumps(used))
    if resumes:
        return  # the run looks after its folder itself
    clear_run(folder)
    for name in (ROWS, SAMPLES):
        (folder / name).unlink(missing_ok=True)
    replace_text(folder / CONFIG, yaml.safe_dump(config, sort_keys=False))
    replace_text(folder / "versions.json", json.dumps(info.versions(), indent=1))


def _changed_inputs(folder: Path, used: dict[str, Any]) -> tuple[str, str]:
    """In words, the keys whose stage was made anew since a folder's stage used it, and the files that have changed."""
    has_record = (folder / USED).exists()  # which earlier versions wrote without files, or not at all
    record = _read_record(folder / USED, "files", files={}) if has_record else {"files": {}}
    remade = _differing(record, used, [key for key in used if key != "files"])
    changed = _differing(record["files"], used["files"], [name for name in used["files"] if name in record["files"]])
    return " and ".join(remade), " and ".join(changed)


def _differing(record: Mapping[str, Any], current: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    return [name for name in names if record.get(name) != current.get(name)]


def _read_record(path: Path, *mappings: str, **defaults: Any) -> dict[str, Any]:
    """What a stage wrote as JSON, with mappings under these keys; raises ValueError where it is anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        record = defaults | content if isinstance(content, dict) else {}
        if not all(isinstance(record.get(key), dict) for key in mappings):
            raise ValueError(f"expected a mapping with {' and '.join(mappings)}")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return record


def fingerprints(config: Mapping[str, Any]) -> dict[str, str]:
    """Of each file or folder that a stage reads, by its name in ``config.yaml``; what is on the Hub has none.

    These are models, datasets and rows, reward models, and the modules that reward functions are named in, but not what
    those import.
    """
    names = [config.get(key) for key in (*MODEL_PATHS.values(), "dataset_name", "data")]
    paths = {name: Path(name).expanduser() for name in names if name not in (None, *TASKS)}
    for reward in filter(None, (*config.get("reward_funcs", ()), *(config.get("keep") or ()), config.get("check"))):
        name = reward.partition("(")[0].strip()
        module = sys.modules.get(name.partition(":")[0].removesuffix(".py")) if ":" in name else None
        if name not in BUILT_IN:
            paths[name] = Path(getattr(module, "__file__", None) or name).expanduser()
    output_dir = Path(config["output_dir"]).resolve()
    return {
        name: _fingerprint(path, output_dir, with_folders=name == config.get("dataset_name"))
        for name, path in paths.items() if path.exists()
    }  # fmt: skip


def _fingerprint(path: Path, output_dir: Path, *, with_folders: bool) -> str:
    """Of a file, or of a folder's files that are neither hidden nor written by stages."""
    files = [path]
    if path.is_dir():
        runs = output_dir.parent if path.resolve() in output_dir.parent.parents else output_dir
        files = [
            file for file in path.glob("**/*" if with_folders else "*")
            if file.is_file() and runs not in file.resolve().parents
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]  # fmt: skip
    lines = []
    for file in sorted(files):
        size, time_ns = file.stat().st_size, file.stat().st_mtime_ns
        content = _digest(file.read_bytes()) if size <= _HASHED else f"{size} {time_ns}"
        lines.append(f"{file.relative_to(path).as_posix()}\n{content}\n")
    return _digest("".join(lines).encode(errors="surrogateescape"))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def summary_table(lines: Sequence[dict[str, Any]]) -> str:
    """The stages under each other, with what was measured of each."""
    names = [name for line in lines for name in line if name.startswith(("eval_format", "eval_language"))]
    names = [*dict.fromkeys(["eval_accuracy", "eval_accuracy_greedy", *names]), "kept", "seconds"]
    width = max(len(line["stage"]) for line in lines)
    rows = [{"stage": ""} | {name: name.removeprefix("eval_") for name in names}, *lines]
    return "\n".join(
        " ".join([row["stage"].ljust(width), *(str(row.get(name, "")).rjust(len(name)) for name in names)])
        for row in rows
    )
