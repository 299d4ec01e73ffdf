"""Hidden states of ``T + 1`` positions: position t predicts token t, the last one nothing, as for logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from testing.calls import BACKENDS
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from grpo_kernels import (
    GRPOLossConfig,
    LinearGRPOLoss,
    distillation_loss,
    linear_grpo_loss,
    linear_token_divergence,
    linear_token_logprobs,
    sft_loss,
)

pytestmark = pytest.mark.usefixtures("poison")
B, T, V, H = 3, 5, 17, 8
RNG = torch.Generator().manual_seed(5)
HIDDEN, REFERENCE = torch.randn(B, T + 1, H, generator=RNG), torch.randn(B, T + 1, 4, generator=RNG)
HEAD, REFERENCE_HEAD = torch.randn(V, H, generator=RNG), torch.randn(V, 4, generator=RNG)
IDS, ADVANTAGES = torch.randint(V, (B, T), generator=RNG), torch.randn(B, generator=RNG)
REFERENCE_LOGITS = REFERENCE @ REFERENCE_HEAD.mT
OLD = -2 - torch.rand(B, T, generator=RNG)
MASKS = {
    "ones": torch.ones(B, T),
    "holes": (torch.arange(B * T).view(B, T) % 3 != 1).long(),
    "zeros": torch.zeros(B, T),
}
EXACT = GRPOLossConfig(beta=0.1, kl_estimator="js")
SEQUENCE = GRPOLossConfig(importance_sampling_level="sequence")
COMMON = {"old_logprobs": OLD}


def _loss(**options: Any) -> Callable[..., Tensor]:
    return lambda hidden, head, mask, backend, **others: (
        linear_grpo_loss(hidden, head, IDS, ADVANTAGES, mask, backend=backend, **COMMON, **options, **others).loss
    )


def _logprobs(**options: Any) -> Callable[..., Tensor]:
    def function(hidden: Tensor, head: Tensor, mask: Tensor, backend: str) -> Tensor:
        found = linear_token_logprobs(
            hidden, head, IDS, mask=mask, outputs=("entropy", "is_top1"), backend=backend, **options
        )
        assert found.logprobs.shape == found.entropy.shape == found.is_top1.shape == (B, T)
        return (found.logprobs * OLD).sum() + found.entropy.square().sum()

    return function


def _frozen(hidden: Tensor, head: Tensor, mask: Tensor, backend: str) -> Tensor:
    return (linear_token_logprobs(hidden, head.detach(), IDS, mask=mask, backend=backend).logprobs * OLD).sum()


def _divergence(hidden: Tensor, head: Tensor, mask: Tensor, backend: str) -> Tensor:
    reference = {"reference_hidden_states": REFERENCE[:, : hidden.shape[1]], "reference_lm_head_weight": REFERENCE_HEAD}
    found = linear_token_divergence(hidden, head, ids=IDS, mask=mask, backend=backend, **reference)
    assert found.divergence.shape == found.logprobs.shape == (B, T)
    return (found.divergence * OLD).sum() + found.logprobs.sum()


CALLS: dict[str, Callable[..., Tensor]] = {
    "loss": _loss(),
    "loss_in_blocks": _loss(workspace_bytes=900),
    "loss_of_bounded_rows": _loss(max_live_rows=B * T),
    "sequence_loss": _loss(config=SEQUENCE),
    "exact_loss": _loss(config=EXACT, reference_logits=REFERENCE_LOGITS),
    "logprobs": _logprobs(),
    "logprobs_with_half_saved": _logprobs(max_logits_bytes=400, workspace_bytes=900),
    "logprobs_of_frozen_head": _frozen,
    "divergence": _divergence,
    "sft_loss": lambda hidden, head, mask, backend: sft_loss(hidden, head, IDS, mask, backend=backend),
    "distillation_loss": lambda hidden, head, mask, backend: (
        distillation_loss(
            hidden, head, IDS, mask, teacher_logits=REFERENCE_LOGITS, hard_weight=0.3, backend=backend
        ).loss
    ),
}


def _run(function: Callable[..., Tensor], mask: Tensor, backend: str, cut: bool) -> list[Tensor]:
    hidden, head = HIDDEN.clone().requires_grad_(), HEAD.clone().requires_grad_()
    hidden.data[:, -1] = torch.nan
    loss = function(hidden[:, :-1] if cut else hidden, head, mask, backend)
    loss.backward()
    return [loss.detach(), hidden.grad, head.grad if head.grad is not None else torch.zeros(0)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_the_last_position_is_ignored(name: str, backend: str, mask: str) -> None:
    whole, cut = (_run(CALLS[name], MASKS[mask], backend, cut) for cut in (False, True))
    assert whole[1].shape == HIDDEN.shape and not whole[1][:, -1].any()
    for found, expected in zip(whole, cut, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_nothing_is_learnt_from_the_own_token() -> None:
    """What a user sees who cuts the first position instead of the last: log-probabilities of other positions."""
    right = linear_token_logprobs(HIDDEN, HEAD, IDS).logprobs
    assert torch.equal(right, linear_token_logprobs(HIDDEN[:, :-1], HEAD, IDS).logprobs)
    assert not torch.allclose(right, linear_token_logprobs(HIDDEN[:, 1:], HEAD, IDS).logprobs)


def test_the_module_takes_them() -> None:
    module = LinearGRPOLoss(SEQUENCE)
    results = [module(h, HEAD, IDS, ADVANTAGES, MASKS["holes"], old_logprobs=OLD) for h in (HIDDEN, HIDDEN[:, :-1])]
    assert torch.equal(results[0].loss, results[1].loss) and results[0].logprobs.shape == (B, T)


def test_packed_tokens_have_no_further_position() -> None:
    packed = {"cu_seqlens": torch.tensor([0, 4, 15])}
    arguments = (HEAD, IDS.view(-1), torch.tensor([1.0, -1.0]), MASKS["ones"].view(-1))
    padded = linear_grpo_loss(HIDDEN[:, :-1].reshape(-1, H), *arguments, **packed)
    assert padded.logprobs.shape == (B * T,)
    with pytest.raises(ValueError, match=r"hidden_states must have shape \[15, 8\], got \[18, 8\]"):
        linear_grpo_loss(HIDDEN.view(-1, H), *arguments, **packed)


def test_another_length_is_no_recompilation() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(
        lambda hidden, ids, mask: linear_grpo_loss(hidden, HEAD, ids, ADVANTAGES, mask, backend="cpu").loss,
        backend=counter,
        fullgraph=True,
    )
    for length in (4, 7, 9, 12):
        compiled(torch.randn(B, length + 1, H), torch.zeros(B, length, dtype=torch.int64), torch.ones(B, length))
    assert counter.frame_count == 2  # the second call makes the length a symbol


@pytest.mark.parametrize("name", ["loss", "logprobs_of_frozen_head", "divergence"])
def test_no_copy_of_all_hidden_states_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are contiguous, the passes read the caller's memory."""
    from grpo_kernels.ops.head import driver

    seen = []
    monkeypatch.setattr(
        driver, "token_positions", lambda hidden, tokens: seen.append(hidden) or positions(hidden, tokens)
    )
    hidden = HIDDEN.clone().requires_grad_()
    CALLS[name](hidden, HEAD, MASKS["ones"], "cpu").backward()
    assert seen and all(x.data_ptr() == hidden.data_ptr() for x in seen)


def positions(hidden: Tensor, tokens: int) -> Tensor | None:
    from grpo_kernels.ops.head.selection import token_positions

    return token_positions(hidden, tokens)


@pytest.mark.parametrize("tokens", [0, 1, B * T])
def test_positions_leave_out_the_last_of_each_completion(tokens: int) -> None:
    completions = 1 if tokens < B else B
    rows = torch.arange(tokens + completions).view(completions, -1)
    found = positions(rows.view(-1), tokens)
    assert torch.equal(found, rows[:, :-1].reshape(-1))
    assert positions(torch.zeros(tokens), tokens) is None
