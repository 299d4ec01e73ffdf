"""Checks of a head's tensors, dtypes and memory, before any launch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_kernels.calls import Call
from grpo_kernels.dtypes import accumulation_dtype
from grpo_kernels.ops.head.buffers import NeededGradients
from grpo_kernels.ops.head.gemm import Head, writes_fp32
from grpo_kernels.ops.head.memory import CPU_WORKSPACE_BYTES, WORKSPACE_ROWS, MemoryPlan, RowBytes
from grpo_kernels.validation import (
    FLOAT_DTYPES,
    check_device,
    check_float,
    check_ids,
    check_integer,
    check_shape,
    position_shapes,
)


@dataclass(frozen=True)
class HeadOptions(Call):
    """The dtypes of a head, and the bound of its memory.

    Args:
        compute_dtype: Inputs are rounded to it.
        logits_dtype: The logits' dtype.
        workspace_bytes: The bound, as for ``MemoryPlan.of``.
        bounds_sums: Whether it covers the sums of ``dW`` over several buffers.
    """

    compute_dtype: torch.dtype
    logits_dtype: torch.dtype
    workspace_bytes: int | None
    bounds_sums: bool = True

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        logits_dtype: torch.dtype | None,
        workspace_bytes: int | None,
        max_logits_bytes: int | None = None,
    ) -> HeadOptions:
        """Validates the arguments of a public function, but for the least bound, which ``check_bound`` knows."""
        check_bounds(workspace_bytes, max_logits_bytes)
        return cls(*head_dtypes(hidden, weight, logits_dtype), workspace_bytes)

    @property
    def arithmetic_dtype(self) -> torch.dtype:
        """The dtype of values per token."""
        return accumulation_dtype(self.compute_dtype)

    def head(self, backend: str, weight: Tensor, bias: Tensor | None) -> Head:
        """The projection."""
        return Head.of(backend, weight, bias, self.compute_dtype, self.logits_dtype)

    def check_bound(self, backend: str, weight: Tensor, bias: Tensor | None, hidden: Tensor, models: int = 1) -> None:
        """Checks that the memory of at least one row fits the bound, whatever rows turn out to have a gradient.

        Raises:
            ValueError: It does not.
        """
        if self.workspace_bytes is None or backend == "torch":  # which forms all logits
            return
        head, needs = self.head(backend, weight, bias), NeededGradients.of(hidden, weight, bias)
        rows = hidden.shape[:-1].numel()
        MemoryPlan.of(head, needs, rows, rows, self.workspace_bytes, (models - 1) * head.row_bytes)

    def with_saved_logits(self, head: Head, needs: NeededGradients, rows: int) -> tuple[HeadOptions, int]:
        """The default of ``max_logits_bytes``, and the bound of what is left.

        On a CPU logits are saved within the workspace: all of them if they fit, for their gradient is then written over
        them. Otherwise, and in a traced graph, which overwrites nothing, in one half of it, if chunks do not become so
        small that their GEMMs are slower. On a GPU none are: memory that is free at the first step may not be at the
        second.
        """
        if head.device.type != "cpu" or not needs.any:
            return self, 0
        bound = CPU_WORKSPACE_BYTES if self.workspace_bytes is None else self.workspace_bytes
        if not torch.compiler.is_compiling() and rows * head.row_bytes <= bound:
            return self, bound
        accumulator = 0 if self.workspace_bytes is None else RowBytes.of(head, needs).accumulator
        half = (bound - accumulator) // 2
        if half < min(WORKSPACE_ROWS, rows) * head.row_bytes:
            return self, 0
        return replace(self, workspace_bytes=half, bounds_sums=False), half


def flatten_hidden(hidden: Tensor) -> Tensor:  # [..., H] -> [N, H]
    """Detached hidden states, one row a position."""
    return hidden.detach().reshape(-1, hidden.shape[-1])


def predicting(hidden: Tensor, ids: Tensor) -> Tensor:  # [B, T or T + 1, H], [B, T] -> [B, T, H]
    """The hidden states of the positions that predict a token; packed ones are all of them."""
    return hidden if ids.dim() == 1 else hidden[:, : ids.shape[1]]


def shape_of_tokens(hidden: Tensor, tokens: int) -> tuple[int, ...]:  # [N, H], [B, T, H] or [B, T + 1, H]
    """The shape of as many tokens as these hidden states predict: ``(N,)`` or ``(B, T)``."""
    shape = hidden.shape[:-1]
    return shape if shape.numel() == tokens else (shape[0], shape[1] - 1)


def head_dtypes(
    hidden: Tensor, weight: Tensor, logits_dtype: torch.dtype | None, prefix: str = ""
) -> tuple[torch.dtype, torch.dtype]:
    """The compute dtype (autocast's, if it is on) and the logits' dtype (fp32 or fp64 by default).

    Raises:
        TypeError: The dtypes of the two inputs differ outside autocast, or ``logits_dtype`` does not fit.
    """
    device = hidden.device.type
    is_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if is_autocast and hidden.dtype != torch.float64:
        compute_dtype = torch.get_autocast_dtype(device)
    elif hidden.dtype != weight.dtype:
        raise TypeError(
            f"{prefix}lm_head_weight must have the dtype of {prefix}hidden_states, {hidden.dtype}, got {weight.dtype}"
        )
    else:
        compute_dtype = hidden.dtype
    wide = accumulation_dtype(compute_dtype)
    if logits_dtype is None:
        return compute_dtype, wide if device == "cpu" or writes_fp32(hidden.device) else compute_dtype
    if logits_dtype not in FLOAT_DTYPES or logits_dtype not in (compute_dtype, wide):
        wanted = " or ".join(dict.fromkeys((str(compute_dtype), str(wide))))
        raise TypeError(f"logits_dtype must be None or {wanted}, got {logits_dtype!r}")
    return compute_dtype, logits_dtype


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, ids_name: str = "ids", prefix: str = ""
) -> None:
    """Raises TypeError or ValueError unless hidden states, head and ids fit. Argument names begin with ``prefix``."""
    check_projection(hidden, weight, bias, prefix)
    check_ids(ids_name, ids)
    if ids.dim() not in (1, 2):
        raise ValueError(f"{ids_name} must have shape [B, T] or, packed, [N], got {list(ids.shape)}")
    if hidden.shape[:-1] != ids.shape:
        check_shape(f"{prefix}hidden_states", hidden, *position_shapes(ids, hidden.shape[-1]))
    check_device(hidden.device, [(ids_name, ids)])


def check_projection(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    """Raises TypeError or ValueError unless hidden states and head fit. Argument names begin with ``prefix``."""
    hidden_name, weight_name, bias_name = (prefix + name for name in ("hidden_states", "lm_head_weight", "bias"))
    check_float(hidden_name, hidden)
    check_float(weight_name, weight)
    size = hidden.shape[-1] if hidden.dim() else 0
    if size == 0:
        raise ValueError(f"{hidden_name} must have a last dimension of at least 1, got {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"{weight_name} must have shape [V, H] with V at least 1, got {list(weight.shape)}")
    rows, columns = weight.shape
    if columns != size and rows == size > columns:  # a vocabulary is larger than a hidden state
        takers = (
            f"give logits as {prefix}logits" if prefix else "grpo_loss, token_logprobs and token_divergence take logits"
        )
        raise ValueError(
            f"{hidden_name} must have {columns} columns, as {weight_name} [V, H] has, got {list(hidden.shape)}, the "
            f"shape of logits: {takers}"
        )
    if columns != size:
        way_out = f": transpose it, {weight_name}.T" if rows == size else ""
        raise ValueError(
            f"{weight_name} must have shape [V, {size}], as {hidden_name} have {size} columns, "
            f"got {list(weight.shape)}{way_out}"
        )
    if bias is not None:
        check_float(bias_name, bias)
        check_shape(bias_name, bias, (rows,))
    check_device(hidden.device, [(weight_name, weight), (bias_name, bias)])


def check_bounds(workspace_bytes: int | None, max_logits_bytes: int | None) -> None:
    """Raises ValueError if a bound is negative, or that of the workspace is 0."""
    for name, value, least in (("max_logits_bytes", max_logits_bytes, 0), ("workspace_bytes", workspace_bytes, 1)):
        if value is not None:
            check_integer(name, value)
            if value < least:
                raise ValueError(f"{name} must be None or at least {least}, got {value}")
