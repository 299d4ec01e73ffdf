"""Plants faults, one at a time, and checks that the tests notice each: ``make mutate``.

The faults are planted in a copy of the checkout, under ``build/mutate``; the checkout stays as it is. First the copy is
built and every test named here passes on it. Then all tests that a fault names must fail with it, within a minute.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
TESTS = "python_tests"
SECONDS = 60  # for a fault: its build and its tests
UNCHANGED_SECONDS = 1800  # for the unchanged copy, which is built from nothing the first time
CONFORMANCE = "test_conformance.py::test_op_is_near_its_fp64_baseline"


@dataclass(frozen=True)
class Fault:
    """A mistake that compiles and runs, and the tests that must fail with it.

    Args:
        name: What is wrong.
        path: The file, from the root of the checkout.
        old: Text that stands there exactly once.
        new: What the fault has in its place.
        tests: At most five, as pytest names them within ``python_tests``: short ones, of either tier.
    """

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def language(self) -> str:
        """What the file is written in: tests of Triton's kernels run in its interpreter, C++ is built again."""
        if self.path.endswith(".py"):
            return "Triton" if "triton" in Path(self.path).parts else "Python"
        return "CUDA" if self.path.startswith("csrc/cuda/") else "C++"

    def plant(self, text: str) -> str:
        """The file's text with the fault in it.

        Raises:
            ValueError: What it replaces does not stand there exactly once.
        """
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.name}: expected its text once in {self.path}, found it {count} times")
        return text.replace(self.old, self.new)


