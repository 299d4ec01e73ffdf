"""Recipes of several stages, one folder each: supervised, GRPO and sampling stages, each from what others left.

    output_dir: runs/r1-mini
    common: {dataset_name: addition-mixed}      # keys of every stage's recipe
    stages:
      cold-start: {kind: sft, sft_steps: 400}                # from a fresh base, on the dataset's own traces
      grpo: {kind: grpo, model: cold-start, max_steps: 60}   # from another stage's model
      rejection: {kind: sample, model: grpo, prompts: 800, samples: 4, keep: {accuracy: 1, format: 1}}
      sft: {kind: sft, data: rejection, sft_steps: 400}      # on what another stage kept

A stage that is done has ``done.json`` in its folder and is not run again; a GRPO stage that was interrupted goes on
from its newest checkpoint.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from grpo_kernels.training.checkpoint import save_checkpoint
from grpo_kernels.training.cold_start import cold_start
from grpo_kernels.training.data import Task, load_task, read_jsonl
from grpo_kernels.training.evaluation import evaluate_samples
from grpo_kernels.training.recipe import Recipe, recipe_path, with_overrides
from grpo_kernels.training.reporting import MetricsFile, Progress
from grpo_kernels.training.rewards import columns_of, resolve, score
from grpo_kernels.training.rollout import completion_texts, completion_tokens, generate
from grpo_kernels.training.run import train
from grpo_kernels.training.tasks import Row
from grpo_kernels.training.templates import render_prompt, whole_completion

KINDS = ("sft", "grpo", "sample")
DONE, ROWS, SUMMARY = "done.json", "rows.jsonl", "summary.jsonl"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a recipe.

    Args:
        name: Also its folder's.
        kind: "sft" trains on traces, "grpo" on rewards, "sample" keeps completions that earn enough.
        recipe: All else, with this stage's ``output_dir``.
        model: The stage whose model it starts from; None for a fresh base.
        data: The "sample" stage whose rows an "sft" stage trains on; None for the dataset's own.
        prompts: How many training problems a "sample" stage takes.
        samples: Completions of each.
        keep: The least that a completion must earn, by reward function.

    Raises:
        ValueError: The kind is unknown, or an argument has no effect on it.
    """

    name: str
    kind: str
    recipe: Recipe
    model: str | None = None
    data: str | None = None
    prompts: int = 200
    samples: int = 4
    keep: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"stage {self.name!r}: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind != "sample" and self.keep is not None:
            raise ValueError(f"stage {self.name!r}: keep has no effect on kind {self.kind!r}")
        if self.kind == "sample" and not self.keep:
            raise ValueError(f"stage {self.name!r}: keep must say what a completion must earn")
        if self.kind != "sft" and self.data is not None:
            raise ValueError(f"stage {self.name!r}: data has no effect on kind {self.kind!r}")
        if self.kind == "sft" and not self.recipe.sft_steps:
            raise ValueError(f"stage {self.name!r}: sft_steps must be at least 1 for kind 'sft'")

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output_dir)

    def written(self) -> dict[str, Any]:
        """What decides its result, as JSON has it."""
        return json.loads(json.dumps(asdict(self)))


def load_stages(name: str, overrides: Sequence[str] = ()) -> tuple[Path, list[Stage]]:
    """The output folder and the stages of a YAML file, or of a recipe that ships.

    Args:
        name: A file, or the name of a recipe that ships.
        overrides: ``["--key", "value", ...]`` for every stage; ``--output_dir`` is the folder of them all.

    Raises:
        FileNotFoundError: There is no such recipe.
        ValueError: A key is unknown, a value does not fit, or a stage is named that does not come before.
    """
    path = recipe_path(name)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    unknown = (
        sorted(content.keys() - {"output_dir", "common", "stages"}) if isinstance(content, dict) else ["all of it"]
    )
    if unknown or not content.get("stages"):
        raise ValueError(f"{path}: expected output_dir, common and stages, got {', '.join(unknown) or 'no stages'}")
    root, overrides = _output_dir(content.get("output_dir", f"runs/{path.stem}"), overrides)
    own = {f.name for f in fields(Stage)} - {"name", "recipe"}
    stages: list[Stage] = []
    for stage_name, values in content["stages"].items():
        given = {name: value for name, value in values.items() if name in own}
        keys = {**content.get("common", {}), **{name: value for name, value in values.items() if name not in own}}
        recipe = with_overrides(f"{path}: stage {stage_name}", keys | {"output_dir": str(root / stage_name)}, overrides)
        stage = Stage(name=stage_name, recipe=recipe, **given)
        for role in ("model", "data"):
            earlier = getattr(stage, role)
            fitting = [before.name for before in stages if (before.kind == "sample") == (role == "data")]
            if earlier is not None and earlier not in fitting:
                raise ValueError(f"{path}: stage {stage_name}: {role} must be one of {fitting}, got {earlier!r}")
        stages.append(stage)
    return root, stages


def _output_dir(root: str, overrides: Sequence[str]) -> tuple[Path, list[str]]:
    rest = list(overrides)
    if "--output_dir" in rest:
        at = rest.index("--output_dir")
        root = rest[at + 1] if at + 1 < len(rest) else root
        del rest[at : at + 2]
    return Path(root), rest


