// The state of a softmax over part of a row, for host and device. The only C++ copy.
#pragma once

#include <cmath>

#include "policy_math.h"

namespace grpo {

// What the logits are exponents of, and the sums powers of.
struct BaseE {
  template <class R>
  static GRPO_HOST_DEVICE R power(R x) {
    return std::exp(x);
  }
  template <class R>
  static GRPO_HOST_DEVICE R log(R x) {
    return std::log(x);
  }
};
struct Base2 {
  template <class R>
  static GRPO_HOST_DEVICE R power(R x) {
    return std::exp2(x);
  }
  template <class R>
  static GRPO_HOST_DEVICE R log(R x) {
    return std::log2(x);
  }
};

// Over the logits y seen so far: their maximum, sum e^(y - max), and sum (y - max) e^(y - max); or powers of 2.
//
// The weighted sum is taken relative to the maximum, so that an offset common to all logits costs no digits.
template <class R, class Base = BaseE>
struct OnlineSoftmax {
  R max = -INFINITY;
  R sum = 0;
  R weighted = 0;

  // The state of both parts together. Exact in any order, up to rounding.
  GRPO_HOST_DEVICE void merge(const OnlineSoftmax& other) {
    if (other.max == -INFINITY && other.sum == 0) return;
    if (max == -INFINITY && sum == 0) {
      *this = other;
      return;
    }
    const R joint = max > other.max ? max : other.max;
    rebase(joint);
    OnlineSoftmax part = other;
    part.rebase(joint);
    sum += part.sum;
    weighted += part.weighted;
  }

  GRPO_HOST_DEVICE R log_sum_exp() const { return max + Base::log(sum); }
  GRPO_HOST_DEVICE R entropy() const { return Base::log(sum) - weighted / sum; }

  // Relative to another maximum; `rate` exponents are one of the unit that maxima are kept in.
  GRPO_HOST_DEVICE void rebase(R new_max, R rate = 1) {
    const R shift = (max - new_max) * rate;
    if (shift == 0) return;
    const R factor = Base::power(shift);
    // a state of weight 0 (every logit -inf) has no finite shift, and none is needed
    weighted = factor == 0 ? R(0) : (weighted + shift * sum) * factor;
    sum *= factor;
    max = new_max;
  }
};

}  // namespace grpo
