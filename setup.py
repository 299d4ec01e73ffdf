"""Builds the C++ parts with CMake and ninja; everything else stands in pyproject.toml.

Environment: GRPO_KERNELS_CUDA_ARCHS="80;90;100" (the GPUs that the CUDA library is built for; unset or empty: it is
left out), GRPO_KERNELS_SKIP_CUDA=1 (leaves it out whatever is set), MAX_JOBS (compiler processes, default: the cores),
GRPO_KERNELS_WITH_LINEINFO=1 (line tables for profilers), CXX and CUDACXX (compilers). Nothing here asks the network or
a GPU.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import runpy
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


def find_tool(name: str, *candidates: str, folders: tuple[str, ...] = ()) -> str:
    """Path of the first candidate found in this Python's scripts folder, then on PATH, then in ``folders``."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath), *folders])
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


def cuda_archs() -> list[str]:
    """The GPUs to build for, rising, as "90"; empty where the CUDA library is left out."""
    if os.environ.get("GRPO_KERNELS_SKIP_CUDA", "0") not in ("", "0"):
        return []
    asked = [arch for arch in re.split(r"[;, ]+", os.environ.get("GRPO_KERNELS_CUDA_ARCHS", "")) if arch]
    for arch in asked:
        if not re.fullmatch(r"[1-9]\d{1,2}", arch):
            raise PlatformError(f"GRPO_KERNELS_CUDA_ARCHS must be like '80;90;100', got {arch!r} in it")
        if int(arch) < 80:
            raise PlatformError(f"GRPO_KERNELS_CUDA_ARCHS must name sm_80 or newer GPUs, got {arch!r} in it")
    return sorted(set(asked), key=int)


def find_nvcc() -> str:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders = tuple(os.path.join(home, "bin") for home in [*homes, "/usr/local/cuda"])
    return find_tool("CUDA compiler", os.environ.get("CUDACXX", "nvcc"), folders=folders)


def package_version() -> str:
    """The version; of a build with CUDA with its release and the GPUs, as 0.1.0+cu130.sm80.sm90."""
    version = runpy.run_path(str(ROOT / PACKAGE / "version.py"))["__version__"]
    archs = cuda_archs()
    if not archs:
        return version
    told = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", told)
    if release is None:
        raise PlatformError(f"grpo_kernels: nvcc --version tells no release: {told}")
    return f"{version}+cu{''.join(release.groups())}" + "".join(f".sm{arch}" for arch in archs)


class CMakeBuild(build_ext):
    """Runs CMake once for all extensions: `_cpu.so`, `_cuda.so` if asked for, and the optional `_build_info`."""

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
        if not cuda_archs():  # what an earlier build in place left would be loaded
            (package / PACKAGE / "_cuda.so").unlink(missing_ok=True)

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
        if archs := cuda_archs():
            arguments |= {"GRPO_KERNELS_CUDA_ARCHS": ";".join(archs), "CMAKE_CUDA_COMPILER": find_nvcc()}
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
    """One wheel per platform for every Python: the libraries have no Python symbols, `_build_info` is optional."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    version=package_version(),
    ext_modules=[Extension(f"{PACKAGE}._cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
