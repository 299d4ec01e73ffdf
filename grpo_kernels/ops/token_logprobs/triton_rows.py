"""What every launch over rows of logits is told: addresses, transform, block size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.ops.token_logprobs.op import accumulation_dtype

_MAX_BLOCK = 4096  # logits that a program holds at once; not tuned on any device yet
_ACC = {torch.float32: tl.float32, torch.float64: tl.float64}


def block_options(vocab: int) -> dict[str, int]:
    """Block size, and warps that share a block."""
    block = min(_MAX_BLOCK, triton.next_power_of_2(vocab))
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 512))}


def arithmetic(dtype: torch.dtype) -> Any:
    """The Triton type that rows of ``dtype`` are computed in."""
    return _ACC[accumulation_dtype(dtype)]


def transform_arguments(temperature: float, softcap: float, logit_scale: float) -> tuple[float, float, float]:
    """``inner``, ``outer`` and ``slope``, as triton_math.py takes the transform apart."""
    slope = logit_scale / temperature
    if softcap > 0:
        return logit_scale / softcap, softcap / temperature, slope
    return (-1.0 if logit_scale < 0 else 1.0), abs(slope), slope


def as_bytes(flags: Tensor | None) -> Tensor | None:
    """Booleans as kernels read and write them."""
    return None if flags is None else flags.view(torch.uint8)


def row_strides(logits: Tensor) -> tuple[int, int]:
    """Of the first two of three dimensions; the last one is dense."""
    if logits.dim() != 3 or (logits.shape[-1] > 1 and logits.stride(-1) != 1):
        raise ValueError(f"logits must have a dense last dimension of three, got strides {logits.stride()}")
    return logits.stride(0), logits.stride(1)


@contextmanager
def rounded(out: Tensor) -> Iterator[Tensor]:
    """What a kernel writes ``out`` through. Triton's interpreter truncates to bfloat16, where a GPU rounds: there the
    kernel writes fp32, and torch rounds."""
    if out.device.type != "cpu" or out.dtype != torch.bfloat16:
        yield out
        return
    wide = out.float()
    yield wide
    out.copy_(wide)


def are_aligned(*strides: int) -> bool:
    """Whether every row begins at a multiple of 16 elements from the first."""
    return all(stride % 16 == 0 for stride in strides)
