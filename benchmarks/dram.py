"""Bytes that our row kernels move to and from a GPU's memory, as Nsight Compute counts them, beside what they must.

Run as a script, it is the process that is profiled: a few launches and nothing else.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from gpu_work import calls
from problems import buffer, logits_problem, refill

#: How many times a kernel must read and write the logits' N V s bytes.
KERNELS = {
    "loss_on_chip": (1, 1),
    "loss_in_two_passes": (1, 1),
    "statistics_of_rows": (1, 0),
    "gradient_of_rows": (1, 1),
    "_grpo_loss_kernel": (1, 1),
    "_token_logprobs_fwd_kernel": (1, 0),
    "_token_logprobs_bwd_kernel": (1, 1),
}
ASKED = 0.05  # most that the sum is meant to be off by, relative
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
        kernel = re.search(rf"\b({'|'.join(KERNELS)})\b", name)[0]
        counted = sum(KERNELS[kernel]) * tokens * vocab * 2
        ratio = (moved["read"] + moved["written"]) / counted
        rows.append({"kernel": kernel, "N": tokens, "V": vocab, **moved, "counted": counted, "ratio": ratio})
    return rows


def told(row: dict[str, Any]) -> str:
    """A row of ``beside_counted`` as a sentence."""
    read, written, counted = (row[name] / 1e9 for name in ("read", "written", "counted"))
    return (
        f"DRAM bytes of {row['kernel']}, N={row['N']} V={row['V']} bfloat16: {read:.3f} GB read, {written:.3f} GB "
        f"written, {row['ratio']:.3f} of the {counted:.3f} GB that it must (asked: within {ASKED:.0%})"
    )


def measure(ncu: str, backends: Collection[str], tokens: int, vocab: int, seconds: float) -> list[dict[str, Any]]:
    """``beside_counted`` of ``grpo_loss`` and ``token_logprobs`` in place, by every backend.

    Args:
        ncu: Its path.
        backends: Ours.
        tokens, vocab: N and V.
        seconds: After which it is stopped.

    Raises:
        NotCountedError: The counters cannot be read.
        RuntimeError: The process that was profiled failed, or time ran out.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [ncu, "--clock-control", "none", "--metrics", ",".join(_METRICS.values()), "--csv", "--print-units",
                   "base", "--kernel-name", f"regex:^({'|'.join(KERNELS)})$", "--log-file", str(log),
                   sys.executable, __file__, str(tokens), str(vocab), *backends]  # fmt: skip
        process = subprocess.Popen(
            command, env=os.environ | {"LC_ALL": "C"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise RuntimeError(f"ncu took over {seconds:.0f} s: {output[-300:]}") from None
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    launches = parse(text)
    if not launches:
        errors = [line for line in (text + output).splitlines() if line.startswith("==ERROR==")]
        own = [line for line in errors if "application returned an error" not in line]
        if own:
            raise NotCountedError(own[0].removeprefix("==ERROR==").strip())
        raise RuntimeError(f"ncu profiled no kernel of ours: {(text + output)[-300:]}")
    return beside_counted(launches, tokens, vocab)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=int)
    parser.add_argument("vocab", type=int)
    parser.add_argument("backends", nargs="+")
    options = parser.parse_args()
    problem = logits_problem(options.tokens, options.vocab, torch.bfloat16, "cuda")
    work = buffer(problem)
    for backend in options.backends:
        steps = calls(problem, work, backend)
        for name in ("grpo_loss", "token_logprobs, both"):
            refill(work, problem)
            steps[name]()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
