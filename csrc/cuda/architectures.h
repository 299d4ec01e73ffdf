// Which of the architectures in a library serves a GPU.
#pragma once

#include <cstddef>

namespace grpo::cuda {

// The architecture whose code a GPU runs; 90 is compute capability 9.0 and `built` is in rising order. That is the
// newest one of the GPU's generation that is not newer than the GPU, or else the last one, as PTX. The preprocessor
// compiled the kernels for that architecture, even if the GPU could do more.
template <std::size_t kCount>
constexpr int select_architecture(const int (&built)[kCount], int capability) {
  for (std::size_t i = kCount; i-- > 0;) {
    if (built[i] <= capability && built[i] / 10 == capability / 10) return built[i];
  }
  return built[kCount - 1];
}

static_assert(select_architecture({80, 90, 100}, 90) == 90);
static_assert(select_architecture({80, 90, 100}, 86) == 80);
static_assert(select_architecture({80, 90, 100}, 120) == 100);
static_assert(select_architecture({80}, 90) == 80);
static_assert(select_architecture({80, 86}, 100) == 86);

}  // namespace grpo::cuda
