"""Checkpoints that are either complete or absent: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_kernels.hub import check_loaded
from grpo_kernels.training.models import ADAPTERS, BASE, base_model, has_adapters
from grpo_kernels.training.state import Trained, write_state

_NAME = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(
    output_dir: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    keep: int,
    trained: Trained | None = None,
) -> Path:
    """Writes ``checkpoint-<step>``, loadable by ``from_pretrained``, and deletes all but the newest ``keep``.

    The folder appears under its name only when it is whole; an interrupted write leaves a hidden folder, which the
    next one replaces. ``checkpoint-0``, what GRPO started from, stays: it is the reference of a resumed run. Of a model
    with adapters these alone are saved, and once, in ``checkpoint-0/base``, the model under them where it has no name
    to be loaded by.

    Args:
        output_dir: The run's folder.
        step: Optimizer steps so far.
        model: What is trained, not wrapped.
        tokenizer: Saved beside it.
        keep: How many to keep.
        trained: The state to add, so that a run can go on from there; every process calls then.

    Raises:
        OSError: It cannot be written, as on a full disk. Earlier ones stay, and of this one nothing.
    """
    final = output_dir / f"checkpoint-{step}"
    unfinished = output_dir / ".unfinished-checkpoint"
    is_main = trained is None or trained.accelerator.is_main_process
    try:
        _write(unfinished, model, tokenizer, trained, is_main)
        if is_main:
            _remove(final)
            os.replace(unfinished, final)
            for old in list_checkpoints(output_dir)[:-keep]:
                if step_of(old) > 0:
                    _remove(old)
    except (OSError, SafetensorError) as error:
        if is_main:
            _remove(unfinished)
        raise OSError(f"checkpoint {final} could not be written: {error}") from error
    return final


def _write(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trained: Trained | None, is_main: bool
) -> None:
    if is_main:
        _remove(folder)
        folder.mkdir(parents=True)
    weights = {"save_embedding_layers": False} if has_adapters(model) else {}  # no vocabulary is resized here
    if trained is not None:
        trained.accelerator.wait_for_everyone()
        weights |= {"state_dict": trained.accelerator.get_state_dict(trained.model)}
        write_state(folder, trained)
        trained.accelerator.wait_for_everyone()
    if is_main:
        model.save_pretrained(folder, **weights)
        tokenizer.save_pretrained(folder)
        if has_adapters(model) and not base_model(model).name_or_path:
            _write_base(folder, model, weights.get("state_dict") or model.state_dict())


def _write_base(folder: Path, model: Any, weights: dict[str, Any]) -> None:
    """Adds the model under the adapters, unless ``checkpoint-0`` has it."""
    if (folder.parent / "checkpoint-0" / BASE).is_dir():
        return
    own = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): weight
        for name, weight in weights.items()
        if f".{model.base_model.prefix}" not in name  # "lora_"
    }
    base_model(model).save_pretrained(folder / BASE, state_dict=own)


def load_weights(folder: Path, model: Any, wrapped: Any) -> None:
    """Puts a checkpoint's weights, or those of its adapters, into a model; every process calls.

    Args:
        folder: The checkpoint.
        model: What is trained, not wrapped.
        wrapped: The same as accelerate has wrapped it.

    Raises:
        ValueError: The checkpoint cannot be read, or is of another model.
    """
    try:
        if has_adapters(model):
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(model, load_file(folder / ADAPTERS))
        else:
            whole = StateDictOptions(full_state_dict=True)
            set_model_state_dict(wrapped, read_weights(folder, model), options=whole)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"checkpoint {folder} cannot be read, it may be cut short: {error}") from error


def read_weights(folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    """A checkpoint's weights, by the names of a model of its class.

    Raises:
        ValueError: It cannot be read, or lacks some.
    """
    try:
        loaded, loading_info = type(model).from_pretrained(
            folder, dtype=model.dtype, use_safetensors=True, output_loading_info=True
        )
        check_loaded(loading_info, str(folder))
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"checkpoint {folder} cannot be read, it may be cut short: {error}") from error
    return loaded.state_dict()


def status_line(output_dir: Path) -> str:
    """What a run that stopped has left, in words."""
    complete = list_checkpoints(output_dir)
    kept = f"last complete checkpoint: {complete[-1]}" if complete else "no checkpoint yet"
    return f"{kept}; metrics: {output_dir}/metrics.jsonl"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint's name says."""
    return int(_NAME.fullmatch(checkpoint.name)[1])


def clear_run(output_dir: Path) -> None:
    """Deletes what a run writes into ``output_dir``, and nothing else that stands there."""
    for path in list_checkpoints(output_dir):
        _remove(path)
    _remove(output_dir / ".unfinished-checkpoint")
    files = ("metrics.jsonl", "samples.jsonl", "curves.png", "report.html", "config.yaml", "versions.json")
    for name in (*files, "pass_rates.json"):
        (output_dir / name).unlink(missing_ok=True)
    _remove(output_dir / "tracker_logs")


def _remove(folder: Path) -> None:
    """Deletes a folder that first loses its name, so that an interruption leaves no checkpoint with parts missing."""
    doomed = folder.parent / ".deleted-checkpoint"
    if doomed.exists():
        shutil.rmtree(doomed)
    if folder.exists():
        os.replace(folder, doomed)
        shutil.rmtree(doomed)
