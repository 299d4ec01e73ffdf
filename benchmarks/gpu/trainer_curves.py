"""Steps of TRL's GRPOTrainer on a tiny random model in bf16: stock, stock from another seed, and with our kernels.

Every batch is used twice, so that ratios differ from 1 and losses from 0.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

#: What is compared of a trainer's log, and what is only shown: these change with a single sampled token.
LOGGED = ("loss", "grad_norm", "entropy")
SHOWN = ("reward", "completions/mean_length")


def curves(steps: int, device: torch.device, backends: Sequence[str]) -> dict[str, Any]:
    """The logged curves of a run of stock TRL, of another seed, and of ours by each backend; with mean distances.

    Args:
        steps: Of each run.
        device: A GPU, or the CPU of a dry run.
        backends: Ours.

    Returns:
        ``steps``; ``logged``: the curves by run; ``distances``: by backend and name the mean distance of ours from
        stock TRL's, and of stock TRL's from that of another seed.
    """
    logged = {"stock": train(steps, 0, device), "another seed": train(steps, 1, device)}
    logged |= {backend: train(steps, 0, device, backend) for backend in backends}
    distances = {
        f"{name}, {backend}": (_distance(logged[backend][name], logged["stock"][name]),
                               _distance(logged["another seed"][name], logged["stock"][name]))
        for backend in backends
        for name in (*LOGGED, *SHOWN)
    }  # fmt: skip
    return {"steps": steps, "distances": distances, "logged": logged}


def assert_same_curves(measured: dict[str, Any]) -> None:
    """Raises AssertionError where ours is further from stock TRL than another seed is."""
    distances = {name: pair for name, pair in measured["distances"].items() if name.split(", ")[0] in LOGGED}
    far = [name for name, (ours, other) in distances.items() if not ours <= other]
    assert not far, f"ours differs from stock TRL by more than another seed does in {', '.join(far)}"


def train(steps: int, seed: int, device: torch.device, backend: str | None = None) -> dict[str, list[float]]:
    """The curves of one run, by name; ``backend``: ours, or None for stock TRL."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl_trainer import build_model, build_tokenizer

    from grpo_kernels.integrations import trl as drop_in

    words = ["a", "b", "c", "d"]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if backend is not None:
            stack.enter_context(drop_in.apply(backend=backend))
        arguments = GRPOConfig(
            output_dir=folder, use_cpu=device.type == "cpu", bf16=True, report_to=[], seed=seed, data_seed=seed,
            per_device_train_batch_size=16, num_generations=8, num_iterations=2, max_completion_length=16,
            max_steps=steps, save_strategy="no", logging_steps=1, learning_rate=1e-3, disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=build_model(layers=2, hidden_size=64, vocab=1031),
            reward_funcs=count_of_low_ids,
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": words * 8}),
            processing_class=build_tokenizer(),
        )
        trainer.train()
        history = [line for line in trainer.state.log_history if "loss" in line]
    # rewards are logged where it sampled
    return {name: [line[name] for line in history if name in line] for name in (*LOGGED, *SHOWN)}


def count_of_low_ids(completion_ids: list[list[int]], **_: object) -> list[float]:
    """Rewards: the share of a completion's tokens in the lower half of the vocabulary."""
    return [sum(token < 515 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def _distance(curve: list[float], other: list[float]) -> float:
    return sum(abs(x - y) for x, y in zip(curve, other, strict=True)) / len(curve)
