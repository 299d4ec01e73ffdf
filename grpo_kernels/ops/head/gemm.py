"""The GEMMs of a head, which write where they are told: logits, and the gradients that come back from them."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from grpo_kernels.ops.head.selection import SelectedRows

_FEWEST_ROWS = 4  # of a GEMM on a GPU
_FEW_ROWS_A_THREAD = 16  # below which a GEMM on a CPU may sum the vocabulary in sequence
_SUMS = 16  # of the vocabulary, for so few rows: partial ones
_FEWEST_SUMMED = 2048  # columns that are more than one sum
_GPU_MULTIPLE = 128  # of rows in a chunk, and of bytes between rows
_NARROWING = ("triton", "cuda")  # backends whose row kernels write a gradient narrower than its logits


def writes_fp32(device: torch.device) -> bool:
    """Whether GEMMs of half-precision inputs can write fp32 there: ``torch.mm(out_dtype=)`` is CUDA's and ROCm's."""
    return device.type == "cuda"


def matmul(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:  # [n, k], [k, m], [n, m]
    """Writes ``a b`` to ``out``, or adds it there, without a rounding in between: products are summed as ``out`` is.

    Where no GEMM writes ``out`` from these inputs they are widened first: exact, but slow and in memory of its own.
    """
    if a.dtype == b.dtype == out.dtype:
        return out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    is_half = a.dtype in (torch.bfloat16, torch.float16) and out.dtype == torch.float32
    if a.dtype == b.dtype and is_half and writes_fp32(out.device):
        if add:
            return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), out.dtype)
    if wide == out.dtype:
        return matmul(a.to(wide), b.to(wide), out, add=add)
    product = torch.mm(a.to(wide), b.to(wide))
    return out.add_(product) if add else out.copy_(product)


def row_width(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Elements from one row of a workspace to the next: on a GPU every row begins at a multiple of 128 bytes."""
    multiple = 1 if device.type == "cpu" else _GPU_MULTIPLE // dtype.itemsize
    return -(-vocab // multiple) * multiple


class Head:
    """A projection ``h W^T + b``.

    Args:
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        compute_dtype: What hidden states, weight and bias are rounded to.
        logits_dtype: What the logits are rounded to.
        gradient_dtype: What their gradient is rounded to, before the GEMMs that follow.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        compute_dtype: torch.dtype,
        logits_dtype: torch.dtype,
        gradient_dtype: torch.dtype,
    ) -> None:
        self.compute_dtype = compute_dtype
        self.logits_dtype = logits_dtype
        self.gradient_dtype = gradient_dtype
        self.device = weight.device
        self.parameter_dtypes = (weight.dtype, weight.dtype if bias is None else bias.dtype)
        self.parameter = weight
        self.bias = None if bias is None else self._cast(bias).to(logits_dtype)

    @classmethod
    def of(
        cls,
        backend: str,
        weight: Tensor,
        bias: Tensor | None,
        compute_dtype: torch.dtype,
        logits_dtype: torch.dtype,
    ) -> Head:
        """The head as the row kernels of ``backend`` want it: C++ writes gradients as wide as the logits."""
        return cls(weight, bias, compute_dtype, logits_dtype, compute_dtype if backend in _NARROWING else logits_dtype)

    @property
    def vocab(self) -> int:
        return self.parameter.shape[0]

    @cached_property
    def weight(self) -> Tensor:
        """The weight as the GEMMs take it: only made when a row needs it."""
        return self._cast(self.parameter)

    def _cast(self, values: Tensor) -> Tensor:
        """``values`` rounded to the compute dtype, and widened once a call where no GEMM widens."""
        values = values.detach().to(self.compute_dtype)
        return values if writes_fp32(self.device) else values.to(self.logits_dtype)

    def inputs(self, hidden: Tensor, rows: SelectedRows, chunk: slice) -> Tensor:  # [N, H] -> [n, H]
        """A chunk's hidden states as the GEMMs take them; 0 where masked."""
        values = self._cast(hidden[rows.slice(chunk)])
        return values if rows.mask is None else torch.where(rows.mask[chunk, None], values, 0)

    @property
    def writes_parameters(self) -> bool:
        """Whether one GEMM makes the weight's gradient as the parameter has it: summed in fp32, rounded once."""
        dtypes = {self.gradient_dtype, self.compute_dtype, self.parameter_dtypes[0]}
        return len(dtypes) == 1 and writes_fp32(self.device)

    @property
    def multiple(self) -> int:
        """Of rows in a chunk."""
        return 1 if self.device.type == "cpu" else _GPU_MULTIPLE

    @property
    def row_bytes(self) -> int:
        return row_width(self.vocab, self.logits_dtype, self.device) * self.logits_dtype.itemsize

    def workspace(self, rows: int) -> Tensor:  # [rows, row_width]
        width = row_width(self.vocab, self.logits_dtype, self.device)
        return torch.empty(rows, width, dtype=self.logits_dtype, device=self.device)

    def logits(self, inputs: Tensor, workspace: Tensor) -> Tensor:  # [n, H], [n or more, row_width] -> [n, V]
        """The logits of rows of ``inputs``, in the workspace."""
        out = matmul(inputs, self.weight.t(), workspace[: inputs.shape[0], : self.vocab])
        return out if self.bias is None else out.add_(self.bias)

    def gradient(self, workspace: Tensor, rows: int) -> Tensor:  # [rows or more, row_width] -> [rows, V]
        """Where the gradient of logits goes: over them, or, where it is narrower, into the back half of each row."""
        if self.gradient_dtype == self.logits_dtype:
            return workspace[:rows, : self.vocab]
        width = workspace.shape[1]
        return workspace[:rows].view(self.gradient_dtype)[:, width : width + self.vocab]


def project_back(dlogits: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:  # [n, V], [V, H] -> [n, H]
    """``dlogits W``, in ``dtype`` where a GEMM can write it.

    On a CPU few rows sum a large vocabulary in blocks. Libraries have kernels for few rows, and for those left over in
    a thread's share, that sum it in sequence: ten times the error of a GEMM of many rows over 129280 columns. How many
    rows are few differs: one on Intel, up to three on AMD, up to 15 with MKL_CBWR. Half precision is rounded anyway.
    """
    rows, vocab = dlogits.shape
    if not writes_fp32(weight.device):
        dtype = torch.promote_types(dlogits.dtype, weight.dtype)
    on_cpu = weight.device.type == "cpu"
    is_few = on_cpu and rows < _FEW_ROWS_A_THREAD * torch.get_num_threads()
    if is_few and vocab > _FEWEST_SUMMED and dtype in (torch.float32, torch.float64):
        return _sum_in_blocks(dlogits.to(dtype), weight.to(dtype))
    if not on_cpu and rows < _FEWEST_ROWS:
        dlogits = torch.nn.functional.pad(dlogits, (0, 0, 0, -rows % _FEWEST_ROWS))
    out = torch.empty(dlogits.shape[0], weight.shape[1], dtype=dtype, device=weight.device)
    return matmul(dlogits, weight, out)[:rows]


def _sum_in_blocks(a: Tensor, b: Tensor) -> Tensor:  # [n, k], [k, m] -> [n, m]
    """``a b`` as partial sums over ``k``, and their sum."""
    size = a.shape[1] // _SUMS
    summed = size * _SUMS
    blocks = a[:, :summed].unflatten(1, (_SUMS, size)).transpose(0, 1)
    out = torch.bmm(blocks, b[:summed].unflatten(0, (_SUMS, size))).sum(0)
    return out.addmm_(a[:, summed:], b[summed:])
