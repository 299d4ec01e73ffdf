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
#: Where terms meet at their limits.
JOINT_TOKENS = (*FEW_TOKENS, (-1.0, -math.inf, -0.5), (-1.0, -101.0, -0.5), (-51.0, -1.0, -1.0), (-101.0, -101.0, -1.0),
                (-101.0, -1.0, -1.5), (-1.0, -51.0, -101.0), (-101.0, -math.inf, -1.0))  # fmt: skip


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
        {"loss_type": "cispo", "epsilon_high": 2.0, "cispo_ratio_low": 0.25},  # no term cancels a penalty of BETA
        lambda r, x, a: r.detach().clamp(0.25, 2.0) * a * x,
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


def _limit(values: dict[int, Any]) -> Any:
    """Of numbers of which the infinite inputs grow: two that differ by their size are infinite, or 0."""
    near, far = values.values()
    if abs(far) > abs(near) * 1.4:
        return mp.sign(far) * mp.inf
    return mpf(0) if abs(far) < abs(near) / 1.4 else far


LEVELS: dict[str, dict[str, Any]] = {
    "token": {},
    "sequence": {"importance_sampling_level": "sequence"},
    "sequence_token": {"importance_sampling_level": "sequence_token"},
    "gmpo": {"loss_type": "gmpo"},
}
Tokens = tuple[Token, ...]


@dataclass(frozen=True)
class Row:
    """A completion's limits: each token's loss, the total and its gradient; and what was added up for them."""

    losses: tuple[Any, ...]
    loss: Any
    gradient: tuple[Any, ...]
    size: Any  # the largest finite number that was added, of the loss or a gradient


@cache
def _logs(
    level: str, advantage: float, tokens: Tokens, which: int, size: int
) -> tuple[list[Number], list[Number], list[Any]]:
    """Log-probabilities and log-ratios as they weigh each token, differentiated by one of the former; references."""

    def number(x: float) -> Any:
        return mpf(x) if math.isfinite(x) else -mpf(size)

    own = [Number(number(token[0]), mpf(n == which)) for n, token in enumerate(tokens)]
    logs = [x - number(token[1]) for x, token in zip(own, tokens, strict=True)]
    bounds = {"high": 0.25} if advantage > 0 else {"low": -0.25}
    averaged = [log.clamp(**bounds) for log in logs] if level == "gmpo" else logs
    if level != "token":
        mean = sum(averaged, Number(mpf(0))) * (mpf(1) / len(tokens))
        logs = [Number(mean.value, log.slope) if level == "sequence_token" else mean for log in logs]
    return own, logs, [number(token[2]) for token in tokens]


@cache
def _policy(name: str, level: str, advantage: float, tokens: Tokens, which: int, size: int) -> list[Number]:
    own, logs, _ = _logs(level, advantage, tokens, which, size)
    if not advantage:
        return [Number(mpf(0))] * len(tokens)
    if level == "gmpo":
        return [-(log.exp() * advantage) for log in logs]
    return [-POLICY[name][1](log.exp(), x, advantage) for x, log in zip(own, logs, strict=True)]


@cache
def _penalty(
    estimator: str, name: str, level: str, advantage: float, tokens: Tokens, which: int, size: int
) -> list[Number]:
    own, logs, refs = _logs(level, advantage if level == "gmpo" else 0.0, tokens, which, size)
    penalty = PENALTIES[name][1]
    return [
        penalty(ESTIMATES[estimator], log.exp(), x, x - ref) * BETA for x, log, ref in zip(own, logs, refs, strict=True)
    ]


@cache
def row(policy: str, estimator: str | None, penalty: str, level: str, advantage: float, tokens: Tokens) -> Row:
    """The limits of a completion: an objective, and a penalty if there is an estimator."""
    sizes = (1000, 2000)

    def terms(which: int, size: int) -> tuple[list[Number], list[Number]]:
        first = _policy(policy, level, advantage, tokens, which, size)
        if estimator is None:
            return first, [Number(mpf(0))] * len(tokens)
        return first, _penalty(estimator, penalty, level, advantage, tokens, which, size)

    at = {(which, size): terms(which, size) for which in range(len(tokens)) for size in sizes}
    scale = mpf(1) / len(tokens) if level == "gmpo" else mpf(1)
    size = mpf(0)
    for which, term, n in itertools.product(range(len(tokens)), range(2), range(len(tokens))):
        for part in ("value", "slope"):
            added = _limit({s: getattr(at[which, s][term][n], part) for s in sizes})
            size = max(size, abs(added)) if abs(added) < mp.inf else size
    return Row(
        tuple(
            _limit({s: scale * (at[0, s][0][n].value + at[0, s][1][n].value) for s in sizes})
            for n in range(len(tokens))
        ),
        _limit({s: scale * sum(x.value for term in at[0, s] for x in term) for s in sizes}),
        tuple(
            _limit({s: scale * sum(x.slope for term in at[n, s] for x in term) for s in sizes})
            for n in range(len(tokens))
        ),
        size,
    )
