"""What is installed: symbols, imports, the wheel, the console script, pins."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import grpo_kernels
from grpo_kernels import backends, info

ROOT = Path(__file__).parents[1]
PACKAGE = Path(grpo_kernels.__file__).parent
LIBRARY = PACKAGE / "_cpu.so"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

on_linux = pytest.mark.skipif(platform.system() != "Linux", reason="reads ELF files")
on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 instruction sets")


def output_of(*command: object, **options: object) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def run_python(script: str, *, first_on_path: Path | None = None) -> str:
    """Runs a script in a fresh interpreter, away from the checkout."""
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    if first_on_path:
        environment["PYTHONPATH"] = str(first_on_path)
    return output_of(sys.executable, "-c", script, env=environment, cwd=first_on_path or "/")


def copy_of_checkout(target: Path) -> Path:
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "runs", "*.egg-info", "*.so", "__pycache__", ".*_cache")
    return Path(shutil.copytree(ROOT, target / "checkout", ignore=ignored))


# ---- the C++ library


def forbidden_symbols(library: Path) -> set[str]:
    """Undefined symbols of Python, and C++ ones of torch: what the stable ABI is there to avoid."""
    symbols = (line.split(maxsplit=1)[1] for line in output_of("nm", "-DC", "--undefined-only", library).splitlines())
    return {name for name in symbols if re.search(r"^_?Py|\b(at|c10|torch|caffe2)::", name)}


@on_linux
def test_library_asks_for_no_python_and_no_torch_cpp_symbols():
    assert forbidden_symbols(LIBRARY) == set()


@on_linux
def test_forbidden_symbols_are_found_where_they_are():
    found = forbidden_symbols(Path(torch.__file__).parent / "lib" / "libtorch_python.so")
    assert any(name.startswith("Py") for name in found)
    assert any("c10::" in name for name in found)


@on_linux
def test_library_does_not_remember_where_torch_was():
    dynamic = output_of("readelf", "-d", LIBRARY)
    assert "libtorch_cpu.so" in dynamic
    assert not re.search("RPATH|RUNPATH|libtorch_python|libpython|libcudart|libgomp", dynamic)


@on_linux
@on_x86
@pytest.mark.parametrize(("register", "levels"), [("%ymm", "avx2|avx512"), ("%zmm", "avx512")])
def test_wide_instructions_stay_in_their_level(register, levels):
    functions = re.split(r"\n\n[0-9a-f]+ <", output_of("objdump", "-dC", "--no-show-raw-insn", LIBRARY))[1:]
    users = {text[: text.index(">:")] for text in functions if register in text}
    assert users, f"nothing uses {register}: the levels are not compiled"
    assert {name for name in users if not re.search(levels, name)} == set()


@on_linux
@on_x86
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_levels_share_no_inline_function(level):
    """The linker would merge it, and every level run the same copy: a slow one, or one the machine cannot run."""
    pattern = f"build/cmake-*/CMakeFiles/row_kernels_{level}.dir/csrc/cpu/row_kernels.cpp.o"
    built = sorted(ROOT.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not built:
        pytest.skip("the library was not built in this checkout")
    defined = output_of("nm", "-C", "--extern-only", "--defined-only", built[-1]).splitlines()
    names = {line.split(maxsplit=2)[2] for line in defined}
    assert names
    assert {name for name in names if level not in name} == set()


def test_build_info_says_what_was_built():
    from grpo_kernels import _build_info

    built = _build_info.build_info()
    assert built["version"].split("+")[0] == grpo_kernels.__version__
    assert built["cuda_archs"] == re.findall(r"\.sm(\d+)", built["version"])
    assert bool(built["cuda_version"]) == bool(built["cuda_archs"]) == (PACKAGE / "_cuda.so").exists()
    assert PYPROJECT["project"]["dependencies"] == [f"torch>={built['torch_stable_abi']}"]
    x86 = platform.machine() == "x86_64"
    assert built["simd_levels"] == (["baseline", "avx2", "avx512"] if x86 else ["baseline"])
    assert backends.cpu_simd_level() in built["simd_levels"]
    assert built["compiler"] and built["torch_version"]


# ---- what an import needs


def test_importing_brings_in_torch_alone():
    brought = run_python(
        "import sys, torch, torch._dynamo\n"  # the compiler too: torch loads it, and what it needs, on demand
        "before = set(sys.modules)\n"
        "import grpo_kernels\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    ).split()
    assert "grpo_kernels" in brought
    owners = metadata.packages_distributions()
    distributions = {owner for name in brought for owner in owners.get(name, ())}
    assert distributions - {"grpo-kernels", "torch"} == set()


def test_works_with_torch_alone_and_uncompiled(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "grpo_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    script = """
import pathlib, sys
absent = "accelerate datasets jinja2 matplotlib numpy peft rich tqdm transformers triton trl yaml".split()
absent.append("grpo_kernels._build_info")  # an editable install would find what the copy lacks
sys.modules |= dict.fromkeys(absent)
import torch, grpo_kernels
from grpo_kernels import backends, info
assert pathlib.Path(grpo_kernels.__file__).parent.parent == pathlib.Path.cwd(), grpo_kernels.__file__
logits = torch.randn(2, 3, 7, requires_grad=True)
arguments = (logits, torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([1.0, -1.0]), torch.ones(2, 3))
grpo_kernels.grpo_loss(*arguments).loss.backward()
assert logits.grad.abs().sum() > 0
assert backends.resolve("grpo_loss", "auto", torch.device("cpu")) == "torch"
assert backends.cpu_simd_level() is None
try:
    grpo_kernels.grpo_loss(*arguments, backend="cpu")
