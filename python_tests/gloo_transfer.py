"""Weights over gloo on loopback, for the test server; vLLM has no such backend."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from grpo_kernels.training.samplers.server import TRANSFERS, Metadata
from grpo_kernels.training.samplers.vllm_client import VLLMServer

STORE_PREFIX = "weight_transfer"


class GlooTransfer:
    """Broadcasts from the trainer, rank 0 at a free port, to the server, rank 1."""

    def __init__(self, server: VLLMServer) -> None:
        self.server, limit = server, timedelta(seconds=server.timeout)
        store = dist.TCPStore("127.0.0.1", 0, 2, True, timeout=limit, wait_for_workers=False)
        init_info = {"master_address": "127.0.0.1", "master_port": store.port, "rank_offset": 1, "world_size": 2}

        def join() -> dist.ProcessGroupGloo:
            return dist.ProcessGroupGloo(dist.PrefixStore(STORE_PREFIX, store), 0, 2, limit)

        group = self.beside("/init_weight_transfer_engine", {"init_info": init_info}, join)
        self.open = {"store": store, "group": group}
        weakref.finalize(self, self.open.clear)  # their threads end before the interpreter does

    def send(self, metadata: Metadata, weights: Iterator[tuple[str, Tensor]]) -> None:
        """One broadcast a parameter, in the order in which they were announced."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        names, dtypes, shapes = (list(column) for column in zip(*metadata, strict=True))
        update = {"names": names, "dtype_names": dtypes, "shapes": shapes, "packed": False}

        def broadcast() -> None:
            for _, weight in weights:
                self.open["group"].broadcast([weight.detach().cpu().contiguous()], options).wait()

        self.server.request("POST", "/start_weight_update", {})
        self.beside("/update_weights", {"update_info": update}, broadcast)
        self.server.request("POST", "/finish_weight_update", {})

    def beside(self, path: str, body: Any, act: Any) -> Any:
        """What ``act`` returns while the server answers, whose own error says more than the group's."""
        with ThreadPoolExecutor(max_workers=1) as executor:
            answer = executor.submit(self.server.request, "POST", path, body)
            try:
                return act()
            finally:
                answer.result()


TRANSFERS["gloo"] = lambda server, group_port, device: GlooTransfer(server).send
