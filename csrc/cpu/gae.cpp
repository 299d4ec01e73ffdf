// gae: generalised advantage estimation. Each completion is scanned from its end.
#include "parallel.h"

namespace grpo {
namespace {

template <class R>
void scan(const R* rewards, const R* values, const bool* mask, int64_t begin, int64_t end, double gamma, double lam,
          R* out) {
  double next_value = 0, advantage = 0;
  for (int64_t n = end - 1; n >= begin; --n) {
    out[n] = 0;
    if (!mask[n]) continue;
    const double value = values[n];
    advantage = rewards[n] + gamma * next_value - value + gamma * lam * advantage;
    next_value = value;
    out[n] = static_cast<R>(advantage);
  }
}

}  // namespace

Tensor gae(const Tensor& rewards,  // [N], completions end to end
           const Tensor& values, const Tensor& mask,
           const Tensor& offsets,  // [S + 1]
           double gamma, double lam) {
  const Tensor out = empty_like(values, values.scalar_type());
  const auto run = [&]<class R>(R) {
    const int64_t tokens = values.numel(), count = offsets.size(0) - 1;
    const R *r = data<R>(rewards, tokens), *v = data<R>(values, tokens);
    const bool* m = data<bool>(mask, tokens);
    const int64_t* offset = data<int64_t>(offsets, count + 1);
    check_offsets(offset, count, tokens);
    R* advantages = mutable_data<R>(out);
    parallel_rows(count, count ? tokens / count : 0,
                  [&](int64_t s) { scan<R>(r, v, m, offset[s], offset[s + 1], gamma, lam, advantages); });
  };
  values.scalar_type() == ScalarType::Double ? run(double()) : run(float());
  return out;
}

}  // namespace grpo

STABLE_TORCH_LIBRARY_IMPL(grpo_kernels, CPU, m) { m.impl("gae_cpu", TORCH_BOX(&grpo::gae)); }
