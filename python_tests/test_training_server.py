"""Rollouts from a server on loopback: weights that arrive, weights that correct, and runs that go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from serving import hang_up, loop_for, recipe_for, starts_servers  # noqa: F401  (a fixture)
from test_training_loop import one_thread, recipe_of, share_of_sevens  # noqa: F401  (a fixture; a reward by name)
from testing.processes import end_worker
from testing.training import completion_logprobs

from grpo_kernels.training.loop import GRPOLoop
from grpo_kernels.training.metrics import correction_metrics, correction_statistics
from grpo_kernels.training.report import read_records
from grpo_kernels.training.run import train
from grpo_kernels.training.samplers.server import ServerSampler, full_weights, weight_metadata
from grpo_kernels.training.samplers.vllm_client import ServerError, VLLMServer
from grpo_kernels.training.task import load_task


def weights_of(model):
    return dict(model.named_parameters())


# what arrives


def test_the_reward_rises_through_a_server_that_has_the_weights_of_every_step(start):
    server = start()
    loop = loop_for(
        server,
        reward_funcs=["test_training_loop:share_of_sevens"],
        per_device_train_batch_size=16,
        steps_per_generation=2,
        gradient_accumulation_steps=1,
        max_completion_length=6,
        max_steps=14,
        learning_rate=5e-3,
    )
    rewards = []
    for step in loop.steps():
        rewards.append(step.metrics["reward"])
        if step.number % 2 == 1:  # a generation's first step: the server has the weights before it
            sampled_by = {name: value.clone() for name, value in weights_of(server.model).items()}
        else:
            before = sampled_by
            assert all(torch.equal(before[name], value) for name, value in weights_of(server.model).items())
    assert sum(rewards[-4:]) / 4 - sum(rewards[:4]) / 4 > 0.2
    assert server.count("/update_weights") == server.count("/reset_prefix_cache") == 7
    loop.collect()
    sent, own = weights_of(server.model), weights_of(loop.model)
    assert sent.keys() == own.keys() and all(torch.equal(sent[name], own[name]) for name in own)


def test_the_servers_first_weights_are_the_trainers_whatever_it_began_with(start):
    server = start()
    with torch.no_grad():
        for parameter in server.model.parameters():
            parameter.zero_()
    loop = loop_for(server)
    _, metrics, _ = loop.collect()
    assert all(torch.equal(value, weights_of(loop.model)[name]) for name, value in weights_of(server.model).items())
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-5


def test_adapters_arrive_merged_and_leave_the_trainers_bits_alone(start):
    server = start()
    loop = loop_for(server, use_peft=True, lora_r=4, lora_alpha=8)
    with torch.no_grad():
        for name, parameter in loop.model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    before = {name: value.clone() for name, value in loop.model.named_parameters()}
    loop.collect()
    assert all(torch.equal(before[name], value) for name, value in loop.model.named_parameters())
    layer = loop.model.get_base_model().model.layers[0].self_attn.q_proj
    delta = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert delta.abs().max() > 0.1
    got = server.model.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(got, layer.base_layer.weight + delta, rtol=0, atol=1e-5)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(server.model(ids).logits, loop.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_what_is_described_is_what_is_sent():
    model = load_task(recipe_of()).model.to(torch.bfloat16)
    sent = [(name, "bfloat16", list(weight.shape)) for name, weight in full_weights(model)]
    assert weight_metadata(model) == sent


def test_prompts_go_out_once_a_group_with_seeds_of_their_own(start):
    server = start()
    batch, _, samples = loop_for(server).collect()
    bodies = server.bodies("/v1/completions")
    assert [body["n"] for body in bodies] == [4] * 4 and len({body["seed"] for body in bodies}) == 4
    rollout = batch.rollout
    asked = sorted(tuple(body["prompt"]) for body in bodies)
    kept = [tuple(row[m.bool()].tolist()) for row, m in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    assert asked == sorted(kept[::4]) and all(len({*kept[k : k + 4]}) == 1 for k in range(0, 16, 4))
    assert len(samples) == 16


# what corrects


def stale(server, factor, **changes):
    """A loop whose model has moved on from the server's, and a batch of it."""
    loop = loop_for(server, **changes)
    loop.collect()
    with torch.no_grad():
        loop.model.lm_head.weight.mul_(factor)
    batch, metrics, _ = loop.collect()
    return loop, batch, metrics


