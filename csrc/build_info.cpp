// The Python module grpo_kernels._build_info: how this copy of the package was built.
// CMakeLists.txt defines the macros.

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

// The words of `text` as a Python list of str.
py::object words(const char* text) { return py::str(text).attr("split")(); }

py::dict build_info() {
  py::dict info;
  info["version"] = GRPO_VERSION;
  info["compiler"] = GRPO_COMPILER;
  info["cxx_standard"] = static_cast<int>(__cplusplus / 100 % 100);
  info["torch_version"] = GRPO_TORCH_VERSION;
  info["torch_stable_abi"] = GRPO_TORCH_STABLE_ABI;
  info["simd_levels"] = words(GRPO_SIMD_LEVELS);
  info["cuda_version"] = GRPO_CUDA_VERSION;  // empty without the CUDA library
  info["cuda_archs"] = words(GRPO_CUDA_ARCHS);
  return info;
}

}  // namespace

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "How this copy of grpo_kernels was built.";
  m.def("build_info", &build_info,
        "Versions, compilers, C++ standard, oldest torch served, SIMD levels and CUDA architectures.");
}
