"""Weights from the trainer into a vLLM server: announced over HTTP, broadcast through a process group.

vLLM's four steps: ``/init_weight_transfer_engine`` once, then ``/start_weight_update``, ``/update_weights`` and
``/finish_weight_update`` for every update. The server names its backend:

    "nccl"  vLLM's own. TRL's client drives it here, and both TRL and vLLM must be installed beside the trainer.
            Nobody has run it yet: it needs a GPU on either side.
    "gloo"  torch.distributed on the CPU, for servers of one's own. Tested on loopback, with a server that holds a
            transformers model; vLLM has no such backend.
"""

from __future__ import annotations

import socket
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_kernels.training.models import base_model, has_adapters
from grpo_kernels.training.samplers.vllm_client import ServerError, VLLMServer

_STORE_PREFIX = "weight_transfer"


class Described(NamedTuple):
    """A parameter, as it is announced."""

    name: str
    dtype: str  # "bfloat16"
    shape: list[int]


class Transfer(Protocol):
    """A way for weights into a server."""

    def send(self, described: Sequence[Described], weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces the server's weights; raises ServerError where it did not take them."""


def connected(server: VLLMServer, group_port: int, device: torch.device) -> Transfer:
    """The way that the server offers.

    Args:
        server: It is up.
        group_port: Of the trainer, for the process group.
        device: Of the model.

    Raises:
        ServerError: It has no weight transfer, one of an unknown kind, or it did not join the group.
        RuntimeError: Its kind cannot run here; the message says why.
    """
    settings = server.settings().get("weight_transfer_config")
    backend = settings.get("backend") if isinstance(settings, dict) else None
    if backend == "gloo":
        return GlooTransfer(server, group_port)
    if backend == "nccl":
        return NCCLTransfer(server, group_port, device)
    raise ServerError(
        f"{server.base_url} has the weight_transfer_config {settings!r}: its backend must be nccl or gloo, as with "
        """--weight-transfer-config '{"backend": "nccl"}'"""
    )


class GlooTransfer:
    """Broadcasts on the CPU from the trainer, rank 0, to the server's workers, ranks from 1."""

    def __init__(self, server: VLLMServer, group_port: int) -> None:
        self.server, self._limit = server, timedelta(seconds=server.timeout)
        workers = server.request("GET", "/get_world_size")
        size = workers.get("world_size") if isinstance(workers, dict) else None
        if not isinstance(size, int) or size < 1:
            raise ServerError(f"{server.base_url}/get_world_size: expected a world_size of at least 1, got {workers!r}")
        address = _own_address(server)
        try:
            store = dist.TCPStore(address, group_port, size + 1, True, timeout=self._limit, wait_for_workers=False)
        except RuntimeError as error:
            raise RuntimeError(f"vllm_group_port {group_port} cannot be listened on: {error}") from error
        init_info = {"master_address": address, "master_port": store.port, "rank_offset": 1,
                     "world_size": size + 1}  # fmt: skip
        with ThreadPoolExecutor(max_workers=1) as executor:
            path = "/init_weight_transfer_engine"
            answer = executor.submit(server.request, "POST", path, {"init_info": init_info})
            try:
                group = dist.ProcessGroupGloo(dist.PrefixStore(_STORE_PREFIX, store), 0, size + 1, self._limit)
            except RuntimeError as error:
                raise _failure(server, path, answer, error) from error
            answer.result()
        self._open = {"store": store, "group": group}
        weakref.finalize(self, self._open.clear)  # their threads end before the interpreter does

    def send(self, described: Sequence[Described], weights: Iterable[tuple[str, Tensor]]) -> None:
        """One broadcast a parameter, in the order in which they were announced."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        names, dtypes, shapes = (list(column) for column in zip(*described, strict=True))
        update = {"names": names, "dtype_names": dtypes, "shapes": shapes, "packed": False}
        self.server.request("POST", "/start_weight_update", {})
        with ThreadPoolExecutor(max_workers=1) as executor:
            path = "/update_weights"
            answer = executor.submit(self.server.request, "POST", path, {"update_info": update})
            try:
                for _, weight in weights:
                    self._open["group"].broadcast([weight.detach().cpu().contiguous()], options).wait()
            except RuntimeError as error:
                raise _failure(self.server, path, answer, error) from error
            answer.result()
        self.server.request("POST", "/finish_weight_update", {})
        answer = self.server.request("POST", "/reset_prefix_cache")
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ServerError(f"{self.server.base_url}/reset_prefix_cache kept what old weights made: {answer!r}")


class NCCLTransfer:
    """vLLM's own broadcast between GPUs, by TRL's client of it; see the module for what is tested."""

    def __init__(self, server: VLLMServer, group_port: int, device: torch.device) -> None:
        try:
            from trl.generation.vllm_client import VLLMClient

            self._client = VLLMClient(
                base_url=server.base_url, group_port=group_port, connection_timeout=server.timeout
            )
        except ImportError as error:
            raise RuntimeError(
                f"{server.base_url} takes weights over NCCL, for which trl>=1.16, vllm and requests must be "
                f"installed beside the trainer: {error}"
            ) from error
        self._client.init_communicator(device)

    def send(self, described: Sequence[Described], weights: Iterable[tuple[str, Tensor]]) -> None:
        """Packed broadcasts."""
        self._client.update_named_params([tuple(each) for each in described], iter(weights))
        self._client.reset_prefix_cache()


def describe(model: Any) -> list[Described]:
    """What ``whole_weights`` will hand over, without gathering or merging anything."""
    return [
        Described(name, str(parameter.dtype).removeprefix("torch."), list(parameter.shape))
        for name, parameter, _ in _named(model)
    ]


@torch.no_grad()
def whole_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The parameters under the names of a checkpoint, one at a time: gathered where FSDP2 has divided them, and with
    adapters merged into what they adapt, which the model itself is not.

    Gathering is collective, so every process must come to the end.
    """
    for name, parameter, adapted in _named(model):
        weight = parameter if adapted is None else _merged(adapted, parameter)
        yield name, weight.full_tensor() if hasattr(weight, "full_tensor") else weight.detach()


def _named(model: Any) -> Iterator[tuple[str, Tensor, Any]]:
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
        module, has_adapter, leaf = name.partition(".base_layer.")
        is_adapted = bool(has_adapter) and leaf == "weight"
        yield name.replace(".base_layer.", "."), parameter, base.get_submodule(module) if is_adapted else None


def _merged(adapted: Any, weight: Tensor) -> Tensor:
    """A weight with its adapters added. The model keeps the bits it had, which unmerging alone would round."""
    kept = weight.detach().clone()
    adapted.merge()
    merged = weight.detach().clone()
    adapted.unmerge()
    weight.copy_(kept)
    return merged


def _own_address(server: VLLMServer) -> str:
    """The trainer's address on the way to the server."""
    try:
        with socket.create_connection((server.host, server.port), timeout=server.timeout) as connection:
            return connection.getsockname()[0]
    except OSError as error:
        raise ServerError(f"{server.base_url} cannot be reached: {error}") from error


def _failure(server: VLLMServer, path: str, answer: Future, error: RuntimeError) -> ServerError:
    """Why a group failed: the server's own error where it has one."""
    refused = answer.exception()
    if isinstance(refused, ServerError):
        return refused
    return ServerError(f"{server.base_url}{path}: the server left the broadcast: {error}")
