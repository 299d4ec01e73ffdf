// Tensors of torch's stable ABI as pointers, rows and dtypes. Tensor types stop in the files that include this.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "row_kernels.h"

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

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

inline Tensor empty_like(const Tensor& t, ScalarType dtype) { return torch::stable::empty(t.sizes(), dtype); }

template <class T>
constexpr ScalarType kTypeOf = ScalarType::Undefined;
template <>
inline constexpr ScalarType kTypeOf<float> = ScalarType::Float;
template <>
inline constexpr ScalarType kTypeOf<double> = ScalarType::Double;
template <>
inline constexpr ScalarType kTypeOf<int64_t> = ScalarType::Long;
template <>
inline constexpr ScalarType kTypeOf<bool> = ScalarType::Bool;

// The values of a tensor that must hold `count` of them.
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

// Rows of a tensor of up to three dimensions whose last one is dense: [B, T, V].
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

  // Refuses rows that are not those of ids [B, T], or of ids with a position more.
  void check_ids_fit(const Tensor& ids) const {
    STD_TORCH_CHECK(ids.dim() == 2 && ids.size(0) == batch && (ids.size(1) == length || ids.size(1) + 1 == length),
                    "ids do not fit the rows");
  }

  // Refuses rows of another shape or dtype than those they are computed from.
  void check_like(const Rows& from, const Tensor& t, const Tensor& like) const {
    STD_TORCH_CHECK(batch == from.batch && length == from.length && width == from.width &&
                        t.scalar_type() == like.scalar_type(),
                    "expected rows of the shape and dtype of the logits");
  }

  char* row(int64_t b, int64_t t) const { return base + b * batch_stride + t * row_stride; }
};

// Refuses an unmasked id outside the vocabulary, before any row is read.
inline void check_ids(const int64_t* ids, const bool* mask, int64_t count, int64_t vocab) {
  for (int64_t n = 0; n < count; ++n) {
    if (mask && !mask[n]) continue;
    STD_TORCH_CHECK(ids[n] >= 0 && ids[n] < vocab, "id ", ids[n], " is outside the vocabulary of ", vocab);
  }
}

// Refuses completions that do not lie end to end.
inline void check_offsets(const int64_t* offset, int64_t count, int64_t tokens) {
  for (int64_t s = 0; s < count; ++s) {
    STD_TORCH_CHECK(offset[s] >= 0 && offset[s] <= offset[s + 1] && offset[s + 1] <= tokens,
                    "cu_seqlens must rise from 0 to ", tokens);
  }
  STD_TORCH_CHECK(count >= 0 && offset[0] == 0 && offset[count] == tokens, "cu_seqlens must rise from 0 to ", tokens);
}

// Calls body(n) for rows 0..count in parallel, by torch's own threads; each row counts as `width` elements.
//
// The threads take rows in turns: masked rows lie together, at the end of a completion, and cost nothing.
template <class Body>
void parallel_rows(int64_t count, int64_t width, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 15) / std::max<int64_t>(1, width));
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t turns = (count + threads - 1) / threads;
  torch::stable::parallel_for(0, turns * threads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i % turns * threads + i / turns;
      if (n < count) body(n);
    }
  });
}

}  // namespace grpo
