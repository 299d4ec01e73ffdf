"""The stage "proof": what only a GPU can show, at real sizes: tests, errors of heads, and TRL's trainer's curves."""

from __future__ import annotations

import argparse
import importlib.util
import sys

from gpu.accuracy import accuracy
from gpu.checks import run_tests
from gpu.sizes import Sizes
from gpu.stage import Stage, main
from gpu.trainer_curves import assert_same_curves, curves

#: The tests, those first that say most in little time.
TESTS = (
    "test_runs_are_bit_equal",
    "test_captured_graphs_replay",
    "second_buffer",
    "host_waits",
    "test_more_than_2_to_the_31_logits",
    "test_long_completions",
    "told_later",
    "test_real_vocabularies",
    "test_memory",
)


def run(stage: Stage, options: argparse.Namespace) -> None:
    """Runs the tests, measures the errors of our heads, and trains a tiny model with stock TRL and with ours."""
    stage.need_a_backend()
    sizes = Sizes.dry() if stage.is_dry else Sizes()
    selected = "second_buffer and 131" if stage.is_dry else " or ".join(TESTS)
    stage.attempt("tests at real sizes", lambda: run_tests(stage, "proof", selected, workers=1 if stage.is_dry else 3))
    stage.entry["found"]["accuracy"] = rows = []
    for backend in stage.backends:

        def measure(backend: str = backend) -> None:
            found = accuracy(sizes.exact_tokens, sizes.heads[0][1], stage.device, backend)
            rows.extend(found)
            over = [row["what"] for row in found if not row["ratio"] <= row["asked"]]
            assert not over, f"over {found[0]['asked']} times the error of whole fp32 logits: {', '.join(over)}"

        stage.attempt(f"errors of the head, {backend}", measure)
    if importlib.util.find_spec("trl") is None:
        stage.leave_out("curves of GRPOTrainer: trl is not installed")
        return

    def compare_curves() -> None:
        found = curves(3 if stage.is_dry else 20, stage.device)
        stage.entry["found"]["curves"] = found
        assert_same_curves(found)

    stage.attempt("curves of GRPOTrainer", compare_curves)


if __name__ == "__main__":
    sys.exit(main(run))
