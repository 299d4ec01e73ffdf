"""What every Triton kernel takes of a GPU, compiled without one, as it is recorded for releases of Triton.

``python python_tests/triton_resources.py`` records it anew for the release that is installed. For another one:
``pip install --no-deps --target build/triton triton==3.6.0``, then the same with ``PYTHONPATH=build/triton``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from testing.calls import SOURCES, applies, call, leaves, run
from testing.cases import Case
from testing.compiled import TARGETS, Launch, launches, loop_instructions, resources
from testing.inputs import build

from grpo_kernels import GRPOLossConfig, gae, group_advantages

FILE = Path(__file__).with_name("triton_resources.json")
EVERYTHING = GRPOLossConfig(beta=0.1, entropy_coef=0.05)
SEQUENCE = GRPOLossConfig(beta=0.1, importance_sampling_level="sequence")
SAPO = GRPOLossConfig(loss_type="sapo", beta=0.1, kl_estimator="abs", kl_clamp=10.0, log_ratio_clamp=20.0)
GMPO = GRPOLossConfig(loss_type="gmpo", beta=0.1, kl_gradient="straight_through", use_bias_correction_kl=False)
EXACT = GRPOLossConfig(beta=0.1, kl_estimator="forward_kl")
BONUS = GRPOLossConfig(entropy_coef=0.05)
#: Vocabularies of models in use, and one of which no row but the first begins at 16 bytes; few rows: nothing runs.
PLAIN = Case("plain", length=3, vocab=151936, hidden=8, old=False, ref=False)
FULL = Case("everything", length=3, vocab=151936, hidden=8, config=EVERYTHING, grad_output=2.0)
CASES = {
    "plain": (PLAIN, torch.bfloat16),
    "full": (FULL, torch.bfloat16),
    "full_fp32": (FULL, torch.float32),
    "full_fp16": (FULL, torch.float16),
    "prime": (Case("prime", length=3, vocab=50257, hidden=8, config=EVERYTHING), torch.bfloat16),
    "large_prime": (Case("large_prime", length=3, vocab=131071, hidden=8, config=EVERYTHING), torch.bfloat16),
    "tiny": (Case("tiny", length=3, vocab=67, hidden=8, ref=False, config=BONUS), torch.bfloat16),
    "small": (Case("small", length=3, vocab=4096, hidden=8, config=EVERYTHING), torch.bfloat16),
    "sequence": (Case("sequence", length=3, vocab=32000, hidden=8, config=SEQUENCE, grad_output=2.0), torch.bfloat16),
    "softcap": (Case("softcap", length=3, vocab=256000, hidden=8, softcap=30.0, config=EVERYTHING), torch.float32),
    "sapo": (Case("sapo", length=3, vocab=32000, hidden=8, config=SAPO), torch.bfloat16),
    "gmpo": (Case("gmpo", length=3, vocab=32000, hidden=8, config=GMPO), torch.bfloat16),
    "rewards": (Case("rewards", length=3, vocab=32000, hidden=8, advantages="rewards"), torch.bfloat16),
    "full_rewards": (replace(FULL, name="full_rewards", advantages="rewards"), torch.bfloat16),
    "packed_rewards": (Case("packed", lengths=(1, 2), vocab=32000, hidden=8, advantages="rewards"), torch.bfloat16),
    "compared": (replace(FULL, name="compared", divergence="reverse_kl", config=EXACT), torch.bfloat16),
    "compared_softly": (replace(FULL, name="softly", divergence="js", soft=True, softcap=30.0), torch.float32),
    "strided": (Case("strided", length=3, vocab=32000, hidden=8, layout="strided"), torch.bfloat16),
}
OTHERS = "others"
#: Kernels that read each logit once for its statistics, once for its gradient.
ROW_KERNELS = {"_grpo_loss_kernel", "_token_logprobs_fwd_kernel", "_token_logprobs_bwd_kernel"}
#: Where their instructions are counted: aligned rows, logits as they are.
COUNTED = ("plain", "full", "full_fp32", "full_rewards")


class Usage(NamedTuple):
    """The most that a kernel takes for any of the cases; what is not counted is None."""

    registers: int  # of a thread
    shared: int  # bytes of a program
    spilled: int  # bytes of a thread's registers that went to memory
    load: int | None = None  # bytes that a thread reads of a row at once
    store: int | None = None  # bytes that it writes at once
    statistics: float | None = None  # instructions a logit
    gradient: float | None = None


def calls(case: Case, dtype: torch.dtype) -> None:
    """Every op that a case applies to."""
    for op, source in SOURCES.items():
        if applies(op, case):
            run(op, build(case, dtype, source), "triton")


def _others() -> None:
    inputs = build(PLAIN, torch.bfloat16)
    with torch.no_grad():
        call("grpo_loss", inputs, leaves("grpo_loss", inputs), "triton")
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        group_advantages(torch.ones(4, 2), 2, aggregation=aggregation, backend="triton")
    gae(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), backend="triton")


@cache
def launches_of(name: str, target: str) -> tuple[Launch, ...]:
    """What a case launches; OTHERS: a loss without a gradient, advantages of groups and of tokens."""
    return tuple(launches(_others if name == OTHERS else lambda: calls(*CASES[name]), target))


@cache
def compiled(launch: Launch, target: str) -> Any:
    """A launch's kernel."""
    return launch.compile(TARGETS[target])


