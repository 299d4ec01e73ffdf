"""The page of a run's folder: its files, its charts, and that nothing of a run becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_kernels.training import html_page, svg_chart
from grpo_kernels.training.html_report import versions, write_report
from grpo_kernels.training.loop import Sample
from grpo_kernels.training.reporting import MetricsFile, SamplesFile, read_lines
from grpo_kernels.training.svg_chart import Series, line_chart, number

EVIL = "</script><script>alert(1)</script> <img src=http://example.org/x> & \"quoted\" 'single' </pre></details>"


class Scored(NamedTuple):
    """A sample of a loop that has advantages."""

    prompt: str
    completion: str
    reward: float
    advantage: float


class Page(HTMLParser):
    """What a browser would see: elements, text by element, and whatever would be fetched."""

    VOID = frozenset({"meta", "br", "img", "link", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts, self.fetched = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.fetched += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        assert not [name for name, _ in attributes if name.startswith("on") or name == "style"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else None, data))

    def texts_of(self, tag):
        return [text for found, text in self.texts if found == tag]

    def count(self, tag):
        return sum(found == tag for found, _ in self.elements)


def write_run(folder, *, steps=4, samples=True):
    metrics = MetricsFile(folder / "metrics.jsonl")
    metrics.write({"step": 0, "eval_accuracy": 0.25, "eval_accuracy_low": 0.2, "eval_accuracy_high": 0.31})
    for step in range(1, steps + 1):
        metrics.write({"step": step, "reward": step / 8, "rewards/accuracy/mean": 0.5, "step_time": 0.5, "odd": step})
    metrics.write({"step": steps, "eval_accuracy": 0.75, "eval_pass@4": 0.9})
    metrics.close()
    if samples:
        file = SamplesFile(folder / "samples.jsonl")
        for step in (2, 4):
            file.write(step, [Scored("1 + 1 =", f"at {step} <b>&amp; {EVIL}", 0.5, -1.25)])
        file.close()


def page_of(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_samples_are_written_with_all_their_fields(tmp_path):
    file = SamplesFile(tmp_path / "samples.jsonl")
    file.write(3, [Scored("p", "ü \u2028 </script>", 0.5, 1.0), Sample("q", "d", 0.0)])
    assert read_lines(tmp_path / "samples.jsonl").records == [
        {"step": 3, "prompt": "p", "completion": "ü \u2028 </script>", "reward": 0.5, "advantage": 1.0},
        {"step": 3, "prompt": "q", "completion": "d", "reward": 0.0, "advantage": None},
    ]
    file.close()


@pytest.mark.parametrize("cut", ['{"step": 3, "rew', "{", '{"step": 3, "a": "\xc3', '{"reward": 1}', "[1]"])
def test_a_cut_last_line_is_left_out_with_a_note(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "reward": 0.5}\n\n' + cut.encode("latin-1"))
    records, note = read_lines(path)
    assert records == [{"step": 1, "reward": 0.5}]
    assert note == "metrics.jsonl: line 3, the last one, was cut and is left out"
    assert note in "".join(page_of(tmp_path).texts_of("p"))


@pytest.mark.parametrize("bad", ["{", "[1]", '{"reward": 1}', '{"step": "one"}', '{"step": NaN}', '{"step": true}'])
def test_a_bad_line_before_the_last_is_an_error_with_its_place(tmp_path, bad):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{bad}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: expected a JSON object with a number") as info:
        write_report(tmp_path)
    assert bad in str(info.value)
    assert not (tmp_path / "report.html").exists()


def test_a_line_is_drawn_to_scale():
    svg = ET.fromstring(line_chart([Series("reward", [(0, 0.0), (50, 1.0), (100, 4.0)])], title="Reward"))
    middle = (svg_chart.LEFT + svg_chart.RIGHT) / 2
    height = svg_chart.BOTTOM - svg_chart.TOP
    assert svg.find(".//path[@class='line']").get("d") == (
        f"M{svg_chart.LEFT}.0 {svg_chart.BOTTOM}.0L{middle:.1f} {svg_chart.BOTTOM - height / 4:.1f}"
        f"L{svg_chart.RIGHT}.0 {svg_chart.TOP}.0"
    )
    assert [t.text for t in svg.iter("text")] == ["0", "1", "2", "3", "4", "0", "50", "100", "optimizer step"]
    assert svg.get("aria-label") == "Reward"


def test_a_value_that_is_not_finite_breaks_the_line_and_a_point_alone_is_a_dot():
    points = [(0, 0.0), (1, 1.0), (2, math.nan), (3, 1.0), (4, math.inf), (5, 0.0), (6, 1.0)]
    path = ET.fromstring(line_chart([Series("kl", points)], title="KL")).find(".//path[@class='line']").get("d")
    assert path.count("M") == 3
    assert path.count("L") == 2
    assert path.count("h0") == 1
    assert line_chart([Series("kl", [(0, math.nan)])], title="KL") == ""
    assert line_chart([], title="KL") == ""


def test_marks_tell_their_value_and_intervals_are_drawn():
    line = Series("held <out>", [(0, 0.25), (100, 0.75)], True, [(0, 0.2, 0.3), (100, math.nan, 0.8)])
    svg = ET.fromstring(line_chart([Series("other", [(0, 0.5)]), line], title="Accuracy"))
    assert [title.text for title in svg.iter("title")] == ["held <out>, step 0: 0.25", "held <out>, step 100: 0.75"]
    group = svg.findall("g")[1]
    assert group.get("class") == "s1"
    assert len(group.findall("path[@class='bar']")) == 1


def test_a_long_line_keeps_its_extremes():
    points = [(k, math.sin(k / 100) + (9.0 if k == 7321 else 0.0)) for k in range(20000)]
    svg = line_chart([Series("grad_norm", points)], title="norm")
    path = ET.fromstring(svg).find(".//path[@class='line']").get("d")
    places = [tuple(map(float, place.split())) for place in path[1:].split("L")]
    assert len(places) <= svg_chart.MAX_POINTS
    top = min(places, key=lambda place: place[1])
    assert top[0] == pytest.approx(svg_chart.LEFT + 7321 / 19999 * (svg_chart.RIGHT - svg_chart.LEFT), abs=0.06)


@given(
    st.lists(st.floats(), min_size=1, max_size=30),
    st.lists(st.integers(0, 10**9), min_size=30, max_size=30, unique=True),
)
def test_any_values_give_a_well_formed_chart_within_its_edges(values, steps):
    drawing = line_chart([Series("x", list(zip(sorted(steps), values, strict=False)))], title="x")
    if not any(abs(value) < 1e150 for value in values):
        assert drawing == ""
        return
    svg = ET.fromstring(drawing)
    for place in re.findall(r"[ML](\S+) ([^\sLMh]+)", svg.find(".//path[@class='line']").get("d")):
        x, y = map(float, place)
        assert svg_chart.LEFT - 0.1 <= x <= svg_chart.RIGHT + 0.1
        assert svg_chart.TOP - 0.1 <= y <= svg_chart.BOTTOM + 0.1
    assert len(list(svg.iter("text"))) < 25


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (-0.0, "0"), (120.0, "120"), (12345678, "12345678"), (0.123456, "0.1235"), (2e-4, "0.0002"),
     (3.14159e-7, "3.142e-07"), (math.nan, "nan"), (math.inf, "inf")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_the_page_of_a_run_has_its_curves_samples_settings_and_summary(tmp_path):
    write_run(tmp_path)
    (tmp_path / "config.yaml").write_text("beta: 0.5\nreward_funcs: [accuracy, <b>]\nmodel: null\n")
    (tmp_path / "versions.json").write_text(json.dumps(versions()))
    page = page_of(tmp_path)
    titles = page.texts_of("b")
    assert {"Reward", "Accuracy", "Rewards by function", "Held out", "Time of a step", "odd"} <= set(titles)
    assert {"KL to the reference", "Entropy"}.isdisjoint(titles)  # this run has none
    cells = page.texts_of("td")
    at = cells.index("reward")
    assert cells[at : at + 5] == ["reward", "0.125", "0.5", "0.125", "0.5"]
    assert "0.25 → 0.75" in page.texts_of("strong")
    assert "4 optimizer steps in 2 s" in page.texts_of("p")
    at = cells.index('["accuracy", "<b>"]')
    assert cells[at - 1 : at + 2] == ["0.5", '["accuracy", "<b>"]', "None"]
    assert page.texts_of("th")[-len(versions()) :] == list(versions())
    assert sum(attributes.get("class") == "bar" for _, attributes in page.elements) == 1


def test_samples_can_be_read_without_javascript(tmp_path):
    write_run(tmp_path)
    page = page_of(tmp_path)
    steps = [attributes for tag, attributes in page.elements if tag == "details" and "data-step" in attributes]
    assert [(step["data-step"], "open" in step) for step in steps] == [("2", False), ("4", True)]
    assert page.texts_of("pre") == ["1 + 1 =", f"at 2 <b>&amp; {EVIL}", "1 + 1 =", f"at 4 <b>&amp; {EVIL}"]
    assert page.texts_of("span")[-2:] == ["reward 0.5", "advantage -1.25"]


def test_nothing_of_a_run_becomes_markup_and_nothing_is_fetched(tmp_path):
    run = tmp_path / "<img src=x>"
    run.mkdir()
    write_run(run)
    clean = page_of(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, EVIL: 1.0, f"rewards/{EVIL}/mean": 2.0, f"eval_{EVIL}": 0.5}) + "\n{" + EVIL)
    with (run / "samples.jsonl").open("a") as file:
        record = {"step": 4, EVIL: EVIL, "prompt": [{"role": EVIL}], "completion": "\x00\ud800" + EVIL, "short": "<i>"}
        file.write(json.dumps(record) + "\n")
    (run / "config.json").write_text(json.dumps({EVIL: EVIL, "nested": {EVIL: [EVIL]}}))
    (run / "versions.json").write_text(json.dumps({EVIL: EVIL}))
    page = page_of(run)
    assert page.fetched == []
    for tag in ("script", "img", "i", "link", "iframe"):
        assert page.count(tag) == clean.count(tag) == (1 if tag == "script" else 0)
    assert page.texts_of("script") == [html_page.SCRIPT]
    assert r"\x00\ud800" + EVIL in page.texts_of("pre")
    assert page.texts_of("title")[0] == "<img src=x>: GRPO run"


def test_the_policy_allows_the_pages_own_script_and_style_and_nothing_else(tmp_path):
    write_run(tmp_path)
    page = page_of(tmp_path)
    texts = [page.texts_of(tag)[0].encode() for tag in ("style", "script")]
    digests = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in texts]
    policies = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'"]


def test_every_color_that_is_used_is_defined_in_light_and_dark():
    light, dark = html_page.STYLE.split("@media (prefers-color-scheme: dark)")
    used = set(re.findall(r"var\((--\w+)\)", html_page.STYLE)) - {"--c"}
    assert used >= {f"--s{k}" for k in range(svg_chart.COLORS)}
    assert used <= set(re.findall(r"(--\w+): #", light))
    assert used <= set(re.findall(r"(--\w+): #", dark))


def test_files_that_are_missing_are_left_out(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    assert "metrics.jsonl has no record yet" in page_of(tmp_path).texts_of("p")
    write_run(tmp_path, samples=False)
    headings = page_of(tmp_path).texts_of("h2")
    assert headings == ["Curves", "Metrics"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.yaml", "a: [", r"config\.yaml: "),
        ("config.yaml", "- a\n", r"config\.yaml: expected a mapping of names to values, got list"),
        ("config.json", "{", r"config\.json: "),
        ("versions.json", "3", r"versions\.json: expected a mapping of names to values, got int"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, text, message):
    write_run(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path)


def test_an_interrupted_write_leaves_the_earlier_page(tmp_path, monkeypatch):
    write_run(tmp_path)
    before = write_report(tmp_path).read_bytes()
    write_run(tmp_path, steps=9)

    def interrupted(path, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert write_report(tmp_path).read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "report.html", "samples.jsonl"]


def test_of_a_step_trained_twice_the_last_is_shown(tmp_path):
    metrics, samples = MetricsFile(tmp_path / "metrics.jsonl"), SamplesFile(tmp_path / "samples.jsonl")
    for first, last, told in ((1, 5, "earlier"), (3, 4, "later")):
        for step in range(first, last + 1):
            metrics.write({"step": step, "reward": 1.0 if told == "later" else 0.0})
            samples.write(step, [Sample("p", f"{told} {step}", 1.0)])
    page = page_of(tmp_path)
    assert page.texts_of("pre")[1::2] == ["earlier 1", "earlier 2", "later 3", "later 4"]
    path = next(attributes["d"] for tag, attributes in page.elements if attributes.get("class") == "line")
    assert path.count("L") == 4


def test_of_very_many_samples_some_are_shown_with_a_note(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 1}\n')
    file = SamplesFile(tmp_path / "samples.jsonl")
    for step in range(1, 251):
        file.write(step, [Sample("p", f"{step}.{k}", 1.0) for k in range(17)])
    page = page_of(tmp_path)
    steps = [a["data-step"] for tag, a in page.elements if tag == "details" and "data-step" in a]
    assert (len(steps), steps[0], steps[-1]) == (100, "1", "250")
    assert page.texts_of("pre")[1:32:2] == [f"1.{k}" for k in range(16)]
    assert "Shown: 100 of 250 steps, at most 16 completions of a step; all are in samples.jsonl." in page.texts_of("p")


def test_versions_name_what_a_run_depends_on():
    found = versions()
    assert found.keys() >= {"grpo_kernels", "python", "platform", "torch", "transformers"}
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert all(isinstance(value, str) and value for value in found.values())


def test_values_that_are_all_the_same_have_room_around_them():
    for value, labels in ((0.0, ["0", "0.5", "1"]), (20.0, ["18", "19", "20", "21", "22"])):
        svg = ET.fromstring(line_chart([Series("x", [(5, value), (6, value)])], title="x"))
        assert [t.text for t in svg.iter("text")] == [*labels, "5", "6", "optimizer step"]
