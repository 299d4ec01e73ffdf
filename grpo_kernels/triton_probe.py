"""A minimal Triton kernel, to try whether Triton compiles and launches on a device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _double_kernel(value_ptr):
    tl.store(value_ptr, tl.load(value_ptr) * 2)


def launch(device: torch.device) -> None:
    """Launches it. Raises whatever a driver, a compiler or a linker raises."""
    _double_kernel[(1,)](torch.ones(1, device=device))
