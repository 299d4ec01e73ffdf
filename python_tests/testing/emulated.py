"""The CUDA kernels run on the host, by csrc/emulation: what they compute, where there is no GPU."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import torch

from grpo_kernels import backends
from grpo_kernels.device_values import first_bad

_CPU = torch.device("cpu")
_ROOT = Path(__file__).parents[2]
_DEVICE = (90, 227 * 1024, 2)


@cache
def library() -> Path:
    """csrc/cuda compiled for the host, of a checkout; built where it is not, by one process of several.

    Raises:
        subprocess.CalledProcessError: It does not compile.
    """
    build = _ROOT / "build" / "emulated"
    build.mkdir(parents=True, exist_ok=True)
    scripts = sysconfig.get_path("scripts")
    cmake, ninja = (shutil.which(name, path=scripts) or name for name in ("cmake", "ninja"))
    options = [f"-DGRPO_KERNELS_TORCH_DIR={Path(torch.__file__).parent}", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    with open(build / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = [cmake, "-S", _ROOT, "-B", build, "-G", "Ninja", *options]
        for command in (configure, [cmake, "--build", build, "--target", "_cuda_emulated"]):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return build / "_cuda_emulated.so"


def _reason(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"it is emulated: its tensors must be on the CPU, got {device}"


@contextmanager
def emulated(
    capability: int = _DEVICE[0], shared_bytes: int = _DEVICE[1], processors: int = _DEVICE[2]
) -> Iterator[None]:
    """Within it ``backend="cuda"`` runs on the CPU.

    Args:
        capability: Of the device; below 90 it has no clusters.
        shared_bytes: Of a block at most: the less there are, the larger are the clusters that hold a row.
        processors: Which decides how many blocks take rows in turn.
    """
    torch.ops.load_library(str(library()))
    ops = torch.ops.grpo_kernels
    ops.emulated_keep_first_bad(first_bad(_CPU))
    ops.emulated_set_device(capability, shared_bytes, processors)
    try:
        with mock.patch.dict(backends._REASONS, {"cuda": _reason}):
            yield
    finally:
        ops.emulated_set_device(*_DEVICE)
