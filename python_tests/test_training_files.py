"""The same rows, whatever file they stand in."""

from __future__ import annotations

import csv
import gzip
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow as arrow
import pytest
from pyarrow import parquet

from grpo_kernels import rewards
from grpo_kernels.training.data.rows import load_rows, read_rows
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.task import load_task_rows

#: What every kind of file must give back. Numbers, texts and nulls stand in one column; what a table fills up is gone.
ROWS: list[dict[str, Any]] = [
    {"prompt": "2 + 3 =", "answer": 5, "level": 1, "note": None, "tests": ["assert f(1) == 2"]},
    {"prompt": "1 / 2 =", "answer": 0.5, "level": 2, "note": "a, b", "tests": [{"input": "1\n", "output": "2"}]},
    {"prompt": "the agent?", "answer": "007", "level": None, "note": '"quoted"', "tests": []},
    {"prompt": "two\nlines, ü", "answer": "(1, 2]", "level": -3, "note": None, "tests": ["x", "y"]},
    {"prompt": [{"role": "user", "content": "[1]"}], "answer": "[1, 2]", "level": 0.25, "note": "1e5", "tests": None},
]
#: Without a column of several types, which a table has not.
TABLE: list[dict[str, Any]] = [
    {"prompt": "2 + 3 =", "answer": 5, "messages": [{"role": "user", "content": "a"}]},
    {"prompt": "1 / 2 =", "answer": 0.5, "messages": [{"role": "tool", "content": "b", "name": "calculator"}]},
    {"prompt": "4 + 4 =", "answer": 8, "messages": []},
]


def write(path: Path, rows: list[dict[str, Any]], *, newline: str = "\n", mark: str = "") -> Path:
    """Rows in a file of the path's kind."""
    if path.suffix == ".parquet":
        parquet.write_table(arrow.Table.from_pylist(rows), path)
        return path
    if path.suffix == ".csv":
        names = list(rows[0])
        with path.open("w", encoding="utf-8", newline="") as file:
            file.write(mark)
            writer = csv.DictWriter(file, names, lineterminator=newline)
            writer.writeheader()
            writer.writerows([{name: cell(row[name]) for name in names} for row in rows])
        return path
    lines = (
        [json.dumps(rows, indent=1)] if path.suffix == ".json" else [json.dumps(r, ensure_ascii=False) for r in rows]
    )
    path.write_bytes((mark + "".join(f"{line}{newline}" for line in lines)).encode())
    return path


def cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_text_files_give_the_same_rows(tmp_path: Path, suffix: str, newline: str, mark: str) -> None:
    path = write(tmp_path / f"rows{suffix}", ROWS, newline=newline, mark=mark)
    found = load_rows(str(path))
    assert found == ROWS
    assert [type(row["answer"]) for row in found] == [int, float, str, str, str]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet", "folder of csv", "folder of json", "saved", "splits"])
def test_tables_and_folders_give_the_same_rows(tmp_path: Path, kind: str) -> None:
    """An int beside a decimal stays one, and an object has the fields that its own row has."""
    if kind == "saved":
        datasets.Dataset.from_list(floats(TABLE)).save_to_disk(str(tmp_path / "rows"))
    elif kind == "splits":
        found = datasets.Dataset.from_list(floats(TABLE))
        datasets.DatasetDict({"train": found, "test": found.select([0])}).save_to_disk(str(tmp_path / "rows"))
    elif kind.startswith("folder"):
        (tmp_path / "rows").mkdir()
        write(tmp_path / "rows" / f"train.{kind.rpartition(' ')[2]}", TABLE)
    name = tmp_path / "rows" if not kind.startswith(".") else write(tmp_path / f"rows{kind}", floats(TABLE))
    found = load_rows(str(name))
    assert found == TABLE
    assert [type(row["answer"]) for row in found] == [int, float, int]


