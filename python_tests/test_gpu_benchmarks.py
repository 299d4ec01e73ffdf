"""What `make gpu` times, its targets and its readings, as far as no GPU is needed: the CUDA kernels are emulated."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cuda_resources
import pytest
import qualify
import torch
from gpu import checks, currencies, dram, headline, other_works, settings, summary
from gpu.sizes import CASES, Sizes
from gpu.stage import RunningStage
from gpu.stages import entry
from interleaved import Comparison
from providers import GPU_BACKENDS, OURS_ON_GPU, Provider, providers
from qualify import Sizes as ProblemSizes
from qualify import Verdict, judge
from records import Results, Row
from report import markdown_report
from testing.emulated import emulated

from grpo_kernels import backends

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"


class Emulated:
    """What a stage's comparisons read of it: the CUDA kernels, emulated on the CPU."""

    device, backends, ours, deadline, is_dry = CPU, ["cuda"], {"grpo_kernels, CUDA": "cuda"}, math.inf, True


# ---- what is compared


def test_the_headline_has_what_the_readme_and_the_design_state() -> None:
    sizes = Sizes()
    assert {128256, 129280, 151936, 131071} == set(sizes.vocabularies) and sizes.tokens == (8192, 65536)
    on_gpu = SimpleNamespace(device=torch.device("cuda"), backends=list(GPU_BACKENDS), ours=OURS_ON_GPU, deadline=0)
    assert list(headline.comparisons(sizes, on_gpu, {}, 1)) == [
        "logits, N=8192 V=151936", "hidden", "hidden, a quarter live", "calls, N=64", "calls, N=8192 V=151936",
        "hidden, N=1024", "hidden, H=896", "frozen", "hidden, N=64", "workspace",
    ]  # fmt: skip
    others = other_works.comparisons(sizes, on_gpu, {})
    for vocab in sizes.vocabularies:
        for tokens in sizes.tokens:
            assert {f"logits, N={tokens} V={vocab}", f"calls, N={tokens} V={vocab}"} <= others.keys()


def test_our_backends_are_named_and_auto_is_none_of_them() -> None:
    ours = {provider.name: provider for provider in providers(OURS_ON_GPU) if "grpo" in provider.name}
    labels = ("grpo_kernels, Triton", "grpo_kernels, CUDA")
    assert ours.keys() >= {f"{label}{of}" for label in labels for of in ("", ", bf16 logits", ", token_logprobs")}
    assert "grpo_kernels" not in ours and ours[labels[1]].needs_backend == "cuda"
    for kind in ("cpu", "cuda"):
        reason = backends.unsupported_reason("grpo_loss", "cuda", torch.device(kind)) or ""
        assert ours[labels[1]].missing(kind) == reason


@pytest.mark.full
def test_a_backend_is_held_to_its_target_in_every_comparison() -> None:
    """At toy sizes, by the emulated CUDA kernels."""
    name = "grpo_kernels, CUDA"
    timed = (name, f"{name}, token_logprobs")
    verdicts = {(one, case): Verdict("ok") for one in timed for case in headline.CASES}
    verdicts["Liger, Triton", ("logits", "bfloat16")] = Verdict("cannot run", "it is not installed")
    with emulated():
        made = headline.comparisons(Sizes.dry(), Emulated, verdicts, 1)
        found = {what: measure() for what, measure in made.items() if re.match("logits|calls", what)}
    assert list(found) == ["logits, N=8 V=96", "calls, N=8", "calls, N=8 V=96"]
    rows = {what: {row.provider: row for row in comparison.rows()} for what, comparison in found.items()}
    logits = rows["logits, N=8 V=96"]
    assert logits["Liger, Triton"].reason == "it is not installed"
    assert [logits[one].asked for one in timed] == [1.10, None] and all(logits[one].over_floor > 0 for one in timed)
    calls = found["calls, N=8"]
    assert list(calls.times)[1:] == ["grpo_loss, CUDA", "token_logprobs, both, CUDA", "token_logprobs, forward, CUDA"]
    assert calls.notes[0].startswith("captured: target 40 µs; by the host's clock: grpo_loss, CUDA ")
    calls.times["grpo_loss, CUDA, captured"] = [1.0]
    calls.contenders["grpo_loss, CUDA, captured"] = lambda: None
    with emulated():
        settings.target_captured(calls, CPU)
    assert calls.targets == {"grpo_loss, CUDA, captured": 40e-6 / calls.median("copy into existing memory")}


