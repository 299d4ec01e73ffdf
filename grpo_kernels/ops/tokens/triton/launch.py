"""Helpers of every launch: argument checks, types, device properties."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.dtypes import accumulation_dtype

_ACC = {torch.float32: tl.float32, torch.float64: tl.float64}


@cache
def processors_of(device: torch.device) -> tuple[int, int]:
    """Multiprocessors of a device, and threads per warp."""
    if device.type == "cpu":
        return 1, 32  # the interpreter runs programs one after another
    properties = torch.get_device_module(device).get_device_properties(device)
    count = properties.gpu_subslice_count if device.type == "xpu" else properties.multi_processor_count
    return count, triton.runtime.driver.active.get_current_target().warp_size


def arithmetic(dtype: torch.dtype) -> Any:
    """The Triton type for arithmetic on ``dtype``."""
    return _ACC[accumulation_dtype(dtype)]


def as_bytes(flags: Tensor | None) -> Tensor | None:
    """Booleans as uint8, as kernels read and write them."""
    return None if flags is None else flags.view(torch.uint8)


def check_tokens(count: int, dtype: torch.dtype, **values: Tensor | None) -> None:
    """Raises ValueError unless each of ``values`` is absent or holds ``count`` contiguous values of ``dtype``."""
    for name, tensor in values.items():
        if tensor is not None and (tensor.numel() != count or tensor.dtype != dtype or not tensor.is_contiguous()):
            raise ValueError(
                f"{name} must hold {count} contiguous values of {dtype}, got {list(tensor.shape)} {tensor.dtype}"
            )


def row_strides(logits: Tensor) -> tuple[int, int]:
    """Strides of the first two of three dimensions. The last one must be dense."""
    if logits.dim() != 3 or (logits.shape[-1] > 1 and logits.stride(-1) != 1):
        raise ValueError(f"logits must have a dense last dimension of three, got strides {logits.stride()}")
    return logits.stride(0), logits.stride(1)


@contextmanager
def rounded(out: Tensor) -> Iterator[Tensor]:
    """The tensor that a kernel writes instead of ``out``, correctly rounded on exit.

    A GPU rounds to bfloat16, but Triton's interpreter truncates; there, kernels write fp32 and torch rounds.
    """
    if not triton.knobs.runtime.interpret or out.dtype != torch.bfloat16:
        yield out
        return
    wide = out.float()
    yield wide
    out.copy_(wide)
