"""What each kind of stage does in its folder."""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import set_seed

from grpo_kernels.files import replace_text
from grpo_kernels.rewards import columns_of, resolve, score, total
from grpo_kernels.training.augmentation import SEED, augment, is_right
from grpo_kernels.training.checkpoint import save_checkpoint
from grpo_kernels.training.data.files import Row
from grpo_kernels.training.data.rows import read_rows
from grpo_kernels.training.distributed import build_accelerator
from grpo_kernels.training.evaluation import EvalReport, evaluate_samples
from grpo_kernels.training.loop import Sample
from grpo_kernels.training.models import context_length_of
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.reporting import Progress, SamplesFile
from grpo_kernels.training.rollout import Sampler, score_rollout
from grpo_kernels.training.run import SAMPLES, held_out_rows, train
from grpo_kernels.training.stage_config import Stage
from grpo_kernels.training.supervised import SupervisedStep, check_vocabularies, distill
from grpo_kernels.training.task import (
    Task,
    build_sampler,
    columns_needed,
    evaluation_options,
    fitting_rows,
    load_model,
    load_task,
    load_task_rows,
    supervised_options,
    train_on_traces,
)
from grpo_kernels.training.tasks import TASKS
from grpo_kernels.training.trackers import MetricsLog, tracked

ROWS = "rows.jsonl"
Config = dict[str, Any]


class Outcome(NamedTuple):
    """What a stage says in the summary, and the model that it leaves."""

    line: dict[str, Any]
    checkpoint: Path | None = None


def sft(stage: Stage, recipe: Recipe, config: Config) -> Outcome:
    """Trains on traces: the dataset's own, or rows with a prompt and a completion."""
    task = _measurable(recipe)
    rows = task.train_rows if stage.data is None else read_rows(Path(config["data"]), ("prompt", "completion"))
    with _log(recipe) as log:
        steps = train_on_traces(task.model, task.tokenizer, rows, recipe)
        return _trained(stage, task, recipe, steps, log, traces=sum(bool(row.get("completion")) for row in rows))


def grpo(stage: Stage, recipe: Recipe, config: Config) -> Outcome:
    """Trains on rewards, and measures what came of it."""
    rows = None if stage.data is None else read_rows(Path(config["data"]), columns_needed(recipe))
    checkpoint = train(recipe, rows=rows).checkpoint
    task = _measurable(replace(recipe, model_name_or_path=str(checkpoint)))
    return Outcome(_scores(task, recipe)[0], checkpoint)


def sample(stage: Stage, recipe: Recipe, config: Config) -> Outcome:
    """Rejection sampling: keeps the distinct completions that earn enough, as rows to train on."""
    recipe = replace(recipe, reward_funcs=list(stage.keep or {}), reward_weights=None)  # their columns are needed
    rows = None if stage.data is None else read_rows(Path(config["data"]), columns_needed(recipe))
    task = load_task(recipe, rows, least=1)
    rows = _problems(task, recipe)
    with _log(recipe) as log:
        return Outcome(_sampled(stage, task, recipe, rows, log)[1])


