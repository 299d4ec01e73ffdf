"""The stage "currencies": what a head is worth to TRL's users: longest sequence, peak memory, milliseconds."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from interleaved import Comparison, time_in_turns

from gpu.stage import RunningStage, main

#: Heads of models: hidden size and vocabulary.
MODELS = {"gemma-3-1b": (1152, 262144), "Qwen3-8B": (4096, 151936)}
TOKENS = 8192  # where peak and time are taken
#: Bytes of the GPU whose longest sequence is searched for, less what CUDA and the libraries keep for themselves.
KEPT_FREE = 1 << 30
MEMORY = (79 << 30) - KEPT_FREE
_CALL_SECONDS = 1.0  # after a longer call no longer sequence is tried: the peak's slope tells


def run(stage: RunningStage, options: argparse.Namespace) -> None:
    """Measures each model's head with stock TRL, with our kernels under TRL, and with all logits at once."""
    stage.need_a_backend()
    if importlib.util.find_spec("trl") is None:
        stage.leave_out("trl is not installed")
        return
    from grpo_kernels.integrations import trl as drop_in

    rows = stage.entry["found"].setdefault("currencies", [])
    if stage.device.type == "cuda":
        total = torch.cuda.get_device_properties(stage.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, MEMORY / total))
    heads = {"stock TRL": None} | {f"grpo_kernels under TRL, {name}": name for name in stage.backends}
    heads |= {"all logits at once": "naive"}
    models = {"toy": (16, 67)} if stage.is_dry else MODELS
    for model, size in models.items():
        for head, backend in heads.items():

            def measure(model: str = model, size: tuple[int, int] = size, head: str = head,
                        backend: str | None = backend) -> None:  # fmt: skip
                is_ours = backend not in (None, "naive")
                with drop_in.apply(backend=backend) if is_ours else nullcontext():
                    rows[:] = [row for row in rows if (row["model"], row["head"]) != (model, head)]
                    rows.append({"model": model, "head": head})
                    measure_head(rows[-1], size, backend, stage)

            stage.attempt(f"{model}, {head}", measure)


def measure_head(row: dict[str, Any], size: tuple[int, int], backend: str | None, stage: RunningStage) -> None:
    """Adds to a row milliseconds and peak at ``TOKENS``, then the longest sequence.

    ``backend``: None is stock TRL, "naive" all logits at once.
    """
    from trl_head import HeadStep

    def step_of(tokens: int) -> Callable[[], None]:
        head = HeadStep(tokens, tokens, *size, torch.bfloat16, stage.device)
        function = {None: head.stock, "naive": head.naive}.get(backend, head.ours)
        return lambda: function(head.advantages)

    tokens = 16 if stage.is_dry else TOKENS
    step = step_of(tokens)
    comparison = Comparison("currencies", "a head", "head", contenders={"head": step})
    time_in_turns(comparison, 5, stage.device)
    row["ms"] = comparison.median("head") * 1e3
    del step, comparison.contenders["head"]
    attempt = toy_attempt if stage.is_dry else lambda n: peak_of(lambda: step_of(n)(), stage.device)
    row["peak_gib"] = (attempt(tokens) or (0, 0.0))[0] / 2**30
    stage.save()
    row["longest"], row["longest_is_measured"] = longest_sequence(attempt, tokens)


#: What is said where memory runs out: by the allocator or CUDA, by Triton, by cuBLAS.
_OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def toy_attempt(tokens: int) -> tuple[int, float] | None:
    """What a dry run takes for a GPU: one with memory for 64 tokens."""
    return (tokens << 24, 0.0) if tokens <= 64 else None


def peak_of(step: Callable[[], None], device: torch.device) -> tuple[int, float] | None:
    """Most bytes allocated while a head is made and run once, and its seconds; None where memory ran out."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    start = time.monotonic()
    try:
        step()
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        if any(words in str(error) for words in _OUT_OF_MEMORY):
            return None
        raise
    return torch.cuda.max_memory_allocated(device), time.monotonic() - start


def longest_sequence(attempt: Callable[[int], tuple[int, float] | None], tokens: int) -> tuple[int, bool]:
    """The most tokens that fit: by bisection to a sixteenth, or by the slope of the peak where calls become long.

    Args:
        attempt: Bytes and seconds of a call over so many tokens, or None where memory runs out.
        tokens: A number of tokens that fits.

    Returns:
        The tokens, and whether they were tried.
    """
    peaks: list[tuple[int, int]] = []
    fits, fails = tokens, None
    while fails is None or fails - fits > max(1, fits // 16):
        trial = 2 * fits if fails is None else (fits + fails) // 2
        found = attempt(trial)
        if found is None:
            fails = trial
            continue
        peaks.append((trial, found[0]))
        fits = trial
        if fails is None and len(peaks) > 1 and found[1] > _CALL_SECONDS:
            (n, low), (m, high) = peaks[-2:]
            return int(m + (MEMORY - high) * (m - n) / max(high - low, 1)), False
    return fits, True


if __name__ == "__main__":
    sys.exit(main(run))
