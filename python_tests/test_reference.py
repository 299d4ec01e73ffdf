"""The reference stands on its own: finite differences in fp64, and numbers worked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from testing.calls import BACKENDS, SOURCES, call, cases_of, leaves
from testing.cases import Case
from testing.inputs import Inputs, build
from torch import Tensor

from grpo_kernels import (
    GRPOLossConfig,
    group_advantages,
    grpo_loss,
    linear_token_logprobs,
    policy_loss,
    token_logprobs,
)
from grpo_kernels.loss.options import Level

#: Of the losses from logits and from hidden states, which are the others one after another.
COMPOSED = ("plain", "next_token_layout_sequence", "mask_holes_sequence", "all_masked", "transform_all",
            "bias_sequence", "rewards", "rollout_sequence", "grad_output_sequence", "packed_sequence",
            "top_entropy-bonus", "exact_js", "exact-sequence")  # fmt: skip


def _is_smooth(case: Case) -> bool:
    """Not on a bound, where there is no derivative; nor of what is detached, which moves with the step; nor on-policy,
    where the ratio is 1 wherever one steps; nor of NaN; nor where the step is too coarse, with large logits."""
    config = case.config
    if not case.old or case.on_bound or case.dirty or case.vocab > 100 or case.logits in ("offset", "holes"):
        return False
    if config.loss_type in ("cispo", "vespo", "clip_cov", "kl_cov") or config.level == Level.SEQUENCE_TOKEN:
        return False
    return config.kl_gradient == "naive"


def _differentiated(op: str) -> list[Case]:
    is_composed = op in ("grpo_loss", "linear_grpo_loss")
    return [case for case in cases_of(op) if _is_smooth(case) and (case.name in COMPOSED or not is_composed)]


assert set(COMPOSED) == {case.name for op in ("grpo_loss", "linear_grpo_loss") for case in _differentiated(op)}


def _differentiable(op: str, inputs: Inputs, backend: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    leaf = leaves(op, inputs)

    def function(*tensors: Tensor) -> Tensor:
        result = call(op, inputs, dict(zip(leaf, tensors, strict=True)), backend)
        if "loss" in result._fields:
            return result.loss
        value = (result.logprobs * inputs.dlogprobs + result.entropy * inputs.dentropy).sum()
        if "divergence" in result._fields:
            value = value + (result.divergence * inputs.ddivergence).sum()
        return value

    return function, list(leaf.values())


@pytest.mark.parametrize(("op", "case"), [(op, case) for op in SOURCES for case in _differentiated(op)], ids=str)
def test_gradcheck(op: str, case: Case) -> None:
    function, tensors = _differentiable(op, build(case, torch.float64, SOURCES[op]), "torch")
    torch.autograd.gradcheck(function, tensors, fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("far", [0.0, 800.0])
@pytest.mark.parametrize(
    "config",
    [
        GRPOLossConfig(beta=0.5),
        GRPOLossConfig(beta=0.5, importance_sampling_level="sequence"),
        GRPOLossConfig(beta=0.5, use_bias_correction_kl=False, kl_gradient="importance_weighted"),
        GRPOLossConfig(beta=0.5, loss_type="cispo", epsilon_high=2.0),
    ],
    ids=["corrected", "sequence", "weighted", "cispo"],
)
def test_the_policy_loss_under_transforms(config: GRPOLossConfig, far: float) -> None:
    """torch.func's transforms, derivatives of derivatives and tracing, near the limits and at them."""
    logprobs = torch.tensor([[-1.0, -2.0, -0.7]], dtype=torch.float64)
    apart = torch.tensor([[0.1, -0.05, far]], dtype=torch.float64)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return policy_loss(
            x, torch.ones(1).double(), torch.ones(1, 3), old_logprobs=logprobs - apart, ref_logprobs=logprobs - 0.1,
            config=config, backend="torch",
        ).loss  # fmt: skip

    leaf = logprobs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    tangent = torch.tensor([[0.3, 0.2, -0.1]], dtype=torch.float64)
    (second,) = torch.autograd.grad((gradient * tangent).sum(), leaf)
    of_func = torch.func.grad(loss)
    near = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14)
    near(of_func(logprobs), gradient)
    near(torch.func.vmap(of_func)(torch.stack([logprobs, logprobs]))[1], gradient)
    near(torch.func.jvp(loss, (logprobs,), (tangent,))[1], (gradient * tangent).sum())
    near(torch.func.jvp(of_func, (logprobs,), (tangent,))[1], second)
    near(torch.compile(loss, backend="eager", fullgraph=True)(leaf), loss(leaf))


