"""The stage "bytes": what our loss kernels move to and from a GPU's memory, by Nsight Compute, beside the least."""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from gpu.sizes import Sizes
from gpu.stage import RunningStage, main

#: The loss kernels by backend: each must read and write the logits' N V s bytes once.
KERNELS = {"cuda": ("loss_on_chip", "loss_in_two_passes"), "triton": ("_grpo_loss_kernel",)}
_NAMES = "|".join(name for names in KERNELS.values() for name in names)
TARGET = 0.05  # most that the sum is meant to be off by, relative
_METRICS = {"read": "dram__bytes_read.sum", "written": "dram__bytes_write.sum"}
_UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


class NotCountedError(RuntimeError):
    """Nsight Compute is there and cannot read the counters, as where only an administrator may."""


def find_ncu() -> str | None:
    """Nsight Compute: on PATH, of the CUDA toolkit, or the newest of its own packages."""
    packages = sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)
    return shutil.which("ncu", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin",
                                                     *map(str, packages)]))  # fmt: skip


def parse(log: str) -> list[tuple[str, dict[str, float]]]:
    """The kernels of a log of ``ncu --csv``, in the order of their launches, with the bytes read and written.

    Raises:
        ValueError: A metric is missing, has no number, or a unit that is none of bytes.
    """
    lines = [line for line in log.splitlines() if line.startswith('"')]  # the rest is what ncu says beside the table
    found: dict[tuple[str, str], tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader(lines):
        names = [name for name, metric in _METRICS.items() if metric == row.get("Metric Name")]
        if names:
            value, unit = row["Metric Value"], row["Metric Unit"]
            if unit not in _UNITS or not re.fullmatch(r"[\d,]+(\.\d+)?", value):
                raise ValueError(f"ncu tells no bytes of {row['Metric Name']}: {value!r} {unit!r}")
            launch = found.setdefault((row["Process ID"], row["ID"]), (row["Kernel Name"], {}))
            launch[1][names[0]] = float(value.replace(",", "")) * _UNITS[unit]
    for kernel, moved in found.values():
        if moved.keys() != _METRICS.keys():
            raise ValueError(f"ncu tells only the bytes {', '.join(moved)} of {kernel}")
    return list(found.values())


def beside_counted(launches: list[tuple[str, dict[str, float]]], tokens: int, vocab: int) -> list[dict[str, Any]]:
    """A row for each launch of ours, over bf16 logits: bytes read, written and counted, and their ratio."""
    rows = []
    for name, moved in launches:
        kernel = re.search(rf"\b({_NAMES})\b", name)[0]
        counted = 2 * tokens * vocab * 2
        ratio = (moved["read"] + moved["written"]) / counted
        shape = {"kernel": kernel, "N": tokens, "V": vocab}
        rows.append({**shape, **moved, "counted": counted, "ratio": ratio, "target": TARGET})
    return rows


def measure(ncu: str, backends: Collection[str], tokens: int, vocab: int) -> list[dict[str, Any]]:
    """``beside_counted`` of ``grpo_loss`` in place, by every backend.

    Args:
        ncu: Its path.
        backends: Ours.
        tokens, vocab: N and V.

    Raises:
        NotCountedError: The counters cannot be read.
        RuntimeError: The process that was profiled failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [ncu, "--clock-control", "none", "--metrics", ",".join(_METRICS.values()), "--csv", "--print-units",
                   "base", "--kernel-name", f"regex:^({_NAMES})$", "--log-file", str(log),
                   sys.executable, "-m", "gpu.dram_launches", str(tokens), str(vocab), *backends]  # fmt: skip
        done = subprocess.run(command, env=os.environ | {"LC_ALL": "C"}, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)  # fmt: skip
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    launches = parse(text)
    if not launches:
        errors = [line for line in (text + done.stdout).splitlines() if line.startswith("==ERROR==")]
        own = [line for line in errors if "application returned an error" not in line]
        if own:
            raise NotCountedError(own[0].removeprefix("==ERROR==").strip())
    rows = beside_counted(launches, tokens, vocab)
    missing = [name for name in backends if not any(row["kernel"] in KERNELS[name] for row in rows)]
    if missing:
        raise RuntimeError(f"ncu profiled no kernel of ours of {', '.join(missing)}: {(text + done.stdout)[-300:]}")
    return rows


def run(stage: RunningStage, options: argparse.Namespace) -> None:
    """Counts the bytes of the loss kernels, where Nsight Compute is there and may read the counters."""
    stage.need_a_backend()
    sizes = Sizes.dry() if stage.is_dry else Sizes()
    ncu = find_ncu()
    if ncu is None:
        stage.leave_out("ncu is neither on PATH nor where CUDA is installed")
        return

    def count() -> None:
        try:
            rows = measure(ncu, stage.backends, sizes.tokens[0], sizes.vocabularies[0])
        except NotCountedError as error:
            stage.leave_out(str(error))
            return
        stage.entry["found"]["dram"] = rows
        over = [f"{row['kernel']} {row['ratio']:.3f}" for row in rows if abs(row["ratio"] - 1) > TARGET]
        assert not over, f"bytes over those that must move: {', '.join(over)}"

    stage.attempt("DRAM bytes", count, seconds=95)


if __name__ == "__main__":
    sys.exit(main(run))
