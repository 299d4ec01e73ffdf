// Checks that print and count failures. A test's main() returns result().
#pragma once

#include <cmath>
#include <cstdio>
#include <limits>
#include <string>

namespace grpo::tests {

inline int checked = 0, failed = 0;

// Checks that `got` is within `tolerance` of `expected`. NaN equals NaN, and an infinity equals itself.
template <class R>
void near(const std::string& what, R got, long double expected, long double tolerance) {
  ++checked;
  const auto value = static_cast<long double>(got);
  if (value == expected || (std::isnan(value) && std::isnan(expected))) return;
  if (std::fabs(value - expected) <= tolerance) return;
  ++failed;
  std::printf("%s: got %.20Lg, expected %.20Lg, %.3Lg apart where %.3Lg is allowed\n", what.c_str(), value, expected,
              std::fabs(value - expected), tolerance);
}

template <class R>
constexpr long double kUlp = std::numeric_limits<R>::epsilon();

inline int result(const char* name, int min_checks) {
  std::printf("%s: %d checks, %d failed\n", name, checked, failed);
  if (checked >= min_checks) return failed != 0;
  std::printf("at least %d checks were expected\n", min_checks);
  return 1;
}

}  // namespace grpo::tests