@pytest.mark.full
def test_the_targets_of_calls_in_place() -> None:
    with emulated():
        comparison = settings.in_place(torch.bfloat16, 8, 96, CPU, ["cuda"], has_settings=True)
    assert comparison.targets == {
        "grpo_loss, CUDA": 1.10, "token_logprobs, both, CUDA": pytest.approx(1.725),
        "token_logprobs, forward, CUDA": pytest.approx(0.588, abs=1e-3),
    }  # fmt: skip
    assert len(comparison.contenders) == 8


def test_a_dense_call_notes_trls_time_and_its_peak() -> None:
    name = "grpo_kernels, Triton"
    comparison = Comparison("hidden", "a title", "floor", {"N": 8192, "H": 4096, "V": 128256}, "bfloat16")
    comparison.times = {"floor": [1.0], "TRL": [3.0], name: [1.5]}
    comparison.peaks = {name: 2 * (8192 + 128256) * 4096 + 2_400_000_000}
    headline.note_peers(comparison, {name: "triton"})
    assert comparison.notes == [
        f"TRL over {name}: 2.00x (target: 1.4x)",
        f"{name}: peak of 2.40 GB beyond inputs and gradients (target: 2.5 GB)",
    ]


@pytest.mark.full
def test_our_cuda_kernels_are_right_as_providers() -> None:
    sizes, checked = ProblemSizes((32, 64, 256), 8, (), (32, 96)), []
    with emulated():
        for provider in providers(Emulated.ours):
            for case in CASES if provider.name.startswith("grpo_kernels, CUDA") else ():
                if case[0] in provider.tasks and provider.device != "cpu":
                    verdict = judge(provider, case, sizes, "cpu")
                    assert verdict.status == "ok", (provider.name, case, verdict)
                    checked.append(case)
    assert len(checked) == 11 and set(checked) == set(CASES)


