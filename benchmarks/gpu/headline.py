"""The stage "headline": the figures that README and DESIGN state, our backends by name beside three peers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial

import torch
from interleaved import Comparison, time_in_turns
from providers import providers
from qualify import Case, Verdict, Verdicts, qualify
from tables import OURS
from works import from_hidden, from_logits

from gpu.settings import TARGETS, captured, in_place, target_captured
from gpu.sizes import HALF, Sizes
from gpu.stage import RunningStage, main
from gpu.workspace import workspace_rows

PEERS = ("naive PyTorch", "TRL", "TRL, Triton", "Liger", "Liger, Triton")
CASES: tuple[Case, ...] = (("logits", "bfloat16"), ("hidden", "bfloat16"))
#: Targets of a head's time over its GEMMs: at N = 8192 and H = 4096; at N = 1024; at H = 896; over the dense GEMMs with
#: a quarter of the rows live, which is half the work and a fifth of it; over two GEMMs with a frozen head, whose row
#: kernel weighs half more beside them.
DENSE, FEWER, NARROW, QUARTER, FROZEN = 1.08, 1.10, 1.25, 0.6, 1.12
PEAK_BYTES = 2.5e9  # target of what a dense call takes beyond its inputs and gradients
#: Targets of TRL's time over ours, by share of live rows.
OVER_TRL = {1.0: 1.4, 0.25: 2.5}


def run(stage: RunningStage, options: argparse.Namespace) -> None:
    """Measures the card, checks ours and the peers, then times them in the order of what their figures are worth."""
    stage.need_a_backend()
    sizes = Sizes.dry() if stage.is_dry else Sizes()
    stage.attempt("card", lambda: stage.entry["found"].update(card=measure_card(stage.device)))
    verdicts = verdicts_on(sizes, stage, PEERS, CASES)
    for name, measure in comparisons(sizes, stage, verdicts, options.rounds).items():
        stage.attempt(name, lambda measure=measure: stage.compare(measure), seconds=120 if name == "hidden" else 60)


def verdicts_on(sizes: Sizes, stage: RunningStage, peers: tuple[str, ...], cases: tuple[Case, ...]) -> Verdicts:
    """Verdicts on ours and these peers; in a dry run of the peers on naive PyTorch alone.

    They are kept in the results, for another process of this stage to go by.
    """
    stage.results.extra["checked"] = sizes.told()
    wanted = ("naive PyTorch",) if stage.is_dry else peers
    names = {*wanted, *(name for name in peers if name.startswith(OURS)), *variants(stage.ours)}
    everybody = [one for one in providers(stage.ours) if one.name in names]
    kept = stage.entry.setdefault("verdicts", [])

    def check(is_ours: bool) -> None:
        among = [one for one in everybody if one.name.startswith(OURS) == is_ours]
        limit = 45 if is_ours and stage.device.type == "cuda" else 120  # of the peers on a GPU half of it
        verdicts = qualify(cases, sizes.checked, stage.device.type, stage.ours, among, limit, processes=8)
        kept[:] = [one for one in kept if one[0] not in {provider.name for provider in among}]
        kept.extend([name, case, asdict(verdict)] for (name, case), verdict in verdicts.items())
        wrong = [
            f"{name}, {' '.join(case)}: {verdict.status}, {verdict.reason}"
            for (name, case), verdict in verdicts.items()
            if is_ours and verdict.status not in ("ok", "cannot run")
        ]
        if wrong:
            raise RuntimeError("; ".join(wrong))

    stage.attempt("checks of ours", lambda: check(True), seconds=150, always=True)
    stage.attempt("checks of the peers", lambda: check(False), seconds=300, always=True)
    return {(name, tuple(case)): Verdict(**verdict) for name, case, verdict in kept}


def measure_card(device: torch.device) -> dict[str, float]:
    """What the card reaches: TB/s of a copy, read and written, and TFLOP/s of a bf16 GEMM of random numbers."""
    on_gpu = device.type == "cuda"
    source = torch.empty((1 << 30) if on_gpu else 1 << 16, dtype=HALF, device=device).normal_()
    target, side = torch.empty_like(source), 8192 if on_gpu else 64
    a, b = (torch.empty(side, side, dtype=HALF, device=device).normal_() for _ in range(2))
    product = torch.empty_like(a)
    comparison = Comparison("card", "the card", "copy")
    comparison.contenders = {"copy": lambda: target.copy_(source), "gemm": lambda: torch.mm(a, b, out=product)}
    time_in_turns(comparison, 10, device)
    copy, gemm = comparison.median("copy"), comparison.median("gemm")
    return {"copy_tb_s": 2 * source.nbytes / copy / 1e12, "gemm_tflop_s": 2.0 * side**3 / gemm / 1e12}


def comparisons(
    sizes: Sizes, stage: RunningStage, verdicts: Verdicts, rounds: int
) -> dict[str, Callable[[], Comparison]]:
    """Every comparison of this stage by name, as a function that makes and times it."""
    common = {"device": stage.device, "verdicts": verdicts, "ours": stage.ours}
    tokens, head = sizes.heads[0]
    fewer, narrow = (1024, sizes.heads[1]) if len(sizes.heads) > 1 else (tokens, sizes.heads[0])
    only = (*PEERS, *variants(stage.ours))
    hidden = partial(from_hidden, dtype=HALF, **common)
    # Liger compiles for each shape, for many seconds: the first head is enough
    some = [name for name in only if "Liger" not in name]
    vocab = sizes.vocabularies[0]

    def timed(make: Callable[[], Comparison], targets: Mapping[str, float]) -> Comparison:
        comparison = make()
        comparison.targets |= targets
        time_in_turns(comparison, rounds, stage.device, stage.deadline)
        note_peers(comparison, stage.ours)
        return comparison

    logits = partial(from_logits, sizes.tokens[0], vocab, HALF, only=only, **common)
    return {
        f"logits, N={sizes.tokens[0]} V={vocab}": partial(timed, logits, targets_of_logits(stage.ours)),
        "hidden": partial(timed, partial(hidden, tokens, head, only=only), of_each(stage.ours, DENSE)),
        "hidden, a quarter live": partial(
            timed, partial(hidden, tokens, head, live=0.25, only=only), of_each(stage.ours, QUARTER)
        ),
        f"calls, N={sizes.few_tokens}": partial(few_rows, sizes.few_tokens, vocab, stage, rounds),
        f"calls, N={sizes.tokens[0]} V={vocab}": partial(
            timed, partial(in_place, HALF, sizes.tokens[0], vocab, stage.device, stage.backends), {}
        ),
        f"hidden, N={fewer}": partial(
            timed,
            partial(with_captured, partial(hidden, fewer, head, only=some), stage.ours),
            of_each(stage.ours, FEWER),
        ),
        f"hidden, H={narrow[1][0]}": partial(timed, partial(hidden, *narrow, only=some), of_each(stage.ours, NARROW)),
        "frozen": partial(timed, partial(hidden, tokens, head, frozen=True, only=some), of_each(stage.ours, FROZEN)),
        f"hidden, N={sizes.few_tokens}": partial(
            timed, partial(with_captured, partial(hidden, sizes.few_tokens, head, only=some), stage.ours), {}
        ),
        "workspace": partial(timed, partial(workspace_rows, tokens, head, HALF, stage.device, stage.ours), {}),
    }


def variants(ours: Mapping[str, str]) -> tuple[str, ...]:
    """Ours as they are timed: with fp32 logits and with bf16's, and log-probs with the loss by torch."""
    return tuple(f"{name}{setting}" for name in ours for setting in ("", ", bf16 logits", ", token_logprobs"))


