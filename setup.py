"""Builds the C++ parts with CMake and ninja; everything else stands in pyproject.toml.

Environment: MAX_JOBS (compiler processes, default: the cores), GRPO_KERNELS_WITH_LINEINFO=1 (line tables for
profilers), CXX (compiler). GRPO_KERNELS_CUDA_ARCHS and GRPO_KERNELS_SKIP_CUDA belong to the CUDA backend, which is
to come. Nothing here asks the network or a GPU.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError, PlatformError

ROOT = Path(__file__).parent.resolve()
PACKAGE = "grpo_kernels"


def find_tool(name: str, *candidates: str) -> str:
    """Path of the first candidate found in this Python's scripts folder, then on PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    for candidate in candidates:
        if found := shutil.which(candidate, path=path):
            return found
    raise PlatformError(
        f"grpo_kernels: no {name} found (looked for {', '.join(candidates)}); the C++ backend cannot be built. "
        f"Install it, or use the checkout uncompiled, with PYTHONPATH={ROOT}: the torch backend needs no build."
    )


def package_dir(name: str) -> Path | None:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


class CMakeBuild(build_ext):
    """Runs CMake once for all extensions: `_cpu.so` and the optional `_build_info`."""

    def run(self) -> None:
        package = ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        cmake = find_tool("CMake", "cmake")
        configure = [cmake, "-S", str(ROOT), "-G", "Ninja", *self.cmake_arguments()]
        # One folder per set of arguments, kept between builds: CMake itself would not notice another compiler.
        key = repr((configure, os.environ.get("CXX"), os.environ.get("CXXFLAGS")))
        build = ROOT / "build" / f"cmake-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        for command in (
            [*configure, "-B", str(build)],
            [cmake, "--build", str(build), "--parallel", jobs],
            [cmake, "--install", str(build), "--prefix", str(package / PACKAGE)],
        ):
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                raise ExecError(f"grpo_kernels: {' '.join(command)} failed; its output above says why") from error

    def cmake_arguments(self) -> list[str]:
        find_tool("C++ compiler", *os.environ.get("CXX", "c++ g++ clang++").split())
        torch = package_dir("torch")
        if torch is None:
            raise PlatformError("grpo_kernels: torch is not installed; install torch >= 2.11 first")
        arguments = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": find_tool("ninja", "ninja"),
            "GRPO_KERNELS_VERSION": self.distribution.get_version(),
            "GRPO_KERNELS_TORCH_DIR": torch,
            "GRPO_KERNELS_TORCH_VERSION": importlib.metadata.version("torch"),
            "GRPO_KERNELS_WITH_LINEINFO": os.environ.get("GRPO_KERNELS_WITH_LINEINFO", "0"),
        }
        if pybind11 := package_dir("pybind11"):
            arguments |= {
                "pybind11_DIR": pybind11 / "share" / "cmake" / "pybind11",
                "Python_EXECUTABLE": sys.executable,
            }
        return [f"-D{name}={value}" for name, value in arguments.items()]

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / PACKAGE).glob("_*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """One wheel per platform for every Python: the library has no Python symbols, `_build_info` is optional."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(f"{PACKAGE}._cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
