"""Fills a GPU's rows of the table of block sizes: the fastest of a few, by kernel, element size and vocabulary.

Times real launches in turns on random logits and keeps, for each, the candidate with the lowest median. With
``--smoke`` and Triton's interpreter it runs on a CPU at toy sizes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from interleaved import Comparison, time_in_turns

from grpo_kernels import backends, grpo_loss, token_logprobs
from grpo_kernels.ops.rows.calls import GradientCall
from grpo_kernels.ops.rows.transform import Transform
from grpo_kernels.ops.rows.triton import grpo_loss as loss_kernels
from grpo_kernels.ops.rows.triton import token_logprobs as row_kernels
from grpo_kernels.ops.rows.triton.launch import TABLE, Blocks, architecture

VOCABULARIES = (131072, 32768, 262144, 65536, 4096)  # those in most use first, should the time run out
#: Warps, with the programs at once on a multiprocessor that fill it; for rows read twice also fewer, by their cache.
_WARPS = {"statistics": (4, 8, 16, 32), "gradient": (4, 8, 16, 32), "loss": (8, 16, 32)}
_SMALL = {"statistics": (1, 2, 4, 8), "gradient": (1, 2, 4, 8), "loss": (1, 2, 4, 8)}
_THREADS = 1024  # of a multiprocessor, whose registers they share: 64 each on NVIDIA's


def candidates(kernel: str, vocab: int) -> list[Blocks]:
    """What to try."""
    warps = (_WARPS if vocab > 8192 else _SMALL)[kernel]
    found = [
        Blocks(num_warps, unroll, max(1, share * _THREADS // (32 * num_warps)))
        for num_warps, unroll, share in itertools.product(warps, (1, 2, 4), (1,))
    ]
    if kernel == "loss" and vocab > 32768:
        found += [Blocks(32, unroll, share) for unroll in (1, 2) for share in (0.5, 0.75, 2)]
    return found


def launch(kernel: str, logits: torch.Tensor, ids: torch.Tensor, blocks: Blocks) -> Callable[[], None]:
    """One launch of a kernel with these blocks, over ``logits [1, N, V]`` in place."""
    vector = torch.ones(ids.numel(), device=logits.device)
    gradient = GradientCall(ids, None, vector, vector.double(), vector, vector, None, Transform(1.0, 0.0, 1.0))

    def run() -> None:
        with mock.patch.object(row_kernels, "blocks_of", lambda *_: blocks), \
             mock.patch.object(loss_kernels, "blocks_of", lambda *_: blocks):  # fmt: skip
            if kernel == "loss":
                leaf = logits.detach().requires_grad_()
                grpo_loss(leaf, ids, vector[:1], vector.view(ids.shape), inplace=True, backend="triton")
            elif kernel == "statistics":
                token_logprobs(logits, ids, backend="triton")
            else:
                row_kernels.token_logprobs_bwd(logits, gradient, logits)

    return run


def best(kernel: str, vocab: int, dtype: torch.dtype, tokens: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """The table's row, with the time of every candidate over a copy of the logits."""
    logits = torch.empty(1, tokens, vocab, dtype=dtype, device=device).normal_(0, 2)
    work, ids = torch.empty_like(logits), torch.randint(vocab, (1, tokens), device=device)
    tried = {str(asdict(blocks)): blocks for blocks in candidates(kernel, vocab)}
    comparison = Comparison("tune", f"{kernel} {dtype} {vocab}", "copy")
    comparison.contenders = {"copy": partial(work.copy_, logits)}
    comparison.contenders |= {name: launch(kernel, work, ids, blocks) for name, blocks in tried.items()}
    comparison.prepare = dict.fromkeys(comparison.contenders, lambda: work.copy_(logits))
    time_in_turns(comparison, rounds, device)
    tried = {name: blocks for name, blocks in tried.items() if name in comparison.times}  # less what cannot launch
    winner = min(tried, key=comparison.median)
    print(f"{comparison.title}: {winner} {comparison.over_floor(winner):.3f}x a copy", flush=True)
    for name in sorted(tried, key=comparison.median):
        print(f"    {comparison.over_floor(name):.3f}x {name}", flush=True)
    row = {"architecture": architecture(device), "kernel": kernel, "itemsize": dtype.itemsize, "vocab": vocab}
    return row | asdict(tried[winner]) | {"source": "measured"}


def write(table: Path, rows: list[dict[str, Any]]) -> None:
    """Puts rows in the place of those for the same architecture, kernel, element size and vocabulary."""
    keys = ("architecture", "kernel", "itemsize", "vocab")
    merged = {tuple(row[key] for key in keys): row for row in [*json.loads(TABLE.read_text())["blocks"], *rows]}
    lines = ",\n".join("    " + json.dumps(row) for row in merged.values())
    table.write_text('{\n  "blocks": [\n' + lines + "\n  ]\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE, help="where to write; by default the one that is shipped")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=540, help="of the whole: what would begin later is left out")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, on a CPU under Triton's interpreter")
    options = parser.parse_args()
    device = torch.device("cpu" if options.smoke else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"skipped: torch {torch.__version__} sees no CUDA or ROCm device here")
        return 0
    reason = backends.unsupported_reason("grpo_loss", "triton", device)
    if reason is not None:
        print(f"cannot run: {reason}")
        return 1
    start, rows = time.monotonic(), []
    vocabularies, logits_bytes = ((64,), 1 << 10) if options.smoke else (VOCABULARIES, 1 << 30)
    for vocab, dtype, kernel in itertools.product(vocabularies, (torch.bfloat16, torch.float32), _WARPS):
        if time.monotonic() - start > options.seconds:
            print(f"left out, no time was left: {kernel} {dtype} {vocab}")
            continue
        tokens = logits_bytes // (vocab * dtype.itemsize)
        rows.append(best(kernel, vocab, dtype, tokens, options.rounds, device))
        write(options.table, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
