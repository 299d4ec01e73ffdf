"""The inputs of a token other than its log-probability, as arguments of Triton kernels.

Each tensor is its own argument: Triton would specialise a tuple by the alignment of the addresses in it.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import fields as fields_of

import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.loss.fields import TokenFields
from grpo_kernels.ops.tokens.triton.launch import as_bytes

_NAMES = [field.name for field in fields_of(TokenFields)]
#: The kernel arguments; their addresses must not specialise a kernel.
FIELDS = [f"{name}_ptr" for name in _NAMES]
#: Dimensions of advantages and weights: 0 is one value in all, 1 one per completion, 2 one per token.
Layout = namedtuple("Layout", ["advantages", "weights", "entropy_weights"])
_PER_COMPLETION, _PER_TOKEN = tl.constexpr(1), tl.constexpr(2)


def kernel_fields(fields: TokenFields) -> list[Tensor | None]:
    """The tensors in the order of ``FIELDS``."""
    tensors = {name: getattr(fields, name) for name in _NAMES}
    return list((tensors | {"mask": as_bytes(fields.mask)}).values())


def layout_of(fields: TokenFields) -> Layout:
    """The layout, from the tensors' dimensions."""
    shared = (getattr(fields, name) for name in Layout._fields)
    return Layout(*(0 if values is None else values.dim() for values in shared))


@triton.jit
def completion_of(sequence_ids_ptr, s, n, mask):
    """The completion of tokens ``n``: their sequence id, or ``s`` without ids."""
    completion = s
    if sequence_ids_ptr is not None:
        completion = tl.load(sequence_ids_ptr + n, mask=mask, other=0)
    return completion


@triton.jit
def load_field(ptr, s, n, mask, LAYOUT: tl.constexpr):
    """The values of tokens ``n`` of completion ``s``."""
    at = ptr + n * 0
    if LAYOUT == _PER_COMPLETION:
        at = at + s
    elif LAYOUT == _PER_TOKEN:
        at = at + n
    return tl.load(at, mask=mask, other=0.0)
