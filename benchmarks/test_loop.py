"""A whole step of this package's own loop, from sampling to AdamW, on its kernels and on its reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from interleaved import Comparison, compare
from problems import HEADS
from providers import OURS
from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("trl")

import trl_trainer

from grpo_kernels.training.loop import GRPOLoop
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.task import Task

REFERENCE = f"{OURS}, torch"


def test_loop(benchmark: BenchmarkFixture, report: Callable[[Comparison], None], quick: bool) -> None:
    layers, (hidden_size, vocab) = (1, (64, 4099)) if quick else (2, HEADS["Qwen2.5-0.5B"])
    length = 4 if quick else 16
    loops: dict[str, GRPOLoop] = {}
    norms: dict[str, float] = {}

    def build(name: str, backend: str) -> None:
        recipe = Recipe(
            max_steps=1, per_device_train_batch_size=8, num_generations=8, max_completion_length=length,
            backend=backend, learning_rate=1e-6, num_eval_prompts=0,
        )  # fmt: skip
        model = trl_trainer.build_model(layers, hidden_size, vocab, tied=True).eval()
        rewards = {"place": lambda prompts, completions, **_: trl_trainer.reward(completions)}
        rows = [{"prompt": "a", "answer": ""}] * 8
        loops[name] = GRPOLoop(Task(model, trl_trainer.build_tokenizer(), rows, [], rewards), recipe)
        torch.manual_seed(0)

    def run(name: str) -> None:
        norms[name] = [step.metrics["grad_norm"] for step in loops[name].steps()][-1]

    comparison = Comparison(
        "loop_step",
        f"a step of the package's own loop, 8 completions of {length} tokens sampled, {layers} layers, "
        f"H={hidden_size} V={vocab} float32",
        REFERENCE,
        {"B": 8, "T": length, "H": hidden_size, "V": vocab},
        contenders={REFERENCE: lambda: run(REFERENCE), OURS: lambda: run(OURS)},
        prepare={REFERENCE: lambda: build(REFERENCE, "torch"), OURS: lambda: build(OURS, "auto")},
    )
    compare(benchmark, comparison, rounds=2)
    off = abs(norms[OURS] - norms[REFERENCE]) / norms[REFERENCE]
    comparison.errors[OURS] = {"gradient norm, against the reference": off}
    report(comparison)
    assert off < 1e-4, norms
