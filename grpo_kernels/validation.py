"""Checks of public functions' arguments. Messages name the argument, what was expected and what was given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _no_tensor(name: str, value: Any) -> TypeError:
    parameter = next((each for each in ("weight", "bias") if name.endswith(each)), "")
    way_out = f": pass its {parameter}" if isinstance(getattr(value, parameter, None), Tensor) else ""
    return TypeError(f"{name} must be a tensor, got {type(value).__name__}{way_out}")


def check_float(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless ``tensor`` is a tensor of a supported floating-point dtype."""
    if not isinstance(tensor, Tensor):
        raise _no_tensor(name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_real(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless ``tensor`` holds real numbers: floating point, or integers, which are taken as such."""
    if not isinstance(tensor, Tensor):
        raise _no_tensor(name, tensor)
    if tensor.dtype not in FLOAT_DTYPES and tensor.is_complex():
        raise TypeError(f"{name} must be floating point or integer, got {tensor.dtype}")


def check_number(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is a number, or what turns into one, as a 0-dim tensor; a bool is none."""
    if is_bool(value) or not (isinstance(value, (int, float)) or hasattr(value, "__float__")):
        raise TypeError(f"{name} must be a number, got {value!r}")


def is_bool(value: Any) -> bool:
    """Whether ``value`` is a truth value of Python's, NumPy's or, as a tensor, torch's."""
    if isinstance(value, (bool, int, float)):  # the usual ones, which torch.compile can trace
        return isinstance(value, bool)
    return _is_numpy_bool(value) or (isinstance(value, Tensor) and value.dtype == torch.bool)


def _is_numpy_bool(value: Any) -> bool:
    return type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")


def as_flag(name: str, value: Any) -> bool:
    """``value`` as Python's bool. Raises TypeError unless it is True or False, Python's or NumPy's."""
    if not isinstance(value, bool) and not _is_numpy_bool(value):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_integer(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is an integer; a bool is none."""
    if is_bool(value) or not (isinstance(value, int) or hasattr(value, "__index__")):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def check_ids(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless ``tensor`` holds int32 or int64 token ids."""
    if not isinstance(tensor, Tensor):
        raise _no_tensor(name, tensor)
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {tensor.dtype}")


def check_mask(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless ``tensor`` is a tensor that can be a mask: bool, integer or floating point."""
    if not isinstance(tensor, Tensor):
        raise _no_tensor(name, tensor)
    if tensor.is_complex():
        raise TypeError(f"{name} must be bool, integer or floating point, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, *expected: Sequence[int]) -> None:
    """Raises ValueError unless ``tensor`` has one of the expected shapes."""
    # compared, not hashed: a hash would specialise a traced graph to these sizes
    if tensor.shape != expected[0] and not any(tuple(tensor.shape) == tuple(shape) for shape in expected):
        wanted = " or ".join(str(list(shape)) for shape in expected)
        raise ValueError(f"{name} must have shape {wanted}, got {list(tensor.shape)}")


def check_device(device: torch.device, tensors: Iterable[tuple[str, Tensor | None]]) -> None:
    """Raises unless every given argument is a tensor on ``device``."""
    for name, tensor in tensors:
        if tensor is not None and not isinstance(tensor, Tensor):
            raise _no_tensor(name, tensor)
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on {device}, like the first argument, got {tensor.device}")


def position_shapes(ids: Tensor, size: int) -> list[tuple[int, ...]]:
    """The shapes of values that predict ids: ``[B, T, size]`` or ``[B, T + 1, size]``; packed ``[N, size]``."""
    shapes = [(*ids.shape, size)]
    if ids.dim() == 2:
        shapes.append((ids.shape[0], ids.shape[1] + 1, size))
    return shapes


def check_logits(logits: Tensor, ids: Tensor, ids_name: str = "ids") -> None:
    """Raises unless ``logits`` is ``[B, T, V]`` or ``[B, T + 1, V]`` for ids ``[B, T]``, or ``[N, V]`` for ``[N]``."""
    check_float("logits", logits)
    check_ids(ids_name, ids)
    if ids.dim() not in (1, 2):
        raise ValueError(f"{ids_name} must have shape [B, T] or, packed, [N], got {list(ids.shape)}")
    vocab = logits.shape[-1] if logits.dim() else 0
    if vocab == 0:
        raise ValueError(f"logits must have a vocabulary of at least 1, got shape {list(logits.shape)}")
    if logits.shape[:-1] != ids.shape:
        check_shape("logits", logits, *position_shapes(ids, vocab))


def check_transform(temperature: float, softcap: float | None, logit_scale: float, prefix: str = "") -> None:
    """Raises ValueError unless temperature, scale and the softcap, if there is one, are positive and finite."""
    check_number(f"{prefix}temperature", temperature)
    if softcap is not None:
        check_number(f"{prefix}softcap", softcap)
    check_number(f"{prefix}logit_scale", logit_scale)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"{prefix}temperature must be finite and greater than 0, got {temperature!r}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"{prefix}softcap must be None, or finite and greater than 0, got {softcap!r}")
    if not (logit_scale > 0 and math.isfinite(logit_scale)):
        raise ValueError(f"{prefix}logit_scale must be finite and greater than 0, got {logit_scale!r}")


def check_writable(name: str, tensor: Tensor, argument: str) -> None:
    """Raises ValueError unless ``tensor`` can be overwritten row by row: dense rows that do not overlap."""
    strides = tensor.stride()
    extent = 1
    for size, stride in sorted(zip(tensor.shape, strides, strict=True), key=lambda dim: dim[1]):
        if size > 1 and stride < extent:
            raise ValueError(f"{name} must not overlap itself for {argument}, got strides {list(strides)}")
        extent = max(extent, stride * size) if size > 1 else extent
    if tensor.shape[-1] > 1 and strides[-1] != 1:
        raise ValueError(f"{name} must have a dense last dimension for {argument}, got strides {list(strides)}")


def may_read(tensor: Tensor, debug: bool) -> bool:
    """Whether values may be read: on the CPU, elsewhere with ``debug``; never while a graph is traced."""
    is_traced = torch.compiler.is_compiling() or isinstance(tensor, torch._subclasses.FakeTensor)
    return (debug or tensor.device.type == "cpu") and not is_traced


def check_id_range(name: str, ids: Tensor, mask: Tensor | None, vocab: int, debug: bool) -> None:
    """Raises ValueError for an unmasked id outside the vocabulary, if values may be read. GPU kernels flag it."""
    if not may_read(ids, debug):
        return
    if ids.numel() == 0:
        return
    low, high = ids.aminmax()
    if low.item() >= 0 and high.item() < vocab:
        return  # the usual case, which needs no search
    bad = (ids < 0) | (ids >= vocab)
    if mask is not None:
        bad = bad & (mask != 0)
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise ValueError(f"{name} must lie in [0, {vocab}) where unmasked, got {ids[tuple(at)].item()} at {at}")


def check_num_items(num_items_in_batch: float | Tensor | None, mask: Tensor, debug: bool, *, divides: bool) -> None:
    """Raises unless it is one finite number, if values may be read; above 0 if it divides and tokens are unmasked."""
    if num_items_in_batch is None:
        return
    items = num_items_in_batch
    check_number("num_items_in_batch", items)
    if isinstance(items, Tensor):
        if items.numel() != 1:
            raise ValueError(f"num_items_in_batch must be a number or a 0-dim tensor, got shape {list(items.shape)}")
        if not may_read(items, debug):
            return
        items = items.item()
    if not 0 <= items < math.inf:
        raise ValueError(f"num_items_in_batch must be finite and at least 0, got {items!r}")
    if divides and items == 0 and may_read(mask, debug) and mask.any():
        raise ValueError("num_items_in_batch must be greater than 0 where tokens are unmasked, got 0")


def check_no_nan(name: str, values: Tensor, mask: Tensor, *, finite: bool = False) -> None:
    """Raises ValueError for a NaN where unmasked, with ``finite`` also for an infinity. Not while a graph is traced."""
    if not may_read(values, True):
        return
    values = values.reshape(mask.shape)
    bad = mask & (~values.isfinite() if finite else values.isnan())
    if bad.any():
        at = bad.nonzero()[0].tolist()
        wanted = "be finite" if finite else "not be NaN"
        raise ValueError(f"{name} must {wanted} where unmasked, got {values[tuple(at)].item()} for the token at {at}")


def check_cu_seqlens(cu_seqlens: Tensor | None, ids: Tensor, debug: bool) -> None:
    """Raises unless packed ids come with ``cu_seqlens [S + 1]`` from 0 to N, and unpacked ids without."""
    if cu_seqlens is None:
        if ids.dim() == 1:
            raise ValueError(f"cu_seqlens must be given for packed tokens of shape {list(ids.shape)}, got None")
        return
    check_ids("cu_seqlens", cu_seqlens)
    if ids.dim() != 1:
        way_out = ": packed tokens are [N], drop the first dimension of all inputs" if ids.shape[0] == 1 else ""
        raise ValueError(f"cu_seqlens must be None for tokens of shape {list(ids.shape)}, got a tensor{way_out}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must have shape [S + 1] with S at least 1, got {list(cu_seqlens.shape)}")
    if may_read(cu_seqlens, debug):
        ends = (int(cu_seqlens[0]), int(cu_seqlens[-1]))
        if ends != (0, ids.shape[0]) or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(f"cu_seqlens must rise from 0 to {ids.shape[0]}, got {cu_seqlens.tolist()}")
