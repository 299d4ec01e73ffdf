"""The checks of the stage "alive", of one backend: a process prints a line of JSON for each, its name and outcome."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable

import torch
from interleaved import failure
from testing.calls import SOURCES
from testing.cases import ALL_CASES, Case
from testing.conformance import assert_conforms

from grpo_kernels import backends, gae, group_advantages

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
#: A row as it is timed: the first that several blocks of a cluster share.
_LARGE = Case("large", batch=2, length=4, vocab=151936)


def outcome_of(function: Callable[[], None]) -> str:
    """ "ok", or what failed."""
    try:
        function()
    except Exception as error:  # of whatever kind: it is this check's line
        traceback.print_exc()
        return ", ".join(failure(error))
    return "ok"


def checks_of_ops(backend: str, device: torch.device) -> dict[str, Callable[[], None]]:
    """The smallest call of every op that the backend has, against the reference."""
    found: dict[str, Callable[[], None]] = {}
    for op in SOURCES:
        if backends.supports(op, backend, device):
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
    if backends.supports("gae", backend, device):
        found["gae"] = estimate
    return found


def checks_of_conformance(backend: str, device: torch.device) -> dict[str, Callable[[], None]]:
    """``CONFORMANCE``, and on a GPU a row as it is timed."""
    cases = {case.name: case for case in ALL_CASES}
    large = {"grpo_loss V=151936": lambda: assert_conforms("grpo_loss", backend, _LARGE, torch.bfloat16, device)}
    return (large if device.type == "cuda" else {}) | {
        f"{op} {name} {str(dtype)[6:]}": lambda op=op, name=name, dtype=dtype: assert_conforms(
            op, backend, cases[name], dtype, device
        )
        for op, name, dtype in CONFORMANCE
    }


def main() -> None:
    """Does every ``count``-th check from the ``index``-th on: ``alive_checks DEVICE BACKEND INDEX COUNT``."""
    device, backend, index, count = sys.argv[1:]
    checks = checks_of_conformance(backend, torch.device(device)) | checks_of_ops(backend, torch.device(device))
    is_lost = False
    for name, function in list(checks.items())[int(index) :: int(count)]:
        start = time.monotonic()
        text = "not done: the GPU has been in an error since the check before" if is_lost else outcome_of(function)
        is_lost = is_lost or (device == "cuda" and outcome_of(torch.cuda.synchronize) != "ok")
        print(json.dumps([name, text]), flush=True)
        print(f"{backend}, {name}: {text}, {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
