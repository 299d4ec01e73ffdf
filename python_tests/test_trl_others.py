"""TRL's other trainers, and several processes, with and without these kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from test_trl import _tokenizer  # noqa: E402
from test_trl_drop_in import _assert_equal, _length, _reward, _train, folder, trl_as_it_was  # noqa: E402, F401
from testing.processes import end_worker  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from grpo_kernels.integrations import trl as drop_in  # noqa: E402
from grpo_kernels.integrations.trl import apply  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
COMMON = {
    "use_cpu": True, "bf16": False, "report_to": [], "max_steps": 2, "logging_steps": 1, "save_strategy": "no",
    "seed": 1, "per_device_train_batch_size": 2, "learning_rate": 0.5, "lr_scheduler_type": "constant", "optim": "sgd",
    "disable_tqdm": True,
}  # fmt: skip
TEXTS = ["1 2 3 4 <eos>", "5 6 7 <eos>", "8 9 1 2 3 <eos>", "4 4 <eos>"]
PAIRS = {
    "prompt": ["1 2", "3", "4 5", "6"],
    "chosen": [" 3 4", " 5", " 6 7", " 8"],
    "rejected": [" 9", " 1 1", " 2", " 3 4"],
}


def _sft(path: str, output: str) -> Any:
    arguments = trl.SFTConfig(output_dir=output, max_length=16, **COMMON)
    return trl.SFTTrainer(
        path, args=arguments, train_dataset=Dataset.from_dict({"text": TEXTS}), processing_class=_tokenizer()
    )


def _dpo(path: str, output: str) -> Any:
    arguments = trl.DPOConfig(output_dir=output, max_length=16, **COMMON)
    return trl.DPOTrainer(path, args=arguments, train_dataset=Dataset.from_dict(PAIRS), processing_class=_tokenizer())


def _kto(path: str, output: str) -> Any:
    data = {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"], "label": [True, False, True, False]}
    arguments = trl.KTOConfig(output_dir=output, max_length=16, **COMMON)
    return trl.KTOTrainer(
        path, ref_model=AutoModelForCausalLM.from_pretrained(path), args=arguments,
        train_dataset=Dataset.from_dict(data), processing_class=_tokenizer(),
    )  # fmt: skip


def _rloo(path: str, output: str) -> Any:
    options = COMMON | {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6}
    return trl.RLOOTrainer(
        path, reward_funcs=_reward, args=trl.RLOOConfig(output_dir=output, beta=0.05, **options),
        train_dataset=Dataset.from_dict({"prompt": ["1 2 3", "4"]}), processing_class=_tokenizer(),
    )  # fmt: skip


def _distillation(path: str, output: str) -> Any:
    torch.manual_seed(5)
    teacher = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    arguments = trl.DistillationConfig(output_dir=output, max_completion_length=6, beta=0.5, **COMMON)
    return trl.DistillationTrainer(
        path, teacher_model=teacher, args=arguments, train_dataset=Dataset.from_dict({"prompt": ["1 2 3", "4"]}),
        processing_class=_tokenizer(),
    )  # fmt: skip


TRAINERS = {"sft": _sft, "dpo": _dpo, "kto": _kto, "rloo": _rloo, "distillation": _distillation}


def _run(name: str, path: Path, output: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    torch.manual_seed(1)
    trainer = TRAINERS[name](str(path), str(output))
    trainer.train()
    logged = {
        f"{key}@{entry['step']}": value
        for entry in trainer.state.log_history
        for key, value in entry.items()
        if not any(part in key for part in ("time", "per_second", "flos"))
    }
    return logged, {key: p.detach().clone() for key, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("name", TRAINERS)
def test_another_trainers_logs_and_parameters_are_stock(name: str, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    calls = []
    stock = _run(name, folder, tmp_path)
    served = "head_divergence" if name == "distillation" else "head_logprobs"
    function = getattr(drop_in, served)
    with apply(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(drop_in, served, lambda *given: calls.append(1) or function(*given))
        ours = _run(name, folder, tmp_path)
    assert calls
    _assert_equal(stock, ours)


def test_tokens_of_tools_are_not_scored(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """They are attended to, and no term of the loss reads them: the numbers are stock's, at fewer rows."""
    with pytest.MonkeyPatch.context() as patch:
        _with_tools(patch)
        stock = _train(trl.GRPOTrainer, folder, tmp_path, num_iterations=2, beta=0.04)
        with apply() as applied:
            ours = _train(trl.GRPOTrainer, folder, tmp_path, num_iterations=2, beta=0.04)
        with apply(speculate=False):
            without = _train(trl.GRPOTrainer, folder, tmp_path, num_iterations=2, beta=0.04)
    _assert_equal(stock, ours)
    _assert_equal(stock, without)
    assert applied.counts.hits > 0 == applied.counts.misses


