// grpo_loss: per-token statistics and the gradient of the loss from logits. Each row is read from memory once.
#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "group_advantages.h"
#include "parallel.h"
#include "policy_math.h"
#include "row_kernels.h"
#include "token_fields.h"

namespace grpo {
namespace {

// Writes the advantage of each completion, from the rewards of its group.
template <class R>
void write_advantages(const Tensor& rewards, int64_t num_generations, bool is_scaled, double eps, R* out) {
  const int64_t count = rewards.numel();
  STD_TORCH_CHECK(num_generations > 0 && count % num_generations == 0, num_generations, " must divide ", count);
  std::copy_n(data<R>(rewards, count), count, out);
  normalize(out, count, 1, num_generations, is_scaled ? kGroup : kNone, eps);
  zero_missing(out, count);
}

template <class R>
struct Forward {
  Rows from;
  std::optional<Rows> to;
  const RowKernels& kernels;
  int64_t length, row_bytes;
  const int64_t* ids;
  TokenFields<R> fields;
  PolicyOptions<R> options;
  Transform transform;
  R *logprobs, *entropy;
  bool* live;

  // dL/dlogprob of an unmasked token, at token level.
  R coefficient(int64_t s, int64_t n) const {
    const R logprob = logprobs[n], old_logprob = fields.old_logprob(n, logprob);
    const TokenLoss<R> loss =
        token_loss(logprob, logprob - old_logprob, true, old_logprob, fields.ref_logprob(n),
                   fields.advantages.at(s, n), fields.policy_weight(s, n), fields.weights.at(s, n), options);
    return loss.dlog_ratio + loss.dlogprob;
  }

  // Computes the statistics of token n from its logits `z`, and writes its gradient to `dz` unless that is null. The
  // token is of completion b unless it has a sequence id. Returns whether its gradient was written.
  bool token(int64_t b, int64_t n, const void* z, void* dz) const {
    logprobs[n] = entropy[n] = 0;
    if (!fields.mask[n]) return false;
    const RowStatistics row = kernels.statistics(z, from.width, ids[n], transform, false);
    const double lse = row.softmax.log_sum_exp();
    const double logprob = row.target - row.softmax.max - std::log(row.softmax.sum);
    logprobs[n] = static_cast<R>(logprob);
    entropy[n] = static_cast<R>(row.softmax.entropy());
    if (!dz) return false;
    const int64_t s = fields.sequence_of(b, n);
    const R c = coefficient(s, n);
    const R c_h = fields.entropy_weights.values ? -fields.entropy_weights.at(s, n) : R(0);
    if (c == 0 && c_h == 0) return false;
    kernels.gradient(z, dz, from.width, transform, {ids[n], logprob, lse, row.softmax.entropy(), c, c_h});
    return true;
  }

  // Rows without a gradient are filled with 0, like the row after the last token.
  void run() const {
    parallel_rows(from.batch * from.length, from.width, [&](int64_t row) {
      const int64_t b = row / from.length, t = row % from.length, n = b * length + t;
      char* dz = to ? to->row(b, t) : nullptr;
      bool is_live = false;
      if (t < length) is_live = live[n] = token(b, n, from.row(b, t), dz);
      if (dz && !is_live) std::memset(dz, 0, row_bytes);
    });
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> grpo_loss_fwd(
    const Tensor& logits,  // [B, T or T + 1, V]
    const Tensor& ids,     // [B, T]
    const Tensor& mask, const std::optional<Tensor>& sequence_ids, const std::optional<Tensor>& advantages,
    const Tensor& weights, const std::optional<Tensor>& policy_factors, const std::optional<Tensor>& entropy_weights,
    const std::optional<Tensor>& old_logprobs, const std::optional<Tensor>& ref_logprobs,
    const std::optional<Tensor>& rewards,  // [S], instead of advantages
    int64_t num_generations, bool is_scaled, double eps, std::vector<int64_t> options, std::vector<double> params,
    double temperature, double softcap, double logit_scale, const std::optional<Tensor>& dlogits) {
  const ScalarType type = arithmetic_type(logits);
  const Tensor logprobs = empty_like(ids, type), entropy = empty_like(ids, type);
  const Tensor live = empty_like(ids, ScalarType::Bool);
  const Tensor computed_advantages = empty({rewards ? rewards->numel() : 0}, type, logits);
  STD_TORCH_CHECK(advantages.has_value() != rewards.has_value(), "expected either advantages or rewards");
  const auto run = [&]<class R>(R) {
    const Rows from(logits);
    const int64_t n = ids.numel();
    from.check_ids_fit(ids);
    if (dlogits) Rows(*dlogits).check_like(from, *dlogits, logits);
    if (rewards) write_advantages<R>(*rewards, num_generations, is_scaled, eps, mutable_data<R>(computed_advantages));
    const std::optional<Tensor> used_advantages = rewards ? computed_advantages : advantages;
    const TokenTensors tensors{mask,           sequence_ids,    used_advantages, weights,
                               policy_factors, entropy_weights, old_logprobs,    ref_logprobs};
    const int64_t sequences = tensors.sequence_count(ids.size(0));
    const Forward<R> forward{
        from,
        dlogits ? std::optional<Rows>(Rows(*dlogits)) : std::nullopt,
        row_kernels(dtype_of(logits)),
        ids.size(1),
        from.width * static_cast<int64_t>(logits.element_size()),
        data<int64_t>(ids, n),
        token_fields<R>(tensors, sequences, n),
        PolicyOptions<R>::decode(options, params),
        {temperature, softcap, logit_scale},
        mutable_data<R>(logprobs),
        mutable_data<R>(entropy),
        mutable_data<bool>(live)};
    STD_TORCH_CHECK(forward.options.level == Level::kToken,
                    "a sequence-level ratio needs every token's statistics first");
    check_ids(forward.ids, forward.fields.mask, n, from.width);
    check_sequence_ids(forward.fields.sequence_ids, n, sequences);
    forward.run();
  };
  type == ScalarType::Double ? run(double()) : run(float());
  return {logprobs, entropy, live, computed_advantages};
}

}  // namespace grpo

STABLE_TORCH_LIBRARY_IMPL(grpo_kernels, CPU, m) { m.impl("grpo_loss_fwd_cpu", TORCH_BOX(&grpo::grpo_loss_fwd)); }
