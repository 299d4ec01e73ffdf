"""The stage "build": takes the CUDA library that is there and loads; else builds one for this GPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import torch

from gpu.identity import KIT, ROOT, sources_digest
from gpu.stage import RunningStage, main

_ARCHITECTURES = """
from grpo_kernels import backends
print(backends._CUDA_ERROR or "for " + ", ".join(f"sm_{arch}" for arch in backends.cuda_architectures()))
"""


def run(stage: RunningStage, options: argparse.Namespace) -> None:
    """Says which architectures the library that is there has, or builds it; a build that fails leaves Triton's part."""
    if stage.device.type == "cuda":
        _try_the_allocator(stage)
    what = _library()
    if what.startswith("for "):
        stage.entry["found"]["library"] = f"was there, {what}"
        if KIT.exists() and json.loads(KIT.read_text())["csrc"] != sources_digest(ROOT, ("csrc",)):
            stage.entry["failed"].append("the library was built from other sources than these: run make gpu-kit again")
        return
    print(what)
    if stage.is_dry:
        stage.leave_out(f"a dry run builds nothing: {what}")
        return
    stage.attempt("the CUDA library", lambda: _build(stage), seconds=170)


def _build(stage: RunningStage) -> None:
    major, minor = torch.cuda.get_device_capability()
    environment = os.environ | {"GRPO_KERNELS_CUDA_ARCHS": f"{10 * major + minor}"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    what = _library()
    assert what.startswith("for "), f"it was built and does not load: {what}"
    stage.entry["found"]["library"] = f"built here, {what}"


def _library() -> str:
    """The architectures of the library that is there, as "for sm_90", or why none loads: asked of a new process."""
    done = subprocess.run([sys.executable, "-c", _ARCHITECTURES], cwd=ROOT, capture_output=True, text=True)
    return (done.stdout.strip() or done.stderr.strip() or "no answer").splitlines()[-1]


def _try_the_allocator(stage: RunningStage) -> None:
    """Notes for the other stages where memory that grows in place does not work, by one allocation."""
    try:
        torch.empty(64 << 20, device=stage.device).zero_()
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"without expandable segments: {error}")
        stage.results.extra["allocator"] = ""


if __name__ == "__main__":
    sys.exit(main(run))
