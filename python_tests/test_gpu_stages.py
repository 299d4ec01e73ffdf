"""`make gpu` without a GPU: a dry run of every stage, stages that fail, hang or are killed, and what is taken over."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from gpu import checks, failures, identity, kit, processes, stages, summary
from gpu.currencies import MEMORY, longest_sequence
from gpu.stages import STAGES
from records import Results

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes by Linux's /proc")

LIMIT = 20  # seconds, of the stage that hangs: enough on a busy machine to start and to write what it found
#: The command, with stages that end in every way there is; the name of one says how.
ODD_COMMAND = f"""
    import sys
    from dataclasses import replace
    from gpu import __main__ as command
    from gpu import stages

    first = command.STAGES[0]
    command._DRY_RUN_FACTOR = 1
    odd = [replace(first, name=name, seconds={LIMIT} if name == "hangs" else 200, module="odd_stage", arguments=(name,),
                   by_default=False)
           for name in ("works_well", "fails", "hangs", "is_killed", "runs_out_of_memory", "runs_out_of_time",
                        "leaves_a_process", "goes_on")]
    command.STAGES = stages.STAGES = (*command.STAGES, *odd)
    sys.exit(command.main(sys.argv[1:]))
"""
ODD_STAGE = """
    import os, signal, subprocess, sys, time
    import torch
    from gpu.stage import main

    def run(stage, options):
        stage.entry["found"]["kept"] = options.tool
        stage.save()
        if options.tool in ("hangs", "leaves_a_process"):  # in a session of its own, as compute-sanitizer is
            subprocess.Popen([sys.executable, "-c", f"import time; {MARK!r}; time.sleep(600)"], start_new_session=True)
        if options.tool == "hangs":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        if options.tool == "is_killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if options.tool == "runs_out_of_memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        if options.tool == "runs_out_of_time":
            stage.deadline = 0
            stage.attempt("a part", lambda: None)
        if options.tool == "fails":
            stage.attempt("a part", lambda: 1 // 0)
            stage.attempt("another part", lambda: stage.entry["found"].update(other=1))
        if options.tool == "goes_on":
            stage.entry["found"].setdefault("processes", []).append(os.getpid())
            stage.attempt("is killed", lambda: os.kill(os.getpid(), signal.SIGKILL))
            stage.is_dry = False  # with its own limit
            stage.device = torch.device("cpu")
            stage.attempt("hangs", lambda: time.sleep(600), seconds=1)
            stage.attempt("the rest", lambda: stage.entry["found"].update(other=1))

    if __name__ == "__main__":
        sys.exit(main(run))
"""


def run_command(folder: Path, *arguments: str, script: str = "", interpret: bool = True) -> tuple[int, str]:
    """Exit status and output of the command in a dry run; ``folder`` has its odd stages, its tools and its results."""
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    environment = dict(os.environ, TRITON_INTERPRET=str(int(interpret)), PATH=path)
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (folder, ROOT, ROOT / "benchmarks")))
    start = ["-c", textwrap.dedent(script)] if script else ["-m", "gpu"]
    command = [sys.executable, *start, "--results", str(folder / "results"), "--rounds", "1", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def processes_with(mark: str) -> list[str]:
    """The command lines of living processes that hold a mark."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # it has ended since
            continue
    return [line for line in lines if mark in line]


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder with the odd stages' module."""
    source = f"MARK = {str(tmp_path)!r}\n" + textwrap.dedent(ODD_STAGE)
    (tmp_path / "odd_stage.py").write_text(source)
    return tmp_path


def results_of(folder: Path) -> Results:
    (path,) = folder.glob("results/dry-run/*.json")
    return Results.load(path)


@pytest.mark.early
@pytest.mark.full
def test_a_stage_may_fail_hang_or_be_killed_and_the_others_run(odd: Path) -> None:
    names = ("fails", "hangs", "is_killed", "runs_out_of_memory", "runs_out_of_time", "leaves_a_process", "works_well")
    code, output = run_command(odd, "--dry-run", *names, script=ODD_COMMAND)
    assert code == 1, output
    stages = results_of(odd).extra["stages"]
    assert {name: stages[name]["status"] for name in names} == {
        "fails": "failed", "hangs": "timeout", "is_killed": "killed", "runs_out_of_memory": "failed",
        "runs_out_of_time": "timeout", "leaves_a_process": "ok", "works_well": "ok",
    }  # fmt: skip
    assert all(stages[name]["found"]["kept"] == name for name in names), "what a stage had found is lost"
    assert (
        stages["fails"]["failed"] == ["a part: failed, ZeroDivisionError: integer division or modulo by zero"]
        and stages["fails"]["found"]["other"] == 1
    )
    assert stages["fails"]["reason"] == stages["fails"]["failed"][0]
    assert stages["hangs"]["reason"] == f"stopped at its limit of {LIMIT} s"
    assert LIMIT <= stages["hangs"]["seconds"] < 120
    assert stages["is_killed"]["reason"] == "ended by SIGKILL, as the system does when memory runs out"
    assert "OutOfMemoryError: CUDA out of memory. Tried to allocate 3 GiB" in stages["runs_out_of_memory"]["reason"]
    assert stages["runs_out_of_time"]["reason"] == "a part: no time was left"
    for name in names:
        assert "\n" not in stages[name]["reason"]
        assert f"| {name} | {summary.outcome(stages[name])} |" in output
    assert processes_with(str(odd)) == []


@pytest.mark.early
@pytest.mark.full
def test_after_a_part_that_kills_its_process_another_process_goes_on(odd: Path) -> None:
    code, output = run_command(odd, "--dry-run", "goes_on", script=ODD_COMMAND)
    found = results_of(odd).extra["stages"]["goes_on"]
    assert code == 1 and found["found"]["other"] == 1 and len(found["found"]["processes"]) == 3, output
    assert found["failed"] == [
        "is killed: ended by SIGKILL, as the system does when memory runs out",
        "hangs: took longer than a part may; the log shows where it was",
    ]
    assert found["parts"] == {"is killed": "failed", "hangs": "failed", "the rest": "ok"}
    assert found["status"] == "failed" and found["reason"] == found["failed"][0] + " (and 1 more)"


#: In the place of NVIDIA's tools: one writes what ncu tells of a launch, one runs what it is given.
TOOLS = {
    "ncu": """
        import pathlib, sys
        columns = ("ID", "Process ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value")
        rows = [columns] + [("0", "1", "_grpo_loss_kernel", f"dram__bytes_{what}.sum", "byte", "1536")
                            for what in ("read", "write")]
        text = "".join(",".join(f'"{cell}"' for cell in row) + chr(10) for row in rows)
        pathlib.Path(sys.argv[sys.argv.index("--log-file") + 1]).write_text(text)
    """,
    "compute-sanitizer": """
        import os, sys
        if sys.argv[1:] == ["--help"]:
            sys.exit("--report-api-errors")
        print("========= COMPUTE-SANITIZER", flush=True)
        print("========= ERROR SUMMARY: 0 errors", flush=True)
        os.execv(sys.executable, sys.argv[sys.argv.index(sys.executable):])
    """,
}


def make_tool(folder: Path, name: str, source: str) -> Path:
    """A program of this name in a folder."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(source))
    path.chmod(0o755)
    return path


@pytest.mark.early
@pytest.mark.full
def test_a_dry_run_goes_through_every_stage(tmp_path: Path) -> None:
    for name, source in TOOLS.items():
        make_tool(tmp_path, name, source)
    code, output = run_command(tmp_path, "--dry-run", "--seconds", "2400", *(stage.name for stage in STAGES))
    results = results_of(tmp_path)
    stages = results.extra["stages"]
    assert {name: (found["status"], found["failed"]) for name, found in stages.items()} == {
        stage.name: ("ok", []) for stage in STAGES
    }, output
    assert code == 0 and {name for name, found in stages.items() if found["left_out"]} == {"build"}
    assert stages["alive"]["found"]["checks"].keys() > {"triton, grpo_loss", "triton, gae", "addmm into fp32, in place"}
    assert len(stages["alive"]["found"]["checks"]) == 16
    assert {row.work for row in results.rows} == {
        "logits", "hidden", "frozen", "calls", "settings", "logprobs", "upstream", "policy", "workspace"
    }  # fmt: skip
    ours = [row for row in results.rows if row.provider.startswith("grpo_kernels")]
    assert ours and {row.status for row in ours} == {"ok"} and "grpo_kernels" not in {row.provider for row in ours}
    assert [row["longest"] for row in stages["currencies"]["found"]["currencies"]] == [64, 64, 64]
    assert all(0 < row["ratio"] < 2 for row in stages["proof"]["found"]["accuracy"])
    assert stages["proof"]["found"]["curves"]["distances"].keys() >= {
        "loss, auto", "grad_norm, auto", "reward, auto"
    }  # fmt: skip
    assert [row["ratio"] for row in stages["bytes"]["found"]["dram"]] == [1.0]
    for tool in ("memcheck", "racecheck"):
        assert stages[tool]["found"]["tests"]["counts"].keys() == {"PASSED, triton"}
    assert stages["conformance"]["found"]["tests"]["counts"].keys() == {"PASSED"}
    assert (tmp_path / "results" / "dry-run" / "report.md").read_text() in output
    assert {row["itemsize"] for row in stages["tune"]["found"]["tuned"]} == {2, 4}
    assert processes_with(str(tmp_path)) == []


@pytest.mark.early
@pytest.mark.full
def test_stages_of_the_same_code_are_taken_over(odd: Path) -> None:
    given = ("--dry-run", "works_well", "is_killed")
    run_command(odd, *given, script=ODD_COMMAND)
    (path,) = odd.glob("results/dry-run/*.json")
    # by default: what is "ok" is not repeated, what is not is tried again
    by_default = ODD_COMMAND.replace("by_default=False", 'by_default=name in ("works_well", "is_killed")')
    by_default = by_default.replace("(*command.STAGES, *odd)", "tuple(odd)")
    code, output = run_command(odd, "--dry-run", script=by_default)
    assert code == 1 and "works_well: taken over from an earlier run" in output, output
    assert "is_killed: taken over" not in output
    assert list(odd.glob("results/dry-run/*.json")) == [path]
    # a stage that is named is run again
    assert "taken over" not in run_command(odd, "--dry-run", "works_well", script=ODD_COMMAND)[1]
    # other code: a new file
    text = json.loads(path.read_text())
    text["extra"]["identity"]["torch"] = "2.0"
    path.write_text(json.dumps(text))
    time.sleep(1)  # files are named by the second
    assert "taken over" not in run_command(odd, "--dry-run", script=by_default)[1]
    assert len(list(odd.glob("results/dry-run/*.json"))) == 2


@pytest.mark.early
@pytest.mark.full
def test_a_part_that_is_named_is_done_again_and_the_others_findings_are_kept(odd: Path) -> None:
    assert run_command(odd, "--dry-run", "fails", "--only", "another", script=ODD_COMMAND)[0] == 0
    found = results_of(odd).extra["stages"]["fails"]
    assert found["parts"] == {"another part": "ok"} and found["left_out"] == ["a part: not in --only another"]
    assert run_command(odd, "--dry-run", "fails", "--only", "^a part", script=ODD_COMMAND)[0] == 1
    found = results_of(odd).extra["stages"]["fails"]
    assert found["parts"] == {"a part": "failed", "another part": "ok"} and found["found"]["other"] == 1
    # what failed is not kept: the stage is not whole, and is not taken over
    assert run_command(odd, "--dry-run", "fails", "--only", "another", script=ODD_COMMAND)[0] == 0
    found = results_of(odd).extra["stages"]["fails"]
    assert found["parts"] == {"another part": "ok"} and found["left_out"] == ["a part: not in --only another"]


def test_comparisons_that_are_done_again_go_by_the_verdicts_that_are_there(tmp_path: Path) -> None:
    results = Results("here", "2026-01-02", {})
    parts = {"checks of ours": "ok", "checks of the peers": "failed", "hidden": "ok", "frozen": "ok"}
    stages.entry(results, "headline").update(parts=parts, found={"card": 1}, verdicts=[["a", ["hidden", "bf16"], {}]])
    results.save(tmp_path / "results.json")
    stages._begin("headline", tmp_path / "results.json", "^hidden")
    again = Results.load(tmp_path / "results.json").extra["stages"]["headline"]
    assert again["parts"] == {"checks of ours": "ok", "frozen": "ok"} and again["status"] == "killed"
    assert again["verdicts"] == [["a", ["hidden", "bf16"], {}]] and again["found"] == {"card": 1}
    stages._begin("headline", tmp_path / "results.json", "")
    assert Results.load(tmp_path / "results.json").extra["stages"]["headline"]["parts"] == {}


def test_a_run_without_time_says_what_it_left_out(odd: Path) -> None:
    code, output = run_command(odd, "--dry-run", "--seconds", "1", "works_well", script=ODD_COMMAND)
    assert code == 1 and "left out, 0 s: no time was left of 1 s" in output


def test_where_nothing_of_ours_runs_the_run_ends(tmp_path: Path) -> None:
    """Without its interpreter Triton does not run on a CPU."""
    code, output = run_command(tmp_path, "--dry-run", "alive", "bytes", interpret=False)
    stages = results_of(tmp_path).extra["stages"]
    assert code == 1 and stages.keys() == {"alive"}, output
    assert "nothing of ours runs here: backend 'triton' cannot run: its tensors must be on a GPU" in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_run_is_skipped_or_refused(tmp_path: Path) -> None:
    code, output = run_command(tmp_path, interpret=False)
    assert code == 0 and output.splitlines()[-1].startswith("skipped: ")
    assert run_command(tmp_path, "--require-gpu", interpret=False)[0] == 3


def test_an_unknown_stage_is_refused(tmp_path: Path) -> None:
    code, output = run_command(tmp_path, "--dry-run", "headlines")
    assert code == 2 and "unknown stage headlines; the stages are build, alive, headline" in output


def test_the_digest_of_the_sources_is_theirs(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    source = tmp_path / "csrc" / "a.cu"
    source.write_text("1")
    first = identity.sources_digest(tmp_path)
    (tmp_path / "benchmarks" / "results" / "a.json").write_text("{}")
    assert identity.sources_digest(tmp_path) == first
    source.write_text("2")
    assert identity.sources_digest(tmp_path) != first
    source.rename(source.with_name("b.cu"))
    assert identity.sources_digest(tmp_path) not in (first, identity.sources_digest(ROOT))


def test_a_copy_without_git_has_the_kits_commit(tmp_path: Path) -> None:
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", identity.commit())
    assert identity.commit(tmp_path) == "unknown"
    source, kit = tmp_path / "setup.py", tmp_path / "build" / "gpu-kit" / "kit.json"
    source.write_text("1")
    kit.parent.mkdir(parents=True)
    kit.write_text(json.dumps({"commit": "abc", "sources": identity.sources_digest(tmp_path)}))
    assert identity.commit(tmp_path) == "abc"
    source.write_text("2")
    assert identity.commit(tmp_path) == "unknown"


@pytest.mark.parametrize("options", [(), ("--numprocesses", "1")])
def test_why_a_test_failed_is_told_before_the_next_one_ends(tmp_path: Path, options: tuple[str, ...]) -> None:
    source = "import time\ndef test_a():\n    assert 1 == 2, 'too\\n  few'\ndef test_b():\n    time.sleep(600)\n"
    path = tmp_path / "test_of_a_failure.py"
    path.write_text(source)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "gpu.failures", *options, str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    lines = []
    for line in checks.lines_of(command, time.monotonic() + 120, environment):
        lines.append(line)
        if line.startswith(failures.REASON):
            break
    assert re.match(r"REASON \S*test_of_a_failure.py::test_a: AssertionError: too few", lines[-1]), lines
    assert any("assert 1 == 2" in line for line in lines[:-1]), lines
    path.write_text("import no_such_module")
    lines = list(checks.lines_of(command, time.monotonic() + 120, environment))
    assert [line for line in lines if line.startswith(failures.REASON) and "no_such_module" in line], lines


@pytest.mark.parametrize("faults", [1, pytest.param(6, marks=pytest.mark.full)])
def test_a_worker_that_lost_the_gpu_ends_and_another_goes_on(tmp_path: Path, faults: int) -> None:
    """An error of the device that stays with its process fails one test, not those after it."""
    path = tmp_path / "test_of_a_lost_context.py"
    path.write_text(
        "import pytest\nimport torch\nlost = []\n"
        "def synchronize():\n    if lost:\n        raise RuntimeError('misaligned address')\n"
        "torch.cuda.synchronize, torch.cuda.is_initialized = synchronize, lambda: True\n"
        f"@pytest.mark.parametrize('i', range({faults}))\n"
        "def test_a(i):\n    lost.append(i)\n    synchronize()\n"
        "def test_b():\n    synchronize()\n"
    )
    options = ["-v", "-p", "no:cacheprovider", "-p", "gpu.failures", "--numprocesses", "1", *checks.RESTARTS]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    command = [sys.executable, "-m", "pytest", *options, str(path)]
    lines = [*checks.lines_of(command, time.monotonic() + 300, environment)]
    outcomes = {line.split("::")[1].split()[0]: found[1] for line in lines if (found := checks._OUTCOME.search(line))}
    assert outcomes == {f"test_a[{i}]": "FAILED" for i in range(faults)} | {"test_b": "PASSED"}, lines
    assert [line for line in lines if line.startswith(failures.REASON) and "misaligned address" in line], lines


def test_other_processes_are_left_alone(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        outcome = processes.run([sys.executable, "-c", "print('a'); print('last line'); exit(4)"], 30, tmp_path / "log")
        assert (outcome.status, outcome.reason) == ("failed", "last line")
        assert processes.run(["true"], 30, tmp_path / "log").status == "ok"
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("memory", [100_000, 123_456, 8192, 1_000_000])
def test_the_longest_sequence_is_found(memory: int) -> None:
    tried = []

    def attempt(tokens: int) -> tuple[int, float] | None:
        tried.append(tokens)
        return None if tokens > memory else (tokens << 20, 0.1)

    longest, is_measured = longest_sequence(attempt, 8192)
    assert is_measured and memory * 15 // 16 - 1 <= longest <= memory and len(tried) <= 14


def test_where_calls_become_long_the_slope_of_the_peak_tells() -> None:
    def attempt(tokens: int) -> tuple[int, float]:
        return (5 << 30) + tokens * (1 << 20), tokens * 2e-5

    longest, is_measured = longest_sequence(attempt, 8192)
    assert not is_measured and longest == (MEMORY - (5 << 30)) // (1 << 20)


def test_the_kits_packages_are_pinned_and_fit_beside_the_tree() -> None:
    """Its packages are 10 MiB, and its libraries 6: the tree must leave room."""
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {name for name in kit.PACKAGES if name.replace("_", "-") not in pinned} == set()
    there = kit.command_there(ROOT / "build" / "gpu-kit" / "site")
    assert there == "PYTHONPATH=.:benchmarks:build/gpu-kit/site python3 -m gpu --results gpu-results"
    if (ROOT / ".git").exists():
        assert kit.tree_bytes() < kit.MOST_BYTES - (16 << 20)
