"""The losses as ``nn.Module``, which holds their configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from grpo_kernels.loss.config import GRPOLossConfig
from grpo_kernels.named_arguments import refuse_unknown
from grpo_kernels.ops.head.linear_grpo_loss import linear_grpo_loss
from grpo_kernels.ops.rows.grpo_loss import GRPOLossOutput, grpo_loss
from grpo_kernels.validation import as_flag

_CONFIG_FIELDS = frozenset(field.name for field in fields(GRPOLossConfig))


class GRPOLoss(nn.Module):
    """``grpo_loss`` with a stored configuration and default keyword arguments.

    Example:
        >>> loss = GRPOLoss(beta=0.0, epsilon_high=0.28, inplace=True)
        >>> logits, ids = torch.zeros(2, 3, 8, requires_grad=True), torch.zeros(2, 3, dtype=torch.long)
        >>> loss(logits * 1, ids, torch.tensor([1.0, -1.0]), torch.ones(2, 3)).loss.backward()

    Args:
        config: The loss.
        **options: Fields of ``GRPOLossConfig``, in place of those of ``config``; and keyword arguments of
            ``grpo_loss``. Those of a call take precedence.

    Raises:
        TypeError: ``config`` is none, or an option is neither.
    """

    function: ClassVar[Callable[..., GRPOLossOutput]] = staticmethod(grpo_loss)

    def __init__(self, /, config: GRPOLossConfig | None = None, *unexpected: Any, **options: Any) -> None:
        super().__init__()
        config = GRPOLossConfig() if config is None else config
        if unexpected or not isinstance(config, GRPOLossConfig):
            types = ", ".join(type(value).__name__ for value in (config, *unexpected))
            raise TypeError(
                f"{type(self).__name__} takes a GRPOLossConfig, or its fields by name, as loss_type=..., got {types}; "
                "a call takes the tensors"
            )
        parameters = inspect.signature(self.function).parameters.values()
        arguments = {x.name: x.default for x in parameters if x.kind is x.KEYWORD_ONLY and x.name != "config"}
        what = f"the fields of GRPOLossConfig and the keyword arguments of {self.function.__name__}"
        refuse_unknown(type(self).__name__, options, (*arguments, *sorted(_CONFIG_FIELDS)), what)
        for name, value in options.items():
            if isinstance(arguments.get(name), bool):
                options[name] = as_flag(name, value)
        self.config = replace(config, **{name: options.pop(name) for name in _CONFIG_FIELDS & options.keys()})
        self.options = options

    def forward(
        self,
        logits: Tensor,  # [B, T, V] or [B, T + 1, V]; packed [N, V]
        completion_ids: Tensor,  # [B, T]; packed [N]
        advantages: Tensor | None,  # [B] or [B, T]; packed [S] or [N]
        completion_mask: Tensor,  # like completion_ids
        **arguments: Any,
    ) -> GRPOLossOutput:
        """As ``grpo_loss``."""
        options = {"config": self.config, **self.options, **arguments}
        return self.function(logits, completion_ids, advantages, completion_mask, **options)

    def extra_repr(self) -> str:
        return ", ".join([f"{self.config}", *(f"{name}={value!r}" for name, value in self.options.items())])


class LinearGRPOLoss(GRPOLoss):
    """``linear_grpo_loss`` with a stored configuration and default keyword arguments, like ``GRPOLoss``.

    Example:
        >>> loss = LinearGRPOLoss(beta=0.0, epsilon_high=0.28)
        >>> hidden, head = torch.randn(2, 3, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
        >>> ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)
        >>> loss(hidden, head, ids, torch.tensor([1.0, -1.0]), mask).loss.backward()
    """

    function = staticmethod(linear_grpo_loss)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,  # [B, T, H] or [B, T + 1, H]; packed [N, H]
        lm_head_weight: Tensor,  # [V, H]
        completion_ids: Tensor,  # [B, T]; packed [N]
        advantages: Tensor | None,  # [B] or [B, T]; packed [S] or [N]
        completion_mask: Tensor,  # like completion_ids
        **arguments: Any,
    ) -> GRPOLossOutput:
        """As ``linear_grpo_loss``."""
        options = {"config": self.config, **self.options, **arguments}
        return self.function(hidden_states, lm_head_weight, completion_ids, advantages, completion_mask, **options)
