// Which instruction set this processor has.
#include <torch/csrc/stable/library.h>

#include "row_kernels.h"

namespace grpo {

namespace baseline {
extern const RowKernels kRowKernels[kDtypeCount];
}
#ifdef GRPO_HAVE_X86_ISA
namespace avx2 {
extern const RowKernels kRowKernels[kDtypeCount];
}
namespace avx512 {
extern const RowKernels kRowKernels[kDtypeCount];
}
#endif

int simd_level() {
#ifdef GRPO_HAVE_X86_ISA
  static const int level = [] {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return 2;
    }
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
  }();
  return level;
#else
  return 0;
#endif
}

const RowKernels& row_kernels(Dtype dtype) {
  const int index = static_cast<int>(dtype);
#ifdef GRPO_HAVE_X86_ISA
  if (simd_level() == 2) return avx512::kRowKernels[index];
  if (simd_level() == 1) return avx2::kRowKernels[index];
#endif
  return baseline::kRowKernels[index];
}

int64_t cpu_simd_level() { return simd_level(); }

}  // namespace grpo

STABLE_TORCH_LIBRARY_FRAGMENT(grpo_kernels, m) { m.def("cpu_simd_level() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(grpo_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_simd_level", TORCH_BOX(&grpo::cpu_simd_level));
}
