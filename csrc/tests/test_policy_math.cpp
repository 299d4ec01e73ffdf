// policy_math.h, one token at a time, against the fp64 reference. python_tests/policy_math_cases.py writes the expected
// values to policy_math_cases.txt. Run from this folder.
#include "policy_math.h"

#include <array>
#include <fstream>
#include <sstream>
#include <type_traits>

#include "check.h"

namespace {

using namespace grpo;
using grpo::tests::kUlp;
using grpo::tests::near;

struct Config {
  std::string name;
  std::array<int64_t, kOptionCount> options;
  std::array<double, kParamCount> params;
};

struct Token {
  double logprob, old_logprob, ref_logprob, advantage, policy_weight, kl_weight;
  double loss, gradient, kl, is_low, is_high;  // expected
};

// strtod, because streams do not read inf and nan.
double number(std::istream& line) {
  std::string word;
  line >> word;
  return std::strtod(word.c_str(), nullptr);
}

Token token_of(std::istream& line) {
  Token t;
  for (double* value : {&t.logprob, &t.old_logprob, &t.ref_logprob, &t.advantage, &t.policy_weight, &t.kl_weight,
                        &t.loss, &t.gradient, &t.kl, &t.is_low, &t.is_high}) {
    *value = number(line);
  }
  return t;
}

template <class R>
void check(const Config& config, const Token& c, int line_number) {
  const auto options = PolicyOptions<R>::decode(config.options, config.params);
  const R logprob = static_cast<R>(c.logprob), advantage = static_cast<R>(c.advantage);
  const R ref_logprob = static_cast<R>(c.ref_logprob), old_logprob = static_cast<R>(c.old_logprob);
  const LogRatio<R> averaged = averaged_log_ratio(logprob - old_logprob, advantage, options);
  const TokenLoss<R> got = token_loss(logprob, averaged.value, true, old_logprob,
                                      std::isnan(c.ref_logprob) ? nullptr : &ref_logprob, advantage,
                                      static_cast<R>(c.policy_weight), static_cast<R>(c.kl_weight), options);
  const R gradient = got.dlogprob + (averaged.has_gradient ? got.dlog_ratio : R(0));

  // scale of the rounding error: the largest term of the sum, times the derivative of the exponentials
  const double ratio = std::exp(std::fmin(c.logprob - c.old_logprob, config.params[kLogRatioClamp]));
  const double d = std::isnan(c.ref_logprob) ? 0 : std::fabs(c.logprob - c.ref_logprob);
  const double steep = 1 + std::fabs(c.logprob - c.old_logprob);
  const double kl = (1 + ratio) * (d + d * d + std::exp(d)) * (d > 0);
  const double policy = c.policy_weight * std::fabs(c.advantage) * (4 + ratio) * (1 + std::fabs(c.logprob));
  const double size = steep * (policy + config.params[kBeta] * c.kl_weight * kl);
  const std::string what = config.name + ", line " + std::to_string(line_number) +
                           (std::is_same_v<R, float> ? " in fp32: " : " in fp64: ");
  near(what + "loss", got.loss, c.loss, kUlp<R> * size);
  near(what + "gradient", gradient, c.gradient, kUlp<R> * size);
  near(what + "kl", got.kl, c.kl, kUlp<R> * steep * kl);
  near(what + "is_low", static_cast<R>(got.is_low), c.is_low, 0);
  near(what + "is_high", static_cast<R>(got.is_high), c.is_high, 0);
}

}  // namespace

int main() {
  std::ifstream file("policy_math_cases.txt");
  Config config;
  int line_number = 0;
  for (std::string text, word; std::getline(file, text);) {
    ++line_number;
    std::istringstream line(text);
    line >> word;
    if (word == "token") {
      const Token token = token_of(line);
      check<float>(config, token, line_number);
      check<double>(config, token, line_number);
    } else {
      config.name = word;
      for (int64_t& option : config.options) line >> option;
      for (double& param : config.params) param = number(line);
    }
    if (line.fail()) {
      std::printf("policy_math_cases.txt: line %d is cut short\n", line_number);
      return 1;
    }
  }
  return grpo::tests::result("policy_math.h", 5000);
}