def row_loops(launch: Launch, target: str) -> list[list[str]]:
    """The innermost loops that read a row, NVIDIA; those over a group's rewards add in fp64, as none of these does."""
    loops = loop_instructions(compiled(launch, target))
    opcodes = [{instruction.split(".")[0] for instruction in loop} for loop in loops]
    return [loop for loop, found in zip(loops, opcodes, strict=True) if "LDG" in found and "DADD" not in found]


def kernel_of(launch: Launch) -> str:
    """A kernel's name with the types of the rows that it reads and writes."""
    types = dict(launch.signature)
    rows = [types.get(name, "constexpr") for name in ("logits_ptr", "dlogits_ptr")]
    return " ".join([launch.name, *(x.removeprefix("*") for x in rows if x != "constexpr")])


def _width(loops: list[list[str]], opcode: str) -> int | None:
    """Bytes of the narrowest load or store in loops."""
    found = [x.split(".") for loop in loops for x in loop if x.startswith(opcode)]
    return min((16 if "128" in x else 8 if "64" in x else 4 for x in found), default=None)


def instructions_a_logit(launch: Launch, target: str) -> dict[str, float]:
    """Of "statistics" and "gradient", each where a kernel has that: in its loop over whole blocks."""
    counts: dict[str, list[float]] = {}
    for loop in row_loops(launch, target):
        logits = sum(x.startswith("LDG") for x in loop) * launch.constant("VECTOR")
        kind = "gradient" if any(x.startswith("STG") for x in loop) else "statistics"
        counts.setdefault(kind, []).append(len(loop) / logits)
    return {kind: min(found) for kind, found in counts.items()}  # the others are remainders, edges, extra outputs


def usage(launch: Launch, target: str, is_counted: bool) -> Usage:
    """Of one launch."""
    taken = resources(compiled(launch, target))
    if not is_counted or launch.name not in ROW_KERNELS or not target.startswith("sm_"):
        return Usage(taken.registers, taken.shared, taken.spilled)
    loops, counts = row_loops(launch, target), instructions_a_logit(launch, target)
    return Usage(
        taken.registers,
        taken.shared,
        taken.spilled,
        _width(loops, "LDG"),
        _width(loops, "STG"),
        *(round(counts[kind], 2) if kind in counts else None for kind in ("statistics", "gradient")),
    )


def _most(usages: list[Usage]) -> Usage:
    """Of several launches the most; of the widths the least."""
    most: dict[str, Any] = {}
    for field in Usage._fields:
        known = [value for usage in usages if (value := getattr(usage, field)) is not None]
        most[field] = (min if field in ("load", "store") else max)(known, default=None)
    return Usage(**most)


def _measured() -> dict[str, dict[str, Usage]]:
    """By kernel and target."""
    found: dict[str, dict[str, list[Usage]]] = {}
    for name in (*CASES, OTHERS):
        for target in TARGETS:
            for launch in launches_of(name, target):
                taken = usage(launch, target, name in COUNTED)
                found.setdefault(kernel_of(launch), {}).setdefault(target, []).append(taken)
        print(name, flush=True)
    return {kernel: {target: _most(x) for target, x in targets.items()} for kernel, targets in found.items()}


def recorded() -> dict[str, dict[str, dict[str, Usage]]]:
    """By release of Triton, kernel and target."""
    table = json.loads(FILE.read_text()) if FILE.exists() else {}
    return {
        release: {kernel: {target: Usage(*x) for target, x in targets.items()} for kernel, targets in kernels.items()}
        for release, kernels in table.items()
    }


@cache
def bounds() -> dict[str, dict[str, Usage]]:
    """What is recorded for this release; for one that is unknown the most of any."""
    table = recorded()
    if triton.__version__ in table:
        return table[triton.__version__]
    merged: dict[str, dict[str, list[Usage]]] = {}
    for kernels in table.values():
        for kernel, targets in kernels.items():
            for target, taken in targets.items():
                merged.setdefault(kernel, {}).setdefault(target, []).append(taken)
    return {kernel: {target: _most(x) for target, x in targets.items()} for kernel, targets in merged.items()}


def write(table: dict[str, dict[str, dict[str, Usage]]]) -> None:
    """Writes a table, a line a kernel."""
    releases = []
    for release in sorted(table):
        lines = [f"    {json.dumps(name)}: {json.dumps(table[release][name])}" for name in sorted(table[release])]
        releases.append(f"  {json.dumps(release)}: {{\n" + ",\n".join(lines) + "\n  }")
    FILE.write_text("{\n" + ",\n".join(releases) + "\n}\n")


if __name__ == "__main__":
    write(recorded() | {triton.__version__: _measured()})
    print(f"what Triton {triton.__version__} makes of the kernels is recorded in {FILE.name}")
