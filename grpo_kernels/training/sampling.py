"""Who samples the completions: the model itself, transformers' continuous batching, or a vLLM server."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo_kernels import GRPOLossConfig, Sequences, rollout_weights
from grpo_kernels.training.policy import base_model
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.rollout import Rollout, end_token_ids, generate, generation_config, padded
from grpo_kernels.training.tasks import Row
from grpo_kernels.training.templates import encode_prompts, render_prompts
from grpo_kernels.training.vllm_client import Sampled, Served, ServerError, VLLMServer
from grpo_kernels.training.weight_transfer import Transfer, connected, describe, whole_weights
from grpo_kernels.training.wrapping import is_deepspeed

_LOGGER = logging.getLogger(__name__)
_PAGE = 32  # tokens of a block of the paged cache, on a CPU
_LEAST_BATCH_TOKENS = 256
_MEMORY_SHARE = 0.5  # of a GPU's free memory for the paged cache: TRL's, which leaves room for the backward


class Sampler(Protocol):
    """What draws completions from the model that is trained; every process calls it alike."""

    context_length: int | None  # tokens of a prompt and its completion; None where there is no bound

    def __call__(self, prompts: Sequence[str], number: int) -> Rollout:
        """A completion of each prompt of this process, group after group; ``number`` optimizer steps have been."""


def build_sampler(model: Any, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, accelerator: Accelerator) -> Sampler:
    """The sampler that a recipe asks for.

    Raises:
        ServerError: The server cannot be reached, or does not offer what is needed.
        RuntimeError: Continuous batching, or the way for weights into the server, cannot run here.
        ValueError: One of the two is asked for under ZeRO-3, which leaves no process a weight to sample by or to send.
    """
    if is_deepspeed(accelerator) and accelerator.deepspeed_plugin.hf_ds_config.is_zero3():
        for name in ("use_vllm", "use_transformers_continuous_batching"):
            if getattr(recipe, name):
                raise ValueError(f"{name} must be False under ZeRO-3, which divides the weights; take ZeRO-2")
    if recipe.use_vllm:
        return ServerSampler(model, tokenizer, recipe, accelerator)
    if recipe.use_transformers_continuous_batching:
        return ContinuousSampler(model, tokenizer, recipe)
    return ModelSampler(model, tokenizer, recipe, synced=accelerator.num_processes > 1)


class ModelSampler:
    """``model.generate``."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, *, synced: bool) -> None:
        self.model, self.tokenizer, self.recipe, self.synced = model, tokenizer, recipe, synced
        self.context_length = context_length_of(model)

    def __call__(self, prompts: Sequence[str], number: int) -> Rollout:
        return generate(
            self.model,
            self.tokenizer,
            prompts,
            max_completion_length=self.recipe.max_completion_length,
            temperature=self.recipe.temperature,
            synced=self.synced,
        )


