"""The stage "currencies": what a head is worth to TRL's users: longest sequence, peak memory, milliseconds."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from interleaved import Comparison, time_in_turns

from gpu.stage import Stage, main

#: Heads of models: hidden size and vocabulary.
MODELS = {"gemma-3-1b": (1152, 262144), "Qwen3-8B": (4096, 151936)}
TOKENS = 8192  # where peak and time are taken
MEMORY = 79 << 30  # bytes of the GPU whose longest sequence is searched for
_CALL_SECONDS = 1.0  # a longer call is not tried: from there on the peak's slope tells


def run(stage: Stage, options: argparse.Namespace) -> None:
    """Measures each model's head with stock TRL, with our kernels under TRL, and with all logits at once."""
    stage.need_a_backend()
    if importlib.util.find_spec("trl") is None:
        stage.leave_out("trl is not installed")
        return
    from grpo_kernels.integrations import trl as drop_in

    stage.entry["found"]["currencies"] = rows = []
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
                if backend in (None, "naive"):
                    found = currencies(size, backend, stage)
                else:
                    with drop_in.apply(backend=backend):
                        found = currencies(size, backend, stage)
                rows.append({"model": model, "head": head} | found)

            stage.attempt(f"{model}, {head}", measure)


def currencies(size: tuple[int, int], backend: str | None, stage: Stage) -> dict[str, Any]:
    """Milliseconds and peak at ``TOKENS``, and the longest sequence; ``backend``: None is stock, "naive" all logits."""
    from trl_head import HeadStep

    def step_of(tokens: int) -> Callable[[], None]:
        head = HeadStep(tokens, tokens, *size, torch.bfloat16, stage.device)
        function = {None: head.stock, "naive": head.naive}.get(backend, head.ours)
        return lambda: function(head.advantages)

    tokens = 16 if stage.is_dry else TOKENS
    step = step_of(tokens)
    comparison = Comparison("currencies", "a head", "head", contenders={"head": step})
    time_in_turns(comparison, 5, stage.device)
    del step, comparison.contenders["head"]
    attempt = toy_attempt if stage.is_dry else lambda n: peak_of(lambda: step_of(n)(), stage.device)
    longest, is_measured = longest_sequence(attempt, tokens)
    return {
        "ms": comparison.median("head") * 1e3,
        "peak_gib": (attempt(tokens) or (0, 0.0))[0] / 2**30,
        "longest": longest,
        "longest_is_measured": is_measured,
    }


def toy_attempt(tokens: int) -> tuple[int, float] | None:
    """What a dry run takes for a GPU: 1 GiB, of which a token takes 16 MiB."""
    return (tokens << 24, 0.0) if tokens <= 64 else None


def peak_of(step: Callable[[], None], device: torch.device) -> tuple[int, float] | None:
    """Most bytes allocated while a head is made and run once, and its seconds; None where memory ran out."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    start = time.monotonic()
    try:
        step()
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated(device), time.monotonic() - start


def longest_sequence(attempt: Callable[[int], tuple[int, float] | None], tokens: int) -> tuple[int, bool]:
    """The most tokens that fit: by bisection to a sixteenth, or by the slope of the peak where calls become long.

    Args:
        attempt: Bytes and seconds of a call over so many tokens, or None where memory runs out.
        tokens: That surely fit.

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
