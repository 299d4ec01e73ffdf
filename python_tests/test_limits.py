"""Where a ratio is past the largest number, or 0: values and gradients are the limits, on every backend."""

from __future__ import annotations

import itertools
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
    JOINT_TOKENS,
    LEVELS,
    ORDINARY,
    PENALTIES,
    POLICY,
    TOKENS,
    Row,
    Token,
    Tokens,
    mp,
    mpf,
    row,
)
from torch import Tensor

from grpo_kernels import GRPOLossConfig, backends, check_device_values, grpo_loss, policy_loss
from grpo_kernels.device_values import first_bad

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float64)
EMULATED = pytest.param("cuda", marks=pytest.mark.full)
ALL_BACKENDS = BACKENDS if backends.cuda_architectures() else (*BACKENDS, EMULATED)


def _near(got: float, expected: Any, size: Any, dtype: torch.dtype, what: Any) -> None:
    """Within the rounding of exponentials whose arguments are rounded, as large as what is added."""
    finfo = torch.finfo(dtype)
    tolerance = 4 * finfo.eps * (1 + 101 + 1) * max(abs(expected), size) + finfo.tiny
    assert math.isfinite(got) and abs(mpf(got) - expected) <= tolerance, (what, got, float(expected))


@pytest.fixture(autouse=True)
def kept() -> Iterator[Tensor]:
    """What kernels kept of bad values: nothing before, and nothing after."""
    values = first_bad(CPU)
    none = values.clone()
    yield values
    values.copy_(none)


def _on(backend: str) -> AbstractContextManager[None]:
    return emulated() if backend == "cuda" and not backends.cuda_architectures() else nullcontext()


def _loss(
    backend: str, dtype: torch.dtype, advantage: float, tokens: Tokens, options: dict[str, Any]
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
    backend: str, dtype: torch.dtype, advantage: float, tokens: Tokens, options: dict[str, Any], at: Row
) -> None:
    """A completion's loss, gradients and flag against the table."""
    most = torch.finfo(dtype).max
    kept = first_bad(CPU)
    kept.fill_(2**63 - 1)
    loss, gradients = _loss(backend, dtype, advantage, tokens, options)
    what = (tokens, options, loss, gradients)
    infinite = [n for n, x in enumerate(at.losses) if abs(x) > most]
    signs = {at.losses[n] > 0 for n in infinite}
    assert all(map(math.isfinite, gradients)), what
    if not infinite:
        _near(loss, at.loss, at.size, dtype, what)
        for got, expected in zip(gradients, at.gradient, strict=True):
            if expected == 0 and len(tokens) == 1:
                assert got == 0, what
            if abs(expected) <= most:
                _near(got, expected, at.size, dtype, what)
            else:  # k1 of no distance, or clamped with k2's gradient: a large number, though the loss is finite
                assert got * mp.sign(expected) > 1e14, what
        assert kept[3] == 2**63 - 1, what
        return
    assert math.isinf(loss) or len(signs) == 2, what  # infinite with opposite signs: no limit
    assert kept[3] == infinite[0], what
    if len(signs) == 1:
        assert (loss > 0) == signs.pop(), what
    is_far_k3 = options.get("kl_estimator") == "k3" and tokens[0][0] < tokens[0][2] - 40
    if len(tokens) == 1 and not is_far_k3:  # whose own derivative is the difference of two of the largest numbers
        assert gradients[0] * mp.sign(at.gradient[0]) >= 0 or abs(at.gradient[0]) <= most, what


def _completions(tokens: Iterable[Token], level: str) -> Iterator[Tokens]:
    """Of one token and, where they share a ratio, of two."""
    for token in tokens:
        yield (token,)
        if level != "token":
            yield (token, ORDINARY)


def _options(policy: str, estimator: str | None, penalty: str, level: str) -> dict[str, Any]:
    """Of a config."""
    options = POLICY[policy][0] | LEVELS[level]
    if estimator is not None:
        options |= {"beta": BETA, "kl_estimator": estimator, **PENALTIES[penalty][0]}
    return options