class ContinuousSampler:
    """transformers' ``generate_batch``: a sequence that ends makes room for the next, over a paged cache.

    On a CPU the cache is as large as the batch needs; on a GPU transformers fits it into half of the free memory,
    unless ``transformers_continuous_batching_config`` says otherwise. Each process samples with its own whole model.

    Raises:
        RuntimeError: This transformers, or this model, has no ``generate_batch`` with a configuration.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        self.model, self.tokenizer, self.recipe = base_model(model), tokenizer, recipe
        self.context_length = context_length_of(model)
        self._config_type = getattr(transformers.generation, "ContinuousBatchingConfig", None)
        if self._config_type is None or not hasattr(self.model, "generate_batch"):
            raise RuntimeError(
                f"use_transformers_continuous_batching: {type(self.model).__name__} of transformers "
                f"{transformers.__version__} cannot; 5.8 and later can, with generative models"
            )

    def __call__(self, prompts: Sequence[str], number: int) -> Rollout:
        """Raises RuntimeError where parameters are divided over processes, or transformers gives a request up."""
        if any(hasattr(parameter, "full_tensor") for parameter in self.model.parameters()):
            raise RuntimeError("use_transformers_continuous_batching needs whole parameters, and these are FSDP2's")
        recipe, ids = self.recipe, encode_prompts(prompts, self.tokenizer)
        config = generation_config(self.model, self.tokenizer, recipe.max_completion_length, recipe.temperature)
        found = self.model.generate_batch(
            ids,
            generation_config=config,
            continuous_batching_config=self._config_type(**self._options(ids)),
            progress_bar=False,
        )
        outputs = list(found.values())
        errors = [output.error for output in outputs if output.error is not None]
        if errors or len(outputs) != len(ids):
            raise RuntimeError(
                f"continuous batching finished {len(outputs) - len(errors)} of {len(ids)} completions: "
                f"{errors[0] if errors else 'its thread stopped, and logged why'}"
            )
        completions = [output.generated_tokens for output in outputs]
        return padded(
            ids, completions, config.eos_token_id, pad_id=self.tokenizer.pad_token_id, device=self.model.device
        )

    def _options(self, ids: list[list[int]]) -> dict[str, Any]:
        given = json.loads(self.recipe.transformers_continuous_batching_config or "{}")
        if self.model.device.type != "cpu":
            return {"max_memory_percent": _MEMORY_SHARE} | given
        blocks = sum(math.ceil((len(row) + self.recipe.max_completion_length) / _PAGE) + 1 for row in ids)
        batch_tokens = max(_LEAST_BATCH_TOKENS, len(ids))
        return {"page_size": _PAGE, "num_blocks": blocks, "max_batch_tokens": batch_tokens} | given


class ServerSampler:
    """A vLLM server, which is sent the weights before the first generation and after every step that is sampled from.

    The main process alone talks to it, for all: their prompts go there and the completions come back. The server's
    log-probabilities become ``sampling_logprobs``. Seeds are drawn from torch's generator, so that a resumed run asks
    for what the uninterrupted one would have. What fails in the main process is raised in every one.

    Raises:
        ServerError: The server cannot be reached, or does not offer what is needed.
        RuntimeError: Its way for weights cannot run here.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, accelerator: Accelerator
    ) -> None:
        self.model, self.tokenizer, self.recipe, self.accelerator = model, tokenizer, recipe, accelerator
        self.server = VLLMServer(
            recipe.vllm_server_base_url or f"http://{recipe.vllm_server_host}:{recipe.vllm_server_port}",
            timeout=recipe.vllm_server_timeout,
            generation_timeout=recipe.vllm_generation_timeout,
        )
        self._transfer: Transfer | None = None  # of the main process
        self._sent: int | None = None  # the number of steps that the server's weights have had
        self._served: Served = self._by_main(self._connect)
        bounds = [bound for bound in (context_length_of(model), self._served.context_length) if bound is not None]
        self.context_length = min(bounds) if bounds else None

    def __call__(self, prompts: Sequence[str], number: int) -> Rollout:
        """Raises ServerError where the server fails."""
        if number != self._sent:
            self._send_weights()
            self._sent = number
        own = encode_prompts(prompts, self.tokenizer)
        every = own if self.accelerator.num_processes == 1 else gather_object(own)
        completions = self._by_main(lambda: self._complete(every))
        first = self.accelerator.process_index * len(own)
        mine = completions[first : first + len(own)]
        return padded(
            own,
            [completion.ids for completion in mine],
            end_token_ids(self.model, self.tokenizer),
            pad_id=self.tokenizer.pad_token_id,
            device=self.model.device,
            logprobs=[completion.logprobs for completion in mine],
        )

    def _connect(self) -> Served:
        self.server.wait_until_up()
        served = self.server.served()
        self._check_logprobs()
        self._transfer = connected(self.server, self.recipe.vllm_group_port, self.model.device)
        return served

    def _check_logprobs(self) -> None:
        """Raises where the server's log-probabilities are not of the distribution that it samples from."""
        config = self.server.settings().get("model_config")
        mode = config.get("logprobs_mode") if isinstance(config, dict) else None
        if self.recipe.temperature == 1 or mode == "processed_logprobs":
            return
        if mode is not None:
            raise ServerError(
                f"{self.server.base_url} answers {mode}, which at temperature={self.recipe.temperature} are not those "
                "that it samples by; it must run with --logprobs-mode processed_logprobs"
            )
        _LOGGER.warning("%s does not say its logprobs_mode; processed_logprobs is needed", self.server.base_url)

    def _send_weights(self) -> None:
        """Collective: every process gathers, the main one sends."""
        weights = whole_weights(self.model)

        def send() -> None:
            try:
                self._transfer.send(describe(self.model), weights)
            finally:
                for _ in weights:  # the others gather all of them
                    pass

        if not self.accelerator.is_main_process:
            for _ in weights:
                pass
        self._by_main(send)

    def _complete(self, prompts: list[list[int]]) -> list[Sampled]:
        n = self.recipe.num_generations
        asked = prompts[::n]
        seeds = torch.randint(2**31, (len(asked),)).tolist()
        groups = self.server.complete(
            self._served.model,
            asked,
            n=n,
            seeds=seeds,
            temperature=self.recipe.temperature,
            max_tokens=self.recipe.max_completion_length,
            end_ids=end_token_ids(self.model, self.tokenizer),
            vocab_size=self.model.get_output_embeddings().weight.shape[0],
        )
        return [completion for group in groups for completion in group]

    def _by_main(self, act: Callable[[], Any]) -> Any:
        """What the main process makes of it, in every process; a failure is everyone's, so that nobody waits for it."""
        found, failure = [None, None], None
        if self.accelerator.is_main_process:
            try:
                found[0] = act()
            except Exception as error:
                failure, found[1] = error, f"{type(error).__name__}: {error}"
        broadcast_object_list(found)
        if failure is not None:
            raise failure
        if found[1] is not None:
            raise ServerError(f"in the main process: {found[1]}")
        return found[0]


