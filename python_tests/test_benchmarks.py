"""What the benchmarks compare with is right, or is said to be wrong, and whatever a provider does is a row."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import guard
import interleaved
import loop_overhead
import memory
import providers
import pytest
import qualify
import torch
from records import Results
from test_training_loop import loop_of

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CASES = [("logits", "float32"), ("hidden", "float32"), ("logprobs", "float32"), ("upstream", "float32")]


def test_every_provider_that_runs_here_is_right() -> None:
    sizes, asked = qualify.Sizes.quick(), set()
    for provider in providers.providers():
        if provider.compiles or provider.missing("cpu"):
            continue
        for case in CASES:
            if case[0] in provider.tasks:
                verdict = qualify.judge(provider, case, sizes, "cpu")
                assert verdict.status == "ok", (provider.name, case, verdict)
                assert verdict.errors and all(error < 1e-5 for error in verdict.errors.values()), provider.name
                assert verdict.peaks.keys() == set(sizes.of(case[0]))
                asked.add(provider.name)
    assert asked >= {"naive PyTorch", "TRL", "grpo_kernels", "grpo_kernels, torch", "grpo_kernels, 1/8 workspace"}


def test_a_peak_is_what_was_added() -> None:
    size = 200 << 20
    with memory.Peak() as peak:
        torch.zeros(size, dtype=torch.int8).add_(1)
    assert 0.95 * size < peak.bytes < 1.1 * size
    with memory.Peak() as peak:
        torch.zeros(8)
    assert peak.bytes < 0.05 * size


@pytest.mark.full
def test_every_compiled_provider_is_right() -> None:
    judged = set()
    for provider in providers.providers():
        for case in CASES:
            if provider.compiles and not provider.missing("cpu") and case[0] in provider.tasks:
                assert qualify.judge(provider, case, qualify.Sizes.quick(), "cpu").status == "ok"
                judged.add(provider.name)
    assert "torch.compile of naive" in judged


def test_a_wrong_provider_is_not_timed() -> None:
    naive = providers.providers()[0].tasks["hidden"]()
    wrong = providers.Provider("one percent", {"hidden": lambda: lambda problem: 1.01 * naive(problem)})
    verdict = qualify.judge(wrong, ("hidden", "float32"), qualify.Sizes.quick(), "cpu")
    assert verdict.status == "wrong"
    assert "dX off by 0.01, dW off by 0.01" in verdict.reason and verdict.errors["loss"] > 1e-3
    nan = providers.Provider("nan", {"hidden": lambda: lambda problem: naive(problem) * float("nan")})
    assert qualify.judge(nan, ("hidden", "float32"), qualify.Sizes.quick(), "cpu").status == "wrong"


def test_a_provider_that_is_missing_has_a_reason() -> None:
    absent = providers.Provider("absent", {"logits": pytest.fail}, package="no_such_package")
    elsewhere = providers.Provider("elsewhere", {"logits": pytest.fail}, device="cuda")
    found = qualify.qualify(CASES, qualify.Sizes.quick(), among=[absent, elsewhere])
    assert [(v.status, v.reason) for v in found.values()] == [
        ("cannot run", "no_such_package is not installed"), ("cannot run", "it runs on cuda alone")
    ]  # fmt: skip


@pytest.mark.early
@pytest.mark.full
def test_a_provider_that_crashes_hangs_or_eats_memory_is_a_row(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, sys, time
        sys.path.insert(0, {str(BENCHMARKS)!r})
        import torch, qualify
        from memory import available
        from providers import Provider, providers

        fine = providers()[0].tasks
        def crashes(problem):
            os.abort()
        def hangs(problem):
            time.sleep(600)
        def eats(problem):
            return torch.ones(int(1.2 * available()), dtype=torch.int8).sum()
        def exits(problem):
            sys.exit("gone")
        makers = dict(crashes=crashes, hangs=hangs, eats=eats, exits=exits)
        qualify.providers = lambda ours: [
            Provider(name, {{"logits": lambda f=f: f, "logprobs": fine["logprobs"]}}) for name, f in makers.items()
        ]
        if __name__ == "__main__":
            qualify.main()
    """)
    )
    tasks = dict.fromkeys(("logits", "logprobs"), pytest.fail)
    among = [providers.Provider(name, tasks) for name in ("crashes", "hangs", "eats", "exits")]
    sizes = qualify.Sizes.quick()
    cases = [("logits", "float32"), ("logprobs", "float32")]
    found = qualify.qualify(cases, sizes, among=among, seconds=15, processes=4, script=script)
    first, second = ({name: v for (name, case), v in found.items() if case == asked} for asked in cases)
    assert {name: verdict.status for name, verdict in first.items()} == {
        "crashes": "crashed", "hangs": "timed out", "eats": "out of memory", "exits": "crashed"
    }  # fmt: skip
    assert "SIGABRT" in first["crashes"].reason and first["hangs"].reason == "after 15 s"
    assert "exit status 1; gone" in first["exits"].reason
    assert {name: verdict.status for name, verdict in second.items()} == {
        "crashes": "ok", "hangs": "ok", "eats": "ok", "exits": "ok"
    }  # fmt: skip