except RuntimeError as error:
    print(error)
print(info.report())
"""
    printed = run_python(script, first_on_path=tmp_path)
    assert "backend 'cpu' cannot run grpo_loss: the C++ extension is not built" in printed
    assert "build info: none" in printed


# ---- the console script


def test_console_script_reports():
    printed = output_of(Path(sysconfig.get_path("scripts")) / "grpo-kernels", "info")
    assert grpo_kernels.__version__ in printed
    assert torch.__version__ in printed
    assert f"simd level    {backends.cpu_simd_level()}" in printed
    for op in backends.OPS:
        assert re.search(rf"^{op} +yes +yes +(yes|no) +no$", printed, re.MULTILINE), printed
    assert f"cuda          torch's {torch.version.cuda or 'none'}, kernels " in printed
    assert re.search(
        r"^cuda: (the CUDA extension is not built|torch .* is built without CUDA|its tensors must)", printed, re.M
    )
    assert "cuda: it has no cuda kernels; it runs on 'cpu', 'torch', 'triton' (gae, token_divergence, " in printed


def test_report_gives_the_reason(monkeypatch):
    def reason(op, backend, device):
        return f"not on {device}" if (op, backend) == ("grpo_loss", "cpu") else None

    monkeypatch.setattr(backends, "unsupported_reason", reason)
    printed = info.report("meta")
    assert re.search(r"^grpo_loss +no +yes +yes +yes$", printed, re.MULTILINE), printed
    assert "cpu: not on meta (grpo_loss)" in printed


# ---- the README


class _Output(NamedTuple):
    logits: torch.Tensor


def _snippets(section):
    text = (ROOT / "README.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_readme_snippets_of_frameworks_run():
    transformers = pytest.importorskip("transformers")
    trl = pytest.importorskip("trl")
    from grpo_kernels.integrations.trl import unapply

    built = []
    stock = trl.trainer.utils._ChunkedLogProbFunction
    try:
        exec(_snippets("In TRL")[0], dict.fromkeys(("model", "reward", "args", "dataset")) | {
            "GRPOTrainer": lambda **_: built.append(trl.trainer.utils._ChunkedLogProbFunction)})  # fmt: skip
    finally:
        unapply()
    assert built != [stock] and len(built) == 1 and trl.trainer.utils._ChunkedLogProbFunction is stock
    config = transformers.Qwen2Config(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                      num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    ids = torch.arange(5)[None]
    names = {"model": transformers.Qwen2ForCausalLM(config), "input_ids": ids, "labels": ids}
    exec(_snippets("In other frameworks")[1], names)
    assert names["logprobs"].shape == (1, 4) and (names["logprobs"] < 0).all()


def test_readme_snippet_of_an_exact_divergence_runs():
    model, ref_model = (torch.nn.Module() for _ in range(2))
    for module in (model, ref_model):
        module.lm_head = torch.nn.Linear(8, 11, bias=False)
    names = {
        "GRPOLossConfig": grpo_kernels.GRPOLossConfig,
        "model": model,
        "ref_model": ref_model,
        "hidden_states": torch.randn(2, 3, 8),
        "ref_hidden_states": torch.randn(2, 3, 8),
        "completion_ids": torch.zeros(2, 3, dtype=torch.int64),
        "completion_mask": torch.ones(2, 3),
        "advantages": torch.ones(2),
    }
    exec(_snippets("Options of the loss")[0], names)
    names["output"].loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0 and names["output"].metrics["kl"] > 0


def test_readme_snippets_agree():
    before, after = _snippets("In a loop of your own")
    torch.manual_seed(0)
    batch, length, vocabulary = 4, 5, 11
    logits = torch.randn(batch, length + 1, vocabulary)
    values = {
        "torch": torch,
        "T": length,
        "temperature": 0.7,
        "completion_ids": torch.randint(vocabulary, (batch, length)),
        "completion_mask": torch.rand(batch, length) > 0.2,
        "advantages": torch.randn(batch),
        "old_logprobs": -3 + torch.rand(batch, length),
        "ref_logprobs": -3 + torch.rand(batch, length),
        "input_ids": None,
        "attention_mask": None,
    }
    losses, gradients = [], []
    for snippet in (before, after):
        leaf = logits.clone().requires_grad_()
        names = dict(values, model=lambda *_, leaf=leaf, **__: _Output(leaf * 1.0))
        exec(snippet, names)
        losses.append(names["loss"] if "loss" in names else names["output"].loss)
        gradients.append(leaf.grad)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[0].abs().sum() > 0


# ---- metadata


def test_version_is_the_same_everywhere():
    assert metadata.version("grpo-kernels").split("+")[0] == grpo_kernels.__version__
    assert f"## [{grpo_kernels.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_everything_the_makefile_installs_is_pinned():
    pins = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    extras = PYPROJECT["project"]["optional-dependencies"]
    asked = [*PYPROJECT["build-system"]["requires"], *PYPROJECT["project"]["dependencies"]]
    asked += [requirement for name in ("train", "trl", "bench", "test") for requirement in extras[name]]
    assert {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in asked} - pins == set()


def test_a_missing_compiler_is_named(tmp_path):
    checkout = copy_of_checkout(tmp_path)
    environment = dict(os.environ, PATH=str(tmp_path), CXX="no-such-compiler")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib"]
    result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "no C++ compiler found (looked for no-such-compiler)" in result.stderr
    environment |= {"GRPO_KERNELS_CUDA_ARCHS": "90", "CUDACXX": "no-such-nvcc"}
    result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "no CUDA compiler found (looked for no-such-nvcc)" in result.stderr


@pytest.mark.early
@pytest.mark.full
def test_wheel_from_the_sdist(tmp_path):
    checkout = copy_of_checkout(tmp_path)
    without_cuda = dict(os.environ, GRPO_KERNELS_SKIP_CUDA="1")
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path]
    output_of(*command, cwd=checkout, env=without_cuda)
    shutil.rmtree(checkout)
    [sdist] = tmp_path.glob("*.tar.gz")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-cache-dir",
        "-w",
        tmp_path,
    ]
    output_of(*command, sdist, env=without_cuda)
    [wheel] = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name  # one build for every Python

    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    dist_info = f"grpo_kernels-{grpo_kernels.__version__}.dist-info/"
    kinds = {".py", ".yaml", ".json", ".jinja"}
    sources = [path for kind in sorted(kinds) for path in PACKAGE.rglob(f"*{kind}")]
    assert {path.suffix for path in sources} == kinds
    shipped = {"grpo_kernels/_cpu.so", "grpo_kernels/py.typed", dist_info + "licenses/LICENSE"}
    shipped |= {f"grpo_kernels/{path.relative_to(PACKAGE)}" for path in sources}
    assert shipped <= names
    rest = names - shipped
    assert {
        name for name in rest if not re.match(rf"grpo_kernels/_build_info\..*\.so$|{re.escape(dist_info)}", name)
    } == set()

    script = (
        "import torch; from grpo_kernels import backends;"
        "print(backends.__file__, backends.unsupported_reason('grpo_loss', 'cpu', torch.device('cpu')))"
    )
    site = tmp_path / "site"
    assert run_python(script, first_on_path=site).strip() == f"{site}/grpo_kernels/backends.py None"
