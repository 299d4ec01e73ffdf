// grpo_loss: from logits to per-token statistics and the gradient of the loss, each row read once from memory.
#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "group_advantages.h"
#include "parallel.h"
#include "policy_math.h"
#include "row_kernels.h"

namespace grpo {
namespace {

// What the loss of each token needs beside its log-probability, [B, T] flattened; see loss/inputs.py.
template <class R>
struct PolicyInputs {
  const bool* mask;
  const R *advantages, *policy_weights, *kl_weights, *entropy_weights, *old_logprobs, *ref_logprobs;

  // dL/dlogprob of an unmasked token; its ratio is its own (token level).
  R coefficient(int64_t n, R logprob, const PolicyOptions<R>& options) const {
    const R old_logprob = old_logprobs ? old_logprobs[n] : logprob;  // on-policy 0 apart, or a NaN's NaN
    const TokenLoss<R> loss =
        token_loss(logprob, logprob - old_logprob, true, old_logprob, ref_logprobs ? ref_logprobs + n : nullptr,
                   advantages[n], policy_weights[n], kl_weights[n], options);
    return loss.dlog_ratio + loss.dlogprob;
  }
};

// The advantage of each token from the rewards of each completion, whose tokens are [B, T] or lie at `offsets`.
template <class R>
void spread_advantages(const Tensor& rewards, const std::optional<Tensor>& offsets, int64_t num_generations,
                       bool is_scaled, double eps, int64_t tokens, R* out) {
  const int64_t count = rewards.numel();
  STD_TORCH_CHECK(num_generations > 0 && count % num_generations == 0, num_generations, " must divide ", count);
  std::vector<R> advantages(data<R>(rewards, count), data<R>(rewards, count) + count);
  normalize(advantages.data(), count, 1, num_generations, is_scaled ? kGroup : kNone, eps);
  zero_missing(advantages.data(), count);
  const int64_t* offset = data<int64_t>(offsets, count + 1);
  STD_TORCH_CHECK(offset || (count > 0 && tokens % count == 0), "expected the rewards of whole completions");
  for (int64_t s = 0; s < count; ++s) {
    const int64_t begin = offset ? offset[s] : s * (tokens / count);
    const int64_t end = offset ? offset[s + 1] : begin + tokens / count;
    STD_TORCH_CHECK(0 <= begin && begin <= end && end <= tokens, "cu_seqlens must rise from 0 to ", tokens);
    std::fill(out + begin, out + end, advantages[s]);
  }
}

template <class R>
struct Forward {
  Rows from;
  std::optional<Rows> to;
  const RowKernels& kernels;
  int64_t length, row_bytes;
  const int64_t* ids;
  PolicyInputs<R> inputs;
  PolicyOptions<R> options;
  Transform transform;
  R *logprobs, *entropy;
  bool* live;

  // Statistics of token n, read at `z`, and its gradient, written at `dz` if there is one; whether it is live.
  bool token(int64_t n, const void* z, void* dz) const {
    logprobs[n] = entropy[n] = 0;
    if (!inputs.mask[n]) return false;
    const RowStatistics row = kernels.statistics(z, from.width, ids[n], transform, false);
    const double lse = row.softmax.log_sum_exp();
    const double logprob = row.target - row.softmax.max - std::log(row.softmax.sum);
    logprobs[n] = static_cast<R>(logprob);
    entropy[n] = static_cast<R>(row.softmax.entropy());
    if (!dz) return false;
    const R c = inputs.coefficient(n, logprobs[n], options);
    const R c_h = inputs.entropy_weights ? -inputs.entropy_weights[n] : R(0);
    if (c == 0 && c_h == 0) return false;
    kernels.gradient(z, dz, from.width, transform, {ids[n], logprob, lse, row.softmax.entropy(), c, c_h});
    return true;
  }

  // Every row's gradient in its own place; 0 where dead, and past the last token.
  void run() const {
    parallel_rows(from.batch * from.length, from.width, [&](int64_t row) {
      const int64_t b = row / from.length, t = row % from.length, n = b * length + t;
      char* dz = to ? to->row(b, t) : nullptr;
      bool is_live = false;
      if (t < length) is_live = live[n] = token(n, from.row(b, t), dz);
      if (dz && !is_live) std::memset(dz, 0, row_bytes);
    });
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> grpo_loss_fwd(
    const Tensor& logits,  // [B, T or T + 1, V]
    const Tensor& ids,     // [B, T]
    const Tensor& mask, const std::optional<Tensor>& advantages, const Tensor& policy_weights, const Tensor& kl_weights,
    const std::optional<Tensor>& entropy_weights, const std::optional<Tensor>& old_logprobs,
    const std::optional<Tensor>& ref_logprobs,
    const std::optional<Tensor>& rewards,  // [S], instead of advantages
    const std::optional<Tensor>& offsets,  // [S + 1] where packed
    int64_t num_generations, bool is_scaled, double eps, std::vector<int64_t> options, std::vector<double> params,
    double temperature, double softcap, double logit_scale, const std::optional<Tensor>& dlogits) {
  const ScalarType type = arithmetic_type(logits);
  const Tensor logprobs = empty_like(ids, type), entropy = empty_like(ids, type);
  const Tensor live = empty_like(ids, ScalarType::Bool);
  const Tensor given = empty({rewards ? ids.numel() : 0}, type, logits);
  STD_TORCH_CHECK(advantages.has_value() != rewards.has_value(), "expected either advantages or rewards");
  const auto run = [&]<class R>(R) {
    const Rows from(logits);
    const int64_t n = ids.numel();
    from.check_ids_fit(ids);
    if (dlogits) Rows(*dlogits).check_like(from, *dlogits, logits);
    if (rewards) {
      spread_advantages<R>(*rewards, offsets, num_generations, is_scaled, eps, n, mutable_data<R>(given));
    }
    const Forward<R> forward{
        from,
        dlogits ? std::optional<Rows>(Rows(*dlogits)) : std::nullopt,
        row_kernels(dtype_of(logits)),
        ids.size(1),
        from.width * static_cast<int64_t>(logits.element_size()),
        data<int64_t>(ids, n),
        {data<bool>(mask, n), data<R>(rewards ? given : *advantages, n), data<R>(policy_weights, n),
         data<R>(kl_weights, n), data<R>(entropy_weights, n), data<R>(old_logprobs, n), data<R>(ref_logprobs, n)},
        PolicyOptions<R>::decode(options, params),
        {temperature, softcap, logit_scale},
        mutable_data<R>(logprobs),
        mutable_data<R>(entropy),
        mutable_data<bool>(live)};
    STD_TORCH_CHECK(forward.options.level == Level::kToken, "a sequence-level ratio needs every token's statistics first");
    check_ids(forward.ids, forward.inputs.mask, ids.numel(), from.width);
    forward.run();
  };
  type == ScalarType::Double ? run(double()) : run(float());
  return {logprobs, entropy, live, given};
}

}  // namespace grpo

STABLE_TORCH_LIBRARY_IMPL(grpo_kernels, CPU, m) { m.impl("grpo_loss_fwd_cpu", TORCH_BOX(&grpo::grpo_loss_fwd)); }
