"""Launch parameters of kernels over rows of logits: alignment, transform, block sizes, number of programs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from grpo_kernels.ops.rows.transform import Transform
from grpo_kernels.ops.tokens.triton.launch import processors_of

#: ``Blocks`` by architecture, kernel, element size in bytes and vocabulary. Their source is "rule" (derived from how
#: many threads and rows fit, never timed) or "measured" (written by ``make tune`` on that GPU).
TABLE = Path(__file__).with_name("triton_blocks.json")
#: Arguments that must not specialise a kernel: strides, and pointers to per-token values, which are read one by one.
STRIDES = ["batch_stride", "row_stride", "dbatch_stride", "drow_stride"]
TOKENS = ["ids_ptr", "mask_ptr", "first_bad_ptr"]
_MOST_THREADS = 1024  # of a program, on any GPU
_REGISTERS = 65536  # of an NVIDIA multiprocessor


class Curve(IntEnum):
    """The function of the logits before scaling; mirrored in softmax.py."""

    PLAIN = 0
    SOFTCAP = 1


class Alignment(IntEnum):
    """Whether rows start at multiples of 16 bytes from the first; mirrored in softmax.py."""

    ALIGNED = 0
    SHIFTED = 1  # not all do, but inputs and outputs are shifted alike: loads start before the row
    LOOSE = 2  # inputs and outputs are shifted differently


@dataclass(frozen=True)
class Blocks:
    """Block sizes of a row kernel.

    Args:
        num_warps: Warps of a program. A lane of a block is a thread.
        unroll: Loads of 16 bytes per thread and block. The loads of two blocks are in flight at once.
        per_processor: Programs at once on a multiprocessor; each has one row. If rows are read twice, all rows in
            flight should fit the cache, so this may be less than 1.
    """

    num_warps: int
    unroll: int
    per_processor: float

    def launch(self, rows: int, vector: int, device: torch.device, is_plain: bool) -> tuple[tuple[int], dict[str, int]]:
        """The grid, and the kernel's constants.

        Args:
            rows: Number of rows.
            vector: Elements per 16 bytes.
            device: The device of the rows.
            is_plain: Whether rows are aligned whole vectors and only the basic statistics are computed. Otherwise a
                thread needs more registers, so a program has half the threads.
        """
        processors, lanes = processors_of(device)
        num_warps = min(self.num_warps, _MOST_THREADS // lanes)
        num_warps = num_warps if is_plain else max(1, num_warps // 2)
        options = {"LANES": lanes * num_warps, "UNROLL": self.unroll, "VECTOR": vector, "num_warps": num_warps}
        if architecture(device).startswith("sm_"):  # registers per thread that let per_processor programs run at once
            threads = 32 * num_warps * math.ceil(self.per_processor)
            options["maxnreg"] = min(255, _REGISTERS // threads // 8 * 8)
        return (min(rows, max(1, round(processors * self.per_processor))),), options


def blocks_of(kernel: str, vocab: int, itemsize: int, device: torch.device) -> Blocks:
    """The table's entry for this kernel, element size and architecture with the nearest vocabulary.

    Args:
        kernel: "statistics" (rows read once), "gradient" (read and written once), "loss" (read twice, written once).
        vocab, itemsize: Of the logits.
        device: The device of the logits.
    """
    name = architecture(device)
    fallbacks = ("sm_80", "any") if name.startswith("sm_") else ("any",)
    itemsize = min(itemsize, 4)  # fp64 is only for tests
    rows = next(rows for arch in (name, *fallbacks) if (rows := _table().get((arch, kernel, itemsize))))
    return min(rows, key=lambda row: abs(math.log(row[0] / vocab)))[1]


@cache
def _table() -> dict[tuple[str, str, int], list[tuple[int, Blocks]]]:
    table: dict[tuple[str, str, int], list[tuple[int, Blocks]]] = {}
    for row in json.loads(TABLE.read_text())["blocks"]:
        key = (row["architecture"], row["kernel"], row["itemsize"])
        blocks = Blocks(row["num_warps"], row["unroll"], row["per_processor"])
        table.setdefault(key, []).append((row["vocab"], blocks))
    return table


@cache
def architecture(device: torch.device) -> str:
    """The architecture as the table names it: "sm_90", "gfx942"; "any" if it is neither NVIDIA nor AMD."""
    if device.type != "cuda":
        return "any"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def curve_of(transform: Transform) -> Curve:
    """The curve of a transform."""
    return Curve.SOFTCAP if transform.softcap > 0 else Curve.PLAIN


def transform_arguments(transform: Transform) -> tuple[float, float, float]:
    """``inner``, ``rate`` and ``slope`` of the transform; see softmax.py."""
    slope = transform.logit_scale / transform.temperature
    if transform.softcap > 0:
        outer = transform.softcap / transform.temperature
        return transform.logit_scale / transform.softcap, outer * math.log2(math.e), slope
    return 1.0, slope * math.log2(math.e), slope


def check_rows(logits: Tensor, ids: Tensor, dlogits: Tensor | None = None) -> None:
    """Raises ValueError unless logits are ``[B, T, V]`` or ``[B, T + 1, V]`` for ids ``[B, T]``, and dlogits fit them.

    Kernels trust their arguments; this protects calls of a registered op, which skip the public function's checks.
    """
    fits = logits.dim() == 3 and ids.dim() == 2 and logits.shape[:2] in (ids.shape, (ids.shape[0], ids.shape[1] + 1))
    if not fits or ids.dtype != torch.int64 or not ids.is_contiguous() or ids.device != logits.device:
        raise ValueError(
            f"ids must be contiguous int64 [B, T] beside logits [B, T or T + 1, V], got {list(ids.shape)} {ids.dtype} "
            f"on {ids.device} beside {list(logits.shape)} on {logits.device}"
        )
    if dlogits is not None and (dlogits.shape != logits.shape or dlogits.element_size() > logits.element_size()):
        raise ValueError(
            f"dlogits must have the shape of logits, {list(logits.shape)}, and no wider elements than {logits.dtype}, "
            f"got {list(dlogits.shape)} {dlogits.dtype}"
        )


def vector_of(dtype: torch.dtype) -> int:
    """Elements per 16 bytes."""
    return 16 // dtype.itemsize


def alignment_of(vector: int, strides: tuple[int, int], dstrides: tuple[int, int] | None = None) -> Alignment:
    """The alignment of the rows that a kernel reads, and of those that it writes, if any.

    Args:
        vector: Elements per 16 bytes.
        strides: Of the rows that are read.
        dstrides: Of the rows that are written.
    """
    both = strides + (dstrides or ())
    if all(stride % vector == 0 for stride in both):
        return Alignment.ALIGNED
    return Alignment.SHIFTED if dstrides is None or dstrides == strides else Alignment.LOOSE
