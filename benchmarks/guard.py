"""Whether this checkout is slower than another revision: both timed in turns, in a process each, on the CPU.

Fails where the median of the ratios passes the limit. The other revision is checked out and built in a folder of its
own, with this environment's compiler and torch. Where a process's memory happens to lie makes two processes of the same
code differ by a tenth, so every few rounds are by two new ones.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
VOCAB, HIDDEN = 151936, 896
ROUNDS_PER_PROCESS = 3
SHORTEST_SECONDS = 0.05  # of one timing: shorter steps are repeated


def works(quick: bool) -> dict[str, Callable[[], Callable[[], object]]]:
    """By name: what builds a step. Only functions and names that every revision has."""
    from grpo_kernels import group_advantages, grpo_loss, linear_grpo_loss, linear_token_logprobs, policy_loss

    tokens, vocab, hidden_size = (16, 4099, 64) if quick else (128, VOCAB, HIDDEN)
    shape = (8, tokens // 8)
    torch.manual_seed(0)
    ids, mask, old = torch.randint(vocab, shape), torch.ones(shape), torch.full(shape, -12.0)
    advantages = torch.randn(8)
    quarter = advantages * (torch.arange(8) < 2)

    def from_logits(dtype: torch.dtype) -> Callable[[], object]:
        work = torch.randn(*shape, vocab).to(dtype)

        def step() -> None:  # over its own gradient from the second time on, whose logits cost as much
            grpo_loss(work.detach().requires_grad_(), ids, advantages, mask, old_logprobs=old,
                      inplace=True).loss.backward()  # fmt: skip

        return step

    @cache  # built by the first that takes them
    def head() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(*shape, hidden_size), torch.randn(vocab, hidden_size) * 2 / hidden_size**0.5

    def from_hidden(advantages: torch.Tensor, head_grad: bool = True) -> Callable[[], object]:
        hidden, weight = head()

        def step() -> None:
            x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(head_grad)
            linear_grpo_loss(x, w, ids, advantages, mask, old_logprobs=old).loss.backward()

        return step

    def upstream() -> Callable[[], object]:
        hidden, weight = head()

        def step() -> None:
            x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            linear_token_logprobs(x, w, ids).logprobs.backward(mask)

        return step

    def logprobs() -> Callable[[], object]:
        return torch.no_grad()(lambda: linear_token_logprobs(*head(), ids))

    def policy() -> Callable[[], object]:
        size = (8, 8) if quick else (64, 4096)
        values, ones, rewards = torch.randn(size), torch.ones(size), torch.rand(size[0])

        def step() -> None:
            leaf = values.detach().requires_grad_()
            policy_loss(leaf, group_advantages(rewards, 8), ones, old_logprobs=values).loss.backward()

        return step

    return {
        "grpo_loss in place, fp32": lambda: from_logits(torch.float32),
        "grpo_loss in place, bf16": lambda: from_logits(torch.bfloat16),
        "linear_grpo_loss": lambda: from_hidden(advantages),
        "linear_grpo_loss, a quarter live": lambda: from_hidden(quarter),
        "linear_grpo_loss, frozen head": lambda: from_hidden(advantages, head_grad=False),
        "linear_token_logprobs, no gradient": logprobs,
        "linear_token_logprobs, any gradient": upstream,
        "group_advantages and policy_loss": policy,
    }


def serve(root: Path, quick: bool) -> None:
    """The process of one revision: for each name that comes in, the time of a warm step, or why there is none."""
    import grpo_kernels

    found = Path(grpo_kernels.__file__).parents[1]
    if found.resolve() != root.resolve():
        sys.exit(f"grpo_kernels of {found} was imported, not of {root}")
    steps: dict[str, Callable[[], object]] = {}
    builders = works(quick)
    for name in (line.strip() for line in sys.stdin):
        try:
            if name not in steps:
                steps[name] = builders[name]()
                steps[name]()
            count, start = 0, time.perf_counter()
            while count == 0 or time.perf_counter() - start < SHORTEST_SECONDS:
                steps[name]()
                count += 1
            print((time.perf_counter() - start) / count, flush=True)
        except Exception as error:  # an older revision may not have it
            print(f"{type(error).__name__}: {error}".replace("\n", " "), flush=True)


def ask(process: subprocess.Popen[str], name: str) -> float | str:
    """One timing by a revision's process, or why there is none.

    Raises:
        RuntimeError: The process ended.
    """
    process.stdin.write(name + "\n")
    process.stdin.flush()
    answer = process.stdout.readline().strip()
    if not answer:
        raise RuntimeError(f"{' '.join(process.args)} ended with {process.wait()}")
    try:
        return float(answer)
    except ValueError:
        return answer


def build(revision: str, folder: Path) -> None:
    """Checks a revision out and compiles it in place."""
    subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(folder), revision], check=True)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


Pair = tuple[subprocess.Popen[str], subprocess.Popen[str]]  # of this checkout and of the other


@contextmanager
def pair_of_processes(other: Path, quick: bool) -> Iterator[Pair]:
    """Two new processes, to be asked for timings."""
    processes = []
    for root in (ROOT, other):
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(root), *(["--quick"] * quick)]
        environment = os.environ | {"PYTHONPATH": str(root)}
        processes.append(subprocess.Popen(command, cwd=other.parent, env=environment, stdin=subprocess.PIPE,
                                          stdout=subprocess.PIPE, text=True))  # fmt: skip
    try:
        yield processes[0], processes[1]
    finally:
        for process in processes:
            process.stdin.close()
            process.wait(timeout=60)


def timings(pair: Pair, name: str, first: int, rounds: int) -> list[tuple[float | str, float | str]]:
    """Rounds of one work, here and there, in turns: the even ones begin here."""
    found = []
    for turn in range(first, first + rounds):
        answers = {process: ask(process, name) for process in (pair if turn % 2 == 0 else pair[::-1])}
        found.append((answers[pair[0]], answers[pair[1]]))
    return found


def verdict(name: str, rounds: list[tuple[float | str, float | str]], limit: float) -> tuple[str, bool]:
    """A line on one work, and whether it is slower than allowed."""
    refusals = [answer for answers in rounds for answer in answers if isinstance(answer, str)]
    if refusals:
        return f"{name:38s} not compared: {refusals[0]}", any(isinstance(here, str) for here, _ in rounds)
    ratios = sorted(here / there for here, there in rounds)
    median, fifth = statistics.median(ratios), len(ratios) // 5
    slower = f"  slower than {limit:.2f}x" if median > limit else ""
    spread = f"p20 {ratios[fifth]:.2f}  p80 {ratios[-1 - fifth]:.2f}"
    milliseconds = statistics.median(here for here, _ in rounds) * 1e3
    return f"{name:38s} {milliseconds:9.2f} ms  {median:.3f}x  {spread}{slower}", median > limit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", default="main", help="what to compare with")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--limit", type=float, default=1.10)
    parser.add_argument("--quick", action="store_true", help="small shapes: shows that it runs, not how fast")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve, options.quick)
        return 0
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "revision"
        try:
            build(options.revision, folder)
            return guard(folder, options.revision, options.rounds, options.limit, options.quick)
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(folder)], check=False)


def guard(other: Path, revision: str, rounds: int, limit: float, quick: bool) -> int:
    """Compares this checkout with the one in a folder; returns 1 if any work is slower than allowed."""
    print(f"this checkout over {revision}, medians of {rounds} rounds in turns, {ROUNDS_PER_PROCESS} per process")
    found: dict[str, list[tuple[float | str, float | str]]] = {name: [] for name in works(quick)}
    for first in range(0, rounds, ROUNDS_PER_PROCESS):
        with pair_of_processes(other, quick) as pair:
            for name in found:
                found[name] += timings(pair, name, first, min(ROUNDS_PER_PROCESS, rounds - first))
    verdicts = [verdict(name, answers, limit) for name, answers in found.items()]
    print("\n".join(line for line, _ in verdicts))
    return int(any(is_slower for _, is_slower in verdicts))


if __name__ == "__main__":
    sys.exit(main())