def _is_allowed(policy: str, estimator: str | None, penalty: str, level: str) -> bool:
    """Whether a config takes these options together; a loss type is one of a policy term's and GMPO's."""
    if level == "gmpo" and policy != "clip":
        return False
    try:
        GRPOLossConfig(**_options(policy, estimator, penalty, level))
    except ValueError:
        return False
    return True


def _some_quick(rows: Iterable[tuple[Any, ...]], is_quick: Callable[..., bool]) -> list[Any]:
    """Parameters of which some run with every change."""
    return [pytest.param(*row, marks=() if is_quick(*row) else pytest.mark.full) for row in rows]


def _sometimes(names: Iterable[str], always: Container[str]) -> list[Any]:
    """Parameters of which some run with every change."""
    return [pytest.param(name, marks=() if name in always else pytest.mark.full) for name in names]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize(
    ("name", "level"),
    _some_quick(
        (row for row in itertools.product(POLICY, LEVELS) if _is_allowed(row[0], None, "", row[1])),
        lambda name, level: name in ("clip", "delta") and level == "token",
    ),
)
def test_the_policy_term_at_its_limits(
    name: str, level: str, advantage: float, backend: str, dtype: torch.dtype
) -> None:
    options = _options(name, None, "", level)
    tokens = TOKENS if backend in ("torch", "cpu") else FEW_TOKENS
    for completion in _completions(tokens, level):
        _check(backend, dtype, advantage, completion, options, row(name, None, "", level, advantage, completion))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize(
    ("estimator", "penalty", "level"),
    _some_quick(
        (
            row
            for row in itertools.product(ESTIMATES, PENALTIES, LEVELS)
            if _is_allowed("clip", *row) and ("log_ratio_clamp" not in PENALTIES[row[1]][0] or row[2] == "token")
        ),
        lambda estimator, penalty, level: (estimator, level) == ("k3", "token") and penalty in ("naive", "corrected"),
    ),
)
def test_the_penalty_at_its_limits(estimator: str, penalty: str, level: str, backend: str, dtype: torch.dtype) -> None:
    options = _options("clip", estimator, penalty, level)
    tokens = FEW_TOKENS if backend not in ("torch", "cpu") else TOKENS if level == "token" else JOINT_TOKENS
    for completion in _completions(tokens, level):
        at = row("clip", estimator, penalty, level, 0.0, completion)
        _check(backend, dtype, 0.0, completion, options, at)


#: Policy, penalty and level of what runs with every change, and where a call is slow.
_FAST = ("torch", "cpu")
_QUICK = {("clip", "corrected", "token"), ("surrogate", "corrected", "token"), ("clip", "corrected", "sequence")}


_BOTH = [
    row
    for row in itertools.product(POLICY, PENALTIES, LEVELS, ESTIMATES)
    if row[1] != "corrected_log_ratio_clamped" and _is_allowed(row[0], row[3], row[1], row[2])
]


def _check_both(row_of: tuple[str, str, str, str], tokens: Sequence[Token], backend: str, dtype: torch.dtype) -> None:
    policy, penalty, level, estimator = row_of
    options = _options(policy, estimator, penalty, level)
    for advantage in (1.0, -1.0):
        for completion in _completions(tokens, level):
            at = row(policy, estimator, penalty, level, advantage, completion)
            _check(backend, dtype, advantage, completion, options, at)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in _FAST])
@pytest.mark.parametrize("names", _some_quick(((row,) for row in _BOTH), lambda row: row[:3] in _QUICK), ids="-".join)
def test_both_terms_at_their_limits(names: tuple[str, str, str, str], backend: str, dtype: torch.dtype) -> None:
    _check_both(names, JOINT_TOKENS, backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [name for name in ALL_BACKENDS if name not in _FAST])
@pytest.mark.parametrize("names", [row for row in _BOTH if row[:3] in _QUICK], ids="-".join)
def test_both_terms_at_their_limits_where_a_call_is_slow(
    names: tuple[str, str, str, str], backend: str, dtype: torch.dtype
) -> None:
    _check_both(names, FEW_TOKENS, backend, dtype)


