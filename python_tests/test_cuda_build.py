"""The CUDA library without a GPU: its version, its reasons, and, slowly, the wheel for several architectures.

``wheel`` takes ten minutes on two cores. What runs on a GPU is checked by ``test_gpu.py``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import cuda_resources
import pytest
import torch

import grpo_kernels
from grpo_kernels import backends

ROOT = Path(__file__).parents[1]
ARCHS = (80, 90, 100)
#: Kernels over rows of logits: what each must read them with, by architecture, where they are aligned.
ROW_KERNELS = {
    "loss_on_chip": ("UBLKCP", (90, 100)),
    "loss_in_two_passes": ("LDG.E.128", ARCHS),
    "statistics_of_rows": ("LDG.E.128", ARCHS),
    "gradient_of_rows": ("LDG.E.128", ARCHS),
    "scale_kernel": ("LDG.E.128", ARCHS),
}

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def _run(*command: object, fails: bool = False, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


# ---- what is asked for


@pytest.fixture
def nvcc(tmp_path: Path) -> Path:
    """A compiler that only tells its release."""
    script = tmp_path / "nvcc"
    script.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    script.chmod(0o755)
    return script


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"GRPO_KERNELS_CUDA_ARCHS": ""}, ""),
        ({"GRPO_KERNELS_CUDA_ARCHS": "90"}, "+cu130.sm90"),
        ({"GRPO_KERNELS_CUDA_ARCHS": "100;80, 90;80"}, "+cu130.sm80.sm90.sm100"),
        ({"GRPO_KERNELS_CUDA_ARCHS": "90", "GRPO_KERNELS_SKIP_CUDA": "1"}, ""),
    ],
)
def test_version_names_the_architectures(nvcc: Path, asked: dict[str, str], expected: str) -> None:
    told = _run(
        sys.executable, "setup.py", "--version", **{"CUDACXX": str(nvcc), "GRPO_KERNELS_SKIP_CUDA": "0"} | asked
    )
    assert told.splitlines()[-1] == grpo_kernels.__version__ + expected


def test_an_architecture_that_is_none_is_refused(nvcc: Path) -> None:
    asked = {"GRPO_KERNELS_CUDA_ARCHS": "80;sm_90", "GRPO_KERNELS_SKIP_CUDA": "0", "CUDACXX": str(nvcc)}
    told = _run(sys.executable, "setup.py", "--version", fails=True, **asked)
    assert "GRPO_KERNELS_CUDA_ARCHS must be like '80;90;100', got 'sm_90' in it" in told


# ---- why it does not run


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 103, 120])
def test_an_architecture_runs_on_its_generation_and_the_newest_on_what_is_newer(capability: int) -> None:
    assert backends.missing_architecture(ARCHS, capability) is None


@pytest.mark.parametrize(("built", "capability"), [((86, 100), 80), ((80, 100), 90), ((90,), 89)])
def test_a_gpu_that_was_not_built_for_is_told_so(built: tuple[int, ...], capability: int) -> None:
    reason = backends.missing_architecture(built, capability)
    assert reason is not None
    assert all(f"sm_{arch}" in reason for arch in built) and f"this GPU is sm_{capability}: " in reason
    assert f"GRPO_KERNELS_CUDA_ARCHS={capability} pip install" in reason


def test_a_gpu_that_no_build_serves_is_told_so() -> None:
    assert backends.missing_architecture(ARCHS, 75) == "its kernels need sm_80 or newer, and this GPU is sm_75"


def test_a_missing_library_is_told_with_the_command_that_builds_it(tmp_path: Path) -> None:
    reason = backends._load_cuda_extension(tmp_path / "_cuda.so")
    assert reason is not None and "the CUDA extension is not built" in reason
    assert "'GRPO_KERNELS_CUDA_ARCHS=90 pip install --no-build-isolation .'" in reason


@pytest.mark.skipif(torch.version.cuda is not None, reason="of torch without CUDA")
def test_a_library_beside_torch_without_cuda_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "_cuda.so").write_bytes(b"not even a library")
    reason = backends._load_cuda_extension(tmp_path / "_cuda.so")
    assert reason == f"torch {torch.__version__} is built without CUDA"


def test_ops_without_cuda_kernels_say_who_has_them() -> None:
    device = torch.device("cuda", 0)
    for op in ("gae", "token_divergence", "linear_token_divergence"):
        with pytest.raises(RuntimeError, match=rf"^backend 'cuda' cannot run {op}: it has no cuda kernels; it runs on"):
            backends.resolve(op, "cuda", device)


def test_an_exact_divergence_asks_for_the_kernels_that_it_takes() -> None:
    config = grpo_kernels.GRPOLossConfig(beta=0.1, kl_estimator="forward_kl")
    logits, ids, ones = torch.zeros(1, 2, 5), torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run token_divergence"):
        grpo_kernels.grpo_loss(logits, ids, torch.ones(1), ones, reference_logits=logits, config=config, backend="cuda")
    head, reference = (torch.zeros(1, 2, 3), torch.zeros(5, 3)), {"reference_logits": logits}
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run linear_token_divergence"):
        grpo_kernels.linear_grpo_loss(*head, ids, torch.ones(1), ones, **reference, config=config, backend="cuda")


def test_auto_on_nvidia_takes_cuda_where_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"triton": "it is not installed", "cuda": None, "torch": None, "cpu": "its tensors must be on the CPU"}
    monkeypatch.setattr(backends, "_REASONS", {name: lambda _, why=why: why for name, why in reasons.items()})
    device = torch.device("cuda", 0)
    assert backends.resolve("grpo_loss", "auto", device) == "cuda"
    assert backends.resolve("gae", "auto", device) == "torch"
    reasons["triton"] = None
    monkeypatch.setattr(backends, "_REASONS", {name: lambda _, why=why: why for name, why in reasons.items()})
    assert backends.resolve("grpo_loss", "auto", device) == "triton"


def test_a_library_for_other_gpus_says_so_at_the_first_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "_CUDA_ERROR", None)
    monkeypatch.setattr(backends, "_cuda_failure", lambda device: backends.missing_architecture((80, 100), 90))
    monkeypatch.setitem(backends._REASONS, "triton", lambda device: None)
    for _ in range(2):
        assert backends.resolve("grpo_loss", "auto", torch.device("cuda", 6)) == "triton"
    [record] = caplog.records
    said = "backend 'cuda' cannot run on cuda:6, another does: the CUDA extension is built for sm_80, sm_100, "
    assert record.getMessage().startswith(said + "and this GPU is sm_90: 'GRPO_KERNELS_CUDA_ARCHS=90 pip install")


# ---- what nvcc makes of the row kernels


@pytest.mark.early
@needs_nvcc
def test_loss_compiles_for_clusters_within_what_is_recorded(tmp_path: Path) -> None:
    """One file for one architecture, of what the wheel's tests compile: the others follow it."""
    torch_headers = Path(torch.__file__).parent / "include"
    options = ["-std=c++20", "-O3", "-gencode", "arch=compute_90,code=sm_90", "-Xptxas=-v", "-cubin"]
    options += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
    cubin = tmp_path / "loss.cubin"
    told = _run("nvcc", *options, "-Icsrc", f"-I{torch_headers}", "-o", cubin, "csrc/cuda/grpo_loss.cu")
    release, bounds = cuda_resources.recorded()
    usages = {name: archs["sm_90"] for name, archs in cuda_resources.parse(told).items()}
    assert {name: usage for name, usage in usages.items() if usage.spilled} == {}
    if release == cuda_resources.nvcc_release():
        taken = {name: usage.registers for name, usage in usages.items()}
        assert {name: n for name, n in taken.items() if n > bounds[name]["sm_90"].registers} == {}
    functions = re.split(r"\n\s+Function : ", _run(_cuobjdump(), "-sass", cubin))[1:]
    names = cuda_resources.demangled([text.split(maxsplit=1)[0] for text in functions])
    code = dict(zip(names, functions, strict=True))
    whole = code["loss_on_chip<BFloat16, BFloat16, true>"]
    assert "UBLKCP" in whole and "LDS.128" in whole and "STG.E.128" in whole and not re.search("LDL|STL", whole)
    assert "LDG.E.128" not in whole, "the logits are read by bulk copies alone"


