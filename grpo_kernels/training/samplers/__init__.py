"""Who samples the completions: the model itself or transformers' continuous batching, and in ``server.py`` vLLM."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedTokenizerBase

from grpo_kernels.training.data.templates import encode_prompts
from grpo_kernels.training.models import base_model, context_length_of
from grpo_kernels.training.rollout import Rollout, end_mask, end_token_ids, generation_config, pad, pad_rollout

_PAGE = 32  # tokens of a block of the paged cache, on a CPU
_LEAST_BATCH_TOKENS = 256
_MEMORY_SHARE = 0.5  # of a GPU's free memory for the paged cache: TRL's, which leaves room for the backward


class ModelSampler:
    """``model.generate``.

    Args:
        model: Any causal language model, on any device.
        tokenizer: Must have a pad token.
        max_completion_length: Tokens of a completion at most.
        temperature: Divides the logits, unless a call says otherwise.
        synced: Every process goes on until the last is done, as models whose parameters are divided need.
        autocast: What the model runs in, so that it samples as the loss will see it.
    """

    gives_logprobs = False

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_completion_length: int,
        temperature: float = 1.0,
        synced: bool = False,
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        self.model, self.tokenizer, self.synced, self.autocast = model, tokenizer, synced, autocast
        self.max_completion_length, self.temperature = max_completion_length, temperature
        self.context_length, self.end_ids = context_length_of(model), end_token_ids(model, tokenizer)

    def __call__(
        self, prompts: Sequence[str], *, step: int = 0, group_size: int = 1, temperature: float | None = None
    ) -> Rollout:
        """From the whole distribution (no top-k, top-p or penalty), or the greedy one.

        The model's own generation config is set aside, so that the sampled distribution is the one that the loss sees.
        """
        encoded = pad(encode_prompts(prompts, self.tokenizer), self.tokenizer.pad_token_id, "left")
        prompt_ids, prompt_mask = (rows.to(self.model.device) for rows in encoded)
        temperature = self.temperature if temperature is None else temperature
        config = generation_config(self.model, self.tokenizer, self.max_completion_length, temperature)
        own_config = self.model.generation_config
        self.model.generation_config = GenerationConfig()  # generate() fills what is unset from here
        try:
            with self.autocast(), torch.no_grad():
                sequences = self.model.generate(
                    prompt_ids, attention_mask=prompt_mask, generation_config=config, synced_gpus=self.synced
                )
        finally:
            self.model.generation_config = own_config
        completion_ids = sequences[:, prompt_ids.shape[1] :].contiguous()
        return Rollout(prompt_ids, prompt_mask, completion_ids, end_mask(completion_ids, config.eos_token_id))


class ContinuousSampler(ModelSampler):
    """transformers' ``generate_batch``: a sequence that ends makes room for the next, over a paged cache.

    On a CPU the cache is as large as the batch needs; on a GPU transformers fits it into half of the free memory,
    unless ``options``, for transformers' ``ContinuousBatchingConfig``, say otherwise. Each process samples with its own
    whole model.

    Raises:
        RuntimeError: This transformers, or this model, has no ``generate_batch`` with a configuration.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, *, options: Mapping[str, Any] | None = None, **common: Any
    ) -> None:
        self._config_type = getattr(transformers.generation, "ContinuousBatchingConfig", None)
        model = base_model(model)
        if self._config_type is None or not hasattr(model, "generate_batch"):
            raise RuntimeError(
                f"use_transformers_continuous_batching: {type(model).__name__} of transformers "
                f"{transformers.__version__} cannot; 5.8 and later can, with generative models"
            )
        super().__init__(model, tokenizer, **common)
        self.options = options or {}

    def __call__(
        self, prompts: Sequence[str], *, step: int = 0, group_size: int = 1, temperature: float | None = None
    ) -> Rollout:
        """Raises RuntimeError where parameters are divided over processes, or transformers gives a request up."""
        if any(hasattr(parameter, "full_tensor") for parameter in self.model.parameters()):
            raise RuntimeError("use_transformers_continuous_batching needs whole parameters, and these are FSDP2's")
        ids = encode_prompts(prompts, self.tokenizer)
        temperature = self.temperature if temperature is None else temperature
        config = generation_config(self.model, self.tokenizer, self.max_completion_length, temperature)
        with self.autocast():
            results = self.model.generate_batch(
                ids,
                generation_config=config,
                continuous_batching_config=self._config_type(**self._cache_options(ids)),
                progress_bar=False,
            )
        outputs = list(results.values())
        errors = [output.error for output in outputs if output.error is not None]
        if errors or len(outputs) != len(ids):
            raise RuntimeError(
                f"continuous batching finished {len(outputs) - len(errors)} of {len(ids)} completions: "
                f"{errors[0] if errors else 'its thread stopped, and logged why'}"
            )
        completions = [output.generated_tokens for output in outputs]
        pad_id, device = self.tokenizer.pad_token_id, self.model.device
        return pad_rollout(ids, completions, self.end_ids, pad_id=pad_id, device=device)

    def _cache_options(self, ids: list[list[int]]) -> dict[str, Any]:
        if self.model.device.type != "cpu":
            return {"max_memory_percent": _MEMORY_SHARE, **self.options}
        blocks = sum(math.ceil((len(row) + self.max_completion_length) / _PAGE) + 1 for row in ids)
        batch_tokens = max(_LEAST_BATCH_TOKENS, len(ids))
        return {"page_size": _PAGE, "num_blocks": blocks, "max_batch_tokens": batch_tokens, **self.options}
