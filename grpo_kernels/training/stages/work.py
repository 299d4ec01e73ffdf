"""What each kind of stage does in its folder."""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
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
from grpo_kernels.training.evaluation import EvalReport, evaluate_samples
from grpo_kernels.training.loop import Sample
from grpo_kernels.training.models import build_accelerator
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.report import SAMPLES, MetricsLog, append_samples
from grpo_kernels.training.report.terminal import count_step, progress_bar
from grpo_kernels.training.rollout import Sampler, score_rollout
from grpo_kernels.training.run import metrics_log, tracked, train
from grpo_kernels.training.stages.config import Stage
from grpo_kernels.training.supervised import SupervisedStep, check_vocabularies, distill
from grpo_kernels.training.task import (
    Task,
    build_sampler,
    columns_needed,
    evaluation_options,
    fitting_rows,
    held_out_rows,
    load_model,
    load_task,
    load_task_rows,
    supervised_options,
    train_on_traces,
)
from grpo_kernels.training.tasks import TASKS

ROWS = "rows.jsonl"
Config = dict[str, Any]


class Outcome(NamedTuple):
    """What a stage says in the summary, and the model that it leaves."""

    line: dict[str, Any]
    checkpoint: Path | None = None


def run_sft(stage: Stage, options: Any, config: Config) -> Outcome:
    """Trains on traces: the dataset's own, or rows with a prompt and a completion."""
    task = _measurable(options)
    rows = task.train_rows if options.data is None else read_rows(Path(config["data"]), ("prompt", "completion"))
    with _log(options) as log:
        steps = train_on_traces(task.model, task.tokenizer, rows, options)
        return _trained(stage, task, options, steps, log, traces=sum(bool(row.get("completion")) for row in rows))


def run_grpo(stage: Stage, options: Any, config: Config) -> Outcome:
    """Trains on rewards, and measures what came of it."""
    rows = None if options.data is None else read_rows(Path(config["data"]), columns_needed(options))
    recipe = Recipe(**{key.name: getattr(options, key.name) for key in fields(Recipe)})
    checkpoint = train(recipe, rows=rows).checkpoint
    options = replace(options, model_name_or_path=str(checkpoint), use_vllm=False)  # the server served the run
    return Outcome(_scores(_measurable(options), options)[0], checkpoint)


def run_sample(stage: Stage, options: Any, config: Config) -> Outcome:
    """Rejection sampling: keeps the distinct completions that earn enough, as rows to train on."""
    rows = None if options.data is None else read_rows(Path(config["data"]), columns_needed(options))
    task = load_task(options, rows, least=1)
    rows = _problems(task, options)
    with _log(options) as log:
        return Outcome(_sampled(stage, task, options, rows, log)[1])