def direct_weights(batch, mode, low, high):
    """By the formulas of TIS and MIS, completion by completion, in Python's floats."""
    found = torch.zeros_like(batch.old_logprobs)
    for i, mask in enumerate(batch.rollout.completion_mask.bool()):
        gaps = (batch.old_logprobs[i] - batch.rollout.sampling_logprobs[i])[mask].double().tolist()
        gaps = [sum(gaps)] * len(gaps) if mode.startswith("sequence") else gaps
        ratios = torch.tensor(gaps).exp()
        outside = (ratios < low) | (ratios > high)
        found[i, mask] = ratios.clamp(low, high) if mode.endswith("truncate") else ratios.masked_fill(outside, 0)
    return found


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_a_stale_server_is_corrected_as_the_formula_says(start, mode):
    low, high = (0.9, 1.1) if mode.startswith("token") else (0.7, 1.3)
    loop, batch, metrics = stale(
        start(),
        1.3,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )
    mask = batch.rollout.completion_mask.bool()
    old = completion_logprobs(loop.model, batch.rollout, temperature=1.0, batch_size=16, backend="torch")
    torch.testing.assert_close(batch.old_logprobs[mask], old[mask], atol=1e-5, rtol=1e-5)
    weights = direct_weights(batch, mode, low, high)
    assert (weights[mask] == 0).any() == mode.endswith("mask") and weights[mask].unique().numel() > 3
    for batch_ in (batch, batch.select(torch.arange(16).flip(0))):
        got = loop.policy.loss(
            batch_.rollout,
            batch_.advantages,
            old_logprobs=batch_.old_logprobs,
            sampling_logprobs=batch_.rollout.sampling_logprobs,
        )[0]
        expected = -(weights * batch.advantages[:, None])[mask].sum() / mask.sum()  # every ratio is 1
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
    means = (
        weights[:, 0] if mode.startswith("sequence") else weights[mask]
    )  # of sequences' weights or of tokens', as TRL's
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(means.mean().item(), rel=1e-4)
    assert metrics["sampling/importance_sampling_ratio/min"] == pytest.approx(weights[mask].min().item(), rel=1e-4)
    assert metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(weights[mask].max().item(), rel=1e-4)
    gap = (batch.old_logprobs - batch.rollout.sampling_logprobs)[mask].abs()
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(gap.mean().item(), rel=1e-4)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(gap.max().item(), rel=1e-4)


def test_the_optimizer_step_takes_the_correction(start):
    """Every weight is clamped to 0.25, so the gradient is a quarter of the uncorrected one."""
    bounds = {"vllm_importance_sampling_clip_min": 0.25, "vllm_importance_sampling_clip_max": 0.25}
    norms = []
    for changes in ({"vllm_importance_sampling_mode": "token_truncate"} | bounds,
                    {"vllm_importance_sampling_correction": False}):  # fmt: skip
        loop = loop_for(start(), max_grad_norm=0.0, **changes)
        norms.append(loop.optimizer_step(next(iter(loop.optimizer_batches(loop.collect()[0]))))["grad_norm"])
    assert norms[0] == pytest.approx(norms[1] / 4, rel=1e-4) and norms[1] > 0


