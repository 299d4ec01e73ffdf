// Rows of logits as device functions of a block's threads: online softmax, gradient, zeros. The only CUDA copy.
//
// Exponentials are powers of 2. With y = outer v(z), where v is z or tanh(inner z), the exponent of an element is
// t = (v - base) rate for rate = outer log2 e. The statistics subtract first, so the largest element has exponent 0
// exactly. The gradient computes t as one FMA with a rounded offset, and everything derived from t uses that offset.
// Either way an offset that all logits share costs no precision. A logit below -1e30 counts as -1e30, so that no
// infinity is multiplied by 0.
#pragma once

#include "online_softmax.h"
#include "packets.cuh"

namespace grpo::cuda {

#ifdef GRPO_EMULATED
constexpr int kThreads = 64;
constexpr int kManyThreads = 96;
#else
constexpr int kThreads = 384;       // three such blocks on a multiprocessor leave 56 registers per thread
constexpr int kManyThreads = 1024;  // for one block per multiprocessor
#endif
constexpr float kLowestLogit = -1e30f;
constexpr double kLn2 = 0.6931471805599453;

template <class R>
using Softmax = OnlineSoftmax<R, Base2>;

// ---- statistics

// The state of no elements: sums of 0, relative to the lowest v.
template <class R>
__device__ __forceinline__ Softmax<R> empty_softmax() {
  return {R(kLowestLogit), R(0), R(0)};
}

template <bool kPlain, class T, int kCount, int kPackets>
__device__ __forceinline__ void add(Softmax<Arithmetic<T>>& state, const Packet<T, kCount> (&packets)[kPackets],
                                    const RowTransform<Arithmetic<T>>& f) {
  using R = Arithmetic<T>;
  R largest = state.max;
#pragma unroll
  for (int k = 0; k < kPackets; ++k) largest = max_of_numbers(largest, packet_max<kPlain>(packets[k], f));
  const R shift = (state.max - largest) * f.rate;
  const R factor = exp2_fast(shift);
  state = {largest, state.sum * factor, (state.weighted + shift * state.sum) * factor};
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    R z[kCount];
    unpack(packets[k], z);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const R t = (max_with_nan(apply_curve<kPlain>(z[i], f), R(kLowestLogit)) - largest) * f.rate;
      const R e = exp2_fast(t);
      state.sum += e;
      state.weighted += t * e;
    }
  }
}

// The elements after a row's last whole packet, one for each of the first `count` threads.
struct Tail {
  int count;

  __device__ __forceinline__ bool is_mine() const { return static_cast<int>(threadIdx.x) < count; }
  // This thread's element.
  template <class T, int kCount>
  static __device__ __forceinline__ Packet<T, 1>* of(Packet<T, kCount>* row, int packets) {
    return reinterpret_cast<Packet<T, 1>*>(row + packets) + threadIdx.x;
  }
  template <class T, int kCount>
  static __device__ __forceinline__ const Packet<T, 1>* of(const Packet<T, kCount>* row, int packets) {
    return reinterpret_cast<const Packet<T, 1>*>(row + packets) + threadIdx.x;
  }
};

// The whole packets of a row, and its tail.
template <int kCount>
struct RowSize {
  int packets;
  Tail tail;

  explicit __device__ __forceinline__ RowSize(int vocab) : packets(vocab / kCount), tail{vocab % kCount} {}
};

// The state of this thread's packets of a row, in global or shared memory.
template <bool kPlain, int kBlock = kThreads, class T, int kCount>
__device__ __forceinline__ Softmax<Arithmetic<T>> thread_softmax(const Packet<T, kCount>* row, int packets,
                                                                 const RowTransform<Arithmetic<T>>& f) {
  constexpr int kUnroll = kCount > 1 ? 4 : 8;
  Softmax<Arithmetic<T>> state = empty_softmax<Arithmetic<T>>();
  int i = static_cast<int>(threadIdx.x);
  for (; i + (kUnroll - 1) * kBlock < packets; i += kUnroll * kBlock) {
    Packet<T, kCount> block[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) block[k] = row[i + k * kBlock];
    add<kPlain>(state, block, f);
  }
  for (; i < packets; i += kBlock) {
    const Packet<T, kCount> last[1] = {row[i]};
    add<kPlain>(state, last, f);
  }
  return state;
}

// The same of a whole row in global memory.
template <bool kPlain, int kBlock = kThreads, class T, int kCount>
__device__ __forceinline__ Softmax<Arithmetic<T>> thread_softmax(const Packet<T, kCount>* row, RowSize<kCount> size,
                                                                 const RowTransform<Arithmetic<T>>& f) {
  Softmax<Arithmetic<T>> state = thread_softmax<kPlain, kBlock>(row, size.packets, f);
  if (size.tail.is_mine()) {
    const Packet<T, 1> last[1] = {*Tail::of(row, size.packets)};
    add<kPlain>(state, last, f);
  }
  return state;
}

