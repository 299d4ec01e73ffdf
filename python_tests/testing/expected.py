"""What an op is to return on given inputs, and how near: a loss is judged at the log-probs that it was made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from grpo_kernels.loss import reference as policy
from testing.assertions import assert_near_baseline
from testing.calls import rounded_dlogits, run
from testing.inputs import Inputs

Results = dict[str, Tensor]
#: The outputs that a loss is a function of. They have a bound of their own.
_OF_TOKENS = ("logprobs", "entropy")


@dataclass(frozen=True)
class Expected:
    """Outputs and gradients of plain torch by name, in the inputs' dtype and in fp64.

    A loss ``f(l)`` of log-probs that are off by ``d`` is off by ``f'(l) d``, however exact the arithmetic of ``f`` is.
    VESPO's ``exp(lambda + k w - lambda e^w)``, with ``w`` a sum over a sequence, multiplies ``d`` by up to 20; a small
    ``num_items_in_batch``, the ratio and ``k3`` multiply it too. ``d`` is what the GEMM of a processor gives, so a
    reference that is near by luck says nothing of another one. Hence the baseline of loss, metrics and gradients is
    ``f`` in fp64 at ``l + d``, with the ``d`` of the results that are judged, be they the reference's or the
    implementation's. What is left to compare is the arithmetic of ``f``.

    Args:
        op: Its name.
        inputs: What it is given.
        dtype: Of the inputs.
        reference: Plain torch on these inputs.
        baseline: Plain torch on the same values in fp64.
        reference_baseline: The baseline at the reference's own log-probs.
    """

    op: str
    inputs: Inputs
    dtype: torch.dtype
    reference: Results
    baseline: Results
    reference_baseline: Results

    @classmethod
    def of(cls, op: str, inputs: Inputs, dtype: torch.dtype, rounds_dlogits: bool = False) -> Expected:
        """What is expected; with ``rounds_dlogits`` of a head whose GEMMs take the gradient of logits in ``dtype``."""
        with rounded_dlogits(dtype) if rounds_dlogits else nullcontext():
            reference = run(op, inputs, "torch")
        baseline = run(op, inputs.double(), "torch")
        return cls(op, inputs, dtype, reference, baseline, baseline_at(op, inputs, reference, reference, baseline))

    def assert_near(self, results: Results) -> None:
        """Asserts that results are hardly further from their baseline than the reference is from its own."""
        baseline = baseline_at(self.op, self.inputs, results, self.reference, self.baseline)
        assert_near_baseline(results, self.reference, baseline, self.dtype, self.reference_baseline)


def baseline_at(op: str, inputs: Inputs, results: Results, reference: Results, baseline: Results) -> Results:
    """The fp64 baseline, its loss, metrics and gradients at the log-probs and entropies of ``results``.

    An error of these counts up to twice the reference's largest, or one ulp of the largest log-prob if that is more:
    where log-probs are worse than that, the loss is wrong as well. An op that does not return a loss beside log-probs
    is judged at its inputs.
    """
    if not {"loss", *_OF_TOKENS} <= results.keys():
        return baseline
    with moved(*(_counted_error(results[name], reference[name], baseline[name]) for name in _OF_TOKENS)):
        return run(op, inputs.double(), "torch")


def _counted_error(result: Tensor, reference: Tensor, baseline: Tensor) -> Tensor:
    error, own = ((x.double() - baseline).nan_to_num(0.0, 0.0, 0.0) for x in (reference, result))
    ulp = torch.finfo(reference.dtype).eps * baseline.nan_to_num(0.0, 0.0, 0.0)
    most = torch.cat([2 * error.flatten(), ulp.flatten(), ulp.new_zeros(1)]).abs().max()
    return own.clamp(-most, most)


@contextmanager
def moved(dlogprobs: Tensor, dentropy: Tensor | None = None) -> Iterator[None]:
    """Within it the "torch" backend takes policy losses at log-probs, and entropies, that are off by so much."""
    exact = policy.policy_loss

    def at(logprobs: Tensor, inputs: Any, entropy: Tensor | None, config: Any) -> Any:
        if entropy is not None and dentropy is not None:
            entropy = entropy + dentropy
        return exact(logprobs + dlogprobs, inputs, entropy, config)

    with mock.patch.object(policy, "policy_loss", at):
        yield
