// Which of a row kernel's forms serves a launch: how rows lie, what they are transformed by, how many blocks there are.
#pragma once

#include <algorithm>
#include <cmath>

#include "row.cuh"
#include "tensors.h"

namespace grpo::cuda {

template <class R>
RowTransform<R> row_transform(double temperature, double softcap, double logit_scale) {
  const double slope = logit_scale / temperature;
  // past which a softmax is an argmax, and -1e30 times a rate would be infinite
  const auto rate = [](double outer) { return static_cast<R>(std::min(outer / kLn2, 1e8)); };
  if (softcap > 0) {
    return {Curve::kSoftcap, static_cast<R>(logit_scale / softcap), rate(softcap / temperature), static_cast<R>(slope)};
  }
  return {Curve::kPlain, R(1), rate(slope), static_cast<R>(slope)};
}

inline RowMemory row_memory(const Rows& rows) { return {rows.base, rows.batch_stride, rows.row_stride}; }

inline RowSpace row_space(const Rows& rows, int64_t length) {
  const int64_t count = rows.batch * rows.length, most = INT32_MAX - 65536;  // past which an index may step
  STD_TORCH_CHECK(count <= most && rows.width <= most, "expected at most ", most, " rows and columns, got ", count,
                  " and ", rows.width);
  return {static_cast<int>(count), static_cast<int>(rows.length), static_cast<int>(length),
          static_cast<int>(rows.width)};
}

// Whether every row is a whole number of 16 bytes and begins at a multiple of them; of rows that hold a gradient of
// half the logits' width, at a multiple of 8.
inline bool has_vectors(const Rows& rows, size_t item, size_t bytes = 16) {
  const int64_t strides = (rows.batch > 1 ? rows.batch_stride : 0) | (rows.length > 1 ? rows.row_stride : 0);
  const auto all = reinterpret_cast<uintptr_t>(rows.base) | static_cast<uintptr_t>(strides);
  return (all | static_cast<uintptr_t>(rows.width) * item) % bytes == 0;
}

template <class T, class Out>
bool has_gradient_vectors(const Rows& from, const Rows& to) {
  return sizeof(T) < 8 && has_vectors(from, sizeof(T)) && has_vectors(to, sizeof(Out), 16 * sizeof(Out) / sizeof(T));
}

// Rows of a gradient, whose elements may be narrower than the logits'.
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

// Calls body(access, plain) for how rows are read: what is not aligned, or fp64, takes an element at a time, and finds
// out what curve it has when it runs.
template <class T, class Body>
void with_form(bool vectors, Curve curve, const Body& body) {
  if constexpr (sizeof(T) < 8) {
    using Vector = std::integral_constant<Access, Access::kVector>;
    if (vectors && curve == Curve::kPlain) return body(Vector{}, std::true_type{});
    if (vectors) return body(Vector{}, std::false_type{});
  }
  body(std::integral_constant<Access, Access::kElement>{}, std::false_type{});
}

// As many blocks as the device runs at once, each of which takes rows in turn.
template <class... Parameters>
Grid row_grid(const Place& place, int64_t rows, int shared_bytes, void (*kernel)(Parameters...),
              int threads = kThreads) {
  const Grid one{1, threads, shared_bytes};
  return {std::min(rows, std::max<int64_t>(resident_clusters(place, one, kernel), 1)), threads, shared_bytes};
}

constexpr int kRowAt = 256;  // where a block's part of a row begins in its shared memory

// The smallest clusters whose shared memory holds a row, three blocks on a multiprocessor if that can be; cluster 0
// where none does.
inline Grid cluster_grid(const Place& place, int64_t row_bytes) {
  if (place.code() < 90) return {0, kThreads, 0, 0};
  const Properties& device = place.properties();
  for (const int per_processor : {3, 2, 1}) {
    // of each block the system keeps 1 KB
    const int64_t most = std::min(device.shared_bytes, device.processor_bytes / per_processor - 1024) - kRowAt;
    for (const int blocks : {1, 2, 4, 8}) {
      const int64_t part = 16 * part_of_row(row_bytes / 16, blocks);
      if (part <= most) return {0, kThreads, static_cast<int>(kRowAt + part), blocks};
    }
  }
  return {0, kThreads, 0, 0};
}

}  // namespace grpo::cuda
