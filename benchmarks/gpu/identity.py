"""What results depend on: an earlier run's stages count only where all of it is the same."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
#: Of a checkout without git, as it is copied to a machine: written by kit.py.
KIT = ROOT / "build" / "gpu-kit" / "kit.json"
_SOURCES = ("grpo_kernels", "csrc", "benchmarks", "python_tests")
_FILES = ("setup.py", "CMakeLists.txt", "constraints.txt")
_SUFFIXES = (".py", ".json", ".cpp", ".h", ".cu", ".cuh")


def commit(root: Path = ROOT) -> str:
    """The commit that is checked out, by git or by a kit of the same sources; "unknown" without either."""
    if shutil.which("git") is not None:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
        if found.returncode == 0:
            return found.stdout.strip()
    path = root / KIT.relative_to(ROOT)
    kit = json.loads(path.read_text()) if path.exists() else {}
    return kit["commit"] if kit and kit["sources"] == sources_digest(root) else "unknown"


def sources_digest(root: Path = ROOT, folders: tuple[str, ...] = _SOURCES) -> str:
    """A digest of the sources as they are: it changes with every uncommitted change too."""
    digest = hashlib.sha256()
    results = root / "benchmarks" / "results"
    paths = [path for folder in folders for path in (root / folder).rglob("*") if path.suffix in _SUFFIXES]
    for path in sorted([*paths, *(root / name for name in _FILES if (root / name).exists())]):
        if results not in path.parents:
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def library_digest() -> str:
    """A digest of the CUDA library that is there; "none" without one."""
    library = ROOT / "grpo_kernels" / "_cuda.so"
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16] if library.exists() else "none"


def identity(device: torch.device) -> dict[str, str]:
    """Commit, sources, CUDA library, device, torch and Triton."""
    return {
        "commit": commit(),
        "sources": sources_digest(),
        "library": library_digest(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "dry run",
        "torch": torch.__version__,
        "triton": metadata.version("triton") if importlib.util.find_spec("triton") else "none",
    }
