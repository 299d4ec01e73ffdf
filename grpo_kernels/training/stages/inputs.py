"""What a stage reads from the disk at hand, so that a stage that is done notices when it has changed since."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_kernels.rewards import BUILT_IN
from grpo_kernels.training.tasks import TASKS

_HASHED = 2**24  # bytes: of larger files, as weights are, the size and the time of the last change must do
_PATHS = ("model_name_or_path", "teacher_model_name_or_path", "dataset_name", "data")


def fingerprints(config: Mapping[str, Any]) -> dict[str, str]:
    """Of each file or folder that a stage reads, by its name in the recipe; what is on the Hub has none.

    These are models, datasets and rows, reward models, and the modules that reward functions are named in, but not what
    those import.

    Args:
        config: The stage's recipe, as ``config.yaml`` has it.
    """
    paths = {config[key]: Path(config[key]).expanduser() for key in _PATHS if config.get(key) not in (None, *TASKS)}
    for reward in filter(None, (*config.get("reward_funcs", ()), *(config.get("keep") or ()), config.get("check"))):
        name = reward.partition("(")[0].strip()
        module = sys.modules.get(name.partition(":")[0].removesuffix(".py")) if ":" in name else None
        if name not in BUILT_IN:
            paths[name] = Path(getattr(module, "__file__", None) or name).expanduser()
    output_dir = Path(config["output_dir"]).resolve()
    return {
        name: _fingerprint(path, output_dir, with_folders=name == config.get("dataset_name"))
        for name, path in paths.items() if path.exists()
    }  # fmt: skip


def _fingerprint(path: Path, output_dir: Path, *, with_folders: bool) -> str:
    """Of a file, or of a folder's files that are neither hidden nor written by stages."""
    files = [path]
    if path.is_dir():
        written = output_dir.parent if path.resolve() in output_dir.parent.parents else output_dir
        files = [file for file in (path.rglob("*") if with_folders else path.iterdir()) if file.is_file()]
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        files = [file for file in files if written not in file.resolve().parents]
    digest = hashlib.sha256()
    for file in sorted(files):
        state = file.stat()
        is_small = state.st_size <= _HASHED
        content = hashlib.sha256(file.read_bytes()).hexdigest() if is_small else f"{state.st_size} {state.st_mtime_ns}"
        digest.update(f"{file.relative_to(path).as_posix()}\n{content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
