"""The ``grpo-kernels`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo_kernels.training import commands


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, 2 for what a person can put right, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="grpo-kernels", description="Fused kernels for GRPO.")
    subcommands = parser.add_subparsers(dest="command", required=True)
    train = subcommands.add_parser(
        "train", add_help=False, allow_abbrev=False, help="train by a recipe; train --help lists every option"
    )
    train.add_argument("--recipe", help='a recipe that ships with the package ("addition") or a YAML file')
    for kind, help_text in commands.STAGES.items():
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
    takes_recipe = arguments.command in ("train", *commands.STAGES) and arguments.recipe is None
    if takes_recipe and rest and not rest[0].startswith("-"):
        return commands.fail(f"{arguments.command} takes a recipe by name: --recipe {rest[0]}")
    if arguments.command == "recipe" and "--recipe" in rest:
        return commands.fail(f"recipe takes a file of stages without an option: grpo-kernels recipe {arguments.name}")
    if arguments.command == "train":
        return commands.train(arguments.recipe, rest, debug=debug)
    if arguments.command == "recipe":
        return commands.recipe(arguments.name, rest, debug=debug)
    if arguments.command in commands.STAGES:
        return commands.stage(arguments.command, arguments.recipe, rest, debug=debug)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return _page(arguments.run) if arguments.command == "report" else _info()


def _page(run: Path) -> int:
    try:
        from grpo_kernels.training.report.page import write_report

        print(write_report(run))
    except ImportError as error:
        return commands.fail(f"reports need the extra grpo-kernels[train]: {error}")
    except (ValueError, OSError) as error:
        return commands.fail(str(error))
    return 0


def _info() -> int:
    from grpo_kernels import info  # each command imports what it needs: this one works without transformers

    print(info.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
