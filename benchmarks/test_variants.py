"""No variant of the loss costs what a logit costs, but those that wait for log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from interleaved import Comparison, compare
from problems import COMPLETIONS, buffer, logits_problem, refill
from pytest_benchmark.fixture import BenchmarkFixture
from qualify import Sizes

from grpo_kernels import GRPOLossConfig, grpo_loss, token_logprobs

SECOND_PASS = {
    "gmpo": {"loss_type": "gmpo"},
    "vespo": {"loss_type": "vespo"},
    "off-policy mask": {"off_policy_mask_threshold": 1.0},
}
VARIANTS = {
    **{f"{name}: a second pass": options for name, options in SECOND_PASS.items()},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "reinforce": {"loss_type": "reinforce"},
    "surrogate": {"loss_type": "surrogate"},
    "k1, straight-through": {"beta": 0.1, "kl_estimator": "k1", "kl_gradient": "straight_through",
                             "use_bias_correction_kl": False},
    "k3, clamped": {"beta": 0.1, "kl_clamp": 10.0, "log_ratio_clamp": 20.0},
    "dapo": {},
}  # fmt: skip


def test_variants(benchmark: BenchmarkFixture, report: Callable[[Comparison], None], quick: bool, sizes: Sizes) -> None:
    tokens, vocab = sizes.tokens // 2, sizes.head[1]
    problem = logits_problem(tokens, vocab)
    work = buffer(problem)
    refill(work, problem)
    with torch.no_grad():  # ratios of 1: no row is clipped, so all have the same work
        old = token_logprobs(problem.logits, problem.ids).logprobs

    def step(config: GRPOLossConfig) -> None:
        leaf = work.detach().requires_grad_()
        given = {"old_logprobs": old, "ref_logprobs": old if config.beta else None, "config": config}
        grpo_loss(leaf, problem.ids, problem.advantages, problem.mask, inplace=True, **given).loss.backward()

    comparison = Comparison(
        "variants",
        f"variants of grpo_loss in place, over dapo, [{COMPLETIONS}, {tokens // COMPLETIONS}, {vocab}] float32",
        "dapo",
        {"N": tokens, "V": vocab},
        contenders={name: partial(step, GRPOLossConfig(**options)) for name, options in VARIANTS.items()},
        prepare=dict.fromkeys(VARIANTS, partial(refill, work, problem)),
        targets={} if quick else {name: 1.03 for name in VARIANTS if "pass" not in name and name != "dapo"},
    )
    compare(benchmark, comparison, rounds=2 if quick else 15)
    report(comparison)
