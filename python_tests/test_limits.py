"""Where a ratio is past the largest number, or 0: values and gradients are the limits, on every backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from testing.calls import BACKENDS
from testing.emulated import emulated
from testing.limits import (
    BETA,
    ESTIMATES,
    FEW_TOKENS,
    LEVELS,
    ORDINARY,
    PENALTIES,
    POLICY,
    TOKENS,
    Row,
    Token,
    mpf,
    penalty_row,
    policy_row,
    sequence_row,
)
from torch import Tensor

from grpo_kernels import GRPOLossConfig, check_device_values, grpo_loss, policy_loss, registry
from grpo_kernels.ops.device_values import first_bad

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float64)
EMULATED = pytest.param("cuda", marks=pytest.mark.full)
ALL_BACKENDS = BACKENDS if registry.cuda_architectures() else (*BACKENDS, EMULATED)


def _near(got: float, expected: Any, dtype: torch.dtype, what: Any) -> None:
    """Within the rounding of an exponential whose argument is rounded; past the largest number, infinite."""
    finfo = torch.finfo(dtype)
    if abs(expected) > finfo.max:
        assert got == math.copysign(math.inf, expected), (what, got, expected)
    elif expected == 0:
        assert got == 0, (what, got)
    else:
        tolerance = 4 * finfo.eps * (1 + 101 + 1) * abs(expected) + finfo.tiny
        assert abs(mpf(got) - expected) <= tolerance, (what, got, float(expected))


@pytest.fixture(autouse=True)
def kept() -> Iterator[Tensor]:
    """What kernels kept of bad values: nothing before, and nothing after."""
    values = first_bad(CPU)
    none = values.clone()
    yield values
    values.copy_(none)


def _on(backend: str) -> AbstractContextManager[None]:
    return emulated() if backend == "cuda" and not registry.cuda_architectures() else nullcontext()


def _loss(
    backend: str, dtype: torch.dtype, advantage: float, tokens: Sequence[Token], options: dict[str, Any]
) -> tuple[float, list[float]]:
    """The loss of one completion of these tokens, a sum over them, and the gradient of each."""
    leaf, old, ref = (torch.tensor([column], dtype=dtype) for column in zip(*tokens, strict=True))
    leaf.requires_grad_()
    config = GRPOLossConfig(**options)
    with _on(backend):
        loss, _ = policy_loss(
            leaf, torch.tensor([advantage], dtype=dtype), torch.ones(1, len(tokens)), old_logprobs=old,
            ref_logprobs=ref if config.beta else None, num_items_in_batch=1, config=config, backend=backend,
        )  # fmt: skip
        loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad[0].tolist()


def _check(
    backend: str, dtype: torch.dtype, advantage: float, options: dict[str, Any], row: Callable[[Token], Row]
) -> None:
    """Every gradient in one call, and each loss in one of its own: all on a CPU, some where a call is slow."""
    _, gradients = _loss(backend, dtype, advantage, TOKENS, options)
    for token, gradient in zip(TOKENS, gradients, strict=True):
        _near(gradient, row(token)[1], dtype, (token, "gradient"))
    kept = first_bad(CPU)
    for token in TOKENS if backend in ("torch", "cpu") else FEW_TOKENS:
        kept.fill_(2**63 - 1)
        loss, _ = _loss(backend, dtype, advantage, [ORDINARY, token], options)
        _near(loss, row(token)[0] + row(ORDINARY)[0], dtype, (token, "loss"))
        # what is written down by hand keeps an infinite gradient of a finite loss too; the reference has no such
        unbounded = any(abs(x) > torch.finfo(dtype).max for x in row(token)[: 1 if backend == "torch" else 2])
        assert (kept[3] == 1) == unbounded, (token, "flag")


def _sometimes(names: Iterable[str], always: Container[str]) -> list[Any]:
    """Parameters of which some run with every change."""
    return [pytest.param(name, marks=() if name in always else pytest.mark.full) for name in names]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("name", _sometimes(POLICY, ("clip", "delta")))
def test_the_policy_term_at_its_limits(name: str, advantage: float, backend: str, dtype: torch.dtype) -> None:
    _check(backend, dtype, advantage, POLICY[name][0], lambda token: policy_row(name, advantage, token))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("penalty", _sometimes(PENALTIES, ("naive", "corrected")))
@pytest.mark.parametrize("estimator", _sometimes(ESTIMATES, ("k3",)))
def test_the_penalty_at_its_limits(estimator: str, penalty: str, backend: str, dtype: torch.dtype) -> None:
    options = {"beta": BETA, "kl_estimator": estimator, **PENALTIES[penalty][0]}
    _check(backend, dtype, 0.0, options, lambda token: penalty_row(estimator, penalty, token))


#: Loss and gradient where the ratio is infinite and where it is 0, worked by hand: an anchor of the table.
BY_HAND: dict[tuple[str, float], tuple[Row, Row]] = {
    ("clip", 1.0): ((-1.25, 0), (0, 0)),
    ("clip", -1.0): ((math.inf, math.inf), (0.75, 0)),
    ("delta", 1.0): ((-1.25, 0), (0, 0)),
    ("delta", -1.0): ((3, 0), (0.75, 0)),
    ("surrogate", 1.0): ((-math.inf, -math.inf), (0, 0)),
    ("surrogate", -1.0): ((math.inf, math.inf), (0, 0)),
    ("cispo", 1.0): ((2, -2), (0, 0)),
    ("cispo", -1.0): ((-2, 2), (0, 0)),
    ("sapo", 1.0): ((-4 / 1.5, 0), (-4 / 1.5 / (1 + math.exp(1.5)), 0)),
    ("sapo", -1.0): ((8, 0), (8 / (1 + math.exp(0.5)), 0)),
}


@pytest.mark.parametrize(("name", "advantage"), BY_HAND)
def test_the_table_by_hand(name: str, advantage: float) -> None:
    infinite, zero = (-1.0, -math.inf, -1.0), (-math.inf, -1.0, -1.0)
    for token, expected in zip((infinite, zero), BY_HAND[name, advantage], strict=True):
        got = policy_row(name, advantage, token)
        assert [float(x) for x in got] == pytest.approx(expected, rel=1e-15)


def test_the_table_of_the_penalty_by_hand() -> None:
    """``r k3`` tends to the reference over the old policy where the policy's probability tends to 0."""
    rows = {
        ("k3", "corrected", (-1.0, -math.inf, -1.0)): (0, 0),
        ("k3", "corrected", (-1.0, -math.inf, -1.5)): (math.inf, math.inf),
        ("k3", "corrected", (-math.inf, -1.0, -1.0)): (0.5, 0),
        ("k3", "corrected", (-math.inf, -1.0, -1.5)): (0.5 * math.exp(-0.5), 0),
        ("k2", "corrected", (-math.inf, -1.0, -1.0)): (0, 0),
        ("k3", "naive", (-math.inf, -1.0, -1.0)): (math.inf, -math.inf),
        ("k3", "naive", (-1.0, -1.0, -math.inf)): (math.inf, 0.5),
        ("k1", "corrected", (-1.0, -math.inf, -1.0)): (0, math.inf),
        ("abs", "corrected", (-1.0, -math.inf, -1.0)): (0, 0),
    }
    for key, expected in rows.items():
        assert [float(x) for x in penalty_row(*key)] == pytest.approx(expected, rel=1e-15), key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize(("advantage", "beta"), [(1.0, 0.0), (-1.0, 0.0), (0.0, BETA)])
