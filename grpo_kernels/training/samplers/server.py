"""Completions of a vLLM server, which is sent the weights of the model that is trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedTokenizerBase

from grpo_kernels.training.data.templates import encode_prompts
from grpo_kernels.training.models import context_length_of
from grpo_kernels.training.rollout import Rollout, end_token_ids, padded
from grpo_kernels.training.samplers.vllm_client import Sampled, Served, ServerError, VLLMServer
from grpo_kernels.training.samplers.weight_transfer import Transfer, connected, describe, whole_weights

_LOGGER = logging.getLogger(__name__)


class ServerSampler:
    """A vLLM server, which is sent the weights before the first generation and after every step that is sampled from.

    The main process alone talks to it, for all: their prompts go there and the completions come back. The server's
    log-probabilities become ``sampling_logprobs``. Seeds are drawn from torch's generator, so that a resumed run asks
    for what the uninterrupted one would have. What fails in the main process is raised in every one.

    Args:
        model: Whose weights are sent.
        tokenizer: Must have a pad token.
        accelerator: Of the processes.
        base_url: ``http://host:port``.
        timeout: Seconds for it to come up, and for every answer but completions.
        generation_timeout: Seconds for the completions of a prompt.
        group_port: Of the trainer, for the weights.
        max_completion_length: Tokens of a completion at most.
        temperature: Divides the logits, unless a call says otherwise.

    Raises:
        ServerError: The server cannot be reached, or does not offer what is needed.
        RuntimeError: Its way for weights cannot run here.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
        *,
        base_url: str,
        timeout: float,
        generation_timeout: float,
        group_port: int,
        max_completion_length: int,
        temperature: float = 1.0,
    ) -> None:
        self.model, self.tokenizer, self.accelerator = model, tokenizer, accelerator
        self.max_completion_length, self.temperature = max_completion_length, temperature
        self.server = VLLMServer(base_url, timeout=timeout, generation_timeout=generation_timeout)
        self._group_port = group_port
        self.end_ids = end_token_ids(model, tokenizer)
        self._transfer: Transfer | None = None  # of the main process
        self._sent: int | None = None  # the number of steps that the server's weights have had
        self._served: Served = self._by_main(self._connect)
        bounds = [bound for bound in (context_length_of(model), self._served.context_length) if bound is not None]
        self.context_length = min(bounds) if bounds else None

    def __call__(
        self, prompts: Sequence[str], *, step: int = 0, group_size: int = 1, temperature: float | None = None
    ) -> Rollout:
        """Raises ServerError where the server fails."""
        if step != self._sent:
            self._send_weights()
            self._sent = step
        own = encode_prompts(prompts, self.tokenizer)
        all_prompts = own if self.accelerator.num_processes == 1 else gather_object(own)
        temperature = self.temperature if temperature is None else temperature
        completions = self._by_main(lambda: self._complete(all_prompts[::group_size], group_size, temperature))
        first = self.accelerator.process_index * len(own)
        mine = completions[first : first + len(own)]
        return padded(
            own,
            [completion.ids for completion in mine],
            self.end_ids,
            pad_id=self.tokenizer.pad_token_id,
            device=self.model.device,
            logprobs=[completion.logprobs for completion in mine],
        )

    def _connect(self) -> Served:
        self.server.wait_until_up()
        served = self.server.served()
        self._check_logprobs()
        self._transfer = connected(self.server, self._group_port, self.model.device)
        return served

    def _check_logprobs(self) -> None:
        """Raises where the server's log-probabilities are not of the distribution that it samples from."""
        config = self.server.settings().get("model_config")
        mode = config.get("logprobs_mode") if isinstance(config, dict) else None
        if self.temperature == 1 or mode == "processed_logprobs":
            return
        if mode is not None:
            raise ServerError(
                f"{self.server.base_url} answers {mode}, which at temperature={self.temperature} are not those "
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

    def _complete(self, prompts: list[list[int]], group_size: int, temperature: float) -> list[Sampled]:
        seeds = torch.randint(2**31, (len(prompts),)).tolist()
        groups = self.server.complete(
            self._served.model,
            prompts,
            n=group_size,
            seeds=seeds,
            temperature=temperature,
            max_tokens=self.max_completion_length,
            end_ids=self.end_ids,
            vocab_size=self.model.get_output_embeddings().weight.shape[0],
        )
        return [completion for group in groups for completion in group]

    def _by_main(self, act: Callable[[], Any]) -> Any:
        """What the main process makes of it, in every process; a failure is everyone's, so that nobody waits for it."""
        results, failure = [None, None], None  # the value, or the error in words
        if self.accelerator.is_main_process:
            try:
                results[0] = act()
            except Exception as error:
                failure, results[1] = error, f"{type(error).__name__}: {error}"
        broadcast_object_list(results)
        if failure is not None:
            raise failure
        if results[1] is not None:
            raise ServerError(f"in the main process: {results[1]}")
        return results[0]
