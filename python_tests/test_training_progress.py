"""What a run shows on the terminal: throughput and sample completions."""

from __future__ import annotations

import math
import re
import sys
from typing import NamedTuple

from tqdm import tqdm

from grpo_kernels.training.loop import Sample
from grpo_kernels.training.reporting import Progress, printable, sample_table, sample_text, show_samples


class Scored(NamedTuple):
    """A sample of a loop that has advantages."""

    prompt: str
    completion: str
    reward: float
    advantage: float


def test_progress_shows_the_rates_of_the_last_ten_steps():
    now = iter([0.0, 100.0, *(100.0 + 0.5 * k for k in range(1, 12))])
    with Progress(20, "GRPO", disable=True, clock=lambda: next(now)) as progress:
        assert progress.rates() == (0.0, 0.0)
        progress.update(completions=64, tokens=640, reward=0.25)
        assert progress.rates() == (0.64, 6.4)  # the first step, with what went before, took 100 s
        for _ in range(11):
            progress.update(completions=64, tokens=1000, reward=0.25)
        assert progress.rates() == (128.0, 2000.0)


def test_the_bar_shows_rates_values_and_the_remaining_time(capsys):
    now = iter([0.0, 0.5, 1.0])
    with Progress(4, "GRPO", disable=False, clock=lambda: next(now)) as progress:
        for _ in range(2):
            progress.update(completions=64, tokens=25600, reward=0.25)
        progress.bar.refresh()
        shown = str(progress.bar)
    assert "reward=0.250, 128 completions/s, 51.2k tokens/s" in shown
    assert re.search(r"2/4 \[\d+:\d+<\d+:\d+", shown)  # tqdm's elapsed and remaining time
    assert "GRPO" in capsys.readouterr().err


def test_a_table_of_samples_folds_long_texts_into_its_width():
    words = [f"word{k}" for k in range(60)]
    table = sample_table(3, [Scored("1 + 1 =", " ".join(words), 0.5, -1.25)], width=80)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", table)
    assert max(map(len, plain.splitlines())) == 80
    assert all(word in plain for word in words)
    assert "sample completions at step 3" in plain
    assert "0.50" in plain and "-1.25" in plain and "advantage" in plain
    assert "advantage" not in sample_table(3, [Sample("p", "c", 1.0)], width=80)


def test_markup_and_control_characters_of_a_completion_steer_nothing():
    sample = Scored("[red]p[/red]", "a\x1b[2J\rb\u009bc\ud800", 0.5, 0.0)
    for text in (sample_text(1, [sample]), sample_table(1, [sample], width=100)):
        assert "[red]p[/red]" in text
        assert r"a\x1b[2J\rb\x9bc\ud800" in text
        assert "\x1b[2J" not in text


def test_the_middle_of_a_very_long_text_is_left_out():
    text = sample_text(1, [Sample("p", "a" * 3000 + "b" * 3000, 1.0)])
    assert "a" * 500 + " [... 5000 characters ...] " + "b" * 500 in text
    assert len(text) < 1200


def test_plain_text_has_rewards_and_advantages_where_there_are_some():
    assert sample_text(7, [Scored("1 + 1 =", "2", 1.2, -0.5)]) == (
        "\nsample completions at step 7\n  1 + 1 = 2    [reward 1.20, advantage -0.50]"
    )
    assert sample_text(7, [Sample("1 + 1 =", "2", math.nan)]).endswith("1 + 1 = 2    [reward nan]")


def test_a_terminal_gets_a_table_and_a_file_plain_text(capsys, monkeypatch):
    samples = [Sample("1 + 1 =", "2", 1.0)]
    with tqdm(total=1, disable=True) as bar:
        show_samples(1, samples, bar)
        assert capsys.readouterr().out == sample_text(1, samples) + "\n\n"
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", "72")
        show_samples(1, samples, bar)
    assert capsys.readouterr().out == sample_table(1, samples, 72) + "\n"


def test_printable_leaves_text_alone():
    text = "Zeile 1\n\tZeile 2 — 数学 👩‍🔬"
    assert printable(text) == text