def test_ours_are_checked_first_and_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that times out at a case is asked the next one."""
    asked: list[tuple[str, float, int]] = []

    def answer(
        command: list[str], cases: list[tuple[str, str]], sizes: object, seconds: float, *_: object
    ) -> list[Verdict]:
        asked.append((command[2], seconds, len(cases)))
        return [Verdict("timed out" if command[2] == "grpo_kernels, b" and len(cases) == 2 else "ok")]

    monkeypatch.setattr(qualify, "_one_process", answer)
    names = ("a peer", "grpo_kernels, b", "another peer", "grpo_kernels, c")
    among = [Provider(name, dict.fromkeys(("logits", "hidden"), pytest.fail)) for name in names]
    monkeypatch.setattr(Provider, "missing", lambda self, device: "")
    cases = [("logits", "bfloat16"), ("hidden", "bfloat16")]
    found = qualify.qualify(cases, ProblemSizes.quick(), "cuda", {"grpo_kernels": "triton"}, among, 120, processes=1)
    ours, peers = asked[:4], asked[4:]
    assert {(name, seconds) for name, seconds, _ in ours} == {("grpo_kernels, b", 120), ("grpo_kernels, c", 120)}
    assert {(name, seconds) for name, seconds, _ in peers} == {("a peer", 60), ("another peer", 60)}
    assert [found["grpo_kernels, b", case].status for case in cases] == ["timed out", "ok"]


def test_what_is_over_its_target_is_in_the_report() -> None:
    results = Results("here", "2026-01-02", {})
    entry(results, "headline").update(status="ok", reason="", seconds=3)
    common = {"work": "calls", "title": "a title", "shape": {"N": 8}, "dtype": "bfloat16", "floor": "copy"}
    times = {"median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0, "rounds": 3}
    for name, over, asked in (("fast", 1.1, 1.15), ("slow", 1.2, 1.15), ("free", 9.0, None)):
        results.rows.append(Row(provider=name, over_floor=over, asked=asked, **common, **times))
    text = markdown_report(results)
    assert "Over the target:\n\n- slow, a title: 1.20x, target 1.15x\n" in text and "fast, a title" not in text
    assert "| headline | ok, 3 s |" in text


# ---- the sanitizer


def test_the_sanitizers_lines_on_our_kernels_are_found() -> None:
    log = "========= Invalid read\n=========     at loss_on_chip+0x10\nloss_on_chip\n========= at a_gemm_kernel\n"
    log += "========= at void vectorized_elementwise_kernel<4>\n=========     at _grpo_loss_kernel+0x1f0 in _grpo.cu"
    assert checks.findings(log) == ["at loss_on_chip+0x10", "at _grpo_loss_kernel+0x1f0 in _grpo.cu"]
    assert checks.findings("========= ERROR SUMMARY: 0 errors\n") == []


@pytest.mark.parametrize(
    ("then", "expected"),
    [
        ("print('x.py::test_a PASSED')", None),
        ("print('x.py::test_a PASSED'); print('=========     at loss_on_chip+0x1'); sys.exit(99)",
         "memcheck found at loss_on_chip"),
        ("print('x.py::test_a PASSED'); print('=========     at gemm+0x1'); sys.exit(99)", None),
        ("print('x.py::test_a FAILED'); print('1 failed'); sys.exit(1)", "the tests under memcheck failed"),
        ("print('x.py::test_a PASSED', flush=True); time.sleep(60)", "not all of it: no time was left"),
        ("print('x.py::test_a PASSED'); print('=========     at loss_on_chip+0x1', flush=True); time.sleep(60)",
         "memcheck found at loss_on_chip"),
    ],
)  # fmt: skip
def test_what_the_sanitizer_says_becomes_of_its_stage(tmp_path: Path, then: str, expected: str | None) -> None:
    tool, summary = tmp_path / "compute-sanitizer", "========= RACECHECK SUMMARY: 0 hazards (0 errors, 0 warnings)"
    tool.write_text(
        f"#!{sys.executable}\nimport sys, time\nif '--help' not in sys.argv:\n    print('{summary}')\n    {then}\n"
    )
    tool.chmod(0o755)
    stage = stage_at(tmp_path)
    stage.deadline = time.monotonic() + (4 if "sleep" in then else 60)
    stage.attempt("memcheck, cuda", lambda: checks.sanitize(stage, str(tool), "memcheck", "cuda", stage.deadline))
    assert len(stage.entry["failed"]) == (expected is not None), stage.entry["failed"]
    assert all(expected in line for line in stage.entry["failed"])
    assert stage.entry["found"]["tests"]["counts"] == {f"{'FAILED' if 'FAILED' in then else 'PASSED'}, cuda": 1}


def test_a_head_that_does_not_fit_is_none_and_another_error_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 5)

    def failing(error: Exception) -> Callable[[], None]:
        def step() -> None:
            raise error

        return step

    assert currencies.peak_of(lambda: None, CPU)[0] == 5
    for message in ("CUDA out of memory. Tried", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling",
                    "Triton Error [CUDA]: out of memory"):  # fmt: skip
        assert currencies.peak_of(failing(RuntimeError(message)), CPU) is None
    assert currencies.peak_of(failing(torch.OutOfMemoryError("CUDA out of memory")), CPU) is None
    with pytest.raises(RuntimeError, match="illegal"):
        currencies.peak_of(failing(RuntimeError("CUDA error: an illegal memory access")), CPU)


# ---- bytes of DRAM


def log_of(*launches: tuple[str, str, str], unit: str = "byte") -> str:
    """What ``ncu --csv`` writes of kernels with the bytes that they read and wrote."""
    columns = ("ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size",
               "Grid Size", "Device", "CC", "Section Name", "Metric Name", "Metric Unit", "Metric Value")  # fmt: skip
    rows = [columns]
    for i, (kernel, *values) in enumerate(launches):
        where = (str(i), "42", "python3.12", "127.0.0.1", kernel, "1", "7", "(448, 1, 1)", "(396, 1, 1)", "0", "9.0")
        rows += [
            (*where, "Command line profiler metrics", metric, unit, value)
            for metric, value in zip((READ, WRITTEN), values, strict=True)
        ]
    table = [",".join(f'"{cell}"' for cell in row) for row in rows]
    head = ["==PROF== Connected to process 42 (/usr/bin/python3.12)", '==PROF== Profiling "loss_on_chip": 1 pass']
    return "\n".join([*head, *table, "==PROF== Disconnected from process 42"]) + "\n"


ON_CHIP = "void grpo::cuda::(anonymous namespace)::loss_on_chip<c10::BFloat16, true>(grpo::cuda::Loss<float>)"


def test_ncus_table_is_read() -> None:
    log = log_of((ON_CHIP, "2,489,000,000", "2,440,000,000"), ("_grpo_loss_kernel", "3000", "0"))
    launches = dram.parse(log)
    assert launches[0] == (ON_CHIP, {"read": 2.489e9, "written": 2.44e9})
    first, second = dram.beside_counted(launches, 8192, 151936)
    assert first["kernel"] == "loss_on_chip" and first["counted"] == 2 * 8192 * 151936 * 2
    assert first["ratio"] == pytest.approx(4.929e9 / first["counted"])
    assert second["kernel"] == "_grpo_loss_kernel" and second["ratio"] < 1e-5
    line = (
        "- DRAM bytes of loss_on_chip, N=8192 V=151936 bfloat16: 2.489 GB read, 2.440 GB written, 0.990 of the 4.979 GB"
    )
    results = Results("here", "2026-01-02", {})
    entry(results, "bytes")["found"]["dram"] = [first]
    assert any(part.startswith(line) for part in summary.lines(results))
    assert dram.parse(log_of((ON_CHIP, "2.5", "0.125"), unit="Gbyte"))[0][1] == {"read": 2.5e9, "written": 1.25e8}
    assert dram.parse("==ERROR== nothing\n") == []


@pytest.mark.parametrize(("values", "unit"), [(("n/a", "1"), "byte"), (("1", "1"), "%"), (("", "1"), "byte")])
def test_what_is_no_number_of_bytes_is_refused(values: tuple[str, str], unit: str) -> None:
    with pytest.raises(ValueError, match=r"ncu tells no bytes of dram__bytes_read\.sum"):
        dram.parse(log_of((ON_CHIP, *values), unit=unit))


def test_a_metric_that_is_missing_is_refused() -> None:
    log = log_of((ON_CHIP, "1", "2"))
    with pytest.raises(ValueError, match="ncu tells only the bytes read of void grpo"):
        dram.parse("\n".join(line for line in log.splitlines() if WRITTEN not in line))


@pytest.fixture
def ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the place of Nsight Compute: it logs what a test puts beside it, then does what the test says."""
    path = tmp_path / "ncu"
    path.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys, time\n"
        "given = sys.argv[1:]\n"
        "here = pathlib.Path(__file__).parent\n"
        "(here / 'given').write_text('\\n'.join(given))\n"
        "pathlib.Path(given[given.index('--log-file') + 1]).write_text((here / 'told').read_text())\n"
        "exec((here / 'then').read_text())\n"
    )
    path.chmod(0o755)
    (tmp_path / "then").write_text("")
    monkeypatch.setenv("PATH", str(tmp_path))
    return path


