"""Tokens of completions, either one row a completion or packed end to end, summed and spread per completion."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """How a tensor of tokens divides into completions.

    Args:
        shape: ``(B, T)``, or ``(N,)`` when packed.
        offsets: First token of each completion in the flattened tensor, and the end: ``[S + 1]`` int64.
        packed: Whether completions lie end to end.
    """

    shape: torch.Size
    offsets: Tensor  # [S + 1]
    packed: bool

    @classmethod
    def of(cls, ids: Tensor, cu_seqlens: Tensor | None) -> Sequences:
        """The completions of ``[B, T]`` tokens, or of ``[N]`` tokens with ``cu_seqlens [S + 1]``."""
        if cu_seqlens is not None:
            return cls(ids.shape, cu_seqlens.to(torch.int64).contiguous(), True)
        rows, length = ids.shape
        offsets = torch.arange(rows + 1, device=ids.device, dtype=torch.int64) * length
        return cls(ids.shape, offsets, False)

    @property
    def count(self) -> int:
        """Number of completions."""
        return self.offsets.shape[0] - 1

    def sum(self, values: Tensor) -> Tensor:  # like shape -> [S]
        """Sum over each completion's tokens."""
        if not self.packed:
            return values.sum(-1)
        return values.new_zeros(self.count).index_add(0, self._index(), values)

    def spread(self, values: Tensor) -> Tensor:  # [S] -> like shape
        """Each completion's value, at each of its tokens."""
        return values[self._index()] if self.packed else values[:, None].expand(self.shape)

    def per_token(self, values: Tensor) -> Tensor:  # [S], [S, 1] or like shape -> like shape
        """Values given per token as they are; values given per completion spread over its tokens.

        Where there are as many packed tokens as completions, values are taken per token.
        """
        if values.shape == self.shape:
            return values
        return self.spread(values.reshape(self.count))

    def _index(self) -> Tensor:  # [N]
        tokens = torch.arange(self.shape[0], device=self.offsets.device)
        return torch.searchsorted(self.offsets[1:], tokens, right=True).clamp(max=self.count - 1)
