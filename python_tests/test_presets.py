"""NeMo-RL's and OpenRLHF's losses by their own names, against their formulas (neither installs on a CPU machine)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels import GRPOLossConfig, policy_loss

GENERATOR = torch.Generator().manual_seed(0)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=GENERATOR)


OLD = -1 - _random(6, 5).abs()
LOGPROBS, SAMPLING, REFERENCE = OLD + 0.4 * _random(6, 5), OLD + 0.5 * _random(6, 5), OLD + 0.4 * _random(6, 5)
REFERENCE[0, :3] += torch.tensor([25.0, -25.0, 6.0])  # beyond the clamps
ADVANTAGES, ENTROPY = _random(6), _random(6, 5).abs()
MASK = (torch.arange(5) < torch.tensor([[5], [3], [1], [4], [2], [5]])).double()


def _mean(values: Tensor, token_level: bool) -> Tensor:
    if token_level:
        return (values * MASK).sum() / MASK.sum()
    return ((values * MASK).sum(-1) / MASK.sum(-1)).mean()


def _geometric(log_ratio: Tensor) -> Tensor:
    return ((log_ratio * MASK).sum(-1, keepdim=True) / MASK.sum(-1, keepdim=True)).exp()


def _inside(values: Tensor, low: float, high: float) -> Tensor:
    return ((values >= low) & (values <= high)).double()


def _kl(logprobs: Tensor, estimator: str, bound: float, weighted: bool = False) -> Tensor:
    """Clamped before and after; NeMo-RL's weight multiplies in between, and has no gradient beyond the first clamp."""
    difference = logprobs - REFERENCE
    d = difference.clamp(-bound, bound)
    k = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[estimator]
    weight = (logprobs - logprobs.detach()).exp()
    return (k * torch.where(d == difference, weight, weight.detach()) if weighted else k).clamp(-10, 10)


def _clipped(ratio: Tensor, low: float, high: float, dual: float | None) -> Tensor:
    advantages = ADVANTAGES[:, None]
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    return loss if dual is None else torch.where(advantages < 0, torch.minimum(loss, -dual * advantages), loss)


def _nemo_rl(logprobs: Tensor, options: dict[str, Any]) -> Tensor:
    token_level = options.get("token_level_loss", True)
    of_sequences = options.get("sequence_level_importance_ratios", False)
    low, high = options.get("ratio_clip_min", 0.2), options.get("ratio_clip_max", 0.2)
    ratio = _geometric(logprobs - OLD) if of_sequences else (logprobs - OLD).exp()
    if options.get("disable_ppo_ratio"):
        loss = -ADVANTAGES[:, None] * logprobs
    elif options.get("use_cispo"):
        loss = -ADVANTAGES[:, None] * ratio.clamp(1 - low, 1 + high).detach() * logprobs
    else:
        loss = _clipped(ratio, low, high, options.get("ratio_clip_c"))
    if options.get("use_importance_sampling_correction"):
        log_ratio = OLD - SAMPLING
        weights = (log_ratio * MASK).sum(-1, keepdim=True).exp() if of_sequences else log_ratio.exp()
        bounds = (
            options.get("truncated_importance_sampling_ratio_min", 0.0),
            options.get("truncated_importance_sampling_ratio", torch.inf),
        )
        kind = options.get("truncated_importance_sampling_type")
        if kind == "tis":
            weights = weights.clamp(*bounds)
        elif kind == "icepop":
            weights = weights * _inside(weights, *bounds)
        elif kind == "seq-mask-tis":
            weights = weights * _inside(_geometric(log_ratio), *bounds)
        loss = loss * weights
    beta = options.get("reference_policy_kl_penalty", 0.01)
    kl = _kl(logprobs, options.get("reference_policy_kl_type", "k3"), 20, weighted=True)
    return _mean(loss, token_level) + (0 if options.get("use_kl_in_reward") else beta * _mean(kl, token_level))


_CORRECTED = {"use_importance_sampling_correction": True}
_BOUNDS = {"truncated_importance_sampling_ratio_min": 0.7, "truncated_importance_sampling_ratio": 1.4} | _CORRECTED
_SEQUENCES = {"sequence_level_importance_ratios": True, "token_level_loss": False}
NEMO_RL = [
    {},
    {"token_level_loss": False, "ratio_clip_max": 0.28, "ratio_clip_c": 3.0},
    {"ratio_clip_c": 1.3, "reference_policy_kl_penalty": 0.5},
    {"disable_ppo_ratio": True, "reference_policy_kl_type": "k1", "reference_policy_kl_penalty": 0.5},
    {"use_cispo": True, "ratio_clip_max": 0.1},
    _SEQUENCES,
    {"use_kl_in_reward": True},
    _CORRECTED,
    *({"truncated_importance_sampling_type": kind} | _BOUNDS for kind in ("tis", "icepop", "seq-mask-tis")),
    *({"truncated_importance_sampling_type": kind} | _BOUNDS | _SEQUENCES for kind in ("tis", "icepop")),
    {"reference_policy_kl_type": "k2", "reference_policy_kl_penalty": 0.5},
]


