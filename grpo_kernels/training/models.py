"""Loading the model of a run: any causal language model of Hugging Face's, with adapters where the recipe asks."""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import is_flash_attn_2_available

from grpo_kernels.training.recipe import Recipe


def load_pretrained(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that a recipe names, in eval mode on the CPU, and its tokenizer.

    Its dropout is set to 0, so that log-probabilities can be recomputed. Code that comes with a model is not run.

    Raises:
        ValueError: The model cannot be found or read, lacks weights, or its tokenizer has no token that ends a text.
    """
    name = recipe.model_name_or_path
    try:
        tokenizer = load_tokenizer(name)
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            config=without_dropout(AutoConfig.from_pretrained(name, trust_remote_code=False)),
            dtype=getattr(torch, recipe.dtype),
            attn_implementation=_attention(recipe),
            trust_remote_code=False,
            output_loading_info=True,
        )
        check_loaded(found, name)
    except (OSError, RuntimeError, SafetensorError, StrictDataclassError, ValueError) as error:
        raise ValueError(f"model_name_or_path {name!r} cannot be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name!r} must have an end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def check_loaded(found: dict[str, Any], name: str) -> None:
    """Raises ValueError where ``from_pretrained`` has filled weights that the files lack with random numbers."""
    missing = sorted(found["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{name} lacks weights of the model: {', '.join(missing[:3])}{more}")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer, padding on the left; one that was saved without a class of its own is what its file says.

    ``AutoTokenizer`` would take the class of the model's family for it, which splits and joins words in its own way.
    """
    saved = get_tokenizer_config(name).get("tokenizer_class")
    kind = PreTrainedTokenizerFast if saved in ("TokenizersBackend", "PreTrainedTokenizerFast") else AutoTokenizer
    return kind.from_pretrained(name, padding_side="left", trust_remote_code=False)


def prepared(model: PreTrainedModel, recipe: Recipe) -> Any:
    """The model with the recipe's adapters and gradient checkpointing, in eval mode."""
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not recipe.use_peft:
        return model.eval()
    from peft import LoraConfig, get_peft_model  # only a run with adapters needs it

    targets = recipe.lora_target_modules
    config = LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=0.0,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config).eval()


def without_dropout(config: Any) -> Any:
    """The configuration with every dropout rate at 0, nested ones too."""
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
            setattr(config, name, 0.0)
        elif hasattr(value, "model_type"):
            without_dropout(value)
    return config


def _attention(recipe: Recipe) -> str:
    """The recipe's, or flash-attention 2 where it is installed and can run, else sdpa."""
    if recipe.attn_implementation is not None:
        return recipe.attn_implementation
    can_flash = torch.cuda.is_available() and recipe.dtype != "float32" and is_flash_attn_2_available()
    return "flash_attention_2" if can_flash else "sdpa"
