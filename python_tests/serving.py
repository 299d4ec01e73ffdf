"""A server that speaks vLLM's protocol, with a model of its own: samples, scores what it samples, takes weights.

And what tests of it share.
"""

from __future__ import annotations

import copy
import json
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_transfer import STORE_PREFIX
from test_training_loop import recipe_of

from grpo_kernels.training.loop import GRPOLoop
from grpo_kernels.training.task import load_task, prepare_model

Answer = tuple[int, Any]


class Server(ThreadingHTTPServer):
    """On a free port of loopback, until ``stop``.

    Args:
        model: Copied.
        weight_transfer_config: What ``/server_info`` says.
        spoil: By path: takes the handler, the body that was sent and a function that makes the right answer, and
            returns another answer, or None where it has written to the connection, or left it, itself.
    """

    daemon_threads = False  # stop() waits for them: a thread that torch holds at the interpreter's end aborts it

    def __init__(self, model: Any, weight_transfer_config: Any = None, spoil: dict[str, Callable] | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.lock = copy.deepcopy(model), threading.Lock()
        self.logprobs_mode, self.max_model_len = "processed_logprobs", None
        self.weight_transfer_config = weight_transfer_config or {"backend": "gloo"}
        self.spoil, self.asked, self.stopping = spoil or {}, [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self.stopping.set()
        self.shutdown()
        self.server_close()
        self.group = self.store = None

    def count(self, path: str) -> int:
        return sum(asked == path for asked, _ in self.asked)

    def bodies(self, path: str) -> list[Any]:
        return [body for asked, body in self.asked if asked == path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""

    def answer(self, path: str, body: Any) -> Answer:
        routes = {
            "/health": lambda: None,
            "/v1/models": lambda: {"data": [{"id": "tiny", "max_model_len": self.max_model_len}]},
            "/server_info": lambda: {
                "vllm_config": {
                    "weight_transfer_config": self.weight_transfer_config,
                    "model_config": {"logprobs_mode": self.logprobs_mode},
                }
            },
            "/init_weight_transfer_engine": lambda: self.join(**body["init_info"]),
            "/start_weight_update": lambda: {},
            "/update_weights": lambda: self.receive(**body["update_info"]),
            "/finish_weight_update": lambda: {},
            "/reset_prefix_cache": lambda: {"success": True},
            "/v1/completions": lambda: self.complete(body),
        }
        return (200, routes[path]()) if path in routes else (404, {"detail": "Not Found"})

    def join(self, master_address: str, master_port: int, rank_offset: int, world_size: int) -> dict[str, str]:
        limit = timedelta(seconds=60)
        self.store = dist.TCPStore(master_address, master_port, world_size, False, timeout=limit)
        self.group = dist.ProcessGroupGloo(dist.PrefixStore(STORE_PREFIX, self.store), rank_offset, world_size, limit)
        return {"message": "initialized"}

    @torch.no_grad()
    def receive(
        self, names: list[str], dtype_names: list[str], shapes: list[list[int]], packed: bool
    ) -> dict[str, str]:
        assert not packed
        options, known = dist.BroadcastOptions(), dict(self.model.named_parameters())
        options.rootRank = 0
        assert known.keys() == set(names), known.keys() ^ set(names)
        with self.lock:
            for name, dtype, shape in zip(names, dtype_names, shapes, strict=True):
                received = torch.empty(shape, dtype=getattr(torch, dtype))
                self.group.broadcast([received], options).wait()
                known[name].copy_(received)
        return {"message": "updated"}

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1.0, 0, 0.0, 1.0)
        generator = torch.Generator().manual_seed(body["seed"])
        prompt, n = body["prompt"], body["n"]
        ids = torch.tensor([prompt] * n)
        scores = torch.zeros(n, 0)
        with self.lock:
            for _ in range(body["max_tokens"]):
                logits = self.model(ids).logits[:, -1].float() / body["temperature"]
                drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
                scores = torch.cat([scores, logits.log_softmax(-1).gather(1, drawn)], dim=1)
                ids = torch.cat([ids, drawn], dim=1)
        rows = zip(ids[:, len(prompt) :].tolist(), scores.tolist(), strict=True)
        return {"choices": [self.choice(body, *row) for row in rows]}

    def choice(self, body: dict[str, Any], ids: list[int], logprobs: list[float]) -> dict[str, Any]:
        ends = [k for k, token in enumerate(ids, start=1) if token in body["stop_token_ids"]]
        length = ends[0] if ends else len(ids)
        tokens = [f"token_id:{token}" for token in ids[:length]]
        return {
            "token_ids": ids[:length],
            "prompt_token_ids": body["prompt"],
            "finish_reason": "stop" if ends else "length",
            "logprobs": {"tokens": tokens, "token_logprobs": logprobs[:length]},
        }


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.respond(None)

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"] or 0)
        content = self.rfile.read(length)
        if len(content) == length:  # else the client hung up before it had asked
            self.respond(json.loads(content or "null"))

    def respond(self, body: Any) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append((path, body))
        found: Answer | None = self.server.answer(path, body) if path not in self.server.spoil else None
        if path in self.server.spoil:
            found = self.server.spoil[path](self, body, lambda: self.server.answer(path, body))
        if found is not None:
            status, content = found
            self.write(status, content if isinstance(content, bytes) else json.dumps(content).encode())

    def write(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        """Silent."""


def hang_up(handler, body, right):
    """Spoils an answer."""
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture(name="start")
def starts_servers():
    """Starts servers that end with the test."""
    servers = []

    def started(**options):
        servers.append(Server(load_task(recipe_of()).model, **options))
        return servers[-1]

    yield started
    for server in servers:
        server.stop()


def recipe_for(server, **changes):
    settings = {"use_vllm": True, "vllm_server_base_url": server.url, "vllm_server_timeout": 60.0,
                "vllm_generation_timeout": 60.0}  # fmt: skip
    return recipe_of(**(settings | changes))


def loop_for(server, **changes):
    torch.manual_seed(0)
    recipe = recipe_for(server, **changes)
    task = load_task(recipe)
    return GRPOLoop(task._replace(model=prepare_model(task.model, recipe)), recipe)
