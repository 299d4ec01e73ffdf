"""Weights from the trainer into a vLLM server: announced over HTTP, broadcast through a process group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.training.models import base_model, has_adapters
from grpo_kernels.training.samplers.vllm_client import VLLMServer

Metadata = list[tuple[str, str, list[int]]]  # name, dtype ("bfloat16") and shape of each weight, as TRL has them
SendWeights = Callable[[Metadata, Iterator[tuple[str, Tensor]]], None]  # raises where the server did not take them


def nccl_transfer(server: VLLMServer, group_port: int, device: torch.device) -> SendWeights:
    """vLLM's own broadcast between GPUs, by TRL's client of it. It has not been run: it needs a GPU on either side."""
    try:
        from trl.generation.vllm_client import VLLMClient

        client = VLLMClient(base_url=server.base_url, group_port=group_port, connection_timeout=server.timeout)
    except ImportError as error:
        raise RuntimeError(
            f"{server.base_url} takes weights over NCCL, for which trl>=1.16, vllm and requests must be "
            f"installed beside the trainer: {error}"
        ) from error
    client.init_communicator(device)
    return client.update_named_params


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