FAULTS = (
    Fault(
        "the sign of the k3 gradient",
        "csrc/policy_math.h",
        old="return {growth + d, R(0), -growth};",
        new="return {growth + d, R(0), growth};",
        tests=(
            "test_reference.py::test_kl_by_hand[False-1.0-cpu]",
            "test_reference.py::test_kl_by_hand[True-1.5-cpu]",
            "test_loss_family.py::test_divergences[k3-cpu]",
            f"{CONFORMANCE}[policy_loss-cpu-float32-plain]",
            f"{CONFORMANCE}[grpo_loss-cpu-float32-on_policy_kl]",
        ),
    ),
    Fault(
        "0 times infinity",
        "csrc/policy_math.h",
        old="kAtLimits && log_ratio > Limit<R>::kLogRatio ? Limit<R>::kLogRatio : log_ratio;",
        new="log_ratio;",
        tests=(
            "test_limits.py::test_the_penalty_at_its_limits[k3-corrected-token-cpu-torch.float32]",
            "test_limits.py::test_the_policy_term_at_its_limits[clip-token--1.0-cpu-torch.float64]",
            "test_limits.py::test_both_terms_at_their_limits[clip-corrected-token-k1-cpu-torch.float32]",
        ),
    ),
    Fault(
        "a mask ignored",
        "csrc/cpu/policy_loss.cpp",
        old="    if (!in.fields.mask[n]) continue;\n    mean.sum += in.averaged(s, n).value;\n",
        new="    mean.sum += in.averaged(s, n).value;\n",
        tests=(
            "test_reference.py::test_sequence_ratio_is_the_geometric_mean[cpu]",
            "test_loss_family.py::test_objectives[sequence_token-cpu]",
            f"{CONFORMANCE}[policy_loss-cpu-float32-mask_holes_sequence]",
            f"{CONFORMANCE}[policy_loss-cpu-float32-dirty_mask_sequence]",
        ),
    ),
    Fault(
        "a barrier taken out",
        "csrc/cuda/grpo_loss.cu",
        old="        sync_cluster();\n        if (threadIdx.x < kWarp) {\n",
        new="        if (threadIdx.x < kWarp) {\n",
        tests=(
            "test_cuda_emulated.py::test_clusters_cover_rows_of_any_length_in_place[None-torch.float32-2048]",
            "test_cuda_emulated.py::test_clusters_cover_rows_of_any_length_in_place[20.0-torch.bfloat16-4104]",
            "test_cuda_emulated.py::test_a_loss_is_near_its_fp64_baseline_on_any_device[vocab_block-clusters]",
        ),
    ),
    Fault(
        "off by one at a row's edge",
        "grpo_kernels/ops/rows/triton/softmax.py",
        old="inside = (columns >= shift) & (columns < vocab + shift)\n",
        new="inside = (columns >= shift) & (columns < vocab + shift - 1)\n",
        tests=(
            "test_reference.py::test_token_logprobs_of_two_logits[triton]",
            "test_interpreted.py::test_interpreted_blocks_cover_rows_of_any_length[torch.float32-7]",
            "test_interpreted.py::test_interpreted_blocks_cover_rows_of_any_length[torch.float32-513]",
            f"{CONFORMANCE}[token_logprobs-triton-float32-vocab_prime]",
        ),
    ),
    Fault(
        "entropy before the temperature",
        "grpo_kernels/ops/rows/triton/softmax.py",
        old="entropy = log_sum - (weighted / row_sum).to(tl.float64)\n",
        new="entropy = log_sum - (weighted / row_sum).to(tl.float64) / (rate * _LN2)\n",
        tests=(
            "test_reference.py::test_transform_scales_caps_and_then_cools[triton]",
            f"{CONFORMANCE}[token_logprobs-triton-float32-temperature]",
            f"{CONFORMANCE}[grpo_loss-triton-float32-temperature]",
        ),
    ),
    Fault(
        "an id clamped one too far",
        "grpo_kernels/ops/rows/triton/softmax.py",
        old="return tl.minimum(tl.maximum(token, 0), vocab - 1)",
        new="return tl.minimum(tl.maximum(token, 0), vocab - 2)",
        tests=(
            "test_reference.py::test_token_logprobs_of_two_logits[triton]",
            "test_interpreted.py::test_interpreted_ids_outside_the_vocabulary_are_held_and_told_once[11]",
            f"{CONFORMANCE}[token_logprobs-triton-float32-vocab_2]",
        ),
    ),
    Fault(
        "a weight doubled",
        "grpo_kernels/loss/weights.py",
        old="return torch.div(factor, reduce(torch.mul, tensors))",
        new="return torch.div(2 * factor, reduce(torch.mul, tensors))",
        tests=(  # worked by hand: the reference takes its weights from here too
            "test_reference.py::test_grpo_loss_by_hand[cpu]",
            "test_reference.py::test_clipped_gradient_and_metrics_by_hand[cpu]",
            "test_loss_family.py::test_objectives[ppo-cpu]",
        ),
    ),
    Fault(
        "grad_output dropped",
        "grpo_kernels/ops/tokens/scale.py",
        old="        if gradient is not None:\n            _SCALE[backend](gradient, factor.to(gradient.device))\n",
        new="        pass\n",
        tests=(
            "test_autograd.py::test_gradient_of_a_scaled_loss[grpo_loss]",
            "test_autograd.py::test_gradient_of_a_scaled_loss[linear_grpo_loss]",
            "test_autograd.py::test_backward_copies_no_gradient[grpo_loss--0.375]",
            f"{CONFORMANCE}[grpo_loss-cpu-float32-grad_output]",
        ),
    ),
    Fault(
        "a normaliser by local tokens",
        "grpo_kernels/training/loop.py",
        old='num_items = self.accelerator.reduce(torch.tensor(sum(sizes), device=self.model.device), "sum").item()',
        new="num_items = sum(sizes)",
        tests=(
            "test_training_loop.py::test_a_mean_is_over_the_tokens_or_sequences_of_all_processes[bnpo]",
            "test_training_loop.py::test_a_mean_is_over_the_tokens_or_sequences_of_all_processes[grpo]",
        ),
    ),
    Fault(
        "a deviation in the place of equality",
        "grpo_kernels/training/metrics.py",
        old='"frac_reward_zero_std": (~differs).double().mean().item(),',
        new='"frac_reward_zero_std": sum(g.std().item() < 1e-8 for g in totals.split(num_generations)) / len(differs),',
        tests=(
            "test_training_metrics.py::test_rewards_of_one_and_a_fifth_have_no_spread_at_all",
            "test_training_metrics.py::test_reward_metrics_of_drawn_runs_are_the_plain_ones",
        ),
    ),
    Fault(
        "a mean of means over micro-batches",
        "grpo_kernels/loss/metrics.py",
        old="    combined = parts.sum(0)\n",
        new="    combined = (parts / parts[:, :1].clamp(min=1)).sum(0)\n",
        tests=(
            "test_training_metrics.py::test_a_steps_metrics_are_those_of_one_plain_batch[False]",
            "test_metrics_plain.py::test_unequal_micro_batches_have_the_metrics_of_the_batch[token-torch]",
        ),
    ),
    Fault(
        "a stale reference",
        "grpo_kernels/training/loop.py",
        old="        ref_logprobs = None if self.policy.reference is None else "
        "self.policy.logprobs(rollout, size, reference=True)\n",
        new='        if self.policy.reference is not None and not hasattr(self, "_ref_logprobs"):\n'
        "            self._ref_logprobs = self.policy.logprobs(rollout, size, reference=True)\n"
        '        ref_logprobs = getattr(self, "_ref_logprobs", None)\n',
        tests=(
            "test_training_loop.py::test_the_references_log_probs_are_of_the_generation",
            "test_training_trl_parity.py::test_twenty_steps_are_those_of_trls_trainer[kl-iterations-Qwen2]",
        ),
    ),
)


