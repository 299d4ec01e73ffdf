"""Servers that fail: each an error that names it, in bounded time, or a count."""

from __future__ import annotations

import asyncio
import importlib.util
import math
import socket
import time
from unittest.mock import create_autospec

import pytest
import torch
from serving import Server, hang_up, loop_for, starts_servers  # noqa: F401  (a fixture)
from test_training_loop import one_thread, recipe_of  # noqa: F401  (a fixture)
from trl.generation import vllm_client

from grpo_kernels.training.samplers.vllm_client import ServerError, VLLMServer
from grpo_kernels.training.task import load_task


def first_choice(**changes):
    """A spoiled answer: the first completion of each prompt is another."""

    def spoil(handler, body, right):
        status, content = right()
        choice = content["choices"][0]
        content["choices"][0] = choice | {name: change(choice) for name, change in changes.items()}
        return status, content

    return spoil


def answering(status, content):
    return lambda handler, body, right: (status, content)


def logprobs_of(change):
    return first_choice(logprobs=lambda c: {"token_logprobs": change(c["logprobs"]["token_logprobs"])})


def cut_short(handler, body, right):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    hang_up(handler, body, right)


def drip(handler, body, right):
    """A byte every tenth of a second, for as long as anyone reads."""
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.stopping.wait(0.1):
        handler.wfile.write(b" ")


def never(handler, body, right):
    handler.server.stopping.wait(20)


GARBAGE = {
    "not JSON": (answering(200, b"<html>busy"), "expected JSON, got <html>busy"),
    "no choices": (answering(200, {"text": "5"}), "expected 'choices' to be a list, got {'text': '5'}"),
    "a list": (answering(200, [1]), "expected 'choices' to be a list"),
    "nothing": (answering(200, b""), "expected 'choices' to be a list, got None"),
    "too few": (lambda h, b, right: (200, {"choices": right()[1]["choices"][1:]}), "expected n=4 completions, got 3"),
    "an error": (answering(400, {"error": "context length is 8"}), "answered 400: .*context length is 8"),
    "a redirect": (answering(302, b""), "answered 302"),
    "no token ids": (first_choice(token_ids=lambda c: None), "expected 'token_ids' to be a list"),
    "text ids": (first_choice(token_ids=lambda c: ["5"] * len(c["token_ids"])), r"expected token_ids from 0 to 21"),
    "an id too large": (first_choice(token_ids=lambda c: [22, *c["token_ids"][1:]]), r"from 0 to 21, got \[22"),
    "an id below 0": (first_choice(token_ids=lambda c: [-1, *c["token_ids"][1:]]), r"from 0 to 21, got \[-1"),
    "too long": (first_choice(token_ids=lambda c: [5] * 13), "expected at most 12 tokens, got 13"),
    "a score missing": (logprobs_of(lambda p: p[1:]), r"a log-probability for each of \d+ tokens, got \d+"),
    "a score NaN": (
        logprobs_of(lambda p: [float("nan"), *p[1:]]),
        "finite log-probabilities of at most 0, or null, got .nan",
    ),
    "a score infinite": (logprobs_of(lambda p: [-float("inf"), *p[1:]]), "finite log-probabilities"),
    "a score above 0": (logprobs_of(lambda p: [0.5, *p[1:]]), "of at most 0, or null, got .0.5"),
    "no scores": (first_choice(logprobs=lambda c: None), "expected 'logprobs' to be a dict"),
    "aborted": (first_choice(finish_reason=lambda c: "abort"), "'stop' or 'length', got 'abort'"),
    "an end of its own": (
        first_choice(token_ids=lambda c: [5] * len(c["token_ids"]), finish_reason=lambda c: "stop"),
        r"stop at one of the tokens \[1\], got 5",
    ),
    "another prompt": (first_choice(prompt_token_ids=lambda c: [9]), r"expected the prompt \[.*\], got \[9\]"),
    "hangs up": (hang_up, "RemoteProtocolError: Server disconnected|ConnectionResetError"),
    "cut short": (cut_short, "RemoteProtocolError: .*without sending complete message body"),
    "drips": (drip, "no answer within 1 s"),
    "never answers": (never, "no answer within 1 s"),
    "always busy": (answering(503, b"busy"), "answered 503: busy|no answer within 1 s"),
}


@pytest.fixture(scope="module")
def shared():
    server = Server(load_task(recipe_of()).model)
    yield server
    server.stop()


