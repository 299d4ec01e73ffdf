"""What each kind of stage does in its folder."""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import set_seed

from grpo_kernels.files import replace_text
from grpo_kernels.rewards import resolve, total
from grpo_kernels.training.addition import TASKS
from grpo_kernels.training.augmentation import SEED, augment, is_right
from grpo_kernels.training.checkpoint import save_checkpoint
from grpo_kernels.training.data.files import Row
from grpo_kernels.training.data.rows import read_rows
from grpo_kernels.training.evaluation import EvalReport, evaluate_samples
from grpo_kernels.training.models import build_accelerator
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.report import SAMPLES, MetricsLog, SampleRecord, append_samples
from grpo_kernels.training.report.terminal import count_step, progress_bar
from grpo_kernels.training.rollout import Sampler, score_rollout
from grpo_kernels.training.run import metrics_log, tracked, train
from grpo_kernels.training.stages import Stage
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

ROWS = "rows.jsonl"


class StageResult(NamedTuple):
    """What a stage says in the summary, and the model that it leaves."""

    line: dict[str, Any]
    checkpoint: Path | None = None


def run_sft(stage: Stage) -> StageResult:
    """Trains on traces: the dataset's own, or rows with a prompt and a completion."""
    task, sampler = _load_fitting_task(stage.options)
    rows = _read_data(stage.options, ("prompt", "completion"), task.train_rows)
    with _open_log(stage.options) as log:
        steps = train_on_traces(task.model, task.tokenizer, rows, stage.options)
        return _train(stage, task, sampler, steps, log, traces=sum(bool(row.get("completion")) for row in rows))


def run_grpo(stage: Stage) -> StageResult:
    """Trains on rewards, and measures what came of it."""
    rows = _read_data(stage.options, columns_needed(stage.options))
    recipe = Recipe(**{key.name: getattr(stage.options, key.name) for key in fields(Recipe)})
    checkpoint = train(recipe, rows=rows).checkpoint
    options = replace(stage.options, model_name_or_path=str(checkpoint), use_vllm=False)  # the server served the run
    return StageResult(_evaluate(*_load_fitting_task(options), options)[0], checkpoint)


def run_sample(stage: Stage) -> StageResult:
    """Rejection sampling: keeps the distinct completions that earn enough, as rows to train on."""
    task = load_task(stage.options, _read_data(stage.options, columns_needed(stage.options)), least=1)
    sampler = _build_sampler(task, stage.options)
    problems = fitting_rows(task, task.train_rows, stage.options, sampler=sampler)
    with _open_log(stage.options) as log:
        return StageResult(_sample(stage, task, sampler, problems, log)[1])


