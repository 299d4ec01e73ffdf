"""Checkpoints that are either complete or absent: written beside their place, then renamed into it.

A checkpoint is a folder of ``from_pretrained`` with four things more, without pickle, from which a run goes on:

    optimizer.safetensors   the optimizer's tensors by parameter
    trainer_state.json      the place that the loop was at, the optimizer's groups, the configuration
    random-<rank>.safetensors, random-<rank>.json   the random states of each process
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_kernels.hub import check_loaded
from grpo_kernels.training.models import ADAPTERS, BASE, base_model, has_adapters, is_deepspeed

STATE = "trainer_state.json"
OPTIMIZER = "optimizer.safetensors"
#: What makes no difference to what a run is.
MAY_DIFFER = frozenset({
    "output_dir", "overwrite_output_dir", "resume", "logging_steps", "num_completions_to_print", "completions_steps",
    "save_steps", "save_total_limit", "disable_tqdm", "device", "num_threads", "report_to", "project", "run_name",
    "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_generation_timeout",
    "vllm_group_port",
})  # fmt: skip
#: What may differ between the run that wrote a checkpoint and the one that goes on from it: it may be longer, and its
#: evaluations may need less memory. The learning rate goes on as the new schedule has it.
MAY_DIFFER_ON_RESUME = MAY_DIFFER | {"max_steps", "eval_batch_size"}
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SEPARATOR = "|"  # in no name of a parameter
_STATE = {"step": int, "rows_drawn": int, "schedule": dict, "param_groups": list, "recipe": dict, "processes": int,
          "rows": str, "num_tokens": int}  # fmt: skip
_NAME = re.compile(r"checkpoint-(\d+)")


class TrainingState(NamedTuple):
    """What a run has beside its model: its optimizer, the place that it is at, what it was told."""

    model: Any  # as accelerate has wrapped it
    optimizer: Any  # likewise
    accelerator: Accelerator
    place: dict[str, Any]  # step, rows drawn and their digest, schedule, tokens
    configuration: dict[str, Any]


def save_checkpoint(
    output_dir: Path,
    step: int,  # optimizer steps so far
    model: PreTrainedModel,  # what is training_state, not wrapped
    tokenizer: PreTrainedTokenizerBase,
    *,
    keep: int,
    training_state: TrainingState | None = None,  # added, so that a run can go on from there
) -> Path:
    """Writes ``checkpoint-<step>``, loadable by ``from_pretrained``, and deletes all but the newest ``keep``.

    The folder appears under its name only when it is whole; an interrupted write leaves a hidden folder, which the
    next one replaces. ``checkpoint-0``, what GRPO started from, stays: it is the reference of a resumed run. Of a model
    with adapters these alone are saved, and once, in ``checkpoint-0/base``, the model under them where it has no name
    to be loaded by.

    Raises:
        OSError: It cannot be written, as on a full disk. Earlier ones stay, and of this one nothing.
    """
    final = output_dir / f"checkpoint-{step}"
    unfinished = output_dir / ".unfinished-checkpoint"
    is_main = training_state is None or training_state.accelerator.is_main_process
    try:
        _write(unfinished, model, tokenizer, training_state, is_main)
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
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training_state: TrainingState | None,
    is_main: bool,
) -> None:
    if is_main:
        _remove(folder)
        folder.mkdir(parents=True)
    weights = {"save_embedding_layers": False} if has_adapters(model) else {}  # no vocabulary is resized here
    if training_state is not None:
        training_state.accelerator.wait_for_everyone()
        weights |= {"state_dict": training_state.accelerator.get_state_dict(training_state.model)}
        write_state(folder, training_state)
        training_state.accelerator.wait_for_everyone()
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
    """Puts a checkpoint's weights, or its adapters', into a model, also ``wrapped`` by accelerate; every process calls.

    Raises:
        ValueError: The checkpoint cannot be read, or is of another model.
    """
    try:
        if has_adapters(model):
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(model, load_file(folder / ADAPTERS))
        else:
            options = StateDictOptions(full_state_dict=True)
            set_model_state_dict(wrapped, read_weights(folder, model), options=options)
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
    steps = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(steps)]


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


def write_state(folder: Path, training_state: TrainingState) -> None:
    """Adds a run's state to a checkpoint's folder; every process calls it, at the same step.

    Under DeepSpeed, whose engine keeps the optimizer to itself, nothing is added: no run can go on from there.
    """
    accelerator = training_state.accelerator
    if is_deepspeed(accelerator):
        return
    state = get_optimizer_state_dict(training_state.model, training_state.optimizer.optimizer, options=_WHOLE)
    if accelerator.is_main_process:
        tensors, groups = _split(state)
        save_file(tensors, folder / OPTIMIZER)
        written = {**training_state.place, "param_groups": groups, "recipe": training_state.configuration}
        written["processes"] = accelerator.num_processes
        (folder / STATE).write_text(json.dumps(written, indent=1), encoding="utf-8")
    tensors, values = _random_state()
    save_file(tensors, folder / f"random-{accelerator.process_index}.safetensors")
    (folder / f"random-{accelerator.process_index}.json").write_text(json.dumps(values), encoding="utf-8")


def read_state(folder: Path, training_state: TrainingState) -> dict[str, Any]:
    """Puts optimizer and random state where the run that wrote the checkpoint had them; its model is loaded before.

    Returns:
        What that run wrote, with the place that it was at.

    Raises:
        ValueError: The checkpoint is cut short, of another recipe or another number of processes.
    """
    rank = training_state.accelerator.process_index
    state = check_state(folder, training_state.configuration, training_state.accelerator.num_processes)
    try:
        tensors = load_file(folder / OPTIMIZER)
        random_tensors = load_file(folder / f"random-{rank}.safetensors")
        values = json.loads((folder / f"random-{rank}.json").read_text(encoding="utf-8"))
        _check_types(values, {"python": list, "numpy": list})
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"checkpoint {folder} cannot be read, it may be cut short: {error}") from error
    optimizer_state = _merge(tensors, state["param_groups"])
    set_optimizer_state_dict(training_state.model, training_state.optimizer.optimizer, optimizer_state, options=_WHOLE)
    _set_random_state(random_tensors, values)
    return state


def check_state(folder: Path, configuration: dict[str, Any], processes: int) -> dict[str, Any]:
    """A checkpoint's ``trainer_state.json``; needs no model yet.

    Raises:
        ValueError: It is cut short, or of a recipe that would give another run; the message names what differs.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        _check_types(state, _STATE)
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {folder} cannot be read, it may be cut short: {error}") from error
    step, max_steps = state["step"], configuration["max_steps"]
    if max_steps < step:
        raise ValueError(f"max_steps must be at least {step}, the steps of checkpoint {folder}, got {max_steps}")
    now = json.loads(json.dumps(configuration))
    differing = {
        name: (state["recipe"].get(name), value)
        for name, value in now.items()
        if name not in MAY_DIFFER_ON_RESUME and state["recipe"].get(name) != value
    }
    if state["processes"] != processes:
        differing["processes"] = (state["processes"], processes)
    if differing:
        listed = ", ".join(f"{name} {old!r}, now {new!r}" for name, (old, new) in differing.items())
        raise ValueError(f"checkpoint {folder} is of another run: {listed}")
    return state