def floats(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The column of numbers as a table has it."""
    return [row | {"answer": float(row["answer"])} for row in rows]


@pytest.mark.parametrize("name", ["rows.csv", "rows.json", "rows.jsonl", "folder"])
def test_an_answer_is_right_whatever_stands_beside_it(tmp_path: Path, name: str) -> None:
    """A decimal, an empty cell or a text in its column makes no 5 a 5.0 and no 007 a 7."""
    for others in ([0.5], [None], ["x"], [0.5, None, "y"]):
        rows = [
            {"prompt": str(i), "answer": a, "hint": h} for i, (a, h) in enumerate([(5, 1), ("007", None), (8, "x")])
        ]
        rows += [{"prompt": f"o{i}", "answer": "z", "hint": other} for i, other in enumerate(others)]
        path = tmp_path / name
        if name == "folder":
            path.mkdir(exist_ok=True)
            write(path / "train.csv", rows)
        else:
            write(path, rows)
        answers = [row["answer"] for row in load_rows(str(path))][:3]
        given = [f"<answer>{text}</answer>" for text in ("5", "007", "8")]
        assert rewards.accuracy_reward([""] * 3, given, answer=answers) == [1.0] * 3


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('{"data": [{"prompt": "a", "answer": 1}]}', 1),
        ('{"train": [{"prompt": "a", "answer": 1}], "test": [{"prompt": "b", "answer": 2}]}', 1),
        ('{"prompt": ["a", "b"], "answer": [1, "2"]}', 2),
        ('{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": 2}\n', 2),
        ('{"prompt": "a", "answer": 1}', 1),
        ('[{"prompt": "a", "answer": NaN, "other": 1}]', 0),
    ],
)
def test_the_shapes_of_a_json_file(tmp_path: Path, content: str, rows: int) -> None:
    (tmp_path / "rows.json").write_text(content)
    if not rows:
        with pytest.raises(ValueError, match="row 0 must have a value in column answer, got None"):
            load_rows(str(tmp_path / "rows.json"))
    else:
        found = load_rows(str(tmp_path / "rows.json"))
        assert len(found) == rows and found[0] == {"prompt": "a", "answer": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n[1]\n', r"a\.jsonl:2: expected a JSON object, got list"),
        ("a.json", b'[{"prompt": "a"}, 3]', r"a\.json: row 1: expected a JSON object, got int"),
        ("a.json", b"[1, 2", r"a\.json cannot be read: Expecting"),
        ("a.json", b'"text"', r"a\.json: expected a list of objects, got str"),
        ("a.json", b'{"dev": [{"a": 1}], "test": [{"a": 1}]}', r"has no split 'train'; it has dev, test"),
        ("a.csv", b"prompt,answer\na,1,2\n", r"a\.csv:2: expected 2 cells, got 3"),
        ("a.csv", b"prompt,prompt\na,1\n", r"its columns must have different names, got 'prompt', 'prompt'"),
        ("a.csv", b'prompt,answer\n"a,1\n', r"a\.csv:2: unexpected end of data"),
        ("a.csv", "prompt,answer\nä,1\n".encode("latin-1"), r"a\.csv cannot be read: .*utf-8"),
        ("a.csv", b"prompt,answer\n[],1\n", None),
        ("a.parquet", b"PAR1", r"a\.parquet cannot be read"),
        (
            "a.jsonl",
            b'\n{"a": ' + b"[" * 100_000,
            r"a\.jsonl:2: expected a JSON object, got .*: values must be nested at",
        ),
        ("a.jsonl", b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}", r"a\.jsonl:1: values must be nested at most 100 deep$"),
        ("a.json", b'[{"a": ' + b"[" * 100_000, r"a\.json cannot be read: values must be nested at most 100 deep$"),
        ("a.json", b'[{"a": ' + b"[" * 300 + b"]" * 300 + b"}]", r"a\.json: row 0: values must be nested at most 100"),
        ("a.jsonl", b'{"a": ' + b"9" * 5001 + b"}", r"a\.jsonl:1: expected a JSON object, got .*: Exceeds the limit"),
        ("a.json", b'[{"a": ' + b"9" * 5001 + b"}]", r"a\.json cannot be read: Exceeds the limit"),
        (
            "a.csv",
            b"prompt;answer\na;1\n",
            r"a\.csv: its first line is 'prompt;answer', one column with ';' in its name",
        ),
        ("a.csv", b'\n"prompt";"answer"\r\n"a, b";1\r\n', r"a\.csv: its first line is .* separated by commas"),
        ("a.csv", b"prompt\tanswer\na\t1, 2\n", r"a\.csv: its first line is 'prompt\\tanswer', one column with '\\t'"),
        ("a.csv", b"sep=;\nprompt;answer\na;1\n", r"a\.csv: its first line is 'sep=;'"),
        ("a.csv", b"prompt" * 30_000 + b"|answer\na|1\n", r"a\.csv: its first line is 'promptprompt"),
        ("a.jsonl", b'{"prompt": {"a": 1}, "answer": 1}', "row 0 must have a text or chat messages as its prompt, got"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(
    tmp_path: Path, name: str, content: bytes, message: str | None
) -> None:
    (tmp_path / name).write_bytes(content)
    if message is None:
        assert load_rows(str(tmp_path / name))[0]["prompt"] == "[]"
    else:
        with pytest.raises(ValueError, match=message) as refused:
            load_rows(str(tmp_path / name))
        assert "\n" not in str(refused.value)


def test_a_column_with_the_name_of_one_of_ours_gives_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Reward functions are given ``prompts``, ``completions`` and the like by keyword: no column can have the name."""
    row = {
        "prompt": "old",
        "question": "new",
        "answer": "1",
        "completions": "x",
        "completion_ids": [1],
        "solution": "s",
    }
    path = write(tmp_path / "rows.jsonl", [row])
    with caplog.at_level(logging.WARNING):
        (found,) = load_rows(str(path), prompt_column="question")
    assert found == {"prompt": "new", "answer": "1", "solution": "s"}
    assert "column prompt and completions and completion_ids is left out: its name is taken" in caplog.text


def test_a_worked_solution_of_the_datasets_own_stays(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p", "answer": "work\n#### 5", "solution": "its own"}])
    (found,) = load_rows(str(path))
    assert (found["answer"], found["solution"]) == ("5", "its own")


def test_a_prompt_longer_than_a_csv_modules_default_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", [{"prompt": "x" * 300_000, "answer": "1"}])
    assert len(load_rows(str(path))[0]["prompt"]) == 300_000


@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "saved", "folder"])
def test_a_part_of_a_split_is_a_part_whatever_the_file(tmp_path: Path, kind: str) -> None:
    rows = [{"prompt": f"p{i}", "answer": i} for i in range(10)]
    if kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / kind))
    elif kind == "folder":
        (tmp_path / kind).mkdir()
        write(tmp_path / kind / "train.jsonl", rows)
    else:
        write(tmp_path / kind, rows)
    name = str(tmp_path / kind)
    assert load_rows(name, split="train[:3]") == rows[:3]
    assert load_rows(name, split="train[:10%]+train[-2:]") == [rows[0], *rows[8:]]
    with pytest.raises(ValueError, match="has no split 'test'; it has train, and parts as train"):
        load_rows(name, split="test")
    with pytest.raises(ValueError, match=r"split 'train\[:x\]' cannot be read"):
        load_rows(name, split="train[:x]")