def augmented(stage: Stage, recipe: Recipe, config: Config) -> Outcome:
    """Writes the rows whose traces are right, and the problems that goal-directed augmentation makes of all."""
    rows, eval_rows = load_task_rows(recipe)
    if stage.data is not None:
        rows = read_rows(Path(config["data"]), ("prompt", "answer", "completion"))
    built_in = TASKS.get(recipe.dataset_name)
    found = augment(
        [row for row in rows if row.get("completion")],
        random.Random(recipe.seed),
        task=built_in,
        held_out=eval_rows,
        num_rows=stage.num_rows,
        ways=stage.ways,
    )
    is_good = is_right if built_in is None else built_in.is_worked
    kept = [row for row in found if row["source"] != SEED or is_good(row)]
    counts = Counter(row["source"] for row in kept)
    if not kept:
        raise ValueError(f"stage {stage.name!r}: no trace of {len(found)} rows is right, and nothing was made of them")
    _write_rows(stage.folder, kept)
    line = {name: counts[name] for name in (SEED, *stage.ways)}
    with _log(recipe) as log:
        log.write(0, line)
    _write_samples(stage.folder, [{"step": 0, **row} for row in kept[:: max(1, len(kept) // 20)]])
    return Outcome({"kept": len(kept), **line})


def distilled(stage: Stage, recipe: Recipe, config: Config) -> Outcome:
    """A teacher's samples, of which enough must be earned, and a student trained on them, or on its distributions."""
    task = _measurable(recipe)
    teacher, tokenizer = load_model(replace(recipe, model_name_or_path=config["teacher_model_name_or_path"]))
    if stage.beta is not None:
        check_vocabularies(task.tokenizer, tokenizer)
    problems = _problems(task, recipe) if stage.data is None or stage.lmbda else []
    rows, line = [], {}
    with _log(recipe) as log:
        if stage.data is not None:
            rows = read_rows(Path(config["data"]), ("prompt", "completion"))
        elif stage.lmbda < 1:
            set_seed(recipe.seed)
            teaching = task._replace(model=teacher, tokenizer=tokenizer)
            rows, line = _sampled(stage, teaching, recipe, problems, None)
        set_seed(recipe.seed)
        if stage.beta is None:
            steps = train_on_traces(task.model, task.tokenizer, rows, recipe)
        else:
            steps = distill(
                task.model,
                teacher,
                task.tokenizer,
                rows,
                problems[: stage.prompts],
                sampler=_sampler(task, recipe),
                beta=stage.beta,
                lmbda=stage.lmbda,
                temperature=recipe.temperature,
                backend=recipe.backend,
                **supervised_options(recipe),
            )
        return _trained(stage, task, recipe, steps, log, **line)


def measured(stage: Stage, recipe: Recipe, config: Config) -> Outcome:
    """pass@1, pass@k and cons@k of the held-out problems, each with its 95% confidence interval, and greedy."""
    task = _measurable(recipe, least=0)
    print(f"  {recipe.model_name_or_path or 'a fresh model'}, {len(task.eval_rows)} held-out problems, right answers "
          f"judged by: {evaluation_options(recipe)['check_name']}")  # fmt: skip
    found, report = _scores(task, recipe, ks=stage.ks)
    for name, value in report.scores.items():
        print(f"  {value}")
        key = {"pass@1": "eval_accuracy", "greedy": "eval_accuracy_greedy"}.get(name, f"eval_{name}")
        found |= {f"{key}_low": round(value.low, 4), f"{key}_high": round(value.high, 4)}
    with _log(recipe) as log:
        log.write(0, found)
    _write_eval_samples(stage.folder, 0, report)
    return Outcome({"problems": len(task.eval_rows), "samples": recipe.eval_samples, **found})


#: By kind: from a stage, its recipe and what it takes from others to what came of it.
WORK: dict[str, Callable[[Stage, Recipe, Config], Outcome]] = {
    "sft": sft, "grpo": grpo, "sample": sample, "augment": augmented, "distill": distilled, "eval": measured,
}  # fmt: skip


def _measurable(recipe: Recipe, least: int = 1) -> Task:
    """The task with the held-out rows that fit into its model's context; found out before any training."""
    task = load_task(recipe, least=least)
    return task._replace(eval_rows=held_out_rows(task, recipe))


def _sampler(task: Task, recipe: Recipe) -> Sampler:
    accelerator = build_accelerator(bf16=recipe.bf16, cpu=task.model.device.type == "cpu")
    return build_sampler(task.model, task.tokenizer, recipe, accelerator)


def _problems(task: Task, recipe: Recipe) -> list[Row]:
    """The training rows whose prompt leaves room for a completion in the model's context."""
    return fitting_rows(task.train_rows, task, recipe, context_length_of(task.model))


@contextlib.contextmanager
def _log(recipe: Recipe) -> Iterator[MetricsLog]:
    log = MetricsLog(recipe, tracked(recipe))
    try:
        yield log
    finally:
        log.close()


def _trained(
    stage: Stage, task: Task, recipe: Recipe, steps: Iterator[SupervisedStep], log: MetricsLog, **line: Any
) -> Outcome:
    """Goes through the steps of a supervised training, saves the model, and measures it."""
    hidden = True if recipe.disable_tqdm else None
    with Progress(recipe.sft_steps, stage.name, disable=hidden) as progress:
        for number, step in enumerate(steps, start=1):
            log.write(number, {"loss": step.loss})
            progress.update(completions=recipe.sft_batch_size, tokens=step.tokens, loss=step.loss)
    checkpoint = save_checkpoint(stage.folder, recipe.sft_steps, task.model, task.tokenizer, keep=1)
    found, report = _scores(task, recipe)
    if report is not None:
        log.write(recipe.sft_steps, found)
        _write_eval_samples(stage.folder, recipe.sft_steps, report)
    return Outcome(line | found, checkpoint)


def _sampled(
    stage: Stage, task: Task, recipe: Recipe, rows: Sequence[Row], log: MetricsLog | None
) -> tuple[list[Row], dict[str, int]]:
    """Writes the distinct completions that earn enough, never an empty one; returns them, and how many they are.

    Raises:
        ValueError: None does.
    """
    functions = {name: resolve(name) for name in stage.keep or {}}
    least = torch.tensor(list((stage.keep or {}).values()))
    asked = [row for row in rows[: stage.prompts] for _ in range(stage.samples)]
    sampler = _sampler(task, recipe)
    kept: dict[tuple[str, str], Row] = {}
    samples = SamplesFile(stage.folder / SAMPLES)
    for number, begin in enumerate(range(0, len(asked), recipe.eval_batch_size), start=1):
        batch = asked[begin : begin + recipe.eval_batch_size]
        scored = score_rollout(
            sampler, task.tokenizer, batch, functions, prompt_format=recipe.prompt_format, temperature=1.0
        )
        completions, rewards = scored.completions, scored.rewards
        for row, completion, is_good in zip(batch, completions, (rewards >= least).all(dim=1).tolist(), strict=True):
            if is_good and completion:
                kept[json.dumps(row["prompt"]), completion] = row | {"completion": completion}
        shown = zip(batch, completions, total(rewards, None).tolist(), strict=True)
        shown = [Sample(str(row["prompt"]), *found) for row, *found in shown][: recipe.num_completions_to_print]
        samples.write(number, shown)
        if log is not None:
            means = {f"rewards/{name}/mean": rewards[:, k].nanmean().item() for k, name in enumerate(functions)}
            log.write(number, {"sampled": begin + len(batch), "kept": len(kept), **means})
    samples.close()
    if not kept:
        raise ValueError(f"stage {stage.name!r}: none of {len(asked)} completions earned {stage.keep}")
    found = list(kept.values())
    _write_rows(stage.folder, found)
    return found, {"sampled": len(asked), "kept": len(found)}


def _scores(task: Task, recipe: Recipe, **options: Any) -> tuple[dict[str, float], EvalReport | None]:
    """Held-out scores, and the mean of every reward function at temperature 1; nothing without held-out problems."""
    if not task.eval_rows:
        return {}, None
    options |= evaluation_options(recipe)
    report = evaluate_samples(_sampler(task, recipe), task.tokenizer, task.eval_rows, **options)
    found = {name: round(value, 4) for name, value in report.metrics().items()}
    rows = [row for row in task.eval_rows for _ in range(recipe.eval_samples)]
    completions = [sample.completion for group in report.samples for sample in group]
    columns = columns_of(rows, [ids for group in report.completion_ids for ids in group])
    rewards = score(task.reward_functions, [row["prompt"] for row in rows], completions, columns)
    means = {name: round(rewards[:, k].nanmean().item(), 4) for k, name in enumerate(task.reward_functions)}
    return found | {f"eval_{name}": mean for name, mean in means.items() if name != "accuracy"}, report


def _write_rows(folder: Path, rows: Sequence[Row]) -> None:
    replace_text(folder / ROWS, "".join(json.dumps(row) + "\n" for row in rows))


def _write_samples(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    replace_text(folder / SAMPLES, "".join(json.dumps(record) + "\n" for record in records))


def _write_eval_samples(folder: Path, step: int, report: EvalReport) -> None:
    """Every completion of the held-out problems."""
    samples = [sample for group in [*report.samples, report.greedy] for sample in group]
    _write_samples(folder, [{"step": step, **sample._asdict()} for sample in samples])
