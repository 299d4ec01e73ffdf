// Launch parameters of row kernels: which template instance fits the rows and the transform, and how many blocks.
#pragma once

#include <algorithm>
#include <cmath>

#include "row.cuh"
#include "tensors.h"

namespace grpo::cuda {

template <class R>
RowTransform<R> row_transform(double temperature, double softcap, double logit_scale) {
  const double slope = logit_scale / temperature;
  // at 1e8 a softmax already is an argmax; above it, -1e30 times the rate would overflow
  const auto rate = [](double outer) { return static_cast<R>(std::min(outer / kLn2, 1e8)); };
  if (softcap > 0) {
    return {Curve::kSoftcap, static_cast<R>(logit_scale / softcap), rate(softcap / temperature), static_cast<R>(slope)};
  }
  return {Curve::kPlain, R(1), rate(slope), static_cast<R>(slope)};
}

inline RowMemory row_memory(const Rows& rows) { return {rows.base, rows.batch_stride, rows.row_stride}; }

inline RowSpace row_space(const Rows& rows, int64_t length) {
  const int64_t count = rows.batch * rows.length, most = INT32_MAX - 65536;  // a loop index may step past the end
  STD_TORCH_CHECK(count <= most && rows.width <= most, "expected at most ", most, " rows and columns, got ", count,
                  " and ", rows.width);
  return {static_cast<int>(count), static_cast<int>(rows.length), static_cast<int>(length),
          static_cast<int>(rows.width)};
}

// Whether every row starts at a multiple of `bytes`: 16, or 8 for a gradient of half the width of the logits.
inline bool has_vectors(const Rows& rows, int64_t bytes = 16) {
  const int64_t strides = (rows.batch > 1 ? rows.batch_stride : 0) | (rows.length > 1 ? rows.row_stride : 0);
  const auto all = reinterpret_cast<uintptr_t>(rows.base) | static_cast<uintptr_t>(strides);
  return all % bytes == 0;
}

template <class T, class Out>
bool has_gradient_vectors(const Rows& from, const Rows& to) {
  return sizeof(T) < 8 && has_vectors(from) && has_vectors(to, 16 * sizeof(Out) / sizeof(T));
}

// Checks the rows of a gradient; its elements may be narrower than those of the logits.
inline void check_gradient(const Rows& to, const Rows& from, const Tensor& dlogits, const Tensor& logits) {
  STD_TORCH_CHECK(to.batch == from.batch && to.length == from.length && to.width == from.width,
                  "expected a gradient of the logits' shape");
  STD_TORCH_CHECK(dlogits.scalar_type() == logits.scalar_type() ||
                      (logits.scalar_type() == ScalarType::Float && dlogits.element_size() == 2),
                  "expected a gradient of the logits' dtype, or of half precision beside float32 logits");
}

// Calls body(T{}) for the storage type of logits.
template <class Body>
void with_storage(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat:
      return body(float{});
    case Dtype::kBFloat16:
      return body(BFloat16{});
    case Dtype::kHalf:
      return body(Half{});
    case Dtype::kDouble:
      return body(double{});
  }
}

// Calls body(T{}, Out{}) for the storage types of logits and of their gradient.
template <class Body>
void with_storages(Dtype from, Dtype to, const Body& body) {
  if (from == to) return with_storage(from, [&](auto t) { body(t, t); });
  to == Dtype::kBFloat16 ? body(float{}, BFloat16{}) : body(float{}, Half{});
}

// Calls body(access, plain) with the template parameters of a row kernel. Unaligned or fp64 rows are read one element
// at a time, and select the curve at run time. Of aligned rows only the elements after the last whole packet are.
template <class T, class Body>
void with_access(bool vectors, Curve curve, const Body& body) {
  if constexpr (sizeof(T) < 8) {
    using Vector = std::integral_constant<Access, Access::kVector>;
    if (vectors && curve == Curve::kPlain) return body(Vector{}, std::true_type{});
    if (vectors) return body(Vector{}, std::false_type{});
  }
  body(std::integral_constant<Access, Access::kElement>{}, std::false_type{});
}

// As many blocks as the device runs at once; each takes rows in turn.
template <class... Parameters>
Grid row_grid(const Device& device, int64_t rows, int shared_bytes, void (*kernel)(Parameters...),
              int threads = kThreads) {
  const Grid one{1, threads, shared_bytes};
  return {std::min(rows, std::max<int64_t>(resident_clusters(device, one, kernel), 1)), threads, shared_bytes};
}

constexpr int kRowOffset = 256;  // offset of a block's part of a row in its shared memory

// The smallest cluster whose shared memory holds a row, with three blocks per multiprocessor if possible, else two or
// one. Grid::cluster is 0 if no cluster holds a row.
inline Grid cluster_grid(const Device& device, int64_t row_bytes) {
  if (device.code() < 90) return {0, kThreads, 0, 0};
  const Properties& properties = device.properties();
  for (const int per_processor : {3, 2, 1}) {
    // the system reserves 1 KB per block
    const int64_t part_limit =
        std::min(properties.shared_bytes, properties.processor_bytes / per_processor - 1024) - kRowOffset;
    for (const int blocks : {1, 2, 4, 8}) {
      const int64_t part = 16 * packets_per_block(row_bytes / 16, blocks);
      if (part <= part_limit) return {0, kThreads, static_cast<int>(kRowOffset + part), blocks};
    }
  }
  return {0, kThreads, 0, 0};
}

}  // namespace grpo::cuda