# ---- the wheel


class Wheel:
    """What ``make wheel`` wrote, unpacked, and its log."""

    def __init__(self, folder: Path) -> None:
        archs = ";".join(map(str, ARCHS))
        asked = {"NVCC_APPEND_FLAGS": "-Xptxas=-v", "GRPO_KERNELS_SKIP_CUDA": "0"}
        self.log = _run(
            "make", "wheel", f"CUDA_ARCHS={archs}", f"PYTHON={sys.executable}", f"WHEEL={folder / 'build'}",
            f"DIST={folder / 'dist'}", **asked)  # fmt: skip
        [self.path] = (folder / "dist").glob("*.whl")
        self.site = folder / "site"
        with zipfile.ZipFile(self.path) as archive:
            archive.extractall(self.site)
        self.library = self.site / "grpo_kernels" / "_cuda.so"

    def objdump(self, *options: str) -> str:
        return _run(_cuobjdump(), *options, self.library)


@cache
def _cuobjdump() -> Path:
    """The toolkit's, or Triton's."""
    if found := shutil.which("cuobjdump"):
        return Path(found)
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        pytest.skip("neither the toolkit nor Triton has a cuobjdump")
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    return Wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.early
@pytest.mark.full
@needs_nvcc
def test_wheel_says_what_it_is_for(wheel: Wheel) -> None:
    release = cuda_resources.nvcc_release().replace(".", "")
    version = f"{grpo_kernels.__version__}+cu{release}." + ".".join(f"sm{arch}" for arch in ARCHS)
    found = re.fullmatch(r"grpo_kernels-(.*)-py3-none-manylinux_2_(\d+)_\w+\.whl", wheel.path.name)
    assert found is not None and found[1] == version and int(found[2]) >= 28
    names = {path.name for path in wheel.site.rglob("*.so*")}
    assert {"_cpu.so", "_cuda.so"} <= names and not any("torch" in name or "cudart" in name for name in names)