#: Loss and gradient where the ratio is infinite and where it is 0, worked by hand: an anchor of the table.
BY_HAND: dict[tuple[str, float], tuple[tuple[float, float], tuple[float, float]]] = {
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
        got = row(name, None, "", "token", advantage, (token,))
        assert [float(got.loss), float(got.gradient[0])] == pytest.approx(expected, rel=1e-15)


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
    for (estimator, penalty, token), expected in rows.items():
        got = row("clip", estimator, penalty, "token", 0.0, (token,))
        assert [float(got.loss), float(got.gradient[0])] == pytest.approx(expected, rel=1e-15), token


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
    assert leaf.grad is not None and loss.item() < -1e30
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
def test_kl_cov_of_a_token_that_the_policy_lost(backend: str) -> None:
    """Its ratio is 0, and so is what it counts, unless it is penalised."""
    leaf = torch.tensor([[-1.0, -math.inf, -0.5, -1.5]], requires_grad=True)
    old = torch.tensor([[-1.0, -2.0, -0.5, -1.5]])
    advantages = torch.tensor([[2.0, 3.0, 1.0, 1.0]])
    with _on(backend):
        config = GRPOLossConfig(loss_type="kl_cov", kl_cov_ratio=0.25)
        loss, _ = policy_loss(leaf, advantages, torch.ones(1, 4), old_logprobs=old, config=config, backend=backend)
        loss.backward()
    assert leaf.grad is not None and loss.isfinite() and leaf.grad[0, 1] == 0
    assert leaf.grad[0, 2:].tolist() == [-0.25, -0.25]


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("options", [{}, {"loss_type": "cispo"}, {"loss_type": "sapo"}], ids=str)
def test_nan_remains_nan(options: dict[str, Any], backend: str) -> None:
    for place in range(2):
        token = tuple(math.nan if n == place else -1.0 for n in range(3))
        assert math.isnan(_loss(backend, torch.float32, 1.0, (ORDINARY, token), options)[0]), token


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("is_far", [False, True])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("estimator", _sometimes(ESTIMATES, ("k1", "k3")))
def test_nan_of_a_penalty_remains_nan(estimator: str, penalty: str, is_far: bool, backend: str) -> None:
    """The gradient's too: alone, and beside a token that is at its limits."""
    options = {"beta": BETA, "kl_estimator": estimator, **PENALTIES[penalty][0]}
    other = (-101.0, -1.0, -1.0) if is_far else ORDINARY
    for place in range(3):
        token = tuple(math.nan if n == place else -1.0 for n in range(3))
        loss, gradients = _loss(backend, torch.float32, 1.0, (other, token), options)
        assert math.isnan(loss) and math.isfinite(gradients[0]), token
        is_constant = estimator == "k1" and place == 2 and "use_bias_correction_kl" in options
        if not is_constant:
            assert math.isnan(gradients[1]), (token, gradients)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("loss_type", ["reinforce", "vespo"])
def test_nothing_times_a_lost_log_probability(loss_type: str, backend: str) -> None:
    loss, gradients = _loss(backend, torch.float32, 0.0, ((-math.inf, -1.0, -1.0),), {"loss_type": loss_type})
    assert loss == 0 and gradients == [0]


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
    loss, _ = _loss(backend, torch.float32, -1.0, (ORDINARY, ORDINARY, (-1.0, -101.0, -1.0)), {})
    assert loss == math.inf
    with pytest.raises(ValueError, match="an unmasked token whose loss is infinite, at 2"):
        check_device_values(CPU)
    check_device_values(CPU)
    leaf = torch.full((1, 2), -1.0, requires_grad=True)
    _loss(backend, torch.float32, -1.0, (ORDINARY, (-1.0, -101.0, -1.0)), {})
    with pytest.raises(ValueError, match=r"infinite, at 1"):
        policy_loss(leaf, torch.ones(1), torch.ones(1, 2), debug=True, backend="torch")


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_what_is_masked_is_not_told(backend: str, kept: Tensor) -> None:
    leaf = torch.full((1, 2), -1.0, requires_grad=True)
    old = torch.tensor([[-1.0, -math.inf]])
    with _on(backend):
        loss, _ = policy_loss(leaf, -torch.ones(1), torch.tensor([[1, 0]]), old_logprobs=old, backend=backend)
    assert loss.isfinite() and kept[3] == 2**63 - 1
