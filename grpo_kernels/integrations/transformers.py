"""Any Hugging Face causal language model, asked for log-probabilities instead of logits."""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import Tensor

from grpo_kernels.model_head import Projection, open_head
from grpo_kernels.ops.linear_token_logprobs import linear_token_logprobs
from grpo_kernels.ops.token_logprobs import TokenLogprobs


def fused_head(model: Any, *, temperature: float = 1.0, backend: str = "auto") -> Any:
    """Lets ``model(..., labels=labels, return_logprobs=True)`` return a ``TokenLogprobs`` instead of logits.

    The backbone runs as ever, and the head through ``linear_token_logprobs``: logits never exist as a whole. ``labels``
    are ids like ``input_ids``, -100 where none is wanted; they are shifted as the model's own loss shifts them, so that
    the results are ``[B, T - 1]``, 0 where none was wanted. ``outputs=`` names statistics beside the log-probabilities.
    Without ``return_logprobs`` the model's forward is the one it had. Call it before wrapping the model.

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
    opened = open_head(model).forward

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
            return opened(*args, **(kwargs if labels is None else kwargs | {"labels": labels}))
        if labels is None:
            raise ValueError("labels must be given with return_logprobs=True, got None")

        def head(hidden: Tensor, projection: Projection) -> TokenLogprobs:
            wanted = labels[:, 1:].to(hidden.device)  # of a model over several devices
            return linear_token_logprobs(
                hidden[:, :-1],
                projection.weight,
                wanted,
                bias=projection.bias,
                temperature=temperature,
                softcap=projection.softcap,
                logit_scale=projection.logit_scale,
                mask=wanted != -100,
                outputs=outputs,
                backend=backend,
            )

        return opened(*args, head=head, **kwargs).result

    model.forward = types.MethodType(forward, model)
    return model
