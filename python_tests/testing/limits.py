"""The losses' values and gradients where a ratio is past the largest number, or 0: what the tests hold backends to.

1000 digits and no largest number give them; an infinite log-probability is two that grow. A token that the policy, the
old policy or the reference gave no probability at all stands for what is likely only after a long fall.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import mpmath

mp = mpmath.MPContext()  # its precision is nobody else's
mpf = mp.mpf
mp.dps = 1000  # the derivative of k3 is the difference of numbers as large as e^2000
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


LEVELS: dict[str, dict[str, Any]] = {
    "sequence": {"importance_sampling_level": "sequence"},
    "sequence_token": {"importance_sampling_level": "sequence_token"},
    "gmpo": {"loss_type": "gmpo"},
}


@cache
def sequence_row(level: str, advantage: float, is_penalised: bool, token: Token) -> tuple[Any, Any, Any]:
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
