"""Prepares a checkout for a GPU machine without a network: built libraries, and wheels of the peers that it may lack.

Builds the CUDA and the C++ library into the package, downloads the wheels into ``build/gpu-kit/wheels``, writes down
the commit, says the size of it all and prints the command to run there. Needs nvcc and no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from gpu.identity import KIT, ROOT, commit, sources_digest

#: What stages import that a machine with torch, Triton, transformers, accelerate, pandas, xxhash and pytest may lack;
#: pinned by constraints.txt, and of no platform but for multiprocess, which has a wheel for each Python.
PACKAGES = ("trl", "liger-kernel", "datasets", "dill", "multiprocess")
MOST_BYTES = 64 << 20


def build_libraries(architecture: str) -> list[Path]:
    """Builds the package's libraries in place; returns those to carry."""
    environment = os.environ | {"GRPO_KERNELS_CUDA_ARCHS": architecture}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return [ROOT / "grpo_kernels" / name for name in ("_cuda.so", "_cpu.so")]


def download_wheels(folder: Path, python: str) -> None:
    """Downloads the wheels for another Python, without what they need."""
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    subprocess.run([*command, "--constraint", str(ROOT / "constraints.txt"), *PACKAGES], check=True)


def tree_bytes() -> int:
    """Bytes of what git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sum((ROOT / name).stat().st_size for name in names if name and (ROOT / name).is_file())


def command_there(wheels: Path) -> str:
    """What to run on the GPU machine, in the checkout's root."""
    site = wheels.with_name("site").relative_to(ROOT)
    install = f"python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target {site}"
    run = f"PYTHONPATH=.:benchmarks:{site} python3 -m gpu --results gpu-results"
    # one by one: a wheel that the Python there refuses keeps out no other
    return f"for wheel in {wheels.relative_to(ROOT)}/*.whl; do {install} $wheel; done; {run}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", default="90", help="the GPU's architecture, as 90 for 9.0; PTX for newer ones is added"
    )
    parser.add_argument("--python", default="3.12", help="the Python there")
    options = parser.parse_args()
    libraries = build_libraries(options.arch)
    wheels = KIT.parent / "wheels"
    download_wheels(wheels, options.python)
    KIT.write_text(json.dumps({"commit": commit(), "csrc": sources_digest(ROOT, ("csrc",))}) + "\n")
    carried = [*libraries, KIT, *wheels.glob("*.whl")]
    sizes = {str(path.relative_to(ROOT)): path.stat().st_size for path in carried} | {"the tree": tree_bytes()}
    total = sum(sizes.values())
    for name, size in sizes.items():
        print(f"{size / 2**20:8.1f} MiB  {name}")
    print(f"{total / 2**20:8.1f} MiB  together (at most {MOST_BYTES >> 20})")
    if total > MOST_BYTES:
        print("too large", file=sys.stderr)
        return 1
    print(f"\nCarry with the tree: {' '.join(str(path.relative_to(ROOT)) for path in libraries)} "
          f"{KIT.parent.relative_to(ROOT)}\nRun there: {command_there(wheels)}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
