// token_divergence: statistics of every row, its divergence from a reference row, and its gradient if requested.
#include <cmath>
#include <cstring>
#include <tuple>

#include "parallel.h"
#include "row_kernels.h"

namespace grpo {
namespace {

template <class R>
struct Comparison {
  Rows from, reference;
  std::optional<Rows> to;
  const RowKernels& kernels;
  int64_t length;
  int64_t row_bytes;
  const int64_t* ids;
  const bool* mask;
  const R *dlogprobs, *dentropy, *ddivergence;  // any may be null
  double mixture;
  Transform transform, divergence_transform, reference_transform;  // of log-probabilities; of the divergence
  R *logprobs, *entropy, *divergence;

  static double log_probability(const RowStatistics& row) {
    return row.target - row.softmax.max - std::log(row.softmax.sum);
  }

  ComparedRow compared_row(const void* z, int64_t id, const Transform& t) const {
    const RowStatistics row = kernels.statistics(z, from.width, id, t, false);
    return {z, t, row.softmax.log_sum_exp(), log_probability(row)};
  }

  // Computes the statistics of token n, and writes its gradient to `dz` unless that is null. Returns whether it did.
  bool token(int64_t n, const void* z, const void* zq, void* dz) const {
    logprobs[n] = entropy[n] = divergence[n] = 0;
    if (mask && !mask[n]) return false;
    const RowStatistics row = kernels.statistics(z, from.width, ids[n], transform, false);
    const double lse = row.softmax.log_sum_exp(), logprob = log_probability(row);
    const bool same_temperature = transform.temperature == divergence_transform.temperature;
    const ComparedRow p = same_temperature ? ComparedRow{z, transform, lse, logprob}
                                           : compared_row(z, ids[n], divergence_transform);
    const ComparedRow q = compared_row(zq, ids[n], reference_transform);
    const RowDivergence row_divergence = kernels.divergence(p, q, from.width, mixture);
    logprobs[n] = static_cast<R>(logprob);
    entropy[n] = static_cast<R>(row.softmax.entropy());
    divergence[n] = static_cast<R>(row_divergence.value);
    if (!dz) return false;
    const R c = dlogprobs ? dlogprobs[n] : R(0), c_h = dentropy ? dentropy[n] : R(0);
    const R c_d = ddivergence ? ddivergence[n] : R(0);
    if (c == 0 && c_h == 0 && c_d == 0) return false;
    kernels.divergence_gradient(p, q, dz, from.width, transform, {ids[n], logprob, lse, row.softmax.entropy(), c, c_h},
                                mixture, row_divergence, c_d);
    return true;
  }

  // Rows without a gradient are filled with 0, like the row after the last token.
  void run() const {
    parallel_rows(from.batch * from.length, from.width, [&](int64_t row) {
      const int64_t b = row / from.length, t = row % from.length;
      char* dz = to ? to->row(b, t) : nullptr;
      const bool has_gradient = t < length && token(b * length + t, from.row(b, t), reference.row(b, t), dz);
      if (dz && !has_gradient) std::memset(dz, 0, row_bytes);
    });
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> token_divergence(
    const Tensor& logits,            // [B, T or T + 1, V]
    const Tensor& reference_logits,  // like logits
    const Tensor& ids,               // [B, T]
    const std::optional<Tensor>& mask, const std::optional<Tensor>& dlogprobs, const std::optional<Tensor>& dentropy,
    const std::optional<Tensor>& ddivergence, double mixture, double temperature, double softcap, double logit_scale,
    double divergence_temperature, double reference_softcap, double reference_logit_scale,
    const std::optional<Tensor>& dlogits) {
  const ScalarType type = arithmetic_type(logits);
  const Tensor logprobs = empty_like(ids, type), entropy = empty_like(ids, type), divergence = empty_like(ids, type);
  const auto run = [&]<class R>(R) {
    const Rows from(logits), reference(reference_logits);
    const int64_t n = ids.numel();
    from.check_ids_fit(ids);
    reference.check_like(from, reference_logits, logits);
    if (dlogits) Rows(*dlogits).check_like(from, *dlogits, logits);
    const Comparison<R> comparison{from,
                                   reference,
                                   dlogits ? std::optional<Rows>(Rows(*dlogits)) : std::nullopt,
                                   row_kernels(dtype_of(logits)),
                                   ids.size(1),
                                   from.width * static_cast<int64_t>(logits.element_size()),
                                   data<int64_t>(ids, n),
                                   data<bool>(mask, n),
                                   data<R>(dlogprobs, n),
                                   data<R>(dentropy, n),
                                   data<R>(ddivergence, n),
                                   mixture,
                                   {temperature, softcap, logit_scale},
                                   {divergence_temperature, softcap, logit_scale},
                                   {divergence_temperature, reference_softcap, reference_logit_scale},
                                   mutable_data<R>(logprobs),
                                   mutable_data<R>(entropy),
                                   mutable_data<R>(divergence)};
    check_ids(comparison.ids, comparison.mask, n, from.width);
    comparison.run();
  };
  type == ScalarType::Double ? run(double()) : run(float());
  return {logprobs, entropy, divergence};
}

}  // namespace grpo

STABLE_TORCH_LIBRARY_IMPL(grpo_kernels, CPU, m) {
  m.impl("token_divergence_cpu", TORCH_BOX(&grpo::token_divergence));
}
