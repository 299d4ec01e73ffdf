"""The commands that train, sample and measure: what they print where something is wrong, and their exit status."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

INTERRUPTED = 130  # what a shell reports for a process that SIGINT ended
#: By command, its help; each but ``train`` is a stage of a recipe by itself.
STAGES = {
    "sft": "supervised training on worked completions",
    "sample": "sample completions and keep those that earn enough, as rows to train on",
    "augment": "more problems out of worked ones: another start, another goal, hindsight",
    "distill": "train a student on a teacher's samples, or on its distributions over tokens",
    "eval": "pass@1, pass@k and cons@k on held-out problems, with confidence intervals",
}


def train(name: str | None, overrides: Sequence[str], *, debug: bool = False) -> int:
    """``grpo-kernels train``: one run of GRPO by a recipe; returns the exit status.

    Without a recipe, a dataset and a model it is the recipe "addition".
    """
    output_dir: list[Path] = []

    def run() -> None:
        from grpo_kernels.training.recipe import load_recipe

        chosen = name or _recipe_of(overrides)
        _look_beside(chosen)
        recipe = load_recipe(chosen, overrides)
        check_runs_here(recipe)
        output_dir.append(Path(recipe.output_dir))
        from grpo_kernels.training.run import train

        train(recipe)

    return _guarded(run, lambda: _left(output_dir), debug)


def recipe(name: str, overrides: Sequence[str], *, debug: bool = False) -> int:
    """``grpo-kernels recipe``: the stages of a YAML file; returns the exit status."""

    def run() -> None:
        from grpo_kernels.training.stages.config import load_stages
        from grpo_kernels.training.stages.runner import run_stages

        _look_beside(name)
        root, stages = load_stages(name, overrides)
        for stage in stages:
            check_runs_here(stage.options)
        run_stages(root, stages)

    return _guarded(run, lambda: "the same command goes on from here", debug)


def stage(kind: str, name: str | None, overrides: Sequence[str], *, debug: bool = False) -> int:
    """``grpo-kernels sft`` and the like: one stage by itself; returns the exit status."""

    def run() -> None:
        from grpo_kernels.training.stages.config import load_stage
        from grpo_kernels.training.stages.runner import DONE, run_stage

        _look_beside(name)
        chosen = load_stage(kind, name, overrides)
        check_runs_here(chosen.options)
        was_done = (chosen.folder / DONE).exists() and not chosen.options.overwrite_output_dir
        line = run_stage(chosen)
        if not was_done:
            print(f"{chosen.folder}: done in {line['seconds']} s")
            return
        shown = ", ".join(f"{name} {value}" for name, value in line.items() if name not in ("stage", "kind"))
        print(f"{chosen.folder} was done before: {shown}\n--overwrite_output_dir true runs it again")

    return _guarded(run, lambda: "the same command begins again", debug)


def check_runs_here(recipe: Any) -> None:
    """Raises ValueError where the device or the backend that a recipe names cannot run here."""
    from grpo_kernels import backends
    from grpo_kernels.training.models import pick_device
    from grpo_kernels.training.report.log import tracker_names

    tracker_names(recipe.report_to)
    try:
        backends.resolve("grpo_loss", getattr(recipe, "backend", "auto"), pick_device(recipe.device))
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def fail(message: str, debug: bool = False) -> int:
    """Prints what is wrong, with ``debug`` after its traceback; returns the status of bad arguments."""
    if debug:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return 2


def _recipe_of(overrides: Sequence[str]) -> str | None:
    """The recipe of a command that names none: "addition", unless it names a dataset or a model."""
    from grpo_kernels.training.arguments import given_keys

    if {"dataset_name", "model_name_or_path", "help"} & set(given_keys(overrides)) or "-h" in overrides:
        return None
    print("no --recipe, --dataset_name or --model_name_or_path: training by --recipe addition")
    return "addition"


def _look_beside(name: str | None) -> None:
    """Has ``module:function`` looked for in the folder at hand, which a console script leaves out, and the recipe's."""
    from grpo_kernels.rewards import look_in

    look_in(Path.cwd())
    if name is not None and Path(name).is_file():
        look_in(Path(name).parent)


def _guarded(run: Callable[[], None], left: Callable[[], str], debug: bool) -> int:
    """Runs a command. What a person can put right is one line; any other error keeps its traceback.

    With ``debug`` that line comes after a traceback, too.
    """
    try:
        run()
        from grpo_kernels.training.distributed import end_process_group

        end_process_group()
    except ImportError as error:
        is_module = error.name is not None  # else an error that says what to install
        return fail(f"training needs the extra grpo-kernels[train]: {error}" if is_module else str(error), debug)
    except (ValueError, OSError) as error:
        return fail(str(error), debug)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {left()}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        from grpo_kernels.errors import ThirdPartyError, third_party_traceback

        if isinstance(error, ThirdPartyError):
            print(f"\nstopped; {left()}", file=sys.stderr)
            if debug:
                print(third_party_traceback(error), file=sys.stderr)
            return fail(f"{error}{'' if debug else '; --debug shows the traceback'}")
        # of a gradient, a reward function or the device: where it came from matters
        print(f"\nstopped; {left()}", file=sys.stderr)
        raise
    return 0


def _left(output_dir: list[Path]) -> str:
    from grpo_kernels.training.checkpoint import status_line

    return status_line(output_dir[0]) if output_dir else "nothing was begun"
