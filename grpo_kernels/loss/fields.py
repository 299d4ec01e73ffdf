"""The per-token tensors that kernels read beside the log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_kernels.calls import Call

#: Fields that may hold one value for all tokens, or one per completion.
_SHARED = ("advantages", "weights", "entropy_weights")


@dataclass(frozen=True)
class TokenFields(Call):
    """The tensors of a token-wise loss, contiguous; mirrored in token_fields.h.

    The loss is ``sum(-w f S + beta w k - e H)`` with the weights ``w``, the policy factors ``f`` and the entropy
    weights ``e``. Advantages and both weights have no dimension if one value is for all, ``[]``; one dimension for
    values per completion, ``[S]``; two for values per token, ``[1, N]`` or ``[B, T]``. All others are per token, in any
    shape. Values of masked tokens are not read.

    ``sequence_ids`` are the completions of the tokens. Without them, row kernels take each row of ids as a completion,
    and ``policy_loss`` each of its sequences.
    """

    mask: Tensor  # [N] bool
    sequence_ids: Tensor | None  # [N] int32
    advantages: Tensor | None  # None if a kernel computes them from rewards
    weights: Tensor
    policy_factors: Tensor | None  # [N], like the last two
    entropy_weights: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None

    @property
    def has_completions(self) -> bool:
        """Whether any values are per completion."""
        return any(x is not None and x.dim() == 1 for x in (self.advantages, self.weights, self.entropy_weights))

    def map_tokens(self, function: Callable[[Tensor], Tensor]) -> TokenFields:
        """Applies ``function``, which selects some tokens ``[n]`` of ``[N]``, to all values per token."""

        def apply(name: str, values: Tensor | None) -> Tensor | None:
            if values is None or name not in _SHARED:
                return None if values is None else function(values.reshape(-1))
            return values if values.dim() < 2 else function(values.reshape(-1))[None]

        return TokenFields(*(apply(name, getattr(self, name)) for name in self._hints))  # type: ignore[arg-type]

    def expand_to_tokens(self, values: Tensor) -> Tensor:  # -> [N], or [] where one is for all
        """Advantages or weights per token. Values per completion need ``sequence_ids``."""
        if values.dim() == 1:
            if self.sequence_ids is None:
                raise ValueError("sequence_ids must be given where values are one a completion, got None")
            return values[self.sequence_ids]
        return values.reshape(-1) if values.dim() == 2 else values

    def has_policy_term(self) -> Tensor:  # [N]
        """Which tokens have a nonzero advantage and weight."""
        if self.advantages is None:
            raise ValueError("advantages must be given, got None")
        advantages, weights = self.expand_to_tokens(self.advantages), self.expand_to_tokens(self.weights)
        has_term = self.mask & (advantages != 0) & (weights != 0)
        return has_term if self.policy_factors is None else has_term & (self.policy_factors != 0)


def check_fields(fields: TokenFields, sequences: int, tokens: int, dtype: torch.dtype) -> None:
    """Raises ValueError unless the tensors are contiguous and have the right dtype and size.

    Args:
        fields: The tensors.
        sequences: Number of completions; not used with ``sequence_ids``.
        tokens: Number of tokens.
        dtype: The dtype of all but the mask and the ids.
    """
    tensors = {name: getattr(fields, name) for name in fields.__dataclass_fields__}
    if fields.sequence_ids is not None:
        sequences = next(
            (tensors[name].numel() for name in _SHARED if tensors[name] is not None and tensors[name].dim() == 1), 0
        )
    dtypes = {"mask": torch.bool, "sequence_ids": torch.int32}
    for name, values in tensors.items():
        if values is None:
            continue
        count = (1, sequences, tokens)[min(values.dim(), 2)] if name in _SHARED else tokens
        wanted = dtypes.get(name, dtype)
        if values.numel() != count or values.dtype != wanted or not values.is_contiguous():
            raise ValueError(
                f"{name} must hold {count} contiguous values of {wanted}, got {list(values.shape)} {values.dtype}"
            )
