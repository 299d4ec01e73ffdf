"""One run from a recipe: cold start, evaluation, GRPO, evaluation, curves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from grpo_kernels import registry
from grpo_kernels.training.checkpoint import clear_run, list_checkpoints, save_checkpoint
from grpo_kernels.training.cold_start import cold_start
from grpo_kernels.training.data import Task, load_task
from grpo_kernels.training.evaluation import evaluate
from grpo_kernels.training.loop import GRPOLoop, Step
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.reporting import MetricsFile, Table, plot_curves, read_metrics, sample_text


class Result(NamedTuple):
    """What a finished run leaves. The evaluations are empty without held-out problems."""

    checkpoint: Path
    before: dict[str, float]  # held-out accuracies before GRPO, after the cold start
    after: dict[str, float]


def train(recipe: Recipe) -> Result:
    """Runs a recipe to its end; the same recipe gives the same curve.

    Writes ``checkpoint-<step>`` folders, ``metrics.jsonl`` and ``curves.png`` into ``recipe.output_dir``. Whenever it
    is interrupted, the checkpoints there are complete and the metrics readable.

    Raises:
        ValueError: The data does not fit the recipe, or a reward is infinite.
        FileExistsError: ``output_dir`` holds another run, and the recipe does not say to replace it.
        RuntimeError: The named backend cannot run here, or a gradient is not finite.
    """
    output_dir = Path(recipe.output_dir)
    if recipe.num_threads is not None:
        torch.set_num_threads(recipe.num_threads)
    disable_progress_bar()  # transformers' own, one for every file that it reads or writes
    set_seed(recipe.seed)
    task = load_task(recipe)
    backend = registry.resolve("grpo_loss", recipe.backend, task.model.device)
    print(
        f"{task.model.num_parameters() / 1e6:.2f} M parameters on {task.model.device}, loss by the {backend} backend, "
        f"{len(task.train_rows)} training problems"
    )
    _prepare(output_dir, recipe.overwrite_output_dir)
    metrics_file = MetricsFile(output_dir / "metrics.jsonl")
    try:
        start = time.perf_counter()
        _run_cold_start(task, recipe)
        before = _evaluate(task, recipe, 0, metrics_file)
        save_checkpoint(output_dir, 0, task.model, task.tokenizer, keep=recipe.save_total_limit)
        set_seed(recipe.seed)
        checkpoint = _run_grpo(task, recipe, output_dir, metrics_file)
        after = _evaluate(task, recipe, recipe.max_steps, metrics_file)
        seconds = time.perf_counter() - start
    finally:
        metrics_file.close()
    plot_curves(read_metrics(output_dir / "metrics.jsonl"), output_dir / "curves.png")
    _print_summary(before, after, seconds, checkpoint, output_dir)
    return Result(checkpoint, before, after)


def _prepare(output_dir: Path, overwrite: bool) -> None:
    if overwrite:
        clear_run(output_dir)
    elif (output_dir / "metrics.jsonl").exists() or list_checkpoints(output_dir):
        raise FileExistsError(f"output_dir {output_dir} holds another run; name another or set overwrite_output_dir")
    output_dir.mkdir(parents=True, exist_ok=True)


def _bar(recipe: Recipe, total: int, title: str) -> tqdm:
    return tqdm(total=total, desc=title, disable=True if recipe.disable_tqdm else None, dynamic_ncols=True)


def _run_cold_start(task: Task, recipe: Recipe) -> None:
    with _bar(recipe, recipe.sft_steps, "cold start") as bar:
        losses = []
        for loss in cold_start(task.model, task.tokenizer, task.train_rows, recipe):
            losses.append(loss)
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    if losses:
        print(f"cold start: {len(losses)} supervised steps, loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per token")


def _run_grpo(task: Task, recipe: Recipe, output_dir: Path, metrics_file: MetricsFile) -> Path:
    checkpoint = output_dir / "checkpoint-0"
    with _bar(recipe, recipe.max_steps, "GRPO") as bar:
        table = Table(bar)
        for step in GRPOLoop(task, recipe).run():
            metrics_file.write({"step": step.number, **step.metrics})
            _show(step, recipe, table, bar)
            if step.number % recipe.save_steps == 0 or step.number == recipe.max_steps:
                checkpoint = save_checkpoint(
                    output_dir, step.number, task.model, task.tokenizer, keep=recipe.save_total_limit
                )
    return checkpoint


def _show(step: Step, recipe: Recipe, table: Table, bar: tqdm) -> None:
    bar.update()
    bar.set_postfix(reward=f"{step.metrics['reward']:.3f}", refresh=False)
    if step.number % recipe.logging_steps == 0 or step.number == 1:
        table.row({"step": step.number, **step.metrics})
    if recipe.completions_steps and recipe.num_completions_to_print and step.number % recipe.completions_steps == 0:
        stride = recipe.num_generations + 1  # each from another group
        bar.write(sample_text(step.number, step.samples[::stride][: recipe.num_completions_to_print]) + "\n")


def _evaluate(task: Task, recipe: Recipe, step: int, metrics_file: MetricsFile) -> dict[str, float]:
    if not task.eval_rows:
        return {}
    accuracies = evaluate(task.model, task.tokenizer, task.eval_rows, recipe)
    metrics_file.write({"step": step, **accuracies})
    print(
        f"held-out accuracy at step {step}: {accuracies['eval_accuracy']:.3f} at temperature 1, "
        f"{accuracies['eval_accuracy_greedy']:.3f} greedy ({len(task.eval_rows)} problems)"
    )
    return accuracies


def _print_summary(
    before: dict[str, float], after: dict[str, float], seconds: float, checkpoint: Path, output_dir: Path
) -> None:
    print(f"\ntrained in {seconds:.0f} s")
    for key, name in (("eval_accuracy", "at temperature 1"), ("eval_accuracy_greedy", "greedy")):
        if key in before:
            rise = after[key] - before[key]
            print(f"held-out accuracy {name}: {before[key]:.3f} -> {after[key]:.3f} ({rise:+.3f})")
    print(f"model: {checkpoint}\nmetrics: {output_dir / 'metrics.jsonl'}\ncurves: {output_dir / 'curves.png'}")