struct Merge {
  template <class State>
  __device__ __forceinline__ void operator()(State& a, const State& b) const {
    a.merge(b);
  }
};

// Combines the states of a warp's lanes; the result is valid in lane 0. join(a, b) adds b to a.
template <class State, class Join>
__device__ __forceinline__ State reduce_warp(State state, const Join& join) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) join(state, shuffle_xor(state, lanes));
  return state;
}

// Combines the states of a block's threads; the result is valid in thread 0. `parts` is shared memory, one per warp.
template <class State, class Join>
__device__ __forceinline__ State reduce_block(const State& thread_state, State* parts, const Join& join) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  State state = reduce_warp(thread_state, join);
  if (lane == 0) parts[warp] = state;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / kWarp; ++w) join(state, parts[w]);
  }
  return state;
}

// Merges the states of a warp's lanes; every lane gets the result. All states move to the common maximum once, first.
template <int kLanes = kWarp, class R>
__device__ __forceinline__ Softmax<R> merge_warp_softmax(Softmax<R> state, R rate) {
  R largest = state.max;
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) largest = max_of_numbers(largest, shuffle_xor(largest, lanes));
  state.rebase(largest, rate);
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    state.sum += shuffle_xor(state.sum, lanes);
    state.weighted += shuffle_xor(state.weighted, lanes);
  }
  return state;
}

// Merges `count` states, at most kLanes, in one warp.
template <int kLanes, class R>
__device__ __forceinline__ Softmax<R> merge_softmax_states(const Softmax<R>* states, int count, R rate) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  return merge_warp_softmax<kLanes>(lane < count ? states[lane] : empty_softmax<R>(), rate);
}

// Merges the states of a block's threads; the first warp gets the result. `parts` is shared memory, one per warp.
template <int kBlock = kThreads, class R>
__device__ __forceinline__ Softmax<R> merge_block_softmax(const Softmax<R>& thread_state, Softmax<R>* parts, R rate) {
  constexpr int kWarps = kBlock / kWarp, kLanes = kWarps > 16 ? 32 : 16;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  Softmax<R> state = merge_warp_softmax(thread_state, rate);
  if (threadIdx.x % kWarp == 0) parts[warp] = state;
  __syncthreads();
  if (warp == 0) state = merge_softmax_states<kLanes>(parts, kWarps, rate);
  return state;
}

// log2 of a sum: the exponent, plus log2 of the mantissa, added in fp64 so that the result is rounded once.
__device__ __forceinline__ double log2_of(float x) {
  const auto bits = static_cast<int32_t>(bits_of(x));
  const int32_t exponent = (bits - 0x3f400000) >> 23;  // for a mantissa in [0.75, 1.5)
  const bool is_number = x > 0 && x < INFINITY;
  return is_number ? exponent + static_cast<double>(log2f(float_of(static_cast<uint32_t>(bits - (exponent << 23)))))
                   : static_cast<double>(log2f(x));
}
__device__ __forceinline__ double log2_of(double x) { return log2(x); }

template <class R>
struct RowResult {
  R logprob, entropy;
  double lse;
  R offset;        // t = v rate + offset
  double log_sum;  // log2 of the sum over 2^t
};

// The results of a row, from its state and the v of its token. NaN if no logit is above -1e30.
template <class R>
__device__ __forceinline__ RowResult<R> row_result(const Softmax<R>& state, R target, R rate) {
  const double log_sum = log2_of(state.sum), base = state.max;
  const double exponent = (static_cast<double>(target) - base) * rate;
  RowResult<R> result;
  const double ln2 = state.max > R(kLowestLogit) ? kLn2 : NAN;
  result.logprob = static_cast<R>((exponent - log_sum) * ln2);
  result.entropy = static_cast<R>((log_sum - static_cast<double>(state.weighted / state.sum)) * ln2);
  result.lse = (base * rate + log_sum) * ln2;
  result.offset = -(state.max * rate);
  result.log_sum = log_sum + (base * rate + static_cast<double>(result.offset));
  return result;
}

// ---- gradient

// Of every logit but the token's, dz = -p (c + c_H (log p + H)) slope. With log p = (t - log_sum) ln 2 that is
// 2^t (w + w_t t) dv/dz.
template <class R>
struct GradientWeights {
  R offset, w, w_t;
  R target_gradient;  // of the token's logit
};

template <class R>
__device__ __forceinline__ GradientWeights<R> gradient_weights(R offset, double log_sum, R logprob, R entropy, R c,
                                                               R c_h, R target_slope, R slope) {
  const R scale = static_cast<R>(exp2(-log_sum)) * slope;
  GradientWeights<R> weights{offset, -c * scale, R(0), R(0)};
  // 1 - p without cancellation when p is near 1
  R target = -expm1(logprob) * c;
  if (c_h != 0) {
    weights.w = -(c + c_h * (entropy - static_cast<R>(log_sum * kLn2))) * scale;
    weights.w_t = static_cast<R>(-c_h * kLn2 * scale);
    target -= c_h * exp(logprob) * (max_with_nan(logprob, R(-1e4)) + entropy);
  }
  weights.target_gradient = target * target_slope;
  return weights;
}

