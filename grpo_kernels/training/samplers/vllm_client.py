"""A vLLM server over HTTP: completions with the log-probabilities they were sampled at, checked in every field.

The routes are those of vLLM's own server, which TRL 1.16's ``trl vllm-serve`` starts:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --weight-transfer-config \
        '{"backend": "nccl"}'

Nothing is taken on trust. Whatever is late, missing or out of range is a ``ServerError`` that names the URL and what
came, and every wait has an end. A request that a busy server turned away is sent again. One that was cut off is not: a
server that died and came back has the weights that it began with.
"""

from __future__ import annotations

import http.client
import json
import math
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

_BUSY = (429, 503)
_FIRST_PAUSE = 0.25  # seconds before a busy server is asked again; doubled each time
_SHOWN = 300  # characters of an answer in an error
_CONCURRENT = 64  # requests at once
_ROUNDING = 1e-3  # nats by which a log-probability may be above 0


class ServerError(RuntimeError):
    """A server that cannot be reached, answers too late, or with what is no answer."""


class Served(NamedTuple):
    """What a server says of itself."""

    model: str  # the name that requests must have
    context_length: int | None  # tokens of a prompt and its completion; None where it does not say


class Sampled(NamedTuple):
    """A completion."""

    ids: list[int]
    logprobs: list[float]  # of each token, in nats


