"""The ``grpo-kernels`` command: what it runs, what it prints where something is wrong, and its exit status.

Each command imports what it needs, so that ``info`` works without transformers.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

INTERRUPTED = 130  # what a shell reports for a process that SIGINT ended
#: By command, its help; each is a stage of a recipe by itself.
STAGES = {
    "sft": "supervised training on worked completions",
    "sample": "sample completions and keep those that earn enough, as rows to train on",
    "augment": "more problems out of worked ones: another start, another goal, hindsight",
    "distill": "train a student on a teacher's samples, or on its distributions over tokens",
    "eval": "pass@1, pass@k and cons@k on held-out problems, with confidence intervals",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, 2 for what a person can put right, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="grpo-kernels", description="Fused kernels for GRPO.")
    subcommands = parser.add_subparsers(dest="command", required=True)
    train = subcommands.add_parser(
        "train", add_help=False, allow_abbrev=False, help="train by a recipe; train --help lists every option"
    )
    train.add_argument("--recipe", help='a recipe that ships with the package ("addition") or a YAML file')
    for kind, help_text in STAGES.items():
        stage = subcommands.add_parser(kind, add_help=False, allow_abbrev=False, help=help_text)
        stage.add_argument("--recipe", help="a YAML file of keys and values")
    stages = subcommands.add_parser("recipe", allow_abbrev=False, help="run a recipe of several stages")
    stages.add_argument(
        "name", help='a recipe that ships ("r1-mini") or a YAML file; --key value holds for every stage'
    )
    page = subcommands.add_parser("report", help="an HTML page of a run: curves, samples, configuration")
    page.add_argument("run", type=Path, help="its output_dir")
    subcommands.add_parser("info", help="versions, backends and the compiled extension's build")
    arguments, rest = parser.parse_known_args(argv)
    debug = "--debug" in rest  # a traceback with every error
    rest = [text for text in rest if text != "--debug"]
    command = arguments.command
    if command in ("train", *STAGES) and arguments.recipe is None and rest and not rest[0].startswith("-"):
        return _fail(f"{command} takes a recipe by name: --recipe {rest[0]}")
    if command == "recipe" and "--recipe" in rest:
        return _fail(f"recipe takes a file of stages without an option: grpo-kernels recipe {arguments.name}")
    if command == "train":
        return _train(arguments.recipe, rest, debug)
    if command == "recipe":
        return _recipe(arguments.name, rest, debug)
    if command in STAGES:
        return _stage(command, arguments.recipe, rest, debug)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return _report(arguments.run) if command == "report" else _info()


def _train(name: str | None, overrides: Sequence[str], debug: bool) -> int:
    """One run of GRPO by a recipe; without a recipe, a dataset and a model it is the recipe "addition"."""
    output_dir: list[Path] = []

    def act() -> None:
        from grpo_kernels.training.options import override_keys
        from grpo_kernels.training.recipe import load_recipe

        chosen, keys = name, {*override_keys(overrides), *(["help"] if "-h" in overrides else [])}
        if name is None and not {"dataset_name", "model_name_or_path", "help"} & keys:
            print("no --recipe, --dataset_name or --model_name_or_path: training by --recipe addition")
            chosen = "addition"
        _look_beside(chosen)
        recipe = load_recipe(chosen, overrides)
        _check_runs_here(recipe)
        output_dir.append(Path(recipe.output_dir))
        from grpo_kernels.training.run import train

        train(recipe)

    def status() -> str:
        from grpo_kernels.training.checkpoint import status_line

        return status_line(output_dir[0]) if output_dir else "nothing was begun"

    return _guarded(act, status, debug)


def _recipe(name: str, overrides: Sequence[str], debug: bool) -> int:
    """The stages of a YAML file."""

    def act() -> None:
        from grpo_kernels.training.stages import load_stages
        from grpo_kernels.training.stages.runner import run_stages

        _look_beside(name)
        root, stages = load_stages(name, overrides)
        for stage in stages:
            _check_runs_here(stage.options)
        run_stages(root, stages)

    return _guarded(act, lambda: "the same command goes on from here", debug)


def _stage(kind: str, name: str | None, overrides: Sequence[str], debug: bool) -> int:
    """One stage by itself."""

    def act() -> None:
        from grpo_kernels.training.stages import load_stage
        from grpo_kernels.training.stages.runner import DONE, run_stage

        _look_beside(name)
        stage = load_stage(kind, name, overrides)
        _check_runs_here(stage.options)
        was_done = (stage.folder / DONE).exists() and not stage.options.overwrite_output_dir
        line = run_stage(stage)
        if not was_done:
            print(f"{stage.folder}: done in {line['seconds']} s")
            return
        results = ", ".join(f"{name} {value}" for name, value in line.items() if name not in ("stage", "kind"))
        print(f"{stage.folder} was done before: {results}\n--overwrite_output_dir true runs it again")

    return _guarded(act, lambda: "the same command begins again", debug)


def _report(folder: Path) -> int:
    try:
        from grpo_kernels.training.report.page import write_report

        print(write_report(folder))
    except ImportError as error:
        return _fail(f"reports need the extra grpo-kernels[train]: {error}")
    except (ValueError, OSError) as error:
        return _fail(str(error))
    return 0


def _info() -> int:
    from grpo_kernels import info

    print(info.report())
    return 0


def _check_runs_here(options: Any) -> None:
    """Raises ValueError where the device or the backend that a recipe or stage names cannot run here."""
    from grpo_kernels import backends
    from grpo_kernels.training.models import pick_device
    from grpo_kernels.training.report import tracker_names

    tracker_names(options.report_to)
    try:
        backends.resolve("grpo_loss", getattr(options, "backend", "auto"), pick_device(options.device))
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _look_beside(name: str | None) -> None:
    """Has reward modules found in the current folder, which a console script leaves out, and beside the recipe."""
    from grpo_kernels.rewards import look_in

    look_in(Path.cwd())
    if name is not None and Path(name).is_file():
        look_in(Path(name).parent)


def _guarded(act: Callable[[], None], status: Callable[[], str], debug: bool) -> int:
    """Runs a command. What a person can put right is one line, with ``debug`` after a traceback; the rest keeps it.

    ``status`` says what is left of a command that was stopped.
    """
    try:
        act()
        from grpo_kernels.training.models import end_process_group

        end_process_group()
    except ImportError as error:
        is_module = error.name is not None  # else an error that says what to install
        return _fail(f"training needs the extra grpo-kernels[train]: {error}" if is_module else str(error), debug)
    except (ValueError, OSError) as error:
        return _fail(str(error), debug)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {status()}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        from grpo_kernels.errors import ThirdPartyError, third_party_traceback

        print(f"\nstopped; {status()}", file=sys.stderr)
        if not isinstance(error, ThirdPartyError):  # of a gradient or the device: where it came from matters
            raise
        if debug:
            print(third_party_traceback(error), file=sys.stderr)
        return _fail(f"{error}{'' if debug else '; --debug shows the traceback'}")
    return 0


def _fail(message: str, debug: bool = False) -> int:
    """Prints what is wrong, with ``debug`` after its traceback; returns the status of bad arguments."""
    if debug:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
