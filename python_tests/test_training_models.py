"""Models as they are loaded: adapters with their base, no pickle, no code that nobody asked for."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_training_resume import SETTINGS, recipe_of

from grpo_kernels import cli
from grpo_kernels.training.addition import TASKS, build_model
from grpo_kernels.training.checkpoint import list_checkpoints, read_weights, save_checkpoint
from grpo_kernels.training.models import load_pretrained
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.report import read_records
from grpo_kernels.training.run import train
from grpo_kernels.training.task import load_model, prepare_model

ADAPTED: dict[str, Any] = {"use_peft": True, "lora_r": 4, "max_steps": 4, "learning_rate": 0.05}
IDS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of adapters on a built-in task's own model, which has no name."""
    folder = tmp_path_factory.mktemp("adapted")
    train(recipe_of(folder, **ADAPTED))
    return folder


def loaded(name: Path, **options: Any) -> Any:
    return load_pretrained(str(name), **options)[0]


def test_a_resumed_run_of_adapters_is_bit_equal(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoint-4")
    train(recipe_of(again, **ADAPTED, resume=True))
    left, right = (load_file(folder / "checkpoint-4" / "adapter_model.safetensors") for folder in (run, again))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    records = [
        [{k: v for k, v in record.items() if k != "step_time"} for record in read_records(folder / "metrics.jsonl")]
        for folder in (run, again)
    ]
    assert records[0] == records[1]


def test_a_checkpoint_of_adapters_is_their_base_with_them(run: Path) -> None:
    """Against adapters put by hand on a base made by hand."""
    recipe = recipe_of(run, **ADAPTED)
    torch.manual_seed(recipe.seed)
    by_hand = prepare_model(load_model(recipe)[0], recipe)
    base = by_hand(IDS).logits
    saved = load_file(run / "checkpoint-4" / "adapter_model.safetensors")
    own = get_peft_model_state_dict(by_hand, save_embedding_layers=False)
    assert saved.keys() == own.keys()
    for name, value in own.items():
        value.copy_(saved[name])
    expected = by_hand(IDS).logits
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(loaded(run / "checkpoint-4")(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert [path.name for path in run.glob("*/base")] == ["base"]  # once, however many checkpoints


def test_adapters_on_what_adapters_made_keep_the_base_of_both(run: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, use_peft=True, lora_r=2, model_name_or_path=str(run / "checkpoint-4"))
    model, tokenizer = load_pretrained(recipe.model_name_or_path)
    expected = model(IDS).logits
    save_checkpoint(tmp_path, 5, prepare_model(model, recipe), tokenizer, keep=1)
    torch.testing.assert_close(loaded(tmp_path / "checkpoint-5")(IDS).logits, expected)


def test_a_stage_of_adapters_ends_and_the_next_measures_it(tmp_path: Path) -> None:
    common = {name: value for name, value in SETTINGS.items() if name != "sft_steps"} | {"max_completion_length": 4}
    stages = {"g": {"kind": "grpo", **ADAPTED, "max_steps": 2}, "m": {"kind": "eval", "model": "g"}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), "common": common, "stages": stages}))
    assert cli.main(["recipe", str(path)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "summary.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["g", "m"]
    assert lines[0]["eval_accuracy"] == lines[1]["eval_accuracy"]


def test_adapters_without_their_base_or_in_a_pickle_are_refused(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(run / "checkpoint-4", alone)
    with pytest.raises(ValueError, match=r"has no name and is in neither .*alone/base nor .*checkpoint-0/base"):
        loaded(alone)
    shutil.copytree(run / "checkpoint-0" / "base", alone / "base")
    loaded(alone)
    saved = load_file(alone / "adapter_model.safetensors")
    save_file(dict(list(saved.items())[2:]), alone / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"of another model, or cut short: .*missing adapter keys"):
        loaded(alone)
    torch.save(saved, alone / "adapter_model.bin")
    (alone / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapters must be in adapter_model\.safetensors"):
        loaded(alone)


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]])
def test_adapters_of_the_head_are_refused(targets: list[str]) -> None:
    model = build_model(TASKS["addition"].build_tokenizer(), seed=0)
    with pytest.raises(ValueError, match="lora_target_modules must leave out the head"):
        prepare_model(model, Recipe(use_peft=True, lora_target_modules=targets))


class Touching:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_pickle_is_read(tmp_path: Path) -> None:
    tokenizer = TASKS["addition"].build_tokenizer()
    model = build_model(tokenizer, seed=0)
    folder = save_checkpoint(tmp_path, 1, model, tokenizer, keep=1)
    for weights in (model.state_dict(), {"model.norm.weight": Touching(tmp_path / "run")}):
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=r"cannot be loaded: .*model\.safetensors"):
            loaded(folder)
        with pytest.raises(ValueError, match=r"cannot be read.*model\.safetensors"):
            read_weights(folder, model)
    assert not (tmp_path / "run").exists() and list_checkpoints(tmp_path) == [folder]


CODE = """
from pathlib import Path
from transformers import Qwen2Config, Qwen2ForCausalLM
Path(__file__).with_name("run").touch()
class MineConfig(Qwen2Config):
    model_type = "mine"
class MineForCausalLM(Qwen2ForCausalLM):
    config_class = MineConfig
"""


def test_a_models_code_is_run_where_the_recipe_trusts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
    monkeypatch.setattr("sys.path", [*sys.path])
    tokenizer = TASKS["addition"].build_tokenizer()
    folder = save_checkpoint(tmp_path, 1, build_model(tokenizer, seed=0), tokenizer, keep=1)
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "code_of_mine.MineConfig", "AutoModelForCausalLM": "code_of_mine.MineForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": own}))
    (folder / "code_of_mine.py").write_text(CODE)
    with pytest.raises(ValueError, match=r"(?s)cannot be loaded: .*trust_remote_code=True"):
        loaded(folder)
    assert not list(tmp_path.rglob("run"))
    assert type(loaded(folder, trust_remote_code=True)).__name__ == "MineForCausalLM"
    assert list(cache.rglob("run"))
