"""A vLLM server over HTTP: completions with the log-probabilities they were sampled at.

The routes are those of ``VLLM_SERVER_DEV_MODE=1 vllm serve``, as ``trl vllm-serve`` starts it. A request that a busy
server turned away is sent again. One that was cut off is not: a server that came back has the weights it began with.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx2
from anyio.from_thread import start_blocking_portal

_BUSY = (429, 503)
_FIRST_PAUSE = 0.25  # seconds before a busy server is asked again; doubled each time
_MAX_SHOWN = 300  # characters of an answer in an error
_MAX_REQUESTS = 64  # at once
_COMPLETION_OPTIONS = {
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "logprobs": 0, "return_token_ids": True,
    "return_tokens_as_token_ids": True,
}  # fmt: skip
_ROUNDING = 1e-3  # nats by which a log-probability may be above 0
_ssl_context = functools.cache(httpx2.create_ssl_context)  # reading the certificates takes 50 ms


class ServerError(RuntimeError):
    """A server that cannot be reached, answers too late, or with what is no answer: the URL, and what came."""


class Completion(NamedTuple):
    """What a server sampled."""

    ids: list[int]
    logprobs: list[float]  # of each token, in nats; NaN where the server gave none


class VLLMServer:
    """One server. Every method raises ``ServerError`` where it fails, in bounded time.

    Args:
        base_url: ``http://host:port``, with a path before the routes where there is one; else it is a ValueError.
        timeout: Seconds for it to come up, and for each answer but completions.
        generation_timeout: Seconds for the completions of a prompt.
    """

    def __init__(self, base_url: str, *, timeout: float, generation_timeout: float) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError(f"vllm_server_base_url must be http://host:port or https://..., got {base_url!r}")
        self.base_url, self.timeout, self.generation_timeout = base_url.rstrip("/"), timeout, generation_timeout

    def wait_until_up(self) -> None:
        """Asks for its health until it answers."""
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                return self.request("GET", "/health", timeout=max(deadline - time.monotonic(), 0.1))
            except ServerError as error:
                if time.monotonic() + _FIRST_PAUSE >= deadline:
                    raise ServerError(
                        f"no vLLM server at {self.base_url} within vllm_server_timeout={self.timeout:g} s: {error}"
                    ) from error
            time.sleep(_FIRST_PAUSE)

    def served_model(self) -> tuple[str, int | None]:
        """The name that requests must have, and how many tokens a prompt and its completion may be, if it says so."""
        url = f"{self.base_url}/v1/models"
        models = _field(url, self.request("GET", "/v1/models"), "data", list)
        if not models:
            raise ServerError(f"{url} names no model")
        return _field(url, models[0], "id", str), models[0].get("max_model_len")

    def config(self) -> dict[str, Any]:
        """Its ``VllmConfig``, which it shows in dev mode."""
        path = "/server_info?config_format=json"
        try:
            answer = self.request("GET", path)
        except ServerError as error:
            advice = "a server whose weights can be replaced runs with VLLM_SERVER_DEV_MODE=1"
            raise ServerError(f"{error}; {advice}") from error
        return _field(f"{self.base_url}{path}", answer, "vllm_config", dict)

    def reset_prefix_cache(self) -> None:
        """Forgets what old weights made."""
        answer = self.request("POST", "/reset_prefix_cache")
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ServerError(f"{self.base_url}/reset_prefix_cache kept what old weights made: {answer!r}")

    def complete(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], *, vocab_size: int, **sampling: Any
    ) -> list[Completion]:
        """Completions of each prompt from the whole distribution, in a request with a seed of its own.

        ``sampling`` has vLLM's ``model``, ``n``, ``temperature``, ``max_tokens`` and ``stop_token_ids``. Where one
        request fails the others are cut off, and nothing waits for them.
        """
        url, options = f"{self.base_url}/v1/completions", _COMPLETION_OPTIONS | sampling
        requests = [options | {"prompt": ids, "seed": seed} for ids, seed in zip(prompts, seeds, strict=True)]
        completions = []
        for request, answer in zip(requests, _exchange("POST", url, requests, self.generation_timeout), strict=True):
            choices = _field(url, answer, "choices", list)
            if len(choices) != request["n"]:
                raise ServerError(f"{url}: expected n={request['n']} completions, got {len(choices)}")
            completions += [_completion(url, choice, request, vocab_size) for choice in choices]
        return completions

    def request(self, method: str, path: str, body: Any = None, *, timeout: float | None = None) -> Any:
        """The JSON of an answer with status 200 within ``timeout``, by default the server's; None where it is empty."""
        seconds = self.timeout if timeout is None else timeout
        return _exchange(method, f"{self.base_url}{path}", [body], seconds)[0]


