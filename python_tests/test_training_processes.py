"""Two processes take the steps of one with the whole batch: DDP, FSDP2 and DeepSpeed's ZeRO on gloo."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing.processes import end_worker
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from grpo_kernels import cli
from grpo_kernels.training.recipe import Recipe

SETTINGS: dict[str, Any] = {
    "num_generations": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "beta": 0.1,
    "num_iterations": 2, "max_completion_length": 6, "learning_rate": 1e-2, "device": "cpu", "num_threads": 1,
    "max_steps": 4, "scale_rewards": "batch", "max_grad_norm": 0.5, "num_eval_prompts": 0, "disable_tqdm": True,
    "adam_epsilon": 1e-3,  # AdamW turns the rounding of a gradient near 0 into a step
}  # fmt: skip
CASES: dict[str, tuple[bool, dict[str, Any]]] = {  # whether the head is the embedding, and what the recipe changes
    "tied": (True, {}),
    "untied-sequence": (False, {"importance_sampling_level": "sequence"}),
}


def of_even_length(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Right or not, whatever the answer is."""
    return [1.0 - len(completion) % 2 for completion in completions]


class Found:
    """What a launch wrote, by case."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.metrics = {name: json.loads((folder / f"{mode}-{name}.json").read_text()) for name in CASES}
        self.weights = {name: load_file(folder / f"{mode}-{name}.safetensors") for name in CASES}
        self.folder, self.mode = folder, mode

    def checkpoint(self, name: str) -> Path:
        return self.folder / f"{self.mode}-{name}" / "checkpoint-2"


def model_of(tokenizer: Any, tied: bool) -> Any:
    import transformers

    from grpo_kernels.training.addition import build_model

    config = build_model(tokenizer, seed=0).config
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def accelerator_of(mode: str) -> Any:
    """accelerate has FSDP for accelerators alone, so on a CPU its state is told by hand; the rest is its own.

    DeepSpeed it has, but there it would count one process.
    """
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from grpo_kernels.training.models import load_models_whole

    if mode.startswith("zero"):
        zero = {"stage": int(mode[-1]), "stage3_gather_16bit_weights_on_model_save": True}
        zero["stage3_param_persistence_threshold"] = 0  # however small
        PartialState(cpu=True)
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config={"zero_optimization": zero}))
        load_models_whole(accelerator)
        return accelerator
    accelerator = Accelerator(cpu=True)
    if mode == "fsdp2":
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # what every later state begins with
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, reshard_after_forward=True, auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Qwen2DecoderLayer"], cpu_ram_efficient_loading=False,
        )  # fmt: skip
    return accelerator


def worker(folder: Path, mode: str) -> None:
    torch.set_num_threads(1)
    accelerator = accelerator_of(mode)
    assert accelerator.num_processes == (1 if mode == "one" else 2), accelerator.num_processes
    for name in CASES:
        steps_of(folder, mode, name, accelerator)
    if mode == "fsdp2":
        gradients_of_a_head_that_lets_its_weight_go()


def loop_of(name: str, accelerator: Any) -> Any:
    from grpo_kernels.training.addition import TASKS
    from grpo_kernels.training.loop import GRPOLoop
    from grpo_kernels.training.task import Task

    tied, changes = CASES[name]
    tokenizer = TASKS["addition"].build_tokenizer()
    rows, _ = TASKS["addition"].build_rows(0, 0)
    recipe = Recipe(**(SETTINGS | {"gradient_accumulation_steps": 4 // accelerator.num_processes} | changes))
    return GRPOLoop(Task(model_of(tokenizer, tied), tokenizer, rows, [], {}), recipe, accelerator)


def steps_of(folder: Path, mode: str, name: str, accelerator: Any) -> None:
    """Two steps on fixed completions: their metrics, what is sampled after them, the weights and a checkpoint.

    A third is taken by this loop and by one that goes on from the checkpoint, which DeepSpeed has not.
    """
    from grpo_kernels.training.checkpoint import save_checkpoint
    from grpo_kernels.training.evaluation import evaluate
    from grpo_kernels.training.rollout import teacher_forced
    from grpo_kernels.training.samplers import ModelSampler
    from grpo_kernels.training.task import evaluation_options

    loop = loop_of(name, accelerator)
    if mode == "fsdp2":
        is_divided = [hasattr(p, "full_tensor") for m in (loop.model, loop.policy.reference) for p in m.parameters()]
        assert accelerator.is_fsdp2 and all(is_divided)
    share = 8 // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    completions = [" ".join("123456"[: 1 + k % 6]) for k in range(8)]  # of unequal lengths
    prompts = [row["prompt"] for row in loop.rows[:8]][mine]
    rollout = teacher_forced(loop.tokenizer, prompts, completions[mine])
    every = torch.tensor([[1.0], [0.0], [0.5], [2.0], [0.0], [0.0], [1.0], [3.0]])
    batch = loop._make_batch(rollout, every)
    micro_batches = [batch.select(part) for part in torch.arange(share).split(2)]
    found = [loop.optimizer_step(micro_batches) for _ in range(2)]
    found.append(loop._reward_metrics(loop._gather(every[mine])) | loop._length_metrics(rollout))
    options = {"max_completion_length": 4, "temperature": 0.0, "synced": mode != "one"}
    greedy = ModelSampler(loop.model, loop.tokenizer, **options)(prompts)
    sampled = accelerator.gather(accelerator.pad_across_processes(greedy.completion_ids, dim=1)).tolist()
    recipe = replace(loop.recipe, check="test_training_processes:of_even_length")
    accuracies = evaluate(loop.sampler, loop.tokenizer, loop.rows[:5], accelerator, **evaluation_options(recipe))
    checkpoint = save_checkpoint(
        folder / f"{mode}-{name}", 2, loop.model, loop.tokenizer, keep=1, training_state=loop.training_state()
    )
    weights = accelerator.get_state_dict(loop.policy.wrapped)
    weights = {key: value.clone() for key, value in weights.items()} if accelerator.is_main_process else {}
    if not mode.startswith("zero"):
        loop.optimizer_step(micro_batches)
        expected = accelerator.get_state_dict(loop.policy.wrapped)
        accelerator.free_memory()
        resumed = loop_of(name, accelerator)
        resumed.restore(checkpoint)
        resumed.optimizer_step(micro_batches)
        whole = accelerator.get_state_dict(resumed.policy.wrapped)
        assert all(torch.equal(whole[key], value) for key, value in expected.items())
    accelerator.free_memory()
    if accelerator.is_main_process:
        save_file(weights, folder / f"{mode}-{name}.safetensors")
        (folder / f"{mode}-{name}.json").write_text(json.dumps([*found, accuracies, {"sampled": sampled}]))


def gradients_of_a_head_that_lets_its_weight_go() -> None:
    """Under FSDP2 by hand, with a loss whose gradient waits for the backward: it gathers the head's weight again."""
    from torch.distributed.fsdp import fully_shard

    from grpo_kernels import GRPOLossConfig
    from grpo_kernels.training.addition import TASKS
    from grpo_kernels.training.policy import Policy
    from grpo_kernels.training.rollout import teacher_forced

    tokenizer = TASKS["addition"].build_tokenizer()
    rollout = teacher_forced(tokenizer, ["1 + 2 =", "3 + 4 ="], ["1 2 3", "4"])
    found = []
    for is_divided in (False, True):
        policy = Policy(model_of(tokenizer, tied=False), GRPOLossConfig(importance_sampling_level="sequence"))
        if is_divided:
            fully_shard(policy.model.lm_head, reshard_after_forward=True)
            fully_shard(policy.model, reshard_after_forward=True)
        old_logprobs = torch.full(rollout.completion_ids.shape, -3.0)
        loss, *_ = policy.loss(rollout, torch.tensor([1.0, -0.5]), old_logprobs=old_logprobs)
        loss.backward()
        gradients = [p.grad.full_tensor() if is_divided else p.grad for p in policy.model.parameters()]
        found.append((loss.detach(), *gradients))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def launched(mode: str, folder: Path) -> Found:
    command = [sys.executable, __file__, str(folder), mode]
    if mode != "one":
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return Found(folder, mode)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return launched("one", tmp_path_factory.mktemp("one"))


HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
WITH_DEEPSPEED = pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")


@pytest.mark.early
@pytest.mark.parametrize(
    "mode",
    [
        "ddp",
        pytest.param("fsdp2", marks=pytest.mark.full),
        *(pytest.param(f"zero{stage}", marks=[WITH_DEEPSPEED, pytest.mark.full]) for stage in (2, 3)),
    ],
)
def test_two_processes_take_the_steps_of_one(mode: str, one: Found, tmp_path: Path) -> None:
    import transformers

    two = launched(mode, tmp_path)
    for name in CASES:
        *metrics, accuracies, sampled = two.metrics[name]
        *expected, alone, greedy = one.metrics[name]
        assert accuracies["eval_accuracy_greedy"] == alone["eval_accuracy_greedy"]
        assert accuracies["eval_accuracy"] in [k / 20 for k in range(21)]  # of 5 rows, none of them twice
        assert metrics[1]["clip_ratio/region_mean"] > 0 and metrics[1]["kl"] > 0
        for got, want in zip(metrics, expected, strict=True):
            assert got.keys() == want.keys()
            assert got == pytest.approx(want, rel=1e-5, abs=1e-6)
        assert sampled == greedy
        for key, value in one.weights[name].items():
            torch.testing.assert_close(two.weights[name][key], value, rtol=1e-5, atol=1e-6)
        loaded: dict[str, Tensor] = transformers.AutoModelForCausalLM.from_pretrained(two.checkpoint(name)).state_dict()
        assert loaded.keys() == two.weights[name].keys()
        assert all(torch.equal(loaded[key], value) for key, value in two.weights[name].items())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds threads by Linux's /proc")
def test_a_command_ends_the_process_group_and_gloos_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(recipe: Recipe) -> None:
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        model = DistributedDataParallel(torch.nn.Linear(2, 2))
        model.cycle = [model]  # as accelerate holds it
        model(torch.ones(1, 2)).sum().backward()
        assert gloo_threads()

    monkeypatch.setattr("grpo_kernels.training.run.train", train)
    assert not gloo_threads()
    assert cli.main(["train", "--output_dir", str(tmp_path / "run")]) == 0
    assert not distributed.is_initialized() and not gloo_threads()


def gloo_threads() -> list[str]:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    worker(Path(sys.argv[1]), sys.argv[2])
    end_worker()
