"""The stage "build": takes the CUDA library that is there and loads; else builds one for this GPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import torch

from gpu.identity import KIT, ROOT, sources_digest
from gpu.stage import Stage, main

_ARCHITECTURES = "from grpo_kernels import registry; print(*registry.cuda_architectures())"


def run(stage: Stage, options: argparse.Namespace) -> None:
    """Says which architectures the library that is there has, or builds it; a build that fails leaves Triton's part."""
    built = _built_for()
    if built:
        stage.entry["found"]["library"] = f"was there, for {built}{_other_sources()}"
        return
    if stage.is_dry:
        stage.leave_out("a dry run builds nothing")
        return
    major, minor = torch.cuda.get_device_capability()
    environment = os.environ | {"GRPO_KERNELS_CUDA_ARCHS": f"{10 * major + minor}"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    built = _built_for()
    if not built:
        raise SystemExit("the CUDA library was built and does not load")
    stage.entry["found"]["library"] = f"built here, for {built}"


def _built_for() -> str:
    """The architectures of the library that is there and loads, asked in a process that loads it anew."""
    done = subprocess.run([sys.executable, "-c", _ARCHITECTURES], cwd=ROOT, capture_output=True, text=True)
    return ", ".join(f"sm_{arch}" for arch in done.stdout.split()) if done.returncode == 0 else ""


def _other_sources() -> str:
    """That the kit's library was made of other sources than these, if it was."""
    if not KIT.exists() or json.loads(KIT.read_text())["csrc"] == sources_digest(ROOT, ("csrc",)):
        return ""
    return ", built from other sources than these: run make gpu-kit again"


if __name__ == "__main__":
    sys.exit(main(run))
