"""Loading the model of a run: any causal language model of Hugging Face's, with adapters where the recipe asks."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from grpo_kernels.hub import check_folder, check_loaded, load_tokenizer, use_cache_if_unreachable
from grpo_kernels.training.recipe import Recipe

ADAPTERS, ADAPTERS_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's names
BASE = "base"  # in a checkpoint of adapters, the folder of a model that can be had nowhere else


def load_pretrained(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that a recipe names, in eval mode on the CPU, and its tokenizer.

    Its dropout is set to 0, so that log-probabilities can be recomputed. A folder of adapters gives their base with
    the adapters merged into it. Code that comes with a model runs with ``trust_remote_code`` alone, and weights are
    read from safetensors alone, never from pickle, which can run code too.

    Raises:
        ValueError: The model cannot be found or read, lacks weights, or its tokenizer has no token that ends a text.
    """
    name = recipe.model_name_or_path
    check_folder("model_name_or_path", name)
    if not Path(name).is_dir():
        use_cache_if_unreachable()
    elif not any((Path(name) / file).is_file() for file in ("config.json", ADAPTERS_CONFIG)):
        inside = sorted(path.parent.name for path in Path(name).glob("*/config.json"))
        hint = f"; there is one in {', '.join(inside)}" if inside else ""
        raise ValueError(f"model_name_or_path {name!r} cannot be loaded: the folder has no config.json{hint}")
    try:
        tokenizer = load_tokenizer(name, trust_remote_code=recipe.trust_remote_code)
        has_adapters = (Path(name) / ADAPTERS_CONFIG).is_file()
        model = _merged(Path(name), recipe) if has_adapters else _whole(name, recipe)
    except (OSError, RuntimeError, SafetensorError, StrictDataclassError, ValueError) as error:
        raise ValueError(f"model_name_or_path {name!r} cannot be loaded: {_reason(name, error)}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name!r} must have an end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def _reason(name: str, error: Exception) -> str:
    if Path(name).is_dir() or not constants.is_offline_mode():
        return str(error)
    return "there is no such folder, the Hub cannot be reached, and its cache has no model of this name"


def _whole(name: str, recipe: Recipe) -> PreTrainedModel:
    trusted = {"trust_remote_code": recipe.trust_remote_code}
    config = without_dropout(AutoConfig.from_pretrained(name, **trusted))
    model, found = AutoModelForCausalLM.from_pretrained(
        name,
        config=config,
        dtype=getattr(torch, recipe.dtype),
        attn_implementation=_attention(recipe, config),
        use_safetensors=True,
        output_loading_info=True,
        **trusted,
    )
    check_loaded(found, name)
    return model


def _merged(folder: Path, recipe: Recipe) -> PreTrainedModel:
    """The base of a folder of adapters with these merged into it: a model of its own, without a name."""
    from peft import PeftModel

    if not (folder / ADAPTERS).is_file():  # peft would go on to a pickle
        raise ValueError(f"its adapters must be in {ADAPTERS}")
    base = _whole(_base_of(folder), recipe)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
        try:
            model = PeftModel.from_pretrained(base, folder).merge_and_unload(safe_merge=True)
        except UserWarning as error:
            raise ValueError(f"its adapters are of another model, or cut short: {error}") from error
    model.name_or_path = ""
    return model


def _base_of(folder: Path) -> str:
    """What the adapters in a folder are of: a model by its name, or one that was saved with the run."""
    name = json.loads((folder / ADAPTERS_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if name:
        return name
    saved = [folder / BASE, folder.parent / "checkpoint-0" / BASE]
    for base in saved:
        if base.is_dir():
            return str(base)
    raise ValueError(f"its adapters are of a model that has no name and is in neither {saved[0]} nor {saved[1]}")


def prepared(model: PreTrainedModel, recipe: Recipe) -> Any:
    """The model with the recipe's adapters and gradient checkpointing, in eval mode.

    Raises:
        ValueError: ``lora_target_modules`` takes in the head, which recipes do not adapt.
    """
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not recipe.use_peft:
        return model.eval()
    from peft import LoraConfig, get_peft_model  # only a run with adapters needs it
    from peft.tuners.tuners_utils import BaseTunerLayer

    targets = recipe.lora_target_modules
    config = LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=0.0,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config).eval()
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(f"lora_target_modules must leave out the head, which is not adapted, got {targets}")
    return adapted


def without_dropout(config: Any) -> Any:
    """The configuration with every dropout rate at 0, nested ones too."""
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
            setattr(config, name, 0.0)
        elif hasattr(value, "model_type"):
            without_dropout(value)
    return config


def _attention(recipe: Recipe, config: Any) -> str | None:
    """The recipe's, or flash-attention 2 where it can run; None for what the model's class takes by itself."""
    if recipe.attn_implementation is not None:
        return recipe.attn_implementation
    can_flash = torch.cuda.is_available() and recipe.dtype != "float32" and is_flash_attn_2_available()
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # None: its code comes with it
    return "flash_attention_2" if can_flash and getattr(known, "_supports_flash_attn", False) else None
