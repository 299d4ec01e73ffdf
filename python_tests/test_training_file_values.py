"""What a value in a file is, of each kind of file."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as arrow
import pytest
from pyarrow import parquet
from test_training_files import write

from grpo_kernels.training.data.rows import load_rows, read_rows


def test_values_that_only_tables_have(tmp_path: Path) -> None:
    table = arrow.table({
        "prompt": ["a", "b", "c"],
        "answer": arrow.array([decimal.Decimal("5.00"), decimal.Decimal("0.50"), None], arrow.decimal128(20, 2)),
        "long": arrow.array([decimal.Decimal("0.12345678901234567890"), None, None], arrow.decimal128(30, 20)),
        "day": [datetime.date(2026, 11, 28), None, datetime.date(2026, 1, 2)],
        "at": [datetime.datetime(2026, 11, 28, 9, 30), None, None],
        "raw": [b"x = 1", None, b"\xff"],
        "score": [1.0, float("nan"), 2.5],
        "big": [2.0**60, 3.0, -4.0],
        "id": arrow.array([bytes(16), None, None], arrow.uuid()),
    })  # fmt: skip
    parquet.write_table(table, tmp_path / "rows.parquet")
    first, second, third = load_rows(str(tmp_path / "rows.parquet"), needs_answer=False)
    assert first == {
        "prompt": "a", "answer": 5, "long": "0.12345678901234567890", "day": "2026-11-28", "at": "2026-11-28T09:30:00",
        "raw": "x = 1", "score": 1, "big": 2.0**60, "id": "00000000-0000-0000-0000-000000000000",
    }  # fmt: skip
    assert (second["answer"], second["score"], second["big"]) == (0.5, None, 3)
    assert (third["answer"], third["day"], third["score"]) == (None, "2026-01-02", 2.5)
    json.dumps([first, second, third])  # a stage can write them


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", 5), ("-5", -5), ("0", 0), ("0.5", 0.5), ("5.0", 5), ("007", "007"), ("+5", "+5"), ("5.00", "5.00"),
        ("1e5", "1e5"), ("1_000", "1_000"), ("-0", "-0"), (" 5", " 5"), ("nan", "nan"), ("inf", "inf"), ("NA", "NA"),
        ("null", "null"), ("True", "True"), ("１２", "１２"), ("", None), ("[1, 2", "[1, 2"), ("{1, 2}", "{1, 2}"),
        ("[1, 2]", [1, 2]), ('{"a": null, "b": 1.0}', {"b": 1}), ("12345678901234567890", 12345678901234567890),
        ("9" * 400, int("9" * 400)),  # more than a float holds
    ],
)  # fmt: skip
def test_a_cell_of_a_csv_file(tmp_path: Path, text: str, expected: Any) -> None:
    write(tmp_path / "rows.csv", [{"prompt": "p", "answer": "a", "value": text}])
    assert load_rows(str(tmp_path / "rows.csv"))[0]["value"] == expected


#: Values by what they are, with the cell that a person or a program writes for each in a .csv file.
TYPED: dict[str, tuple[Any, str]] = {
    "int": (5, "5"), "negative": (-3, "-3"), "float": (0.5, "0.5"), "small": (1e-07, "1e-07"),
    "large": (1e300, "1e+300"), "whole": (5, "5.0"), "beyond int64": (2**64, "18446744073709551616"),
    "none": (None, ""), "list": (["a", "b"], '["a", "b"]'), "object": ({"a": {"b": [0.5]}}, '{"a": {"b": [0.5]}}'),
    **{repr(text[:20]): (text, text) for text in (
        "007", "5.00", "1e5", "1_000", "+5", " 5", "5.", ".5", "0x10", "2026-11-28", "true", "null", "NaN", "Infinity",
        "[1, 2", "[" * 100_000, '{"a":' * 9999, "[" * 300 + "]" * 300, "9" * 5001, f"[{'9' * 5001}]", "a\0b",
        "x" * 200_000,
    )},
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_typed_values_give_the_same_row_whatever_the_file(tmp_path: Path, suffix: str) -> None:
    expected = {"prompt": "p", "answer": "a"} | {name: value for name, (value, _) in TYPED.items()}
    cells = {"prompt": "p", "answer": "a"} | {name: cell for name, (_, cell) in TYPED.items()}
    written = expected | {"beyond int64": decimal.Decimal(2**64)} if suffix == ".parquet" else expected
    path = write(tmp_path / f"rows{suffix}", [cells if suffix == ".csv" else written])
    (row,) = load_rows(str(path))
    assert row == expected
    assert {name: type(value) for name, value in row.items()} == {n: type(value) for n, value in expected.items()}


@pytest.mark.parametrize(
    ("spelling", "in_json", "in_csv"),
    [
        ("5.00", 5, "5.00"), ("1e5", 100_000, "1e5"), ("1E5", 100_000, "1E5"), ("-0", 0, "-0"), ("true", True, "true"),
        ("null", None, "null"), ("NaN", None, "NaN"), ('""', "", None), ('"5"', "5", 5),
        ("0.12345678901234567890", 0.12345678901234568, "0.12345678901234567890"),
    ],
)  # fmt: skip
def test_what_is_another_value_in_a_csv_file(tmp_path: Path, spelling: str, in_json: Any, in_csv: Any) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "p", "answer": "a", "value": {spelling}}}')
    (tmp_path / "rows.csv").write_text(f"prompt,answer,value\np,a,{spelling}\n")
    for name, value in (("rows.jsonl", in_json), ("rows.csv", in_csv)):
        read = load_rows(str(tmp_path / name))[0]["value"]
        assert read == value and type(read) is type(value)


def test_what_is_not_unicode_is_replaced(tmp_path: Path) -> None:
    value = '["\\ud800", "x\\ud83d\\ude00\\udc00y", {"\\udfff": 1}]'
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "p\\ud800", "answer": "a", "value": {value}}}')
    (tmp_path / "rows.json").write_text(f'[{{"prompt": "p\\ud800", "answer": "a", "value": {value}}}]')
    write(tmp_path / "rows.csv", [{"prompt": "p\ufffd", "answer": "a", "value": value}])
    table = {"prompt": ["p\ufffd"], "answer": ["a"], "value": [[b"\xff"]]}
    parquet.write_table(arrow.table(table), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.json", "rows.csv"):
        (row,) = load_rows(str(tmp_path / name))
        assert row == {"prompt": "p\ufffd", "answer": "a", "value": ["\ufffd", "x😀\ufffdy", {"\ufffd": 1}]}
        json.dumps(row, ensure_ascii=False).encode()
    assert load_rows(str(tmp_path / "rows.parquet"))[0]["value"] == ["\ufffd"]


def test_prompts_and_answers_in_brackets_are_texts_in_a_csv_file(tmp_path: Path) -> None:
    write(
        tmp_path / "rows.csv",
        [{"question": "[3, 1, 2]", "result": "[1, 2, 3]"}, {"question": "7", "result": '{"a": 1}'}],
    )
    found = load_rows(str(tmp_path / "rows.csv"), prompt_column="question", answer_column="result")
    assert [(row["prompt"], row["answer"]) for row in found] == [("[3, 1, 2]", "[1, 2, 3]"), ("7", '{"a": 1}')]


def test_a_map_of_a_table_is_an_object(tmp_path: Path) -> None:
    """As in .jsonl: nested too, keys are texts, the last of equal keys counts, and a null is not there."""
    counts = arrow.map_(arrow.string(), arrow.int64())
    inside = arrow.list_(arrow.struct({"of": arrow.map_(arrow.string(), counts)}))
    table = arrow.table({
        "prompt": ["p"],
        "answer": ["a"],
        "map": arrow.array([[("x", 1), ("y", None), ("x", 2)]], counts),
        "none": arrow.array([None], counts),
        "maps": arrow.array([[{"of": [("a", [("b", 3)])]}]], inside),
        "numbered": arrow.array([[(1, 0.1)]], arrow.map_(arrow.int32(), arrow.float32())),
        "raw": arrow.array([[(b"k", b"v")]], arrow.map_(arrow.binary(), arrow.binary())),
    })  # fmt: skip
    expected = {
        "prompt": "p", "answer": "a", "map": {"x": 2}, "none": None, "maps": [{"of": {"a": {"b": 3}}}],
        "numbered": {"1": 0.1}, "raw": {"k": "v"},
    }  # fmt: skip
    parquet.write_table(table, tmp_path / "rows.parquet")
    write(tmp_path / "rows.jsonl", [expected])
    with pytest.warns(UserWarning, match="already encountered"):
        assert load_rows(str(tmp_path / "rows.parquet")) == [expected]
    assert load_rows(str(tmp_path / "rows.jsonl")) == [expected]


def test_values_of_a_table_that_python_has_not_are_an_error_with_the_files_name(tmp_path: Path) -> None:
    for values in (arrow.array([10**15], arrow.timestamp("s")), arrow.array([10**8], arrow.date32())):
        parquet.write_table(arrow.table({"prompt": ["p"], "answer": ["a"], "at": values}), tmp_path / "rows.parquet")
        with pytest.raises(ValueError, match=r"rows\.parquet cannot be read: OverflowError"):
            load_rows(str(tmp_path / "rows.parquet"))


def test_numbers_of_32_bits_are_what_was_written(tmp_path: Path) -> None:
    inside = arrow.struct({"float": arrow.string(), "list": arrow.list_(arrow.float32()), "half": arrow.float16()})
    table = arrow.table({
        "prompt": ["a", "b"],
        "answer": arrow.array([0.1, 5.0], arrow.float32()),
        "inside": arrow.array([{"float": "x", "list": [0.1, None], "half": 0.2}, None], inside),
    })  # fmt: skip
    parquet.write_table(table, tmp_path / "rows.parquet")
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
    for name in ("rows.parquet", "saved"):
        first, second = load_rows(str(tmp_path / name))
        assert (first["answer"], second["answer"]) == (0.1, 5)
        assert (first["inside"], second["inside"]) == ({"float": "x", "list": [0.1, None], "half": 0.2}, None)


def test_rows_for_a_stage_are_read_by_the_same_rule(tmp_path: Path) -> None:
    text = '{"prompt": "p", "answer": 5.0, "completion": 1e1, "score": NaN, "of": {"a": null, "b": 1.0}}'
    (tmp_path / "rows.jsonl").write_text(text)
    (row,) = read_rows(tmp_path / "rows.jsonl", ("prompt", "completion"))
    assert row == {"prompt": "p", "answer": 5, "completion": "10", "score": None, "of": {"b": 1}}
    assert row == load_rows(str(tmp_path / "rows.jsonl"))[0]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_stage_reads_rows_of_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": "1 + 1 =", "answer": 2, "completion": "007"}, {"prompt": "a; b", "answer": 3, "completion": "5"}]
    path = write(tmp_path / f"rows{suffix}", rows)
    assert [(row["prompt"], row["completion"]) for row in read_rows(path, ("prompt", "completion"))] == [
        ("1 + 1 =", "007"), ("a; b", "5"),
    ]  # fmt: skip


def test_columns_by_row_number_are_named(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"prompt": {"0": "a", "1": "b"}, "answer": {"0": 1, "1": 2}}')  # pandas
    with pytest.raises(ValueError, match=r'expected a list of objects, got columns by row number; .*orient="records"'):
        load_rows(str(tmp_path / "rows.json"))


def test_a_column_may_have_another_separator_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("What is 3;4?\nseven\n")
    assert load_rows(str(tmp_path / "rows.csv"), prompt_column="What is 3;4?", needs_answer=False) == [
        {"prompt": "seven"}
    ]