class VLLMServer:
    """One server.

    Args:
        base_url: ``http://host:port``, with a path before the routes where there is one.
        timeout: Seconds for it to come up, and for each answer but completions.
        generation_timeout: Seconds for the completions of a prompt.

    Raises:
        ValueError: The URL is no ``http`` or ``https`` one.
    """

    def __init__(self, base_url: str, *, timeout: float, generation_timeout: float) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"vllm_server_base_url must be http://host:port or https://..., got {base_url!r}")
        self.base_url, self.timeout, self.generation_timeout = base_url.rstrip("/"), timeout, generation_timeout
        self.host, self.port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._prefix = parts.path.rstrip("/")

    def wait_until_up(self) -> None:
        """Asks for its health until it answers.

        Raises:
            ServerError: It did not within ``timeout``.
        """
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                self.request("GET", "/health", timeout=max(deadline - time.monotonic(), 0.1))
                return
            except ServerError as error:
                if time.monotonic() + _FIRST_PAUSE >= deadline:
                    raise ServerError(
                        f"no vLLM server at {self.base_url} within vllm_server_timeout={self.timeout:g} s: {error}"
                    ) from error
            time.sleep(_FIRST_PAUSE)

    def served(self) -> Served:
        """The model that it serves."""
        path = "/v1/models"
        models = self._field(path, self.request("GET", path), "data", list)
        if not models:
            raise ServerError(f"{self.base_url}{path} names no model")
        context_length = models[0].get("max_model_len") if isinstance(models[0], dict) else None
        if context_length is not None and not _is_count(context_length):
            raise ServerError(f"{self.base_url}{path}: expected max_model_len to be a count, got {context_length!r}")
        return Served(self._field(path, models[0], "id", str), context_length)

    def settings(self) -> dict[str, Any]:
        """Its ``VllmConfig``, which it shows in dev mode.

        Raises:
            ServerError: It does not show it.
        """
        path = "/server_info?config_format=json"
        try:
            answer = self.request("GET", path)
        except ServerError as error:
            raise ServerError(
                f"{error}; a server whose weights can be replaced runs with VLLM_SERVER_DEV_MODE=1"
            ) from error
        return self._field(path, answer, "vllm_config", dict)

    def complete(
        self,
        model: str,
        prompts: Sequence[Sequence[int]],
        *,
        n: int,
        seeds: Sequence[int],
        temperature: float,
        max_tokens: int,
        end_ids: Sequence[int],
        vocab_size: int,
    ) -> list[list[Sampled]]:
        """``n`` completions of each prompt from the whole distribution, in a request of its own.

        Where one request fails the others are cut off, and nothing waits for them.

        Args:
            model: As ``served`` names it.
            prompts: Ids of tokens.
            n: Completions of each.
            seeds: One a prompt; the same seeds and weights give the same completions, as far as the server can.
            temperature: Divides the logits.
            max_tokens: Of a completion, at most.
            end_ids: The tokens that end one.
            vocab_size: Ids are below it.

        Raises:
            ServerError: An answer is late, missing or not what was asked for.
        """
        sampling = {
            "model": model, "n": n, "temperature": temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
            "repetition_penalty": 1.0, "max_tokens": max_tokens, "stop_token_ids": list(end_ids), "logprobs": 0,
            "return_token_ids": True, "return_tokens_as_token_ids": True,
        }  # fmt: skip

        together = _Together()

        def one(prompt: Sequence[int], seed: int) -> list[Sampled]:
            path = "/v1/completions"
            body = sampling | {"prompt": list(prompt), "seed": seed}
            answer = self.request("POST", path, body, timeout=self.generation_timeout, again=True, together=together)
            choices = self._field(path, answer, "choices", list)
            if len(choices) != n:
                raise ServerError(f"{self.base_url}{path}: expected n={n} completions, got {len(choices)}")
            return [self._checked(path, c, list(prompt), max_tokens, end_ids, vocab_size) for c in choices]

        with ThreadPoolExecutor(max_workers=min(_CONCURRENT, len(prompts))) as executor:
            asked = [executor.submit(one, *each) for each in zip(prompts, seeds, strict=True)]
            try:
                ended, _ = wait(asked, return_when=FIRST_EXCEPTION)
                return [answer.result() for answer in asked if answer in ended]  # all, unless one of them raises
            except BaseException:
                executor.shutdown(wait=False, cancel_futures=True)
                together.cut()
                raise

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        timeout: float | None = None,
        again: bool = False,
        together: _Together | None = None,
    ) -> Any:
        """The JSON of an answer with status 200; None where it is empty.

        Args:
            method: GET or POST.
            path: Under the base URL.
            body: Sent as JSON.
            timeout: Seconds for the whole answer; by default the server's.
            again: Ask a busy server again, which any GET does: for what changes nothing there.
            together: The requests that it is cut off with.

        Raises:
            ServerError: There was none.
        """
        seconds = self.timeout if timeout is None else timeout
        deadline, pause = time.monotonic() + seconds, _FIRST_PAUSE
        content, together = None if body is None else json.dumps(body), together or _Together()
        while True:
            status, text = self._exchange(method, path, content, deadline, seconds, together)
            is_patient = (again or method == "GET") and time.monotonic() + pause < deadline
            if status not in _BUSY or not is_patient:
                break
            together.was_cut.wait(pause)
            pause *= 2
        where = f"{method} {self.base_url}{path}"
        if status != 200:
            raise ServerError(f"{where} answered {status}: {_shown(text)}")
        if not text.strip():
            return None
        try:
            return json.loads(text)
        except ValueError as error:
            raise ServerError(f"{where}: expected JSON, got {_shown(text)}") from error

    def _exchange(
        self, method: str, path: str, content: str | None, deadline: float, seconds: float, together: _Together
    ) -> tuple[int, bytes]:
        """One request on a connection that is cut at the deadline, however slowly bytes keep coming."""
        where = f"{method} {self.base_url}{path}"
        left = max(deadline - time.monotonic(), 0.01)
        connection = self._kind(self.host, self.port, timeout=left)
        try:
            connection.connect()
            connected = connection.sock  # which the connection forgets where the server closes
            watch = threading.Timer(max(deadline - time.monotonic(), 0.0), _cut, [connected])
            watch.daemon = True
            watch.start()
            together.add(connected)
            try:
                headers = {} if content is None else {"Content-Type": "application/json"}
                connection.request(method, self._prefix + path, body=content, headers=headers)
                response = connection.getresponse()
                text = response.read()
            finally:
                watch.cancel()
                together.discard(connected)
            if time.monotonic() >= deadline:
                raise TimeoutError  # a body that was cut may look like one that ended
            return response.status, text
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, TimeoutError) or time.monotonic() >= deadline:
                raise ServerError(f"{where}: no answer within {seconds:g} s") from error
            raise ServerError(f"{where}: {type(error).__name__}: {error}") from error
        finally:
            connection.close()

    def _checked(
        self, path: str, choice: Any, prompt: list[int], max_tokens: int, end_ids: Sequence[int], vocab_size: int
    ) -> Sampled:
        """A completion of an answer, if it is one of this prompt, with a log-probability for every token."""
        ids = self._field(path, choice, "token_ids", list)
        scored = self._field(path, choice, "logprobs", dict)
        logprobs = self._field(path, scored, "token_logprobs", list)
        reason = choice.get("finish_reason")
        expected = None
        if not all(_is_count(i) and i < vocab_size for i in ids):
            expected = f"token_ids from 0 to {vocab_size - 1}, got {_shown(ids)}"
        elif len(ids) > max_tokens:
            expected = f"at most {max_tokens} tokens, got {len(ids)}"
        elif len(logprobs) != len(ids):
            expected = f"a log-probability for each of {len(ids)} tokens, got {len(logprobs)}"
        elif not all(value is None or _is_logprob(value) for value in logprobs):
            expected = f"finite log-probabilities of at most 0, or null, got {_shown(logprobs)}"
        elif reason not in ("stop", "length"):
            expected = f"finish_reason to be 'stop' or 'length', got {reason!r}"
        elif reason == "stop" and ids and ids[-1] not in end_ids:
            expected = f"a completion to stop at one of the tokens {list(end_ids)}, got {ids[-1]}"
        elif choice.get("prompt_token_ids", prompt) not in (None, prompt):
            expected = f"the prompt {_shown(prompt)}, got {_shown(choice['prompt_token_ids'])}"
        if expected is not None:
            raise ServerError(f"{self.base_url}{path}: expected {expected}")
        return Sampled(ids, [math.nan if value is None else float(value) for value in logprobs])

    def _field(self, path: str, answer: Any, name: str, kind: type) -> Any:
        value = answer.get(name) if isinstance(answer, dict) else None
        if not isinstance(value, kind):
            raise ServerError(f"{self.base_url}{path}: expected {name!r} to be a {kind.__name__}, got {_shown(answer)}")
        return value


class _Together:
    """The connections of requests that end together: once they are cut, so is every further one."""

    def __init__(self) -> None:
        self.was_cut = threading.Event()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def add(self, connected: socket.socket) -> None:
        with self._lock:
            self._open.add(connected)
            if self.was_cut.is_set():
                _cut(connected)

    def discard(self, connected: socket.socket) -> None:
        with self._lock:
            self._open.discard(connected)

    def cut(self) -> None:
        with self._lock:
            self.was_cut.set()
            for connected in self._open:
                _cut(connected)


def _cut(connected: socket.socket) -> None:
    with suppress(OSError):  # it has ended by itself
        connected.shutdown(socket.SHUT_RDWR)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_logprob(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value <= _ROUNDING


def _shown(value: Any) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"