def completions_of(server, timeout=60.0):
    client = VLLMServer(server.url, timeout=timeout, generation_timeout=timeout)
    sampling = {"model": "tiny", "n": 4, "temperature": 1.0, "max_tokens": 12, "stop_token_ids": [1]}
    return client.complete([[7, 3], [9]], [1, 2], vocab_size=22, **sampling)


@pytest.mark.parametrize("case", GARBAGE)
def test_a_server_that_answers_garbage_or_not_at_all_is_named_in_bounded_time(shared, case):
    spoil, message = GARBAGE[case]
    shared.spoil = {}
    good = completions_of(shared)
    assert len(good) == 8 and good == completions_of(shared)
    shared.spoil = {"/v1/completions": spoil}
    begun = time.monotonic()
    with pytest.raises(ServerError, match=message) as caught:
        completions_of(shared, timeout=1.0)
    assert f"{shared.url}/v1/completions" in str(caught.value)
    assert time.monotonic() - begun < 15


@pytest.mark.parametrize("others", [never, drip, answering(503, b"busy")], ids=["never", "drip", "busy"])
def test_a_failed_request_waits_for_no_other(shared, others):
    """Whichever it is: here the last."""

    def spoil(handler, body, right):
        return (400, {"error": "no"}) if body["prompt"] == [9] else others(handler, body, right)

    shared.spoil = {"/v1/completions": spoil}
    begun = time.monotonic()
    with pytest.raises(ServerError, match=r"answered 400: .*no"):
        completions_of(shared)
    shared.spoil = {}
    assert time.monotonic() - begun < 15


def test_a_notebook_whose_thread_has_an_event_loop_can_ask(shared):
    async def cell():
        return completions_of(shared)

    shared.spoil = {}
    assert len(asyncio.run(cell())) == 8


def test_a_loop_whose_server_fails_ends_and_sends_nothing_twice(start):
    server = start(spoil={"/v1/completions": hang_up})
    with pytest.raises(ServerError, match="/v1/completions: "):
        next(loop_for(server).steps())
    seeds = [body["seed"] for body in server.bodies("/v1/completions")]
    assert 0 < len(seeds) == len({*seeds})


def test_a_busy_server_is_asked_again(start):
    turns = iter([(503, b""), (429, b"")])
    server = start(spoil={"/v1/completions": lambda handler, body, right: next(turns, None) or right()})
    assert loop_for(server).collect()[0].advantages.shape == (16,)
    assert server.count("/v1/completions") == 6


