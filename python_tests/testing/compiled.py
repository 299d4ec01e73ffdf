"""Triton kernels compiled for GPUs that are not there: what launchers launch, and what the compiler makes of it."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from grpo_kernels import backends
from grpo_kernels.ops.head import buffers, gemm, inputs, reference_model, sources
from grpo_kernels.ops.rows.triton import launch as row_launch
from testing.gpu_heads import gpu_row_width

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_OPTIONS = ("num_warps", "maxnreg")


@dataclass(frozen=True)
class Launch:
    """A kernel with all that it is compiled for.

    Args:
        kernel: The function.
        signature: Type of each argument; "constexpr" for constants.
        constants: Values of those.
        divisible: Positions of arguments that are known to be multiples of 16.
        options: The compiler's: warps of a program, most registers of a thread.
        key: What Triton's launcher looks a compiled kernel up by.
    """

    kernel: JITFunction
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[int, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, int], ...]
    key: str = ""

    @classmethod
    def of(cls, kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
        """What ``kernel[grid](*args, **kwargs)`` would compile, by the rules that Triton's launcher goes by."""
        options = tuple((name, kwargs[name]) for name in _OPTIONS if name in kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("grid", "warmup", *_OPTIONS)}
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, divisible = [], [], []
        for index, param in enumerate(kernel.params):
            value = given[param.name]
            is_specialised = not (param.do_not_specialize or param.annotation_type)
            if param.is_constexpr or value is None or (is_specialised and type(value) is int and value == 1):
                signature.append((param.name, "constexpr"))
                constants.append((index, value))
                continue
            signature.append((param.name, param.annotation_type or triton.runtime.jit.mangle_type(value)))
            address = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if is_specialised and address % 16 == 0:
                divisible.append(index)
        return cls(kernel, tuple(signature), tuple(constants), tuple(divisible), options)

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def writes(self, name: str) -> bool:
        """Whether it is given an argument, rather than None."""
        return dict(self.signature)[name] != "constexpr"

    def constant(self, name: str) -> Any:
        """Its value of a constant."""
        position = [argument for argument, _ in self.signature].index(name)
        return dict(self.constants)[position]

    def compile(self, target: GPUTarget) -> Any:
        """The compiled kernel."""
        constants = {(index,): value for index, value in self.constants}
        attributes = {(index,): [["tt.divisibility", 16]] for index in self.divisible}
        source = ASTSource(self.kernel, dict(self.signature), constants, attributes)
        return triton.compile(source, target=target, options=dict(self.options))


def launches(function: Callable[[], Any], target: str) -> list[Launch]:
    """What ``function``, given tensors on the CPU, would launch if they were on a GPU; each distinct launch once.

    Nothing runs, so whatever the kernels should have written holds NaN, True or the largest integer, on every call.

    Args:
        function: Calls ops with ``backend="triton"``.
        target: One of ``TARGETS``: the architecture whose block sizes are taken.
    """
    found: dict[Launch, None] = {}

    def record(kernel: JITFunction, *args: Any, **kwargs: Any) -> None:
        bound = {name: value for name, value in kwargs.items() if name not in ("grid", "warmup")}
        _, key, _ = _binder(kernel, target)(*args, **bound)
        found[replace(Launch.of(kernel, args, kwargs), key=str(key))] = None

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(gemm, "matmul", lambda a, b, out, add=False: out),
        mock.patch.object(gemm, "writes_fp32", lambda device: True),
        mock.patch.object(inputs, "writes_fp32", lambda device: True),
        mock.patch.object(gemm, "row_width", gpu_row_width),
        mock.patch.object(buffers, "matmul", lambda a, b, out, add=False: out),
        mock.patch.object(sources, "row_width", gpu_row_width),
        mock.patch.object(reference_model, "row_width", gpu_row_width),
        mock.patch.object(backends, "_IS_INTERPRETED", True),  # for the registry alone: it lets CPU tensors pass
        mock.patch.object(row_launch, "architecture", lambda device: target),
        mock.patch.object(row_launch, "processors_of", lambda device: (1, TARGETS[target].warp_size)),
    ):
        torch.use_deterministic_algorithms(True)  # fills memory that nobody has written
        try:
            function()
        finally:
            torch.use_deterministic_algorithms(False)
    return list(found)


@cache
def _binder(kernel: JITFunction, target: str) -> Callable[..., Any]:
    """What Triton's launcher takes a kernel's arguments by: written for each, it refuses some of their names."""
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(TARGETS[target]))


@dataclass(frozen=True)
class Resources:
    """What a program takes: registers of a thread, bytes of shared memory, bytes of a thread spilled to memory."""

    registers: int
    shared: int
    spilled: int


def resources(compiled: Any) -> Resources:
    """Of a kernel compiled for NVIDIA or AMD."""
    if "cubin" in compiled.asm:
        usage = _cuobjdump(compiled, "--dump-resource-usage")
        registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
        return Resources(registers, compiled.metadata.shared, stack + local)
    text = compiled.asm["amdgcn"]
    registers, spilled = (int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count"))  # type: ignore[index]
    return Resources(registers, compiled.metadata.shared, spilled)


def loop_instructions(compiled: Any) -> list[list[str]]:
    """The machine code of each loop without a loop in it, NVIDIA: opcodes with their modifiers."""
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^;]*);", _cuobjdump(compiled, "-sass"))
    lines = [(int(address, 16), text.strip()) for address, text in code]
    loops = []
    for address, text in lines:
        jump = re.match(r"BRA.*?(0x[0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:
            loops.append((int(jump[1], 16), address))
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [[text.split()[0] for at, text in lines if first <= at <= last] for first, last in innermost]


def _cuobjdump(compiled: Any, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run(
            [tool, option, file.name], capture_output=True, text=True, check=True, env=dict(os.environ)
        )
    return done.stdout
