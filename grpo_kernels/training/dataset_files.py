"""Rows as they stand in files: the same rows, whatever the file.

One rule holds for .jsonl, .json, .csv and .parquet, for folders of them, for what ``save_to_disk`` wrote and for the
Hub:

- A number is a number, a text is a text, and a missing value is None, whatever else its column holds. A whole number is
  an int, however it is stored: a 5.0 of a column of floats is 5. NaN is None.
- A decimal is a number, or a text where a float would lose digits. Dates and times are texts in ISO 8601, bytes are
  UTF-8.
- In an object inside a row, a field that is null is not there: tables fill up what one row has and another lacks.
- A cell of a .csv file is a number where it is spelled as JSON would spell it: 5, -0.5, but not 007, 5.00 or 1e5, which
  are texts. An empty cell is None. One that is a list or an object in JSON is that; in the columns of prompts and
  answers only a list of objects is, which chat messages are.
- A .json file is a list of objects, an object of such lists by split, an object of columns, or lines as in .jsonl.
- Text files are UTF-8, with or without a byte-order mark, and lines end in LF or CRLF.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_kernels.training.errors import described

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_SPLIT_NAMES = ("train", "test", "validation", "valid", "dev", "eval")
_EXACT = 2**53  # up to which floats hold every whole number


def read_file(
    path: Path,
    *,
    suffix: str | None = None,
    split: str = "train",
    text_columns: Sequence[str] = ("prompt", "answer"),
) -> list[Row]:
    """The rows of one file.

    Args:
        path: The file.
        suffix: One of ``SUFFIXES``; by default the path's own.
        split: Of a .json file that has several.
        text_columns: Of a .csv file: those of prompts and answers.

    Raises:
        ValueError: The file cannot be read, or holds something else than rows; the message names it and the line.
    """
    suffix = (suffix or path.suffix).lower()
    if suffix == ".parquet":
        return _parquet_rows(path)
    text = _text(path)
    if suffix == ".csv":
        return _csv_rows(path, text, text_columns)
    return plain_rows(_json_rows(path, text, split) if suffix == ".json" else _lines(path, text))


def read_jsonl(path: Path) -> list[Row]:
    """One JSON object a line; blank lines are skipped.

    Raises:
        ValueError: The file cannot be read, or a line is not a JSON object; the message names it.
    """
    return _lines(path, _text(path))


def plain_rows(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows of a table by the rule above."""
    return [{str(name): _plain(value) for name, value in row.items()} for row in rows]


def table_rows(table: Any) -> list[Row]:
    """The rows of an Arrow table by the rule above. A number of 16 or 32 bits is what is written for it, as 0.1."""
    import numpy as np

    columns = {}
    for field, column in zip(table.schema, table.columns, strict=True):
        if field.name in columns:
            raise ValueError(f"a table's columns must have different names, got {field.name!r} twice")
        narrow = {"halffloat": np.float16, "float": np.float32}.get(str(field.type))
        values = column.to_pylist()
        columns[field.name] = values if narrow is None else [v if v is None else float(str(narrow(v))) for v in values]
    rows = zip(*columns.values(), strict=True)
    return plain_rows([dict(zip(columns, row, strict=True)) for row in rows])


def json_splits(path: Path) -> list[str]:
    """The splits of a .json file; none where it has one, without a name.

    Raises:
        ValueError: The file cannot be read.
    """
    try:
        found = json.loads(_text(path))
    except (ValueError, RecursionError):  # lines; or what reading it will say
        return []
    tables = [name for name, rows in found.items() if _is_table(rows)] if isinstance(found, dict) else []
    return tables if len(tables) > 1 or (len(tables) == 1 and tables[0] in _SPLIT_NAMES) else []


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return int(value) if abs(value) < _EXACT and value == int(value) else value
    if isinstance(value, decimal.Decimal):
        return _number(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return str(value)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _number(value: decimal.Decimal) -> int | float | str | None:
    if not value.is_finite():
        return None if value.is_nan() else float(value)
    if value == value.to_integral_value():
        return int(value)
    return float(value) if decimal.Decimal(repr(float(value))) == value else str(value)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _lines(path: Path, text: str) -> list[Row]:
    # by newlines alone: splitlines() would also cut at separators that may stand inside a JSON string
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: expected a JSON object, got {line[:60]!r}") from error
        rows.append(_row(row, f"{path}:{number}"))
    return rows


def _json_rows(path: Path, text: str, split: str) -> list[Row]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":  # more than one value: one a line
            return _lines(path, text)
        raise ValueError(f"{path} cannot be read: {error}") from error
    if isinstance(found, dict):
        found = _of_object(path, found, split)
    if not isinstance(found, list):
        raise ValueError(f"{path}: expected a list of objects, got {type(found).__name__}")
    return [_row(row, f"{path}: row {number}") for number, row in enumerate(found)]


def _of_object(path: Path, found: dict[str, Any], split: str) -> list[Any]:
    """The rows in an object: of a split, of its only list of objects, of its columns, or the object itself."""
    tables = {name: rows for name, rows in found.items() if _is_table(rows)}
    if split in tables:
        return tables[split]
    if len(tables) == 1 and len(found) == 1:
        return next(iter(tables.values()))
    if len(tables) > 1:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(tables)}")
    columns = list(found.values())
    if columns and all(isinstance(c, list) for c in columns) and len({len(c) for c in columns}) == 1:
        return [dict(zip(found, values, strict=True)) for values in zip(*columns, strict=True)]
    return [found]


def _is_table(rows: Any) -> bool:
    return isinstance(rows, list) and len(rows) > 0 and all(isinstance(row, dict) for row in rows)


def _row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def _csv_rows(path: Path, text: str, text_columns: Sequence[str]) -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # a prompt may be longer than the default of 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    try:
        names = [name.strip() for name in next((cells for cells in reader if cells), [])]
        while names and not names[-1]:  # a comma at the end of every line
            names.pop()
        if len(set(names)) < len(names):
            raise ValueError(f"{path}: its columns must have different names, got {', '.join(map(repr, names))}")
        for cells in reader:
            if not cells:
                continue
            cells = cells if any(cells[len(names) :]) else cells[: len(names)]
            if len(cells) > len(names):
                raise ValueError(f"{path}:{reader.line_num}: expected {len(names)} cells, got {len(cells)}")
            cells += [""] * (len(names) - len(cells))
            pairs = zip(names, cells, strict=True)
            rows.append({name: _cell(cell, is_text=name in text_columns) for name, cell in pairs})
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from error
    return rows


def _cell(cell: str, *, is_text: bool) -> Any:
    if cell == "":
        return None
    for kind in (int, float):
        try:
            number = kind(cell)
        except ValueError:
            continue
        if repr(number) == cell and math.isfinite(number):
            return _plain(number)
    text = cell.replace("\r\n", "\n")
    if cell.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        found = _plain(json.loads(cell))
    except ValueError:  # a text that begins with a bracket
        return text
    return found if _is_table(found) or not is_text else text


def _parquet_rows(path: Path) -> list[Row]:
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        return table_rows(parquet.read_table(path))
    except (OSError, arrow.ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {described(error)}") from error
