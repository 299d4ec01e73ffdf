"""Every metric that a loss returns, against loops over Python floats: drawn masks, empty sequences, several calls."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

import pytest
import torch
from testing.calls import BACKENDS
from torch import Tensor

from grpo_kernels import GRPOLossConfig, grpo_loss, linear_grpo_loss, policy_loss
from grpo_kernels.loss.metrics import CLIP_METRICS, PolicyMetrics

pytestmark = pytest.mark.usefixtures("poison")
CONFIGS = {
    "token": GRPOLossConfig(beta=0.1),
    "two_bounds": GRPOLossConfig(loss_type="dapo", epsilon_low=0.1, epsilon_high=0.28, delta=1.5),
    "delta": GRPOLossConfig(epsilon_high=0.28, delta=1.2),  # so low that no ratio is clipped above
    "bias_corrected": GRPOLossConfig(loss_type="bnpo", beta=0.1, use_bias_correction_kl=True),
    "sequence": GRPOLossConfig(beta=0.1, importance_sampling_level="sequence", epsilon_low=0.05),
    "sequence_bias_corrected": GRPOLossConfig(
        loss_type="luspo", beta=0.1, importance_sampling_level="sequence", use_bias_correction_kl=True, epsilon_low=0.05
    ),
    "cispo": GRPOLossConfig(loss_type="cispo", epsilon_high=1.15, beta=0.1),
    "cispo_sequence": GRPOLossConfig(loss_type="cispo", epsilon_high=1.05, importance_sampling_level="sequence"),
    "vespo": GRPOLossConfig(loss_type="vespo"),
    "sapo": GRPOLossConfig(loss_type="sapo", beta=0.1),
}  # fmt: skip
TOLERANCE = {torch.float32: 64 * 2**-24, torch.float64: 64 * 2**-53}  # roundings of an exp and of a sum of 63 tokens


class Drawn(NamedTuple):
    """Seven completions of up to nine tokens: one of none, one of one, holes in others, and NaN under the mask."""

    logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    old: Tensor
    ref: Tensor
    entropy: Tensor

    def rows(self, which: slice) -> Drawn:
        return Drawn(*(values[which] for values in self))


def drawn(seed: int, dtype: torch.dtype) -> Drawn:
    rng = torch.Generator().manual_seed(seed)
    logprobs = -0.1 - torch.rand(7, 9, generator=rng)
    mask = torch.rand(7, 9, generator=rng) < 0.7
    mask[seed % 7], mask[(seed + 3) % 7] = False, torch.arange(9) == 4
    old, ref = (logprobs + 0.3 * torch.randn(7, 9, generator=rng) for _ in range(2))
    advantages = torch.tensor([1.0, -1.0, 0.5, 0.0, -2.0, 1.5, -0.25])[torch.randperm(7, generator=rng)]
    entropy = torch.rand(7, 9, generator=rng)
    dirty = (values.masked_fill(~mask, math.nan).to(dtype) for values in (logprobs, old, ref, entropy))
    logprobs, old, ref, entropy = dirty
    return Drawn(logprobs, advantages.to(dtype), mask, old, ref, entropy)


def plain(inputs: Drawn, config: GRPOLossConfig) -> dict[str, float]:
    """The metrics, completion by completion and token by token."""
    high_epsilon = config.epsilon_low if config.epsilon_high is None else config.epsilon_high
    low, high = (1 - config.epsilon_low, 1 + high_epsilon)
    if config.loss_type == "cispo":
        low, high = -math.inf, high_epsilon
    is_sequence = config.importance_sampling_level == "sequence"
    kls, entropies, lows, highs, low_shares, high_shares, phis = ([] for _ in range(7))
    for i, advantage in enumerate(inputs.advantages.tolist()):
        at = inputs.mask[i].nonzero()[:, 0].tolist()
        new, old, ref = (values[i].double()[at].tolist() for values in (inputs.logprobs, inputs.old, inputs.ref))
        log_ratios = [a - b for a, b in zip(new, old, strict=True)]
        mean = math.fsum(log_ratios) / len(at) if at else 0.0
        ratios = [math.exp(mean)] if is_sequence else [math.exp(x) for x in log_ratios]
        of_tokens = ratios * len(at) if is_sequence else ratios
        for a, b, ratio in zip(new, ref, of_tokens, strict=True):
            kls.append((math.exp(b - a) - (b - a) - 1) * (ratio if config.use_bias_correction_kl else 1))
        entropies += inputs.entropy[i].double()[at].tolist()
        bounded = [ratio if config.delta is None else min(ratio, config.delta) for ratio in ratios]
        is_low = [float(ratio < low and advantage < 0) for ratio in bounded]
        is_high = [float(ratio > high and advantage > 0) for ratio in bounded]
        lows, highs = lows + is_low, highs + is_high
        if is_low:
            low_shares.append(fmean(is_low))
            high_shares.append(fmean(is_high))
        w = math.exp(min(max(math.fsum(log_ratios), math.log(1e-8)), 20))
        k = config.vespo_k_pos if advantage >= 0 else config.vespo_k_neg
        decay = config.vespo_lambda_pos if advantage >= 0 else config.vespo_lambda_neg
        phis.append(math.exp(decay) * w**k * math.exp(-decay * w))
    found = {"entropy": fmean(entropies)} | ({"kl": fmean(kls)} if config.beta else {})
    if config.loss_type == "cispo":
        return found | {"cispo_clip_ratio": fmean(highs)}
    if config.loss_type == "vespo":
        return found | {"vespo/phi_seq_mean": fmean(phis)}
    if config.loss_type == "sapo":
        return found
    values = (fmean(lows), min(low_shares), fmean(highs), max(high_shares), fmean(lows) + fmean(highs))
    return found | dict(zip(CLIP_METRICS, values, strict=True))


def measured(inputs: Drawn, config: GRPOLossConfig, backend: str) -> PolicyMetrics:
    return policy_loss(
        inputs.logprobs, inputs.advantages, inputs.mask, old_logprobs=inputs.old, entropy=inputs.entropy,
        ref_logprobs=inputs.ref if config.beta else None, config=config, backend=backend,
    ).metrics  # fmt: skip


def assert_near(got: PolicyMetrics, expected: dict[str, float], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].item() == pytest.approx(value, rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_losss_metrics_are_the_plain_ones(name: str, dtype: torch.dtype, backend: str) -> None:
    found = []
    for seed in range(8):
        inputs = drawn(seed, dtype)
        expected = plain(inputs, CONFIGS[name])
        assert_near(measured(inputs, CONFIGS[name], backend), expected, TOLERANCE[dtype])
        found.append(expected)
    for metric in found[0]:  # none is a constant, but for the extrema of whole completions' shares
        is_constant = metric.endswith(("_min", "_max")) or (name == "delta" and metric == "clip_ratio/high_mean")
        assert is_constant or len({values[metric] for values in found}) > 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_unequal_micro_batches_have_the_metrics_of_the_batch(name: str, backend: str) -> None:
    """Of 1, 4 and 2 completions: a mean of their means would be another."""
    config, cuts = CONFIGS[name], (slice(0, 1), slice(1, 5), slice(5, 7))
    for seed in range(4):
        inputs = drawn(seed, torch.float64)
        parts = [measured(inputs.rows(cut), config, backend) for cut in cuts]
        assert_near(PolicyMetrics.combined(parts), plain(inputs, config), TOLERANCE[torch.float64])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_metrics_of_no_token_are_0_and_weigh_nothing(name: str, backend: str) -> None:
    config, inputs = CONFIGS[name], drawn(0, torch.float64)
    nothing = measured(inputs._replace(mask=torch.zeros_like(inputs.mask)), config, backend)
    is_empty = {metric: value.item() for metric, value in nothing.items() if metric != "vespo/phi_seq_mean"}
    assert is_empty == dict.fromkeys(is_empty, 0.0)
    if config.importance_sampling_level == "token" and config.loss_type != "vespo":
        both = PolicyMetrics.combined([nothing, measured(inputs, config, backend)])
        assert_near(both, plain(inputs, config), TOLERANCE[torch.float64])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["token", "sequence", "vespo"])
def test_losses_from_logits_and_hidden_states_have_them_too(name: str, backend: str) -> None:
    """Log-probabilities and entropies by fp64 log-softmax at a temperature."""
    config = replace(CONFIGS[name], temperature=0.7)
    rng = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(*shape, 16, generator=rng).double() for shape in ((7, 9), (37,)))
    ids = torch.randint(37, (7, 9), generator=rng)
    inputs = drawn(1, torch.float64)
    every = (hidden @ weight.T / 0.7).log_softmax(-1)
    logprobs = every.gather(-1, ids[..., None])[..., 0]
    moved = [logprobs + values - inputs.logprobs for values in (inputs.old, inputs.ref)]
    inputs = inputs._replace(logprobs=logprobs, old=moved[0], ref=moved[1], entropy=-(every.exp() * every).sum(-1))
    arguments: dict[str, Any] = {"old_logprobs": inputs.old, "config": config, "backend": backend}
    if config.beta:
        arguments["ref_logprobs"] = inputs.ref
    expected = plain(inputs, config)
    for loss in (
        grpo_loss(hidden @ weight.T, ids, inputs.advantages, inputs.mask, **arguments),
        linear_grpo_loss(hidden, weight, ids, inputs.advantages, inputs.mask, **arguments),
    ):
        assert_near(loss.metrics, expected, 37 * TOLERANCE[torch.float64])
