// OnlineSoftmax of parts merged in any order, against sums over the whole row in long double.
#include "online_softmax.h"

#include <algorithm>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"

namespace {

using grpo::Base2;
using grpo::BaseE;
using grpo::OnlineSoftmax;
using grpo::tests::kUlp;
using grpo::tests::near;

// In the base of the logarithm.
struct Expected {
  long double log_sum_exp, entropy;
};

template <class Base, class R>
Expected expected_of(const std::vector<R>& logits) {
  const long double max = *std::max_element(logits.begin(), logits.end());
  long double sum = 0, weighted = 0;
  for (const long double y : logits) {
    const long double power = Base::power(y - max);
    sum += power;
    weighted += power == 0 ? 0 : (y - max) * power;
  }
  return {max + Base::log(sum), Base::log(sum) - weighted / sum};
}

// Merges by halves, as warps do, or one by one, as a thread does.
template <class Base, class R>
OnlineSoftmax<R, Base> merged(const R* logits, size_t count, bool by_halves) {
  OnlineSoftmax<R, Base> state;
  if (count == 1) {
    state.max = *logits;
    state.sum = *logits == -INFINITY ? R(0) : R(1);
    return state;
  }
  const size_t first = by_halves ? count / 2 : count - 1;
  state = merged<Base>(logits, first, by_halves);
  state.merge(merged<Base>(logits + first, count - first, by_halves));
  return state;
}

template <class Base, class R>
void check(const std::string& name, const std::vector<R>& logits) {
  const Expected expected = expected_of<Base>(logits);
  for (const bool by_halves : {true, false}) {
    const OnlineSoftmax<R, Base> state = merged<Base>(logits.data(), logits.size(), by_halves);
    const std::string what = name + (by_halves ? " by halves" : " one by one") +
                             (std::is_same_v<Base, Base2> ? ", base 2" : ", base e") +
                             (std::is_same_v<R, float> ? ", fp32" : ", fp64");
    // half an ulp for each merge that a logit goes through
    const long double merges = by_halves ? std::log2(static_cast<double>(logits.size())) : std::sqrt(logits.size());
    const long double tolerance = kUlp<R> / 2 * (2 + merges);
    near(what + ": log_sum_exp", state.log_sum_exp(), expected.log_sum_exp,
         tolerance * (1 + std::fabs(expected.log_sum_exp)));
    near(what + ": entropy", state.entropy(), expected.entropy, 4 * tolerance * (1 + expected.entropy));
  }
}

template <class R>
void check_all() {
  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  for (const double spread : {0.1, 4.0, 30.0}) {
    for (const double offset : {0.0, 64.0, -4096.0}) {
      for (const size_t count : {1, 2, 31, 1000}) {
        std::vector<R> logits(count);
        for (R& y : logits) y = static_cast<R>(spread * normal(random) + offset);
        const std::string name = std::to_string(count) + " logits around " + std::to_string(offset);
        check<BaseE>(name, logits);
        check<Base2>(name, logits);
      }
    }
  }
  const R inf = INFINITY;
  check<BaseE>("-inf beside numbers", std::vector<R>{-inf, R(1), -inf, R(3), R(2), -inf});
  check<Base2>("-inf before the others", std::vector<R>{-inf, -inf, -inf, R(-5)});
  check<BaseE>("far apart", std::vector<R>{R(0), R(-2000), R(2000), R(-1e30)});
  for (const bool by_halves : {true, false}) {
    const std::vector<R> nan = {R(1), R(NAN), R(2)}, nothing(5, -inf);
    near("a NaN stays", merged<BaseE>(nan.data(), 3, by_halves).log_sum_exp(), NAN, 0);
    near("nothing but -inf has no weight", merged<BaseE>(nothing.data(), 5, by_halves).sum, 0, 0);
  }
}

}  // namespace

int main() {
  check_all<float>();
  check_all<double>();
  return grpo::tests::result("online_softmax.h", 600);
}
