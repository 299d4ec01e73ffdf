"""One run from a recipe: cold start, evaluation, GRPO, evaluation, curves."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from accelerate import Accelerator
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from grpo_kernels import backends, info
from grpo_kernels.files import replace_text
from grpo_kernels.training.checkpoint import (
    check_state,
    clear_run,
    list_checkpoints,
    read_weights,
    save_checkpoint,
    status_line,
    step_of,
)
from grpo_kernels.training.data.files import Row
from grpo_kernels.training.evaluation import evaluate, measure_pass_rates
from grpo_kernels.training.loop import GRPOLoop, Step
from grpo_kernels.training.models import build_accelerator, check_launch, has_adapters, is_deepspeed, load_models_whole
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.report import (
    METRICS,
    SAMPLES,
    MetricsLog,
    append_samples,
    has_records,
    read_records,
    tracker_options,
)
from grpo_kernels.training.report.terminal import MetricsTable, count_step, progress_bar, show_samples
from grpo_kernels.training.rollout import Sampler
from grpo_kernels.training.task import (
    Task,
    build_sampler,
    evaluation_options,
    fitting_rows,
    held_out_rows,
    load_task,
    prepare_model,
    train_on_traces,
)

PASS_RATES = "pass_rates.json"


class Result(NamedTuple):
    """What a finished run leaves. The evaluations are empty without held-out problems."""

    checkpoint: Path
    before: dict[str, float]  # held-out accuracies before GRPO, after the cold start
    after: dict[str, float]


def train(recipe: Recipe, accelerator: Accelerator | None = None, rows: Sequence[Row] | None = None) -> Result:
    """Runs a recipe to its end; the same recipe gives the same curve, interrupted and resumed or not.

    Writes ``checkpoint-<step>`` folders, ``metrics.jsonl``, ``samples.jsonl``, ``config.yaml``, ``versions.json``,
    ``curves.png`` and ``report.html`` into ``recipe.output_dir``. Whenever it
    is interrupted, the checkpoints there are complete and the metrics readable; with ``resume`` it goes on from the
    newest. Under ``accelerate launch`` every process calls it.

    Args:
        recipe: The run.
        accelerator: Of the processes, with the trackers that it was made with; by default one with those of
            ``report_to``.
        rows: To train on in the place of the dataset's own.

    Raises:
        ValueError: The data does not fit the recipe, a reward is infinite, the checkpoint is of another run, or a
            tracker is not installed; or ``resume`` is asked for under DeepSpeed.
        FileExistsError: ``output_dir`` holds another run, and the recipe does not say to replace it or to go on.
        OSError: A file cannot be written, as on a full disk. The message says how far the run was and what it left.
        RuntimeError: The named backend cannot run here, a gradient is not finite, or the processes were launched for
            FSDP or DeepSpeed where accelerate has neither.
    """
    output_dir = Path(recipe.output_dir)
    if not (recipe.resume or recipe.overwrite_output_dir):
        _refuse_another_run(output_dir)  # before a model is loaded or a server connected to
    if recipe.num_threads is not None:
        torch.set_num_threads(recipe.num_threads)
    disable_progress_bar()  # transformers' own, one for every file that it reads or writes
    accelerator = accelerator or tracked(recipe)
    if recipe.resume and is_deepspeed(accelerator):
        raise ValueError("resume must be False under DeepSpeed: its checkpoints hold the weights alone")
    check_launch(accelerator)
    load_models_whole(accelerator)
    set_seed(recipe.seed)
    task = load_task(recipe, rows)
    task = task._replace(model=prepare_model(task.model, recipe))
    sampler = build_sampler(task, recipe, accelerator, recipe.temperature)
    task = task._replace(eval_rows=held_out_rows(task, recipe, sampler))
    backend = backends.resolve("grpo_loss", recipe.backend, task.model.device)
    parameters = task.model.num_parameters()
    accelerator.print(
        f"{parameters / 1e6:.2f} M parameters on {accelerator.num_processes} x {task.model.device}, loss by the "
        f"{backend} backend, {len(task.train_rows)} training problems"
    )
    start = time.perf_counter()
    run = _Run(recipe, output_dir, accelerator)
    try:
        try:
            before, checkpoint, after = run.execute(task, sampler)
        finally:
            run.metrics.close()
        if accelerator.is_main_process:
            from grpo_kernels.training.report.page import plot_curves, write_report  # after the last step

            plot_curves(output_dir)
            write_report(output_dir)
    except OSError as error:
        raise OSError(f"{error}; stopped after step {run.global_step}; {status_line(output_dir)}") from error
    if accelerator.is_main_process:
        _print_summary(before, after, time.perf_counter() - start, checkpoint, recipe)
    return Result(checkpoint, before, after)


def tracked(recipe: Any) -> Accelerator:
    """An accelerator on the device of a recipe or stage, with the trackers of ``report_to``, which are not started yet.

    Raises:
        ValueError: A tracker is unknown or not installed.
    """
    trackers = tracker_options(recipe.report_to, recipe.output_dir)
    return build_accelerator(bf16=getattr(recipe, "bf16", False), cpu=recipe.device == "cpu", **trackers)


def metrics_log(recipe: Any, accelerator: Accelerator) -> MetricsLog:
    """The log of a recipe's run."""
    names = {name: getattr(recipe, name) for name in ("project", "run_name", "report_to")}
    return MetricsLog(accelerator, recipe.output_dir, hyper_parameters=asdict(recipe), **names)


