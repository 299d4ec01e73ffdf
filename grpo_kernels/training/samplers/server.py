"""Completions of a vLLM server, which is sent the weights of the model that is trained.

Weights are announced over HTTP and broadcast through a process group.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo_kernels.errors import described
from grpo_kernels.training.data.templates import encode_prompts
from grpo_kernels.training.models import base_model, context_length_of, has_adapters
from grpo_kernels.training.rollout import Rollout, end_token_ids, pad_rollout
from grpo_kernels.training.samplers.vllm_client import Completion, ServerError, VLLMServer

_LOGGER = logging.getLogger(__name__)
Metadata = list[tuple[str, str, list[int]]]  # name, dtype ("bfloat16") and shape of each weight, as TRL has them
SendWeights = Callable[[Metadata, Iterator[tuple[str, Tensor]]], None]  # raises where the server did not take them


class ServerSampler:
    """A vLLM server, which is sent the weights before the first generation and after every step that is sampled from.

    The main process alone talks to it, for all: their prompts go there and the completions come back. The server's
    log-probabilities become ``sampling_logprobs``. Seeds are drawn from torch's generator, so that a resumed run asks
    for what the uninterrupted one would have. What fails in the main process is raised in every one.

    Args:
        model: As for ``ModelSampler``, and so are ``tokenizer``, ``max_completion_length`` and ``temperature``.
        accelerator: Of the processes.
        base_url: As for ``VLLMServer``, and so are ``timeout`` and ``generation_timeout``.
        group_port: Of the trainer, for the weights.

    Raises:
        ServerError: The server cannot be reached, does not offer what is needed, or fails later, in a call.
        RuntimeError: Its way for weights cannot run here.
        ValueError: The model has trained modules beside its adapters (``modules_to_save``).
    """

    gives_logprobs = True

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
        self.end_ids = end_token_ids(model, tokenizer)
        weight_metadata(model)  # raises, in every process, where it has weights that no server takes
        self._send: SendWeights | None = None  # of the main process
        self._sent_step: int | None = None  # the number of steps that the server's weights have had
        self._model_name, served_length = self._call_on_main(lambda: self._connect(group_port))
        self.context_length = min(filter(None, (context_length_of(model), served_length)), default=None)

    def __call__(
        self, prompts: Sequence[str], *, step: int = 0, group_size: int = 1, temperature: float | None = None
    ) -> Rollout:
        if step != self._sent_step:
            self._send_weights()
            self._sent_step = step
        prompt_ids = encode_prompts(prompts, self.tokenizer)
        group_prompts = gather_object(prompt_ids)[::group_size]
        temperature = self.temperature if temperature is None else temperature
        completions = self._call_on_main(lambda: self._complete(group_prompts, group_size, temperature))
        first = self.accelerator.process_index * len(prompt_ids)
        completions = completions[first : first + len(prompt_ids)]
        return pad_rollout(
            prompt_ids,
            [completion.ids for completion in completions],
            self.end_ids,
            pad_id=self.tokenizer.pad_token_id,
            device=self.model.device,
            logprobs=[completion.logprobs for completion in completions],
        )

    def _connect(self, group_port: int) -> tuple[str, int | None]:
        """The server's model and its context length, once it is sure that its log-probabilities and weights will do."""
        self.server.wait_until_up()
        model, config = self.server.served_model(), self.server.config()
        mode = (config.get("model_config") or {}).get("logprobs_mode")
        if self.temperature != 1 and mode is None:
            _LOGGER.warning("%s does not say its logprobs_mode; processed_logprobs is needed", self.server.base_url)
        elif self.temperature != 1 and mode != "processed_logprobs":
            raise ServerError(
                f"{self.server.base_url} answers {mode}, which at temperature={self.temperature} are not those "
                "that it samples by; it must run with --logprobs-mode processed_logprobs"
            )
        transfer_config = config.get("weight_transfer_config")
        backend = transfer_config.get("backend") if isinstance(transfer_config, dict) else None
        if backend not in TRANSFERS:
            raise ServerError(
                f"{self.server.base_url} has the weight_transfer_config {transfer_config!r}: its backend must be "
                f"""{" or ".join(TRANSFERS)}, as with --weight-transfer-config '{{"backend": "nccl"}}'"""
            )
        self._send = TRANSFERS[backend](self.server, group_port, self.model.device)
        return model

    def _send_weights(self) -> None:
        """Collective: every process gathers to the end, the main one sends."""
        weights = full_weights(self.model)

        def send() -> None:
            try:
                self._send(weight_metadata(self.model), weights)
            finally:
                deque(weights, maxlen=0)
            self.server.reset_prefix_cache()

        if not self.accelerator.is_main_process:
            deque(weights, maxlen=0)
        self._call_on_main(send)

    def _complete(self, prompts: list[list[int]], group_size: int, temperature: float) -> list[Completion]:
        return self.server.complete(
            prompts,
            torch.randint(2**31, (len(prompts),)).tolist(),
            vocab_size=self.model.get_output_embeddings().weight.shape[0],
            model=self._model_name,
            n=group_size,
            temperature=temperature,
            max_tokens=self.max_completion_length,
            stop_token_ids=self.end_ids,
        )

    def _call_on_main(self, function: Callable[[], Any]) -> Any:
        """What the function returns in the main process, in every process. So is its failure raised: none waits."""
        result, failure = None, None
        if self.accelerator.is_main_process:
            try:
                result = function()
            except Exception as error:
                failure = error
        message = [result, None if failure is None else f"{type(failure).__name__}: {failure}"]
        broadcast_object_list(message)
        if failure is not None:
            raise failure
        if message[1] is not None:
            raise ServerError(f"in the main process: {message[1]}")
        return message[0]