def context_length_of(model: Any) -> int | None:
    """The most tokens that a model was made for; None where its configuration names none."""
    return getattr(base_model(model).config.get_text_config(), "max_position_embeddings", None)


def rows_that_fit(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    context_length: int | None,
    *,
    what: str = "training",
    least: int | None = None,
) -> list[Row]:
    """The rows whose prompt has a token, is no longer than ``max_prompt_length`` and leaves room for a completion.

    What is left out is counted in a warning.

    Args:
        rows: Problems.
        tokenizer: Of their prompts.
        recipe: Says the lengths.
        context_length: Tokens of a prompt and its completion; None where there is no bound.
        what: Names the rows in messages.
        least: How many must be left; by default one generation's.

    Raises:
        ValueError: There is no room for a prompt, or fewer rows are left.
    """
    least = recipe.prompts_per_generation if least is None else least
    limits = [] if recipe.max_prompt_length is None else [recipe.max_prompt_length]
    if context_length is not None:
        room = context_length - recipe.max_completion_length
        if room < 1:
            raise ValueError(
                f"max_completion_length must be less than the context of {context_length} tokens, "
                f"got {recipe.max_completion_length}"
            )
        limits.append(room)
    limit = min(limits, default=math.inf)
    texts = render_prompts(rows, tokenizer, recipe.prompt_format)
    lengths = [len(ids) for ids in encode_prompts(texts, tokenizer)]
    empty, long = lengths.count(0), sum(length > limit for length in lengths)
    if empty:
        _LOGGER.warning("%d of %d %s prompts have no token and are left out", empty, len(rows), what)
    if long:
        _LOGGER.warning("%d of %d %s prompts are longer than %d tokens and left out; the longest has %d",
                        long, len(rows), what, limit, max(lengths))  # fmt: skip
    fitting = [row for row, length in zip(rows, lengths, strict=True) if 0 < length <= limit]
    if len(fitting) < least:
        at_most = f" and at most {limit} tokens" if limits else ""
        raise ValueError(
            f"at least {least} {what} prompts must have a token{at_most}, got {len(fitting)} of {len(rows)}"
        )
    return fitting


def correction_statistics(
    old_logprobs: Tensor,  # [B, T]
    sampling_logprobs: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    config: GRPOLossConfig,
) -> Tensor:  # [B, 7]
    """Of each completion, for ``correction_metrics``.

    The tokens that the sampler scored, the sum and the largest of their differences of log-probabilities; the weights
    that correct them, one a token or, where it is the sequence's, one: how many, their sum, the least, the largest.
    """
    kept = mask.bool()
    scored = kept & ~sampling_logprobs.isnan()
    gap = torch.where(scored, (old_logprobs - sampling_logprobs).abs(), 0)
    ratios = rollout_weights(old_logprobs, sampling_logprobs, kept, Sequences.of(old_logprobs, None), config)
    low, high = ratios.masked_fill(~kept, torch.inf).amin(dim=1), ratios.masked_fill(~kept, -torch.inf).amax(dim=1)
    count, ratio_sum = kept.sum(dim=1), torch.where(kept, ratios, 0).sum(dim=1)
    if (config.rollout_correction or "").startswith("sequence"):
        count, ratio_sum = count.clamp(max=1), torch.where(count > 0, high, 0)
    columns = [scored.sum(dim=1), gap.sum(dim=1), gap.amax(dim=1), count, ratio_sum, low, high]
    return torch.stack([column.to(gap.dtype) for column in columns], dim=1)


def correction_metrics(statistics: Tensor) -> dict[str, float]:  # [B, 7]
    """TRL's metrics of how far the engine that sampled is from the model.

    Args:
        statistics: ``correction_statistics`` of all processes, on the host. A completion without a token has no part in
            them; without any there is none.
    """
    known = statistics[statistics[:, 3] > 0].double()
    if not len(known):
        return {}
    scored, gap, gap_max, ratios, ratio, low, high = known.unbind(dim=1)
    return {
        "sampling/sampling_logp_difference/mean": (gap.sum() / scored.sum().clamp(min=1)).item(),
        "sampling/sampling_logp_difference/max": gap_max.max().item(),
        "sampling/importance_sampling_ratio/min": low.min().item(),
        "sampling/importance_sampling_ratio/mean": (ratio.sum() / ratios.sum()).item(),
        "sampling/importance_sampling_ratio/max": high.max().item(),
    }
