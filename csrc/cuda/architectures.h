// Which of a library's machine codes, or its PTX, a GPU runs.
#pragma once

#include <cstddef>

namespace grpo::cuda {

// Of architectures rising, as 90 for 9.0: the newest of the GPU's own generation that is no newer than it, or else the
// last one, as PTX. Kernels are what the preprocessor made of them for that one, whatever the GPU could do.
template <std::size_t kCount>
constexpr int code_that_runs(const int (&built)[kCount], int capability) {
  for (std::size_t i = kCount; i-- > 0;) {
    if (built[i] <= capability && built[i] / 10 == capability / 10) return built[i];
  }
  return built[kCount - 1];
}

static_assert(code_that_runs({80, 90, 100}, 90) == 90);
static_assert(code_that_runs({80, 90, 100}, 86) == 80);
static_assert(code_that_runs({80, 90, 100}, 120) == 100);
static_assert(code_that_runs({80}, 90) == 80);
static_assert(code_that_runs({80, 86}, 100) == 86);

}  // namespace grpo::cuda
