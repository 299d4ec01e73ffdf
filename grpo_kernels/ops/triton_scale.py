"""The Triton kernel of ``scale``: a gradient times a scalar, in its own memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.ops.token_logprobs.triton_math import row_offset
from grpo_kernels.ops.token_logprobs.triton_rows import are_aligned, arithmetic, block_options, rounded, row_strides


@triton.jit(do_not_specialize=["batch_stride", "row_stride", "length"])
def _scale_kernel(
    values_ptr,  # [B, T, V]
    batch_stride,
    row_stride,
    factor_ptr,  # []
    length,
    width,
    ALIGNED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    if factor != 1:
        n = tl.program_id(0).to(tl.int64)
        row_ptr = values_ptr + row_offset(n // length, n % length, batch_stride, row_stride, ALIGNED)
        columns = tl.arange(0, BLOCK)
        for start in range(0, width, BLOCK):
            inside = start + columns < width
            values = tl.load(row_ptr + start + columns, mask=inside, other=0.0).to(ACC)
            values *= factor.to(ACC)
            tl.store(row_ptr + start + columns, values.to(values_ptr.dtype.element_ty), mask=inside)


def scale(gradient: Tensor, factor: Tensor) -> None:
    """The registered op."""
    rows = gradient[(None,) * (3 - gradient.dim())]
    if rows.numel() == 0:
        return
    with rounded(rows) as values:
        strides = row_strides(values)
        _scale_kernel[(rows.shape[0] * rows.shape[1],)](
            values,
            *strides,
            factor,
            rows.shape[1],
            rows.shape[2],
            ALIGNED=are_aligned(*strides),
            ACC=arithmetic(gradient.dtype),
            **block_options(rows.shape[2]),
        )
