"""The head of a Hugging Face causal language model, handed to a function of the caller's in the model's own forward."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: What a model's configuration may multiply logits by, in the order in which it is looked for; Granite's divides.
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
#: Model types whose ``logits_scaling`` multiplies.
_MULTIPLYING = ("hyperclovax",)
_CHECKED_TOKENS = 4


class Projection(NamedTuple):
    """What makes logits of hidden states: ``softcap * tanh(logit_scale * (h W^T + b) / softcap)``."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float


class Headed(NamedTuple):
    """What a forward with a ``head`` returns."""

    result: Any  # the function's: a tensor, or tensors in a tuple
    aux_loss: Tensor | None  # of a mixture of experts that was asked for it, unweighted


#: From hidden states ``[B, T, H]`` and the projection to a tensor, or a tuple with tensors in it.
Head = Callable[[Tensor, Projection], Any]


def open_head(model: Any) -> Any:
    """Lets ``model(..., head=function)`` call ``function(hidden_states, projection)`` in the place of its head.

    The rest of the forward is the model's own, ``logits_to_keep`` and a mixture's auxiliary loss included, and it is
    the head module itself that is called, so that the hooks of DDP, FSDP2 and ZeRO-3, which gather its weight, run as
    ever. Without ``head`` the forward is the one it had. Call it before wrapping the model.

    Args:
        model: An ``AutoModelForCausalLM``. Softcap and scale of its logits are read from its configuration, and a few
            tokens are compared with its own logits at once.

    Returns:
        The model, changed.

    Raises:
        TypeError: The head is quantised.
        RuntimeError: The model's own logits are others: its head does something more.
        ValueError: The model has no output embeddings, or is divided already.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings")
    if not head.weight.is_floating_point():
        raise TypeError(f"the head must be floating point, not quantised: got {head.weight.dtype}")
    if not head.weight.numel():
        raise ValueError(
            "the head's weight is not in this process: under ZeRO-3 load the model whole, after "
            "transformers.integrations.unset_hf_deepspeed_config(), and open its head before it is divided"
        )
    transform = _transform_of(model.config.get_text_config())
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, head: Head | None = None, **kwargs: Any) -> Any:
        if head is None:
            return original(*args, **kwargs)
        projection, results = self.get_output_embeddings(), []

        def project(hidden: Tensor) -> Tensor:
            weight, bias = (_whole(x) for x in (projection.weight, projection.bias))
            results.append(head(hidden.to(weight.device), Projection(weight, bias, *transform)))
            return hidden[..., :1].clone()  # for what the forward does to its logits

        projection.forward = project
        try:
            outputs = original(*args, **(kwargs | {"use_cache": False}))
        finally:
            del projection.forward
        return Headed(_after(outputs.logits, results[0]), getattr(outputs, "aux_loss", None))

    model.forward = types.MethodType(forward, model)
    try:
        _check(model)
    except Exception:
        model.forward = original
        raise
    return model


class _After(torch.autograd.Function):
    """A value whose gradient, on its way back, passes the head module's output first.

    There the hooks wait that gather the module's weight again, which its forward let go. They get no gradient, and
    the nodes behind them do no work. The engine takes the node that was made last, and the output was made after
    the value.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, output: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _after(output: Tensor, result: Any) -> Any:
    """The result with ``_After`` on what has a gradient in it."""
    if isinstance(result, tuple):
        values = [_after(output, value) for value in result]
        return type(result)(*values) if hasattr(result, "_fields") else tuple(values)
    return _After.apply(result, output) if isinstance(result, Tensor) and result.requires_grad else result


def _whole(parameter: Tensor | None) -> Tensor | None:
    """A parameter that FSDP2 has divided, gathered; its gradient is divided again by autograd."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _transform_of(config: Any) -> tuple[float | None, float]:
    """Softcap and scale."""
    for name in _SCALES:
        if getattr(config, name, None) is not None:
            return getattr(config, "final_logit_softcapping", None), float(getattr(config, name))
    scale = 1.0
    if getattr(config, "logits_scaling", None) is not None:
        scale = config.logits_scaling if config.model_type in _MULTIPLYING else 1 / config.logits_scaling
    return getattr(config, "final_logit_softcapping", None), float(scale)


@torch.no_grad()
def _check(model: Any) -> None:
    """Raises where the projection does not make the model's own logits."""
    weight = model.get_output_embeddings().weight
    ids = torch.arange(_CHECKED_TOKENS, device=weight.device)[None] % weight.shape[0]

    def logits(hidden: Tensor, projection: Projection) -> Tensor:
        found = projection.logit_scale * torch.nn.functional.linear(hidden, projection.weight, projection.bias).float()
        cap = projection.softcap
        return found if cap is None else cap * torch.tanh(found / cap)

    was_training = model.training
    model.eval()
    try:
        got, expected = model(ids, head=logits).result, model(ids).logits.float()
    finally:
        model.train(was_training)
    allowed = 1e-3 if weight.dtype in (torch.float32, torch.float64) else 0.25  # half an ulp of a bf16 logit of tens
    error = (got.log_softmax(-1) - expected.log_softmax(-1)).abs().max().item()
    if not error <= allowed:
        raise RuntimeError(
            f"{type(model).__name__}'s own logits give other log-probabilities, by {error:.3g}: its head does more "
            "than project, scale and cap"
        )