@pytest.mark.early
@pytest.mark.full
@needs_nvcc
def test_library_asks_for_torchs_stable_c_symbols_alone(wheel: Wheel) -> None:
    told = _run("nm", "-D", "--undefined-only", wheel.library)
    asked = {line.split()[-1] for line in told.splitlines() if "@" not in line}  # not those of libc and libstdc++
    assert "aoti_torch_get_current_cuda_stream" in asked
    weak = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
    assert {name for name in asked - weak if not re.match(r"(aoti_)?torch_", name)} == set()
    dynamic = _run("readelf", "-d", wheel.library)
    assert not re.search("RPATH|RUNPATH|libtorch_python|libpython|libcudart|libcuda\\.", dynamic)
    assert "libtorch_cuda.so" in dynamic


@pytest.mark.early
@pytest.mark.full
@needs_nvcc
def test_library_has_every_architecture_and_the_newest_as_ptx(wheel: Wheel) -> None:
    machine_code = set(re.findall(r"\.(sm_\w+)\.cubin", wheel.objdump("--list-elf")))
    assert machine_code == {f"sm_{arch}" for arch in ARCHS}
    assert set(re.findall(r"\.(sm_\w+)\.ptx", wheel.objdump("--list-ptx"))) == {f"sm_{ARCHS[-1]}"}


