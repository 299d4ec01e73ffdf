// Online softmax: the running state over part of a row, for host and device. The only C++ copy.
#pragma once

#include <cmath>

#include "policy_math.h"

namespace grpo {

// The base of the exponentials and the logarithms.
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

// Over the logits y seen so far: their maximum, sum e^(y - max), and sum (y - max) e^(y - max). Base2 takes 2^ for e^.
//
// The weighted sum is relative to the maximum: an offset that all logits share then costs no precision.
template <class R, class Base = BaseE>
struct OnlineSoftmax {
  R max = -INFINITY;
  R sum = 0;
  R weighted = 0;

  // Adds another part. Any order gives the same state up to rounding.
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

  // Makes the state relative to another maximum. `rate` converts a difference of maxima to an exponent.
  GRPO_HOST_DEVICE void rebase(R new_max, R rate = 1) {
    const R shift = (max - new_max) * rate;
    if (shift == 0) return;
    const R factor = Base::power(shift);
    // if every logit is -inf the shift is not finite; the sums are 0 then
    weighted = factor == 0 ? R(0) : (weighted + shift * sum) * factor;
    sum *= factor;
    max = new_max;
  }
};

}  // namespace grpo