def test_a_json_file_without_splits_has_none_to_hold_out(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "answer": i} for i in range(8)]
    whole, split = write(tmp_path / "list.json", rows), tmp_path / "splits.json"
    split.write_text(json.dumps({"train": rows[:6], "test": rows[6:]}))
    for path in (whole, write(tmp_path / "rows.csv", rows)):
        with pytest.raises(ValueError, match="which has one split, got 'test'; a part of it is"):
            load_task_rows(Recipe(dataset_name=str(path), eval_dataset_split="test"))
        found = load_task_rows(
            Recipe(dataset_name=str(path), dataset_split="train[:6]", eval_dataset_split="train[6:]")
        )
        assert found == (rows[:6], rows[6:])
    assert load_task_rows(Recipe(dataset_name=str(split), eval_dataset_split="test")) == (rows[:6], rows[6:])
    split.write_text('{"train": [')
    with pytest.raises(ValueError, match=r"splits\.json cannot be read: Expecting"):  # and not that it has one split
        load_task_rows(Recipe(dataset_name=str(split), eval_dataset_split="test"))


def test_kinds_of_files_are_not_mixed_and_others_are_named(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": "007"}]
    (tmp_path / "mixed").mkdir()
    write(tmp_path / "mixed" / "train.csv", rows)
    write(tmp_path / "mixed" / "train.jsonl", rows)
    with pytest.raises(ValueError, match="has files of several kinds"):
        load_rows(str(tmp_path / "mixed"))
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "train.csv.gz").write_bytes(gzip.compress(write(tmp_path / "x.csv", rows).read_bytes()))
    assert load_rows(str(tmp_path / "packed")) == rows
    for name in ("rows.tsv", "rows.jsonl.gz", "rows"):
        (tmp_path / name).write_text("x")
        with pytest.raises(ValueError, match="is a file of another kind"):
            load_rows(str(tmp_path / name))
    (tmp_path / "none.csv").write_text("")
    with pytest.raises(ValueError, match="has no rows"):
        load_task_rows(Recipe(dataset_name=str(tmp_path / "none.csv")))


def test_a_spreadsheets_habits_are_borne(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("\nprompt, answer,,\na,5,,\n\nb,007,,\n")
    assert load_rows(str(tmp_path / "rows.csv")) == [{"prompt": "a", "answer": 5}, {"prompt": "b", "answer": "007"}]


def test_completions_are_texts_whatever_a_file_has(tmp_path: Path) -> None:
    said = [{"role": "assistant", "content": "5"}]
    rows = [{"prompt": "a", "answer": 1, "completion": 5}, {"prompt": "b", "answer": 1, "completion": said}]
    path = write(tmp_path / "rows.jsonl", rows)
    assert [row["completion"] for row in load_rows(str(path))] == ["5", "5"]
    assert [row["completion"] for row in read_rows(path, ("prompt", "completion"))] == ["5", "5"]
    with pytest.raises(ValueError, match="row 0 must have a text or messages as its completion, got"):
        load_rows(str(write(tmp_path / "bad.jsonl", [{"prompt": "a", "answer": 1, "completion": {"a": 1}}])))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{"type": "text", "text": "1 +"}, {"type": "text", "text": " 1"}], "1 + 1"),
        ("1 + 1", "1 + 1"),
        (5, None),
        ([5], None),
        ([], None),
    ],
)
def test_a_message_in_parts_is_one_text(tmp_path: Path, content: Any, expected: str | None) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": [{"role": "user", "content": content}], "answer": "2"}])
    if expected is None:
        with pytest.raises(ValueError, match="row 0: the content of a chat message must be a text or parts, got"):
            load_rows(str(path))
    else:
        assert load_rows(str(path))[0]["prompt"] == [{"role": "user", "content": expected}]
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": "2"}]
    talk = [{"prompt": [{"role": "user", "content": str(i)}, *calls], "answer": "2"} for i in range(10)]
    path = write(tmp_path / "talk.jsonl", talk)
    assert len(load_task_rows(Recipe(dataset_name=str(path)))[0]) == 8
