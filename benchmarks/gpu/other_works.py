"""The stage "works": every comparison that the headline leaves out, at more sizes and with every peer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

from interleaved import Comparison, time_in_turns
from providers import providers
from qualify import Verdicts
from works import FEW, from_hidden, from_logits, logprobs_alone, policy, under_upstream

from gpu.headline import of_each, verdicts_on
from gpu.settings import in_place
from gpu.sizes import CASES, HALF, Sizes
from gpu.stage import RunningStage, main


def run(stage: RunningStage, options: argparse.Namespace) -> None:
    """Checks every provider, then times them at every work."""
    stage.need_a_backend()
    sizes = Sizes.dry() if stage.is_dry else Sizes()
    peers = tuple(provider.name for provider in providers(stage.ours))
    verdicts = verdicts_on(sizes, stage, peers, CASES)
    for name, make in comparisons(sizes, stage, verdicts).items():

        def measure(make: Callable[[], Comparison] = make) -> Comparison:
            return time_in_turns(make(), options.rounds, stage.device, stage.deadline)

        stage.attempt(name, lambda measure=measure: stage.compare(measure))


def comparisons(sizes: Sizes, stage: RunningStage, verdicts: Verdicts) -> dict[str, Callable[[], Comparison]]:
    """Every comparison of this stage by name, as a function that makes it; those first that say most."""
    common = {"device": stage.device, "verdicts": verdicts, "ours": stage.ours}
    (tokens, head), *others = sizes.heads
    first = (tokens, head, HALF)
    few = (*FEW, "Liger", *of_each(stage.ours, 0))
    found: dict[str, Callable[[], Comparison]] = {
        "log-probs": partial(logprobs_alone, *first, **common),
        "upstream": partial(under_upstream, *first, **common),
        "hidden, 50% live": partial(from_hidden, *first, live=0.5, only=few, **common),
        "policy": partial(policy, *sizes.policy, stage.device, stage.ours),
    }
    # past 2^31 logits a peer whose offsets have 32 bits would end the whole process
    ours = ("naive PyTorch", *stage.ours, *(f"{name}, fresh gradient" for name in stage.ours))
    for vocab in sizes.vocabularies:
        for n in sizes.tokens:
            shape = f"N={n} V={vocab}"
            only = ours if n > sizes.tokens[0] else ()
            found[f"logits, {shape}"] = partial(from_logits, n, vocab, HALF, only=only, **common)
            has_settings = (n, vocab) == (sizes.tokens[0], sizes.vocabularies[0])
            alone = (n, vocab, stage.device, stage.backends, has_settings)
            found[f"calls, {shape}"] = partial(in_place, HALF, *alone)
    for n, other in others:
        found[f"hidden, H={other[0]}"] = partial(from_hidden, n, other, HALF, only=few, **common)
    for dtype, n, vocab in sizes.logits:
        found[f"logits, {dtype} V={vocab}"] = partial(from_logits, n, vocab, dtype, **common)
        found[f"calls, {dtype} V={vocab}"] = partial(in_place, dtype, n, vocab, stage.device, stage.backends, True)
    for vocab in sizes.head_vocabularies:
        found[f"hidden, V={vocab}"] = partial(from_hidden, tokens, (head[0], vocab), HALF, only=few, **common)
    for n in sizes.head_tokens:
        found[f"hidden, N={n}"] = partial(from_hidden, n, head, HALF, only=few, **common)
    return found


if __name__ == "__main__":
    sys.exit(main(run))
