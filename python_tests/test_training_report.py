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

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_kernels.info import versions
from grpo_kernels.training.report import SampleRecord, append_records, append_samples, read_records
from grpo_kernels.training.report.page import number, write_report

EVIL = "</script><script>alert(1)</script> <img src=http://example.org/x> & \"quoted\" 'single' $x$ </pre></details>"


class Page(HTMLParser):
    """What a browser would see: elements, text by element, and whatever would be fetched."""

    VOID = frozenset({"meta", "br", "img", "link", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts, self.fetched = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        drawings = re.findall(r"<svg.*?</svg>", text.replace("xlink:href", "href"), flags=re.DOTALL)
        self.charts = [ET.fromstring(svg) for svg in drawings]

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        links = ("src", "href", "xlink:href", "srcset", "data", "action")
        self.fetched += [value for name, value in attributes if name in links and not value.startswith("#")]
        assert not [name for name, _ in attributes if name.startswith("on") or name == "style"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else None, data))

    def texts_of(self, tag):
        return [text for name, text in self.texts if name == tag]

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)

    def chart(self, title):
        """The drawing under a title."""
        labels = [attributes["aria-label"] for _, attributes in self.elements if attributes.get("role") == "img"]
        return self.charts[labels.index(title)]


def lines_of(svg):
    """The points of each line of a chart, by their colour; grid lines and marks left out."""
    lines, marks = {}, {path for definitions in svg.iter("defs") for path in definitions.iter("path")}
    for path in svg.iter("path"):
        if path not in marks and (color := path.get("stroke", "")).startswith("var(--s"):
            points = [tuple(map(float, xy)) for xy in re.findall(r"[ML] (\S+) (\S+)", path.get("d"))]
            lines.setdefault(color, []).append(points)
    return lines


def write_run(folder, *, steps=4, samples=True):
    records = [{"step": 0, "eval_accuracy": 0.25, "eval_accuracy_low": 0.2, "eval_accuracy_high": 0.31}]
    records += [
        {"step": step, "reward": step / 8, "rewards/accuracy/mean": 0.5, "step_time": 0.5, "odd": step}
        for step in range(1, steps + 1)
    ]
    append_records(folder / "metrics.jsonl", [*records, {"step": steps, "eval_accuracy": 0.75, "eval_pass@4": 0.9}])
    for step in (2, 4) if samples else ():
        sample = SampleRecord("1 + 1 =", f"at {step} <b>&amp; {EVIL}", 0.5, -1.25)
        append_samples(folder / "samples.jsonl", step, [sample])


def page_of(folder, *records):
    if records:
        append_records(folder / "metrics.jsonl", records)
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_samples_are_written_with_all_their_fields(tmp_path):
    path = tmp_path / "samples.jsonl"
    mine = SampleRecord("p", "ü \u2028 </script>", 0.5, 1.0, {"mine": "x"})
    append_samples(path, 3, [mine, SampleRecord("q", "d", 0.0)])
    assert read_records(path) == [
        {"step": 3, "mine": "x", "prompt": "p", "completion": "ü \u2028 </script>", "reward": 0.5, "advantage": 1.0},
        {"step": 3, "prompt": "q", "completion": "d", "reward": 0.0, "advantage": None},
    ]


@pytest.mark.parametrize("cut", ['{"step": 3, "rew', "{", '{"step": 3, "a": "\xc3', '{"reward": 1}', "[1]"])
def test_a_cut_last_line_is_left_out_with_a_note(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "reward": 0.5}\n\n' + cut.encode("latin-1"))
    assert read_records(path) == [{"step": 1, "reward": 0.5}]
    assert page_of(tmp_path).texts_of("p")[1:] == ["metrics.jsonl: line 3, the last one, was cut and is left out"]


@pytest.mark.parametrize(
    "bad", ["{", "[1]", '{"reward": 1}', '{"step": "one"}', '{"step": NaN}', '{"step": true}', '{"step": 1e300}']
)
def test_a_bad_line_before_the_last_is_an_error_with_its_place(tmp_path, bad):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{bad}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: expected a JSON object with a number") as info:
        write_report(tmp_path)
    assert bad in str(info.value)
    assert not (tmp_path / "report.html").exists()


def test_a_line_is_drawn_to_scale(tmp_path):
    records = [{"step": step, "reward": reward} for step, reward in ((0, 0.0), (50, 1.0), (100, 4.0))]
    svg = page_of(tmp_path, *records).chart("Reward")
    (((left, bottom), middle, (right, top)),) = lines_of(svg)["var(--s0)"]
    assert middle == (pytest.approx((left + right) / 2), pytest.approx(bottom + (top - bottom) / 4))
    texts = [text.text for text in svg.iter("text")]
    assert texts == ["0", "20", "40", "60", "80", "100", "optimizer step", "0", "1", "2", "3", "4"]


