"""How tokens divide into completions, in rows or packed: sums over completions, and values spread over their tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class Sequences:
    """How a tensor of tokens divides into completions.

    Offsets and ids are computed at first use and cached. ``cached_property`` takes a lock, which torch.compile cannot
    trace.

    Args:
        shape: ``(B, T)``, or ``(N,)`` when packed.
        device: The device of the tokens.
        cu_seqlens: Where each packed completion begins, and the end: ``[S + 1]``; None for ``(B, T)``.
    """

    shape: torch.Size
    device: torch.device
    cu_seqlens: Tensor | None = None
    _offsets: Tensor | None = field(default=None, init=False, repr=False)
    _ids: Tensor | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(cls, ids: Tensor, cu_seqlens: Tensor | None) -> Sequences:
        """The completions of ``[B, T]`` tokens, or of ``[N]`` tokens with ``cu_seqlens [S + 1]``."""
        return cls(ids.shape, ids.device, cu_seqlens)

    @property
    def packed(self) -> bool:
        """Whether completions are packed end to end."""
        return self.cu_seqlens is not None

    @property
    def count(self) -> int:
        """Number of completions."""
        return self.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def offsets(self) -> Tensor:  # [S + 1] int64
        """First token of each completion in the flattened tensor, and the end."""
        if self._offsets is None:
            if self.cu_seqlens is None:
                starts = torch.arange(self.shape[0] + 1, device=self.device, dtype=torch.int64)
                self._offsets = starts * self.shape[1]
            else:
                self._offsets = self.cu_seqlens.to(torch.int64).contiguous()
        return self._offsets

    @property
    def ids(self) -> Tensor:  # [N] int32
        """The completion of each token of the flattened tensor."""
        if self._ids is None:
            if self.cu_seqlens is None:
                rows = torch.arange(self.shape[0], device=self.device, dtype=torch.int32)
                self._ids = rows[:, None].expand(self.shape).reshape(-1).contiguous()  # one row stays a view
            else:
                tokens = torch.arange(self.shape[0], device=self.device)
                ids = torch.searchsorted(self.offsets[1:], tokens, right=True, out_int32=True)
                self._ids = ids.clamp_(max=self.count - 1)  # offsets are not checked on a GPU; reads stay inside
        return self._ids

    def sum(self, values: Tensor) -> Tensor:  # like shape -> [S]
        """Sum over each completion's tokens."""
        if not self.packed:
            return values.sum(-1)
        return values.new_zeros(self.count).index_add(0, self.ids, values)

    def lengths(self, mask: Tensor, dtype: torch.dtype) -> Tensor:  # like shape -> [S]
        """Number of each completion's unmasked tokens."""
        return self.sum(mask.to(dtype)) if self.packed else mask.sum(-1, dtype=dtype)

    def spread(self, values: Tensor) -> Tensor:  # [S] -> like shape
        """Repeats each completion's value over its tokens."""
        return values[self.ids] if self.packed else values[:, None].expand(self.shape)

    def per_token(self, values: Tensor) -> Tensor:  # [S], [S, 1] or like shape -> like shape
        """Spreads values per completion over the tokens; leaves values per token as they are.

        If there are as many packed tokens as completions, values count as per token.
        """
        if values.shape == self.shape:
            return values
        return self.spread(values.reshape(self.count))
