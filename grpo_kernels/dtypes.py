"""The dtype of arithmetic."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic and of per-token results: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
