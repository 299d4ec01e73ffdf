"""What `make gpu` times and asks, as far as no GPU is needed: the CUDA kernels are emulated, and ncu is a script."""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import cuda_resources
import pytest
import torch
from records import Results, Row
from testing.emulated import emulated

from grpo_kernels import registry

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The benchmarks' modules."""
    folder, before = str(ROOT / "benchmarks"), set(sys.modules)
    monkeypatch.syspath_prepend(folder)
    names = ("dram", "gpu", "gpu_work", "providers", "qualify")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(folder):
            del sys.modules[name]


# ---- what is compared


def test_what_is_asked_is_asked_at_every_size(bench: SimpleNamespace) -> None:
    sizes = bench.gpu_work.Sizes()
    assert {128256, 129280, 151936} == set(sizes.vocabularies) and sizes.tokens == (8192, 65536)
    made = bench.gpu_work.comparisons(sizes, torch.device("cuda"), {}, ("triton", "cuda"), 1, math.inf)
    names = [name for name, _ in made]
    assert len(names) == len(set(names)) and names[0] == "hidden"
    for vocab in sizes.vocabularies:
        for tokens in sizes.tokens:
            assert f"logits, N={tokens} V={vocab}" in names
            assert {f"{kind}, N={tokens} V={vocab}" for kind in ("settings", "calls")} & set(names)
        assert f"calls, N=64 V={vocab}" in names


def test_our_backends_are_held_to_the_same_in_one_comparison(bench: SimpleNamespace) -> None:
    """At toy sizes, "cuda" in the place of what "auto" takes."""
    ours = {provider.name: provider for provider in bench.providers.providers() if "grpo" in provider.name}
    labels = ("grpo_kernels", "grpo_kernels, Triton", "grpo_kernels, CUDA")
    assert ours.keys() >= {f"{label}{of}" for label in labels for of in ("", ", bf16 logits", ", token_logprobs")}
    assert ours["grpo_kernels, CUDA"].missing("cpu") == "it runs on cuda alone"
    reason = registry.unsupported_reason("grpo_loss", "cuda", torch.device("cuda")) or ""
    assert ours["grpo_kernels, CUDA"].missing("cuda") == reason
    timed = ("grpo_kernels", "grpo_kernels, token_logprobs")
    verdicts = {(name, case): bench.qualify.Verdict("ok") for name in timed for case in bench.gpu_work.CASES}
    verdicts["quack", ("logits", "bfloat16")] = bench.qualify.Verdict("cannot run", "it is not installed")
    verdicts[labels[2], ("logits", "bfloat16")] = bench.qualify.Verdict("cannot run", "it runs on cuda alone")
    sizes, found = bench.gpu_work.Sizes.smoke(), {}
    with emulated():
        for name, measure in bench.gpu_work.comparisons(sizes, CPU, verdicts, ("cuda",), 1, math.inf):
            if re.match("logits|calls|settings", name):
                found[name] = measure()
    assert list(found) == [
        "logits, N=8 V=96", "settings, N=8 V=96", "logits, N=16 V=96", "calls, N=16 V=96", "calls, N=8 V=96"
    ]  # fmt: skip
    rows = {name: {row.provider: row for row in comparison.rows()} for name, comparison in found.items()}
    assert rows["logits, N=8 V=96"]["quack"].reason == "it is not installed"
    for name in ("logits, N=8 V=96", "logits, N=16 V=96"):  # the latter too long for peers
        assert labels[2] not in rows[name] and ("quack" in rows[name]) == ("N=8" in name)
        assert [rows[name][provider].asked for provider in timed] == [1.15, pytest.approx(1.725)]
        assert all(rows[name][provider].over_floor > 0 for provider in timed)
    asked = {name: row.asked for name, row in rows["calls, N=16 V=96"].items()}
    assert asked == {
        "copy into existing memory": None, "grpo_loss, CUDA": 1.15, "token_logprobs, both, CUDA": pytest.approx(1.725),
        "token_logprobs, forward, CUDA": pytest.approx(0.588, abs=1e-3),
    }  # fmt: skip
    assert rows["settings, N=8 V=96"].keys() > asked.keys() and len(rows["settings, N=8 V=96"]) == 8
    assert all(row.status == "ok" for name in rows if "logits" not in name for row in rows[name].values())
    few = found["calls, N=8 V=96"]
    assert few.targets == dict.fromkeys(list(asked)[1:], 40e-6 / few.median("copy into existing memory"))
    assert few.notes[0].startswith("asked: 40 µs; by the host's clock, call after call: grpo_loss, CUDA ")


