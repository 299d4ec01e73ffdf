"""Rows out of files: the same typed values give the same rows, whatever the file.

One rule holds for .jsonl, .json, .csv and .parquet, for folders of them, what ``save_to_disk`` wrote and the Hub:

- A number is a number, a text is a text, a truth value is one, and a missing value is None, whatever else its column
  holds. A whole number is an int, however it is stored: 5.0 and, in JSON, 1e5 are 5 and 100000. NaN is None.
- A decimal is a number, or a text where a float would lose digits. Dates and times are texts in ISO 8601, bytes are
  UTF-8. What is not Unicode, in bytes or as half a surrogate pair in JSON, is U+FFFD.
- In an object inside a row, a field that is null is not there: tables fill up what one row has and another lacks. The
  map of a table is an object. Of fields with one name the last counts. Values are nested at most 100 deep.
- A .json file is a list of objects, an object of such lists by split, an object of columns, or lines as in .jsonl.
- Text files are UTF-8, with or without a byte-order mark, and lines end in LF or CRLF.

A .csv file has commas between its columns and no types. A cell is the first of these that it can be:

- None, if it is empty.
- A number, if it is spelled exactly as Python prints that number: 5, -3, 0.5, 5.0, 1e-07.
- A list or an object, if it is one in JSON. In the columns of prompts and answers only a list of objects is read so,
  which chat messages are.
- A text, as it stands, with LF for CRLF: 007, 5.00, 1e5, +5, .5, 5., 1_000, 0x10, " 5", true, null, NaN, 2026-11-28.

A .jsonl file gives the rows of a .csv file if it has these very values. It gives others where it has the number 5.00,
the text "5", the text "" or the value true: those are 5, "5", "" and True, and in a .csv file "5.00", 5, None and
"true". ``accuracy`` compares numbers by value: 5, "5" and "5.00" are equal.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import json
import math
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from grpo_kernels.errors import described
from grpo_kernels.hub import check_folder, use_cache_if_unreachable

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_SPLIT_NAMES = ("train", "test", "validation", "valid", "dev", "eval")
_EXACT = 2**53  # up to which floats hold every whole number
_DEEPEST = 100  # lists and objects in each other: far from where Python's own recursion ends
_NOT_COMMAS = (";", "\t", "|")  # that other programs put between columns


def read_file(
    path: Path,
    *,
    suffix: str | None = None,  # one of SUFFIXES, where it is not the path's own
    split: str = "train",  # of a .json file that has several
    text_columns: Sequence[str] = ("prompt", "answer"),  # of a .csv file: those of prompts and answers
) -> list[Row]:
    """The rows of one file; raises ValueError, with its name and the line, where it holds something else."""
    suffix = (suffix or path.suffix).lower()
    if suffix == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            return table_rows(parquet.read_table(path))
        except (OSError, ValueError, OverflowError, ArrowException) as error:
            raise ValueError(f"{path} cannot be read: {described(error)}") from error
    if suffix == ".json":
        return _json_rows(path, split)
    text = _text(path)
    return _csv_rows(path, text, text_columns) if suffix == ".csv" else _jsonl_rows(path, text)


def table_rows(table: Any) -> list[Row]:
    """The rows of an Arrow table by the rule above. A number of 16 or 32 bits is what is written for it, as 0.1."""
    import pyarrow

    for number, name in enumerate(table.column_names):
        if name in table.column_names[:number]:
            raise ValueError(f"a table's columns must have different names, got {name!r} twice")
    kind = pyarrow.struct(list(table.schema))
    rows = table.to_pylist(maps_as_pydicts="lossy")  # the last of equal keys, as in JSON
    if "float" in str(kind):  # those of 64 bits are "double"
        rows = [_shortest_decimals(row, kind) for row in rows]
    return [_row(row, f"row {number}") for number, row in enumerate(rows)]


def json_splits(path: Path) -> list[str]:
    """The splits of a .json file; none where it has one, without a name."""
    return [name for name in _json_tables(path) if name]


def _shortest_decimals(value: Any, kind: Any) -> Any:
    """A value of an Arrow type, where a float of 16 or 32 bits is the shortest decimal that is stored so."""
    from pyarrow import types

    if value is None:
        return None
    if types.is_floating(kind):
        return float(str(kind.to_pandas_dtype()(value)))
    if types.is_struct(kind):
        return {field.name: _shortest_decimals(value[field.name], field.type) for field in kind}
    if types.is_map(kind):
        kinds = kind.key_type, kind.item_type
        return {_shortest_decimals(k, kinds[0]): _shortest_decimals(v, kinds[1]) for k, v in value.items()}
    if types.is_nested(kind) and isinstance(value, list):
        return [_shortest_decimals(item, kind.value_type) for item in value]
    return value


def _row(content: Any, where: str) -> Row:
    """A row by the rule above: unlike a field of an object, a column without a value is there."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(content).__name__}")
    try:
        return {str(_plain(name)): _plain(value, depth=1) for name, value in content.items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _plain(value: Any, depth: int = 0) -> Any:
    if depth > _DEEPEST:
        raise ValueError(f"values must be nested at most {_DEEPEST} deep")
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return int(value) if value.is_integer() and abs(value) < _EXACT else value
    if isinstance(value, decimal.Decimal):
        if value == value.to_integral_value():
            return int(value)
        return float(value) if decimal.Decimal(repr(float(value))) == value else str(value)
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item, depth + 1) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (datetime.timedelta, uuid.UUID)):
        return str(value)
    if isinstance(value, str) and not value.isascii():
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _loads(text: str) -> Any:
    """What JSON says; raises ValueError also where it is nested so deep that Python cannot read it."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"values must be nested at most {_DEEPEST} deep") from error


def _jsonl_rows(path: Path, text: str) -> list[Row]:
    # by newlines alone: splitlines() would also cut at separators that may stand inside a JSON string
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = _loads(line)
        except ValueError as error:
            reason = getattr(error, "msg", error)  # of an error of JSON without its place in the line
            raise ValueError(f"{path}:{number}: expected a JSON object, got {line[:60]!r}: {reason}") from error
        rows.append(_row(row, f"{path}:{number}"))
    return rows


def _json_rows(path: Path, split: str) -> list[Row]:
    tables = _json_tables(path)
    if split not in tables and len(tables) > 1:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(tables)}")
    rows = tables[split] if split in tables else next(iter(tables.values()))
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of objects, got {type(rows).__name__}")
    return [_row(row, f"{path}: row {number}") for number, row in enumerate(rows)]


def _json_tables(path: Path) -> dict[str, Any]:
    """A .json file's lists of rows, if that is what they are, by the name of their split; "" where it has none."""
    text = _text(path)
    try:
        content = _loads(text)
    except ValueError as error:
        if getattr(error, "msg", "") == "Extra data":  # more than one value: one a line
            return {"": _jsonl_rows(path, text)}
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        return {"": content}
    tables = {name: rows for name, rows in content.items() if _is_table(rows)}
    columns = list(content.values())
    if len(tables) > 1 or tables.keys() & _SPLIT_NAMES:
        return tables
    if len(tables) == len(content) == 1:
        return {"": columns[0]}
    if columns and all(isinstance(c, dict) and c and list(c) == [str(i) for i in range(len(c))] for c in columns):
        raise ValueError(f'{path}: expected a list of objects, got columns by row number; write it by orient="records"')
    if columns and all(isinstance(c, list) for c in columns) and len({len(c) for c in columns}) == 1:
        return {"": [dict(zip(content, values, strict=True)) for values in zip(*columns, strict=True)]}
    return {"": [content]}