def test_completions_that_are_left_out_of_the_loss_are_in_none_of_its_metrics(start):
    _, batch, metrics = stale(start(), 1.3, mask_truncated_completions=True, max_completion_length=6)
    mask = batch.rollout.completion_mask.bool()
    assert 0 < metrics["completions/clipped_ratio"] == (~mask.any(dim=1)).double().mean() < 1
    assert metrics["sampling/empty_completions"] == 0
    gap = (batch.old_logprobs - batch.rollout.sampling_logprobs)[mask].abs()
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(gap.mean().item(), rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_weights_are_1_where_server_and_trainer_agree(start, temperature):
    batch, metrics, _ = loop_for(start(), temperature=temperature).collect()
    mask = batch.rollout.completion_mask.bool()
    sampled = batch.rollout.sampling_logprobs
    torch.testing.assert_close(sampled[mask], batch.old_logprobs[mask], atol=2e-6, rtol=1e-6)
    assert (sampled[~mask] == 0).all() and (sampled[mask] < 0).all()
    assert metrics["sampling/importance_sampling_ratio/min"] == pytest.approx(1, abs=1e-4)
    config = recipe_for(start()).loss_config()
    exact = correction_metrics(correction_statistics(sampled, sampled, mask, config))
    assert exact["sampling/importance_sampling_ratio/min"] == exact["sampling/importance_sampling_ratio/max"] == 1


def test_without_a_correction_nothing_is_recomputed(start):
    batch, metrics, _ = loop_for(start(), vllm_importance_sampling_correction=False).collect()
    assert batch.old_logprobs is None and "sampling/importance_sampling_ratio/mean" not in metrics


def test_packing_takes_the_servers_log_probs_too(start):
    losses = []
    for packing in (False, True):
        loop = loop_for(start(), packing=packing, vllm_importance_sampling_mode="token_truncate")
        losses.append(loop.optimizer_step(next(iter(loop.optimizer_batches(loop.collect()[0]))))["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# what a run survives


def test_a_run_whose_server_died_goes_on_as_if_it_had_not(start, tmp_path):
    """Resumed on another server, which knows nothing of the run."""
    settings = {"max_steps": 4, "save_steps": 1}
    train(recipe_for(start(), output_dir=str(tmp_path / "whole"), **settings))
    left = [12]

    def dying(handler, body, right):
        left[0] -= 1
        return right() if left[0] >= 0 else hang_up(handler, body, right)

    broken = recipe_for(start(spoil={"/v1/completions": dying}), output_dir=str(tmp_path / "cut"), **settings)
    with pytest.raises(ServerError, match="/v1/completions"):
        train(broken)
    assert sorted(path.name for path in (tmp_path / "cut").glob("checkpoint-*"))[-1] == "checkpoint-3"
    train(recipe_for(start(), output_dir=str(tmp_path / "cut"), resume=True, **settings))
    records = [
        [{k: v for k, v in record.items() if k != "step_time"} for record in read_records(folder / "metrics.jsonl")]
        for folder in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert len(records[0]) == 4 and records[0] == records[1]


def worker(url: str, out: str) -> None:
    """A generation under FSDP2, then one of a server that fails: what this process saw of both."""
    torch.set_num_threads(1)
    from test_training_processes import accelerator_of

    accelerator = accelerator_of("fsdp2")
    recipe = recipe_of(
        use_vllm=True, vllm_server_base_url=url, vllm_server_timeout=60.0, dynamic_sampling=True,
        reward_funcs=["test_training_sampling:reward_of_some"],
    )  # fmt: skip
    loop = GRPOLoop(load_task(recipe), recipe, accelerator)
    assert all(hasattr(parameter, "full_tensor") for parameter in loop.model.parameters())
    torch.manual_seed(accelerator.process_index)
    batch, metrics, samples = loop.collect()
    rollout = batch.rollout
    kept = [row[m.bool()].tolist() for row, m in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    found = {"prompts": kept, "samples": len(samples), "metrics": metrics, "drawn": loop.row_order.drawn}
    VLLMServer(url, timeout=60.0, generation_timeout=60.0).request("POST", "/spoil", {})
    try:
        loop.collect()
    except ServerError as error:
        found["error"] = str(error)
    Path(f"{out}-{accelerator.process_index}").write_text(json.dumps(found))


@pytest.mark.early
@pytest.mark.full
def test_processes_under_fsdp2_share_a_server_its_batches_and_its_failure(start, tmp_path):
    broken = threading.Event()
    server = start(
        spoil={
            "/spoil": lambda handler, body, right: broken.set() or (200, {}),
            "/v1/completions": lambda handler, body, right: (500, b"no") if broken.is_set() else right(),
        }
    )
    with torch.no_grad():
        for parameter in server.model.parameters():
            parameter.zero_()
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, server.url,
               str(tmp_path / "found")]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:3000]
    initial, sent = weights_of(load_task(recipe_of()).model), weights_of(server.model)
    assert all(torch.equal(sent[name], value) for name, value in initial.items())
    assert server.count("/update_weights") == 1
    one, other = (json.loads((tmp_path / f"found-{rank}").read_text()) for rank in (0, 1))
    assert one["metrics"] == other["metrics"] and one["samples"] == other["samples"] == 16  # its own: none is printed
    rounds = one["metrics"]["dynamic_sampling/generation_batches"]
    assert rounds > 1 and one["drawn"] == other["drawn"] == 8 * rounds
    assert one["metrics"]["dynamic_sampling/groups_missing"] == 0
    assert one["metrics"]["sampling/sampling_logp_difference/max"] < 1e-5
    prompts = [tuple(prompt) for found in (one, other) for prompt in found["prompts"][::4]]
    asked = {tuple(body["prompt"]) for body in server.bodies("/v1/completions")}
    assert len(prompts) == 8 and asked >= {*prompts} and {*prompts[:4]} != {*prompts[4:]}
    assert "answered 500: no" in one["error"]
    assert other["error"].startswith("in the main process: ServerError: ") and "answered 500: no" in other["error"]


def test_a_sampler_is_one_of_a_server_only_where_asked(start):
    assert isinstance(loop_for(start()).sampler, ServerSampler)
    assert not isinstance(loop_for(start(), use_vllm=False).sampler, ServerSampler)


if __name__ == "__main__":
    worker(*sys.argv[1:])
    end_worker()