class Verdict(NamedTuple):
    """What became of a planted fault."""

    failed: int  # of the tests that it names
    seconds: float
    missed: str  # why it does not count as noticed; "" where it does


def copy_checkout(tree: Path) -> None:
    """Makes the tree's files those of the checkout: what git tracks, and what is new and not ignored.

    A file that is the same is left alone, so that a second run builds little. One that an interrupted run left with a
    fault is written again, and is then newer than what was built of it.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    names = {name for name in listed if name and (ROOT / name).is_file()}
    for name in names:
        content, copy = (ROOT / name).read_bytes(), tree / name
        if not copy.is_file() or copy.read_bytes() != content:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content)
    for path in filter(Path.is_file, tree.rglob("*")):
        name = path.relative_to(tree)
        if name.as_posix() not in names and name.parts[0] != "build" and path.suffix != ".so":
            path.unlink()


def run(command: Sequence[str], tree: Path, seconds: float, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command on the tree's package; ends it with all that it started when its time is over.

    Raises:
        subprocess.TimeoutExpired: It was not done in time.
    """
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")
    }
    # a planted file may have the size and the second of the one that was compiled before
    inherited |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    inherited |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "GRPO_KERNELS_SKIP_CUDA": "1"}
    process = subprocess.Popen(
        command, cwd=tree, env=inherited | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output)


def build(tree: Path, seconds: float) -> None:
    """Builds the C++ library in place, without the CUDA one: CUDA kernels are emulated, and built by their tests.

    Raises:
        subprocess.CalledProcessError: It does not build.
        subprocess.TimeoutExpired: It was not done in time.
    """
    done = run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], tree, seconds)
    if done.returncode:
        error = subprocess.CalledProcessError(done.returncode, done.args, done.stdout)
        error.add_note(done.stdout)
        raise error


def outcomes(tests: Sequence[str], language: str, tree: Path, seconds: float) -> tuple[dict[str, str], str]:
    """What pytest reports of each test, and what it printed.

    Returns:
        "passed", "failed", "skipped" or "error" by test. A test that was not run, because of an error before it say,
        is "not run".

    Raises:
        subprocess.TimeoutExpired: They were not done in time.
    """
    report = tree / "build" / "tests.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    nodes = [f"{TESTS}/{test}" for test in tests]
    options = ["-q", "-m", "", "-p", "no:cacheprovider", f"--junit-xml={report}"]  # whatever their marker
    environment = {"TRITON_INTERPRET": "1"} if language == "Triton" else {}
    done = run([sys.executable, "-m", "pytest", *options, *nodes], tree, seconds, **environment)
    results = dict.fromkeys(tests, "not run")
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        test = f"{case.get('classname', '').removeprefix(f'{TESTS}.')}.py::{case.get('name')}"
        if test in results and results[test] != "failed":  # which an error in what comes after it leaves as it is
            results[test] = _outcome({child.tag for child in case})
    return results, done.stdout


