"""The loss family by numbers worked by hand: objectives, divergences, masks and corrections."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from testing.calls import BACKENDS

from grpo_kernels import AdaptiveEntropy, GRPOLossConfig, grpo_loss, linear_grpo_loss, policy_loss, token_logprobs

# Two completions of two and one tokens, ratios 1.5, 0.5 and 0.5, advantages 1 and -1.
P = (0.3, 0.2, 0.4)
LOGPROBS = torch.tensor([[math.log(0.3), math.log(0.2)], [math.log(0.4), -7.0]], dtype=torch.float64)
OLD = torch.tensor([[math.log(0.2), math.log(0.4)], [math.log(0.8), -1.0]], dtype=torch.float64)
MASK = torch.tensor([[1, 1], [1, 0]])
ADVANTAGES = torch.tensor([1.0, -1.0], dtype=torch.float64)
L = [math.log(p) for p in P]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


PHI = (math.exp(3 - 3 * 0.75) * 0.75**2, math.exp(2 - 2 * 0.5) * 0.5**3)
GATE = (_sigmoid(0.5), _sigmoid(-0.5), _sigmoid(-1.0))
GEOMETRIC = math.exp((0.2 + math.log(0.5)) / 2)  # ln 1.5 is clipped to 0.2
MEAN = math.sqrt(1.5 * 0.5)
#: Options, loss, gradient.
OBJECTIVES: dict[str, tuple[dict[str, Any], float, list[float]]] = {
    "ppo": ({"loss_type": "ppo"}, -(1.2 + 0.5 - 0.8) / 3, [0, -0.5 / 3, 0]),
    "luspo": ({"loss_type": "luspo"}, -(1.2 + 0.5 - 0.8) / 2, [0, -0.5 / 2, 0]),
    "surrogate": ({"loss_type": "surrogate"}, -(1.5 + 0.5 - 0.5) / 3, [-1.5 / 3, -0.5 / 3, 0.5 / 3]),
    "reinforce": ({"loss_type": "reinforce"}, -(L[0] + L[1] - L[2]) / 3, [-1 / 3, -1 / 3, 1 / 3]),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.3},
        -(1.3 * L[0] + 0.5 * L[1] - 0.5 * L[2]) / 3,
        [-1.3 / 3, -0.5 / 3, 0.5 / 3],
    ),
    "cispo_both_bounds": (
        {"loss_type": "cispo", "epsilon_high": 1.3, "cispo_ratio_low": 0.8},
        -(1.3 * L[0] + 0.8 * L[1] - 0.8 * L[2]) / 3,
        [-1.3 / 3, -0.8 / 3, 0.8 / 3],
    ),
    "sapo": (
        {"loss_type": "sapo", "sapo_temperature_neg": 2.0},
        -(2 * GATE[0] + 2 * GATE[1] - 2 * GATE[2]) / 2,
        [-1.5 * GATE[0] * (1 - GATE[0]), -0.5 * GATE[1] * (1 - GATE[1]), 2 * 0.5 * GATE[2] * (1 - GATE[2])],
    ),
    "vespo": (
        {"loss_type": "vespo"},
        -(PHI[0] * (L[0] + L[1]) - PHI[1] * L[2]) / 3,
        [-PHI[0] / 3, -PHI[0] / 3, PHI[1] / 3],
    ),
    "gmpo": ({"loss_type": "gmpo"}, -(GEOMETRIC - math.exp(-0.2)) / 2, [0, -GEOMETRIC / 4, 0]),
    "sequence_token": (
        {"importance_sampling_level": "sequence_token", "epsilon_low": 0.6},
        -(2 * MEAN - 0.5) / 3,
        [-MEAN / 3, -MEAN / 3, 0.5 / 3],
    ),
    "log_ratio_clamp": (  # ratios 1.105, 0.905 and 0.905, none of them with a gradient
        {"log_ratio_clamp": 0.1},
        -(math.exp(0.1) + math.exp(-0.1) - math.exp(-0.1)) / 3,
        [0, 0, 0],
    ),
    "off_policy_mask": ({"off_policy_mask_threshold": 0.69}, -(1.2 + 0.5) / 3, [0, -0.5 / 3, 0]),
    "off_policy_mask_keeps": ({"off_policy_mask_threshold": 0.7}, -(1.2 + 0.5 - 0.8) / 3, [0, -0.5 / 3, 0]),
    "top_entropy": ({"top_entropy_quantile": 0.5}, -(0.5 - 0.8) / 3, [0, -0.5 / 3, 0]),
}


def _loss(config: GRPOLossConfig, backend: str, **inputs: Any) -> tuple[Any, Any, list[float]]:
    leaf = LOGPROBS.clone().requires_grad_()
    arguments = {"old_logprobs": OLD, "entropy": torch.tensor([[0.1, 0.2], [0.3, 9.0]], dtype=torch.float64), **inputs}
    loss, metrics = policy_loss(leaf, ADVANTAGES, MASK, config=config, backend=backend, **arguments)
    loss.backward()
    assert leaf.grad is not None and leaf.grad[1, 1] == 0
    return loss.item(), metrics, leaf.grad.flatten()[:3].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name: str, backend: str) -> None:
    options, expected, gradient = OBJECTIVES[name]
    loss, metrics, got = _loss(GRPOLossConfig(**options), backend)
    assert loss == pytest.approx(expected, rel=1e-12)
    assert got == pytest.approx(gradient, rel=1e-12, abs=1e-15)
    if name == "cispo":
        assert metrics["cispo_clip_ratio"].item() == pytest.approx(1 / 3)
    if name == "vespo":
        assert metrics["vespo/phi_seq_mean"].item() == pytest.approx(sum(PHI) / 2)
    if name == "gmpo":
        assert metrics["clip_ratio/region_mean"].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_given_entropy_threshold_goes_before_the_quantile(backend: str) -> None:
    config = GRPOLossConfig(top_entropy_quantile=0.5, entropy_coef=0.1)
    loss, _, _ = _loss(config, backend, entropy_threshold=0.25)
    assert loss == pytest.approx(0.8 / 3 - 0.1 * 0.3, rel=1e-12)


D = math.log(2)  # of the policy over the reference
#: Estimate and its derivative by the log-probability.
ESTIMATES = {
    "k1": (D, 1.0),
    "k2": (D * D / 2, D),
    "mse": (D * D / 2, D),
    "k3": (0.5 - 1 + D, 0.5),
    "abs": (D, 1.0),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ESTIMATES)
def test_divergences(name: str, backend: str) -> None:
    value, derivative = ESTIMATES[name]
    inputs = {"ref_logprobs": LOGPROBS - D, "old_logprobs": None}
    plain = {"loss_type": "reinforce", "beta": 0.1, "kl_estimator": name, "use_bias_correction_kl": False}
    policy = -(L[0] + L[1] - L[2]) / 3
    for options, kl, slope in (
        ({}, value, derivative),
        ({"kl_gradient": "straight_through"}, value, D),
        ({"kl_gradient": "importance_weighted"}, value, derivative + value),
        ({"kl_clamp": 0.05}, 0.05, 0.0),
        ({"kl_clamp": 0.05, "kl_gradient": "importance_weighted"}, 0.05, 0.0),
        ({"kl_clamp": 0.05, "kl_gradient": "straight_through"}, 0.05, D),
        ({"use_bias_correction_kl": True}, value, value + derivative),  # at ratio 1
        ({"log_ratio_clamp": 0.5 * D, "kl_clamp": 5.0}, None, 0.0),
    ):
        loss, metrics, gradient = _loss(GRPOLossConfig(**(plain | options)), backend, **inputs)
        if kl is not None:
            assert metrics["kl"].item() == pytest.approx(kl, rel=1e-6)
            assert loss == pytest.approx(policy + 0.1 * kl, rel=1e-12)
        expected = [(-1 + 0.1 * slope) / 3, (-1 + 0.1 * slope) / 3, (1 + 0.1 * slope) / 3]
        assert gradient == pytest.approx(expected, rel=1e-12), options


# old over sampler: 2, 0.5; 4
SAMPLING = OLD - torch.tensor([[math.log(2), -math.log(2)], [math.log(4), 0.0]], dtype=torch.float64)
CORRECTIONS = {
    ("token_truncate", None, 3.0): (2, 0.5, 3),
    ("token_truncate", 0.8, 3.0): (2, 0.8, 3),
    ("token_mask", None, 3.0): (2, 0.5, 0),
    ("token_mask", 0.8, None): (2, 0, 4),
    ("sequence_truncate", None, 3.0): (1, 1, 3),
    ("sequence_mask", None, 3.0): (1, 1, 0),
    ("sequence_mask", 2.0, None): (0, 0, 4),
    ("geometric_mask", None, 3.0): (2, 0.5, 0),
    ("geometric_mask", 1.5, None): (0, 0, 4),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
def test_rollout_corrections(correction: Any, backend: str) -> None:
    name, low, high = correction
    weights = CORRECTIONS[correction]
    config = GRPOLossConfig(rollout_correction=name, rollout_clip_min=low, rollout_clip_max=high)
    loss, _, _ = _loss(config, backend, sampling_logprobs=SAMPLING)
    assert loss == pytest.approx(-(1.2 * weights[0] + 0.5 * weights[1] - 0.8 * weights[2]) / 3, rel=1e-12)


def test_a_token_that_the_sampler_did_not_score_is_not_corrected() -> None:
    sampling = SAMPLING.clone()
    sampling[0, 0] = math.nan
    config = GRPOLossConfig(rollout_correction="token_truncate", rollout_clip_max=3.0)
    loss, _, _ = _loss(config, "torch", sampling_logprobs=sampling)
    assert loss == pytest.approx(-(1.2 + 0.5 * 0.5 - 0.8 * 3) / 3, rel=1e-12)


@pytest.mark.parametrize(
    ("config", "inputs", "parts"),
    [
        (GRPOLossConfig(rollout_correction="token_mask"), {}, ("sampling_logprobs", "token_mask")),
        (
            GRPOLossConfig(rollout_correction="token_mask"),
            {"sampling_logprobs": SAMPLING, "old_logprobs": None},
            ("old_logprobs", "token_mask"),
        ),
        (
            GRPOLossConfig(rollout_correction="token_mask"),
            {"sampling_logprobs": SAMPLING, "rollout_is_weights": torch.ones(2, 2)},
            ("rollout_is_weights", "rollout_correction"),
        ),
        (GRPOLossConfig(loss_type="vespo"), {"rollout_is_weights": torch.ones(2, 1)}, ("rollout_is_weights", "[2, 1]")),
        (GRPOLossConfig(top_entropy_quantile=0.5), {"entropy": None}, ("entropy", "top_entropy_quantile")),
        (GRPOLossConfig(), {"entropy_threshold": 0.5}, ("entropy_threshold", "top_entropy_quantile")),
    ],
    ids=str,
)
def test_what_a_configuration_needs_is_named(config: GRPOLossConfig, inputs: Any, parts: tuple[str, str]) -> None:
    with pytest.raises(ValueError) as caught:
        _loss(config, "torch", **inputs)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize("loss_type", ["vespo", "gmpo"])
def test_sequences_weights_take_one_advantage_each(loss_type: str) -> None:
    with pytest.raises(ValueError, match=rf"advantages must be one per completion, \[2\], with .*{loss_type}"):
        policy_loss(LOGPROBS, torch.ones(2, 2), MASK, config=GRPOLossConfig(loss_type=loss_type))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_entropy_threshold_reaches_the_fused_losses(backend: str) -> None:
    torch.manual_seed(0)
    hidden, weight, ids = torch.randn(2, 5, 4), torch.randn(11, 4), torch.randint(11, (2, 5))
    advantages, mask = torch.tensor([1.0, -1.0]), torch.ones(2, 5)
    tokens = token_logprobs(hidden @ weight.t(), ids, outputs=("entropy",), backend="torch")
    config = GRPOLossConfig(top_entropy_quantile=0.5)
    threshold = tokens.entropy.flatten().sort().values[6:8].mean()
    expected = policy_loss(tokens.logprobs, advantages, (tokens.entropy >= threshold) * mask, backend="torch").loss
    for loss in (
        grpo_loss(hidden @ weight.t(), ids, advantages, mask, entropy_threshold=threshold, num_items_in_batch=3,
                  config=config, backend=backend).loss,
        linear_grpo_loss(hidden, weight, ids, advantages, mask, entropy_threshold=threshold, num_items_in_batch=3,
                         config=config, backend=backend).loss,
    ):  # fmt: skip
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"coef": -0.1}, ("coef", "at least 0", "-0.1")),
        ({"target": math.inf}, ("target", "finite", "inf")),
        ({"least": 2.0}, ("least", "most=1.0", "2.0")),
    ],
)
def test_bad_options_of_the_adaptive_bonus_are_named(options: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        AdaptiveEntropy(**options)
    assert all(part in str(caught.value) for part in parts)
    with pytest.raises(ValueError, match="entropy must be finite, got nan"):
        AdaptiveEntropy().update(math.nan)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clip_cov_draws_its_share_of_the_tokens_that_vary_together(backend: str) -> None:
    torch.manual_seed(0)
    logprobs = torch.randn(8, 50, dtype=torch.float64) - 2
    advantages, mask = torch.randn(8, 50, dtype=torch.float64), torch.rand(8, 50) < 0.8
    centred = [x - x[mask].mean() for x in (advantages, logprobs)]
    covariance = centred[0] * centred[1]
    may = mask & (covariance > 0.5) & (covariance < 2)
    config = GRPOLossConfig(loss_type="clip_cov", clip_cov_ratio=0.03, clip_cov_lb=0.5, clip_cov_ub=2.0)
    left = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        leaf = logprobs.clone().requires_grad_()
        policy_loss(leaf, advantages, mask, config=config, backend=backend).loss.backward()
        assert leaf.grad is not None
        left.append(mask & (leaf.grad == 0))
    assert all(out.sum() == int(0.03 * mask.sum()) and (may | ~out).all() for out in left)
    assert torch.equal(left[0], left[1]) and not torch.equal(left[0], left[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ["sapo", "surrogate", "dapo"])
def test_a_ratio_past_the_largest_number_has_a_finite_gradient_or_none(loss_type: str, backend: str) -> None:
    """SAPO's gate is shut; a weight of 0, a masked sampler's say, leaves nothing of an infinite ratio."""
    logprobs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    weights = torch.tensor([[1.0 if loss_type == "sapo" else 0.0, 1.0]])
    out = policy_loss(
        logprobs, torch.tensor([-1.0]), torch.ones(1, 2), old_logprobs=torch.tensor([[-200.0, -1.0]]),
        rollout_is_weights=weights, config=GRPOLossConfig(loss_type=loss_type), backend=backend,
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.isfinite() and logprobs.grad is not None
    assert logprobs.grad[0, 0] == 0 and logprobs.grad[0, 1] != 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_clamped_divergence_has_no_gradient_however_far(backend: str) -> None:
    logprobs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    config = GRPOLossConfig(loss_type="reinforce", beta=0.1, kl_clamp=10.0, use_bias_correction_kl=False)
    ref = torch.tensor([[120.0, -1.0]])
    policy_loss(
        logprobs, torch.zeros(1), torch.ones(1, 2), ref_logprobs=ref, config=config, backend=backend
    ).loss.backward()
    assert logprobs.grad is not None and not logprobs.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_quantile_of_many_half_precision_entropies(backend: str) -> None:
    """Their number is more than half precision counts."""
    torch.manual_seed(0)
    entropy, mask = torch.rand(1, 70_000).half(), torch.ones(1, 70_000)
    leaf = torch.full((1, 70_000), -1.0).requires_grad_()
    config = GRPOLossConfig(top_entropy_quantile=0.2)
    policy_loss(leaf, torch.ones(1), mask, entropy=entropy, config=config, backend=backend).loss.backward()
    assert leaf.grad is not None
    kept = entropy >= torch.quantile(entropy.float(), 0.8)
    assert torch.equal(leaf.grad != 0, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_has_no_quantile(backend: str) -> None:
    config = GRPOLossConfig(top_entropy_quantile=0.2)
    none = torch.zeros(2, 0)
    loss = policy_loss(none, torch.ones(2), none, entropy=none, config=config, backend=backend).loss
    assert loss.item() == 0