template <bool kPlain, class Out, class T, int kCount>
__device__ __forceinline__ Packet<Out, kCount> gradient_of(const Packet<T, kCount>& packet,
                                                           const GradientWeights<Arithmetic<T>>& weights,
                                                           const RowTransform<Arithmetic<T>>& f) {
  using R = Arithmetic<T>;
  R z[kCount];
  unpack(packet, z);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const R v = apply_curve<kPlain>(z[i], f);
    const R t = std::fma(v, f.rate, weights.offset);
    R w = weights.w;
    if (weights.w_t != 0) w += weights.w_t * max_with_nan(t, R(-1e4));
    z[i] = exp2_fast(t) * w;
    if constexpr (!kPlain) z[i] *= f.curve == Curve::kSoftcap ? R(1) - v * v : R(1);
  }
  return packed<Out>(z);
}

// Writes the gradient of a row, possibly over the row itself: a thread writes what it has read. It starts at the end,
// because what the statistics read last is most likely still in the cache.
template <bool kPlain, int kBlock = kThreads, class T, class Out, int kCount>
__device__ __forceinline__ void write_gradient(const Packet<T, kCount>* row, Packet<Out, kCount>* drow,
                                               RowSize<kCount> size, const GradientWeights<Arithmetic<T>>& weights,
                                               const RowTransform<Arithmetic<T>>& f) {
  constexpr int kUnroll = kCount > 1 ? 2 : 8;
  constexpr int kStep = kUnroll * kBlock;
  const int packets = size.packets;
  if (size.tail.is_mine()) {
    *Tail::of(drow, packets) = gradient_of<kPlain, Out>(*Tail::of(row, packets), weights, f);
  }
  for (int begin = (packets - 1) / kStep * kStep; begin >= 0; begin -= kStep) {
    Packet<T, kCount> block[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int i = begin + k * kBlock + static_cast<int>(threadIdx.x);
      if (i < packets) block[k] = row[i];
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int i = begin + k * kBlock + static_cast<int>(threadIdx.x);
      if (i < packets) drow[i] = gradient_of<kPlain, Out>(block[k], weights, f);
    }
  }
}

// The same from shared memory, which the gradient does not overwrite.
template <bool kPlain, class T, class Out, int kCount>
__device__ __forceinline__ void write_gradient_of_shared(const Packet<T, kCount>* row, Packet<Out, kCount>* drow,
                                                         int packets, const GradientWeights<Arithmetic<T>>& weights,
                                                         const RowTransform<Arithmetic<T>>& f) {
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x); i < packets; i += kThreads) {
    drow[i] = gradient_of<kPlain, Out>(row[i], weights, f);
  }
}

template <int kBlock = kThreads, class Out, int kCount>
__device__ __forceinline__ void write_zeros(Packet<Out, kCount>* drow, int packets) {
  const Packet<Out, kCount> zeros{};
  for (int i = static_cast<int>(threadIdx.x); i < packets; i += kBlock) drow[i] = zeros;
}

template <int kBlock = kThreads, class Out, int kCount>
__device__ __forceinline__ void write_zeros(Packet<Out, kCount>* drow, RowSize<kCount> size) {
  write_zeros<kBlock>(drow, size.packets);
  if (size.tail.is_mine()) *Tail::of(drow, size.packets) = {};
}

// ---- rows of a launch

// Addresses of the rows of a tensor [B, T, V].
struct RowMemory {
  char* base;
  int64_t batch_stride, row_stride;  // bytes

  template <class T>
  __device__ __forceinline__ T* row(int64_t b, int64_t t) const {
    return reinterpret_cast<T*>(base + b * batch_stride + t * row_stride);
  }
};

// Packets of a row per block of a cluster: whole cache lines of 128 bytes. The last blocks may have fewer.
constexpr __host__ __device__ int64_t packets_per_block(int64_t packets, int blocks) {
  return ((packets + blocks - 1) / blocks + 7) / 8 * 8;
}

// The rows of logits [B, rows_per_batch, V]; the first `length` rows of each completion belong to tokens.
struct RowSpace {
  int rows, rows_per_batch, length, vocab;
};

struct Token {
  int batch, position, n;
  bool is_token;  // false for the row after the last token

  __device__ __forceinline__ Token(int row, const RowSpace& space)
      : batch(row / space.rows_per_batch),
        position(row - batch * space.rows_per_batch),
        n(batch * space.length + position),
        is_token(position < space.length) {}
};

// Clamps an id to the vocabulary, and flags it if it was outside.
__device__ __forceinline__ int clamp_id(int64_t id, int64_t n, int vocab, int64_t* first_bad) {
  if (id >= 0 && id < vocab) return static_cast<int>(id);
  flag(first_bad, kBadId, n);
  return id < 0 ? 0 : vocab - 1;
}

}  // namespace grpo::cuda
