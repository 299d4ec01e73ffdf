"""The stage "alive": the least that everything else rests on, in seconds.

Each backend is tried in processes of its own, at the same time: an error of the device that stays with one process
hides nothing of the others.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time

import torch

from gpu.alive_checks import outcome_of
from gpu.stage import RunningStage, main
from gpu.stages import NO_TIME
from grpo_kernels import backends

#: Processes for Triton on a GPU, which compiles while it runs: a core each. One is enough elsewhere.
_PROCESSES = 6


def run(stage: RunningStage, options: argparse.Namespace) -> None:
    """Tries fp32 output of a bf16 GEMM, and every op and six conformance cases on each backend."""
    counts = {name: _PROCESSES if name == "triton" and not stage.is_dry else 1 for name in stage.backends}
    command = [sys.executable, "-m", "gpu.alive_checks", stage.device.type]
    shares = {f"{name}, {index + 1} of {count}": [name, str(index), str(count)]
              for name, count in counts.items() for index in range(count)}  # fmt: skip
    processes = {share: subprocess.Popen([*command, *given], stdout=subprocess.PIPE, text=True)
                 for share, given in shares.items()}  # fmt: skip
    stage.need_a_backend()
    stage.entry["found"]["checks"] = checks = {}
    resolved = {op: backends.resolve(op, "auto", stage.device) for op in backends.OPS}
    stage.entry["found"]["auto"] = {name: [op for op in resolved if resolved[op] == name] for name in resolved.values()}
    checks["addmm into fp32, in place"] = outcome_of(lambda: add_in_place(stage.device))
    lines: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    for share, process in processes.items():
        threading.Thread(target=_read, args=(share, process, lines), daemon=True).start()
    running = set(processes)
    while running:
        try:
            share, line = lines.get(timeout=max(0.0, stage.deadline - time.monotonic()))
        except queue.Empty:
            stage.entry["failed"] += [f"{share}: {NO_TIME}" for share in sorted(running)]
            break
        if line:
            name, text = json.loads(line)
            checks[f"{share.split(',')[0]}, {name}"] = text
            stage.save()
        else:
            running.discard(share)
            if processes[share].wait():
                stage.entry["failed"].append(f"{share}: its process ended with {processes[share].returncode}")
    stage.entry["failed"] += [f"{name}: {text}" for name, text in checks.items() if text != "ok"]


def _read(share: str, process: subprocess.Popen[str], lines: queue.SimpleQueue[tuple[str, str]]) -> None:
    """Hands on what a process prints, and an empty line at its end."""
    assert process.stdout is not None
    for line in process.stdout:
        lines.put((share, line))
    lines.put((share, ""))


def add_in_place(device: torch.device) -> None:
    """A bf16 product added to an fp32 matrix in place, which every head of several chunks rests on."""
    torch.manual_seed(0)
    a, b = (torch.randn(shape, device=device).to(torch.bfloat16) for shape in ((64, 32), (32, 48)))
    total = torch.ones(64, 48, device=device)
    expected = total.double() + a.double() @ b.double()
    if device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:  # there is no such GEMM on a CPU, where heads widen their factors
        torch.addmm(total, a.float(), b.float(), out=total)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-4)


if __name__ == "__main__":
    sys.exit(main(run))