def _with_tools(patch: pytest.MonkeyPatch) -> None:
    """Every third completion token is a tool's, as of ``compute_loss`` on."""
    prepare = trl.GRPOTrainer._prepare_inputs

    def prepare_inputs(self: Any, *arguments: Any) -> Any:
        inputs = dict(prepare(self, *arguments))
        mask = inputs["completion_mask"]
        inputs["tool_mask"] = (torch.arange(mask.shape[1]) % 3 != 1).to(mask.dtype).expand(mask.shape)
        return inputs

    patch.setattr(trl.GRPOTrainer, "_prepare_inputs", prepare_inputs)


@pytest.mark.early
@pytest.mark.full
def test_two_processes(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """DDP on gloo, each with half of the batch."""
    stock, ours = (_launched("ddp", use, folder, tmp_path) for use in (False, True))
    assert stock["logged"].keys() == ours["logged"].keys() and len(stock["logged"]) > 10
    for name, value in stock["logged"].items():
        assert ours["logged"][name] == pytest.approx(value, rel=1e-5, abs=1e-5, nan_ok=True), name
    for name, value in stock["parameters"].items():
        assert ours["parameters"][name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert ours["hits"] > 0 == ours["misses"]


@pytest.mark.early
@pytest.mark.full
def test_a_sharded_model(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """FSDP2 on gloo: the head's weight is gathered by TRL, its gradient scattered by autograd."""
    stock, ours = (_launched("fsdp2", use, folder, tmp_path) for use in (False, True))
    assert stock["logprobs"] == pytest.approx(ours["logprobs"], rel=1e-5)
    for name, value in stock["gradients"].items():
        assert ours["gradients"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def _launched(what: str, use: bool, folder: Path, tmp_path: Path) -> dict[str, Any]:  # noqa: F811
    out = tmp_path / f"{what}-{use}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, what,
               str(folder), str(out), str(int(use))]  # fmt: skip
    environment = dict(
        os.environ, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", PYTHONPATH=str(Path(__file__).parent)
    )
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return json.loads(out.read_text())


def _ddp(path: str, out: str, use: str) -> None:
    """What each process runs: a trainer."""
    applied = apply() if use == "1" else None
    logged, parameters, trainer = _train(
        trl.GRPOTrainer, Path(path), Path(out).parent, rewards=[_reward, _length], num_iterations=2, beta=0.04
    )
    if trainer.accelerator.is_main_process:
        counts = {} if applied is None else {"hits": applied.counts.hits, "misses": applied.counts.misses}
        values = {name: p.flatten().tolist() for name, p in parameters.items()}
        Path(out).write_text(json.dumps({"logged": logged, "parameters": values, **counts}))


def _fsdp2(path: str, out: str, use: str) -> None:
    """What each process runs: a model's forward and backward, its parameters divided."""
    from torch.distributed import get_rank, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from trl.trainer.utils import add_fused_lm_head

    init_process_group("gloo")
    if use == "1":
        apply()
    model = AutoModelForCausalLM.from_pretrained(path)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ids = torch.tensor([[2, 3, 4, 5, 6], [7, 8, 9, 10, 2]])
    labels = ids.masked_fill(torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 0, 0]]).bool(), -100)
    found = model(ids, labels=labels, fused_lm_head=True)
    (found.log_probs.sum() + 0.1 * found.entropy.sum()).backward()
    gradients = {name: p.grad.full_tensor().flatten().tolist() for name, p in model.named_parameters()}
    if get_rank() == 0:
        logprobs = found.log_probs.flatten().tolist()
        Path(out).write_text(json.dumps({"logprobs": logprobs, "gradients": gradients}))


if __name__ == "__main__":
    {"ddp": _ddp, "fsdp2": _fsdp2}[sys.argv[1]](*sys.argv[2:])
    end_worker()