def nccl_transfer(server: VLLMServer, group_port: int, device: torch.device) -> SendWeights:
    """vLLM's own broadcast between GPUs, by TRL's client, whose waits these are. It has not been run: it needs GPUs."""
    try:
        from trl.generation.vllm_client import VLLMClient

        client = VLLMClient(base_url=server.base_url, group_port=group_port, connection_timeout=server.timeout)
    except ImportError as error:
        raise RuntimeError(
            f"{server.base_url} takes weights over NCCL, for which trl>=1.16, vllm and requests must be "
            f"installed beside the trainer: {error}"
        ) from error

    def call(function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:  # TRL's client has no type of its own
            raise ServerError(f"{server.base_url} did not take the weights: {described(error)}") from error

    call(client.init_communicator, device)
    return partial(call, client.update_named_params)


#: What opens a way for weights, by the backend that a server's weight_transfer_config names. Takes the server, the
#: trainer's vllm_group_port and the model's device. A server of one's own may add a backend.
TRANSFERS: dict[str, Callable[[VLLMServer, int, torch.device], SendWeights]] = {"nccl": nccl_transfer}


def weight_metadata(model: Any) -> Metadata:
    """Of what ``full_weights`` yields, without gathering or merging anything."""
    return [(name, str(p.dtype).removeprefix("torch."), list(p.shape)) for name, p, _ in _named_parameters(model)]


@torch.no_grad()
def full_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The parameters under the names of a checkpoint, one at a time: gathered where FSDP2 has divided them, and with
    adapters merged into what they adapt, which the model itself is not. Gathering is collective: every process must
    come to the end.
    """
    for name, parameter, adapted in _named_parameters(model):
        weight = parameter if adapted is None else _merged(adapted, parameter)
        yield name, weight.full_tensor() if hasattr(weight, "full_tensor") else weight.detach()


def _named_parameters(model: Any) -> Iterator[tuple[str, Tensor, Any]]:
    """Name, parameter, and the adapters' module where it is a weight that they adapt."""
    if not has_adapters(model):
        yield from ((name, parameter, None) for name, parameter in model.named_parameters())
        return
    base, adapters = base_model(model), model.base_model.prefix  # "lora_"
    for name, parameter in base.named_parameters():
        if ".modules_to_save." in name:
            raise ValueError(f"modules_to_save cannot be sent to a server: the model has {name}")
        if f".{adapters}" in name:
            continue
        module, _, leaf = name.partition(".base_layer.")
        adapted = base.get_submodule(module) if leaf == "weight" else None
        yield name.replace(".base_layer.", "."), parameter, adapted


def _merged(adapted: Any, weight: Tensor) -> Tensor:
    """A weight with its adapters added. The model keeps the bits it had, which unmerging alone would round."""
    kept = weight.detach().clone()
    adapted.merge()
    merged = weight.detach().clone()
    adapted.unmerge()
    weight.copy_(kept)
    return merged
