"""Results of a benchmark run: one row for each provider of each work, in a JSON file that is whole at any moment."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from grpo_kernels.files import replace_text

#: Of the file. A change of what a field means takes the next number.
SCHEMA = 1
#: What may have become of a provider. Only "ok" has times.
STATUSES = ("ok", "wrong", "failed", "crashed", "out of memory", "timed out", "cannot run", "left out")


@dataclass(frozen=True)
class Row:
    """One provider at one work.

    Args:
        work: What was done, by its short name: "hidden" is hidden states to loss, dX and dW.
        title: The same with shape and dtype, as a table's heading.
        provider: Who did it; the floor is a provider too.
        shape: By letter: N tokens, H hidden size, V vocabulary.
        dtype: Of the logits, or of hidden states and head.
        live: Share of the rows that have a gradient.
        floor: The provider whose time is 1.
        status: One of ``STATUSES``.
        reason: Why there are no times.
        median_ms: Of one interleaved run; p20 and p80 beside it.
        rounds: How many times it was timed.
        over_floor: The median over the floor's.
        asked: Most that ``over_floor`` is meant to be.
        operations: That the floor's work takes, floating-point; or
        bytes: That it moves.
        errors: Against fp64: log-probs in nats, the rest relative to its norm.
        peak_bytes: Most memory beyond the inputs at a time.
        version: Of the provider's package.
    """

    work: str
    title: str
    provider: str
    shape: dict[str, int]
    dtype: str
    live: float = 1.0
    floor: str = ""
    status: str = "ok"
    reason: str = ""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int = 0
    over_floor: float | None = None
    asked: float | None = None
    operations: float | None = None
    bytes: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    version: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status must be one of {STATUSES}, got {self.status!r}")
        if (self.median_ms is not None) != (self.status == "ok"):
            raise ValueError(f"{self.provider}: status {self.status!r} with a median of {self.median_ms}")


@dataclass
class Results:
    """A run on one machine.

    Args:
        device: Its short name, which is the folder's too.
        date: ISO.
        versions: Of what a figure depends on.
        rows: In the order in which they were measured.
        notes: What else was measured, by work.
        extra: What one kind of run adds, such as the checks on a GPU.
    """

    device: str
    date: str
    versions: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes the file as a whole, then renames it into place: whoever interrupts leaves the one or the other."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join("  " + json.dumps(_written(row)) for row in self.rows)
        head = {"schema": SCHEMA, "device": self.device, "date": self.date, "versions": self.versions}
        head |= {"notes": self.notes, "extra": self.extra}
        replace_text(path, json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{rows}\n ]\n}}\n')

    @classmethod
    def load(cls, path: Path) -> Results:
        """Reads what ``save`` wrote.

        Raises:
            ValueError: The file is of another schema or not such a file.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            raise ValueError(f"{path} is not a result of schema {SCHEMA}")
        given = {name: found[name] for name in ("device", "date", "versions", "notes", "extra")}
        return cls(rows=[Row(**row) for row in found["rows"]], **given)

    def put(self, title: str, rows: list[Row], notes: list[str]) -> None:
        """Adds a work's rows and notes, in the place of those of its title."""
        self.rows = [row for row in self.rows if row.title != title] + rows
        self.notes.pop(title, None)
        if notes:
            self.notes[title] = notes

    def of(self, *works: str) -> list[list[Row]]:
        """The rows of some works, a list for each title."""
        titles = dict.fromkeys(row.title for row in self.rows if row.work in works)
        return [[row for row in self.rows if row.title == title] for title in titles]


def newest(folder: Path) -> Path:
    """The last result of a device's folder, by name: date and version.

    Raises:
        FileNotFoundError: There is none.
    """
    found = sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))
    if not found:
        raise FileNotFoundError(f"no result in {folder}")
    return found[-1]


def _written(row: Row) -> dict[str, Any]:
    """Without what is as by default, figures to six digits."""
    defaults = {f.name: f.default for f in fields(Row)}
    kept = {name: value for name, value in asdict(row).items() if value != defaults[name] and value != {}}
    return {name: _rounded(value) for name, value in kept.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return value
