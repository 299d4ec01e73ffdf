"""Every Triton kernel compiles for NVIDIA and AMD targets, without a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from grpo_kernels import GRPOLossConfig, group_advantages, registry  # noqa: E402
from grpo_kernels.testing.calls import SOURCES, run  # noqa: E402
from grpo_kernels.testing.cases import Case  # noqa: E402
from grpo_kernels.testing.inputs import build  # noqa: E402

TARGETS = {
    "cuda-80": GPUTarget("cuda", 80, 32),
    "cuda-90": GPUTarget("cuda", 90, 32),
    "cuda-100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
USUAL = ("cuda-90", "gfx942")  # the others are left to `make test-full`
EVERYTHING = GRPOLossConfig(beta=0.1, entropy_coef=0.05)
SEQUENCE = GRPOLossConfig(beta=0.1, importance_sampling_level="sequence")
#: Shapes of models in use, few rows: nothing runs.
CASES = (
    Case("plain", length=3, vocab=151936, hidden=8, old=False, ref=False),
    Case("everything", length=3, vocab=151936, hidden=8, softcap=30.0, config=EVERYTHING, grad_output=2.0),
    Case("sequence", length=3, vocab=4099, hidden=8, config=SEQUENCE, grad_output=2.0),
)


class _Launches:
    """What the launchers would have run, once each: kernels with their arguments' types."""

    def __init__(self) -> None:
        self.sources: dict[str, tuple[ASTSource, dict[str, Any]]] = {}

    def record(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps",) if name in kwargs}
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, attributes = {}, {}, {}
        for index, param in enumerate(kernel.params):
            value = given[param.name]
            if param.is_constexpr or value is None:
                signature[param.name], constants[(index,)] = "constexpr", value
                continue
            signature[param.name] = param.annotation_type or _type_of(value)
            specialised = not (param.do_not_specialize or param.annotation_type)
            if specialised and (isinstance(value, torch.Tensor) or value % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
        key = f"{kernel.__name__}{signature}{constants}{attributes}"
        self.sources[key] = (ASTSource(kernel, signature, constants, attributes), options)


def _type_of(value: Any) -> str:
    return triton.runtime.jit.mangle_type(value)


def _kernels(cases: tuple[Case, ...]) -> dict[str, tuple[ASTSource, dict[str, Any]]]:
    launches = _Launches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda *args, **kwargs: launches.record(*args, **kwargs))
        patch.setattr(registry, "_IS_INTERPRETED", True)  # for the registry alone: it lets CPU tensors pass
        for op in SOURCES:
            for case in cases:
                for dtype in (torch.bfloat16, torch.float64) if case.name == "everything" else (torch.float32,):
                    run(op, build(case, dtype, SOURCES[op]), "triton")
        for aggregation in ("sum_then_normalize", "normalize_then_sum"):
            group_advantages(torch.ones(4, 2), 2, aggregation=aggregation, backend="triton")
    return launches.sources


KERNELS = _kernels(CASES)


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(os.environ, "TRITON_CACHE_DIR", str(tmp_path))
    yield


def _grid() -> list[Any]:
    seen, grid = set(), []
    for i, key in enumerate(KERNELS):
        name = key.split("{")[0]
        for target in TARGETS:
            marks = () if target in USUAL and (name, target) not in seen else (pytest.mark.slow,)
            seen.add((name, target))
            grid.append(pytest.param(key, target, id=f"{name}-{i}-{target}", marks=marks))
    return grid


@pytest.mark.parametrize(("key", "target"), _grid())
def test_kernel_compiles(key: str, target: str) -> None:
    source, options = KERNELS[key]
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    assert compiled.asm["ttgir"]


def test_a_new_length_compiles_nothing() -> None:
    """No length, count of sequences, stride or hyper-parameter is part of what a kernel is compiled for."""
    configs = [GRPOLossConfig(beta=b, temperature=t, epsilon_low=e) for b, t, e in ((0.1, 1.0, 0.2), (0.2, 0.7, 0.1))]
    short, long = (
        set(_kernels((Case("any", batch=batch, length=length, vocab=4099, hidden=8, config=config),)))
        for batch, length, config in ((2, 3, configs[0]), (16, 16, configs[1]))
    )
    assert long <= short