def _outcome(tags: set[str]) -> str:
    names = {"failure": "failed", "error": "error", "skipped": "skipped"}
    return next((name for tag, name in names.items() if tag in tags), "passed")


def check(fault: Fault, tree: Path, seconds: float = SECONDS) -> Verdict:
    """Plants a fault, builds what it needs and runs its tests; then the tree is as before."""
    path, start = tree / fault.path, time.monotonic()
    before = path.read_text()
    failed = 0
    try:
        path.write_text(fault.plant(before))
        if fault.language == "C++":
            build(tree, seconds)
        results, _ = outcomes(fault.tests, fault.language, tree, start + seconds - time.monotonic())
        failed = list(results.values()).count("failed")
        missed = ", ".join(f"{test}: {outcome}" for test, outcome in results.items() if outcome != "failed")
    except subprocess.TimeoutExpired:
        missed = f"not done in {seconds} s"
    except subprocess.CalledProcessError as error:
        missed = f"does not build: {error.output[-2000:]}"
    finally:
        path.write_text(before)
    taken = time.monotonic() - start
    if fault.language == "C++":
        build(tree, UNCHANGED_SECONDS)
    return Verdict(failed, taken, missed)


def passes_unchanged(faults: Sequence[Fault], tree: Path) -> bool:
    """Whether all tests that the faults name pass without them; prints what does not."""
    passes = True
    for interpreted in (False, True):
        chosen = [fault for fault in faults if (fault.language == "Triton") == interpreted]
        tests = list(dict.fromkeys(test for fault in chosen for test in fault.tests))
        if tests:
            results, output = outcomes(tests, chosen[0].language, tree, UNCHANGED_SECONDS)
            if set(results.values()) != {"passed"}:
                print(output)
                passes = False
    return passes


def check_all(faults: Sequence[Fault], tree: Path) -> int:
    """Plants each fault in turn and prints a table.

    Returns:
        The exit status: 1 where a fault was not noticed by every test that it names.

    Raises:
        ValueError: The text of a fault is not where it should be.
    """
    for fault in faults:
        fault.plant((tree / fault.path).read_text())
    if not passes_unchanged(faults, tree):
        print("not all tests pass without a fault: none is planted")
        return 1
    names, paths = (max(len(getattr(fault, field)) for fault in faults) for field in ("name", "path"))
    print(f"| {'fault':{names}} | language | {'file':{paths}} | tests that fail | seconds |")
    print(f"|{'-' * (names + 2)}|----------|{'-' * (paths + 2)}|-----------------|---------|", flush=True)
    missed = []
    for fault in faults:
        verdict = check(fault, tree)
        failed = f"{verdict.failed} of {len(fault.tests)}"
        print(f"| {fault.name:{names}} | {fault.language:8} | {fault.path:{paths}} | {failed:15} "
              f"| {verdict.seconds:7.0f} |", flush=True)  # fmt: skip
        missed += [f"missed: {fault.name}: {verdict.missed}"] if verdict.missed else []
    print("\n".join(["", *missed, f"{len(faults) - len(missed)} of {len(faults)} faults are noticed"]))
    return 1 if missed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    chosen = parser.parse_args().only
    tree = ROOT / "build" / "mutate"
    copy_checkout(tree)
    build(tree, UNCHANGED_SECONDS)
    return check_all([fault for fault in FAULTS if fault.name in chosen], tree)


if __name__ == "__main__":
    sys.exit(main())