@pytest.mark.parametrize("level", _sometimes(LEVELS, ("sequence",)))
def test_a_sequence_at_its_limits(
    level: str, advantage: float, beta: float, backend: str, dtype: torch.dtype, kept: Tensor
) -> None:
    options = LEVELS[level] | {"epsilon_low": 0.25, "beta": beta}
    for token in TOKENS if backend in ("torch", "cpu") else FEW_TOKENS:
        value, *slopes = sequence_row(level, advantage, beta != 0, token)
        kept.fill_(2**63 - 1)
        loss, gradients = _loss(backend, dtype, advantage, [token, ORDINARY], options)
        _near(loss, value, dtype, (token, "loss"))
        is_infinite = math.isinf(loss)
        assert (kept[3] < 2) == is_infinite, (token, "flag")
        for gradient, slope in zip(gradients, slopes, strict=True):
            if not is_infinite:  # else a token's own part and its share of the mean's may be of two signs
                _near(gradient, slope, dtype, (token, "gradient"))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_infinite_rollout_weights_leave_what_is_clipped(backend: str) -> None:
    """A token whose gradient is 0 has none under any weight, and one whose objective is 0 no loss."""
    leaf = torch.tensor([[-1.0, -math.inf, -1.0]], requires_grad=True)
    old = torch.tensor([[-3.0, -1.0, -1.0]])
    config = GRPOLossConfig(rollout_correction="token_truncate", rollout_clip_min=0.5)
    sampling = torch.tensor([[-103.0, -101.0, -1.0]])
    with _on(backend):
        loss, _ = policy_loss(
            leaf, torch.ones(1), torch.ones(1, 3), old_logprobs=old, sampling_logprobs=sampling, config=config,
            backend=backend,
        )  # fmt: skip
        loss.backward()
    assert leaf.grad is not None and loss.item() == -math.inf
    assert leaf.grad[0, :2].tolist() == [0, 0] and leaf.grad[0, 2] == pytest.approx(-1 / 3)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_an_infinite_divergence_without_a_weight_counts_nothing(backend: str) -> None:
    """Of KL-Cov, which penalises the tokens of the highest covariance alone."""
    leaf = torch.tensor([[-1.0, -2.0, -0.5, -1.5]], requires_grad=True)
    old = torch.tensor([[-1.0, -2.0, -math.inf, -1.5]])
    advantages = torch.tensor([[2.0, 1.0, 0.0, 1.0]])
    with _on(backend):
        config = GRPOLossConfig(loss_type="kl_cov", kl_cov_ratio=0.25)
        loss, _ = policy_loss(leaf, advantages, torch.ones(1, 4), old_logprobs=old, config=config, backend=backend)
        loss.backward()
    assert leaf.grad is not None and loss.isfinite() and leaf.grad.isfinite().all() and leaf.grad[0, 2] == 0


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("options", [{}, {"beta": BETA}, {"loss_type": "cispo"}, {"loss_type": "sapo"}], ids=str)
def test_a_number_that_is_none_stays_one(options: dict[str, Any], backend: str) -> None:
    for place in range(3 if "beta" in options else 2):
        token = tuple(math.nan if n == place else -1.0 for n in range(3))
        assert math.isnan(_loss(backend, torch.float32, 1.0, [ORDINARY, token], options)[0]), token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_losses_over_logits_have_finite_gradients_at_the_limits(backend: str, dtype: torch.dtype) -> None:
    """By a token that the policy has all but lost, one that it has found, and one that it has always had."""
    logits = torch.zeros(1, 3, 8, dtype=dtype)
    logits[0, 0, 3] = -120
    ids = torch.tensor([[3, 3, 3]])
    old = torch.tensor([[-2.0, -130.0, -2.0]])
    config = GRPOLossConfig(beta=BETA)
    reference = logits.float().log_softmax(-1)[..., 3].detach()
    reference[0, 0] = -2.0
    results = []
    for name in ("torch", backend):
        leaf = logits.clone().requires_grad_()
        with _on(name):
            out = grpo_loss(leaf, ids, torch.ones(1), torch.ones(1, 3), old_logprobs=old, ref_logprobs=reference,
                            config=config, backend=name)  # fmt: skip
            out.loss.backward()
        results.append((out.loss.item(), leaf.grad))
    (expected, expected_gradient), (loss, gradient) = results
    ratio = math.exp(2 - math.log(8))
    k3_lost = 1.0  # the ratio times exp(-d), both at their limits
    assert loss == pytest.approx((-1.2 - ratio + BETA * k3_lost) / 3, rel=1e-5)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert gradient[0, 0].abs().max() < 1e-30 and not gradient[0, 1].any() and gradient[0, 2].any()
    rtol = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(gradient, expected_gradient, rtol=rtol, atol=1e-30)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_an_unbounded_objective_is_told(backend: str) -> None:
    loss, _ = _loss(backend, torch.float32, -1.0, [ORDINARY, ORDINARY, (-1.0, -101.0, -1.0)], {})
    assert loss == math.inf
    with pytest.raises(ValueError, match="an unmasked token whose loss or gradient is infinite, at 2"):
        check_device_values(CPU)
    check_device_values(CPU)
    leaf = torch.full((1, 2), -1.0, requires_grad=True)
    _loss(backend, torch.float32, -1.0, [ORDINARY, (-1.0, -101.0, -1.0)], {})
    with pytest.raises(ValueError, match=r"infinite, at 1"):
        policy_loss(leaf, torch.ones(1), torch.ones(1, 2), debug=True, backend="torch")


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_what_is_masked_is_not_told(backend: str, kept: Tensor) -> None:
    leaf = torch.full((1, 2), -1.0, requires_grad=True)
    old = torch.tensor([[-1.0, -math.inf]])
    with _on(backend):
        loss, _ = policy_loss(leaf, -torch.ones(1), torch.tensor([[1, 0]]), old_logprobs=old, backend=backend)
    assert loss.isfinite() and kept[3] == 2**63 - 1
