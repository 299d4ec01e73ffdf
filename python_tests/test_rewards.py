"""Rewards less a KL penalty, and masks without truncated completions."""

from __future__ import annotations

import math

import pytest
import torch

from grpo_kernels import kl_penalized_rewards, mask_truncated

LOGPROBS = torch.tensor([[-1.0, -2.0, math.nan], [-1.0, -1.0, -1.0]])
REFERENCE = torch.tensor([[-1.5, -2.25, 0.0], [-1.0, -0.5, -21.0]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


def test_a_completion_pays_for_all_its_tokens() -> None:
    got = kl_penalized_rewards(torch.tensor([1.0, 2.0]), LOGPROBS, REFERENCE, MASK, beta=0.1)
    torch.testing.assert_close(got, torch.tensor([1 - 0.075, 2 - 0.1 * 19.5]))


def test_a_token_pays_for_itself() -> None:
    rewards = torch.tensor([[0.0, 1.0, math.nan], [0.0, 0.0, 2.0]])
    got = kl_penalized_rewards(rewards, LOGPROBS, REFERENCE, MASK, beta=0.1, kl_estimator="k2", kl_clamp=10.0)
    torch.testing.assert_close(got, torch.tensor([[-0.0125, 1 - 0.003125, 0.0], [0.0, -0.0125, 2 - 1.0]]))


def test_packed_completions_pay_alike() -> None:
    flat = [x[:, :2].reshape(-1) for x in (LOGPROBS, REFERENCE, MASK)]
    bounds = torch.tensor([0, 2, 4])
    for estimator in ("k1", "k2", "k3", "abs", "mse"):
        options = {"beta": 0.5, "kl_estimator": estimator}
        padded = kl_penalized_rewards(torch.zeros(2), LOGPROBS[:, :2], REFERENCE[:, :2], MASK[:, :2], **options)
        packed = kl_penalized_rewards(torch.zeros(2), *flat, cu_seqlens=bounds, **options)
        torch.testing.assert_close(packed, padded)


def test_rewards_carry_no_gradient_and_stay_as_they_are() -> None:
    rewards, logprobs = torch.zeros(2), LOGPROBS.clone().requires_grad_()
    got = kl_penalized_rewards(rewards, logprobs, REFERENCE, MASK, beta=1.0)
    assert not got.requires_grad and torch.equal(rewards, torch.zeros(2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kl_estimator": "js"}, "kl_estimator must be one of"),
        ({"kl_clamp": 0.0}, "kl_clamp"),
        ({"beta": -1.0}, "beta must be"),
        ({"beta": math.nan}, "beta must be"),
        ({"rewards": torch.zeros(3)}, "rewards must have shape"),
        ({"ref_logprobs": REFERENCE[:1]}, "ref_logprobs must have shape"),
    ],
)
def test_bad_penalties_are_refused(changes: dict, words: str) -> None:
    arguments = {"rewards": torch.zeros(2), "logprobs": LOGPROBS, "ref_logprobs": REFERENCE, "completion_mask": MASK}
    with pytest.raises(ValueError, match=words):
        kl_penalized_rewards(**arguments | {"beta": 0.1} | changes)


IDS = torch.tensor([[5, 2, 9], [2, 6, 7], [5, 6, 3], [2, 5, 2]])
KEPT = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [0, 0, 0]])


def test_completions_without_an_end_are_masked() -> None:
    got = mask_truncated(IDS, KEPT, 2)
    assert torch.equal(got, torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]])) and got.dtype == KEPT.dtype
    assert torch.equal(mask_truncated(IDS, KEPT, [2, 3])[2], KEPT[2])


def test_packed_completions_are_masked_alike() -> None:
    bounds = torch.tensor([0, 3, 6, 9, 12])
    got = mask_truncated(IDS.view(-1), KEPT.bool().view(-1), (2, 3), cu_seqlens=bounds)
    assert torch.equal(got.view(4, 3), mask_truncated(IDS, KEPT.bool(), (2, 3)))
    got = mask_truncated(IDS[:2].reshape(-1), torch.ones(6), 2, cu_seqlens=torch.tensor([0, 2, 2, 6]))  # one is empty
    assert torch.equal(got, torch.tensor([1.0, 1, 0, 0, 0, 0]))


def test_no_end_is_refused() -> None:
    for none in ([], None, 2.5, [2.5]):
        with pytest.raises((ValueError, TypeError), match=r"eos_token_id|iterable"):
            mask_truncated(IDS, KEPT, none)
