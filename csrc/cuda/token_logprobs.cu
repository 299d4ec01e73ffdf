// token_logprobs: statistics of every row, and in the backward the gradient of every row.
#include <tuple>

#include "row_launch.h"
#include "statistics.h"

namespace grpo::cuda {
namespace {

enum Outputs { kLogSumSquares = 1 << 1, kMeanLogits = 1 << 2, kIsTop1 = 1 << 3 };  // bits; the order is that of OUTPUTS

// Optional statistics; they take a second pass over the row.
template <class R>
struct Extras {
  R squares = 0, total = 0;  // sum 4^t, sum v
  int64_t rank = 0;          // columns ahead of the token, by larger logit and then by smaller index

  __device__ __forceinline__ void merge(const Extras& other) {
    squares += other.squares;
    total += other.total;
    rank += other.rank;
  }
};

// The token that the extras of its row are relative to.
template <class R>
struct Target {
  int id;
  R v, base;
};

template <class T, int kCount, class R>
__device__ __forceinline__ void add(Extras<R>& extras, const Packet<T, kCount>& packet, int column,
                                    const Target<R>& target, const RowTransform<R>& f) {
  R z[kCount];
  unpack(packet, z);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const R v = apply_curve<false>(z[i], f);
    extras.squares += exp2_fast(R(2) * ((v - target.base) * f.rate));
    extras.total += v;
    extras.rank += v > target.v || (v == target.v && column + i < target.id);
  }
}

template <class T, int kCount, class R>
__device__ Extras<R> thread_extras(const Packet<T, kCount>* row, RowSize<kCount> size, const Target<R>& target,
                                   const RowTransform<R>& f) {
  Extras<R> extras;
  const int thread = static_cast<int>(threadIdx.x);
  for (int k = thread; k < size.packets; k += kThreads) add(extras, row[k], k * kCount, target, f);
  if (size.tail.is_mine()) add(extras, *Tail::of(row, size.packets), size.packets * kCount + thread, target, f);
  return extras;
}

template <class R>
struct BlockShared {
  Target<R> target;
  union {
    Softmax<R> parts[kThreads / kWarp];
    Extras<R> extras[kThreads / kWarp];
  };
};

template <class R>
__device__ __forceinline__ void write_extras(const Statistics<R>& out, int n, const Extras<R>& all, double log_sum) {
  if (out.log_sum_squares) out.log_sum_squares[n] = static_cast<R>((log2_of(all.squares) - 2 * log_sum) * kLn2);
  if (out.mean_logits) {
    const double outer = static_cast<double>(out.transform.rate) * kLn2;
    out.mean_logits[n] = static_cast<R>(static_cast<double>(all.total) / out.space.vocab * outer);
  }
  if (out.is_top1) out.is_top1[n] = all.rank == 0;
}

template <class R>
__device__ __forceinline__ void write_masked(const Statistics<R>& out, int64_t n) {
  out.logprobs[n] = out.entropy[n] = 0;
  if (out.lse) out.lse[n] = 0;
  if (out.log_sum_squares) out.log_sum_squares[n] = 0;
  if (out.mean_logits) out.mean_logits[n] = 0;
  if (out.is_top1) out.is_top1[n] = false;
  if (out.live) out.live[n] = false;
}

template <class T, Access kAccess, bool kPlain>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 3)
statistics_of_rows(const __grid_constant__ Statistics<Arithmetic<T>> out) {
  using R = Arithmetic<T>;
  constexpr int kCount = kWidth<T, kAccess>;
  auto& shared = *static_cast<BlockShared<R>*>(dynamic_shared());
  const RowSize<kCount> size(out.space.vocab);
  const bool is_leader = threadIdx.x == 0, has_extras = out.log_sum_squares || out.mean_logits || out.is_top1;
  const int tokens = out.space.rows / out.space.rows_per_batch * out.space.length;
  for (int n = static_cast<int>(blockIdx.x); n < tokens; n += static_cast<int>(gridDim.x)) {
    if (out.mask && !out.mask[n]) {
      if (is_leader) write_masked(out, n);
      continue;
    }
    const auto* const row = out.logits.template row<Packet<T, kCount>>(n / out.space.length, n % out.space.length);
    int id = 0;
    R target = 0;
    if (is_leader) {
      id = clamp_id(out.ids[n], n, out.space.vocab, out.first_bad);
      target = apply_curve<false>(element(reinterpret_cast<const T*>(row)[id]), out.transform);
    }
    const Softmax<R> thread_state = thread_softmax<kPlain>(row, size, out.transform);
    const Softmax<R> state = merge_block_softmax(thread_state, shared.parts, out.transform.rate);
    double log_sum = 0;
    if (is_leader) {
      const RowResult<R> result = row_result(state, target, out.transform.rate);
      out.logprobs[n] = result.logprob;
      out.entropy[n] = result.entropy;
      if (out.lse) out.lse[n] = result.lse;
      if (out.live) out.live[n] = false;
      log_sum = log2_of(state.sum);
      shared.target = {id, target, state.max};
    }
    __syncthreads();  // the next row overwrites shared.parts, which the first warp has read by now
    if (!has_extras) continue;
    Extras<R> extras = thread_extras(row, size, shared.target, out.transform);
    extras = reduce_block(extras, shared.extras, Merge());
    if (is_leader) write_extras(out, n, extras, log_sum);
    __syncthreads();
  }
}

}  // namespace