class _Run:
    """One run, and the files that it reads from and writes to its folder."""

    def __init__(self, recipe: Recipe, output_dir: Path, accelerator: Accelerator) -> None:
        self.recipe, self.output_dir, self.accelerator = recipe, output_dir, accelerator
        self.global_step = 0  # of the last optimizer step
        self.checkpoints = list_checkpoints(output_dir) if recipe.resume else []
        if accelerator.is_main_process:
            if self.checkpoints:
                for name in (METRICS, SAMPLES):
                    _drop_records_after(output_dir / name, step_of(self.checkpoints[-1]))
            else:
                if recipe.resume or recipe.overwrite_output_dir:
                    clear_run(output_dir)
                output_dir.mkdir(parents=True, exist_ok=True)
        accelerator.wait_for_everyone()
        self.metrics = metrics_log(recipe, accelerator)
        if accelerator.is_main_process:
            (output_dir / SAMPLES).touch()
            replace_text(output_dir / "config.yaml", yaml.safe_dump(asdict(recipe), sort_keys=False))
            replace_text(output_dir / "versions.json", json.dumps(info.versions(), indent=1))

    def execute(self, task: Task, sampler: Sampler) -> tuple[dict[str, float], Path, dict[str, float]]:
        """Held-out accuracies before GRPO, the last checkpoint, and the accuracies after."""
        recipe = self.recipe
        if not self.checkpoints:
            _cold_start(task, recipe, self.accelerator)
            before = self._evaluate(task, sampler, 0)
            task = self._filter(task, sampler)
            set_seed(recipe.seed + self.accelerator.process_index)  # each process samples other completions
            loop = GRPOLoop(task, recipe, self.accelerator, sampler)
            self._save(task, loop)
        else:
            records = read_records(self.output_dir / METRICS)
            before = {name: value for r in records if r["step"] == 0 for name, value in r.items() if name != "step"}
            loop = self._resume(task, sampler)
        checkpoint = self._run_grpo(task, loop)
        return before, checkpoint, self._evaluate(task, sampler, recipe.max_steps)

    def _filter(self, task: Task, sampler: Sampler) -> Task:
        """The task with the training rows whose pass rate lies strictly between the bounds.

        The rates are kept in ``pass_rates.json`` and read from there by a run that is resumed, with another model: so
        it has the same rows.
        """
        recipe, path = self.recipe, self.output_dir / PASS_RATES
        if recipe.min_pass_rate is None and recipe.max_pass_rate is None:
            return task
        least = recipe.prompts_per_generation
        rows = fitting_rows(task, task.train_rows, recipe, least=least, sampler=sampler)
        if self.checkpoints:
            rates = _read_pass_rates(path)
            if len(rates) != len(rows):
                raise ValueError(f"{path} is of another run: it has {len(rates)} training problems, not {len(rows)}")
        else:
            options = evaluation_options(recipe) | {"num_samples": recipe.pass_rate_samples}
            rates = measure_pass_rates(sampler, task.tokenizer, rows, self.accelerator, **options)
            if self.accelerator.is_main_process:
                replace_text(path, json.dumps(rates))
        low, high = recipe.pass_rate_bounds
        kept = [row for row, rate in zip(rows, rates, strict=True) if low < rate < high]
        self.accelerator.print(
            f"pass-rate filter: {len(kept)} of {len(rates)} training problems are left, {sum(r <= low for r in rates)} "
            f"were too hard and {sum(r >= high for r in rates)} too easy"
        )
        if len(kept) < least:
            raise ValueError(
                f"at least {least} training problems (one generation's) must have a pass rate between min_pass_rate="
                f"{recipe.min_pass_rate} and max_pass_rate={recipe.max_pass_rate}, got {len(kept)}"
            )
        return task._replace(train_rows=kept)

    def _resume(self, task: Task, sampler: Sampler) -> GRPOLoop:
        """The loop as the newest checkpoint has it; its reference is what GRPO started from."""
        first, newest = self.checkpoints[0], self.checkpoints[-1]
        if step_of(first):
            raise ValueError(f"{self.output_dir} has no checkpoint-0, the reference of its run: it cannot be resumed")
        check_state(newest, asdict(self.recipe), self.accelerator.num_processes)
        if not has_adapters(task.model):
            task.model.load_state_dict(read_weights(first, task.model))
        loop = GRPOLoop(self._filter(task, sampler), self.recipe, self.accelerator, sampler)
        loop.restore(newest)
        self.global_step = loop.global_step
        self.accelerator.print(f"resumed after step {loop.global_step}, from {newest}")
        return loop

    def _save(self, task: Task, loop: GRPOLoop) -> Path:
        return save_checkpoint(
            self.output_dir,
            loop.global_step,
            task.model,
            task.tokenizer,
            keep=self.recipe.save_total_limit,
            training_state=loop.training_state(),
        )

    def _run_grpo(self, task: Task, loop: GRPOLoop) -> Path:
        """Checkpoints are written where a generation ends, the first after each ``save_steps``."""
        recipe, checkpoint = self.recipe, self.output_dir / f"checkpoint-{loop.global_step}"
        saved, processes = loop.global_step, self.accelerator.num_processes
        completions = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps * processes
        is_hidden = recipe.disable_tqdm or not self.accelerator.is_main_process
        with progress_bar(recipe.max_steps - loop.global_step, "GRPO", is_hidden=is_hidden) as bar:
            table = MetricsTable()
            for step in loop.steps():
                self.global_step = step.number
                self.metrics.write(step.number, step.metrics)
                tokens = completions * step.metrics["completions/mean_length"]
                count_step(bar, completions=completions, tokens=tokens, reward=step.metrics["reward"])
                self._show(step, table)
                is_due = step.number // recipe.save_steps > saved // recipe.save_steps
                if (is_due and step.ends_generation) or step.number == recipe.max_steps:
                    checkpoint, saved = self._save(task, loop), step.number
        return checkpoint

    def _show(self, step: Step, table: MetricsTable) -> None:
        recipe = self.recipe
        if not self.accelerator.is_main_process:
            return
        if step.number % recipe.logging_steps == 0 or step.number == 1:
            table.row({"step": step.number, **step.metrics})
        if recipe.completions_steps and recipe.num_completions_to_print and step.number % recipe.completions_steps == 0:
            stride = recipe.num_generations + 1  # each from another group
            samples = step.samples[::stride][: recipe.num_completions_to_print]
            append_samples(self.output_dir / SAMPLES, step.number, samples)
            show_samples(step.number, samples)

    def _evaluate(self, task: Task, sampler: Sampler, step: int) -> dict[str, float]:
        if not task.eval_rows:
            return {}
        options = evaluation_options(self.recipe)
        accuracies = evaluate(sampler, task.tokenizer, task.eval_rows, self.accelerator, step=step, **options)
        self.metrics.write(step, accuracies)
        self.accelerator.print(
            f"held-out accuracy at step {step}: {accuracies['eval_accuracy']:.3f} at temperature 1, "
            f"{accuracies['eval_accuracy_greedy']:.3f} greedy ({len(task.eval_rows)} problems, judged by "
            f"{options['check_name']})"
        )
        return accuracies


