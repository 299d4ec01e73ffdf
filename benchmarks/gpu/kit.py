"""Prepares a checkout for a GPU machine without a network: built libraries, and the peers' packages that it may lack.

Builds the CUDA and the C++ library into the package, installs the packages into ``build/gpu-kit/site``, writes down the
commit, says the size of it all and prints the command to run there. Needs nvcc and no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from gpu.identity import KIT, ROOT, commit, sources_digest

#: What stages import that a machine with torch, Triton, transformers, accelerate, pandas, xxhash and pytest may lack;
#: pinned by constraints.txt, and of no platform: multiprocess has a wheel for each Python, of Python alone.
PACKAGES = ("trl", "liger-kernel", "datasets", "dill", "multiprocess")
MOST_BYTES = 64 << 20


def build_libraries(architecture: str) -> list[Path]:
    """Builds the package's libraries in place; returns those to carry."""
    environment = os.environ | {"GRPO_KERNELS_CUDA_ARCHS": architecture}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return [ROOT / "grpo_kernels" / name for name in ("_cuda.so", "_cpu.so")]


def install_packages(folder: Path, python: str) -> None:
    """Installs the packages for another Python into a folder, without what they need."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--no-compile"]
    command += ["--python-version", python, "--implementation", "cp", "--target", str(folder)]
    subprocess.run([*command, "--constraint", str(ROOT / "constraints.txt"), *PACKAGES], check=True)


def tree_bytes() -> int:
    """Bytes of what git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sum((ROOT / name).stat().st_size for name in names if name and (ROOT / name).is_file())


def command_there(site: Path) -> str:
    """What to run on the GPU machine, in the checkout's root."""
    return f"PYTHONPATH=.:benchmarks:{site.relative_to(ROOT)} python3 -m gpu --results gpu-results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", default="90", help="the GPU's architecture, as 90 for 9.0; PTX for newer ones is added"
    )
    parser.add_argument("--python", default="3.12", help="the Python there")
    options = parser.parse_args()
    libraries = build_libraries(options.arch)
    site = KIT.parent / "site"
    if KIT.parent.exists():
        shutil.rmtree(KIT.parent)
    install_packages(site, options.python)
    digests = {"csrc": sources_digest(ROOT, ("csrc",)), "sources": sources_digest()}
    KIT.write_text(json.dumps({"commit": commit(), **digests}) + "\n")
    sizes = {str(path.relative_to(ROOT)): path.stat().st_size for path in libraries}
    sizes |= {str(site.relative_to(ROOT)): sum(path.stat().st_size for path in site.rglob("*") if path.is_file())}
    sizes["the tree"] = tree_bytes()
    total = sum(sizes.values())
    for name, size in sizes.items():
        print(f"{size / 2**20:8.1f} MiB  {name}")
    print(f"{total / 2**20:8.1f} MiB  together (at most {MOST_BYTES >> 20})")
    if total > MOST_BYTES:
        print("too large", file=sys.stderr)
        return 1
    print(f"\nCarry with the tree: {' '.join(str(path.relative_to(ROOT)) for path in libraries)} "
          f"{KIT.parent.relative_to(ROOT)}\nRun there: {command_there(site)}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
