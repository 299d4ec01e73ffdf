"""TRL's head and a clipped loss over it, forward and backward: stock, and with our kernels as GRPOTrainer runs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl.trainer import utils as trl_utils

from grpo_kernels import GRPOLossConfig
from grpo_kernels.integrations import trl as drop_in
from grpo_kernels.integrations.trl.head import Expected
from grpo_kernels.loss.inputs import PolicyInputs
from grpo_kernels.ops.head.speculation import ExpectedLoss

#: What GRPOTrainer asks its head for.
OUTPUTS = ("log_probs", "entropy")


class HeadStep:
    """A head of random weights over ``positions``, of which ``counted`` count in the loss, in 8 completions.

    Args:
        positions: Rows of hidden states.
        counted: How many of them the loss reads.
        hidden_size: H.
        vocab: V.
        dtype: Of hidden states and head.
        device: Where.
    """

    def __init__(
        self, positions: int, counted: int, hidden_size: int, vocab: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        torch.manual_seed(0)
        self.counted, self.device = counted, device
        self.hidden = torch.empty(positions, hidden_size, dtype=dtype, device=device).normal_(0, 0.3)
        self.weight = torch.empty(vocab, hidden_size, dtype=dtype, device=device).normal_(0, 0.05)
        self.targets = torch.randint(0, vocab, (positions,), device=device)
        self.mask = torch.zeros(positions, dtype=torch.bool, device=device)
        self.mask[torch.randperm(positions, device=device)[:counted]] = True
        self.advantages = torch.randn(8, device=device)[torch.arange(counted, device=device) * 8 // counted]
        self.original = trl_utils._ChunkedLogProbFunction
        self.original = getattr(self.original, "original", self.original)  # where our kernels are applied already

    def gemms(self) -> None:
        """The three products that no head can go without."""
        rows = self.hidden[self.mask]
        logits = rows @ self.weight.t()
        _ = logits @ self.weight, logits.t() @ rows

    def stock(self, advantages: Tensor, select: bool = True) -> None:
        """TRL's own head; ``select``: on the counted rows alone, as TRL does on a GPU."""
        self._step(self.original, advantages, select)

    def ours(self, advantages: Tensor, expect: bool = True, max_logits_bytes: int | None = None) -> None:
        """Our head, within ``drop_in.apply``; ``expect``: the loss is known before, as it is to GRPOTrainer."""
        with self._published(advantages if expect else None, max_logits_bytes):
            self._step(trl_utils._ChunkedLogProbFunction, advantages, select=True)

    def naive(self, advantages: Tensor) -> None:
        """All logits at once, as without a fused head."""
        x, w = (values.detach().requires_grad_() for values in (self.hidden, self.weight))
        logits = (x[self.mask] @ w.t()).float()
        targets = self.targets[self.mask, None]
        self._loss(torch.log_softmax(logits, -1).gather(-1, targets)[:, 0], advantages).backward()

    def _step(self, function: Any, advantages: Tensor, select: bool) -> None:
        x, w = (values.detach().requires_grad_() for values in (self.hidden, self.weight))
        rows, ids = (x[self.mask], self.targets[self.mask]) if select else (x, self.targets)
        logprobs, *_ = function.apply(rows, w, None, ids, 1.0, 32768, None, 1.0, OUTPUTS)
        self._loss(logprobs if select else logprobs[self.mask], advantages).backward()

    def _loss(self, logprobs: Tensor, advantages: Tensor) -> Tensor:
        ratio = torch.exp(logprobs - logprobs.detach())
        return -(torch.minimum(ratio, ratio.clamp(0.8, 1.2)) * advantages).sum() / self.counted

    @contextmanager
    def _published(self, advantages: Tensor | None, max_logits_bytes: int | None) -> Iterator[None]:
        """What GRPOTrainer's hook says of the loss before the head runs; nothing without advantages."""
        expected = drop_in._EXPECTED.set(None if advantages is None else self._expected(advantages))
        within = None
        if max_logits_bytes is not None:
            within = drop_in._WITHIN.set(drop_in.Settings(max_logits_bytes=max_logits_bytes))
        try:
            yield
        finally:
            drop_in._EXPECTED.reset(expected)
            if within is not None:
                drop_in._WITHIN.reset(within)

    def _expected(self, advantages: Tensor) -> Expected:
        ids = torch.zeros(1, self.counted, dtype=torch.int64, device=self.device)
        every, config = torch.ones(1, self.counted, device=self.device), GRPOLossConfig()
        inputs = PolicyInputs.of(
            ids, torch.float32, advantages[None], every, num_items_in_batch=None, cu_seqlens=None, loss_scale=1.0,
            config=config, debug=False,
        )  # fmt: skip
        return Expected(
            every[0] != 0, None, ExpectedLoss.of(inputs, config, torch.arange(self.counted, device=self.device))
        )