def _drop_records_after(path: Path, step: int) -> None:
    """Takes out what a run will write again from a checkpoint on, and a line that was cut by a kill."""
    records = read_records(path) if path.exists() else []
    kept = [r for r in records if r["step"] == 0 or (r["step"] <= step and "eval_accuracy" not in r)]
    replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def _refuse_another_run(output_dir: Path) -> None:
    if has_records(output_dir / METRICS) or list_checkpoints(output_dir):
        raise FileExistsError(
            f"output_dir {output_dir} holds another run; name another, set resume to go on with it, or "
            "overwrite_output_dir"
        )


def _read_pass_rates(path: Path) -> list[float]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read, which says what rows the run has: {error}") from error


def _cold_start(task: Task, recipe: Recipe, accelerator: Accelerator) -> None:
    if not recipe.sft_steps:
        return
    losses = []
    is_hidden = recipe.disable_tqdm or not accelerator.is_main_process
    with progress_bar(recipe.sft_steps, "cold start", is_hidden=is_hidden) as bar:
        for loss, _ in train_on_traces(task.model, task.tokenizer, task.train_rows, recipe):
            losses.append(loss)
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    accelerator.print(
        f"cold start: {len(losses)} supervised steps, loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per token"
    )


def _print_summary(
    before: dict[str, float], after: dict[str, float], seconds: float, checkpoint: Path, recipe: Recipe
) -> None:
    output_dir = Path(recipe.output_dir)
    print(f"\ntrained in {seconds:.0f} s")
    for key, name in (("eval_accuracy", "at temperature 1"), ("eval_accuracy_greedy", "greedy")):
        if key in before:
            rise = after[key] - before[key]
            print(f"held-out accuracy {name}: {before[key]:.3f} -> {after[key]:.3f} ({rise:+.3f})")
    if before:
        print(f"right answers judged by: {evaluation_options(recipe)['check_name']}")
    print(f"model: {checkpoint}\nmetrics: {output_dir / 'metrics.jsonl'}\ncurves: {output_dir / 'curves.png'}")
    print(f"report: {output_dir / 'report.html'}")
