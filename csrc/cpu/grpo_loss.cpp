// grpo_loss: from logits to per-token statistics and the gradient of the loss, each row read once from memory.
#include <cstring>
#include <tuple>
#include <vector>

#include "policy_math.h"
#include "tensors.h"

namespace grpo {
namespace {

// What the loss of each token needs beside its log-probability, [B, T] flattened; see ops/policy_loss/inputs.py.
template <class R>
struct PolicyInputs {
  const bool* mask;
  const R *advantages, *policy_weights, *kl_weights, *entropy_weights, *old_logprobs, *ref_logprobs;

  // dL/dlogprob of an unmasked token; its ratio is its own (token level).
  R coefficient(int64_t n, R logprob, const PolicyOptions<R>& options) const {
    const R log_ratio = logprob - (old_logprobs ? old_logprobs[n] : logprob);  // on-policy 0, or a NaN's NaN
    const TokenLoss<R> loss = token_loss(logprob, log_ratio, ref_logprobs ? ref_logprobs + n : nullptr, advantages[n],
                                         policy_weights[n], kl_weights[n], options);
    return loss.dlog_ratio + loss.dlogprob;
  }
};

// The rows that one thread has packed.
struct PackedRange {
  int64_t end = 0, live = 0;
};

// Moves the packed rows of every range of rows up against those of the range before.
void join(const Rows& rows, int64_t row_bytes, const std::vector<PackedRange>& ranges) {
  int64_t filled = 0;
  for (int64_t begin = 0; begin < static_cast<int64_t>(ranges.size()); begin = ranges[begin].end) {
    const int64_t live = ranges[begin].live;
    for (int64_t i = 0; i < live && filled != begin; ++i) {
      std::memcpy(rows.row(0, filled + i), rows.row(0, begin + i), row_bytes);
    }
    filled += live;
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
  void in_place() const {
    parallel_rows(from.batch * from.length, from.width, [&](int64_t row) {
      const int64_t b = row / from.length, t = row % from.length, n = b * length + t;
      char* dz = to ? to->row(b, t) : nullptr;
      bool is_live = false;
      if (t < length) is_live = live[n] = token(n, from.row(b, t), dz);
      if (dz && !is_live) std::memset(dz, 0, row_bytes);
    });
  }

  // The gradients of live rows end to end. A thread packs its range of rows against the range's begin, so a row is
  // written only where rows already read have lain; the ranges are joined afterwards.
  void packed() const {
    std::vector<PackedRange> ranges(length);
    torch::stable::parallel_for(0, length, 1, [&](int64_t begin, int64_t end) {
      int64_t filled = begin;
      for (int64_t n = begin; n < end; ++n) {
        live[n] = token(n, from.row(0, n), to->row(0, filled));
        filled += live[n];
      }
      ranges[begin] = {end, filled - begin};
    });
    join(*to, row_bytes, ranges);
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> grpo_loss_fwd(
    const Tensor& logits,  // [B, T or T + 1, V]
    const Tensor& ids,     // [B, T]
    const Tensor& mask, const Tensor& advantages, const Tensor& policy_weights, const Tensor& kl_weights,
    const std::optional<Tensor>& entropy_weights, const std::optional<Tensor>& old_logprobs,
    const std::optional<Tensor>& ref_logprobs, std::vector<int64_t> options, std::vector<double> params,
    double temperature, double softcap, double logit_scale, const std::optional<Tensor>& dlogits, bool pack) {
  const ScalarType type = arithmetic_type(logits);
  const Tensor logprobs = empty_like(ids, type), entropy = empty_like(ids, type);
  const Tensor live = empty_like(ids, ScalarType::Bool);
  const auto run = [&]<class R>(R) {
    const Rows from(logits);
    const int64_t n = ids.numel();
    from.check_ids_fit(ids);
    if (dlogits) Rows(*dlogits).check_like(from, *dlogits, logits);
    const Forward<R> forward{
        from,
        dlogits ? std::optional<Rows>(Rows(*dlogits)) : std::nullopt,
        row_kernels(dtype_of(logits)),
        ids.size(1),
        from.width * static_cast<int64_t>(logits.element_size()),
        data<int64_t>(ids, n),
        {data<bool>(mask, n), data<R>(advantages, n), data<R>(policy_weights, n), data<R>(kl_weights, n),
         data<R>(entropy_weights, n), data<R>(old_logprobs, n), data<R>(ref_logprobs, n)},
        PolicyOptions<R>::decode(options, params),
        {temperature, softcap, logit_scale},
        mutable_data<R>(logprobs),
        mutable_data<R>(entropy),
        mutable_data<bool>(live)};
    STD_TORCH_CHECK(!forward.options.sequence_level, "a sequence-level ratio needs every token's statistics first");
    check_ids(forward.ids, forward.inputs.mask, ids.numel(), from.width);
    pack && dlogits ? forward.packed() : forward.in_place();
  };
  type == ScalarType::Double ? run(double()) : run(float());
  return {logprobs, entropy, live};
}

}  // namespace grpo

STABLE_TORCH_LIBRARY_IMPL(grpo_kernels, CPU, m) { m.impl("grpo_loss_fwd_cpu", TORCH_BOX(&grpo::grpo_loss_fwd)); }