@pytest.mark.early
@pytest.mark.full
@needs_nvcc
def test_kernels_stay_within_what_is_recorded(wheel: Wheel) -> None:
    usages = cuda_resources.parse(wheel.log)
    release, bounds = cuda_resources.recorded()
    assert {name: set(archs) for name, archs in usages.items()} == {name: set(archs) for name, archs in bounds.items()}
    spilled = {(name, arch): usage for name, archs in usages.items() for arch, usage in archs.items() if usage.spilled}
    assert spilled == {}
    if release != cuda_resources.nvcc_release():
        pytest.skip(f"recorded with nvcc {release}, this is {cuda_resources.nvcc_release()}")
    over = {
        (name, arch): (usage, bounds[name][arch])
        for name, archs in usages.items()
        for arch, usage in archs.items()
        if usage.registers > bounds[name][arch].registers or usage.shared > bounds[name][arch].shared
    }
    assert over == {}


@pytest.mark.early
@pytest.mark.full
@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_row_kernels_read_rows_whole_and_keep_nothing_in_memory(wheel: Wheel, arch: int) -> None:
    functions = re.split(r"\n\s+Function : ", wheel.objdump("-sass", "-arch", f"sm_{arch}"))[1:]
    names = cuda_resources.demangled([text.split(maxsplit=1)[0] for text in functions])
    found = set()
    for name, text in zip(names, functions, strict=True):
        kernel = name.split("<")[0]
        assert not re.search(r"\b(LDL|STL)\b", text), f"{name} has memory of a thread's own"
        if kernel not in ROW_KERNELS or arch not in ROW_KERNELS[kernel][1] or re.search(r", 1, \w+>$", name):
            continue  # 1: rows that are not aligned, element by element
        found.add(kernel)
        assert ROW_KERNELS[kernel][0] in text, f"{name} reads no {ROW_KERNELS[kernel][0]}"
    assert found == {kernel for kernel, (_, archs) in ROW_KERNELS.items() if arch in archs}


@pytest.mark.early
@pytest.mark.full
@needs_nvcc
def test_library_registers_every_op_that_the_registry_counts_on(wheel: Wheel, tmp_path: Path) -> None:
    source = tmp_path / "stub.c"
    source.write_text("void aoti_torch_get_current_cuda_stream(void) {}\n")
    _run("cc", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", source, "-o", tmp_path / "libtorch_cuda.so")
    script = f"""
import torch, grpo_kernels
from grpo_kernels import objectives
torch.ops.load_library({str(wheel.library)!r})
print(*torch.ops.grpo_kernels.cuda_architectures())
has = torch._C._dispatch_has_kernel_for_dispatch_key
names = [schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("grpo_kernels::")]
names = [name for name in names if name.endswith("_cuda") and not has(name, "CompositeExplicitAutograd")]
print(*sorted(name for name in names if not has(name, "CUDA")))
"""
    told = _run(sys.executable, "-c", script, LD_LIBRARY_PATH=str(tmp_path)).splitlines()
    assert told[0] == " ".join(map(str, ARCHS))
    assert told[1].split() == [f"grpo_kernels::{op}_cuda" for op in ("gae", "token_divergence")]


@pytest.mark.early
@pytest.mark.full
@needs_nvcc
def test_wheel_runs_beside_torch_without_cuda(wheel: Wheel, tmp_path: Path) -> None:
    _run(sys.executable, "-m", "venv", tmp_path)
    python = tmp_path / "bin" / "python"
    _run(python, "-m", "pip", "install", "--constraint", ROOT / "constraints.txt", "torch", wheel.path)
    script = """
import torch, grpo_kernels
from grpo_kernels import backends
if torch.version.cuda is None:
    assert backends.resolve("grpo_loss", "auto", torch.device("cpu")) == "cpu"
logits = torch.randn(2, 3, 7, requires_grad=True)
arguments = (logits, torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([1.0, -1.0]), torch.ones(2, 3))
grpo_kernels.grpo_loss(*arguments, backend="cpu").loss.backward()
assert logits.grad.abs().sum() > 0
"""
    _run(python, "-I", "-c", script)
    told = _run(tmp_path / "bin" / "grpo-kernels", "info")
    assert re.search(rf"^  cuda archs +{', '.join(map(str, ARCHS))}$", told, re.MULTILINE), told
    assert re.search(
        r"^cuda: (torch .* is built without CUDA|its tensors must be on an NVIDIA GPU)", told, re.MULTILINE
    ), told