def test_a_process_is_profiled(ncu: Path) -> None:
    ncu.with_name("told").write_text(log_of((ON_CHIP, "24,576", "24,000")))
    assert dram.find_ncu() == str(ncu)
    [row] = dram.measure(str(ncu), ["cuda"], 64, 192)
    assert row["ratio"] == pytest.approx(48576 / 49152)
    given = ncu.with_name("given").read_text().splitlines()
    assert given[given.index("--clock-control") + 1] == "none"
    assert given[given.index("--metrics") + 1] == f"{READ},{WRITTEN}"
    assert given[-5:] == ["-m", "gpu.dram_launches", "64", "192", "cuda"]
    pattern = given[given.index("--kernel-name") + 1].removeprefix("regex:")
    assert all(re.search(pattern, name) for names in dram.KERNELS.values() for name in names)


@pytest.mark.parametrize(
    ("told", "then", "expected"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n", "", "ERR_NVGPUCTRPERM - The user"),
        ("==ERROR== Failed to initialize the profiler: LibraryNotLoaded\n==ERROR== The application returned an error "
         "code (1).\n", "sys.exit(1)", "Failed to initialize the profiler: LibraryNotLoaded"),
    ],
)  # fmt: skip
def test_counters_that_cannot_be_read_are_told(ncu: Path, tmp_path: Path, told: str, then: str, expected: str) -> None:
    ncu.with_name("told").write_text(told)
    ncu.with_name("then").write_text(then)
    with pytest.raises(dram.NotCountedError, match=expected):
        dram.measure(str(ncu), ["cuda"], 64, 192)
    stage = stage_at(tmp_path)
    dram.run(stage, None)
    assert stage.entry["left_out"][-1].startswith(expected) and stage.entry["failed"] == []


