"""Where a step of the demo's training loop goes: what the model costs, and what the loop adds to it.

    python benchmarks/loop_overhead.py --steps 40

Prints milliseconds and shares by part, as a Markdown table, and the loop's own share: all but sampling, forwards and
backwards. Steps are those of the recipe `addition` after its cold start, in one process on one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from transformers import set_seed

from grpo_kernels.training import loop as loop_module
from grpo_kernels.training import rollout as rollout_module
from grpo_kernels.training.loop import Batch, GRPOLoop, Step
from grpo_kernels.training.recipe import load_recipe
from grpo_kernels.training.task import load_task, train_on_traces

#: Parts in the order of a step. The first four are the model's; the loop would be of no use without them.
GENERATE, REFERENCE, FORWARD, BACKWARD = "sampling", "log-probs of the reference", "loss, forward", "backward"
OF_THE_MODEL = (GENERATE, REFERENCE, FORWARD, BACKWARD)
REST = "all else"
WARM_UP = 8  # steps


class Clock:
    """Seconds by part; a part inside of another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inner = [0.0]

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added to a part."""

        def call(*arguments: Any, **options: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                took = time.perf_counter() - start
                self.seconds[part] += took - self._inner.pop()
                self._inner[-1] += took

        return call


def parts(loop: GRPOLoop) -> list[tuple[str, Any, str]]:
    """Names of parts, and where the functions are that they are made of."""
    return [
        (GENERATE, type(loop.sampler), "__call__"),
        (REFERENCE, loop.policy, "logprobs"),
        (FORWARD, loop.policy, "loss"),
        (BACKWARD, loop_module, "backward"),
        ("AdamW", loop.optimizer, "step"),
        ("clipping", loop.accelerator, "clip_grad_norm_"),
        ("rewards", rollout_module, "score"),
        ("decoding", rollout_module, "completion_texts"),
        ("decoding", rollout_module, "completion_tokens"),
        ("prompts", rollout_module, "render_prompts"),
        ("advantages", loop_module, "group_advantages"),
        ("reward and length metrics", loop, "_reward_metrics"),
        ("reward and length metrics", loop, "_length_metrics"),
        ("micro-batches", Batch, "select"),
        ("loss metrics", loop_module.PolicyMetrics, "combined"),
        ("zeroing of gradients", loop.optimizer, "zero_grad"),
    ]


def warm_loop(steps: int) -> tuple[GRPOLoop, Iterator[Step]]:
    """The loop of the recipe ``addition`` after its cold start, and its next ``steps`` steps."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe("addition", ["--output_dir", folder, "--max_steps", str(steps + WARM_UP)])
    torch.set_num_threads(recipe.num_threads)
    set_seed(recipe.seed)
    task = load_task(recipe)
    for _ in train_on_traces(task.model, task.tokenizer, task.train_rows, recipe):
        pass
    loop = GRPOLoop(task, recipe)
    run = loop.steps()
    for _ in range(WARM_UP):
        next(run)
    return loop, run


def measure(loop: GRPOLoop, run: Iterator[Step], steps: int) -> tuple[Counter[str], float]:
    """Seconds by part, and of all, over ``steps`` steps of a loop that runs."""
    clock = Clock()
    with contextlib.ExitStack() as stack:
        for part, owner, name in parts(loop):
            stack.enter_context(mock.patch.object(owner, name, clock.timed(part, getattr(owner, name))))
        start = time.perf_counter()
        for _ in range(steps):
            next(run)
        took = time.perf_counter() - start
    clock.seconds[REST] = took - sum(clock.seconds.values())
    return clock.seconds, took


def main() -> None:
    parser = argparse.ArgumentParser(description="prints where a step of the demo's training loop goes")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps to time; a multiple of 2 is fair")
    steps = parser.parse_args().steps
    seconds, took = measure(*warm_loop(steps), steps)
    print("| part of a step | ms | share |\n|---|---|---|")
    for part, spent in sorted(seconds.items(), key=lambda item: (item[0] not in OF_THE_MODEL, -item[1])):
        print(f"| {part} | {1e3 * spent / steps:.2f} | {spent / took:.1%} |")
    own = 1 - sum(seconds[part] for part in OF_THE_MODEL) / took
    print(f"\n{1e3 * took / steps:.1f} ms a step, of which the loop itself {own:.1%}")


if __name__ == "__main__":
    main()
