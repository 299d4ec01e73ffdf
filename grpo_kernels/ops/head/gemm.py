"""The GEMMs of a head: its logits, and the gradients of its inputs. Each writes to memory that the caller gives."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from grpo_kernels.ops.head.selection import SelectedRows

_MIN_GPU_ROWS = 4  # a GEMM on a GPU is padded to this many rows
_FEW_ROWS_PER_THREAD = 16  # with fewer, a GEMM on a CPU may sum the vocabulary in sequence
_PARTIAL_SUMS = 16  # into which the vocabulary is then split
_MAX_COLUMNS_IN_ONE_SUM = 2048  # a smaller vocabulary is not split
_GPU_MULTIPLE = 128  # on a GPU: of rows in a chunk, and of bytes from row to row
_NARROW_GRADIENT_BACKENDS = ("triton", "cuda")  # their row kernels can write a gradient narrower than its logits


def writes_fp32(device: torch.device) -> bool:
    """Whether a GEMM of half-precision inputs can write fp32: only CUDA and ROCm have ``torch.mm(out_dtype=)``."""
    return device.type == "cuda"


def matmul(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:  # [n, k], [k, m], [n, m]
    """Writes ``a b`` to ``out``, or adds it to ``out``. Products are summed in the dtype of ``out``, or a wider one.

    If no GEMM writes that dtype from these inputs, they are widened first. That is exact, but slow and needs memory.
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
    """Elements from one row of a workspace to the next. On a GPU every row begins at a multiple of 128 bytes."""
    multiple = 1 if device.type == "cpu" else _GPU_MULTIPLE // dtype.itemsize
    return -(-vocab // multiple) * multiple


class Head:
    """A projection ``h W^T + b``.

    Args:
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        compute_dtype: Hidden states, weight and bias are rounded to it.
        logits_dtype: The dtype of the logits.
        gradient_dtype: The dtype of the logits' gradient, from which the GEMMs of the backward read.
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
        """The head with the gradient dtype of the backend's row kernels: C++ writes the logits' dtype."""
        gradient_dtype = compute_dtype if backend in _NARROW_GRADIENT_BACKENDS else logits_dtype
        return cls(weight, bias, compute_dtype, logits_dtype, gradient_dtype)

    @property
    def vocab(self) -> int:
        return self.parameter.shape[0]

    @cached_property
    def weight(self) -> Tensor:
        """The weight in the dtype of the GEMMs. Cast at first use: a call may project no row."""
        return self._cast(self.parameter)

    def _cast(self, values: Tensor) -> Tensor:
        """``values`` rounded to the compute dtype; then widened if no GEMM writes fp32 from half precision."""
        values = values.detach().to(self.compute_dtype)
        return values if writes_fp32(self.device) else values.to(self.logits_dtype)

    def inputs(self, hidden: Tensor, rows: SelectedRows, chunk: slice) -> Tensor:  # [N, H] -> [n, H]
        """A chunk's hidden states in the dtype of the GEMMs; 0 where masked."""
        values = self._cast(hidden[rows.slice(chunk)])
        return values if rows.mask is None else torch.where(rows.mask[chunk, None], values, 0)

    @property
    def writes_dweight(self) -> bool:
        """Whether one GEMM can write ``dW`` in the parameter's dtype: summed in fp32, rounded once."""
        dtypes = {self.gradient_dtype, self.compute_dtype, self.parameter_dtypes[0]}
        return len(dtypes) == 1 and writes_fp32(self.device)

    @property
    def row_multiple(self) -> int:
        """Chunks have a multiple of this many rows."""
        return 1 if self.device.type == "cpu" else _GPU_MULTIPLE

    @property
    def row_bytes(self) -> int:
        return row_width(self.vocab, self.logits_dtype, self.device) * self.logits_dtype.itemsize

    def workspace(self, rows: int) -> Tensor:  # [rows, row_width]
        width = row_width(self.vocab, self.logits_dtype, self.device)
        return torch.empty(rows, width, dtype=self.logits_dtype, device=self.device)

    def logits(self, inputs: Tensor, workspace: Tensor) -> Tensor:  # [n, H], [n or more, row_width] -> [n, V]
        """The logits of ``inputs``, written to the workspace."""
        out = matmul(inputs, self.weight.t(), workspace[: inputs.shape[0], : self.vocab])
        return out if self.bias is None else out.add_(self.bias)

    def gradient(self, workspace: Tensor, rows: int) -> Tensor:  # [rows or more, row_width] -> [rows, V]
        """The memory for the gradient of the logits: over them, or, if it is narrower, the back half of each row."""
        if self.gradient_dtype == self.logits_dtype:
            return workspace[:rows, : self.vocab]
        width = workspace.shape[1]
        return workspace[:rows].view(self.gradient_dtype)[:, width : width + self.vocab]


def project_back(dlogits: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:  # [n, V], [V, H] -> [n, H]
    """``dlogits W``, in ``dtype`` if a GEMM can write it.

    On a CPU, a large vocabulary is summed in blocks if there are few rows. CPU libraries have kernels for few rows, and
    for the rows left over in a thread's share, that sum in sequence. Over 129280 columns their error is ten times that
    of a GEMM of many rows. "Few" is one row on Intel, up to three on AMD and up to 15 with MKL_CBWR. Half-precision
    results need no blocks: their own rounding is larger.
    """
    rows, vocab = dlogits.shape
    if not writes_fp32(weight.device):
        dtype = torch.promote_types(dlogits.dtype, weight.dtype)
    on_cpu = weight.device.type == "cpu"
    is_few = on_cpu and rows < _FEW_ROWS_PER_THREAD * torch.get_num_threads()
    if is_few and vocab > _MAX_COLUMNS_IN_ONE_SUM and dtype in (torch.float32, torch.float64):
        return _sum_in_blocks(dlogits.to(dtype), weight.to(dtype))
    if not on_cpu and rows < _MIN_GPU_ROWS:
        dlogits = torch.nn.functional.pad(dlogits, (0, 0, 0, -rows % _MIN_GPU_ROWS))
    out = torch.empty(dlogits.shape[0], weight.shape[1], dtype=dtype, device=weight.device)
    return matmul(dlogits, weight, out)[:rows]


def _sum_in_blocks(a: Tensor, b: Tensor) -> Tensor:  # [n, k], [k, m] -> [n, m]
    """``a b`` as a sum of partial sums over ``k``."""
    size = a.shape[1] // _PARTIAL_SUMS
    summed = size * _PARTIAL_SUMS
    blocks = a[:, :summed].unflatten(1, (_PARTIAL_SUMS, size)).transpose(0, 1)
    out = torch.bmm(blocks, b[:summed].unflatten(0, (_PARTIAL_SUMS, size))).sum(0)
    return out.addmm_(a[:, summed:], b[summed:])
