"""What was once wrong at the edges of the domain: each test fails without its fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from testing.calls import BACKENDS
from torch import Tensor

from grpo_kernels import (
    GRPOLossConfig,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    policy_loss,
    token_divergence,
    token_logprobs,
)
from grpo_kernels.ops.registration import lazy_import


def _problem(batch: int = 2, length: int = 3, vocab: int = 11) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, length, vocab, generator=generator)
    ids = torch.randint(0, vocab, (batch, length), generator=generator)
    return logits, ids, torch.linspace(-1, 1, batch), torch.ones(batch, length)


@pytest.fixture(params=[0, 1, 2])
def simd_level(request: pytest.FixtureRequest) -> Iterator[int]:
    ops = torch.ops.grpo_kernels
    widest = ops.cpu_simd_level()
    if request.param > widest:
        pytest.skip(f"this processor has level {widest}")
    ops.cpu_limit_simd_level(request.param)
    yield request.param
    ops.cpu_limit_simd_level(widest)


def test_in_place_refuses_logits_that_overlap_themselves() -> None:
    logits, ids, advantages, mask = _problem()
    for overlapping in (logits[:1].expand(2, 3, 11), logits.flatten().as_strided((2, 3, 11), (33, 5, 1))):
        with pytest.raises(ValueError, match="logits must not overlap itself for inplace=True, got strides"):
            grpo_loss(overlapping, ids, advantages, mask, inplace=True)
        with pytest.raises(ValueError, match="logits must not overlap itself for inplace_backward=True"):
            token_logprobs(overlapping, ids, inplace_backward=True)


def test_in_place_refuses_a_last_dimension_with_gaps() -> None:
    logits, ids, advantages, mask = _problem()
    with pytest.raises(ValueError, match="logits must have a dense last dimension for inplace=True"):
        grpo_loss(logits.mT.contiguous().mT, ids, advantages, mask, inplace=True)


def _losses() -> dict[str, Any]:
    logits, ids, advantages, mask = _problem()
    hidden, head = torch.randn(2, 3, 4), torch.randn(11, 4)
    old = torch.full((2, 3), -2.0)
    return {
        "token_logprobs": (logits, lambda x: token_logprobs(x, ids, backend="cpu").logprobs.sum()),
        "policy_loss": (old, lambda x: policy_loss(x, advantages, mask, old_logprobs=old, backend="cpu").loss),
        "grpo_loss": (logits, lambda x: grpo_loss(x, ids, advantages, mask, backend="cpu").loss),
        "linear_grpo_loss": (hidden, lambda x: linear_grpo_loss(x, head, ids, advantages, mask, backend="cpu").loss),
        "linear_token_logprobs": (
            hidden,
            lambda x: linear_token_logprobs(x, head, ids, backend="cpu").logprobs.sum(),
        ),
    }


@pytest.mark.parametrize("op", _losses())
def test_a_double_backward_is_refused(op: str) -> None:
    values, loss = _losses()[op]
    leaf = values.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="kernels differentiate once"):
        torch.autograd.grad(loss(leaf), leaf, create_graph=True)


@pytest.mark.parametrize("op", ["grpo_loss", "linear_grpo_loss"])
def test_a_second_backward_is_refused_under_saved_tensor_hooks(op: str) -> None:
    values, loss = _losses()[op]
    leaf = values.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        value = loss(leaf)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward is refused"):
        value.backward()


@pytest.mark.parametrize("payload", [0x7FC00000, 0x7FFFFFFF, 0x7FC00001, 0x7F800001])
@pytest.mark.parametrize("column", [3, 16, 40])
def test_any_nan_stays_one(payload: int, column: int, simd_level: int) -> None:
    logits, ids, advantages, mask = _problem(vocab=41)
    logits[1, 2, column] = torch.tensor([payload], dtype=torch.int32).view(torch.float32)
    leaf = logits.requires_grad_()
    out = grpo_loss(leaf, ids, advantages, mask, backend="cpu")
    out.loss.backward()
    assert out.logprobs[1, 2].isnan() and out.entropy[1, 2].isnan() and out.loss.isnan()
    assert leaf.grad[1, 2].isnan().any()
    assert out.logprobs.isnan().sum() == 1


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_on_policy_reaches_the_loss(backend: str, level: str) -> None:
    logits, ids, advantages, mask = _problem()
    logits[1, 2, 4] = float("nan")
    config = GRPOLossConfig(importance_sampling_level=level)
    out = grpo_loss(logits.requires_grad_(), ids, advantages, mask, config=config, backend=backend)
    out.loss.backward()
    assert out.loss.isnan() and logits.grad[1, 2].isnan().any()
    assert not logits.grad[0].isnan().any()


@pytest.mark.parametrize("option", [{"logit_scale": 0.0}, {"logit_scale": float("nan")}, {"softcap": float("inf")}])
def test_a_transform_that_forgets_the_logits_is_refused(option: dict[str, float]) -> None:
    logits, ids, *_ = _problem()
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} must be"):
        token_logprobs(logits, ids, **option)
    with pytest.raises(ValueError, match="temperature must be finite"):
        token_logprobs(logits, ids, temperature=float("inf"))


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_a_negative_scale_is_refused(softcap: float | None) -> None:
    logits, ids, advantages, mask = _problem()
    refusal = r"logit_scale must be finite and greater than 0, got -0\.3"
    for op, arguments in ((token_logprobs, ()), (grpo_loss, (advantages, mask))):
        with pytest.raises(ValueError, match=f"^{refusal}"):
            op(logits, ids, *arguments, softcap=softcap, logit_scale=-0.3)
    with pytest.raises(ValueError, match=f"^reference_{refusal}"):
        token_divergence(
            logits, logits, divergence="js", ids=ids, reference_softcap=softcap, reference_logit_scale=-0.3
        )


def test_a_transposed_head_gets_its_gradient_scaled() -> None:
    _, ids, advantages, mask = _problem()
    hidden, transposed = torch.randn(2, 3, 4), torch.randn(4, 11)

    def gradient(head: Tensor) -> Tensor:
        head = head.detach().requires_grad_()
        (2 * linear_grpo_loss(hidden, head, ids, advantages, mask, backend="cpu").loss).backward()
        return head.grad

    torch.testing.assert_close(gradient(transposed.t()), gradient(transposed.t().contiguous()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_has_a_zero_loss(backend: str) -> None:
    logits, ids, advantages, mask = _problem(batch=0)
    out = grpo_loss(logits.requires_grad_(), ids, advantages, mask, backend=backend)
    out.loss.backward()
    assert out.loss == 0 and logits.grad.shape == logits.shape
    assert all(value == 0 for value in out.metrics.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_cu_seqlens_may_be_strided(backend: str) -> None:
    logprobs, advantages = torch.full((4,), -1.0), torch.tensor([1.0, -2.0])
    strided = torch.tensor([0, 9, 1, 9, 4])[::2]
    out = policy_loss(logprobs, advantages, torch.ones(4), cu_seqlens=strided, backend=backend)
    torch.testing.assert_close(out.loss, torch.tensor(-(1.0 - 2.0 * 3) / 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_advantage_means_no_term_whatever_the_ratio(backend: str) -> None:
    logits, ids, _, mask = _problem()
    old = torch.full((2, 3), -1.0)
    old[0] = -200.0  # exp(198) is infinite in fp32
    advantages = torch.tensor([0.0, 1.0])
    out = grpo_loss(logits.requires_grad_(), ids, advantages, mask, old_logprobs=old, backend=backend)
    out.loss.backward()
    assert out.loss.isfinite() and logits.grad.isfinite().all()
    assert not logits.grad[0].any() and logits.grad[1].any()


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("level", ["sequence", "sequence_token"])
def test_on_policy_sequence_level_needs_one_pass(level: str, beta: float) -> None:
    """Its coefficients are known before the logits, so the gradient is there after the forward."""
    logits, ids, advantages, mask = _problem()
    mask[1, 2] = 0
    config = GRPOLossConfig(
        loss_type="grpo", importance_sampling_level=level, beta=beta, use_bias_correction_kl=level != "sequence"
    )
    arguments = {"ref_logprobs": torch.full((2, 3), -2.0), "rollout_is_weights": torch.rand(2, 3), "config": config}
    leaf = logits.clone().requires_grad_()
    out = grpo_loss(leaf, ids, advantages, mask, inplace=True, backend="cpu", **arguments)
    assert not torch.equal(leaf.detach(), logits)  # written by the forward
    out.loss.backward()
    reference_leaf = logits.clone().requires_grad_()
    reference = grpo_loss(reference_leaf, ids, advantages, mask, backend="torch", **arguments)
    reference.loss.backward()
    torch.testing.assert_close(out.loss, reference.loss)
    torch.testing.assert_close(leaf.grad, reference_leaf.grad)
    for name, value in reference.metrics.items():
        torch.testing.assert_close(out.metrics[name], value)


@pytest.mark.parametrize("items", [-1, float("nan"), torch.ones(3)])
def test_num_items_in_batch_is_one_number(items: Any) -> None:
    with pytest.raises(ValueError, match="num_items_in_batch must be"):
        policy_loss(torch.zeros(2, 3), torch.ones(2), torch.ones(2, 3), num_items_in_batch=items)


def test_raw_ops_refuse_tensors_that_are_too_short() -> None:
    logits, ids, _, mask = _problem()
    of_tokens, of_completions, one = torch.ones(1, 6), torch.ones(2), torch.ones(())
    mask = mask.bool().flatten()
    code = GRPOLossConfig().code()
    group = (None, 1, False, 0.0)
    rest = (*group, code.options, code.params, 1.0, 0.0, 1.0, None)
    none = (None, None, None, None)
    op = torch.ops.grpo_kernels.grpo_loss_fwd_cpu
    for advantages, weights in ((of_tokens, one), (of_completions, of_completions), (one, of_tokens)):
        op(logits, ids, mask, None, advantages, weights, *none, *rest)
    with pytest.raises(RuntimeError):
        op(logits, ids, mask[:5], None, of_tokens, one, *none, *rest)
    with pytest.raises(RuntimeError):
        op(logits, ids, mask, None, of_tokens.double(), one, *none, *rest)
    for advantages in (of_tokens[:, :5], torch.ones(6), torch.ones(1)):
        with pytest.raises(RuntimeError):
            op(logits, ids, mask, None, advantages, one, *none, *rest)
    with pytest.raises(RuntimeError, match="token 5 is of completion 2 of 2"):
        sequence_ids = torch.tensor([0, 0, 0, 1, 1, 2], dtype=torch.int32)
        op(logits, ids, mask, sequence_ids, of_completions, one, *none, *rest)
    with pytest.raises(RuntimeError):
        op(logits, ids, mask, None, of_tokens, one, of_tokens[:, :5], None, None, None, *rest)
    with pytest.raises(RuntimeError):
        op(logits[:, :2], ids, mask, None, of_tokens, one, *none, *rest)
    with pytest.raises(ValueError):
        op(logits, ids, mask, None, of_tokens, one, *none, *group, [0], *rest[5:])
    with pytest.raises(RuntimeError):
        op(logits, ids, mask, None, None, one, *none, *rest)


def test_rewards_are_named_when_they_are_too_many() -> None:
    logits, ids, _, mask = _problem()
    with pytest.raises(ValueError, match=r"rewards must have a row for each of the 2 completions, got \[4\]"):
        grpo_loss(logits, ids, None, mask, rewards=torch.arange(4.0), num_generations=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_rewards_are_the_same_however_offsets_are_stored(dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    logits, ids, mask = torch.randn(7, 11), torch.randint(11, (7,)), torch.ones(7)
    offsets = torch.tensor([0, 9, 3, 9, 3, 9, 5, 9, 7, 9], dtype=dtype)[::2]  # an empty completion among them
    rewards = torch.tensor([1.0, 9.0, 2.0, 9.0, -1.0, 9.0, 0.0, 9.0])[::2]
    grads = []
    for values in ({"rewards": rewards, "num_generations": 2}, {}):
        leaf = logits.clone().requires_grad_()
        advantages = None if values else group_advantages(rewards, 2, backend="torch")
        out = grpo_loss(leaf, ids, advantages, mask, cu_seqlens=offsets, backend=backend, **values)
        out.loss.backward()
        grads.append(leaf.grad)
    assert grads[1].any()
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("op", ["token_logprobs", "linear_token_logprobs", "grpo_loss", "linear_grpo_loss"])
def test_tokens_may_lie_apart(op: str, is_masked: bool, backend: str) -> None:
    """Ids and masks with gaps, and the gradient of a sum, which is one number spread."""
    torch.manual_seed(0)
    hidden, weight, ids = torch.randn(7, 4), torch.randn(11, 4), torch.randint(11, (7,))
    mask = torch.tensor([1, 0, 1, 1, 1, 0, 1]) if is_masked else torch.ones(7, dtype=torch.long)
    advantages, offsets = torch.tensor([1.0, -1.0]), torch.tensor([0, 3, 7])
    functions = {f.__name__: f for f in (token_logprobs, linear_token_logprobs, grpo_loss, linear_grpo_loss)}
    grads = []
    for t, m in ((ids, mask), [torch.stack([x, x + 1], 1)[:, 0] for x in (ids, mask)]):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        inputs = (x, w) if op.startswith("linear") else (x @ w.t(),)
        if op.endswith("logprobs"):
            out = functions[op](*inputs, t, mask=m if is_masked else None, outputs=("entropy",), backend=backend)
            (out.logprobs.sum() - out.entropy.sum()).backward()
        else:
            functions[op](*inputs, t, advantages, m, cu_seqlens=offsets, backend=backend).loss.backward()
        grads.append((x.grad, w.grad))
    torch.testing.assert_close(grads[0], grads[1])
    assert grads[0][1].any()


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever device is current."""
    entered: list[torch.device] = []

    class Module:
        @staticmethod
        @contextmanager
        def device(device: torch.device) -> Iterator[None]:
            entered.append(device)
            yield

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    second = SimpleNamespace(device=torch.device("cuda:1"))
    assert lazy_import("operator", "is_")(second, second) and entered == [second.device]