def of_each(ours: Mapping[str, str], share: float) -> dict[str, float]:
    """The same target for each backend, with fp32 and bf16 logits."""
    return {f"{name}{setting}": share for name in ours for setting in ("", ", bf16 logits")}


def targets_of_logits(ours: Mapping[str, str]) -> dict[str, float]:
    """Targets of ``grpo_loss`` over a copy, by backend."""
    return {name: TARGETS[backend]["grpo_loss"] for name, backend in ours.items()}


def few_rows(tokens: int, vocab: int, stage: RunningStage, rounds: int) -> Comparison:
    """Our functions over few tokens' logits, eager and captured."""
    comparison = in_place(HALF, tokens, vocab, stage.device, stage.backends)
    time_in_turns(comparison, rounds, stage.device, stage.deadline)
    target_captured(comparison, stage.device)
    return comparison


def with_captured(make: Callable[[], Comparison], ours: Mapping[str, str]) -> Comparison:
    """A comparison with ours as replays of CUDA graphs too."""
    comparison = make()
    if torch.cuda.is_available():
        for name in ours:
            if name in comparison.contenders:
                comparison.contenders[f"{name}, captured"] = captured(comparison.contenders[name])
    return comparison


def note_peers(comparison: Comparison, ours: Mapping[str, str]) -> None:
    """Notes TRL's time over ours, and what a dense call takes beyond its inputs and gradients."""
    is_first = (comparison.shape.get("N"), comparison.shape.get("H")) == (8192, 4096)
    for name in variants(ours):
        if name not in comparison.times or comparison.work != "hidden":
            continue
        if "TRL" in comparison.times:
            ratio = comparison.median("TRL") / comparison.median(name)
            target = OVER_TRL.get(comparison.live)
            of_dense = f" (target: {target}x)" if target and is_first else ""
            comparison.notes.append(f"TRL over {name}: {ratio:.2f}x{of_dense}")
        if comparison.peaks.get(name):
            n, h, v = (comparison.shape[letter] for letter in "NHV")
            beyond = comparison.peaks[name] - (n + v) * h * HALF.itemsize
            target = f" (target: {PEAK_BYTES / 1e9} GB)" if is_first and comparison.live == 1 else ""
            comparison.notes.append(f"{name}: peak of {beyond / 1e9:.2f} GB beyond inputs and gradients{target}")


if __name__ == "__main__":
    sys.exit(main(run))