def run_stages(root: Path, stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Runs what is not done yet, in order; returns a line of the summary for each.

    Raises:
        ValueError: A stage that is done was another one; delete its folder to run it again.
    """
    disable_progress_bar()
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for stage in stages:
        line = _finished(stage)
        if line is None:
            print(f"\n== {stage.name} ({stage.kind})", flush=True)
            line = _run(stage, {before.name: before for before in stages})
        lines.append(line)
        _replace(root / SUMMARY, "".join(json.dumps(found) + "\n" for found in lines))
    print("\n" + summary_table(lines))
    return lines


def _finished(stage: Stage) -> dict[str, Any] | None:
    """The line of a stage that is done; None if it is not."""
    path = stage.folder / DONE
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    differing = sorted(
        name for name, value in stage.written()["recipe"].items() if found["stage"]["recipe"].get(name) != value
    )
    differing += sorted(n for n, v in stage.written().items() if n != "recipe" and found["stage"].get(n) != v)
    if differing:
        raise ValueError(f"{stage.folder} holds a stage with another {', '.join(differing)}; delete it to run it again")
    return found["line"]


def _run(stage: Stage, stages: dict[str, Stage]) -> dict[str, Any]:
    recipe, start = stage.recipe, time.perf_counter()
    if stage.model is not None:
        recipe = replace(recipe, model_name_or_path=str(_model_of(stages[stage.model])))
    if recipe.num_threads is not None:
        torch.set_num_threads(recipe.num_threads)
    stage.folder.mkdir(parents=True, exist_ok=True)
    set_seed(recipe.seed)
    checkpoint = None
    if stage.kind == "grpo":  # from its newest checkpoint, if there is one
        checkpoint = train(replace(recipe, resume=True, sft_steps=0)).checkpoint
        recipe = replace(recipe, model_name_or_path=str(checkpoint))
    task = load_task(recipe)
    if stage.kind == "sft":
        rows = task.train_rows if stage.data is None else read_jsonl(stages[stage.data].folder / ROWS)
        checkpoint = _sft(stage.folder, task, recipe, rows)
    found = _sample(stage, task, recipe) if stage.kind == "sample" else _scores(task, recipe)
    line = {"stage": stage.name, "kind": stage.kind, **found, "seconds": round(time.perf_counter() - start, 1)}
    written = {"stage": stage.written(), "line": line, "model": None if checkpoint is None else checkpoint.name}
    _replace(stage.folder / DONE, json.dumps(written, indent=1))
    print("  " + ", ".join(f"{name} {value}" for name, value in line.items() if name not in ("stage", "kind")))
    return line


def _model_of(stage: Stage) -> Path:
    return stage.folder / json.loads((stage.folder / DONE).read_text(encoding="utf-8"))["model"]


def _sft(folder: Path, task: Task, recipe: Recipe, rows: Sequence[Row]) -> Path:
    """Trains on traces and saves the model; a stage that was interrupted begins again, and ends the same."""
    metrics = folder / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    file = MetricsFile(metrics)
    with Progress(recipe.sft_steps, folder.name, disable=True if recipe.disable_tqdm else None) as progress:
        for number, loss in enumerate(cold_start(task.model, task.tokenizer, rows, recipe), start=1):
            file.write({"step": number, "loss": loss})
            progress.update(completions=recipe.sft_batch_size, tokens=0, loss=loss)
    file.close()
    return save_checkpoint(folder, recipe.sft_steps, task.model, task.tokenizer, keep=1)


def _sample(stage: Stage, task: Task, recipe: Recipe) -> dict[str, Any]:
    """Rejection sampling: writes the distinct completions that earn enough, as rows to train on; never an empty one."""
    functions = {name: resolve(name) for name in stage.keep or {}}
    least = torch.tensor(list((stage.keep or {}).values()))
    rows = [row for row in task.train_rows[: stage.prompts] for _ in range(stage.samples)]
    kept: dict[tuple[str, str], Row] = {}
    for begin in range(0, len(rows), recipe.eval_batch_size):
        batch = rows[begin : begin + recipe.eval_batch_size]
        completions, rewards = _scored(task, recipe, batch, functions)
        for row, completion, is_good in zip(batch, completions, (rewards >= least).all(dim=1).tolist(), strict=True):
            if is_good and completion:
                kept[json.dumps(row["prompt"]), completion] = row | {"completion": completion}
    _replace(stage.folder / ROWS, "".join(json.dumps(row) + "\n" for row in kept.values()))
    if not kept:
        raise ValueError(f"stage {stage.name!r}: none of {len(rows)} completions earned {stage.keep}")
    return {"sampled": len(rows), "kept": len(kept)}


def _scores(task: Task, recipe: Recipe) -> dict[str, Any]:
    """Held-out accuracy with its interval, and the mean of every reward function, at temperature 1."""
    report = evaluate_samples(task.model, task.tokenizer, task.eval_rows, recipe)
    found = {name: round(value, 4) for name, value in report.metrics().items()}
    rows = [row for row in task.eval_rows for _ in range(recipe.eval_samples)]
    completions = [sample.completion for group in report.samples for sample in group]
    columns = columns_of(rows, task.tokenizer(completions, add_special_tokens=False)["input_ids"])
    rewards = score(task.reward_functions, [row["prompt"] for row in rows], completions, columns)
    return found | {f"eval_{name}": round(rewards[:, k].nanmean().item(), 4)
                    for k, name in enumerate(task.reward_functions) if name != "accuracy"}  # fmt: skip


def _scored(task: Task, recipe: Recipe, rows: list[Row], functions: dict[str, Any]) -> tuple[list[str], torch.Tensor]:
    """A completion of each row at temperature 1, and its rewards ``[B, K]``."""
    prompts = [render_prompt(row, task.tokenizer, recipe.prompt_template, recipe.system_prompt) for row in rows]
    rollout = generate(
        task.model, task.tokenizer, prompts, max_completion_length=recipe.max_completion_length, temperature=1.0
    )
    sampled = completion_texts(rollout, task.tokenizer)
    completions = [whole_completion(*found) for found in zip(rows, prompts, sampled, strict=True)]
    columns = columns_of(rows, completion_tokens(rollout))
    return completions, score(functions, [row["prompt"] for row in rows], completions, columns)


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


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
