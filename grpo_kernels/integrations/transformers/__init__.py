"""Any Hugging Face causal language model, asked for log-probabilities instead of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from grpo_kernels.integrations.transformers.model_head import Projection, add_forward, open_head
from grpo_kernels.ops.head.linear_token_logprobs import linear_token_logprobs
from grpo_kernels.ops.rows.reference import TokenLogprobs


class ModelLogprobs(NamedTuple):
    """A ``TokenLogprobs`` of a model's tokens, and what else of its forward was asked for."""

    logprobs: Tensor  # [B, T - 1], nats
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    aux_loss: Tensor | None = None  # of a mixture of experts that was asked for it, unweighted


class _Options(NamedTuple):
    temperature: float
    backend: str


def fused_head(model: Any, *, temperature: float = 1.0, backend: str = "auto") -> Any:
    """Lets ``model(..., labels=labels, return_logprobs=True)`` return a ``ModelLogprobs`` instead of logits.

    The backbone runs as ever, and the head through ``linear_token_logprobs``: logits never exist as a whole. ``labels``
    are ids like ``input_ids``, -100 where none is wanted; they are shifted as the model's own loss shifts them, so that
    the results are ``[B, T - 1]``, 0 where none was wanted. ``outputs=`` names statistics beside the log-probabilities.
    Without ``return_logprobs`` the model's forward is the one it had. Call it before wrapping the model.

    Each call reads the head that the model has then: a ``torch.nn.Linear``, with LoRA adapters of peft's or as
    ``modules_to_save`` copies it; any other, and one with forward hooks, is refused by name. LoRA adapters of a head
    cost a copy of its weight, and its whole gradient. A copy of the model, deep or pickled, has a fused head with its
    own weights. Virtual tokens of a prompt adapter come first in the results.

    Args:
        model: An ``AutoModelForCausalLM``. Softcap and scale of its logits are read from its configuration, and a few
            tokens are compared with its own logits at once.
        temperature: Divides the logits.
        backend: "auto", or one of ``grpo_kernels.BACKENDS``.

    Returns:
        The model, its class replaced by one of the same name.

    Raises:
        TypeError: The head is quantised, or computes something else than a linear layer.
        RuntimeError: The model's own logits are others: its head does something more.
        ValueError: The model has no output embeddings, is an encoder-decoder, is prepared by accelerate already, or has
            a forward of its own that a copy would share.
    """
    open_head(model)
    add_forward(model, _forward)
    model._fused_head = _Options(temperature, backend)
    return model


def _forward(
    model: Any,
    original: Callable[..., Any],
    *args: Any,
    return_logprobs: bool = False,
    labels: Tensor | None = None,
    outputs: tuple[str, ...] = (),
    **kwargs: Any,
) -> Any:
    """The model's own forward, or its log-probabilities of ``labels``."""
    if not return_logprobs:
        return original(*args, **(kwargs if labels is None else kwargs | {"labels": labels}))
    if labels is None:
        raise ValueError("labels must be given with return_logprobs=True, got None")
    dropped = [name for name in ("output_hidden_states", "output_attentions") if kwargs.get(name)]
    if dropped:
        raise ValueError(f"return_logprobs=True returns log-probabilities alone, got {dropped[0]}=True")
    if "logits_to_keep" in kwargs:
        raise ValueError("return_logprobs=True is of every position that has a label, got logits_to_keep")
    temperature, backend = model._fused_head

    def head(hidden: Tensor, projection: Projection) -> TokenLogprobs:
        wanted = labels[:, 1:].to(hidden.device)  # of a model over several devices
        return linear_token_logprobs(
            hidden[:, :-1],
            projection.weight,
            wanted,
            temperature=temperature,
            mask=wanted != -100,
            outputs=outputs,
            backend=backend,
            **projection.options,
        )

    output = original(*args, head=head, **kwargs)
    return ModelLogprobs(*output.result, output.aux_loss)