def _check_types(content: Any, kinds: dict[str, type]) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"expected a mapping, got {type(content).__name__}")
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"expected {name!r} to be of type {kind.__name__}, got {content.get(name)!r}")


def _split(state: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's state as named tensors, and its groups as what JSON can hold."""
    tensors = {
        f"{parameter}{_SEPARATOR}{name}": torch.as_tensor(value).clone().contiguous()
        for parameter, values in state["state"].items()
        for name, value in values.items()
    }
    return tensors, [{**group, "params": list(group["params"])} for group in state["param_groups"]]


def _merge(tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parameter, name = key.split(_SEPARATOR)
        state.setdefault(parameter, {})[name] = tensor
    return {"state": state, "param_groups": groups}


def _random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Of torch on every device, Python and numpy."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda:{k}": state for k, state in enumerate(torch.cuda.get_rng_state_all())}
    version, keys, gauss = random.getstate()
    name, numpy_keys, place, has_gauss, cached = np.random.get_state()
    values = {"python": [version, list(keys), gauss]}
    return tensors, values | {"numpy": [name, numpy_keys.tolist(), place, has_gauss, cached]}


def _set_random_state(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["cpu"])
    for name, state in tensors.items():
        if name.startswith("cuda:"):
            torch.cuda.set_rng_state(state, name)
    version, keys, gauss = values["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state((values["numpy"][0], np.array(values["numpy"][1], dtype=np.uint32), *values["numpy"][2:]))
