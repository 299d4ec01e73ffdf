"""TRL's head and its trainer's step, with and without these kernels: 510 positions of which 200 count."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interleaved import Comparison, compare
from problems import HEADS
from providers import OURS
from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("trl")

import trl_trainer
from trl_head import HeadStep

from grpo_kernels.integrations import trl as drop_in

HIDDEN, VOCAB = HEADS["Qwen2.5-0.5B"]
GEMMS, STOCK = "bare GEMMs on the counted rows", "stock TRL"
Report = Callable[[Comparison], None]


def test_head(benchmark: BenchmarkFixture, report: Report, quick: bool) -> None:
    positions, counted = (102, 40) if quick else (510, 200)
    hidden_size, vocab = (64, 4099) if quick else (HIDDEN, VOCAB)
    head = HeadStep(positions, counted, hidden_size, vocab, torch.float32, torch.device("cpu"))
    every, quarter = head.advantages, head.advantages * (torch.arange(counted) < counted // 4)
    with drop_in.apply() as applied:
        comparison = Comparison(
            "trl_head",
            f"TRL's head, forward and backward, {counted} of {positions} positions count, "
            f"H={hidden_size} V={vocab} float32",
            GEMMS,
            {"N": positions, "counted": counted, "H": hidden_size, "V": vocab},
            operations=6.0 * counted * hidden_size * vocab,
            targets={} if quick else {OURS: 1.08, f"{OURS}, a quarter live": 0.7},
            contenders={
                GEMMS: head.gemms,
                STOCK: lambda: head.stock(every, select=False),
                "TRL's function, counted rows": lambda: head.stock(every),
                f"{OURS}, any gradient": lambda: head.ours(every, expect=False),
                f"{OURS}, any gradient, projected again": lambda: head.ours(every, False, max_logits_bytes=0),
                f"{OURS}, a quarter live, any gradient": lambda: head.ours(quarter, expect=False),
                f"{OURS}, a quarter live": lambda: head.ours(quarter),
                OURS: lambda: head.ours(every),
            },
        )
        compare(benchmark, comparison, rounds=2 if quick else 3)
    report(comparison)
    assert applied.counts.hits > 0 == applied.counts.misses


def test_compute_loss(benchmark: BenchmarkFixture, report: Report, quick: bool) -> None:
    layers, hidden_size, vocab = (1, 64, 4099) if quick else (4, HIDDEN, VOCAB)
    with tempfile.TemporaryDirectory() as folder:
        step = trl_trainer.LossStep(folder, trl_trainer.build_model(layers, hidden_size, vocab))
        comparison = Comparison(
            "trl_loss",
            f"GRPOTrainer.compute_loss and backward, 8 x (64 + 64) tokens, {layers} layers, "
            f"H={hidden_size} V={vocab} float32",
            STOCK,
            {"B": 8, "T": 64, "H": hidden_size, "V": vocab},
            targets={} if quick else {OURS: 1 / 1.8},
            contenders={
                STOCK: lambda: step(step.dense),
                f"{OURS}, without speculation": lambda: step.with_kernels(step.dense, speculate=False),
                f"{OURS}, a quarter live": lambda: step.with_kernels(step.quarter),
                OURS: lambda: step.with_kernels(step.dense),
            },
        )
        compare(benchmark, comparison, rounds=2)
    for name, options in ((STOCK, []), (OURS, ["--ours"])):
        sizes = ["--model", *map(str, (layers, hidden_size, vocab))]
        command = [sys.executable, str(Path(trl_trainer.__file__)), *options, *sizes]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            comparison.peaks[name] = int(done.stdout.split()[-1])
        else:
            comparison.notes.append(f"memory of {name} not measured: {(done.stderr.splitlines() or [''])[-1]}")
    report(comparison)


def test_whole_step(benchmark: BenchmarkFixture, report: Report, quick: bool) -> None:
    """A step of ``GRPOTrainer.train``, from sampling to AdamW, on the same model, data and seed."""
    layers, hidden_size, vocab = (1, 64, 4099) if quick else (2, HIDDEN, VOCAB)
    length = 4 if quick else 16
    trainers: dict[str, Any] = {}
    norms: dict[str, list[float]] = {}

    with tempfile.TemporaryDirectory() as folder:

        def build(name: str) -> None:
            model = trl_trainer.build_model(layers, hidden_size, vocab, tied=True)
            trainers[name] = trl_trainer.build_trainer(folder, model, length, max_steps=1)

        def train(name: str) -> None:
            trainers[name].train()
            norms[name] = [log["grad_norm"] for log in trainers[name].state.log_history if "grad_norm" in log]

        def train_ours() -> None:
            with drop_in.apply() as applied:
                train(OURS)
            assert applied.counts.hits > 0 == applied.counts.misses

        comparison = Comparison(
            "trl_step",
            f"a step of GRPOTrainer.train, 8 completions of {length} tokens sampled, {layers} layers, "
            f"H={hidden_size} V={vocab} float32",
            STOCK,
            {"B": 8, "T": length, "H": hidden_size, "V": vocab},
            contenders={STOCK: lambda: train(STOCK), OURS: train_ours},
            prepare={name: lambda name=name: build(name) for name in (STOCK, OURS)},
        )
        compare(benchmark, comparison, rounds=2)
    off = max(abs(a - b) / b for a, b in zip(norms[OURS], norms[STOCK], strict=True))
    comparison.errors[OURS] = {"gradient norm, against stock": off}
    report(comparison)
    assert off < 1e-4, norms