template <class R>
void launch_statistics(const Device& device, const Tensor& logits, const Rows& from, const Statistics<R>& statistics) {
  with_storage(dtype_of(logits), [&](auto t) {
    using T = decltype(t);
    if constexpr (std::is_same_v<Arithmetic<T>, R>) {
      const bool vectors = sizeof(T) < 8 && has_vectors(from);
      with_access<T>(vectors, statistics.transform.curve, [&](auto access, auto plain) {
        const auto kernel = statistics_of_rows<T, access.value, plain.value>;
        const Grid grid = row_grid(device, statistics.space.rows, sizeof(BlockShared<R>), kernel);
        launch(device, "token_logprobs", {from.batch, from.length, from.width}, grid, kernel, statistics);
      });
    }
  });
}

template void launch_statistics(const Device&, const Tensor&, const Rows&, const Statistics<float>&);
template void launch_statistics(const Device&, const Tensor&, const Rows&, const Statistics<double>&);

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
  const Device device(logits);
  const Rows from(logits);
  from.check_ids_fit(ids);
  const auto run = [&]<class R>(R) {
    launch_statistics<R>(device, logits, from,
                         {row_space(from, ids.size(1)),
                          row_memory(from),
                          row_transform<R>(temperature, softcap, logit_scale),
                          data<int64_t>(ids, ids.numel()),
                          data<bool>(mask, ids.numel()),
                          mutable_data<R>(logprobs),
                          mutable_data<double>(lse),
                          mutable_data<R>(entropy),
                          outputs & kLogSumSquares ? mutable_data<R>(log_sum_squares) : nullptr,
                          outputs & kMeanLogits ? mutable_data<R>(mean_logits) : nullptr,
                          outputs & kIsTop1 ? mutable_data<bool>(is_top1) : nullptr,
                          nullptr,
                          device.first_bad()});
  };
  type == ScalarType::Double ? run(double()) : run(float());
  return {logprobs, lse, entropy, log_sum_squares, mean_logits, is_top1};
}

// ---- backward

