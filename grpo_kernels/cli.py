"""The ``grpo-kernels`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

INTERRUPTED = 130  # what a shell reports for a process that SIGINT ended


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, 2 for bad arguments, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="grpo-kernels", description="Fused kernels for GRPO.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train", add_help=False, allow_abbrev=False, help="train by a recipe; train --help lists every option"
    )
    train.add_argument("--recipe", help='a recipe that ships with the package ("addition") or a YAML file')
    stages = commands.add_parser("recipe", add_help=False, allow_abbrev=False, help="run a recipe of several stages")
    stages.add_argument(
        "name", help='a recipe that ships ("r1-mini") or a YAML file; --key value holds for every stage'
    )
    page = commands.add_parser("report", help="an HTML page of a run: curves, samples, configuration")
    page.add_argument("run", type=Path, help="its output_dir")
    commands.add_parser("info", help="versions, backends and the compiled extension's build")
    bench = commands.add_parser("bench", help="results of the benchmarks").add_subparsers(dest="what", required=True)
    report = bench.add_parser("report", help="tables, charts and the README from the newest result of each device")
    report.add_argument("results", type=Path, nargs="?", default=Path("benchmarks/results"))
    report.add_argument("--readme", type=Path, help="whose blocks of results to fill")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "train":
        return _train(arguments.recipe, rest)
    if arguments.command == "recipe":
        return _stages(arguments.name, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command == "report":
        return _page(arguments.run)
    return _report(arguments.results, arguments.readme) if arguments.command == "bench" else _info()


def _stages(name: str, overrides: Sequence[str]) -> int:
    try:
        from grpo_kernels.training.stages import load_stages, run_stages

        run_stages(*load_stages(name, overrides))
    except ImportError as error:
        return _fail(f"training needs the extra grpo-kernels[train]: {error}")
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    return 0


def _page(run: Path) -> int:
    try:
        from grpo_kernels.training.html_report import write_report

        print(write_report(run))
    except ImportError as error:
        return _fail(f"reports need the extra grpo-kernels[train]: {error}")
    except (ValueError, FileNotFoundError) as error:
        return _fail(str(error))
    return 0


def _report(results: Path, readme: Path | None) -> int:
    try:
        from grpo_kernels.bench.report import report

        written = report(results, readme)
    except ImportError as error:
        return _fail(f"charts need the extra grpo-kernels[bench]: {error}")
    except (FileNotFoundError, ValueError) as error:
        return _fail(str(error))
    print("\n".join(map(str, written)))
    return 0


def _info() -> int:
    from grpo_kernels import info  # each command imports what it needs: this one works without transformers

    print(info.report())
    return 0


def _train(recipe_name: str | None, overrides: Sequence[str]) -> int:
    output_dir = None
    try:
        try:
            from grpo_kernels.training.recipe import load_recipe

            recipe = load_recipe(recipe_name, overrides)
        except ImportError as error:
            return _fail(f"training needs the extra grpo-kernels[train]: {error}")
        except (ValueError, FileNotFoundError) as error:
            return _fail(str(error))
        from grpo_kernels.training.run import train

        output_dir = Path(recipe.output_dir)
        try:
            train(recipe)
        except FileExistsError as error:
            return _fail(str(error))
    except KeyboardInterrupt:
        print(_interrupted_message(output_dir), file=sys.stderr)
        return INTERRUPTED
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _interrupted_message(output_dir: Path | None) -> str:
    from grpo_kernels.training.checkpoint import list_checkpoints

    complete = [] if output_dir is None else list_checkpoints(output_dir)
    kept = f"last complete checkpoint: {complete[-1]}" if complete else "no checkpoint yet"
    return f"\ninterrupted; {kept}; metrics: {output_dir}/metrics.jsonl" if output_dir else "\ninterrupted"


if __name__ == "__main__":
    sys.exit(main())
