"""Tables and charts of results, and that what is committed agrees with the results it was made from."""

from __future__ import annotations

from pathlib import Path

import charts
import pytest
import tables
from records import Results, Row, newest
from report import main, markdown_report, report

ROOT = Path(__file__).parents[1]
FOLDERS = sorted({path.parent for path in (ROOT / "benchmarks" / "results").glob("*/*.json")})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_committed_tables_and_charts_are_of_the_newest_result(folder: Path) -> None:
    results = Results.load(newest(folder))
    again = "run: python benchmarks/report.py --readme README.md"
    assert (folder / "report.md").read_text() == markdown_report(results), again
    assert charts.stale(results, folder) == [], again


def test_the_readme_agrees_with_the_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- results: ") >= 1
    assert tables.with_results(text, ROOT) == text, "run: python benchmarks/report.py --readme README.md"


def timed(provider: str, median_ms: float, live: float = 1.0, tokens: int = 512, **options: object) -> Row:
    title = f"hidden states to loss, N={tokens}, {live:.0%} live"
    shape = {"N": tokens, "H": 8, "V": 100}
    found = {"median_ms": median_ms, "p20_ms": round(median_ms - 0.1, 3), "p80_ms": round(median_ms + 0.1, 3)}
    found |= {"over_floor": round(median_ms / 100, 5), "rounds": 3}
    return Row("hidden", title, provider, shape, "float32", live, "floor", **found, **options)


@pytest.fixture
def results() -> Results:
    rows = [
        timed("floor", 100.0, operations=2e9),
        timed("grpo_kernels", 110.0, asked=1.15, errors={"loss": 1e-7, "dX": 2.5e-6}, peak_bytes=1_500_000_000),
        timed("slow", 1234.5, version="1.2"),
        Row("hidden", timed("", 1).title, "gone", {"N": 512, "H": 8, "V": 100}, "float32", status="wrong",
            reason="dW off by 0.2"),
        *(timed("grpo_kernels", 40 + 70 * live, live) for live in (0.25, 0.5)),
        *(timed("slow", 1234.5, live) for live in (0.25, 0.5)),
        *(timed("grpo_kernels", time, tokens=n, peak_bytes=n * 2_000_000) for n, time in ((128, 31.59), (256, 58.95))),
    ]  # fmt: skip
    return Results("here", "2026-01-02", {"torch": "2.13"}, rows, {rows[0].title: ["naive over ours: 3x"]})


def test_a_table_has_what_was_measured_and_what_was_not(results: Results) -> None:
    text = tables.markdown(results)
    assert "| floor | 100 ms | 99.9 ms to 100 ms | 1.00x |  |  |  |" in text
    assert "| grpo_kernels | 110 ms | 110 ms to 110 ms | 1.10x | 1.15x | 1.50 GB | 2.5e-06 |" in text
    assert "| slow 1.2 | 1.23 s | 1.23 s to 1.23 s | 12.35x |" in text
    assert "Floor: 20 GFLOP/s." in text and "Not timed: gone (wrong: dW off by 0.2)." in text
    assert "- naive over ours: 3x" in text
    assert text.index("| floor") < text.index("| grpo_kernels") < text.index("| slow")


def test_a_summary_has_a_line_for_each_work(results: Results) -> None:
    heading, _, first, *_ = tables.summary(results).splitlines()
    assert heading == "| work | floor | grpo_kernels | slow 1.2 | gone |"
    assert first == "| Hidden states to loss, N=512, 100% live | 100 ms | 1.10x | 12.35x | wrong |"


def test_a_summary_of_a_gpu_has_a_column_for_each_backend_of_ours() -> None:
    names = ("floor", "grpo_kernels, CUDA", "grpo_kernels, CUDA, bf16 logits", "grpo_kernels, CUDA, captured", "TRL")
    found = Results("here", "2026-01-02", {}, [timed(name, 100.0) for name in names])
    assert tables.summary(found).splitlines()[0] == (
        "| work | floor | grpo_kernels, CUDA | grpo_kernels, CUDA, bf16 logits | TRL |"
    )


def test_growth_is_fitted(results: Results) -> None:
    assert "| grpo_kernels | N^0.90 |  | 0.36 + 0.64 live |" in tables.markdown(results)
    assert "| slow |  |  | 1.00 + 0.00 live |" in tables.markdown(results)


def test_results_are_read_back(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path / "2026-01-02-0.1.json")
    assert Results.load(newest(tmp_path)) == results
    (tmp_path / "2026-01-03-0.1.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        Results.load(newest(tmp_path))
    (tmp_path / "2026-01-03-0.1.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="not a result of schema 1"):
        Results.load(newest(tmp_path))


def test_a_row_with_times_is_ok_and_no_other(results: Results) -> None:
    common = ("hidden", "title", "ours", {}, "float32")
    with pytest.raises(ValueError, match="status must be one of"):
        Row(*common, status="fine")
    with pytest.raises(ValueError, match="with a median"):
        Row(*common, status="wrong", median_ms=1.0)
    with pytest.raises(ValueError, match="with a median"):
        Row(*common)


def test_the_command_writes_all(results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.save(tmp_path / "results" / "here" / "2026-01-02-0.1.json")
    readme = tmp_path / "README.md"
    block = "<!-- results: results/here {} -->\nold\n<!-- end of results -->\nafter\n"
    readme.write_text("before\n" + block.format("hidden"))
    assert main([str(tmp_path / "results"), "--readme", str(readme)]) == 0
    filled = readme.read_text()
    assert filled.startswith("before\n<!-- results") and filled.endswith("<!-- end of results -->\nafter\n")
    assert "| grpo_kernels | 110 ms" in filled and "old" not in filled
    folder = tmp_path / "results" / "here"
    names = {path.name for path in folder.iterdir()}
    assert {"report.md", "time-over-floor.png", "memory-over-tokens.png", "time-over-live-share.png",
            "error.png"} <= names  # fmt: skip
    assert charts.stale(results, folder) == []
    results.rows[1] = timed("grpo_kernels", 111.0, errors={"loss": 1e-7})
    assert charts.stale(results, folder) == list(charts._CHARTS)
    report(tmp_path / "results", None)
    assert tables.with_results(filled, tmp_path) == filled
    readme.write_text(block.format("unknown"))
    assert main([str(tmp_path / "results"), "--readme", str(readme)]) == 2
    assert "has no work unknown" in capsys.readouterr().err
    assert main([str(tmp_path / "empty")]) == 2
