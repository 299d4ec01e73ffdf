// Chooses the row kernels for the instruction set of this processor.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>

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

namespace {

int supported_level() {
#ifdef GRPO_HAVE_X86_ISA
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return 2;
  }
  // every processor with AVX2 and FMA also has F16C
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

std::atomic<int64_t> highest_level = 2;

}  // namespace

int simd_level() {
  static const int supported = supported_level();
  return std::min<int>(supported, static_cast<int>(highest_level.load(std::memory_order_relaxed)));
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

// For tests: lets a processor with wide vectors run the narrower kernels too.
void cpu_limit_simd_level(int64_t level) { highest_level = level; }

}  // namespace grpo

STABLE_TORCH_LIBRARY_FRAGMENT(grpo_kernels, m) {
  m.def("cpu_simd_level() -> int");
  m.def("cpu_limit_simd_level(int level) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(grpo_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_simd_level", TORCH_BOX(&grpo::cpu_simd_level));
  m.impl("cpu_limit_simd_level", TORCH_BOX(&grpo::cpu_limit_simd_level));
}
