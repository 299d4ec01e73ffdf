// scale: multiplies a gradient by a scalar in place. If the scalar is 1 nothing is read or written.
#include <algorithm>

#include "row_launch.h"

namespace grpo::cuda {
namespace {

constexpr int kScaleThreads = 256;
constexpr int kScaleUnroll = 4;
constexpr int64_t kPart = kScaleThreads * kScaleUnroll;  // packets of a row that a block loads at once
constexpr int64_t kBlocksPerProcessor = 8;               // few, because they all exit at once if the scalar is 1

template <class T, int kCount>
__device__ __forceinline__ Packet<T, kCount> scaled(const Packet<T, kCount>& packet, Arithmetic<T> factor) {
  Arithmetic<T> values[kCount];
  unpack(packet, values);
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] *= factor;
  return packed<T>(values);
}

// Rows need no alignment: the elements before the first whole packet and after the last one are scaled one by one.
template <class T, class Factor>
__global__ void __launch_bounds__(kScaleThreads)
scale_kernel(RowMemory rows, int64_t length, int64_t width, int64_t row_parts, int64_t parts, const Factor* scalar) {
  constexpr int kCount = kWidth<T, Access::kVector>;
  if (*scalar == Factor(1)) return;
  const auto factor = static_cast<Arithmetic<T>>(*scalar);
  for (int64_t part = blockIdx.x; part < parts; part += gridDim.x) {
    const int64_t row = part / row_parts, first = part % row_parts * kPart;
    T* const values = rows.row<T>(row / length, row % length);
    const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(values) / sizeof(T) % kCount);
    const int64_t before = misaligned == 0 ? 0 : (width < kCount - misaligned ? width : kCount - misaligned);
    const int64_t packets = (width - before) / kCount, in_packets = packets * kCount;
    auto* const body = reinterpret_cast<Packet<T, kCount>*>(values + before) + first + threadIdx.x;
    const int64_t remaining = packets - first - threadIdx.x;
    Packet<T, kCount> block[kScaleUnroll];
#pragma unroll
    for (int k = 0; k < kScaleUnroll; ++k) {
      if (k * kScaleThreads < remaining) block[k] = body[k * kScaleThreads];
    }
#pragma unroll
    for (int k = 0; k < kScaleUnroll; ++k) {
      if (k * kScaleThreads < remaining) body[k * kScaleThreads] = scaled(block[k], factor);
    }
    const int64_t edge = threadIdx.x;
    if (first == 0 && edge < width - in_packets) {
      T& value = values[edge < before ? edge : edge + in_packets];
      value = rounded<T>(element(value) * factor);
    }
  }
}

}  // namespace

void scale(const Tensor& gradient, const Tensor& factor) {
  const Device device(gradient);
  Rows rows(gradient);
  if (gradient.is_contiguous()) {
    rows.width = gradient.numel();
    rows.batch = rows.length = 1;
  }
  if (gradient.numel() == 0) return;
  STD_TORCH_CHECK(factor.get_device_index() == device.properties().index, "expected both on one device");
  with_storage(dtype_of(gradient), [&]<class T>(T) {
    constexpr int64_t kElements = kPart * kWidth<T, Access::kVector>;
    const int64_t row_parts = (rows.width + kElements - 1) / kElements, parts = rows.batch * rows.length * row_parts;
    const Grid grid{std::min(parts, kBlocksPerProcessor * device.processors()), kScaleThreads};
    const auto run = [&]<class Factor>(Factor) {
      launch(device, "scale", {rows.batch, rows.length, rows.width}, grid, scale_kernel<T, Factor>, row_memory(rows),
             rows.length, rows.width, row_parts, parts, data<Factor>(factor, 1));
    };
    factor.scalar_type() == ScalarType::Double ? run(double()) : run(float());
  });
}

}  // namespace grpo::cuda

STABLE_TORCH_LIBRARY_IMPL(grpo_kernels, GRPO_DEVICE_KEY, m) { m.impl("scale_cuda", TORCH_BOX(&grpo::cuda::scale)); }
