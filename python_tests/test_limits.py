"""Where a ratio is past the largest number, or 0: values and gradients are the limits, on every backend.

The table is what 1000 digits and no largest number give; an infinite log-probability is two that grow. A token that the
policy, the old policy or the reference gave no probability at all stands for what is likely only after a long fall.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from mpmath import mp, mpf
from testing.calls import BACKENDS
from testing.emulated import emulated
from torch import Tensor

from grpo_kernels import GRPOLossConfig, check_device_values, grpo_loss, policy_loss, registry
from grpo_kernels.ops.device_values import first_bad

mp.dps = 1000  # the derivative of k3 is the difference of numbers as large as e^2000
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float64)
EMULATED = pytest.param("cuda", marks=pytest.mark.full)
ALL_BACKENDS = BACKENDS if registry.cuda_architectures() else (*BACKENDS, EMULATED)
Token = tuple[float, float, float]
Row = tuple[Any, Any]
#: Log-probabilities of the policy, the old policy and the reference: log-ratios of 0, 50, 100 and infinity either way.
_FALLS = (-1.0, -51.0, -101.0, -math.inf)
TOKENS: tuple[Token, ...] = tuple(
    token
    for token in itertools.product(_FALLS, _FALLS, (*_FALLS, -1.5, -0.5))
    if token.count(-math.inf) < 2 or token[0] != -math.inf
)
ORDINARY = (-1.0, -1.0, -1.0)
FEW_TOKENS = ((-1.0, -101.0, -1.0), (-101.0, -1.0, -1.0), (-1.0, -math.inf, -1.0), (-math.inf, -1.0, -1.0),
              (-1.0, -1.0, -math.inf), (-1.0, -101.0, -1.5))  # fmt: skip


@dataclass(frozen=True)
class Number:
    """A number and its derivative by the log-probability."""

    value: Any
    slope: Any = 0

    def __add__(self, other: Any) -> Number:
        other = _number(other)
        return Number(self.value + other.value, self.slope + other.slope)

    def __mul__(self, other: Any) -> Number:
        other = _number(other)
        return Number(self.value * other.value, self.slope * other.value + self.value * other.slope)

    def __sub__(self, other: Any) -> Number:
        return self + _number(other) * -1

    def __neg__(self) -> Number:
        return self * -1

    def inverse(self) -> Number:
        return Number(1 / self.value, -self.slope / self.value**2)

    def exp(self) -> Number:
        return Number(mp.exp(self.value), self.slope * mp.exp(self.value))

    def detach(self) -> Number:
        return Number(self.value)

    def clamp(self, low: float = -math.inf, high: float = math.inf) -> Number:
        return Number(max(min(self.value, high), low), self.slope if low <= self.value <= high else 0)


def _number(x: Any) -> Number:
    return x if isinstance(x, Number) else Number(mpf(x))


def _least(x: Number, y: Number) -> Number:
    return x if x.value < y.value else y


_LOW, _HIGH = 0.75, 1.25


def _clip(r: Number, a: float, delta: float = math.inf) -> Number:
    return _least(r.clamp(high=delta) * a, r.clamp(_LOW, _HIGH) * a)


def _sapo(r: Number, a: float) -> Number:
    tau = 1.5 if a > 0 else 0.5
    return (((r - 1) * -tau).exp() + 1).inverse() * (4 / mpf(tau)) * a


#: Objectives to be maximised, by the ratio, the log-probability and the advantage.
POLICY: dict[str, tuple[dict[str, Any], Callable[[Number, Number, float], Number]]] = {
    "clip": ({"epsilon_low": 0.25}, lambda r, x, a: _clip(r, a)),
    "delta": ({"epsilon_low": 0.25, "delta": 3.0}, lambda r, x, a: _clip(r, a, 3.0)),
    "surrogate": ({"loss_type": "surrogate"}, lambda r, x, a: r * a),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 2.0}, lambda r, x, a: r.detach().clamp(high=2.0) * a * x),
    "cispo_low": (
        {"loss_type": "cispo", "epsilon_high": 2.0, "cispo_ratio_low": 0.5},
        lambda r, x, a: r.detach().clamp(0.5, 2.0) * a * x,
    ),
    "sapo": (
        {"loss_type": "sapo", "loss_agg_mode": "token-mean", "sapo_temperature_pos": 1.5, "sapo_temperature_neg": 0.5},
        lambda r, x, a: _sapo(r, a),
    ),
    "reinforce": ({"loss_type": "reinforce"}, lambda r, x, a: x * a),
}
ESTIMATES: dict[str, Callable[[Number], Number]] = {
    "k1": lambda d: d,
    "k2": lambda d: d * d * 0.5,
    "k3": lambda d: (-d).exp() - 1 + d,
    "abs": lambda d: d * int(mp.sign(d.value)),
}
_PLAIN = {"use_bias_correction_kl": False}
#: Options, and what is penalised: by the estimate, the ratio, the log-probability and its distance to the reference's.
PENALTIES: dict[str, tuple[dict[str, Any], Callable[..., Number]]] = {
    "naive": (_PLAIN, lambda k, r, x, d: k(d)),
    "straight_through": (
        _PLAIN | {"kl_gradient": "straight_through"},
        lambda k, r, x, d: Number(k(d).value, ESTIMATES["k2"](d).slope),
    ),
    "importance_weighted": (
        _PLAIN | {"kl_gradient": "importance_weighted"},
        lambda k, r, x, d: k(d) * (x - x.detach()).exp(),
    ),
    "clamped": (_PLAIN | {"kl_clamp": 10.0}, lambda k, r, x, d: k(d).clamp(-10, 10)),
    "corrected": ({}, lambda k, r, x, d: r * k(d)),
    "corrected_clamped": ({"kl_clamp": 10.0}, lambda k, r, x, d: r * k(d).clamp(-10, 10)),
    "corrected_log_ratio_clamped": (
        {"log_ratio_clamp": 20.0},
        lambda k, r, x, d: (_log(r).clamp(-20, 20)).exp() * k(d.clamp(-20, 20)),
    ),
}
BETA = 0.5  # a binary fraction, as every number of the table


def _log(r: Number) -> Number:
    return Number(mp.log(r.value), r.slope / r.value)


def _limit(function: Callable[[Callable[[float], Any]], Any]) -> Any:
    """Of a function of numbers of which the infinite ones grow: two that differ by their size are infinite, or 0."""
    near, far = (function(lambda x, s=size: mpf(x) if math.isfinite(x) else -mpf(s)) for size in (1000, 2000))
    if abs(far) > abs(near) * 1.4:
        return mp.sign(far) * mp.inf
    return mpf(0) if abs(far) < abs(near) / 1.4 else far


def _row(loss: Callable[[Number, Any, Any], Number], token: Token) -> Row:
    def at(number: Callable[[float], Any]) -> Number:
        return loss(Number(number(token[0]), mpf(1)), number(token[1]), number(token[2]))

    return _limit(lambda number: at(number).value), _limit(lambda number: at(number).slope)


@cache
def policy_row(name: str, advantage: float, token: Token) -> Row:
    """Loss and gradient of one token."""
    return _row(lambda x, old, ref: -POLICY[name][1]((x - old).exp(), x, advantage), token)


@cache
def penalty_row(estimator: str, name: str, token: Token) -> Row:
    """The penalty of one token, and its gradient."""
    estimate, penalty = ESTIMATES[estimator], PENALTIES[name][1]
    return _row(lambda x, old, ref: penalty(estimate, (x - old).exp(), x, x - ref) * BETA, token)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("name", POLICY)
def test_the_policy_term_at_its_limits(name: str, advantage: float, backend: str, dtype: torch.dtype) -> None:
    _check(backend, dtype, advantage, POLICY[name][0], lambda token: policy_row(name, advantage, token))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("estimator", ESTIMATES)
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


LEVELS: dict[str, dict[str, Any]] = {
    "sequence": {"importance_sampling_level": "sequence"},
    "sequence_token": {"importance_sampling_level": "sequence_token"},
    "gmpo": {"loss_type": "gmpo"},
}


@cache
def _sequence_row(level: str, advantage: float, is_penalised: bool, token: Token) -> tuple[Any, Any, Any]:
    """The loss of a completion of a token and an ordinary one, and the gradient of each."""

    def at(number: Callable[[float], Any], which: int) -> Number:
        points = [[number(x) for x in row] for row in (token, ORDINARY)]
        own = [Number(row[0], mpf(n == which)) for n, row in enumerate(points)]
        logs = [x - row[1] for x, row in zip(own, points, strict=True)]
        bounds = {"high": 0.25} if advantage > 0 else {"low": -0.25}
        averaged = [log.clamp(**bounds) for log in logs] if level == "gmpo" else logs
        mean = (averaged[0] + averaged[1]) * 0.5
        total = Number(mpf(0))
        for x, log, row in zip(own, logs, points, strict=True):
            r = (Number(mean.value, log.slope) if level == "sequence_token" else mean).exp()
            total += -(r * advantage if level == "gmpo" else _clip(r, advantage)) if advantage else 0
            total += r * ESTIMATES["k3"](x - row[2]) * BETA if is_penalised else 0
        return total * (0.5 if level == "gmpo" else 1)

    return (
        _limit(lambda number: at(number, 0).value),
        *(_limit(lambda number, n=n: at(number, n).slope) for n in range(2)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize(("advantage", "beta"), [(1.0, 0.0), (-1.0, 0.0), (0.0, BETA)])
@pytest.mark.parametrize("level", LEVELS)
def test_a_sequence_at_its_limits(
    level: str, advantage: float, beta: float, backend: str, dtype: torch.dtype, kept: Tensor
) -> None:
    options = LEVELS[level] | {"epsilon_low": 0.25, "beta": beta}
    for token in TOKENS if backend in ("torch", "cpu") else FEW_TOKENS:
        value, *slopes = _sequence_row(level, advantage, beta != 0, token)
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
