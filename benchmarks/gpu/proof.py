"""The stage "proof": what only a GPU can show, at real sizes: tests, errors of heads, and TRL's trainer's curves."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from functools import partial

from gpu.accuracy import accuracy
from gpu.checks import TESTS as FILE
from gpu.checks import run_tests
from gpu.sizes import Sizes
from gpu.stage import RunningStage, main
from gpu.trainer_curves import assert_same_curves, curves

#: The tests, in this order: those first that say most in little time.
TESTS = (
    "test_runs_are_bit_equal",
    "test_captured_graphs_replay",
    "test_the_gradient_in_place_is_that_of_a_second_buffer",
    "test_the_host_waits_for_counts_of_rows_alone",
    "test_more_than_2_to_the_31_logits",
    "test_long_completions",
    "test_ids_outside_the_vocabulary_are_told_later",
    "test_memory_of_grpo_loss_is_its_gradient",
    "test_memory_of_linear_grpo_loss_is_its_workspace_and_gradients",
    "test_real_vocabularies",
)


def run(stage: RunningStage, options: argparse.Namespace) -> None:
    """Measures the errors of our heads, runs the tests, and trains a tiny model with stock TRL and with ours."""
    stage.need_a_backend()
    sizes = Sizes.dry() if stage.is_dry else Sizes()
    rows = stage.entry["found"].setdefault("accuracy", [])
    for backend in stage.backends:

        def measure(backend: str = backend) -> None:
            errors = accuracy(sizes.exact_tokens, sizes.heads[0][1], stage.device, backend)
            rows[:] = [row for row in rows if row["name"] not in {row["name"] for row in errors}] + errors
            over = [row["name"] for row in errors if not row["ratio"] <= row["target"]]
            assert not over, f"over {errors[0]['target']} times the error of whole fp32 logits: {', '.join(over)}"

        stage.attempt(f"errors of the head, {backend}", measure)
    selection = [f"{FILE}::{name}" for name in TESTS]
    if stage.is_dry:
        selection = [str(FILE), "-k", "second_buffer and 8209"]
    now = time.monotonic()
    until = now + (stage.deadline - now) * 2 / 3  # the rest is for the curves, which say less
    tests = partial(run_tests, stage, "proof", selection, workers=1 if stage.is_dry else 12, deadline=until)
    stage.attempt("tests at real sizes", tests, seconds=600)
    if importlib.util.find_spec("trl") is None:
        stage.leave_out("curves of GRPOTrainer: trl is not installed")
    else:
        stage.attempt("curves of GRPOTrainer", lambda: compare_curves(stage), seconds=120)


def compare_curves(stage: RunningStage) -> None:
    """Curves of ours by each backend against stock TRL's."""
    backends = ["auto"] if stage.is_dry else stage.backends
    stage.entry["found"]["curves"] = measured = curves(3 if stage.is_dry else 20, stage.device, backends)
    assert_same_curves(measured)


if __name__ == "__main__":
    sys.exit(main(run))