namespace {

template <class R>
struct Gradient {
  RowSpace space;
  RowMemory logits, dlogits;
  RowTransform<R> transform;
  const int64_t* ids;
  const bool* mask;
  const R* logprobs;
  const double* lse;
  const R *entropy, *dlogprobs, *dentropy;
  int64_t* first_bad;
};

template <class R>
struct GradientShared {
  GradientWeights<R> weights;
  int id;
};

template <class T>
__device__ __forceinline__ GradientWeights<Arithmetic<T>> weights_of_token(const Gradient<Arithmetic<T>>& gradient,
                                                                           const T* row, int id, int n,
                                                                           Arithmetic<T> c, Arithmetic<T> c_h) {
  using R = Arithmetic<T>;
  const double exponent = gradient.lse[n] / kLn2;
  const R offset = static_cast<R>(-exponent);
  const R target = apply_curve<false>(element(row[id]), gradient.transform);
  return gradient_weights(offset, exponent + static_cast<double>(offset), gradient.logprobs[n], gradient.entropy[n], c,
                          c_h, slope_at<false>(target, gradient.transform), gradient.transform.slope);
}

template <class T, class Out, Access kAccess, bool kPlain>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 3)
gradient_of_rows(const __grid_constant__ Gradient<Arithmetic<T>> gradient) {
  using R = Arithmetic<T>;
  constexpr int kCount = kWidth<T, kAccess>;
  auto& shared = *static_cast<GradientShared<R>*>(dynamic_shared());
  const RowSize<kCount> size(gradient.space.vocab);
  const bool is_leader = threadIdx.x == 0;
  for (int row = static_cast<int>(blockIdx.x); row < gradient.space.rows; row += static_cast<int>(gridDim.x)) {
    const Token token(row, gradient.space);
    const auto* const from = gradient.logits.template row<Packet<T, kCount>>(token.batch, token.position);
    auto* const to = gradient.dlogits.template row<Packet<Out, kCount>>(token.batch, token.position);
    const bool is_row = token.is_token && (!gradient.mask || gradient.mask[token.n]);
    const R c = is_row && gradient.dlogprobs ? gradient.dlogprobs[token.n] : R(0);
    const R c_h = is_row && gradient.dentropy ? gradient.dentropy[token.n] : R(0);
    if (c == 0 && c_h == 0) {
      write_zeros(to, size);
      continue;
    }
    if (is_leader) {
      shared.id = clamp_id(gradient.ids[token.n], token.n, gradient.space.vocab, gradient.first_bad);
      shared.weights = weights_of_token(gradient, reinterpret_cast<const T*>(from), shared.id, token.n, c, c_h);
    }
    __syncthreads();
    const GradientWeights<R> weights = shared.weights;
    write_gradient<kPlain>(from, to, size, weights, gradient.transform);
    __syncthreads();
    // overwrites what another thread wrote there
    if (is_leader) reinterpret_cast<Out*>(to)[shared.id] = rounded<Out>(weights.target_gradient);
  }
}

}  // namespace

void token_logprobs_bwd(const Tensor& logits, const Tensor& ids, const std::optional<Tensor>& mask,
                        const Tensor& logprobs, const Tensor& lse, const Tensor& entropy,
                        const std::optional<Tensor>& dlogprobs, const std::optional<Tensor>& dentropy,
                        double temperature, double softcap, double logit_scale, const Tensor& dlogits) {
  const Device device(logits);
  const Rows from(logits), to(dlogits);
  from.check_ids_fit(ids);
  check_gradient(to, from, dlogits, logits);
  const int64_t n = ids.numel();
  with_storages(dtype_of(logits), dtype_of(dlogits), [&](auto t, auto o) {
    using T = decltype(t);
    using Out = decltype(o);
    using R = Arithmetic<T>;
    const Gradient<R> gradient{row_space(from, ids.size(1)),
                               row_memory(from),
                               row_memory(to),
                               row_transform<R>(temperature, softcap, logit_scale),
                               data<int64_t>(ids, n),
                               data<bool>(mask, n),
                               data<R>(logprobs, n),
                               data<double>(lse, n),
                               data<R>(entropy, n),
                               data<R>(dlogprobs, n),
                               data<R>(dentropy, n),
                               device.first_bad()};
    const bool vectors = has_gradient_vectors<T, Out>(from, to);
    with_access<T>(vectors, gradient.transform.curve, [&](auto access, auto plain) {
      const auto kernel = gradient_of_rows<T, Out, access.value, plain.value>;
      const Grid grid = row_grid(device, gradient.space.rows, sizeof(GradientShared<R>), kernel);
      launch(device, "token_logprobs' backward", {from.batch, from.length, from.width}, grid, kernel, gradient);
    });
  });
}

}  // namespace grpo::cuda

STABLE_TORCH_LIBRARY_IMPL(grpo_kernels, GRPO_DEVICE_KEY, m) {
  m.impl("token_logprobs_fwd_cuda", TORCH_BOX(&grpo::cuda::token_logprobs_fwd));
  m.impl("token_logprobs_bwd_cuda", TORCH_BOX(&grpo::cuda::token_logprobs_bwd));
}