def test_what_fails_while_it_is_timed_leaves_the_turns() -> None:
    calls = {"floor": 0, "late": 0, "ours": 0}

    def counted(name: str, fails_at: int = 10**9) -> Any:
        def step() -> None:
            calls[name] += 1
            if calls[name] >= fails_at:
                raise torch.OutOfMemoryError("no more\nthan this")

        return step

    contenders = {"floor": counted("floor"), "late": counted("late", 3), "ours": counted("ours")}
    comparison = interleaved.Comparison("hidden", "a title", "floor", {"N": 8}, contenders=contenders)
    interleaved.time_in_turns(comparison, 5, torch.device("cpu"))
    assert calls == {"floor": 6, "late": 3, "ours": 6}
    rows = {row.provider: row for row in comparison.rows()}
    assert rows["late"].status == "out of memory" and rows["late"].reason == "OutOfMemoryError: no more"
    assert rows["ours"].rounds == 5 and rows["ours"].over_floor > 0 and rows["floor"].over_floor == 1


def test_an_interrupted_run_leaves_what_finished(tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        from records import Results, Row
        results = Results("here", "2026-01-01", {})
        for i in range(10**6):
            results.rows.append(Row("hidden", f"title {i}", "ours", {"N": i}, "float32", median_ms=1.0, p20_ms=1.0,
                                    p80_ms=1.0, rounds=1, over_floor=1.0, reason="x" * 2000))
            results.save(Path(sys.argv[1]))
            print(i, flush=True)
    """
    path = tmp_path / "results.json"
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    process = subprocess.Popen(command, cwd=BENCHMARKS, stdout=subprocess.PIPE)
    for _ in itertools.islice(process.stdout, 50):
        pass
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    last = int(process.stdout.read().split()[-1]) if process.wait() else 0
    rows = Results.load(path).rows
    assert len(rows) >= last + 1 and [row.shape["N"] for row in rows] == list(range(len(rows)))


@pytest.mark.early
@pytest.mark.full
def test_the_guard_passes_and_fails_by_its_limit(capsys: pytest.CaptureFixture[str]) -> None:
    root = BENCHMARKS.parent
    assert guard.guard(root, "itself", rounds=3, limit=1000.0, quick=True) == 0
    printed = capsys.readouterr().out
    assert printed.count("x  p20") == len(guard.works(True)) and "not compared" not in printed
    assert guard.guard(root, "itself", rounds=3, limit=0.001, quick=True) == 1
    assert capsys.readouterr().out.count("slower than") == len(guard.works(True))


def test_every_part_of_a_step_that_the_benchmark_times_is_called() -> None:
    loop = loop_of(max_steps=1, beta=0.1)
    seconds, took = loop_overhead.measure(loop, loop.steps(), steps=1)
    named = {part for part, _, _ in loop_overhead.parts(loop)}
    assert set(seconds) == {*named, loop_overhead.REST} and 0 < sum(seconds.values()) <= took * (1 + 1e-9)
