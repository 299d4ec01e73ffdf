"""Two processes take the step of one with the whole batch: DDP on gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_kernels.training.recipe import Recipe

SETTINGS: dict[str, Any] = {
    "num_generations": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "beta": 0.1,
    "num_iterations": 2, "max_completion_length": 6, "learning_rate": 1e-2, "device": "cpu", "num_threads": 1,
    "max_steps": 4, "scale_rewards": "batch", "max_grad_norm": 0.5, "num_eval_prompts": 0, "disable_tqdm": True,
    "adam_epsilon": 1e-3,  # AdamW turns the rounding of a gradient near 0 into a step
}  # fmt: skip


def worker(out: str, processes: int) -> None:
    """Two steps on fixed completions; their metrics and the parameters after them, by the main process."""
    torch.set_num_threads(1)
    from accelerate import Accelerator

    from grpo_kernels.training import addition
    from grpo_kernels.training.data import Task
    from grpo_kernels.training.loop import GRPOLoop
    from grpo_kernels.training.rollout import teacher_forced

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == processes, accelerator.num_processes
    tokenizer = addition.build_tokenizer()
    model = addition.build_model(tokenizer, seed=0).eval()
    rows, _ = addition.build_rows(0, 0)
    share = 8 // processes
    recipe = Recipe(**(SETTINGS | {"gradient_accumulation_steps": share // 2}))
    loop = GRPOLoop(Task(model, tokenizer, rows, [], {}), recipe, accelerator)
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    completions = [" ".join("123456"[: 1 + k % 6]) for k in range(8)]  # of unequal lengths
    rollout = teacher_forced(tokenizer, [row["prompt"] for row in rows[:8]][mine], completions[mine])
    every = torch.tensor([[1.0], [0.0], [0.5], [2.0], [0.0], [0.0], [1.0], [3.0]])
    batch = loop._batch(rollout, every)
    found = []
    for _ in range(2):
        micro_batches = [batch.select(part) for part in torch.arange(share).split(2)]
        found.append(loop.optimizer_step(micro_batches))
    weights = accelerator.get_state_dict(loop.policy.wrapped)
    if accelerator.is_main_process:
        save_file({name: value.clone().contiguous() for name, value in weights.items()}, out + ".safetensors")
        Path(out).write_text(json.dumps(found))
    accelerator.end_training()


def launched(processes: int, folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    out = folder / f"processes-{processes}"
    command = [sys.executable, __file__, str(out), str(processes)]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text()), load_file(f"{out}.safetensors")


def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    metrics, weights = launched(2, tmp_path)
    expected, whole = launched(1, tmp_path)
    assert len(metrics) == 2 and metrics[1]["clip_ratio/region_mean"] > 0 and metrics[1]["kl"] > 0
    for got, want in zip(metrics, expected, strict=True):
        assert got.keys() == want.keys()
        assert got == pytest.approx(want, rel=1e-5, abs=1e-6)
    for name, value in whole.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]))
