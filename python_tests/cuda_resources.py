"""Registers, shared memory and spills of every CUDA kernel, as ptxas tells them and as they are recorded.

``NVCC_APPEND_FLAGS=-Xptxas=-v make wheel CUDA_ARCHS="80;90;100" 2>&1 | python python_tests/cuda_resources.py`` records
them anew, for the toolkit that was used. Shared memory is what is declared: what a launch asks for depends on the row.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("cuda_resources.json")
_KERNEL = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for '(?P<arch>sm_\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


class Usage(NamedTuple):
    """Of one kernel on one architecture; all but registers in bytes."""

    registers: int
    shared: int
    spilled: int  # and other memory of a thread's own


def demangled(symbols: list[str]) -> list[str]:
    """Kernels' names with their template arguments, without namespaces and parameters."""
    told = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    short = re.sub(r"\(anonymous namespace\)::|\(grpo::cuda::\w+\)|\b\w+::", "", told)
    return [re.sub(r"^(void )?(\w+(<[^()]*>)?)\(.*", r"\2", line) for line in short.splitlines()]


def parse(log: str) -> dict[str, dict[str, Usage]]:
    """What the output of a build with ``-Xptxas=-v`` tells: by kernel and architecture."""
    found = list(_KERNEL.finditer(log))
    usages: dict[str, dict[str, Usage]] = {}
    for name, match in zip(demangled([match["symbol"] for match in found]), found, strict=True):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        spilled = sum(int(match[key]) for key in ("stack", "stores", "loads"))
        usages.setdefault(name, {})[match["arch"]] = Usage(
            int(match["registers"]), int(shared[1]) if shared else 0, spilled
        )
    return usages


def nvcc_release() -> str:
    """Of the nvcc on PATH, as "13.0"; empty without one."""
    if shutil.which("nvcc") is None:
        return ""
    told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", told)[1]  # type: ignore[index]


def recorded() -> tuple[str, dict[str, dict[str, Usage]]]:
    """The release of nvcc, and what its kernels took."""
    table = json.loads(FILE.read_text())
    kernels = {
        name: {arch: Usage(*numbers) for arch, numbers in archs.items()} for name, archs in table["kernels"].items()
    }
    return table["nvcc"], kernels


def write(usages: dict[str, dict[str, Usage]]) -> None:
    """Records what was parsed, a line a kernel."""
    lines = [f"    {json.dumps(name)}: {json.dumps(usages[name])}" for name in sorted(usages)]
    kernels = ",\n".join(lines)
    FILE.write_text(f'{{\n  "nvcc": "{nvcc_release()}",\n  "kernels": {{\n{kernels}\n  }}\n}}\n')


if __name__ == "__main__":
    told = parse(sys.stdin.read())
    if not told:
        sys.exit("no kernel was compiled: is -Xptxas=-v in NVCC_APPEND_FLAGS?")
    write(told)
    print(f"{len(told)} kernels are recorded in {FILE.name}")
