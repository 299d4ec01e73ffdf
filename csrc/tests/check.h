// Checks that count what fails and say it; a test's main() ends with their result().
#pragma once

#include <cmath>
#include <cstdio>
#include <limits>
#include <string>

namespace grpo::tests {

inline int checked = 0, failed = 0;

// Whether `got` is within `tolerance` of what is expected; NaN and infinities are equal to their like.
template <class R>
void near(const std::string& what, R got, long double expected, long double tolerance) {
  ++checked;
  const auto found = static_cast<long double>(got);
  if (found == expected || (std::isnan(found) && std::isnan(expected))) return;
  if (std::fabs(found - expected) <= tolerance) return;
  ++failed;
  std::printf("%s: got %.20Lg, expected %.20Lg, %.3Lg apart where %.3Lg is allowed\n", what.c_str(), found, expected,
              std::fabs(found - expected), tolerance);
}

template <class R>
constexpr long double kUlp = std::numeric_limits<R>::epsilon();

inline int result(const char* name, int least) {
  std::printf("%s: %d checks, %d failed\n", name, checked, failed);
  if (checked >= least) return failed != 0;
  std::printf("at least %d checks were expected\n", least);
  return 1;
}

}  // namespace grpo::tests