def test_our_cuda_kernels_are_right_as_providers(bench: SimpleNamespace) -> None:
    sizes, asked = bench.qualify.Sizes((32, 64, 256), 8, (), (32, 96)), []
    with emulated():
        for provider in bench.providers.providers():
            for case in bench.gpu_work.CASES if provider.name.startswith("grpo_kernels, CUDA") else ():
                if case[0] in provider.tasks:
                    verdict = bench.qualify.judge(provider, case, sizes, "cpu")
                    assert verdict.status == "ok", (provider.name, case, verdict)
                    asked.append(case)
    assert len(asked) == 8 and set(asked) == set(bench.gpu_work.CASES)


def test_a_backend_that_cannot_run_is_told_and_the_other_is_taken(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = {"triton": None, "cuda": "it is not built"}
    monkeypatch.setattr(bench.gpu.registry, "unsupported_reason", lambda op, backend, device: reasons[backend])
    found = bench.gpu.running(list(bench.providers.GPU_BACKENDS), CPU)
    assert found == (["triton"], ["backend 'cuda' cannot run: it is not built"])


def test_what_is_over_what_is_asked_is_told(bench: SimpleNamespace, tmp_path: Path) -> None:
    results = bench.gpu.begun(tmp_path / "here" / "now.json", CPU)
    common = {"work": "calls", "title": "a title", "shape": {"N": 8}, "dtype": "bfloat16", "floor": "copy"}
    times = {"median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0, "rounds": 3}
    for name, over, asked in (("fast", 1.1, 1.15), ("slow", 1.2, 1.15), ("free", 9.0, None)):
        results.rows.append(Row(provider=name, over_floor=over, asked=asked, **common, **times))
    text = bench.gpu.headed(results)
    assert "- Over what is asked: slow, a title: 1.20x of 1.15x" in text and text.count("Over what") == 1
    assert '- "auto" takes cpu for' in text


def test_a_part_of_a_run_adds_to_the_days_results(bench: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "here" / "now.json"
    results = bench.gpu.begun(path, CPU, "^calls")
    results.extra |= {"checks": {"passes": True}, "left_out": ["hidden: no time was left", "backend 'cuda' cannot run"]}
    run = bench.gpu.Run(results, path, CPU, math.inf, "^calls")
    done: list[str] = []
    for what in ("logits", "calls, N=8", "recalls"):
        run.attempt(what, lambda what=what: done.append(what))
    run.attempt("calls that fail", lambda: 1 // 0)
    assert done == ["calls, N=8"]
    assert Results.load(path).extra["failed"] == [
        "calls that fail: failed, ZeroDivisionError: integer division or modulo by zero"
    ]
    again = bench.gpu.begun(path, CPU, "^calls").extra
    assert again["checks"] == {"passes": True} and again["failed"] == []
    assert again["left_out"] == ["hidden: no time was left"]
    assert bench.gpu.begun(path, CPU).extra["checks"] == {}


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


def test_ncus_table_is_read(bench: SimpleNamespace) -> None:
    log = log_of((ON_CHIP, "2,489,000,000", "2,440,000,000"), ("_token_logprobs_fwd_kernel", "3000", "0"))
    launches = bench.dram.parse(log)
    assert launches[0] == (ON_CHIP, {"read": 2.489e9, "written": 2.44e9})
    first, second = bench.dram.beside_counted(launches, 8192, 151936)
    assert first["kernel"] == "loss_on_chip" and first["counted"] == 2 * 8192 * 151936 * 2
    assert first["ratio"] == pytest.approx(4.929e9 / first["counted"])
    assert second["kernel"] == "_token_logprobs_fwd_kernel" and second["counted"] == 8192 * 151936 * 2
    told = (
        "DRAM bytes of loss_on_chip, N=8192 V=151936 bfloat16: 2.489 GB read, 2.440 GB written, 0.990 of the 4.979 GB"
    )
    assert bench.dram.told(first).startswith(told)
    assert bench.dram.parse(log_of((ON_CHIP, "2.5", "0.125"), unit="Gbyte"))[0][1] == {"read": 2.5e9, "written": 1.25e8}
    assert bench.dram.parse("==ERROR== nothing\n") == []


@pytest.mark.parametrize(("values", "unit"), [(("n/a", "1"), "byte"), (("1", "1"), "%"), (("", "1"), "byte")])
def test_what_is_no_number_of_bytes_is_refused(bench: SimpleNamespace, values: tuple[str, str], unit: str) -> None:
    with pytest.raises(ValueError, match=r"ncu tells no bytes of dram__bytes_read\.sum"):
        bench.dram.parse(log_of((ON_CHIP, *values), unit=unit))


def test_a_metric_that_is_missing_is_refused(bench: SimpleNamespace) -> None:
    log = log_of((ON_CHIP, "1", "2"))
    with pytest.raises(ValueError, match="ncu tells only the bytes read of void grpo"):
        bench.dram.parse("\n".join(line for line in log.splitlines() if WRITTEN not in line))


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


def test_a_process_is_profiled(bench: SimpleNamespace, ncu: Path) -> None:
    ncu.with_name("told").write_text(log_of((ON_CHIP, "24,576", "24,000")))
    assert bench.dram.find_ncu() == str(ncu)
    [row] = bench.dram.measure(str(ncu), ["cuda"], 64, 192, 60)
    assert row["ratio"] == pytest.approx(48576 / 49152)
    given = ncu.with_name("given").read_text().splitlines()
    assert given[given.index("--clock-control") + 1] == "none"
    assert given[given.index("--metrics") + 1] == f"{READ},{WRITTEN}"
    assert given[-4:] == [str(ROOT / "benchmarks" / "dram.py"), "64", "192", "cuda"]
    assert all(
        re.search(given[given.index("--kernel-name") + 1].removeprefix("regex:"), name) for name in bench.dram.KERNELS
    )


@pytest.mark.parametrize(
    ("told", "then", "expected"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n", "", "ERR_NVGPUCTRPERM - The user"),
        ("==ERROR== Failed to initialize the profiler: LibraryNotLoaded\n==ERROR== The application returned an error "
         "code (1).\n", "sys.exit(1)", "Failed to initialize the profiler: LibraryNotLoaded"),
    ],
)  # fmt: skip
def test_counters_that_cannot_be_read_are_told(
    bench: SimpleNamespace, ncu: Path, tmp_path: Path, told: str, then: str, expected: str
) -> None:
    ncu.with_name("told").write_text(told)
    ncu.with_name("then").write_text(then)
    with pytest.raises(bench.dram.NotCountedError, match=expected):
        bench.dram.measure(str(ncu), ["cuda"], 64, 192, 60)
    run = bench.gpu.Run(bench.gpu.begun(tmp_path / "r.json", CPU), tmp_path / "r.json", CPU, math.inf, "")
    run.attempt("DRAM bytes", lambda: run.count_bytes(["cuda"], 64, 192))
    assert run.results.extra["left_out"][0].startswith(f"DRAM bytes: {expected}") and not run.results.extra["failed"]


def test_a_process_that_fails_or_hangs_is_an_error(bench: SimpleNamespace, ncu: Path) -> None:
    ncu.with_name("told").write_text("==ERROR== The application returned an error code (1).\n")
    ncu.with_name("then").write_text("print('RuntimeError: no GPU'); sys.exit(1)")
    with pytest.raises(RuntimeError, match=r"(?s)profiled no kernel of ours: .*RuntimeError: no GPU"):
        bench.dram.measure(str(ncu), ["cuda"], 64, 192, 60)
    ncu.with_name("then").write_text("time.sleep(60)")
    with pytest.raises(RuntimeError, match="ncu took over 1 s"):
        bench.dram.measure(str(ncu), ["cuda"], 64, 192, 1)


def test_without_ncu_the_report_says_so(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench.dram, "find_ncu", lambda: None)
    run = bench.gpu.Run(bench.gpu.begun(tmp_path / "r.json", CPU), tmp_path / "r.json", CPU, math.inf, "")
    run.attempt("DRAM bytes", lambda: run.count_bytes(["cuda"], 64, 192))
    assert "- Left out: DRAM bytes: ncu is neither on PATH nor" in (tmp_path / "r.md").read_text()


def test_kernels_go_by_their_names_in_the_sources(bench: SimpleNamespace) -> None:
    """Those that test_gpu.py knows the sanitizer's by, and those that ncu is asked for."""
    head = re.compile(r"__global__ void (?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\(")
    sources = [path.read_text() for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    cuda = {name for text in sources for name in head.findall(text)}
    assert cuda == {name.split("<")[0] for name in cuda_resources.recorded()[1]}
    assert len(cuda) == sum(text.count("__global__") for text in sources)
    ops = [path.read_text() for path in (ROOT / "grpo_kernels" / "ops").rglob("*.py")]
    triton = {name for text in ops for name in re.findall(r"^def (_\w+_kernel)\(", text, re.MULTILINE)}
    assert bench.dram.KERNELS.keys() <= cuda | triton
