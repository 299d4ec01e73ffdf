// hold_ids: ids held inside the vocabulary, for kernels that see a part of them; the first that was outside is flagged.
#include <optional>

#include "row.cuh"

namespace grpo::cuda {
namespace {

constexpr int kIdThreads = 256;

__global__ void __launch_bounds__(kIdThreads)
hold_ids_kernel(const int64_t* ids, const bool* mask, int64_t* held, int64_t count, int vocab, int64_t* first_bad) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kIdThreads + threadIdx.x;
  if (n < count) held[n] = mask && !mask[n] ? 0 : held_inside(ids[n], n, vocab, first_bad);
}

}  // namespace

Tensor hold_ids(const Tensor& ids,                  // [N]
                const std::optional<Tensor>& mask,  // [N]
                int64_t vocab) {
  const Place place(ids);
  const Tensor held = empty_like(ids, ScalarType::Long);
  const int64_t count = ids.numel();
  STD_TORCH_CHECK(0 < vocab && vocab <= INT32_MAX, "expected a vocabulary of at most 2^31 - 1, got ", vocab);
  launch(place, "hold_ids", {count}, {(count + kIdThreads - 1) / kIdThreads, kIdThreads}, hold_ids_kernel,
         data<int64_t>(ids, count), data<bool>(mask, count), mutable_data<int64_t>(held), count,
         static_cast<int>(vocab), place.first_bad());
  return held;
}

}  // namespace grpo::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(grpo_kernels, m) {
  m.def("hold_ids_cuda(Tensor ids, Tensor? mask, int vocab) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(grpo_kernels, GRPO_DEVICE_KEY, m) {
  m.impl("hold_ids_cuda", TORCH_BOX(&grpo::cuda::hold_ids));
}