def run_augment(stage: Stage) -> StageResult:
    """Writes the rows whose traces are right, and the problems that goal-directed augmentation makes of all."""
    options = stage.options
    built_in = TASKS.get(options.dataset_name)
    train_rows, eval_rows = load_task_rows(options)
    rows = _read_data(options, ("prompt", "answer", "completion"), train_rows)
    rows = [row for row in rows if row.get("completion")]
    augmentation = {"task": built_in, "held_out": eval_rows, "num_rows": options.num_rows, "ways": options.ways}
    rows = augment(rows, random.Random(options.seed), **augmentation)
    is_good = is_right if built_in is None else built_in.is_worked
    kept = [row for row in rows if row["source"] != SEED or is_good(row)]
    if not kept:
        raise ValueError(f"stage {stage.name!r}: no trace of {len(rows)} rows is right, and nothing was made of them")
    sources = Counter(row["source"] for row in kept)
    counts = {name: sources[name] for name in (SEED, *options.ways)}
    write_records(stage.folder / ROWS, kept)
    with _open_log(options) as log:
        log.write(0, counts)
    write_records(stage.folder / SAMPLES, [{"step": 0, **row} for row in kept[:: max(1, len(kept) // 20)]])
    return StageResult({"kept": len(kept), **counts})


def run_distill(stage: Stage) -> StageResult:
    """A teacher's samples, of which enough must be earned, and a student trained on them, or on its distributions."""
    options = stage.options
    task, sampler = _load_fitting_task(options)
    teacher, tokenizer = load_model(replace(options, model_name_or_path=options.teacher_model_name_or_path))
    if options.beta is not None:
        check_vocabularies(task.tokenizer, tokenizer)
    needs_problems = options.data is None or options.lmbda
    problems = fitting_rows(task, task.train_rows, options, sampler=sampler) if needs_problems else []
    rows, counts = _read_data(options, ("prompt", "completion"), []), {}
    with _open_log(options) as log:
        if options.data is None and options.lmbda < 1:
            set_seed(options.seed)
            teacher_task = task._replace(model=teacher, tokenizer=tokenizer)
            rows, counts = _sample(stage, teacher_task, _build_sampler(teacher_task, options), problems)
        set_seed(options.seed)
        if options.beta is None:
            steps = train_on_traces(task.model, task.tokenizer, rows, options)
        else:
            loss = {name: getattr(options, name) for name in ("beta", "lmbda", "temperature", "backend")}
            loss |= {"sampler": sampler, **supervised_options(options)}
            steps = distill(task.model, teacher, task.tokenizer, rows, problems[: options.prompts], **loss)
        return _train(stage, task, sampler, steps, log, **counts)


def run_eval(stage: Stage) -> StageResult:
    """pass@1, pass@k and cons@k of the held-out problems, each with its 95% confidence interval, and greedy."""
    options = stage.options
    task, sampler = _load_fitting_task(options, least=0)
    if not task.eval_rows:
        raise ValueError(f"dataset {options.dataset_name!r} has no held-out problems: set num_eval_prompts, or an "
                         "eval_dataset_split with rows")  # fmt: skip
    print(f"  {options.model_name_or_path or 'a fresh model'}, {len(task.eval_rows)} held-out problems, right answers "
          f"judged by: {evaluation_options(options)['check_name']}")  # fmt: skip
    with _open_log(options) as log:
        scores, report = _evaluate(task, sampler, options, log, ks=options.ks, all_intervals=True)
    for score_with_interval in report.scores.values():
        print(f"  {score_with_interval}")
    return StageResult({"problems": len(task.eval_rows), "samples": options.eval_samples, **scores})


#: By kind. The stage that they take has, in the place of another's name, what that one left.
STAGE_RUNNERS: dict[str, Callable[[Stage], StageResult]] = {
    "sft": run_sft, "grpo": run_grpo, "sample": run_sample, "augment": run_augment, "distill": run_distill,
    "eval": run_eval,
}  # fmt: skip


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes a line of JSON for each record, as a whole."""
    replace_text(path, "".join(json.dumps(record) + "\n" for record in records))


def _load_fitting_task(options: Any, least: int = 1) -> tuple[Task, Sampler]:
    """The task with the held-out rows that fit, of which none is an error before any training, and its sampler."""
    task = load_task(options, least=least)
    sampler = _build_sampler(task, options)
    return task._replace(eval_rows=held_out_rows(task, options, sampler)), sampler


def _read_data(options: Any, columns: Sequence[str], default: Any = None) -> Any:
    """The rows of the key ``data``, which have these columns; without it the default."""
    return default if options.data is None else read_rows(Path(options.data), columns)


def _build_sampler(task: Task, options: Any) -> Sampler:
    accelerator = build_accelerator(bf16=False, cpu=task.model.device.type == "cpu")
    return build_sampler(task, options, accelerator, getattr(options, "temperature", 1.0))


def _open_log(options: Any) -> contextlib.closing[MetricsLog]:
    return contextlib.closing(metrics_log(options, tracked(options)))


def _train(
    stage: Stage, task: Task, sampler: Sampler, steps: Iterator[SupervisedStep], log: MetricsLog, **counts: int
) -> StageResult:
    """Goes through the steps of a supervised training, saves the model, and measures it."""
    options = stage.options
    with progress_bar(options.sft_steps, stage.name, is_hidden=options.disable_tqdm) as bar:
        for number, step in enumerate(steps, start=1):
            log.write(number, {"loss": step.loss})
            count_step(bar, completions=options.sft_batch_size, tokens=step.tokens, loss=step.loss)
    checkpoint = save_checkpoint(stage.folder, options.sft_steps, task.model, task.tokenizer, keep=1)
    return StageResult(counts | _evaluate(task, sampler, options, log, options.sft_steps)[0], checkpoint)


def _sample(
    stage: Stage, task: Task, sampler: Sampler, problems: Sequence[Row], log: MetricsLog | None = None
) -> tuple[list[Row], dict[str, int]]:
    """Writes the distinct completions that earn enough, never an empty one; returns them, and how many they are.

    Raises:
        ValueError: None does.
    """
    options, keep = stage.options, stage.options.keep or {}
    functions = {name: resolve(name) for name in keep}
    thresholds = torch.tensor(list(keep.values()))
    rows = [row for row in problems[: options.prompts] for _ in range(options.samples)]
    kept: dict[tuple[str, str], Row] = {}
    for number, begin in enumerate(range(0, len(rows), options.eval_batch_size), start=1):
        batch = rows[begin : begin + options.eval_batch_size]
        scored = score_rollout(
            sampler, task.tokenizer, batch, functions, prompt_format=options.prompt_format, temperature=1.0
        )
        rewards, is_kept = total(scored.rewards, None).tolist(), (scored.rewards >= thresholds).all(dim=1).tolist()
        samples = []
        for row, completion, reward, earns_enough in zip(batch, scored.completions, rewards, is_kept, strict=True):
            samples.append(SampleRecord(str(row["prompt"]), completion, reward))
            if earns_enough and completion:
                kept[json.dumps(row["prompt"]), completion] = row | {"completion": completion}
        append_samples(stage.folder / SAMPLES, number, samples[: options.num_completions_to_print])
        if log is not None:
            means = {f"rewards/{name}/mean": scored.rewards[:, k].nanmean().item() for k, name in enumerate(functions)}
            log.write(number, {"sampled": begin + len(batch), "kept": len(kept), **means})
    if not kept:
        raise ValueError(f"stage {stage.name!r}: none of {len(rows)} completions earned {options.keep}")
    write_records(stage.folder / ROWS, kept.values())
    return list(kept.values()), {"sampled": len(rows), "kept": len(kept)}


def _evaluate(
    task: Task, sampler: Sampler, options: Any, log: MetricsLog | None = None, step: int = 0, *,
    ks: Sequence[int] | None = None, all_intervals: bool = False,
) -> tuple[dict[str, float], EvalReport | None]:  # fmt: skip
    """Held-out scores, and the mean of every reward function at temperature 1; nothing without held-out problems.

    With a log it writes them there, and every completion of the held-out problems to ``samples.jsonl``.
    """
    if not task.eval_rows:
        return {}, None
    report = evaluate_samples(
        sampler, task.tokenizer, task.eval_rows, ks=ks, reward_functions=task.reward_functions,
        **evaluation_options(options),
    )  # fmt: skip
    means = {f"eval_{name}": mean for name, mean in report.rewards.items()}
    means.pop("eval_accuracy", None)  # which the report has
    scores = {name: round(value, 4) for name, value in (report.metrics(all_intervals) | means).items()}
    if log is not None:
        log.write(step, scores)
        samples = [sample for group in [*report.samples, report.greedy] for sample in group]
        records = [{"step": step, **sample._asdict()} for sample in samples]
        write_records(Path(options.output_dir) / SAMPLES, records)
    return scores, report