def test_what_is_not_finite_is_left_out_and_a_point_alone_is_a_dot(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "kl": 0.5, "loss": NaN, "entropy": 1}\n{"step": 2, "kl": NaN, "entropy": 2}\n'
        '{"step": 3, "kl": Infinity, "entropy": NaN}\n{"step": 4, "kl": 1e300, "entropy": 4}\n'
    )
    page = page_of(tmp_path)
    assert {"KL to the reference", "Entropy"} <= set(page.texts_of("b")) and "Loss" not in page.texts_of("b")
    assert [len(line) for line in lines_of(page.chart("Entropy"))["var(--s0)"]] == [3]
    assert len(list(page.chart("KL to the reference").iter("use"))) > len(list(page.chart("Entropy").iter("use")))


def test_evaluations_tell_their_value_and_intervals_are_drawn(tmp_path):
    page = page_of(
        tmp_path,
        {"step": 0, "eval_accuracy": 0.25, "eval_accuracy_low": 0.2, "eval_accuracy_high": 0.3, "eval_<b>$x$": 0.5},
        {"step": 100, "eval_accuracy": 0.75, "rewards/accuracy/mean": 0.5},
    )
    hints = [title.text for title in page.chart("Accuracy").iter("title")]
    assert hints == ["held out, temperature 1, step 0: 0.25", "held out, temperature 1, step 100: 0.75"]
    assert [title.text for title in page.chart("Held out").iter("title")] == ["<b>$x$, step 0: 0.5"]
    line, bar = (line for line in lines_of(page.chart("Accuracy"))["var(--s1)"] if len(line) == 2)
    assert len({x for x, _ in bar}) == 1 and line[0][1] == pytest.approx((bar[0][1] + bar[1][1]) / 2)
    keys = [attributes["class"] for _, attributes in page.elements if "key" in attributes.get("class", "")]
    assert keys == ["key s0", "key s1"] and {"training samples", "held out, temperature 1"} <= {*page.texts_of("span")}


def test_a_long_line_is_thinned_and_keeps_its_extremes(tmp_path):
    records = [{"step": k, "grad_norm": math.sin(k * k) + (9.0 if k == 7321 else 0.0)} for k in range(20000)]
    (points,) = lines_of(page_of(tmp_path, *records).chart("Gradient norm"))["var(--s0)"]
    assert len(points) < 4000
    (left, _), *_, (right, _) = points
    peak = min(points, key=lambda point: point[1])
    assert peak[0] == pytest.approx(left + 7321 / 19999 * (right - left), abs=1)
    assert sum(y < sorted(y for _, y in points)[1] for _, y in points) == 1


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(), min_size=1, max_size=30),
    st.lists(st.integers(0, 10**9), min_size=30, max_size=30, unique=True),
)
def test_any_values_give_a_well_formed_chart_within_its_edges(tmp_path_factory, values, steps):
    folder = tmp_path_factory.mktemp("run")
    records = [{"step": step, "kl": value} for step, value in zip(sorted(steps), values, strict=False)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = page_of(folder)
    if not any(abs(value) < 1e150 for value in values):
        assert page.charts == []
        return
    svg = page.chart("KL to the reference")
    assert all(0 <= x <= 420 and 0 <= y <= 220 for line in lines_of(svg)["var(--s0)"][:1] for x, y in line if line[1:])
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
    config, told = "beta: 0.5\nreward_funcs: [accuracy, <b>]\nmodel: null\n", json.dumps(versions(), indent=1)
    (tmp_path / "config.yaml").write_text(config)
    (tmp_path / "versions.json").write_text(told)
    page = page_of(tmp_path)
    titles = page.texts_of("b")
    assert {"Reward", "Accuracy", "Rewards by function", "Held out", "Time of a step", "odd"} <= set(titles)
    assert {"KL to the reference", "Entropy"}.isdisjoint(titles)  # this run has none
    cells = page.texts_of("td")
    at = cells.index("reward")
    assert cells[at : at + 5] == ["reward", "0.125", "0.5", "0.125", "0.5"]
    assert "0.25 → 0.75" in page.texts_of("strong")
    assert "4 optimizer steps in 2 s" in page.texts_of("p")
    assert page.texts_of("summary")[-2:] == ["config.yaml", "versions.json"]
    assert page.texts_of("pre")[-2:] == [config, told]
    before = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == before


def test_samples_can_be_read_without_javascript(tmp_path):
    write_run(tmp_path)
    page = page_of(tmp_path)
    steps = [attributes for tag, attributes in page.elements if tag == "details" and "data-step" in attributes]
    assert [(step["data-step"], "open" in step) for step in steps] == [("2", False), ("4", True)]
    assert page.texts_of("pre") == ["1 + 1 =", f"at 2 <b>&amp; {EVIL}", "1 + 1 =", f"at 4 <b>&amp; {EVIL}"]
    assert page.texts_of("span")[-2:] == ["reward 0.5", "advantage -1.25"]
    sliders = [attributes for tag, attributes in page.elements if tag == "input"]
    assert [(slider["type"], slider["max"], slider["value"]) for slider in sliders] == [("range", "1", "1")]


def test_nothing_of_a_run_becomes_markup_and_nothing_is_fetched(tmp_path):
    run = tmp_path / "<img src=x>"
    run.mkdir()
    write_run(run)
    clean = page_of(run)
    with (run / "metrics.jsonl").open("a") as file:
        for step in (5, 6):
            evil = {"step": step, EVIL: 1.0, f"rewards/{EVIL}/mean": 2.0, f"eval_{EVIL}": 0.5, "eval_\ud800\x00\n": 1}
            file.write(json.dumps(evil) + "\n")
        file.write("{" + EVIL)
    with (run / "samples.jsonl").open("a") as file:
        record = {"step": 4, EVIL: EVIL, "prompt": [{"role": EVIL}], "completion": "\x00\ud800" + EVIL, "short": "<i>"}
        file.write(json.dumps(record) + "\n")
    for name in ("config.json", "versions.json"):
        (run / name).write_text(json.dumps({EVIL: EVIL, "nested": {EVIL: [EVIL]}}))
    page = page_of(run)
    assert page.fetched == []
    for tag in ("script", "img", "i", "link", "iframe"):
        assert page.count(tag) == clean.count(tag) == (1 if tag == "script" else 0)
    assert page.texts_of("script") == clean.texts_of("script")
    assert r"\x00\ud800" + EVIL in page.texts_of("pre")
    assert page.texts_of("title")[0] == "<img src=x>: GRPO run"
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_policy_allows_the_pages_own_script_and_style_and_nothing_else(tmp_path):
    write_run(tmp_path)
    page = page_of(tmp_path)
    texts = [page.texts_of(tag)[0].encode() for tag in ("style", "script")]
    digests = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in texts]
    policies = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'"]
    assert page.count("style") == 1


