"""Errors of heads against fp64, beside those of whole fp32 logits on the same bf16 inputs.

On a GPU the log-probs of the whole logits come from the GEMM that heads use, of bf16 into fp32: tensor cores cut off
digits as they add, so that it is less exact than one in fp32, whoever calls it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from providers import GPU_BACKENDS
from torch import Tensor

from grpo_kernels import linear_token_logprobs

HALF, SINGLE = torch.bfloat16, torch.float32


def accuracy(tokens: int, head: tuple[int, int], device: torch.device, backend: str) -> list[dict[str, Any]]:
    """A backend's errors against fp64 on the same bf16 hidden states and weight, beside those of whole fp32 logits."""
    torch.manual_seed(0)
    hidden_size, vocab = head
    hidden = torch.empty(1, tokens, hidden_size, dtype=HALF, device=device).normal_()
    weight = torch.empty(vocab, hidden_size, dtype=HALF, device=device).normal_(0, 2 / hidden_size**0.5)
    ids = torch.randint(vocab, hidden.shape[:2], device=device)

    def plain(dtype: torch.dtype, x: Tensor, w: Tensor) -> Tensor:
        return torch.log_softmax(x.to(dtype) @ w.to(dtype).t(), -1).gather(-1, ids[..., None])[..., 0]

    found = []
    for dtype, function in (
        (torch.float64, partial(plain, torch.float64)),
        (HALF, partial(plain, SINGLE)),
        (HALF, lambda x, w: linear_token_logprobs(x, w, ids, backend=backend).logprobs),
    ):
        x, w = (values.detach().to(dtype).requires_grad_() for values in (hidden, weight))
        logprobs = function(x, w)
        found.append([y.double() for y in (logprobs.detach(), *torch.autograd.grad(logprobs.sum(), (x, w)))])
    baseline, whole, ours = found
    if device.type == "cuda":
        logits = torch.mm(hidden[0], weight.t(), out_dtype=SINGLE)
        whole[0] = torch.log_softmax(logits, -1).gather(-1, ids.t()).t().double()
    errors = [
        ((got[0] - baseline[0]).abs().max().item(), *((y - y64).norm().item() / y64.norm().item()
                                                      for y, y64 in zip(got[1:], baseline[1:], strict=True)))
        for got in (whole, ours)
    ]  # fmt: skip
    names = (
        f"{GPU_BACKENDS[backend]}, {what}" for what in ("log-probs, largest", "dX, relative L2", "dW, relative L2")
    )
    return [
        {"name": name, "error": error, "reference": reference, "ratio": error / reference, "target": 2}
        for name, reference, error in zip(names, *errors, strict=True)
    ]
