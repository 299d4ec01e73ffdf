"""The Triton kernel of ``scale``: multiplies a gradient by a scalar in place; reads and writes nothing if it is 1."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.ops.tokens.triton.launch import arithmetic, processors_of, rounded, row_strides

_BLOCK = 2048
_PER_PROCESSOR = 8  # programs; few, because they all exit at once if the scalar is 1


@triton.jit(do_not_specialize=["batch_stride", "row_stride", "length", "width", "row_blocks", "blocks"])
def _scale_kernel(
    values_ptr,  # [B, T, width]
    batch_stride: tl.int64,
    row_stride: tl.int64,
    factor_ptr,  # []
    length,
    width: tl.int64,
    row_blocks,  # blocks in a row
    blocks,
    ALIGNED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    if factor != 1:
        for i in range(tl.program_id(0), blocks, tl.num_programs(0)):
            row = tl.cast(i, tl.int64) // row_blocks
            start = tl.cast(i, tl.int64) % row_blocks * BLOCK
            offset = (row // length) * batch_stride + (row % length) * row_stride + start
            if ALIGNED:
                offset = tl.multiple_of(offset, 16)
            columns = tl.arange(0, BLOCK)
            at = values_ptr + offset + columns
            if start + BLOCK <= width:  # unmasked: whole vectors for any width
                values = tl.load(at).to(ACC) * factor.to(ACC)
                tl.store(at, values.to(values_ptr.dtype.element_ty))
            else:
                inside = start + columns < width
                values = tl.load(at, mask=inside, other=0.0).to(ACC) * factor.to(ACC)
                tl.store(at, values.to(values_ptr.dtype.element_ty), mask=inside)


def scale(gradient: Tensor, factor: Tensor) -> None:
    """The registered op."""
    if gradient.numel() == 0:
        return
    rows = gradient.view(1, 1, -1) if gradient.is_contiguous() else gradient[(None,) * (3 - gradient.dim())]
    batch, length, width = rows.shape
    row_blocks = triton.cdiv(width, _BLOCK)
    blocks = batch * length * row_blocks
    processors, _ = processors_of(gradient.device)
    with rounded(rows) as values:
        strides = row_strides(values)
        _scale_kernel[(min(blocks, _PER_PROCESSOR * processors),)](
            values,
            *strides,
            factor,
            length,
            width,
            row_blocks,
            blocks,
            ALIGNED=all(stride % 16 == 0 for stride in strides) or batch * length == 1,
            ACC=arithmetic(gradient.dtype),
            BLOCK=_BLOCK,
            num_warps=8,
        )
