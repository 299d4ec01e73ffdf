"""The tolerance itself: what is as good as plain torch passes on any processor, and a small planted error does not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from testing.assertions import assert_near_baseline
from testing.calls import SOURCES, run
from testing.cases import ALL_CASES
from testing.expected import Expected, Results, baseline_at, moved
from testing.inputs import Inputs, build
from torch import Tensor

from grpo_kernels.loss import finish_weights
from grpo_kernels.loss import reference as policy

pytestmark = pytest.mark.usefixtures("poison", "one_thread")
TESTS = Path(__file__).parent
CASES = {case.name: case for case in ALL_CASES}
SINGLE = torch.float32
#: Of log-probs: what an fp32 GEMM leaves of logits of about 10.
OFF = 5e-7
#: Whose loss moves by more than 1e-6 where log-probs move by that.
AMPLIFYING = ("vespo-rollout", "num_items_below_one")
PLANTED = 1e-5


def _at(op: str, inputs: Inputs, off: Tensor) -> Results:
    """In fp32, exact but for log-probs that are off by so much."""
    with moved(off):
        results = run(op, inputs.double(), "torch")
    return {name: x.float() for name, x in (results | {"logprobs": results["logprobs"] + off}).items()}


def _best_and_worst(op: str, inputs: Inputs) -> tuple[Results, Results]:
    """Of log-probs that are all off by the same, up or down: those whose loss moves least, and most."""
    rng = torch.Generator().manual_seed(0)
    draws = [OFF * (torch.randint(2, inputs.mask.shape, generator=rng) * 2 - 1) * (inputs.mask != 0) for _ in range(64)]
    exact = run(op, inputs.double(), "torch")["loss"]

    def movement(off: Tensor) -> float:
        with moved(off):
            return (run(op, inputs.double(), "torch")["loss"] - exact).abs().item()

    draws.sort(key=movement)
    return _at(op, inputs, draws[0]), _at(op, inputs, draws[-1])


@pytest.mark.parametrize("op", ["grpo_loss", "linear_grpo_loss"])
@pytest.mark.parametrize("name", [*AMPLIFYING, "plain", "sapo", "gmpo-kl", "rollout_sequence_level", "loss_scale"])
def test_log_probs_as_good_as_the_references_make_a_loss_that_passes(name: str, op: str) -> None:
    inputs = build(CASES[name], SINGLE, SOURCES[op])
    baseline = run(op, inputs.double(), "torch")
    reference, result = _best_and_worst(op, inputs)
    at_reference = baseline_at(op, inputs, reference, reference, baseline)
    Expected(op, inputs, SINGLE, reference, baseline, at_reference).assert_near(result)
    if name in AMPLIFYING:
        with pytest.raises(AssertionError, match="loss: largest error"):
            assert_near_baseline(result, reference, baseline, SINGLE)


@pytest.mark.parametrize("op", ["grpo_loss", "linear_grpo_loss"])
@pytest.mark.parametrize("name", ["vespo-rollout", "plain"])
def test_log_probs_worse_than_the_references_make_a_loss_that_fails(name: str, op: str) -> None:
    inputs = build(CASES[name], SINGLE, SOURCES[op])
    expected = Expected.of(op, inputs, SINGLE)
    with pytest.raises(AssertionError, match="loss: largest error"):
        expected.assert_near(_at(op, inputs, 1e-5 * (inputs.mask != 0)))


def _off(function: Any, error: float, *arguments: Any) -> Any:
    found = function(*arguments)
    return (found[0] * (1 + error), *found[1:]) if isinstance(found, tuple) else found * (1 + error)


_SURROGATES = ("on_policy", "vespo-rollout", "gmpo", "sapo", "rollout_sequence_level", "cispo")


@pytest.mark.parametrize("op", ["policy_loss", "grpo_loss", "linear_grpo_loss"])
@pytest.mark.parametrize(
    ("module", "function", "error", "names"),
    [
        (finish_weights, "_gamma_weights", PLANTED, ("vespo", "vespo-rollout", "vespo-on_policy")),
        (policy, "surrogate", PLANTED, _SURROGATES),
        (policy, "kl_penalty", 10 * PLANTED, ("zero_advantage_kl", "on_policy_kl")),  # a tenth of the loss
    ],
    ids=["weight", "surrogate", "kl"],
)
def test_a_formula_off_by_one_in_1e5_fails(
    module: Any, function: str, error: float, names: tuple[str, ...], op: str
) -> None:
    for name in names:
        inputs = build(CASES[name], SINGLE, SOURCES[op])
        expected = Expected.of(op, inputs, SINGLE)
        with mock.patch.object(module, function, partial(_off, getattr(module, function), error)):
            results = run(op, inputs, "torch")
        with pytest.raises(AssertionError, match="error"):
            expected.assert_near(results)


@pytest.mark.parametrize("op", ["grpo_loss", "linear_grpo_loss"])
@pytest.mark.parametrize("name", ["plain", "vespo-rollout", "num_items_below_one", "gmpo"])
def test_any_gradient_off_by_one_in_1e5_fails(name: str, op: str) -> None:
    inputs = build(CASES[name], SINGLE, SOURCES[op])
    expected = Expected.of(op, inputs, SINGLE)
    for gradient in ("dlogits", "dhidden", "dweight"):
        if gradient in expected.reference:
            with pytest.raises(AssertionError, match=f"{gradient}: error of norm"):
                expected.assert_near(expected.reference | {gradient: expected.reference[gradient] * (1 + PLANTED)})


@pytest.mark.full
def test_another_processor_passes() -> None:
    """Narrower instructions of torch and of our kernels, and MKL's that every x86-64 has: other orders of sums."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [
        "--simd-level",
        "baseline",
        *(f"{TESTS}/{name}.py" for name in ("test_conformance", "test_linear_rows")),
    ]
    cases = "linear_grpo_loss and cpu and float32 and (vespo or gmpo or num_items or sequence)"
    environment = dict(os.environ, ATEN_CPU_CAPABILITY="avx2", MKL_CBWR="COMPATIBLE")
    done = subprocess.run(
        [*command, "-m", "", "-k", f"({cases}) or few_rows"],
        cwd=TESTS.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 30
