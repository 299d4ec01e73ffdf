"""The stage "tune": one kernel's block sizes at one vocabulary, into a table beside the results."""

from __future__ import annotations

import argparse
import sys

import torch
from tune import best, write

from gpu.stage import RunningStage, main


def run(stage: RunningStage, options: argparse.Namespace) -> None:
    """Times the candidates for ``--tune kernel:vocabulary``, over a gibibyte of bf16 and of fp32 logits."""
    kernel, vocab = options.tune.split(":")
    if "triton" not in stage.backends:
        raise SystemExit("Triton does not run here: " + "; ".join(stage.entry["left_out"]))
    vocab, size = (64, 1 << 10) if stage.is_dry else (int(vocab), 1 << 30)
    rows = stage.entry["found"].setdefault("tuned", [])
    table = stage.path.parent / "tuned" / "triton_blocks.json"
    table.parent.mkdir(exist_ok=True)
    for dtype in (torch.bfloat16, torch.float32):

        def measure(dtype: torch.dtype = dtype) -> None:
            tokens = size // (vocab * dtype.itemsize)
            rows.append(best(kernel, vocab, dtype, tokens, options.rounds, stage.device))
            write(table, rows)

        stage.attempt(f"{kernel}, V={vocab}, {dtype}", measure)


if __name__ == "__main__":
    sys.exit(main(run))