def stage_at(folder: Path) -> RunningStage:
    """A stage as its process has it, with the emulated backend."""
    Results("here", "2026-01-02", {}).save(folder / "results.json")
    stage = RunningStage(folder / "results.json", "bytes", math.inf, is_dry=True)
    stage.backends = ["cuda"]
    return stage


def test_a_backend_without_a_row_is_an_error(ncu: Path) -> None:
    ncu.with_name("told").write_text(log_of((ON_CHIP, "24,576", "24,000")))
    with pytest.raises(RuntimeError, match="profiled no kernel of ours of triton"):
        dram.measure(str(ncu), ["cuda", "triton"], 64, 192)


def test_a_process_that_fails_is_an_error(ncu: Path) -> None:
    ncu.with_name("told").write_text("==ERROR== The application returned an error code (1).\n")
    ncu.with_name("then").write_text("print('RuntimeError: no GPU'); sys.exit(1)")
    with pytest.raises(RuntimeError, match=r"(?s)profiled no kernel of ours of cuda: .*RuntimeError: no GPU"):
        dram.measure(str(ncu), ["cuda"], 64, 192)


def test_without_ncu_the_report_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dram, "find_ncu", lambda: None)
    stage = stage_at(tmp_path)
    dram.run(stage, None)
    assert "- bytes, left out: ncu is neither on PATH nor" in markdown_report(Results.load(stage.path))


def test_kernels_go_by_their_names_in_the_sources() -> None:
    """Those that the sanitizer's lines are searched for, and those that ncu is asked for."""
    head = re.compile(r"__global__ void (?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\(")
    sources = [path.read_text() for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    cuda = {name for text in sources for name in head.findall(text)}
    assert cuda == {name.split("<")[0] for name in cuda_resources.recorded()[1]}
    assert len(cuda) == sum(text.count("__global__") for text in sources)
    ops = [path.read_text() for path in (ROOT / "grpo_kernels" / "ops").rglob("*.py")]
    triton = {name for text in ops for name in re.findall(r"^def (_\w+_kernel)\(", text, re.MULTILINE)}
    assert {name for names in dram.KERNELS.values() for name in names} <= cuda | triton
    assert cuda | triton == checks.KERNELS
