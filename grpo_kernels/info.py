"""What is installed and what runs here, as `grpo-kernels info` prints it."""

from __future__ import annotations

import importlib
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from grpo_kernels import backends
from grpo_kernels.version import __version__


def report(device: torch.device | str | None = None) -> str:
    """Versions, how the C++ parts were built, and which backend runs which op on ``device``.

    Args:
        device: None means the CPU, and the GPU where torch sees one.
    """
    devices = _devices() if device is None else [torch.device(device)]
    sections = [_versions(), _build(), *map(_backends, devices)]
    return "\n\n".join("\n".join(lines) for lines in sections)


def versions() -> dict[str, str]:
    """What a run depends on, by name."""
    names = {"grpo_kernels": __version__, "python": platform.python_version(), "platform": platform.platform()}
    names["torch"] = torch.__version__
    names |= {name: _installed(name) for name in ("transformers", "accelerate", "triton")}
    return names if torch.version.cuda is None else names | {"cuda": torch.version.cuda}


def _devices() -> list[torch.device]:
    gpu = torch.accelerator.current_accelerator(check_available=True)
    served = gpu is not None and gpu.type in backends.PREFERENCE
    return [torch.device("cpu"), torch.device(gpu.type, 0)] if served else [torch.device("cpu")]


def _versions() -> list[str]:
    rows = [
        ("grpo-kernels", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
    ]
    rows += [(name, _installed(name)) for name in ("transformers", "trl", "triton")]
    rows.append(("simd level", backends.cpu_simd_level() or "none: the C++ kernels are not loaded"))
    architectures = ", ".join(f"sm_{arch}" for arch in backends.cuda_architectures())
    rows.append(("cuda", f"torch's {torch.version.cuda or 'none'}, kernels {architectures or 'not loaded'}"))
    return _table(rows)


def _installed(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _build() -> list[str]:
    try:
        info = importlib.import_module("grpo_kernels._build_info").build_info()
    except ImportError as error:
        return [f"build info: none ({error})"]
    rows = [(name.replace("_", " "), _value(value)) for name, value in info.items()]
    return ["build", *_table(rows, indent="  ")]


def _value(value: object) -> str:
    return (", ".join(map(str, value)) if isinstance(value, list) else str(value)) or "none"


def _backends(device: torch.device) -> list[str]:
    reasons = {
        (op, backend): backends.unsupported_reason(op, backend, device=device)
        for op in backends.OPS
        for backend in backends.BACKENDS
    }
    rows = [(f"on {device}", *backends.BACKENDS)]
    rows += [(op, *("no" if reasons[op, backend] else "yes" for backend in backends.BACKENDS)) for op in backends.OPS]
    lines = _table(rows)
    notes: dict[str, list[str]] = {}
    for (op, backend), reason in reasons.items():
        if reason:
            notes.setdefault(f"{backend}: {reason}", []).append(op)
    for note, ops in notes.items():
        lines.append(note if len(ops) == len(backends.OPS) else f"{note} ({', '.join(ops)})")
    return lines


def _table(rows: list[tuple[str, ...]], indent: str = "") -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        (indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]