def test_the_second_derivative_of_a_weighted_estimate() -> None:
    """``exp(l - sg[l]) k``, twice: ``k + 2 k' + k''``; with k2 and ``d = 0.2``, ``0.02 + 0.4 + 1``."""
    leaf = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    config = GRPOLossConfig(
        beta=1.0, kl_estimator="k2", kl_gradient="importance_weighted", use_bias_correction_kl=False
    )
    loss, _ = policy_loss(
        leaf, torch.zeros(1), torch.ones(1, 1), ref_logprobs=leaf.detach() - 0.2, config=config, backend="torch"
    )
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), leaf)
    assert second.item() == pytest.approx(1.42, rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_logprobs_of_two_logits(backend: str) -> None:
    # softmax(0, ln 3) = (1/4, 3/4)
    logits = torch.tensor([[[0.0, math.log(3.0)]]], requires_grad=True)
    outputs = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    out = token_logprobs(logits, torch.tensor([[1]]), outputs=outputs, backend=backend)
    assert out.logprobs.item() == pytest.approx(math.log(0.75))
    assert out.entropy.item() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    assert out.log_sum_sq_probs.item() == pytest.approx(math.log(0.0625 + 0.5625))
    assert out.mean_logits.item() == pytest.approx(math.log(3.0) / 2)
    assert out.is_top1.item() is True
    (gradient,) = torch.autograd.grad(out.logprobs.sum(), logits, retain_graph=True)
    assert gradient.flatten().tolist() == pytest.approx([-0.25, 0.25])
    # -p (log p + H): the entropy falls as the larger logit grows
    (gradient,) = torch.autograd.grad(out.entropy.sum(), logits)
    assert gradient.flatten().tolist() == pytest.approx([0.1875 * math.log(3.0), -0.1875 * math.log(3.0)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_transform_scales_caps_and_then_cools(backend: str) -> None:
    # 2 tanh(0.5 z / 2) / 0.25 at z = (0, 4): (0, 8 tanh 1)
    logits, larger = torch.tensor([[[0.0, 4.0]]]), 8 * math.tanh(1)
    out = token_logprobs(
        logits, torch.tensor([[0]]), temperature=0.25, softcap=2.0, logit_scale=0.5, outputs=("entropy", "mean_logits"),
        backend=backend,
    )  # fmt: skip
    log_sum = math.log1p(math.exp(larger))
    assert out.mean_logits.item() == pytest.approx(larger / 2)
    assert out.logprobs.item() == pytest.approx(-log_sum)
    assert out.entropy.item() == pytest.approx(log_sum - larger / (1 + math.exp(-larger)), rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_logprobs_of_a_unit_vector(backend: str) -> None:
    # h = (1, 0) picks the head's first column, (0, ln 3), and the bias moves it to (ln 3, ln 3)
    head = torch.tensor([[0.0, 5.0], [math.log(3.0), 7.0]])
    hidden, ids = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[0]])
    assert linear_token_logprobs(hidden, head, ids, backend=backend).logprobs.item() == pytest.approx(math.log(0.25))
    bias = torch.tensor([math.log(3.0), 0.0])
    out = linear_token_logprobs(hidden, head, ids, bias=bias, backend=backend)
    assert out.logprobs.item() == pytest.approx(math.log(0.5))


# Two completions of two and one tokens, ratios 1.5, 0.5 and 0.5, advantages 1 and -1, clip range 0.8 to 1.2.
LOGPROBS = torch.tensor([[math.log(0.3), math.log(0.2)], [math.log(0.4), -7.0]], dtype=torch.float64)
OLD = torch.tensor([[math.log(0.2), math.log(0.4)], [math.log(0.8), -1.0]], dtype=torch.float64)
MASK = torch.tensor([[1, 1], [1, 0]])
ADVANTAGES = torch.tensor([1.0, -1.0], dtype=torch.float64)
# clipped to 1.2; 0.5 as min(0.5, 0.8); and -0.8 as min(-0.5, -0.8): dropping further earns nothing
SURROGATE = [1.2, 0.5, -0.8]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("config", "loss"),
    [
        (GRPOLossConfig(loss_type="dapo"), -(1.2 + 0.5 - 0.8) / 3),
        (GRPOLossConfig(loss_type="bnpo"), -(1.2 + 0.5 - 0.8) / 3),
        (GRPOLossConfig(loss_type="grpo"), -((1.2 + 0.5) / 2 - 0.8) / 2),
        (GRPOLossConfig(loss_type="dr_grpo", max_completion_length=10), -(1.2 + 0.5 - 0.8) / 20),
        (GRPOLossConfig(epsilon_high=0.4), -(1.4 + 0.5 - 0.8) / 3),
        (GRPOLossConfig(epsilon_high=0.6), -(1.5 + 0.5 - 0.8) / 3),
        (GRPOLossConfig(epsilon_low=0.6, epsilon_high=0.2), -(1.2 + 0.5 - 0.5) / 3),
        (GRPOLossConfig(delta=1.1), -(1.1 + 0.5 - 0.8) / 3),
    ],
)
def test_clipped_loss_by_hand(config: GRPOLossConfig, loss: float, backend: str) -> None:
    out = policy_loss(LOGPROBS, ADVANTAGES, MASK, old_logprobs=OLD, config=config, backend=backend)
    assert out.loss.item() == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipped_gradient_and_metrics_by_hand(backend: str) -> None:
    leaf = LOGPROBS.clone().requires_grad_()
    loss, metrics = policy_loss(leaf, ADVANTAGES, MASK, old_logprobs=OLD, backend=backend)
    loss.backward()
    # only the second token is not clipped: -rho A / 3
    torch.testing.assert_close(leaf.grad, torch.tensor([[0.0, -0.5 / 3], [0.0, 0.0]], dtype=torch.float64))
    values = {name: value.item() for name, value in metrics.items()}
    assert values == pytest.approx(
        {
            "clip_ratio/low_mean": 1 / 3,
            "clip_ratio/low_min": 0.0,
            "clip_ratio/high_mean": 1 / 3,
            "clip_ratio/high_max": 0.5,
            "clip_ratio/region_mean": 2 / 3,
        }
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_completion_has_no_share_of_clipped_tokens(backend: str) -> None:
    mask = torch.tensor([[0, 0], [1, 0]])
    metrics = policy_loss(LOGPROBS, ADVANTAGES, mask, old_logprobs=OLD, backend=backend).metrics
    assert metrics["clip_ratio/low_min"].item() == 1  # of the one completion that has a token


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequence_ratio_is_the_geometric_mean(backend: str) -> None:
    leaf = LOGPROBS.clone().requires_grad_()
    config = GRPOLossConfig(loss_type="grpo", importance_sampling_level="sequence", epsilon_low=0.6)
    loss, _ = policy_loss(leaf, ADVANTAGES, MASK, old_logprobs=OLD, config=config, backend=backend)
    ratio = math.sqrt(1.5 * 0.5)
    assert loss.item() == pytest.approx(-(ratio - 0.5) / 2, rel=1e-12)
    loss.backward()
    gradient = [[-ratio / 4, -ratio / 4], [0.25, 0.0]]  # each token carries its share of the sequence's
    torch.testing.assert_close(leaf.grad, torch.tensor(gradient, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("corrected", "factor"), [(False, 1.0), (True, 1.5)])
def test_kl_by_hand(corrected: bool, factor: float, backend: str) -> None:
    # one token of ratio 1.5 and advantage 0; the reference is half as likely: k3 = 1/2 + ln 2 - 1
    logprobs = torch.tensor([[math.log(0.3)]], dtype=torch.float64, requires_grad=True)
    config = GRPOLossConfig(beta=0.1, use_bias_correction_kl=corrected)
    loss, metrics = policy_loss(
        logprobs, torch.tensor([0.0]), torch.tensor([[True]]),
        old_logprobs=torch.tensor([[math.log(0.2)]]).double(), ref_logprobs=logprobs.detach() - math.log(2),
        config=config, backend=backend,
    )  # fmt: skip
    k3 = 0.5 + math.log(2) - 1
    assert metrics["kl"].item() == pytest.approx(factor * k3, rel=1e-6)
    assert loss.item() == pytest.approx(0.1 * factor * k3, rel=1e-6)
    loss.backward()
    # d k3 = 1 - 1/2; corrected, the ratio grows too
    expected = 0.1 * (factor * 0.5 + (factor * k3 if corrected else 0))
    assert logprobs.grad.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy_bonus_is_the_mean_over_tokens(backend: str) -> None:
    entropy = torch.tensor([[1.0, 2.0], [6.0, 100.0]], requires_grad=True)
    config = GRPOLossConfig(loss_type="grpo", entropy_coef=0.5)
    zero = torch.zeros(2)
    loss, metrics = policy_loss(torch.zeros(2, 2), zero, MASK, entropy=entropy, config=config, backend=backend)
    assert (loss.item(), metrics["entropy"].item()) == pytest.approx((-1.5, 3.0))
    loss.backward()
    assert entropy.grad.tolist() == [pytest.approx([-1 / 6, -1 / 6]), pytest.approx([-1 / 6, 0])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_grpo_loss_by_hand(backend: str) -> None:
    # on-policy, uniform over 4, advantage 2: dL/dlogits = -2 (onehot - 1/4)
    logits = torch.zeros(1, 1, 4, requires_grad=True)
    out = grpo_loss(logits, torch.tensor([[2]]), torch.tensor([2.0]), torch.ones(1, 1), backend=backend)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-2)
    assert out.logprobs.item() == pytest.approx(-math.log(4))
    assert out.entropy.item() == pytest.approx(math.log(4))
    assert logits.grad.flatten().tolist() == pytest.approx([0.5, 0.5, -1.5, 0.5])


@pytest.mark.parametrize("backend", BACKENDS)
def test_group_advantages_by_hand(backend: str) -> None:
    # group means 2 and 5; the unbiased deviation of (1, 3) is sqrt 2
    rewards = torch.tensor([1.0, 3.0, 5.0, 5.0], dtype=torch.float64)
    side = 1 / (math.sqrt(2) + 1e-4)
    assert group_advantages(rewards, 2, backend=backend).tolist() == pytest.approx([-side, side, 0, 0], rel=1e-12)
    batch = 1 / (rewards.std().item() + 0.5)
    got = group_advantages(rewards, 2, scale_rewards="batch", eps=0.5, backend=backend).tolist()
    assert got == pytest.approx([-batch, batch, 0, 0], rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_rewards_give_exactly_no_advantage(backend: str) -> None:
    for dtype in (torch.float32, torch.float64):
        for size in range(2, 20):  # most of these means are not 0.1 once rounded
            rewards = torch.full((size,), 0.1, dtype=dtype)
            for scale_rewards in ("group", "batch", "none"):
                assert not group_advantages(rewards, size, scale_rewards=scale_rewards, backend=backend).any()
