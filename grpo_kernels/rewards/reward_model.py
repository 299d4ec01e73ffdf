"""A reward model: a sequence classifier with one output, called as a reward function."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from grpo_kernels.errors import described
from grpo_kernels.hub import check_folder, check_loaded, load_tokenizer, use_cache_if_unreachable
from grpo_kernels.rewards.completions import completion_text

_load_tokenizer = functools.cache(load_tokenizer)


class RewardModel:
    """The logit that a sequence classifier gives to each prompt with its completion, as TRL reads it.

    Texts are joined, messages go through the tokenizer's chat template; both get no further special tokens.

    Args:
        model: A module whose output has ``logits`` ``[B, 1]``, or the folder or Hub name of one, read from safetensors
            at the first call and put on a GPU where there is one.
        tokenizer: The model's; by default the one that was saved with it.
        batch_size: Completions that go through it at once.

    Raises:
        ValueError: The name has no configuration of a model, or a module does not say where its tokenizer is.

    Example:
        >>> RewardModel("Skywork/Skywork-Reward-V2-Qwen3-0.6B", batch_size=8)  # doctest: +SKIP
    """

    def __init__(
        self, model: nn.Module | str, tokenizer: PreTrainedTokenizerBase | None = None, *, batch_size: int = 16
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self.batch_size = batch_size
        self._name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
        if not self._name and tokenizer is None:
            raise ValueError("tokenizer must be given for a reward model that was not loaded by a name")
        if isinstance(model, str):
            _check_classifier(model)

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        model = _load_model(self._model) if isinstance(self._model, str) else self._model
        tokenizer = self._tokenizer or _load_tokenizer(self._name)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if getattr(model, "config", None) is not None:
            model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        texts = [
            p + completion_text(c) if isinstance(p, str) else tokenizer.apply_chat_template([*p, *c], tokenize=False)
            for p, c in zip(prompts, completions, strict=True)
        ]
        device = next(model.parameters()).device
        rewards: list[float] = []
        for begin in range(0, len(texts), self.batch_size):
            batch = texts[begin : begin + self.batch_size]
            inputs = tokenizer(batch, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
            rewards += model(**inputs.to(device)).logits[:, 0].float().tolist()
        return rewards


def _check_classifier(name: str) -> None:
    """Reads the configuration alone, so that a wrong name fails before any work."""
    check_folder("reward_funcs", name)
    if not Path(name).is_dir():
        use_cache_if_unreachable()
    try:
        architectures = AutoConfig.from_pretrained(name).architectures or []
    except (OSError, ValueError) as error:
        raise ValueError(f"no reward model {name!r}: {described(error)}") from error
    if architectures and not any("SequenceClassification" in architecture for architecture in architectures):
        raise ValueError(f"reward model {name!r} must be a sequence classifier, got {', '.join(architectures)}")


@functools.cache
def _load_model(name: str) -> nn.Module:
    model, loading_info = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=1, use_safetensors=True, output_loading_info=True
    )
    check_loaded(loading_info, name)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
