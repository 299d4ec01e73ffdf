"""SFT, DPO and the reward model's loss: against torch's own functions, and numbers worked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from testing.calls import BACKENDS
from torch import Tensor

from grpo_kernels import dpo_loss, linear_token_logprobs, reward_model_loss, sft_loss


def _head() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 5, 4, generator=rng), torch.randn(11, 4, generator=rng)
    ids, mask = torch.randint(11, (3, 5), generator=rng), torch.arange(5) < torch.tensor([[5], [2], [0]])
    return hidden.double().requires_grad_(), weight.double().requires_grad_(), ids, mask


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_sft_is_cross_entropy(reduction: str, backend: str) -> None:
    hidden, weight, ids, mask = _head()
    loss = sft_loss(hidden, weight, ids, mask, reduction=reduction, temperature=0.7, backend=backend)
    logits = hidden @ weight.t() / 0.7
    tokens = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(3, 5)
    expected = tokens[mask].mean()
    if reduction == "sequence_mean":  # a completion without a token does not count
        expected = (tokens[0].mean() + tokens[1, :2].mean()) / 2
    torch.testing.assert_close(loss, expected)
    for got, want in zip(*(torch.autograd.grad(y, (hidden, weight)) for y in (loss, expected)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sft_of_packed_completions_over_many_batches(backend: str) -> None:
    hidden, weight, ids, mask = _head()
    packed = sft_loss(
        hidden[mask], weight, ids[mask], torch.ones(7), cu_seqlens=torch.tensor([0, 5, 7]), num_items_in_batch=70,
        backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(packed, sft_loss(hidden, weight, ids, mask, backend=backend) / 10)


def test_sft_options_are_named() -> None:
    with pytest.raises(ValueError, match="reduction must be one of 'token_mean', 'sequence_mean', got 'sum'"):
        sft_loss(*_head(), reduction="sum")
    with pytest.raises(ValueError, match='num_items_in_batch has no effect with reduction="sequence_mean", got 3'):
        sft_loss(*_head(), reduction="sequence_mean", num_items_in_batch=3)


# log-ratios of the chosen: 1 + 2, of the rejected: -1 and, masked, 50
LOGPROBS = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]], dtype=torch.float64)
REF = torch.tensor([[-2.0, -4.0], [-2.0, -50.0]], dtype=torch.float64)
MASK = torch.tensor([[1, 1], [1, 0]])


@pytest.mark.parametrize(
    ("options", "margin", "eps"),
    [({}, 0.1 * 4, 0.0), ({"beta": 0.5, "label_smoothing": 0.1}, 2.0, 0.1), ({"length_normalized": True}, 0.25, 0.0)],
)
def test_dpo_by_hand(options: dict[str, Any], margin: float, eps: float) -> None:
    leaf = LOGPROBS.clone().requires_grad_()
    out = dpo_loss(leaf, REF, MASK, **options)
    right, wrong = (1 / (1 + math.exp(-h)) for h in (margin, -margin))
    assert out.loss.item() == pytest.approx(-(1 - eps) * math.log(right) - eps * math.log(wrong), rel=1e-12)
    assert (out.chosen_rewards - out.rejected_rewards).item() == pytest.approx(margin, rel=1e-12)
    out.loss.backward()
    slope = options.get("beta", 0.1) * (-(1 - eps) * wrong + eps * right)
    chosen = slope / 2 if options.get("length_normalized") else slope
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, torch.tensor([[chosen, chosen], [-slope, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dpo_from_hidden_states(backend: str) -> None:
    hidden, weight, ids, _ = _head()
    hidden, ids, mask = hidden[:2], ids[:2], torch.ones(2, 5)
    ref = torch.full((2, 5), -2.0, dtype=torch.float64)
    loss = dpo_loss(linear_token_logprobs(hidden, weight, ids, backend=backend).logprobs, ref, mask).loss
    logprobs = torch.log_softmax(hidden @ weight.t(), -1).gather(-1, ids[..., None])[..., 0]
    ratios = (logprobs - ref).sum(-1)
    expected = -torch.nn.functional.logsigmoid(0.1 * (ratios[0] - ratios[1]))
    torch.testing.assert_close(loss, expected)
    for got, want in zip(*(torch.autograd.grad(y, (hidden, weight)) for y in (loss, expected)), strict=True):
        torch.testing.assert_close(got, want)
    packed = dpo_loss(logprobs.flatten(), ref.flatten(), mask.flatten(), cu_seqlens=torch.tensor([0, 5, 10])).loss
    torch.testing.assert_close(packed, expected)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"logprobs": LOGPROBS.long()}, ("logprobs", "float32", "int64")),
        ({"ref_logprobs": REF[:1]}, ("ref_logprobs", "[2, 2]", "[1, 2]")),
        ({"completion_mask": MASK[0]}, ("completion_mask", "[2, 2]", "[2]")),
        ({"logprobs": LOGPROBS[0], "ref_logprobs": REF[0], "completion_mask": MASK[0]}, ("cu_seqlens", "None")),
        ({"beta": 0.0}, ("beta", "greater than 0", "0.0")),
        ({"label_smoothing": 0.5}, ("label_smoothing", "[0, 0.5)", "0.5")),
        (
            {"logprobs": LOGPROBS[:1], "ref_logprobs": REF[:1], "completion_mask": MASK[:1]},
            ("logprobs", "pairs", "1 completions"),
        ),
    ],
    ids=str,
)
def test_bad_input_of_dpo_is_named(arguments: dict[str, Any], parts: tuple[str, ...]) -> None:
    given = {"logprobs": LOGPROBS, "ref_logprobs": REF, "completion_mask": MASK} | arguments
    with pytest.raises((TypeError, ValueError)) as caught:
        dpo_loss(given.pop("logprobs"), given.pop("ref_logprobs"), given.pop("completion_mask"), **given)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_reward_model_loss_by_hand() -> None:
    chosen = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.0, 2.0], dtype=torch.float64, requires_grad=True)
    margins = torch.tensor([0.5, 0.0], dtype=torch.float64)
    loss = reward_model_loss(chosen, rejected, margins=margins, center_coef=0.1)
    expected = (math.log1p(math.exp(-0.5)) + math.log1p(math.exp(1.5)) + 0.1 * (1.0 + 6.25)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.autograd.gradcheck(lambda a, b: reward_model_loss(a, b, margins=margins, center_coef=0.1), (chosen, rejected))
    with pytest.raises(ValueError, match=r"rejected_rewards must have shape \[2\], got \[3\]"):
        reward_model_loss(chosen, torch.ones(3))
    with pytest.raises(ValueError, match=r"chosen_rewards must have shape \[B\], got \[2, 1\]"):
        reward_model_loss(chosen[:, None], rejected[:, None])
