"""The configurations that ship for ``accelerate launch``: accelerate reads them, and two processes run one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.report import read_records
from grpo_kernels.training.run import train

FOLDER = Path(str(resources.files("grpo_kernels.training") / "accelerate_configs"))
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
    "deepspeed_zero3": DistributedType.DEEPSPEED,
}


def test_accelerate_reads_each() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == KINDS.keys()
    found = {name: load_config_from_file(str(FOLDER / f"{name}.yaml")) for name in KINDS}
    assert {name: config.distributed_type for name, config in found.items()} == KINDS
    assert found["fsdp2"].fsdp_config["fsdp_version"] == 2
    assert [found[f"deepspeed_zero{stage}"].deepspeed_config["zero_stage"] for stage in (2, 3)] == [2, 3]


@pytest.mark.early
@pytest.mark.full
def test_two_processes_run_the_demo(tmp_path: Path) -> None:
    options = {
        "recipe": "addition", "device": "cpu", "max_steps": 2, "sft_steps": 0, "num_eval_prompts": 0,
        "disable_tqdm": True, "per_device_train_batch_size": 8, "output_dir": tmp_path,
    }  # fmt: skip
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    command = [*launch, "--config_file", str(FOLDER / "ddp.yaml"), "-m", "grpo_kernels.cli", "train", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "on 2 x cpu" in done.stdout
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2]
    assert (tmp_path / "checkpoint-2" / "random-1.json").exists()


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_what_accelerate_leaves_out_on_a_cpu_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    if name == "DEEPSPEED":
        pytest.importorskip("deepspeed")
    with pytest.raises(RuntimeError, match=f"asks for {name}, which accelerate has on no cpu"):
        train(Recipe(device="cpu", output_dir=str(tmp_path), disable_tqdm=True))
