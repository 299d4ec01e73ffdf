"""The stage "alive": the least that everything else rests on, in seconds.

Each backend is tried in processes of its own, at the same time: an error of the device that stays with one process
hides nothing of the others.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from interleaved import failure
from testing.calls import SOURCES
from testing.cases import ALL_CASES, Case
from testing.conformance import assert_conforms

from gpu.stage import Stage, main
from grpo_kernels import gae, group_advantages, registry

#: Six conformance cases: an op, a case by name and a dtype.
CONFORMANCE = (
    ("grpo_loss", "plain", torch.bfloat16),
    ("grpo_loss", "dirty_mask", torch.bfloat16),
    ("grpo_loss", "vocab_prime", torch.float32),
    ("token_logprobs", "softcap", torch.bfloat16),
    ("linear_grpo_loss", "plain", torch.bfloat16),
    ("linear_token_logprobs", "strided", torch.bfloat16),
)
_SMALLEST = Case("smallest", batch=2, length=3, vocab=67, hidden=16, divergence="reverse_kl")
#: Processes of each part for Triton on a GPU, which compiles while it runs: a core each. One is enough elsewhere.
_PARTS = {"ops": 4, "conformance": 3}


def run(stage: Stage, options: argparse.Namespace) -> None:
    """Tries fp32 output of a bf16 GEMM, and every op and six conformance cases on each backend."""
    if options.what:
        backend, part, index, count = options.what.split(":")
        _print_checks(backend, part, stage.device, slice(int(index), None, int(count)))
        return
    stage.need_a_backend()
    stage.entry["found"]["checks"] = checks = {}
    resolved = {op: registry.resolve(op, "auto", stage.device) for op in registry.OPS}
    stage.entry["found"]["auto"] = {name: [op for op in resolved if resolved[op] == name] for name in resolved.values()}
    command = [sys.executable, "-m", "gpu.alive", str(stage.path)]
    given = ["--stage", "alive", "--seconds", "0", *(["--dry-run"] if stage.is_dry else [])]
    counts = {(backend, part): count if backend == "triton" and not stage.is_dry else 1
              for backend in stage.backends for part, count in _PARTS.items()}  # fmt: skip
    parts = [f"{':'.join(one)}:{index}:{count}" for one, count in counts.items() for index in range(count)]
    processes = {part: subprocess.Popen([*command, part, *given], stdout=subprocess.PIPE, text=True) for part in parts}
    stage.attempt("addmm", lambda: _check(checks, "addmm into fp32, in place", lambda: add_in_place(stage.device)))
    for part, process in processes.items():
        stage.attempt(part, lambda part=part, process=process: _collect(stage, checks, part, process))
    stage.entry["failed"] += [f"{name}: {text}" for name, text in checks.items() if text != "ok"]


def _collect(stage: Stage, checks: dict[str, str], part: str, process: subprocess.Popen[str]) -> None:
    """Adds what a part prints, as it comes."""
    assert process.stdout is not None
    for line in process.stdout:
        name, text = json.loads(line)
        checks[f"{part.split(':')[0]}, {name}"] = text
        stage.save()
    if process.wait():
        raise RuntimeError(f"its process ended with {process.returncode}")


def _check(checks: dict[str, str], name: str, function: Callable[[], None]) -> None:
    try:
        function()
        checks[name] = "ok"
    except Exception as error:  # of whatever kind: it is this check's line
        checks[name] = ", ".join(failure(error))


def _print_checks(backend: str, part: str, device: torch.device, which: slice) -> None:
    """Prints a line for each check of a part: its name, and "ok" or what failed."""
    functions = checks_of_ops(backend, device) if part == "ops" else checks_of_conformance(backend, device)
    for name, function in list(functions.items())[which]:
        start, found = time.monotonic(), {}
        _check(found, name, function)
        print(json.dumps([name, found[name]]), flush=True)
        print(f"{backend}, {name}: {found[name]}, {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


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


def checks_of_ops(backend: str, device: torch.device) -> dict[str, Callable[[], None]]:
    """The smallest call of every op that the backend has, against the reference."""
    found: dict[str, Callable[[], None]] = {}
    for op in SOURCES:
        if registry.supports(op, backend, device):
            found[op] = lambda op=op: assert_conforms(op, backend, _SMALLEST, torch.bfloat16, device)
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.5], device=device)

    def advantages() -> None:
        result, expected = (group_advantages(rewards, 2, backend=name) for name in (backend, "torch"))
        torch.testing.assert_close(result, expected)

    def estimate() -> None:
        values = torch.arange(6.0, device=device).view(2, 3) / 7
        results, expected = (gae(values, values.flip(0), torch.ones_like(values), backend=name)
                             for name in (backend, "torch"))  # fmt: skip
        torch.testing.assert_close(tuple(results), tuple(expected))

    found["group_advantages"] = advantages
    if registry.supports("gae", backend, device):
        found["gae"] = estimate
    return found


def checks_of_conformance(backend: str, device: torch.device) -> dict[str, Callable[[], None]]:
    """``CONFORMANCE``."""
    cases = {case.name: case for case in ALL_CASES}
    return {
        f"{op} {name} {str(dtype)[6:]}": lambda op=op, name=name, dtype=dtype: assert_conforms(
            op, backend, cases[name], dtype, device
        )
        for op, name, dtype in CONFORMANCE
    }


if __name__ == "__main__":
    sys.exit(main(run))