def _openrlhf(logprobs: Tensor, options: dict[str, Any]) -> Tensor:
    is_gspo = options.get("policy_loss_type") == "gspo"
    token_level = options.get("token_level_loss", True) and not is_gspo
    log_ratio = logprobs - OLD
    ratio = _geometric(log_ratio) if is_gspo else log_ratio.clamp(-20, 20).exp()
    loss = _clipped(ratio, *options.get("eps_clip_low_high", (0.2, 0.2)), options.get("dual_clip"))
    if options.get("enable_vllm_is_correction") and not is_gspo:
        bounds = options.get("vllm_is_truncated_threshold", (0.5, 5.0))
        weights = (OLD - SAMPLING).exp()
        kept = {"tis": weights.clamp(*bounds), "icepop": weights * _inside(weights, *bounds)}
        kept["seq-mask-tis"] = weights * _inside(_geometric(OLD - SAMPLING), *bounds)
        loss = loss * kept[options.get("vllm_is_correction_type", "tis")]
    loss = _mean(loss, token_level)
    if options.get("use_kl_loss"):
        loss = loss + options.get("init_kl_coef", 0.01) * _mean(
            _kl(logprobs, options["kl_estimator"], torch.inf), token_level
        )
    return loss - options.get("entropy_loss_coef", 0.0) * _mean(ENTROPY, token_level)


OPENRLHF = [
    {},
    {"eps_clip_low_high": (0.2, 0.27), "dual_clip": 1.5, "token_level_loss": False},
    {"policy_loss_type": "gspo", "use_kl_loss": True, "kl_estimator": "k2", "entropy_loss_coef": 0.1},
    *({"use_kl_loss": True, "init_kl_coef": 0.5, "kl_estimator": name} for name in ("k1", "k2", "k3")),
    *(
        {"enable_vllm_is_correction": True, "vllm_is_correction_type": kind, "vllm_is_truncated_threshold": (0.7, 1.4)}
        for kind in ("tis", "icepop", "seq-mask-tis")
    ),
]


@pytest.mark.parametrize(
    ("name", "formula", "options"),
    [
        *zip(itertools.repeat("nemo_rl"), itertools.repeat(_nemo_rl), NEMO_RL),
        *zip(itertools.repeat("openrlhf"), itertools.repeat(_openrlhf), OPENRLHF),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_preset_is_the_frameworks_formula(name: str, formula: Any, options: dict[str, Any], backend: str) -> None:
    config = getattr(GRPOLossConfig, name)(**options)
    ours, theirs = (LOGPROBS.clone().requires_grad_() for _ in range(2))
    loss, _ = policy_loss(
        ours, ADVANTAGES, MASK, old_logprobs=OLD, ref_logprobs=REFERENCE, sampling_logprobs=SAMPLING, entropy=ENTROPY,
        config=config, backend=backend,
    )  # fmt: skip
    expected = formula(theirs, options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    gradients = (torch.autograd.grad(x, y)[0] for x, y in ((loss, ours), (expected, theirs)))
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("nemo_rl", {"sequence_level_importance_ratios": True}, "token_level_loss must be False"),
        ("nemo_rl", {"use_cispo": True, "disable_ppo_ratio": True}, "use_cispo"),
        ("nemo_rl", {"use_cispo": True, "ratio_clip_c": 3.0}, "ratio_clip_c must be None"),
        ("nemo_rl", {"truncated_importance_sampling_type": "tis"}, "use_importance_sampling_correction"),
        ("nemo_rl", _CORRECTED | {"truncated_importance_sampling_ratio": 2.0}, "truncated_importance_sampling_type"),
        ("nemo_rl", _CORRECTED | {"truncated_importance_sampling_type": "tis"}, "sampling_ratio must be given"),
        (
            "nemo_rl",
            _CORRECTED | {"truncated_importance_sampling_type": "icepop", "truncated_importance_sampling_ratio": 2.0},
            "ratio_min must be given",
        ),
        (
            "nemo_rl",
            {"truncated_importance_sampling_type": "seq-mask-tis"} | _BOUNDS | _SEQUENCES,
            "token-level ratios",
        ),
        ("nemo_rl", {"ratio_clip_c": 3.0, "disable_ppo_ratio": True}, "ratio_clip_c has no effect"),
        ("nemo_rl", {"truncated_importance_sampling_type": "clip"}, "truncated_importance_sampling_type must be one"),
        ("nemo_rl", {"ratio_clip_c": 1.1}, "ratio_clip_c must be greater than"),
        ("openrlhf", {"dual_clip": 1.0}, "dual_clip must be greater than"),
        ("openrlhf", {"policy_loss_type": "cispo"}, "policy_loss_type must be one of"),
        ("openrlhf", {"vllm_is_correction_type": "mis"}, "vllm_is_correction_type must be one of"),
    ],
)
def test_what_a_framework_does_not_have_is_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        getattr(GRPOLossConfig, name)(**options)


@pytest.mark.parametrize("name", ["nemo_rl", "openrlhf"])
def test_an_option_of_another_framework_is_unknown(name: str) -> None:
    with pytest.raises(TypeError, match="epsilon"):
        getattr(GRPOLossConfig, name)(epsilon=0.2)