def test_every_color_is_defined_in_light_and_dark(tmp_path):
    write_run(tmp_path)
    page = page_of(tmp_path)
    light, dark = page.texts_of("style")[0].split("@media (prefers-color-scheme: dark)")
    drawn = {value for _, attributes in page.elements for value in attributes.values() if "var(--" in str(value)}
    used = {*re.findall(r"var\((--\w+)\)", light + dark + " ".join(drawn))} - {"--c"}
    assert used >= {f"--s{k}" for k in range(6)} | {"--faint", "--rule", "--paper"}
    for colors in (light, dark):
        assert used <= set(re.findall(r"(--\w+): #", colors))
    for svg in page.charts:
        colors = {element.get(name, "none") for element in svg.iter() for name in ("fill", "stroke")}
        assert all(color == "none" or color.startswith("var(--") for color in colors)


def test_files_that_are_missing_are_left_out(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    assert "metrics.jsonl has no record yet" in page_of(tmp_path).texts_of("p")
    write_run(tmp_path, samples=False)
    headings = page_of(tmp_path).texts_of("h2")
    assert headings == ["Curves", "Metrics"]


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
    for first, last, is_later in ((1, 5, False), (3, 4, True)):
        for step in range(first, last + 1):
            reward = float(step % 2) if is_later else 0.0
            append_records(tmp_path / "metrics.jsonl", [{"step": step, "reward": reward}])
    page = page_of(tmp_path)
    (points,) = lines_of(page.chart("Reward"))["var(--s0)"]
    assert [y == min(y for _, y in points) for _, y in points] == [False, False, True, False, False]


def test_of_very_many_samples_some_are_shown_with_a_note(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 1}\n')
    for step in range(1, 251):
        append_samples(tmp_path / "samples.jsonl", step, [SampleRecord("p", f"{step}.{k}", 1.0) for k in range(17)])
    page = page_of(tmp_path)
    steps = [a["data-step"] for tag, a in page.elements if tag == "details" and "data-step" in a]
    assert (len(steps), steps[0], steps[-1]) == (100, "1", "250")
    assert page.texts_of("pre")[1:32:2] == [f"1.{k}" for k in range(16)]
    assert "Shown: 100 of 250 steps, at most 16 completions of a step; all are in samples.jsonl." in page.texts_of("p")


def test_versions_name_what_a_run_depends_on():
    names = versions()
    assert names.keys() >= {"grpo_kernels", "python", "platform", "torch", "transformers"}
    assert names["python"] == ".".join(map(str, sys.version_info[:3]))
    assert all(isinstance(value, str) and value for value in names.values())