def _is_table(rows: Any) -> bool:
    return isinstance(rows, list) and len(rows) > 0 and all(isinstance(row, dict) for row in rows)


def _csv_rows(path: Path, text: str, text_columns: Sequence[str]) -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # a prompt may be longer than the default of 128 KiB
    _check_separator(path, text)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines = filter(None, reader)
    rows: list[Row] = []
    try:
        names = [name.strip() for name in next(lines, [])]
        while names and not names[-1]:  # a comma at the end of every line
            names.pop()
        if len(set(names)) < len(names):
            raise ValueError(f"{path}: its columns must have different names, got {', '.join(map(repr, names))}")
        for cells in lines:
            if any(cells[len(names) :]):
                raise ValueError(f"{path}:{reader.line_num}: expected {len(names)} cells, got {len(cells)}")
            pairs = zip_longest(names, cells[: len(names)], fillvalue="")
            rows.append({name: _cell(cell, is_text=name in text_columns) for name, cell in pairs})
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from error
    return rows


def _check_separator(path: Path, text: str) -> None:
    """Raises ValueError where the first line is one column, and it and the next have another program's separator."""
    line, *following = re.split(r"[\r\n]+", text.lstrip("\r\n"), maxsplit=2)
    names = next(csv.reader([line]), [])  # not strict: a quoted name before another separator is an error there
    for separator in _NOT_COMMAS:
        if len(names) == 1 and separator in names[0] and (not following or separator in following[0]):
            raise ValueError(
                f"{path}: its first line is {line[:60]!r}, one column with {separator!r} in its name: columns must be "
                "separated by commas; write the file anew with commas, or as .jsonl"
            )


def _cell(cell: str, *, is_text: bool) -> Any:
    """A cell's value: JSON has all numbers as Python prints them, and others, which are texts here."""
    if cell == "":
        return None
    text = cell.replace("\r\n", "\n")
    try:
        value = _loads(cell)
        is_number = isinstance(value, (int, float)) and repr(value) == cell
        is_json = _is_table(value) or (isinstance(value, (list, dict)) and not is_text)
        return _plain(value) if is_number or is_json else text
    except ValueError:  # not JSON, or nested too deep
        return text


_GSM8K = ("openai/gsm8k", "gsm8k")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_ONLY = "train"  # what the split of a dataset that has one is called


