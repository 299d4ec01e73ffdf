"""What a call makes a device do: kernels that it launches and numbers that it is sent, counted on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_kernels import GRPOLossConfig, grpo_loss, validation

#: Kernels of the registered ops.
OWN = {"grpo_loss_fwd_cpu": 1, "policy_loss_fwd_cpu": 2, "scale_cpu": 1, "token_logprobs_fwd_cpu": 1,
       "token_logprobs_bwd_cpu": 1}  # fmt: skip
ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
#: How a number, or a tensor of the host, becomes a tensor.
COPIES = ("_to_copy", "copy_", "lift_fresh", "scalar_tensor")


class Launches(TorchDispatchMode):
    """Keeps the names of the ops that run a kernel, each as often as it has kernels, and of the copies."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[str] = []
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)
        if not is_view and name not in ALLOCATIONS:
            self.kernels += [name] * (OWN[name] if func.namespace == "grpo_kernels" else 1)
        if name in COPIES:
            self.copies.append(name)
        return func(*args, **(kwargs or {}))


def _step(mask_dtype: torch.dtype, **options: Any) -> Callable[[], Tensor]:
    logits, old = torch.randn(4, 6, 16, requires_grad=True), torch.randn(4, 6)
    ids, mask = torch.randint(16, (4, 6)), torch.ones(4, 6, dtype=mask_dtype)
    advantages = torch.randn(4)

    def step() -> Tensor:
        loss = grpo_loss(logits, ids, advantages, mask, old_logprobs=old, backend="cpu", **options).loss
        loss.backward()
        logits.grad = None
        return loss

    return step


def _launches(step: Callable[[], Tensor]) -> Launches:
    """Of a call whose values are not read, as on a GPU; the first makes what is kept."""
    with mock.patch.object(validation, "may_read", lambda *_: False):
        step()
        with Launches() as launches:
            step()
    return launches


@pytest.mark.parametrize("options", [{}, {"loss_scale": 0.5}, {"num_items_in_batch": torch.tensor(17.0)}], ids=str)
@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "cispo", "luspo", "grpo", "sapo"])
def test_a_step_launches_at_most_eight_kernels(loss_type: str, options: dict[str, Any]) -> None:
    """Rows, the policy loss in two, the scaling of the gradient; the mask, its sum, its inverse, autograd's first 1."""
    launches = _launches(_step(torch.int64, config=GRPOLossConfig(loss_type=loss_type), **options))
    assert len(launches.kernels) <= 8, launches.kernels


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_items_in_batch": 17.0, "loss_scale": 0.5},
        {"config": GRPOLossConfig(loss_type="dr_grpo", max_completion_length=8, entropy_coef=0.1)},
        {"config": GRPOLossConfig(loss_agg_mode="seq-mean-token-sum")},
        {"config": GRPOLossConfig(importance_sampling_level="sequence_token")},
    ],
    ids=str,
)
def test_no_number_of_the_host_becomes_a_tensor_by_a_copy(options: dict[str, Any]) -> None:
    assert _launches(_step(torch.int64, **options)).copies == []
