"""Any Hugging Face causal language model, asked for log-probabilities instead of logits."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.ops.linear_token_logprobs import linear_token_logprobs
from grpo_kernels.ops.token_logprobs import TokenLogprobs

#: What a model's configuration may multiply logits by, in the order in which it is looked for; Granite's divides.
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
#: Model types whose ``logits_scaling`` multiplies.
_MULTIPLYING = ("hyperclovax",)
_CHECKED_TOKENS = 4


def fused_head(model: Any, *, temperature: float = 1.0, backend: str = "auto") -> Any:
    """Lets ``model(..., labels=labels, return_logprobs=True)`` return a ``TokenLogprobs`` instead of logits.

    The backbone runs as ever, and the head through ``linear_token_logprobs``: logits never exist as a whole. ``labels``
    are ids like ``input_ids``, -100 where none is wanted; they are shifted as the model's own loss shifts them, so that
    the results are ``[B, T - 1]``, 0 where none was wanted. ``outputs=`` names statistics beside the log-probabilities.
    Without ``return_logprobs`` the model's forward is the one it had. Call it before wrapping the model; a head that
    DeepSpeed's ZeRO-3 divides is not gathered here.

    Args:
        model: An ``AutoModelForCausalLM``. Softcap and scale of its logits are read from its configuration, and a few
            tokens are compared with its own logits at once.
        temperature: Divides the logits.
        backend: "auto", or one of ``grpo_kernels.registry.BACKENDS``.

    Returns:
        The model, changed.

    Raises:
        TypeError: The head is quantised.
        RuntimeError: The model's own logits are others: its head does something more.
        ValueError: The model has no output embeddings.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings")
    if not head.weight.is_floating_point():
        raise TypeError(f"the head must be floating point, not quantised: got {head.weight.dtype}")
    softcap, logit_scale = _transform_of(model.config.get_text_config())
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        return_logprobs: bool = False,
        labels: Tensor | None = None,
        outputs: tuple[str, ...] = (),
        **kwargs: Any,
    ) -> Any:
        if not return_logprobs:
            if labels is not None:
                kwargs["labels"] = labels
            return original(*args, **kwargs)
        if labels is None:
            raise ValueError("labels must be given with return_logprobs=True, got None")
        hidden = self.base_model(*args, **(kwargs | {"use_cache": False})).last_hidden_state[:, :-1]
        projection = self.get_output_embeddings()
        weight, bias = (_whole(x) for x in (projection.weight, projection.bias))
        hidden, labels = hidden.to(weight.device), labels[:, 1:].to(weight.device)  # of a model over several devices
        wanted = labels != -100
        return linear_token_logprobs(
            hidden,
            weight,
            labels,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            mask=wanted,
            outputs=outputs,
            backend=backend,
        )

    model.forward = types.MethodType(forward, model)
    try:
        _check(model, temperature)
    except Exception:
        model.forward = original
        raise
    return model


def _whole(parameter: Tensor | None) -> Tensor | None:
    """A parameter that FSDP2 has divided, gathered; its gradient is divided again by autograd."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _transform_of(config: Any) -> tuple[float | None, float]:
    for name in _SCALES:
        if getattr(config, name, None) is not None:
            return getattr(config, "final_logit_softcapping", None), float(getattr(config, name))
    scale = 1.0
    if getattr(config, "logits_scaling", None) is not None:
        scale = config.logits_scaling if config.model_type in _MULTIPLYING else 1 / config.logits_scaling
    return getattr(config, "final_logit_softcapping", None), float(scale)


@torch.no_grad()
def _check(model: Any, temperature: float) -> None:
    weight = model.get_output_embeddings().weight
    ids = torch.arange(_CHECKED_TOKENS, device=weight.device)[None] % weight.shape[0]
    was_training = model.training
    model.eval()
    try:
        got: TokenLogprobs = model(ids, labels=ids, return_logprobs=True)
        logits = model(ids).logits[:, :-1].float() / temperature
    finally:
        model.train(was_training)
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    allowed = 1e-3 if weight.dtype == torch.float32 else 0.25  # half an ulp of a half-precision logit of some tens
    error = (got.logprobs - expected).abs().max().item()
    if not error <= allowed:
        raise RuntimeError(
            f"{type(model).__name__}'s own logits give other log-probabilities, by {error:.3g}: its head does more "
            "than project, scale and cap"
        )
