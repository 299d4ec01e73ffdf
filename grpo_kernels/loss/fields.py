"""What kernels read of a token beside its log-probability: one name, one place in an op's arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_kernels.calls import Call


@dataclass(frozen=True)
class TokenFields(Call):
    """The tensors of a token-wise loss, contiguous; mirrored in token_fields.h.

    The loss is ``sum(-w f S + beta w k - e H)`` with the weights ``w``, the policy factors ``f`` and the entropy
    weights ``e``. Advantages and both weights are one for all, ``[]``, one a completion, ``[S]``, or one a token,
    ``[1, N]`` or ``[B, T]``: the number of dimensions tells which. All else is one a token, of any shape. What a masked
    token has is not read.

    ``sequence_ids`` tell which completion a token is of. Without them kernels of rows count tokens in rows of ids, and
    ``policy_loss`` in its own sequences.
    """

    mask: Tensor  # [N] bool
    sequence_ids: Tensor | None  # [N] int32
    advantages: Tensor | None  # None where a kernel makes them of rewards
    weights: Tensor
    policy_factors: Tensor | None  # [N], like the last two
    entropy_weights: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None

    @property
    def has_completions(self) -> bool:
        """Whether something is one a completion."""
        shared = (self.advantages, self.weights, self.entropy_weights)
        return any(x is not None and x.dim() == 1 for x in shared)

    def of_tokens(self, function: Callable[[Tensor], Tensor]) -> TokenFields:
        """With ``function``, from ``[N]`` to some tokens' ``[n]``, over all that is one a token; the rest as it is."""

        def apply(values: Tensor | None) -> Tensor | None:
            return None if values is None else function(values.reshape(-1))

        def apply_to_shared(values: Tensor | None) -> Tensor | None:
            return values if values is None or values.dim() < 2 else function(values.reshape(-1))[None]

        return TokenFields(
            function(self.mask.reshape(-1)),
            apply(self.sequence_ids),
            apply_to_shared(self.advantages),
            apply_to_shared(self.weights),  # type: ignore[arg-type]
            apply(self.policy_factors),
            apply_to_shared(self.entropy_weights),
            apply(self.old_logprobs),
            apply(self.ref_logprobs),
        )

    def at_tokens(self, values: Tensor) -> Tensor:  # -> [N], or [] where one is for all
        """Advantages or weights as each token has them, of tokens that have ``sequence_ids`` where they are needed."""
        if values.dim() == 1:
            if self.sequence_ids is None:
                raise ValueError("sequence_ids must be given where values are one a completion, got None")
            return values[self.sequence_ids]
        return values.reshape(-1) if values.dim() == 2 else values

    def has_policy_term(self) -> Tensor:  # [N]
        """Which tokens have an advantage and a weight."""
        if self.advantages is None:
            raise ValueError("advantages must be given, got None")
        has_term = self.mask & (self.at_tokens(self.advantages) != 0) & (self.at_tokens(self.weights) != 0)
        return has_term if self.policy_factors is None else has_term & (self.policy_factors != 0)


def check_fields(fields: TokenFields, sequences: int, tokens: int, dtype: torch.dtype) -> None:
    """Raises ValueError unless the tensors are contiguous, of the dtype and of these tokens.

    Args:
        fields: The tensors.
        sequences: How many completions there are where no ids tell.
        tokens: Number of tokens.
        dtype: Of all but the mask and the ids.
    """
    given = {name: getattr(fields, name) for name in fields.__dataclass_fields__}
    shared = ("advantages", "weights", "entropy_weights")
    if fields.sequence_ids is not None:
        sequences = next(
            (given[name].numel() for name in shared if given[name] is not None and given[name].dim() == 1), 0
        )
    dtypes = {"mask": torch.bool, "sequence_ids": torch.int32}
    for name, values in given.items():
        if values is None:
            continue
        count = (1, sequences, tokens)[min(values.dim(), 2)] if name in shared else tokens
        wanted = dtypes.get(name, dtype)
        if values.numel() != count or values.dtype != wanted or not values.is_contiguous():
            raise ValueError(
                f"{name} must hold {count} contiguous values of {wanted}, got {list(values.shape)} {values.dtype}"
            )