def _exchange(method: str, url: str, bodies: list[Any], seconds: float) -> list[Any]:
    """The JSON of the answers to all bodies; where one request fails the others are cut off."""

    async def request_all() -> list[Any]:
        slots = asyncio.Semaphore(_MAX_REQUESTS)
        limits = httpx2.Limits(max_keepalive_connections=0)  # the server may have closed a connection that was kept
        client = httpx2.AsyncClient(verify=_ssl_context(), timeout=None, trust_env=False, limits=limits)
        async with client, asyncio.TaskGroup() as group:
            tasks = [group.create_task(_request(client, slots, method, url, body, seconds)) for body in bodies]
        return [task.result() for task in tasks]

    with start_blocking_portal() as portal:  # a loop of its own, as a notebook's thread has one already
        try:
            return portal.call(request_all)
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures.exceptions[0].__cause__


async def _request(
    client: httpx2.AsyncClient, slots: asyncio.Semaphore, method: str, url: str, body: Any, seconds: float
) -> Any:
    pause = _FIRST_PAUSE
    try:
        async with slots, asyncio.timeout(seconds) as limit:  # of the whole answer, however slowly bytes come
            while True:
                response = await client.request(method, url, json=body)
                if response.status_code not in _BUSY or asyncio.get_running_loop().time() + pause >= limit.when():
                    break
                await asyncio.sleep(pause)
                pause *= 2
    except TimeoutError as error:
        raise ServerError(f"{method} {url}: no answer within {seconds:g} s") from error
    except httpx2.HTTPError as error:
        cause = _root_cause(error)
        raise ServerError(f"{method} {url}: {type(cause).__name__}: {cause}") from error
    if response.status_code != 200:
        raise ServerError(f"{method} {url} answered {response.status_code}: {_shown(response.content)}")
    try:
        return json.loads(response.content) if response.content.strip() else None
    except ValueError as error:
        raise ServerError(f"{method} {url}: expected JSON, got {_shown(response.content)}") from error


def _root_cause(error: BaseException) -> BaseException:
    """The system's error, "connection refused", where httpx2's says that all attempts failed."""
    if isinstance(error, BaseExceptionGroup):
        return _root_cause(error.exceptions[0])
    cause = error.__cause__ or error.__context__
    return error if cause is None else _root_cause(cause)


def _completion(url: str, choice: Any, request: dict[str, Any], vocab_size: int) -> Completion:
    """A completion, if it is one that was asked for, with a log-probability for every token."""
    prompt, max_tokens, end_ids = request["prompt"], request["max_tokens"], request["stop_token_ids"]
    ids = _field(url, choice, "token_ids", list)
    logprobs = _field(url, _field(url, choice, "logprobs", dict), "token_logprobs", list)
    reason, expected = choice.get("finish_reason"), None
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        expected = f"token_ids from 0 to {vocab_size - 1}, got {_shown(ids)}"
    elif len(ids) > max_tokens:
        expected = f"at most {max_tokens} tokens, got {len(ids)}"
    elif len(logprobs) != len(ids):
        expected = f"a log-probability for each of {len(ids)} tokens, got {len(logprobs)}"
    elif not all(p is None or (type(p) in (int, float) and -math.inf < p <= _ROUNDING) for p in logprobs):
        expected = f"finite log-probabilities of at most 0, or null, got {_shown(logprobs)}"
    elif reason not in ("stop", "length"):
        expected = f"finish_reason to be 'stop' or 'length', got {reason!r}"
    elif reason == "stop" and ids and ids[-1] not in end_ids:
        expected = f"a completion to stop at one of the tokens {end_ids}, got {ids[-1]}"
    elif choice.get("prompt_token_ids", prompt) not in (None, prompt):
        expected = f"the prompt {_shown(prompt)}, got {_shown(choice['prompt_token_ids'])}"
    if expected is not None:
        raise ServerError(f"{url}: expected {expected}")
    return Completion(ids, [math.nan if p is None else float(p) for p in logprobs])


def _field(url: str, answer: Any, name: str, kind: type) -> Any:
    value = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(value, kind):
        raise ServerError(f"{url}: expected {name!r} to be a {kind.__name__}, got {_shown(answer)}")
    return value


def _shown(value: Any) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}... ({len(text)} characters)"
