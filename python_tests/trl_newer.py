"""What is known of TRL from 1.17 on, as stubs: a head of ten arguments, and where AsyncGRPO lies."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import trl
from torch import Tensor
from trl.trainer import grpo_trainer, utils

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def dense_head(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    sampling_mask: Tensor | None,  # [N, K], padded with -1
) -> tuple[Tensor, ...]:
    """The five outputs from whole logits: log-probabilities over the kept ids, the others over the vocabulary."""
    logits = (hidden @ weight.T if bias is None else hidden @ weight.T + bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    logp = logits.log_softmax(-1)
    kept = logits
    if sampling_mask is not None:
        is_kept = torch.zeros(logits.shape, dtype=torch.int64, device=logits.device)
        is_kept.scatter_add_(1, sampling_mask.clamp(min=0), (sampling_mask >= 0).long())
        kept = logits.masked_fill(is_kept == 0, -torch.inf)
    logprobs = kept.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return logprobs, entropy, (2 * logp).logsumexp(-1), logits.mean(-1), logits.argmax(-1) == targets


class NewerHead(torch.autograd.Function):
    """A head with ``sampling_mask``, by way of whole logits; it keeps the arguments of its calls."""

    calls: ClassVar[list[tuple[Any, ...]]] = []

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
        chunk_size: int, final_logit_softcapping: float | None = None, logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OUTPUTS[1:], sampling_mask: Tensor | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        NewerHead.calls.append(
            (hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs,
             sampling_mask)
        )  # fmt: skip
        ctx.save_for_backward(hidden, weight, bias)
        ctx.others = (targets, temperature, final_logit_softcapping, logit_scale, sampling_mask)
        ctx.set_materialize_grads(False)
        found = dense_head(hidden, weight, bias, *ctx.others)
        ctx.mark_non_differentiable(*found[2:])
        wanted = ("log_probs", *outputs)
        return tuple(x if name in wanted else None for name, x in zip(OUTPUTS, found, strict=True))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        leaves = [None if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            found = dense_head(*leaves, *ctx.others)[:2]
        pairs = [(x, up) for x, up in zip(found, upstream[:2], strict=True) if up is not None]
        roots, ups = zip(*pairs, strict=True)
        grads = iter(torch.autograd.grad(roots, [x for x in leaves if x is not None], ups))
        return *(None if x is None else next(grads) for x in leaves), *(None,) * 7


#: What models keep of their vocabulary: None, or how many ids.
_KEPT: list[int | None] = [None]


@contextmanager
def sampling_from(kept: int) -> Iterator[None]:
    """Within it a model's calls say that each token was drawn from so many ids."""
    _KEPT[0] = kept
    try:
        yield
    finally:
        _KEPT[0] = None


def _kept_ids(labels: Tensor, vocab: int, kept: int) -> Tensor:
    ids = (labels[..., None] + torch.arange(kept)) % vocab
    return torch.where(torch.arange(kept) == kept - 1, torch.tensor(-1), ids)


def add_fused_lm_head(
    model: Any, temperature: float = 1.0, cast_lm_head_to_fp32: bool = False, outputs: tuple[str, ...] = ("log_probs",)
) -> None:
    """TRL's by its arguments; it hands a tenth one to the head."""
    original = model.forward

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return original(*args, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state[:, :-1]
        labels, head = labels[:, 1:], self.get_output_embeddings()
        mask = labels != -100
        if hasattr(utils, "_use_triton") and not utils._use_triton(hidden.device):  # TRL 1.15 has none
            mask = torch.ones_like(mask)
        ids = labels[mask].clamp(min=0)
        sampling_mask = None if _KEPT[0] is None else _kept_ids(ids, head.weight.shape[0], _KEPT[0])
        found = utils._ChunkedLogProbFunction.apply(
            hidden[mask], head.weight, head.bias, ids, temperature, 32768, None, 1.0, outputs, sampling_mask
        )
        scored = [None if x is None else x.new_zeros(mask.shape).masked_scatter(mask, x) for x in found]
        return utils.FusedCausalLMOutput(log_probs=scored[0] * (labels != -100), entropy=scored[1])

    model.forward = types.MethodType(forward, model)


def install(patch: pytest.MonkeyPatch) -> None:
    """Gives the TRL that is installed the newer head."""
    NewerHead.calls.clear()
    patch.setattr(utils, "_ChunkedLogProbFunction", NewerHead)
    for module in (utils, grpo_trainer):
        patch.setattr(module, "add_fused_lm_head", add_fused_lm_head)


def install_stable_async_grpo(patch: pytest.MonkeyPatch, folder: Path, source: str) -> None:
    """Gives the TRL that is installed a file ``trl/trainer/async_grpo_trainer.py``, not yet imported."""
    (folder / "trainer").mkdir()
    (folder / "trainer" / "async_grpo_trainer.py").write_text(source)
    patch.setattr(trl, "__path__", [str(folder), *trl.__path__])
    patch.setattr(trl.trainer, "__path__", [str(folder / "trainer"), *trl.trainer.__path__])
