"""The GEMMs of a head: its logits, and the gradients of its inputs. Each writes to memory that the caller gives."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from grpo_kernels.dtypes import accumulation_dtype
from grpo_kernels.ops.head.selection import SelectedRows

_MIN_GPU_ROWS = 4  # a GEMM on a GPU is padded to this many rows
_FEW_ROWS_PER_THREAD = 16  # with fewer, a GEMM on a CPU may sum the vocabulary in sequence
_PARTIAL_SUMS = 16  # into which the vocabulary is then split
_MAX_COLUMNS_IN_ONE_SUM = 2048  # a smaller vocabulary is not split
_ROUNDED_BYTES = 1 << 24  # of products that exist at once before they are rounded
_GPU_MULTIPLE = 128  # on a GPU: of rows in a chunk, and of bytes from row to row
_NARROW_GRADIENT_BACKENDS = ("triton", "cuda")  # their row kernels can write gradients narrower than the logits


def writes_fp32(device: torch.device) -> bool:
    """Whether a GEMM of half-precision inputs can write fp32: only CUDA and ROCm have ``torch.mm(out_dtype=)``."""
    return device.type == "cuda"


def matmul(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:  # [n, k], [k, m], [n, m]
    """Writes ``a b`` to ``out``, or adds it to ``out``. Products are summed in the dtype of ``out``, or a wider one.

    If no GEMM writes that dtype from these inputs, they are widened first. That is exact, but slow and needs memory.
    Results that are rounded are computed some rows at a time.
    """
    if a.dtype == b.dtype == out.dtype:
        return out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    is_half = a.dtype in (torch.bfloat16, torch.float16) and out.dtype == torch.float32
    if a.dtype == b.dtype and is_half and writes_fp32(out.device):
        if add:
            return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), out.dtype)
    if not writes_fp32(out.device):  # no GEMM sums half precision in fp32 and writes it
        wide = torch.promote_types(wide, torch.float32)
    if wide == out.dtype:
        return matmul(a.to(wide), b.to(wide), out, add=add)
    b = b.to(wide)
    step = max(1, _ROUNDED_BYTES // (out.shape[1] * wide.itemsize))
    for start in range(0, out.shape[0], step):
        product = torch.mm(a[start : start + step].to(wide), b)
        rounded = out[start : start + step]
        rounded.add_(product) if add else rounded.copy_(product)
    return out


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
        self.parameter_bias = bias

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

    @cached_property
    def bias(self) -> Tensor | None:
        """The bias in the dtype of the logits."""
        return None if self.parameter_bias is None else self._cast(self.parameter_bias).to(self.logits_dtype)

    def _cast(self, values: Tensor) -> Tensor:
        """``values`` rounded to the compute dtype; then widened if no GEMM writes fp32 from half precision."""
        values = values.detach().to(self.compute_dtype)
        return values if writes_fp32(self.device) else values.to(self.logits_dtype)

    def inputs(
        self, hidden: Tensor, rows: SelectedRows, chunk: slice, positions: Tensor | None = None
    ) -> Tensor:  # [N, H] -> [n, H]
        """A chunk's hidden states in the dtype of the GEMMs; 0 where masked. ``positions``: see ``token_positions``."""
        tokens = rows.slice(chunk)
        values = self._cast(hidden[tokens if positions is None else positions[tokens]])
        return values if rows.mask is None else torch.where(rows.mask[chunk, None], values, 0)

    @property
    def is_in_place(self) -> bool:
        """Whether row kernels write the gradient over the logits: they have one dtype."""
        return self.gradient_dtype == self.logits_dtype

    @property
    def row_multiple(self) -> int:
        """Chunks have a multiple of this many rows."""
        return 1 if self.device.type == "cpu" else _GPU_MULTIPLE

    @property
    def row_bytes(self) -> int:
        """Size of a row of the workspace."""
        return self._width(self.logits_dtype) * self.logits_dtype.itemsize

    @property
    def gradient_row_bytes(self) -> int:
        """Size of a row of the buffer."""
        return self._width(self.gradient_dtype) * self.gradient_dtype.itemsize

    @property
    def dweight_dtype(self) -> torch.dtype:
        """The dtype in which ``dW`` is written if nothing is added to it: the parameter's, if a GEMM can write that."""
        sums, dtype = accumulation_dtype(self.compute_dtype), self.parameter_dtypes[0]
        return dtype if dtype in (self.compute_dtype, sums) or not writes_fp32(self.device) else sums

    @property
    def dweight_bytes(self) -> int:
        """Size of the sums of ``dW``, which are fp32 (fp64)."""
        return self.parameter.numel() * accumulation_dtype(self.compute_dtype).itemsize

    @property
    def accumulator_bytes(self) -> int:
        """Size of these sums beside ``dW``; 0 if they are ``dW`` itself."""
        return 0 if self.parameter_dtypes[0] == accumulation_dtype(self.compute_dtype) else self.dweight_bytes

    def _width(self, dtype: torch.dtype) -> int:
        return row_width(self.vocab, dtype, self.device)

    def workspace(self, rows: int) -> Tensor:  # [rows, row_width]
        """Memory for logits."""
        return torch.empty(rows, self._width(self.logits_dtype), dtype=self.logits_dtype, device=self.device)

    def buffer(self, rows: int) -> Tensor:  # [rows, row_width]
        """Memory for gradients of logits, beside the workspace."""
        return torch.empty(rows, self._width(self.gradient_dtype), dtype=self.gradient_dtype, device=self.device)

    def logits(self, inputs: Tensor, workspace: Tensor) -> Tensor:  # [n, H], [n or more, row_width] -> [n, V]
        """The logits of ``inputs``, written to the workspace."""
        out = matmul(inputs, self.weight.t(), workspace[: inputs.shape[0], : self.vocab])
        return out if self.bias is None else out.add_(self.bias)


def project_back(
    dlogits: Tensor,  # [n, V]
    weight: Tensor,  # [V, H]
    dtype: torch.dtype,
    scratch: Tensor | None = None,
) -> Tensor:  # [n, H]
    """``dlogits W``, in ``dtype`` if a GEMM can write it, and in ``scratch`` if that has the dtype and is large enough.

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
    size = dlogits.shape[0] * weight.shape[1]
    if scratch is not None and scratch.dtype == dtype and scratch.numel() >= size:
        out = scratch.view(-1)[:size].view(-1, weight.shape[1])
    else:
        out = torch.empty(dlogits.shape[0], weight.shape[1], dtype=dtype, device=weight.device)
    return matmul(dlogits, weight, out)[:rows]


def _sum_in_blocks(a: Tensor, b: Tensor) -> Tensor:  # [n, k], [k, m] -> [n, m]
    """``a b`` as a sum of partial sums over ``k``."""
    size = a.shape[1] // _PARTIAL_SUMS
    summed = size * _PARTIAL_SUMS
    blocks = a[:, :summed].unflatten(1, (_PARTIAL_SUMS, size)).transpose(0, 1)
    out = torch.bmm(blocks, b[:summed].unflatten(0, (_PARTIAL_SUMS, size))).sum(0)
    return out.addmm_(a[:, summed:], b[summed:])
