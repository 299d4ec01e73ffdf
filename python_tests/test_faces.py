"""What a new user meets first: how functions may be called, and how what they return prints itself."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from testing.calls import BACKENDS
from torch import Tensor
from torch.nn.functional import cross_entropy

from grpo_kernels import (
    GRPOLoss,
    GRPOLossConfig,
    LinearGRPOLoss,
    PolicyMetrics,
    dpo_loss,
    group_advantages,
    grpo_loss,
    kl_penalized_rewards,
    linear_grpo_loss,
    linear_token_logprobs,
    mask_truncated,
    policy_loss,
    reward_model_loss,
    sft_loss,
    token_logprobs,
)

B, T, V, H = 4, 5, 11, 6
RNG = torch.Generator().manual_seed(3)
LOGITS, HIDDEN = torch.randn(B, T, V, generator=RNG), torch.randn(B, T, H, generator=RNG)
HEAD, IDS = torch.randn(V, H, generator=RNG), torch.randint(V, (B, T), generator=RNG)
LOGPROBS, OLD = -torch.rand(B, T, generator=RNG), -torch.rand(B, T, generator=RNG)
MASK = torch.rand(B, T, generator=RNG) < 0.7
LABELS = torch.where(torch.rand(B, T, generator=RNG) < 0.7, IDS, -100)
BOUNDS = (0, 0, 3, 11, 11, 20)  # of packed completions, empty ones among them


def test_metrics_print_their_values() -> None:
    metrics = policy_loss(LOGPROBS, torch.ones(B), MASK, old_logprobs=OLD).metrics
    assert eval(repr(metrics), {"PolicyMetrics": dict}) == {
        name: pytest.approx(value.item(), rel=1e-5) for name, value in metrics.items()
    }
    assert repr(PolicyMetrics(torch.zeros(10, device="meta"), ("kl", "entropy"))) == "PolicyMetrics(kl, entropy)"
    assert repr(PolicyMetrics(torch.zeros(10), ())) == "PolicyMetrics({})"
    with pytest.raises(KeyError, match=r"'kl' is no metric of this loss, which has 'clip_ratio/low_mean'"):
        metrics["kl"]


def _gradients(loss: Any, *leaves: Tensor) -> list[Tensor]:
    leaves = tuple(x.clone().requires_grad_() for x in leaves)
    value = loss(*leaves)
    value.backward()
    return [value.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_labels_are_those_of_hugging_face(backend: str, reduction: str) -> None:
    """Position t predicts label t + 1, and -100 excludes a token."""
    options = {"reduction": reduction, "backend": backend}
    found = _gradients(lambda h, w: sft_loss(h, w, labels=LABELS, **options), HIDDEN, HEAD)
    ids, mask = LABELS[:, 1:], LABELS[:, 1:] != -100
    expected = _gradients(lambda h, w: sft_loss(h[:, :-1], w, ids, mask, **options), HIDDEN, HEAD)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    if reduction == "token_mean":
        mean = cross_entropy((HIDDEN @ HEAD.mT)[:, :-1].reshape(-1, V), ids.reshape(-1), ignore_index=-100)
        torch.testing.assert_close(found[0], mean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_labels_do_not_reach_into_the_next_completion(backend: str) -> None:
    bounds, labels, hidden = torch.tensor(BOUNDS, dtype=torch.int32), LABELS.view(-1), HIDDEN.view(-1, H)
    found = sft_loss(hidden, HEAD, labels=labels, cu_seqlens=bounds, backend=backend)
    losses = [
        cross_entropy(hidden[a : b - 1] @ HEAD.mT, labels[a + 1 : b], ignore_index=-100, reduction="none")
        for a, b in pairwise(BOUNDS)
        if b > a
    ]
    count = sum(int((labels[a + 1 : b] != -100).sum()) for a, b in pairwise(BOUNDS))
    torch.testing.assert_close(found, torch.cat(losses).sum() / count)


@pytest.mark.parametrize("bounds", [None, torch.tensor(BOUNDS)], ids=["padded", "packed"])
def test_labels_and_further_positions_trace_whole(bounds: Tensor | None) -> None:
    shape = (B, T) if bounds is None else (B * T,)
    hidden, labels = HIDDEN.view(*shape, H), LABELS.view(shape)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return sft_loss(hidden, head, labels=labels, cu_seqlens=bounds)

    expected, found = _gradients(loss, hidden, HEAD), _gradients(_compiled(loss), hidden, HEAD)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def _compiled(function: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
@pytest.mark.parametrize("backend", BACKENDS)
def test_integers_are_rewards_and_advantages(backend: str, dtype: torch.dtype) -> None:
    values = torch.tensor([0, 1, 1, 0])
    pairs: list[Any] = [
        lambda r: group_advantages(r, 2, backend=backend),
        lambda r: policy_loss(LOGPROBS, r, MASK, backend=backend).loss,
        lambda r: grpo_loss(LOGITS, IDS, r, MASK, backend=backend).loss,
        lambda r: grpo_loss(LOGITS, IDS, None, MASK, rewards=r, num_generations=2, backend=backend).loss,
        lambda r: linear_grpo_loss(HIDDEN, HEAD, IDS, None, MASK, rewards=r, num_generations=2, backend=backend).loss,
        lambda r: kl_penalized_rewards(r, LOGPROBS, OLD, MASK, beta=0.1),
        lambda r: reward_model_loss(r, ~r if r.dtype == torch.bool else 1 - r),
    ]
    for function in pairs:
        assert torch.equal(function(values.to(dtype)), function(values.float()))


@pytest.mark.parametrize("name", ["entropy", "is_top1"])
def test_one_output_is_a_name(name: str) -> None:
    for found, expected in (
        (token_logprobs(LOGITS, IDS, outputs=name), token_logprobs(LOGITS, IDS, outputs=(name,))),
        (
            linear_token_logprobs(HIDDEN, HEAD, IDS, outputs=name),
            linear_token_logprobs(HIDDEN, HEAD, IDS, outputs=[name]),
        ),
    ):
        assert [x is None for x in found] == [x is None for x in expected]
        assert torch.equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float16])
def test_a_mask_of_truncated_completions_has_the_dtype_of_the_mask(dtype: torch.dtype) -> None:
    masked = mask_truncated(torch.tensor([[5, 2], [5, 6]]), torch.ones(2, 2, dtype=dtype), 2)
    assert masked.dtype == dtype and masked.tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize("items", [0, torch.tensor(0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_without_a_token_has_no_items(items: Any, backend: str) -> None:
    """As where all completions of a step were truncated: a loss of 0, whatever lies under the mask, also with debug."""
    nan = torch.full((B, T), torch.nan)
    options = {"old_logprobs": nan, "num_items_in_batch": items, "debug": True, "backend": backend}
    assert policy_loss(LOGPROBS, nan[:, 0], torch.zeros(B, T), **options).loss == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"loss_type": "bnpo"},
        {"loss_type": "ppo"},
        {"loss_type": "grpo"},
        {"loss_type": "dapo", "loss_agg_mode": "seq-mean-token-mean"},
    ],
)
def test_no_items_are_refused_only_where_the_loss_divides_by_them(fields: dict[str, Any]) -> None:
    config = GRPOLossConfig(**fields)
    losses = [policy_loss(LOGPROBS, torch.ones(B), MASK, num_items_in_batch=n, config=config).loss for n in (0, None)]
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match="num_items_in_batch must be greater than 0"):
        policy_loss(LOGPROBS, torch.ones(B), MASK, num_items_in_batch=0)


def test_truth_values_of_numpy_are_flags() -> None:
    for flag in (np.True_, np.False_):
        config = GRPOLossConfig(use_bias_correction_kl=flag)
        assert config.use_bias_correction_kl is bool(flag) and config == GRPOLossConfig(
            use_bias_correction_kl=bool(flag)
        )
        assert GRPOLoss(inplace=flag).options == {"inplace": bool(flag)}
        losses = [
            grpo_loss(LOGITS.clone(), IDS, torch.ones(B), MASK, inplace=value, debug=value).loss
            for value in (flag, bool(flag))
        ]
        assert torch.equal(*losses)


@pytest.mark.parametrize("ids", [
    np.int64(2), [np.int64(2), np.int32(3)], np.array([2, 3]), np.array(2), torch.tensor([2, 3]), [torch.tensor(2)],
])  # fmt: skip
def test_an_end_of_text_token_is_whatever_is_an_index(ids: Any) -> None:
    assert mask_truncated(torch.tensor([[5, 2], [5, 6]]), torch.ones(2, 2), ids).tolist() == [[1, 1], [0, 0]]


def test_modules_take_fields_of_the_configuration() -> None:
    arguments = (IDS, torch.ones(B), MASK)
    config = GRPOLossConfig(loss_type="grpo", epsilon_high=0.28)
    for module in (GRPOLoss(loss_type="grpo", epsilon_high=0.28), GRPOLoss(config), GRPOLoss(config, loss_scale=1.0)):
        assert module.config == config
        assert torch.equal(module(LOGITS, *arguments).loss, grpo_loss(LOGITS, *arguments, config=config).loss)
    module = LinearGRPOLoss(config, epsilon_high=0.3, workspace_bytes=1 << 20)
    assert module.config == replace(config, epsilon_high=0.3) and module.options == {"workspace_bytes": 1 << 20}
    shown = "GRPOLossConfig(loss_type='grpo', epsilon_high=0.3), workspace_bytes=1048576"
    assert repr(module) == f"LinearGRPOLoss({shown})"
    other = GRPOLossConfig(loss_type="bnpo")
    given = module(HIDDEN, HEAD, *arguments, config=other).loss
    assert torch.equal(given, linear_grpo_loss(HIDDEN, HEAD, *arguments, config=other).loss)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "beta": 0.3}, {"length_normalized": True}])
def test_pairs_are_one_batch_or_four_tensors(options: dict[str, Any]) -> None:
    half = B // 2

    def parts(logprobs: Tensor, reference: Tensor) -> Any:
        return dpo_loss(
            chosen_logprobs=logprobs[:half],
            rejected_logprobs=logprobs[half:, : T - 1],  # of another length
            ref_chosen_logprobs=reference[:half],
            ref_rejected_logprobs=reference[half:, : T - 1],
            chosen_mask=mask[:half],
            rejected_mask=mask[half:, : T - 1],
            **options,
        )

    mask = MASK.clone()
    mask[half:, T - 1 :] = False
    found = _gradients(lambda x: parts(x, OLD).loss, LOGPROBS)
    expected = _gradients(lambda x: dpo_loss(x, OLD, mask, **options).loss, LOGPROBS)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    if "length_normalized" not in options:
        policy, reference = (torch.where(mask, x, 0).sum(1).chunk(2) for x in (LOGPROBS, OLD))
        names = ("chosen_logprobs", "rejected_logprobs", "ref_chosen_logprobs", "ref_rejected_logprobs")
        sums = dict(zip(names, (*policy, *reference), strict=True))
        for a, b in zip(dpo_loss(**sums, **options), dpo_loss(LOGPROBS, OLD, mask, **options), strict=True):
            torch.testing.assert_close(a, b)


def test_a_configuration_shows_what_was_set() -> None:
    assert repr(GRPOLossConfig()) == "GRPOLossConfig()"
    config = GRPOLossConfig(epsilon_high=0.28, beta=0.1)
    assert repr(config) == "GRPOLossConfig(epsilon_high=0.28, beta=0.1)" and eval(repr(config)) == config
    for same in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), replace(config)):
        assert same == config and hash(same) == hash(config)
    with pytest.raises(TypeError, match=r"no field 'epsilon': did you mean epsilon_low=\.\.\. or .*\.trl\("):
        replace(config, epsilon=0.1)


def test_every_framework_is_named_for_its_own_option() -> None:
    for name, framework in (("epsilon", "trl"), ("clip_ratio_c", "verl"), ("ratio_clip_max", "nemo_rl")):
        with pytest.raises(TypeError, match=rf"GRPOLossConfig\.{framework}\({name}=\.\.\.\)"):
            GRPOLossConfig(**{name: 0.1})


def test_what_apply_returns_shows_what_it_holds() -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    from grpo_kernels.integrations.trl import Applied, Settings

    assert repr(Applied(Settings(backend="cpu"))) == (
        "Applied(Settings(speculate=True, max_logits_bytes=None, workspace_bytes=None, backend='cpu', "
        "counts=Counts(hits=0, misses=0, rows=0, live=0)))"
    )