def run_augment(stage: Stage, options: Any, config: Config) -> Outcome:
    """Writes the rows whose traces are right, and the problems that goal-directed augmentation makes of all."""
    rows, eval_rows = load_task_rows(options)
    if options.data is not None:
        rows = read_rows(Path(config["data"]), ("prompt", "answer", "completion"))
    built_in = TASKS.get(options.dataset_name)
    found = augment(
        [row for row in rows if row.get("completion")],
        random.Random(options.seed),
        task=built_in,
        held_out=eval_rows,
        num_rows=options.num_rows,
        ways=options.ways,
    )
    is_good = is_right if built_in is None else built_in.is_worked
    kept = [row for row in found if row["source"] != SEED or is_good(row)]
    counts = Counter(row["source"] for row in kept)
    if not kept:
        raise ValueError(f"stage {stage.name!r}: no trace of {len(found)} rows is right, and nothing was made of them")
    _write_rows(stage.folder, kept)
    line = {name: counts[name] for name in (SEED, *options.ways)}
    with _log(options) as log:
        log.write(0, line)
    _write_samples(stage.folder, [{"step": 0, **row} for row in kept[:: max(1, len(kept) // 20)]])
    return Outcome({"kept": len(kept), **line})


def run_distill(stage: Stage, options: Any, config: Config) -> Outcome:
    """A teacher's samples, of which enough must be earned, and a student trained on them, or on its distributions."""
    task = _measurable(options)
    teacher, tokenizer = load_model(replace(options, model_name_or_path=config["teacher_model_name_or_path"]))
    if options.beta is not None:
        check_vocabularies(task.tokenizer, tokenizer)
    problems = _problems(task, options) if options.data is None or options.lmbda else []
    rows, line = [], {}
    with _log(options) as log:
        if options.data is not None:
            rows = read_rows(Path(config["data"]), ("prompt", "completion"))
        elif options.lmbda < 1:
            set_seed(options.seed)
            teaching = task._replace(model=teacher, tokenizer=tokenizer)
            rows, line = _sampled(stage, teaching, options, problems, None)
        set_seed(options.seed)
        if options.beta is None:
            steps = train_on_traces(task.model, task.tokenizer, rows, options)
        else:
            steps = distill(
                task.model,
                teacher,
                task.tokenizer,
                rows,
                problems[: options.prompts],
                sampler=_sampler(task, options),
                beta=options.beta,
                lmbda=options.lmbda,
                temperature=options.temperature,
                backend=options.backend,
                **supervised_options(options),
            )
        return _trained(stage, task, options, steps, log, **line)


def run_eval(stage: Stage, options: Any, config: Config) -> Outcome:
    """pass@1, pass@k and cons@k of the held-out problems, each with its 95% confidence interval, and greedy."""
    task = _measurable(options, least=0)
    print(f"  {options.model_name_or_path or 'a fresh model'}, {len(task.eval_rows)} held-out problems, right answers "
          f"judged by: {evaluation_options(options)['check_name']}")  # fmt: skip
    found, report = _scores(task, options, ks=options.ks, all_intervals=True)
    for value in report.scores.values():
        print(f"  {value}")
    with _log(options) as log:
        log.write(0, found)
    _write_eval_samples(stage.folder, 0, report)
    return Outcome({"problems": len(task.eval_rows), "samples": options.eval_samples, **found})


#: By kind: from a stage, what it is told and what its file says to what came of it.
STAGE_RUNNERS: dict[str, Callable[[Stage, Any, Config], Outcome]] = {
    "sft": run_sft, "grpo": run_grpo, "sample": run_sample, "augment": run_augment, "distill": run_distill,
    "eval": run_eval,
}  # fmt: skip


def _measurable(options: Any, least: int = 1) -> Task:
    """The task with the held-out rows that fit into its model's context; found out before any training."""
    task = load_task(options, least=least)
    return task._replace(eval_rows=held_out_rows(task, options))


def _sampler(task: Task, options: Any) -> Sampler:
    accelerator = build_accelerator(bf16=False, cpu=task.model.device.type == "cpu")
    return build_sampler(task, options, accelerator, getattr(options, "temperature", 1.0))


def _problems(task: Task, options: Any) -> list[Row]:
    """The training rows whose prompt leaves room for a completion in the model's context."""
    return fitting_rows(task, task.train_rows, options)


def _log(options: Any) -> contextlib.closing[MetricsLog]:
    return contextlib.closing(metrics_log(options, tracked(options)))


def _trained(
    stage: Stage, task: Task, options: Any, steps: Iterator[SupervisedStep], log: MetricsLog, **line: Any
) -> Outcome:
    """Goes through the steps of a supervised training, saves the model, and measures it."""
    with progress_bar(options.sft_steps, stage.name, is_hidden=options.disable_tqdm) as bar:
        for number, step in enumerate(steps, start=1):
            log.write(number, {"loss": step.loss})
            count_step(bar, completions=options.sft_batch_size, tokens=step.tokens, loss=step.loss)
    checkpoint = save_checkpoint(stage.folder, options.sft_steps, task.model, task.tokenizer, keep=1)
    found, report = _scores(task, options)
    if report is not None:
        log.write(options.sft_steps, found)
        _write_eval_samples(stage.folder, options.sft_steps, report)
    return Outcome(line | found, checkpoint)


def _sampled(
    stage: Stage, task: Task, options: Any, rows: Sequence[Row], log: MetricsLog | None
) -> tuple[list[Row], dict[str, int]]:
    """Writes the distinct completions that earn enough, never an empty one; returns them, and how many they are.

    Raises:
        ValueError: None does.
    """
    functions = {name: resolve(name) for name in options.keep or {}}
    least = torch.tensor(list((options.keep or {}).values()))
    asked = [row for row in rows[: options.prompts] for _ in range(options.samples)]
    sampler = _sampler(task, options)
    kept: dict[tuple[str, str], Row] = {}
    for number, begin in enumerate(range(0, len(asked), options.eval_batch_size), start=1):
        batch = asked[begin : begin + options.eval_batch_size]
        scored = score_rollout(
            sampler, task.tokenizer, batch, functions, prompt_format=options.prompt_format, temperature=1.0
        )
        completions, rewards = scored.completions, scored.rewards
        for row, completion, is_good in zip(batch, completions, (rewards >= least).all(dim=1).tolist(), strict=True):
            if is_good and completion:
                kept[json.dumps(row["prompt"]), completion] = row | {"completion": completion}
        shown = zip(batch, completions, total(rewards, None).tolist(), strict=True)
        shown = [Sample(str(row["prompt"]), *found) for row, *found in shown][: options.num_completions_to_print]
        append_samples(stage.folder / SAMPLES, number, shown)
        if log is not None:
            means = {f"rewards/{name}/mean": rewards[:, k].nanmean().item() for k, name in enumerate(functions)}
            log.write(number, {"sampled": begin + len(batch), "kept": len(kept), **means})
    if not kept:
        raise ValueError(f"stage {stage.name!r}: none of {len(asked)} completions earned {options.keep}")
    found = list(kept.values())
    _write_rows(stage.folder, found)
    return found, {"sampled": len(asked), "kept": len(found)}


def _scores(
    task: Task, options: Any, ks: Sequence[int] | None = None, all_intervals: bool = False
) -> tuple[dict[str, float], EvalReport | None]:
    """Held-out scores, and the mean of every reward function at temperature 1; nothing without held-out problems."""
    if not task.eval_rows:
        return {}, None
    sampler, evaluation = _sampler(task, options), evaluation_options(options)
    report = evaluate_samples(sampler, task.tokenizer, task.eval_rows, ks=ks, **evaluation)
    scores = {name: round(value, 4) for name, value in report.metrics(all_intervals).items()}
    rows = [row for row in task.eval_rows for _ in range(options.eval_samples)]
    completions = [sample.completion for group in report.samples for sample in group]
    columns = columns_of(rows, [ids for group in report.completion_ids for ids in group])
    rewards = score(task.reward_functions, [row["prompt"] for row in rows], completions, columns)
    means = {name: round(rewards[:, k].nanmean().item(), 4) for k, name in enumerate(task.reward_functions)}
    return scores | {f"eval_{name}": mean for name, mean in means.items() if name != "accuracy"}, report


def _write_rows(folder: Path, rows: Sequence[Row]) -> None:
    replace_text(folder / ROWS, "".join(json.dumps(row) + "\n" for row in rows))


def _write_samples(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    replace_text(folder / SAMPLES, "".join(json.dumps(record) + "\n" for record in records))


def _write_eval_samples(folder: Path, step: int, report: EvalReport) -> None:
    """Every completion of the held-out problems."""
    samples = [sample for group in [*report.samples, report.greedy] for sample in group]
    _write_samples(folder, [{"step": step, **sample._asdict()} for sample in samples])
