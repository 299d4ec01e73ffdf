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

ADAPTERS, ADAPTERS_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's names
BASE = "base"  # in a checkpoint of adapters, the folder of a model that can be had nowhere else


def load_pretrained(
    name: str, *, dtype: str = "float32", attn_implementation: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model by its folder or Hub name, in eval mode on the CPU, and its tokenizer.

    Its dropout is set to 0, so that log-probabilities can be recomputed. A folder of adapters gives their base with
    the adapters merged into it. Code that comes with a model runs with ``trust_remote_code`` alone, and weights are
    read from safetensors alone, never from pickle, which can run code too.

    Args:
        name: A folder or a name on the Hub.
        dtype: "float32", "bfloat16" or "float16".
        attn_implementation: By default flash-attention 2 where it can run, else what the model's class takes.
        trust_remote_code: Run the code that comes with the model.

    Raises:
        ValueError: The model cannot be found or read, lacks weights, or its tokenizer has no token that ends a text.
    """
    check_folder("model_name_or_path", name)
    if not Path(name).is_dir():
        use_cache_if_unreachable()
    elif not any((Path(name) / file).is_file() for file in ("config.json", ADAPTERS_CONFIG)):
        inside = sorted(path.parent.name for path in Path(name).glob("*/config.json"))
        hint = f"; there is one in {', '.join(inside)}" if inside else ""
        raise ValueError(f"model_name_or_path {name!r} cannot be loaded: the folder has no config.json{hint}")
    try:
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        is_adapter_folder = (Path(name) / ADAPTERS_CONFIG).is_file()
        source = _base_of(Path(name)) if is_adapter_folder else name
        model = _load_whole(source, dtype, attn_implementation, trust_remote_code)
        model = _merge_adapters(model, Path(name)) if is_adapter_folder else model
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


def _load_whole(name: str, dtype: str, attn_implementation: str | None, trust_remote_code: bool) -> PreTrainedModel:
    trusted = {"trust_remote_code": trust_remote_code}
    config = without_dropout(AutoConfig.from_pretrained(name, **trusted))
    model, loading_info = AutoModelForCausalLM.from_pretrained(
        name,
        config=config,
        dtype=getattr(torch, dtype),
        attn_implementation=attn_implementation or _attention(dtype, config),
        use_safetensors=True,
        output_loading_info=True,
        **trusted,
    )
    check_loaded(loading_info, name)
    return model


def _merge_adapters(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The base with the adapters of a folder merged into it: a model of its own, without a name."""
    from peft import PeftModel

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
    if not (folder / ADAPTERS).is_file():  # peft would go on to a pickle
        raise ValueError(f"its adapters must be in {ADAPTERS}")
    name = json.loads((folder / ADAPTERS_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if name:
        return name
    saved = [folder / BASE, folder.parent / "checkpoint-0" / BASE]
    for base in saved:
        if base.is_dir():
            return str(base)
    raise ValueError(f"its adapters are of a model that has no name and is in neither {saved[0]} nor {saved[1]}")


def add_adapters(model: PreTrainedModel, *, r: int, alpha: int, target_modules: list[str]) -> Any:
    """The model with LoRA adapters, in eval mode.

    Args:
        model: Changed.
        r: Rank of the adapters.
        alpha: Their scale, over the rank.
        target_modules: The modules to adapt; ``["all-linear"]`` for all but the head.

    Raises:
        ValueError: ``target_modules`` takes in the head.
    """
    from peft import LoraConfig, get_peft_model  # only a run with adapters needs it
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=target_modules[0] if target_modules == ["all-linear"] else target_modules,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config).eval()
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(f"lora_target_modules must leave out the head, which is not adapted, got {target_modules}")
    return adapted


def without_dropout(config: Any) -> Any:
    """The configuration with every dropout rate at 0, nested ones too."""
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
            setattr(config, name, 0.0)
        elif hasattr(value, "model_type"):
            without_dropout(value)
    return config


def _attention(dtype: str, config: Any) -> str | None:
    """Flash-attention 2 where it can run; None for what the model's class takes by itself."""
    can_flash = torch.cuda.is_available() and dtype != "float32" and is_flash_attn_2_available()
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # None: its code comes with it
    return "flash_attention_2" if can_flash and getattr(known, "_supports_flash_attn", False) else None


def base_model(model: Any) -> Any:
    """The model under its adapters, or itself."""
    return model.get_base_model() if has_adapters(model) else model


def has_adapters(model: Any) -> bool:
    """Whether peft has put adapters on it."""
    return hasattr(model, "disable_adapter")


def context_length_of(model: Any) -> int | None:
    """The most tokens that a model was made for; None where its configuration names none."""
    return getattr(base_model(model).config.get_text_config(), "max_position_embeddings", None)


def pick_device(name: str) -> torch.device:
    """``name`` as a device, "auto" being CUDA where there is one.

    Raises:
        ValueError: There is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be a torch device or auto, got {name!r}: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that is here, got {name!r}: torch sees no GPU")
    return device