def test_an_empty_completion_is_counted_and_trained_around(start):
    empty = first_choice(token_ids=lambda c: [], logprobs=lambda c: {"token_logprobs": []})
    loop = loop_for(start(spoil={"/v1/completions": empty}))
    batch, metrics, samples = loop.collect()
    assert metrics["sampling/empty_completions"] == 4 and metrics["completions/min_length"] == 0
    assert (batch.rollout.completion_mask.sum(dim=1) == 0).sum() == 4
    assert sum(sample.completion == "" for sample in samples) >= 4
    micro_batches = [batch.select(part) for part in (torch.arange(0, 16, 4), torch.arange(1, 16, 4))]  # all empty; none
    alone = loop.accumulate_gradients(micro_batches[1:])
    loop.model.zero_grad(set_to_none=True)
    both = loop.optimizer_step(micro_batches)
    assert math.isfinite(both["loss"]) and both["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_no_server_within_the_timeout():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    begun = time.monotonic()
    message = rf"no vLLM server at {url} within vllm_server_timeout=1 s: .*ConnectionRefusedError"
    with pytest.raises(ServerError, match=message):
        VLLMServer(url, timeout=1.0, generation_timeout=1.0).wait_until_up()
    assert 0.5 < time.monotonic() - begun < 15
    with pytest.raises(ValueError, match="vllm_server_base_url must be http://host:port"):
        VLLMServer("localhost:8000", timeout=1.0, generation_timeout=1.0)


def test_a_server_that_comes_up_is_waited_for(start):
    states = iter([(503, b""), (500, b"loading")])
    server = start(spoil={"/health": lambda handler, body, right: next(states, None) or right()})
    loop_for(server)
    assert server.count("/health") == 3


SETTINGS = {
    "no dev mode": ({"spoil": {"/server_info": answering(404, b"")}}, ServerError, "VLLM_SERVER_DEV_MODE=1"),
    "no transfer": ({"weight_transfer_config": "none"}, ServerError, "its backend must be nccl or gloo"),
    "ipc": ({"weight_transfer_config": {"backend": "ipc"}}, ServerError, "its backend must be nccl or gloo"),
    "no models": ({"spoil": {"/v1/models": answering(200, {"data": []})}}, ServerError, "names no model"),
    "does not join": ({"spoil": {"/init_weight_transfer_engine": answering(500, b"no GPU")}}, ServerError, "no GPU"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_server_that_lacks_what_is_needed_is_refused_at_the_start(start, case):
    options, kind, message = SETTINGS[case]
    with pytest.raises(kind, match=message):
        loop_for(start(**options), vllm_server_timeout=5.0)


def test_nccl_needs_vllm_here(start):
    if importlib.util.find_spec("vllm"):
        pytest.skip("vllm is installed")
    with pytest.raises(RuntimeError, match=r"takes weights over NCCL, for which trl>=1\.16, vllm and requests must be"):
        loop_for(start(weight_transfer_config={"backend": "nccl"}))


def test_nccl_is_driven_by_trls_client(start, monkeypatch):
    client, sent = create_autospec(vllm_client.VLLMClient), []
    monkeypatch.setattr(vllm_client, "VLLMClient", client)
    server = start(weight_transfer_config={"backend": "nccl"})
    loop = loop_for(server, vllm_group_port=4321)
    client.assert_called_once_with(base_url=server.url, group_port=4321, connection_timeout=60.0)
    client.return_value.init_communicator.assert_called_once_with(loop.model.device)
    client.return_value.update_named_params.side_effect = lambda metadata, weights: sent.extend(
        zip(metadata, weights, strict=True)
    )
    loop.collect()
    expected = [((name, "float32", list(value.shape)), name) for name, value in loop.model.named_parameters()]
    assert [(metadata, name) for metadata, (name, _) in sent] == expected
    assert server.count("/reset_prefix_cache") == 1
    loop.global_step = 1
    client.return_value.update_named_params.side_effect = Exception("Request failed: 500, out of memory")
    with pytest.raises(ServerError, match=f"{server.url} did not take the weights: .*500, out of memory"):
        loop.collect()


def test_log_probs_of_another_distribution_are_refused(start):
    server = start()
    server.logprobs_mode = "raw_logprobs"
    loop_for(server)  # at temperature 1 they are the same
    with pytest.raises(ServerError, match=r"answers raw_logprobs, which at temperature=0\.7 .* processed_logprobs"):
        loop_for(server, temperature=0.7)


def test_the_servers_context_bounds_prompts(start):
    server = start()
    server.max_model_len = 12
    with pytest.raises(ValueError, match="max_completion_length must be less than the context of 12 tokens, got 12"):
        loop_for(server)


TRANSFER = {
    "refuses": (answering(500, b"out of memory"), "/update_weights answered 500: out of memory"),
    "leaves": (lambda handler, body, right: setattr(handler.server, "group", None), "/update_weights"),
}


@pytest.mark.parametrize("case", TRANSFER)
def test_weights_that_do_not_arrive_stop_the_run(start, case):
    spoil, message = TRANSFER[case]
    server = start(spoil={"/update_weights": spoil})
    loop = loop_for(server, vllm_server_timeout=5.0)
    begun = time.monotonic()
    with pytest.raises(ServerError, match=message):
        loop.collect()
    assert server.count("/v1/completions") == 0 and time.monotonic() - begun < 30


def test_a_cache_that_is_kept_stops_the_run(start):
    loop = loop_for(start(spoil={"/reset_prefix_cache": answering(200, {"success": False})}))
    with pytest.raises(ServerError, match="kept what old weights made"):
        loop.collect()


def test_a_token_that_the_server_did_not_score_is_not_corrected(start, shared):
    """``null`` for a log-probability: the completion counts, and the step's loss is finite."""
    unscored = {"/v1/completions": logprobs_of(lambda p: [None, *p[1:]])}
    shared.spoil = unscored
    for k, completion in enumerate(completions_of(shared)):
        is_first = k % 4 == 0
        assert [math.isnan(x) for x in completion.logprobs] == [is_first] + [False] * (len(completion.ids) - 1)
    shared.spoil = {}
    step = next(loop_for(start(spoil=unscored)).steps())
    assert all(math.isfinite(step.metrics[name]) for name in ("loss", "grad_norm"))
    assert all(math.isfinite(value) for name, value in step.metrics.items() if name.startswith("sampling/"))
