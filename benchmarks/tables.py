"""Results as tables: for the terminal, as Markdown, and as the blocks of a README that are generated from them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from records import Results, Row, newest

#: This package among the providers; its variants' names begin with it.
OURS = "grpo_kernels"
_BLOCK = re.compile(r"(<!-- results: (?P<folder>\S+)(?: (?P<works>[\w ]+))? -->\n).*?(<!-- end of results -->)", re.S)


def terminal_lines(results: Results) -> list[str]:
    """A heading for each work, then a line for each provider."""
    lines = [", ".join(f"{name} {value}" for name, value in results.versions.items())]
    for group in results.of(*{row.work for row in results.rows}):
        lines += ["", group[0].title, *(f"  {_line(row)}" for row in group)]
        lines += [f"  {note}" for note in results.notes.get(group[0].title, [])]
    return lines


def _line(row: Row) -> str:
    if row.status != "ok":
        return f"{row.provider:40s} {row.status}: {row.reason}"
    cells = [f"{row.provider:40s} {row.median_ms:9.2f} ms  p20 {row.p20_ms:9.2f}  p80 {row.p80_ms:9.2f}"]
    cells.append(f"{row.over_floor:6.2f}x" + (f" (asked {row.asked:.2f}x)" if row.asked else ""))
    cells.append(_rate(row) if row.provider == row.floor else "")
    cells.append("" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f} GB")
    cells.append("" if not row.errors else f"error {max(row.errors.values()):.1e}")
    return "  ".join(cell for cell in cells if cell)


def _rate(row: Row) -> str:
    """What the floor reaches of bytes or operations."""
    if row.operations:
        return f"{row.operations / row.median_ms / 1e6:.0f} GFLOP/s"
    if row.bytes:
        return f"{row.bytes / row.median_ms / 1e6:.1f} GB/s"
    return ""


def markdown(results: Results, works: Sequence[str] = ()) -> str:
    """Every work, or those named, a table each, with what was not timed and why; then how time grows."""
    parts = []
    for group in results.of(*(works or {row.work for row in results.rows})):
        parts.append("\n".join([f"**{_sentence(group[0].title)}**", "", *_table(group)]))
        parts += ["- " + "\n- ".join(lines) for lines in [results.notes.get(group[0].title, [])] if lines]
    growth = _growth(results)
    if growth and not works:
        parts.append("\n".join(["**How time grows**", "", *growth]))
    return "\n\n".join(parts) + "\n"


#: Variants of a provider that have a column in the summary.
_SUMMARISED = frozenset({"CUDA", "Triton", "bf16 logits"})
#: What a summary has, a line for each title; the rest is in the tables.
_SUMMARY = ("logits", "hidden", "frozen", "logprobs", "upstream", "policy")


def summary(results: Results) -> str:
    """One table: a line for each work, a column for each provider that served one, in shares of the floor."""
    groups = results.of(*_SUMMARY)
    rows = [row for group in groups for row in group if row.status != "cannot run" and row.provider != row.floor]
    main = [
        name
        for name in dict.fromkeys(row.provider for row in rows)
        if _SUMMARISED.issuperset(name.split(", ")[1:]) or name.endswith("compiled")
    ]
    main.sort(key=lambda name: not name.startswith(OURS))
    versions = {row.provider: row.version for row in rows if row.version}
    heading = " | ".join(f"{name} {versions.get(name, '')}".strip() for name in main)
    lines = [f"| work | floor | {heading} |", "|" + "---|" * (len(main) + 2)]
    for group in groups:
        found = {row.provider: row for row in group}
        floor = found.get(group[0].floor)
        if floor is not None:
            cells = [_share(found.get(name)) for name in main]
            lines.append(f"| {_sentence(group[0].title)} | {_time(floor.median_ms)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _share(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row.over_floor:.2f}x" if row.status == "ok" else row.status


def _sentence(title: str) -> str:
    return title[:1].upper() + title[1:]


def _table(group: Sequence[Row]) -> list[str]:
    """The floor first, the others from fast to slow, and last what was not timed; columns that are empty are left."""
    timed = [row for row in group if row.status == "ok"]
    floor = [row for row in timed if row.provider == row.floor]
    timed = floor + sorted((row for row in timed if row not in floor), key=lambda row: row.median_ms)
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("", lambda row: f"{row.provider} {row.version}".strip()),
        ("median", lambda row: _time(row.median_ms)),
        (
            "p20 to p80" if timed and timed[0].rounds >= 5 else "least to most",
            lambda row: f"{_time(row.p20_ms)} to {_time(row.p80_ms)}",
        ),
        (f"over {group[0].floor}", lambda row: f"{row.over_floor:.2f}x"),
        ("asked", lambda row: "" if row.asked is None else f"{row.asked:.2f}x"),
        ("peak memory", lambda row: "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f} GB"),
        ("error", lambda row: f"{max(row.errors.values()):.1e}" if row.errors else ""),
    ]
    cells = [[cell(row) for row in timed] for _, cell in columns]
    kept = [i for i, column in enumerate(cells) if any(column)]
    lines = ["| " + " | ".join(columns[i][0] for i in kept) + " |", "|" + "---|" * len(kept)]
    lines += ["| " + " | ".join(cells[i][r] for i in kept) + " |" for r in range(len(timed))]
    rate = _rate(floor[0]) if floor else ""
    lines += ["", f"{_sentence(floor[0].provider)}: {rate}."] if rate else []
    absent = [row.provider for row in group if row.status == "cannot run"]
    refused = [
        f"{row.provider} ({row.status}: {row.reason})" for row in group if row.status not in ("ok", "cannot run")
    ]
    refused += [f"cannot run here: {', '.join(absent)}"] if absent else []
    return lines + (["", "Not timed: " + "; ".join(refused) + "."] if refused else [])


def _time(milliseconds: float) -> str:
    """Three digits, in the unit that suits."""
    for unit, factor in (("s", 1e-3), ("ms", 1.0), ("µs", 1e3)):
        if milliseconds * factor >= 1 or unit == "µs":
            digits = max(0, 2 - math.floor(math.log10(milliseconds * factor)))
            return f"{milliseconds * factor:.{digits}f} {unit}"
    raise AssertionError


def scaling(results: Results) -> dict[str, dict[str, list[Row]]]:
    """Rows from hidden states that differ in one thing: by that thing ("N", "V" or "live"), then by provider."""
    rows = [row for row in results.rows if row.work == "hidden" and row.status == "ok"]
    found: dict[str, dict[str, list[Row]]] = {}
    for axis in ("N", "V", "live"):
        lines: dict[tuple, list[Row]] = {}
        for row in rows:
            point = {**row.shape, "live": row.live}
            if axis != "live" and row.live != 1:
                continue
            lines.setdefault(tuple(v for n, v in point.items() if n != axis), []).append(row)
        longest = max(lines.values(), key=lambda rows: len({_at(row, axis) for row in rows}), default=[])
        by_provider: dict[str, list[Row]] = {}
        for row in sorted(longest, key=lambda row: _at(row, axis)):
            by_provider.setdefault(row.provider, []).append(row)
        found[axis] = {name: rows for name, rows in by_provider.items() if len(rows) > 2}
    return found


def _at(row: Row, axis: str) -> float:
    return row.live if axis == "live" else row.shape[axis]


def _growth(results: Results) -> list[str]:
    """The exponent of N and of V, by least squares of the logarithms; the time at no live row over the dense one's."""
    fits: dict[str, dict[str, str]] = {}
    for axis, providers in scaling(results).items():
        for name, rows in providers.items():
            points = [(_at(row, axis), row.median_ms) for row in rows]
            if axis == "live":
                slope, start = _line_through(points)
                text = f"{start / (start + slope):.2f} + {slope / (start + slope):.2f} live"
            else:
                text = f"{axis}^{_line_through([(math.log(x), math.log(y)) for x, y in points])[0]:.2f}"
            fits.setdefault(name, {})[axis] = text
    if not fits:
        return []
    lines = ["| | over tokens | over the vocabulary | over the share of live rows |", "|---|---|---|---|"]
    for name, found in fits.items():
        lines.append(f"| {name} | " + " | ".join(found.get(axis, "") for axis in ("N", "V", "live")) + " |")
    return lines


def _line_through(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope and value at 0 of the line of least squares."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return slope, mean_y - slope * mean_x


def described(results: Results) -> str:
    """The run in one line: the machine's name, versions, date."""
    versions = ", ".join(f"{name} {value}" for name, value in results.versions.items())
    return f"{results.device}, {results.date}: {versions}"


def with_results(text: str, root: Path) -> str:
    """A text with its blocks filled from the newest result of the folder that each names, relative to ``root``.

    A block is ``<!-- results: folder works -->`` up to ``<!-- end of results -->``: the tables of some works; without
    works the summary.

    Raises:
        FileNotFoundError: A folder has no result.
        ValueError: A block names a work that the result does not have.
    """

    def filled(block: re.Match[str]) -> str:
        results = Results.load(newest(root / block["folder"]))
        works = (block["works"] or "").split()
        unknown = set(works) - {row.work for row in results.rows}
        if unknown:
            raise ValueError(f"{block['folder']} has no work {', '.join(sorted(unknown))}")
        return f"{block[1]}\n{markdown(results, works) if works else summary(results)}\n{block[4]}"

    return _BLOCK.sub(filled, text)
