"""Writes tables, charts and the README's blocks from the newest committed result of each device."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import charts
import tables
from gpu import summary
from records import Results, newest

from grpo_kernels.files import replace_text


def report(results_folder: Path, readme: Path | None) -> list[Path]:
    """Writes ``report.md`` and the charts into the folder of each device, and fills the blocks of the README.

    Args:
        results_folder: Has a folder for each device, which has the results; of those the newest counts.
        readme: What to fill, its blocks naming folders relative to it; None to leave it.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: There is no result, or not in a folder that the README names.
        ValueError: A result is of another schema.
    """
    folders = sorted({path.parent for path in results_folder.glob("*/*.json")})
    if not folders:
        raise FileNotFoundError(f"no results in {results_folder}")
    written = []
    for folder in folders:
        results = Results.load(newest(folder))
        written.append(report_device(folder))
        if charts.stale(results, folder):  # another matplotlib would draw other bytes
            written += charts.draw(results, folder)
    if readme is not None:
        written.append(replace_text(readme, tables.with_results(readme.read_text(encoding="utf-8"), readme.parent)))
    return written


def report_device(folder: Path) -> Path:
    """Writes ``report.md`` of a device's newest result; returns its path."""
    return replace_text(folder / "report.md", markdown_report(Results.load(newest(folder))))


def markdown_report(results: Results) -> str:
    """Every table of a result, with the run's versions, its stages on a GPU, and what its errors are of."""
    head = [f"# {tables.described(results)}", *summary.lines(results), results.extra.get("checked", "")]
    parts = [*head, tables.markdown(results)]
    return "\n\n".join(part for part in parts if part)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, or 2 for results that cannot be reported."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=Path(__file__).parent / "results")
    parser.add_argument("--readme", type=Path, help="whose blocks of results to fill")
    options = parser.parse_args(argv)
    try:
        written = report(options.results, options.readme)
    except (OSError, ValueError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
