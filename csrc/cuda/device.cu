// Ops that Python calls before any kernel: what the library was built for, and where kernels flag bad values.
#include <cstdint>

#include "launch.h"

namespace grpo::cuda {

int64_t runtime_version() { return CUDART_VERSION; }

void keep_first_bad(const Tensor& first_bad) {
  STD_TORCH_CHECK(first_bad.is_cuda(), "expected flags on a CUDA device");
  STD_TORCH_CHECK(first_bad.scalar_type() == ScalarType::Long && first_bad.numel() == kBadValueCount,
                  "expected ", static_cast<int>(kBadValueCount), " int64 flags");
  int64_t* const flags = mutable_data<int64_t>(first_bad);
  registered_flags.at(first_bad.get_device_index()).store(flags, std::memory_order_release);
}

}  // namespace grpo::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(grpo_kernels, m) {
  m.def("cuda_architectures() -> int[]");
  m.def("cuda_runtime_version() -> int");
  m.def("cuda_keep_first_bad(Tensor first_bad) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(grpo_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&grpo::cuda::architectures));
  m.impl("cuda_runtime_version", TORCH_BOX(&grpo::cuda::runtime_version));
  m.impl("cuda_keep_first_bad", TORCH_BOX(&grpo::cuda::keep_first_bad));
}
