"""Which backend can run which op on which device, and the reason if it cannot."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from grpo_kernels.device_values import first_bad
from grpo_kernels.measured_backends import MEASURED, RowClass

OPS = (
    "group_advantages",
    "gae",
    "token_logprobs",
    "linear_token_logprobs",
    "token_divergence",
    "linear_token_divergence",
    "policy_loss",
    "grpo_loss",
    "linear_grpo_loss",
)
BACKENDS = ("cpu", "torch", "triton", "cuda")
#: The order in which "auto" tries backends, by device type and op. On other devices it takes "torch", the reference,
#: which runs everywhere. On an NVIDIA GPU ``measured_backends.MEASURED`` comes first.
PREFERENCE = {
    "cpu": dict.fromkeys(OPS, ("cpu", "torch")),
    "cuda": dict.fromkeys(OPS, ("triton", "cuda", "torch")),
    "xpu": dict.fromkeys(OPS, ("triton", "torch")),
}
#: Ops without CUDA kernels.
_NOT_IN_CUDA = ("gae", "token_divergence", "linear_token_divergence")
#: The oldest release that compiles these kernels; torch 2.11 comes with it.
_OLDEST_TRITON = (3, 6)
#: The oldest GPU architecture that the CUDA kernels support.
_OLDEST_CUDA = 80
_LOG = logging.getLogger(__name__)


def _load_extension(path: Path) -> str | None:
    """Loads the C++ ops; returns why they are missing, or None."""
    if not path.exists():
        return f"the C++ extension is not built ({path.name} is not beside the package)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:  # built for another platform: raised when the backend is named
        return f"the C++ extension does not load: {error}"
    return None


# loaded at import, so that it is a constant in a traced graph
_EXTENSION_ERROR = _load_extension(Path(__file__).with_name("_cpu.so"))


def _cpu_reason(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"its tensors must be on the CPU, got {device}"
    return _EXTENSION_ERROR


def _build_command(architecture: int) -> str:
    """How to build the CUDA library for an architecture."""
    command = f"GRPO_KERNELS_CUDA_ARCHS={architecture} pip install --no-build-isolation ."
    return f"{command!r} in a checkout builds it for sm_{architecture}"


def _load_cuda_extension(path: Path) -> str | None:
    if not path.exists() and torch.version.hip is None:
        return f"the CUDA extension is not built ({path.name} is not beside the package): {_build_command(90)}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return _load_extension(path)


_CUDA_ERROR = _load_cuda_extension(Path(__file__).with_name("_cuda.so"))


def _cuda_reason(device: torch.device) -> str | None:
    if _CUDA_ERROR is not None:
        return _CUDA_ERROR
    if device.type != "cuda":
        return f"its tensors must be on an NVIDIA GPU, got {device}"
    return _cuda_failure(device)


def missing_architecture(built: tuple[int, ...], capability: int) -> str | None:
    """Why a library built for these architectures does not run on a GPU of this compute capability, or None if it does.

    Binary code runs on GPUs of its own generation that are not older. The newest architecture is also built as PTX,
    which runs on all newer GPUs.

    Args:
        built: The architectures, in rising order.
        capability: The GPU's, as 90 for 9.0.
    """
    if capability < _OLDEST_CUDA:
        return f"its kernels need sm_{_OLDEST_CUDA} or newer, and this GPU is sm_{capability}"
    if capability >= built[-1] or any(arch // 10 == capability // 10 and arch <= capability for arch in built):
        return None
    archs = ", ".join(f"sm_{arch}" for arch in built)
    return f"the CUDA extension is built for {archs}, and this GPU is sm_{capability}: {_build_command(capability)}"


@torch.compiler.assume_constant_result
@cache
def _cuda_failure(device: torch.device) -> str | None:
    """Why the CUDA kernels do not run on this GPU, or None. Launches the smallest kernel once."""
    try:
        ones = torch.ones(1, device=device)
        major, minor = torch.cuda.get_device_capability(ones.device)
        reason = missing_architecture(cuda_architectures(), 10 * major + minor)
        if reason is not None:
            return reason
        torch.ops.grpo_kernels.cuda_keep_first_bad(first_bad(ones.device))  # ones.device has an index, "cuda" has none
        torch.ops.grpo_kernels.scale_cuda(ones, torch.zeros((), device=ones.device))
    except Exception as error:  # anything that a driver or the runtime raises is the reason
        return f"CUDA kernels do not run here: {type(error).__name__}: {error}"
    return None


# constants of the process, like the above; Triton itself is imported when a GPU needs it
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _triton_reason(device: torch.device) -> str | None:
    if not _HAS_TRITON:
        return "Triton is not installed"
    if device.type in ("cuda", "xpu"):
        return _triton_failure(device)
    if _IS_INTERPRETED and device.type == "cpu":
        return None
    return f"its tensors must be on a GPU, got {device}; its interpreter (TRITON_INTERPRET=1) is off"


@torch.compiler.assume_constant_result
@cache
def _triton_failure(device: torch.device) -> str | None:
    """Why Triton does not run on this GPU, or None. Compiles and launches the smallest kernel once."""
    try:
        import triton

        if tuple(map(int, triton.__version__.split(".")[:2])) < _OLDEST_TRITON:
            return f"Triton {'.'.join(map(str, _OLDEST_TRITON))} or newer is needed, got {triton.__version__}"
        from grpo_kernels.triton_probe import launch  # imports Triton

        with torch.get_device_module(device).device(device):
            first_bad(device)  # allocates; within a CUDA graph the memory would be the graph's
            launch(device)
    except Exception as error:  # anything that a driver, a compiler or a linker raises is the reason
        return f"Triton cannot compile here: {type(error).__name__}: {error}"
    return None


_REASONS: dict[str, Callable[[torch.device], str | None]] = {
    "cpu": _cpu_reason,
    "torch": lambda device: None,
    "triton": _triton_reason,
    "cuda": _cuda_reason,
}
_TABLE = {(op, backend) for op in OPS for backend in BACKENDS if backend != "cuda" or op not in _NOT_IN_CUDA}


def unsupported_reason(op: str, backend: str, device: torch.device) -> str | None:
    """Why ``backend`` cannot run ``op`` on ``device``, or None if it can.

    Raises:
        ValueError: The op or the backend is unknown.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(map(repr, OPS))}, got {op!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if (op, backend) not in _TABLE:
        others = ", ".join(repr(other) for other in BACKENDS if (op, other) in _TABLE)
        return f"it has no {backend} kernels; it runs on {others}"
    return _REASONS[backend](device)


def supports(op: str, backend: str, device: torch.device) -> bool:
    """Whether ``backend`` can run ``op`` on ``device``."""
    return unsupported_reason(op, backend, device) is None


def resolve(op: str, backend: str, device: torch.device, rows: Callable[[], RowClass] | None = None) -> str:
    """The backend that runs ``op``: the named one, or for "auto" the first that can.

    Args:
        op: One of ``OPS``.
        backend: "auto", or one of ``BACKENDS``.
        device: The device of the tensors.
        rows: Returns the class of the rows of logits, for an op that has any.

    Raises:
        ValueError: The backend is unknown.
        RuntimeError: The named backend cannot run here; the message says why.
    """
    if backend == "auto":
        return _choose(op, device, _fastest_measured(op, device, rows) if device.type == "cuda" else None)
    reason = unsupported_reason(op, backend, device)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run {op}: {reason}")
    return backend


def _fastest_measured(op: str, device: torch.device, rows: Callable[[], RowClass] | None) -> str | None:
    """The fastest backend by the committed results, or None."""
    for measured in MEASURED:
        if measured.op == op and measured.covers(op, _architecture(device), None if rows is None else rows()):
            return measured.backend
    return None


@torch.compiler.assume_constant_result
@cache
def _architecture(device: torch.device) -> int:
    """The architecture of an NVIDIA GPU, as 90 for 9.0; 0 for another GPU."""
    if torch.version.cuda is None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@torch.compiler.assume_constant_result
def _choose(op: str, device: torch.device, preferred: str | None = None) -> str:
    if device.type == "cuda" and _CUDA_ERROR is None and (reason := _cuda_reason(device)) is not None:
        _warn_once("cuda", device, reason)  # even if another is preferred: who installed it expects it to run
    names = PREFERENCE[device.type][op] if device.type in PREFERENCE else ("torch",)
    for name in names if preferred is None else (preferred, *names):
        reason = unsupported_reason(op, name, device)
        if reason is None:
            return name
        _warn_once(name, device, reason)
    raise AssertionError('"torch" runs everywhere')


@cache
def _warn_once(name: str, device: torch.device, reason: str) -> None:
    _LOG.warning(f"backend {name!r} cannot run on {device}, another does: {reason}")


def cpu_simd_level() -> str | None:
    """The instruction set that the C++ kernels chose on this machine, or None without the extension."""
    if _EXTENSION_ERROR is not None:
        return None
    return ("baseline", "avx2", "avx512")[torch.ops.grpo_kernels.cpu_simd_level()]


def cuda_architectures() -> tuple[int, ...]:
    """The architectures of the loaded CUDA library in rising order, as 90 for 9.0; empty without the library."""
    return () if _CUDA_ERROR is not None else tuple(torch.ops.grpo_kernels.cuda_architectures())
