// token_logprobs: statistics of every row, and in the backward the gradient of every row.
#include <cstring>
#include <tuple>

#include "parallel.h"
#include "row_kernels.h"

namespace grpo {
namespace {

enum Outputs { kLogSumSquares = 1 << 1, kMeanLogits = 1 << 2, kIsTop1 = 1 << 3 };  // bits; the order is that of OUTPUTS

template <class R>
struct Statistics {
  R* logprobs;
  double* lse;
  R *entropy, *log_sum_squares, *mean_logits;
  bool* is_top1;

  void write_masked(int64_t n) const {
    logprobs[n] = entropy[n] = 0;
    lse[n] = 0;
    if (log_sum_squares) log_sum_squares[n] = 0;
    if (mean_logits) mean_logits[n] = 0;
    if (is_top1) is_top1[n] = false;
  }

  void write(int64_t n, const RowStatistics& row, int64_t vocab, int64_t id) const {
    const double log_sum = std::log(row.softmax.sum);
    logprobs[n] = static_cast<R>(row.target - row.softmax.max - log_sum);
    lse[n] = row.softmax.log_sum_exp();
    entropy[n] = static_cast<R>(row.softmax.entropy());
    if (log_sum_squares) log_sum_squares[n] = static_cast<R>(std::log(row.sum_squares) - 2 * log_sum);
    if (mean_logits) mean_logits[n] = static_cast<R>(row.sum_logits / static_cast<double>(vocab));
    if (is_top1) is_top1[n] = row.first_largest == id;
  }
};

template <class R>
void forward(const Rows& logits, const RowKernels& kernels, const int64_t* ids, const bool* mask, int64_t batch,
             int64_t length, const Transform& transform, const Statistics<R>& out) {
  const bool extras = out.log_sum_squares || out.mean_logits || out.is_top1;
  check_ids(ids, mask, batch * length, logits.width);
  parallel_rows(batch * length, logits.width, [&](int64_t n) {
    if (mask && !mask[n]) return out.write_masked(n);
    const void* z = logits.row(n / length, n % length);
    out.write(n, kernels.statistics(z, logits.width, ids[n], transform, extras), logits.width, ids[n]);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_logprobs_fwd(
    const Tensor& logits,               // [B, T or T + 1, V]
    const Tensor& ids,                  // [B, T]
    const std::optional<Tensor>& mask,  // [B, T]
    double temperature, double softcap, double logit_scale, int64_t outputs) {
  const ScalarType type = arithmetic_type(logits);
  const auto optional = [&](int64_t bit, ScalarType dtype) {
    return outputs & bit ? empty_like(ids, dtype) : empty({0}, dtype, ids);
  };
  const Tensor logprobs = empty_like(ids, type), entropy = empty_like(ids, type);
  const Tensor lse = empty_like(ids, ScalarType::Double);
  const Tensor log_sum_squares = optional(kLogSumSquares, type), mean_logits = optional(kMeanLogits, type);
  const Tensor is_top1 = optional(kIsTop1, ScalarType::Bool);
  const auto run = [&]<class R>(R) {
    const Statistics<R> out{mutable_data<R>(logprobs),
                            mutable_data<double>(lse),
                            mutable_data<R>(entropy),
                            outputs & kLogSumSquares ? mutable_data<R>(log_sum_squares) : nullptr,
                            outputs & kMeanLogits ? mutable_data<R>(mean_logits) : nullptr,
                            outputs & kIsTop1 ? mutable_data<bool>(is_top1) : nullptr};
    const Rows rows(logits);
    rows.check_ids_fit(ids);
    forward<R>(rows, row_kernels(dtype_of(logits)), data<int64_t>(ids, ids.numel()), data<bool>(mask, ids.numel()),
               ids.size(0), ids.size(1), {temperature, softcap, logit_scale}, out);
  };
  type == ScalarType::Double ? run(double()) : run(float());
  return {logprobs, lse, entropy, log_sum_squares, mean_logits, is_top1};
}

namespace {

template <class R>
void backward(const Tensor& logits, const Tensor& ids, const std::optional<Tensor>& mask, const Tensor& logprobs,
              const Tensor& lse, const Tensor& entropy, const std::optional<Tensor>& dlogprobs,
              const std::optional<Tensor>& dentropy, const Transform& transform, const Tensor& dlogits) {
  const Rows from(logits), to(dlogits);
  from.check_ids_fit(ids);
  to.check_like(from, dlogits, logits);
  const RowKernels& kernels = row_kernels(dtype_of(logits));
  const int64_t length = ids.size(1), row_bytes = from.width * static_cast<int64_t>(logits.element_size());
  const int64_t count = ids.numel();
  const int64_t* id = data<int64_t>(ids, count);
  const bool* unmasked = data<bool>(mask, count);
  const R *row_logprob = data<R>(logprobs, count), *row_entropy = data<R>(entropy, count);
  const double* row_lse = data<double>(lse, count);
  const R *c = data<R>(dlogprobs, count), *c_h = data<R>(dentropy, count);
  check_ids(id, unmasked, count, from.width);
  parallel_rows(from.batch * from.length, from.width, [&](int64_t row) {
    const int64_t b = row / from.length, t = row % from.length, n = b * length + t;
    const bool live = t < length && (!unmasked || unmasked[n]) && ((c && c[n] != 0) || (c_h && c_h[n] != 0));
    if (!live) {
      std::memset(to.row(b, t), 0, row_bytes);
      return;
    }
    kernels.gradient(from.row(b, t), to.row(b, t), from.width, transform,
                     {id[n], row_logprob[n], row_lse[n], row_entropy[n], c ? c[n] : R(0), c_h ? c_h[n] : R(0)});
  });
}

}  // namespace

void token_logprobs_bwd(const Tensor& logits, const Tensor& ids, const std::optional<Tensor>& mask,
                        const Tensor& logprobs, const Tensor& lse, const Tensor& entropy,
                        const std::optional<Tensor>& dlogprobs, const std::optional<Tensor>& dentropy,
                        double temperature, double softcap, double logit_scale, const Tensor& dlogits) {
  const auto run = arithmetic_type(logits) == ScalarType::Double ? backward<double> : backward<float>;
  run(logits, ids, mask, logprobs, lse, entropy, dlogprobs, dentropy, {temperature, softcap, logit_scale}, dlogits);
}

}  // namespace grpo

STABLE_TORCH_LIBRARY_IMPL(grpo_kernels, CPU, m) {
  m.impl("token_logprobs_fwd_cpu", TORCH_BOX(&grpo::token_logprobs_fwd));
  m.impl("token_logprobs_bwd_cpu", TORCH_BOX(&grpo::token_logprobs_bwd));
}
