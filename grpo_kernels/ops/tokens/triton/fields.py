"""What Triton kernels read of a token beside its log-probability.

Tensors are arguments of their own: in a tuple Triton compiles for what their addresses are multiples of.
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
#: The arguments of a kernel, which is compiled for none of their addresses.
FIELDS = [f"{name}_ptr" for name in _NAMES]
#: How advantages and weights lie: one for all, one a completion, or one a token.
Layout = namedtuple("Layout", ["advantages", "weights", "entropy_weights"])
_OF_COMPLETION, _OF_TOKEN = tl.constexpr(1), tl.constexpr(2)


def kernel_fields(fields: TokenFields) -> list[Tensor | None]:
    """The tensors in the order of ``FIELDS``."""
    tensors = {name: getattr(fields, name) for name in _NAMES}
    return list((tensors | {"mask": as_bytes(fields.mask)}).values())


def layout_of(fields: TokenFields) -> Layout:
    """The layout by the tensors' dimensions."""
    shared = (getattr(fields, name) for name in Layout._fields)
    return Layout(*(0 if values is None else values.dim() for values in shared))


@triton.jit
def completion_of(sequence_ids_ptr, s, n, mask):
    """Which completion tokens ``n`` are of: ``s`` unless ids tell."""
    completion = s
    if sequence_ids_ptr is not None:
        completion = tl.load(sequence_ids_ptr + n, mask=mask, other=0)
    return completion


@triton.jit
def load_field(ptr, s, n, mask, LAYOUT: tl.constexpr):
    """The values that tokens ``n`` of completion ``s`` have."""
    at = ptr + n * 0
    if LAYOUT == _OF_COMPLETION:
        at = at + s
    elif LAYOUT == _OF_TOKEN:
        at = at + n
    return tl.load(at, mask=mask, other=0.0)
