"""What Nsight Compute profiles: one launch of the loss by each backend, over bf16 logits in place."""

from __future__ import annotations

import argparse

import torch
from problems import buffer, logits_problem, refill

from gpu.settings import calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=int)
    parser.add_argument("vocab", type=int)
    parser.add_argument("backends", nargs="+")
    options = parser.parse_args()
    problem = logits_problem(options.tokens, options.vocab, torch.bfloat16, "cuda")
    work = buffer(problem)
    for backend in options.backends:
        refill(work, problem)
        calls(problem, work, backend)["grpo_loss"]()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
