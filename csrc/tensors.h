// Converts tensors of torch's stable ABI to pointers, rows and dtypes, on any device. Only op files include this:
// kernels see no tensor types.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "dtypes.h"

namespace grpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    case ScalarType::Double:
      return Dtype::kDouble;
    default:
      STD_TORCH_CHECK(false, "expected float32, bfloat16, float16 or float64");
  }
  return Dtype::kFloat;
}

inline ScalarType arithmetic_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor on_device_of(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device());
}

// Uninitialised, on the device of `like`.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  return on_device_of(like, {sizes.begin(), sizes.size()}, dtype);
}

inline Tensor empty_like(const Tensor& t, ScalarType dtype) { return on_device_of(t, t.sizes(), dtype); }

template <class T>
constexpr ScalarType kTypeOf = ScalarType::Undefined;
template <>
inline constexpr ScalarType kTypeOf<float> = ScalarType::Float;
template <>
inline constexpr ScalarType kTypeOf<double> = ScalarType::Double;
template <>
inline constexpr ScalarType kTypeOf<int32_t> = ScalarType::Int;
template <>
inline constexpr ScalarType kTypeOf<int64_t> = ScalarType::Long;
template <>
inline constexpr ScalarType kTypeOf<bool> = ScalarType::Bool;

// The values of a contiguous tensor; checks that there are `count`.
template <class T>
const T* data(const Tensor& t, int64_t count) {
  STD_TORCH_CHECK(t.scalar_type() == kTypeOf<T>, "expected another dtype");
  STD_TORCH_CHECK(t.numel() == count, "expected ", count, " values, got ", t.numel());
  STD_TORCH_CHECK(t.is_contiguous(), "expected a contiguous tensor");
  return static_cast<const T*>(t.const_data_ptr());
}

// Null when the tensor is absent.
template <class T>
const T* data(const std::optional<Tensor>& t, int64_t count) {
  return t.has_value() ? data<T>(*t, count) : nullptr;
}

template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// The rows of a tensor [B, T, V], [T, V] or [V] whose last dimension is dense.
struct Rows {
  char* base;
  int64_t batch = 1, length = 1, width = 1;
  int64_t batch_stride = 0, row_stride = 0;  // bytes

  explicit Rows(const Tensor& t) : base(static_cast<char*>(t.mutable_data_ptr())) {
    const int64_t dims = t.dim(), item = static_cast<int64_t>(t.element_size());
    STD_TORCH_CHECK(dims >= 1 && dims <= 3, "expected 1 to 3 dimensions, got ", dims);
    width = t.size(dims - 1);
    STD_TORCH_CHECK(width <= 1 || t.stride(dims - 1) == 1, "expected a dense last dimension");
    if (dims >= 2) {
      length = t.size(dims - 2);
      row_stride = t.stride(dims - 2) * item;
    }
    if (dims == 3) {
      batch = t.size(0);
      batch_stride = t.stride(0) * item;
    }
  }

  // Checks that there is one row per id [B, T], or one more per completion.
  void check_ids_fit(const Tensor& ids) const {
    STD_TORCH_CHECK(ids.dim() == 2 && ids.size(0) == batch && (ids.size(1) == length || ids.size(1) + 1 == length),
                    "ids do not fit the rows");
  }

  // Checks that the rows have the shape and dtype of the logits.
  void check_like(const Rows& from, const Tensor& t, const Tensor& like) const {
    STD_TORCH_CHECK(batch == from.batch && length == from.length && width == from.width &&
                        t.scalar_type() == like.scalar_type(),
                    "expected rows of the shape and dtype of the logits");
  }

  char* row(int64_t b, int64_t t) const { return base + b * batch_stride + t * row_stride; }
};

}  // namespace grpo
