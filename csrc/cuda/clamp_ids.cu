// clamp_ids: clamps ids to the vocabulary, and flags the first one outside it. For losses that run in chunks, whose row
// kernels would flag an index within their chunk.
#include <optional>

#include "row.cuh"

namespace grpo::cuda {
namespace {

constexpr int kIdThreads = 256;

__global__ void __launch_bounds__(kIdThreads)
clamp_ids_kernel(const int64_t* ids, const bool* mask, int64_t* clamped, int64_t count, int vocab, int64_t* first_bad) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kIdThreads + threadIdx.x;
  if (n < count) clamped[n] = mask && !mask[n] ? 0 : clamp_id(ids[n], n, vocab, first_bad);
}

}  // namespace

Tensor clamp_ids(const Tensor& ids,                  // [N]
                const std::optional<Tensor>& mask,  // [N]
                int64_t vocab) {
  const Device device(ids);
  const Tensor clamped = empty_like(ids, ScalarType::Long);
  const int64_t count = ids.numel();
  STD_TORCH_CHECK(0 < vocab && vocab <= INT32_MAX, "expected a vocabulary of at most 2^31 - 1, got ", vocab);
  launch(device, "clamp_ids", {count}, {(count + kIdThreads - 1) / kIdThreads, kIdThreads}, clamp_ids_kernel,
         data<int64_t>(ids, count), data<bool>(mask, count), mutable_data<int64_t>(clamped), count,
         static_cast<int>(vocab), device.first_bad());
  return clamped;
}

}  // namespace grpo::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(grpo_kernels, m) {
  m.def("clamp_ids_cuda(Tensor ids, Tensor? mask, int vocab) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(grpo_kernels, GRPO_DEVICE_KEY, m) {
  m.impl("clamp_ids_cuda", TORCH_BOX(&grpo::cuda::clamp_ids));
}
