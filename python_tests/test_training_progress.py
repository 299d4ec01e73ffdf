"""What a run shows on the terminal: throughput, metrics and sample completions."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from grpo_kernels.training.report import SampleRecord
from grpo_kernels.training.report.terminal import MetricsTable, count_step, printable, progress_bar, show_samples


@pytest.fixture
def as_terminal(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")


def test_the_bar_shows_rates_values_and_the_remaining_time(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar(4, "GRPO", is_hidden=False) as bar:
        bar._time = iter(range(1, 100)).__next__  # a second passes from one look at the clock to the next
        bar.start_t = bar.last_print_t = 0
        for _ in range(2):
            count_step(bar, completions=64, tokens=25600, reward=0.25)
        bar.refresh()
        shown = str(bar)
    assert re.search(r"reward=0\.250, [\d.]+ completions/s, [\d.]+k tokens/s", shown)
    completions, tokens = re.findall(r"([\d.]+)k? \w+/s", shown)
    assert 0 < float(tokens) * 1000 == pytest.approx(400 * float(completions), rel=0.02)
    assert re.search(r"2/4 \[\d+:\d+<\d+:\d+", shown)  # tqdm's elapsed and remaining time
    assert "GRPO" in capsys.readouterr().err


def test_no_bar_where_there_is_no_terminal_or_none_is_wanted(capsys, monkeypatch):
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
        with progress_bar(4, "GRPO", is_hidden=is_terminal) as bar:
            count_step(bar, completions=64, tokens=640, reward=0.25)
    assert capsys.readouterr().err == ""


def test_rows_of_metrics_stand_under_their_names(capsys):
    table = MetricsTable()
    for step in range(1, 14):
        table.row({
            "step": step, "reward": step / 8, "learning_rate": 2e-5, "rewards/accuracy/mean": 0.5, "loss": 1.0,
            "rewards/\x1b[2J/mean": 0.25,
        })  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    heading, rows = lines[:4], lines[4:16]
    assert lines[16:20] == heading and len(lines) == 21
    assert [row.split() for row in rows] == [
        [str(step), f"{step / 8:.3f}", "0.500", "2.0e-05", "0.250"] for step in range(1, 13)
    ]
    ends = [match.end() for match in re.finditer(r"\S+", rows[0])]
    assert ends == [match.end() for match in re.finditer(r"\S+", rows[11])]
    spelled = [
        "".join(line[start:end].strip() for line in heading) for start, end in zip([0, *ends], ends, strict=False)
    ]
    assert spelled == ["step", "reward", "rewards/accuracy/mean", "learning_rate", r"rewards/\x1b[2J/mean"]


def shown_samples(capsys, *samples):
    show_samples(3, samples)
    return capsys.readouterr().out


def test_a_table_of_samples_folds_long_texts_into_its_width(capsys, as_terminal):
    words = [f"word{k}" for k in range(60)]
    text = shown_samples(capsys, SampleRecord("1 + 1 =", " ".join(words), 0.5, -1.25), SampleRecord("p", "c", 1.0))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(map(len, plain.splitlines())) == 80
    assert all(word in plain for word in words)
    assert "sample completions at step 3" in plain and "0.50" in plain and "-1.25" in plain and "advantage" in plain


def test_a_log_file_gets_the_same_as_plain_text(capsys):
    text = shown_samples(capsys, SampleRecord("1 + 1 =", "Zwölf 数", 0.5, -1.25))
    assert "\x1b" not in text and text.replace("Zwölf 数", "").isascii()
    assert re.search(r"\| 1 \+ 1 = +\| Zwölf 数 +\| 0\.50 +\| -1\.25 +\|", text)


@pytest.mark.parametrize("where", ["terminal", "file"])
def test_markup_and_control_characters_of_a_completion_steer_nothing(capsys, request, where):
    if where == "terminal":
        request.getfixturevalue("as_terminal")
    text = shown_samples(capsys, SampleRecord("[red]p[/red]", "a\x1b[2J\rb\u009bc\ud800 :smile:", 0.5, 0.0))
    assert "[red]p[/red]" in text and ":smile:" in text
    assert r"a\x1b[2J\rb\x9bc\ud800" in text
    assert "\x1b[2J" not in text


def test_the_middle_of_a_very_long_text_is_left_out(capsys):
    text = re.sub(r"[|\s]|1\.00", "", shown_samples(capsys, SampleRecord("p", "a" * 3000 + "b" * 3000, 1.0)))
    assert "a" * 500 + "[...5000characters...]" + "b" * 500 in text
    assert text.count("a") + text.count("b") < 1100


def test_printable_leaves_text_alone():
    text = "Zeile 1\n\tZeile 2 — 数学 👩‍🔬"
    assert printable(text) == text


def test_a_run_starts_without_the_libraries_of_its_pictures_pages_and_tables():
    code = "import sys, transformers, accelerate; before = {*sys.modules}; import grpo_kernels.training.run; " \
        "print(({*sys.modules} - before) & {'matplotlib', 'jinja2', 'rich'})"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
