// Storage types of logits, and the type that arithmetic on each uses.
#pragma once

#include <cstdint>

namespace grpo {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

enum class Dtype { kFloat, kBFloat16, kHalf, kDouble };
constexpr int kDtypeCount = 4;

// fp32, or fp64 for fp64.
template <class T>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class T>
using Arithmetic = typename ArithmeticOf<T>::type;

}  // namespace grpo
