"""Shapes, masks and values by hypothesis; a case that it finds is kept in ``testing.cases``."""

from __future__ import annotations

from dataclasses import replace

import hypothesis
import pytest
import torch
from drawn import are_top_covariances_settled, configs
from hypothesis import strategies as st
from testing.assertions import ATOL
from testing.calls import SOURCES, applies, run
from testing.cases import Case
from testing.expected import Expected
from testing.inputs import Inputs, build
from torch import Tensor

from grpo_kernels import GRPOLossConfig, group_advantages
from grpo_kernels.loss.options import DIVERGENCES

pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def cases(draw: st.DrawFn, source: str) -> Case:
    packed = draw(st.booleans())
    layouts = ["dense", "strided"]
    if not packed:
        layouts += ["transposed", "next"] if source == "logits" else ["transposed"]
    logits = ["normal", "offset", "low", "peaked", "holes"] if source == "logits" else ["normal"]
    config = draw(configs())
    of_sequences = config.loss_type in ("vespo", "gmpo")
    advantages = ["sequence", "zero", "some"] + ["token"] * (not of_sequences)
    rollouts = [None, "token"] + ["sequence"] * (config.loss_type != "vespo")
    case = Case(
        f"random_{draw(st.integers(0, 10**6))}",
        batch=draw(st.integers(1, 5)),
        length=draw(st.integers(1, 9)),
        vocab=draw(st.one_of(st.integers(1, 70), st.sampled_from([2047, 2048, 2049, 4097]))),
        hidden=draw(st.integers(1, 9)),
        config=config,
        layout=draw(st.sampled_from(layouts)),
        logits=draw(st.sampled_from(logits)),
        mask=draw(st.sampled_from(["ones", "tail", "holes", "zeros"])),
        dirty=draw(st.booleans()),
        advantages=draw(st.sampled_from(advantages)),
        old=draw(st.booleans()),
        sampling=draw(st.booleans()),
        rollout=draw(st.sampled_from(rollouts)),
        num_items=draw(st.sampled_from([None, 7.0, "tensor"])),
        loss_scale=draw(st.sampled_from([1.0, 0.125])),
        softcap=draw(st.sampled_from([None, 4.0])) if source != "logprobs" else None,
        logit_scale=draw(st.sampled_from([1.0, 0.5])) if source != "logprobs" else 1.0,
        bias=draw(st.booleans()) if source == "hidden" else False,
        divergence=draw(st.sampled_from(list(DIVERGENCES))),
        soft=draw(st.booleans()),
    )
    if case.logits == "offset":
        case = replace(case, softcap=None)  # a cap makes all such logits one
    if packed:
        lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(sum))
        case = replace(case, lengths=tuple(lengths))
    return case


@pytest.mark.parametrize("op", SOURCES)
@hypothesis.given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_case_is_near_its_fp64_baseline(op: str, data: st.DataObject, dtype: torch.dtype) -> None:
    case = data.draw(cases(SOURCES[op]))
    assert applies(op, case)
    inputs = build(case, dtype, SOURCES[op])
    expected = Expected.of(op, inputs, dtype)
    hypothesis.assume(_is_settled(inputs, expected.baseline, expected.reference))
    expected.assert_near(run(op, inputs, "cpu"))


def _is_settled(inputs: Inputs, baseline: dict[str, Tensor], reference: dict[str, Tensor]) -> bool:
    """Whether rounding, of log-probs as far off as they may be, cannot choose other tokens."""
    if "loss" not in baseline or "logprobs" not in baseline:
        return are_top_covariances_settled(inputs, inputs.logprobs, 0.0)
    of_tokens = inputs.mask != 0
    exact = baseline["logprobs"][of_tokens]
    error = (reference["logprobs"][of_tokens] - exact).abs().max().item() if len(exact) else 0.0
    return are_top_covariances_settled(inputs, baseline["logprobs"], 2 * error + ATOL[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_covariances_are_told_from_others(dtype: torch.dtype) -> None:
    """Found by chance: two tokens, whose covariances are the same number, in fp32 but for rounding."""
    config = GRPOLossConfig(loss_type="kl_cov", kl_cov_ratio=0.5)
    found = []
    for lengths in ((0, 2), (2, 3)):
        inputs = build(Case("ties", lengths=lengths, vocab=3, advantages="token", config=config), dtype)
        baseline, reference = (run("grpo_loss", x, "torch") for x in (inputs.double(), inputs))
        found.append(_is_settled(inputs, baseline, reference))
    assert found == [False, True]


@hypothesis.given(
    rewards=st.lists(st.one_of(st.just(float("nan")), st.floats(-100, 100, width=32)), min_size=12, max_size=12),
    size=st.sampled_from([1, 2, 3, 4, 6, 12]),
    scale_rewards=st.sampled_from(["group", "batch", "none"]),
)
def test_any_rewards_are_near_their_fp64_baseline(rewards: list[float], size: int, scale_rewards: str) -> None:
    values = torch.tensor(rewards, dtype=torch.float64)
    expected = group_advantages(values, size, scale_rewards=scale_rewards, backend="torch")
    got = group_advantages(values, size, scale_rewards=scale_rewards, backend="cpu")
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert got.isfinite().all()
