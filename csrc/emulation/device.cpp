// Ops for tests: set the emulated device's flags and its properties, and tell which kernel was launched last.
#include "emulation/cuda.h"

namespace grpo::cuda {

void keep_first_bad(const Tensor& first_bad) { registered_flags = mutable_data<int64_t>(first_bad); }

void set_device(int64_t capability, int64_t shared_bytes, int64_t processors) {
  emulated.capability = static_cast<int>(capability);
  emulated.shared_bytes = static_cast<int>(shared_bytes);
  emulated.processor_bytes = 3 * static_cast<int>(shared_bytes + 1024);
  emulated.processors = static_cast<int>(processors);
}

int64_t kernel_of_last_launch() { return last_kernel; }

}  // namespace grpo::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(grpo_kernels, m) {
  m.def("emulated_keep_first_bad(Tensor first_bad) -> ()");
  m.def("emulated_set_device(int capability, int shared_bytes, int processors) -> ()");
  m.def("emulated_last_kernel() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(grpo_kernels, CompositeExplicitAutograd, m) {
  m.impl("emulated_keep_first_bad", TORCH_BOX(&grpo::cuda::keep_first_bad));
  m.impl("emulated_set_device", TORCH_BOX(&grpo::cuda::set_device));
  m.impl("emulated_last_kernel", TORCH_BOX(&grpo::cuda::kernel_of_last_launch));
}