class Splits(NamedTuple):
    """The splits of a dataset, none of which is read yet."""

    where: str  # names the dataset in errors
    readers: dict[str, Callable[[], list[Row]]]  # by the split's name
    is_single: bool = False  # it has one split and no name for it

    def rows(self, split: str) -> list[Row]:
        """The rows of a split, of a part of one or of several: ``train``, ``train[:100]``, ``train+test[50%:]``."""
        names = dict.fromkeys(re.findall(r"(?:^|\+)\s*([^\[+\s]+)", split))
        if not names.keys() <= self.readers.keys():
            known = ", ".join(self.readers)
            raise ValueError(f"{self.where} has no split {split!r}; it has {known}, and parts as {_ONLY}[:100]")
        rows = {name: self.readers[name]() for name in names}
        if split in rows:
            return rows[split]
        import datasets

        try:
            parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows[name]) for name in rows})
        except (AssertionError, ValueError) as error:
            raise ValueError(f"{self.where}: split {split!r} cannot be read: {described(error)}") from error
        return [row for part in parts for row in rows[part.splitname][part.from_ : part.to]]


def open_dataset(
    name: str, config: str | None, text_columns: Sequence[str], known: Sequence[str] = (), *, seed: int = 0
) -> Splits:
    """The splits of a file, a folder or a name on the Hub; ``known`` are other names that would have been right."""
    path, where = Path(name).expanduser(), f"dataset {name!r}"
    if name.startswith("reasoning_gym/"):
        from grpo_kernels.rewards.reasoning_gym import generate_rows

        read = partial(generate_rows, name.removeprefix("reasoning_gym/"), config, seed)
        return Splits(where, {_ONLY: read}, is_single=True)
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        names = json_splits(path) if suffix == ".json" else []
        read = partial(read_file, path, text_columns=text_columns)
        return Splits(where, {split: partial(read, split=split) for split in names or [_ONLY]}, is_single=not names)
    if path.is_file():
        raise ValueError(f"{where} is a file of another kind; {', '.join(SUFFIXES)} can be read")
    check_folder("dataset_name", name)
    import datasets  # seconds of import that only a run on a folder or a Hub name needs

    if not path.is_dir():
        use_cache_if_unreachable()
        config = "main" if config is None and name in _GSM8K else config
    is_saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    source = str(path.resolve()) if path.is_dir() else name
    try:
        dataset = datasets.load_from_disk(source) if is_saved else datasets.load_dataset_builder(source, config)
    except Exception as error:
        kinds = [f"a built-in task ({', '.join(known)})"] if known else []
        kinds += [f"a file ({', '.join(SUFFIXES)})", "a folder or a name on the Hub"]
        raise ValueError(f"dataset_name must be {', '.join(kinds)}, got {name!r}: {described(error)}") from error
    if is_saved:
        return _table_splits(dataset, where)
    return _builder_splits(dataset, path if path.is_dir() else None, where, text_columns)


def _table_splits(dataset: Any, where: str) -> Splits:
    """What ``save_to_disk`` wrote, or a builder prepared: one dataset or several by their split."""

    def rows(table: Any) -> list[Row]:
        return table_rows(table.with_format("arrow")[:]) if len(table) else []

    is_single = not isinstance(dataset, dict)
    tables = {_ONLY: dataset} if is_single else dataset
    return Splits(where, {str(name): partial(rows, table) for name, table in tables.items()}, is_single)


def _builder_splits(builder: Any, folder: Path | None, where: str, text_columns: Sequence[str]) -> Splits:
    """The files of a folder or of a Hub dataset: of these kinds they are read as single files are."""
    import datasets

    files = {str(split): [str(path) for path in paths] for split, paths in (builder.config.data_files or {}).items()}
    kinds = {_kind(path) for paths in files.values() for path in paths}
    if folder is not None and not kinds.isdisjoint(SUFFIXES):  # datasets reads the files of one kind alone
        others = sorted(p.name for p in folder.iterdir() if p.is_file() and _kind(p.name) in {*SUFFIXES} - kinds)
        if others:
            raise ValueError(
                f"{where} has files of several kinds, {', '.join(sorted(kinds))} and {', '.join(others)}: "
                "name one file, or keep one kind"
            )

    def rows(split: str) -> list[Row]:
        try:
            paths = datasets.DownloadManager().download_and_extract(files[split])
        except Exception as error:
            raise ValueError(f"{where} cannot be read: {described(error)}") from error
        read = partial(read_file, split=split, text_columns=text_columns)
        pairs = zip(paths, files[split], strict=True)
        return [row for path, file in pairs for row in read(Path(path), suffix=_kind(file))]

    if files and kinds <= {*SUFFIXES}:
        return Splits(where, {split: partial(rows, split) for split in files})
    try:
        builder.download_and_prepare()
        return _table_splits(builder.as_dataset(), where)
    except Exception as error:
        raise ValueError(f"{where} cannot be read: {described(error)}") from error


def _kind(file: str) -> str:
    """A file's suffix, of a compressed one that of what is in it."""
    path = Path(file)
    return Path(path.stem if path.suffix.lower() in _COMPRESSED else path).suffix.lower()
