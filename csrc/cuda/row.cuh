// Rows of logits as device functions of a block's threads: online softmax, gradient, zeros. The only CUDA copy.
//
// A row is taken in powers of two. With y = outer v(z), v being z, -z or tanh(inner z), the exponent of an element is
// t = (v - base) rate for rate = outer log2 e. In the statistics the difference comes first: the largest element has the
// exponent 0, exactly. In the gradient t is one FMA, whose offset is rounded, but to a number, and all that is computed
// of t takes it to be that number. Either way what the logits have in common costs no digits. A finite logit below
// -1e30 counts as -1e30, so that no infinity meets a 0.
#pragma once

#include "online_softmax.h"
#include "packets.cuh"

namespace grpo::cuda {

#ifdef GRPO_EMULATED
constexpr int kThreads = 64;
constexpr int kManyThreads = 96;
#else
constexpr int kThreads = 384;       // three such blocks have 56 registers a thread on a multiprocessor
constexpr int kManyThreads = 1024;  // where a multiprocessor has one block
#endif
constexpr float kLeast = -1e30f;
constexpr double kLn2 = 0.6931471805599453;

template <class R>
using Softmax = OnlineSoftmax<R, Base2>;

// ---- statistics

// The state of a thread that has seen nothing: sums of 0, relative to a v that no other is below.
template <class R>
__device__ __forceinline__ Softmax<R> nothing() {
  return {R(kLeast), R(0), R(0)};
}

template <bool kPlain, class T, int kCount, int kPackets>
__device__ __forceinline__ void add(Softmax<Arithmetic<T>>& own, const Packet<T, kCount> (&packets)[kPackets],
                                    const RowTransform<Arithmetic<T>>& f) {
  using R = Arithmetic<T>;
  R largest = own.max;
#pragma unroll
  for (int k = 0; k < kPackets; ++k) largest = max_of_numbers(largest, largest_of<kPlain>(packets[k], f));
  const R shift = (own.max - largest) * f.rate;
  const R factor = exp2_fast(shift);
  own = {largest, own.sum * factor, (own.weighted + shift * own.sum) * factor};
#pragma unroll
  for (int k = 0; k < kPackets; ++k) {
    R z[kCount];
    unpack(packets[k], z);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const R t = (max_with_nan(curved<kPlain>(z[i], f), R(kLeast)) - largest) * f.rate;
      const R e = exp2_fast(t);
      own.sum += e;
      own.weighted += t * e;
    }
  }
}

// This thread's packets of a row in memory of any kind.
template <bool kPlain, int kBlock = kThreads, class T, int kCount>
__device__ __forceinline__ Softmax<Arithmetic<T>> thread_softmax(const Packet<T, kCount>* row, int packets,
                                                                 const RowTransform<Arithmetic<T>>& f) {
  constexpr int kUnroll = kCount > 1 ? 4 : 8;
  Softmax<Arithmetic<T>> own = nothing<Arithmetic<T>>();
  int i = static_cast<int>(threadIdx.x);
  for (; i + (kUnroll - 1) * kBlock < packets; i += kUnroll * kBlock) {
    Packet<T, kCount> block[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) block[k] = row[i + k * kBlock];
    add<kPlain>(own, block, f);
  }
  for (; i < packets; i += kBlock) {
    const Packet<T, kCount> last[1] = {row[i]};
    add<kPlain>(own, last, f);
  }
  return own;
}

struct Merge {
  template <class State>
  __device__ __forceinline__ void operator()(State& a, const State& b) const {
    a.merge(b);
  }
};

// Of a warp's lanes, for the first of them; join(a, b) adds b to a.
template <class State, class Join>
__device__ __forceinline__ State over_warp(State state, const Join& join) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) join(state, shuffle_xor(state, lanes));
  return state;
}

// What the block's threads have, joined, for its first thread; `parts` is shared memory of one a warp.
template <class State, class Join>
__device__ __forceinline__ State over_block(const State& own, State* parts, const Join& join) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  State state = over_warp(own, join);
  if (lane == 0) parts[warp] = state;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / kWarp; ++w) join(state, parts[w]);
  }
  return state;
}

// The states of a warp's lanes together, in every lane: the largest first, so that each is brought to it once.
template <int kLanes = kWarp, class R>
__device__ __forceinline__ Softmax<R> softmax_over_warp(Softmax<R> state, R rate) {
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

// Those of the first `count` lanes, at most kLanes, of which the others bring what weighs nothing.
template <int kLanes, class R>
__device__ __forceinline__ Softmax<R> softmax_of(const Softmax<R>* states, int count, R rate) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  return softmax_over_warp<kLanes>(lane < count ? states[lane] : nothing<R>(), rate);
}

// Those of a block's threads, for its first warp; `parts` is shared memory of one a warp.
template <int kBlock = kThreads, class R>
__device__ __forceinline__ Softmax<R> softmax_over_block(const Softmax<R>& own, Softmax<R>* parts, R rate) {
  constexpr int kWarps = kBlock / kWarp, kLanes = kWarps > 16 ? 32 : 16;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  Softmax<R> state = softmax_over_warp(own, rate);
  if (threadIdx.x % kWarp == 0) parts[warp] = state;
  __syncthreads();
  if (warp == 0) state = softmax_of<kLanes>(parts, kWarps, rate);
  return state;
}

// log2 of a sum, in fp64 of a mantissa's and an exponent, so that it is rounded once.
__device__ __forceinline__ double log2_of(float x) {
  const auto bits = static_cast<int32_t>(bits_of(x));
  const int32_t exponent = (bits - 0x3f400000) >> 23;  // of a mantissa in [0.75, 1.5)
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

// Of a row's state and its token's v. A row of which no logit is above -1e30 has no result but NaN.
template <class R>
__device__ __forceinline__ RowResult<R> row_result(const Softmax<R>& state, R target, R rate) {
  const double log_sum = log2_of(state.sum), base = state.max;
  const double exponent = (static_cast<double>(target) - base) * rate;
  RowResult<R> result;
  const double ln2 = state.max > R(kLeast) ? kLn2 : NAN;
  result.logprob = static_cast<R>((exponent - log_sum) * ln2);
  result.entropy = static_cast<R>((log_sum - static_cast<double>(state.weighted / state.sum)) * ln2);
  result.lse = (base * rate + log_sum) * ln2;
  result.offset = -(state.max * rate);
  result.log_sum = log_sum + (base * rate + static_cast<double>(result.offset));
  return result;
}

// ---- gradient

// dz = 2^t (w + w_t t) dv/dz beside the token's own: of -p (c + c_H (log p + H)) slope, log p = (t - log_sum) ln 2.
template <class R>
struct GradientWeights {
  R offset, w, w_t;
  R own;  // of the token's logit
};

template <class R>
__device__ __forceinline__ GradientWeights<R> gradient_weights(R offset, double log_sum, R logprob, R entropy, R c,
                                                               R c_h, R own_slope, R slope) {
  const R share = static_cast<R>(exp2(-log_sum)) * slope;
  GradientWeights<R> weights{offset, -c * share, R(0), R(0)};
  // 1 - p without losing the digits of a p near 1
  R own = -expm1(logprob) * c;
  if (c_h != 0) {
    weights.w = -(c + c_h * (entropy - static_cast<R>(log_sum * kLn2))) * share;
    weights.w_t = static_cast<R>(-c_h * kLn2 * share);
    own -= c_h * exp(logprob) * (max_with_nan(logprob, R(-1e4)) + entropy);
  }
  weights.own = own * own_slope;
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
    const R v = curved<kPlain>(z[i], f);
    const R t = std::fma(v, f.rate, weights.offset);
    R w = weights.w;
    if (weights.w_t != 0) w += weights.w_t * max_with_nan(t, R(-1e4));
    z[i] = exp2_fast(t) * w;
    if constexpr (!kPlain) z[i] *= f.curve == Curve::kSoftcap ? R(1) - v * v : R(1);
  }
  return packed<Out>(z);
}

// From a row to its gradient, which may lie over it, from the end: what the statistics read last is the likeliest to
// be in the cache still. A gradient that is narrower lies in the back half of its row, and waits for a block's loads.
template <bool kPlain, int kBlock = kThreads, class T, class Out, int kCount>
__device__ __forceinline__ void write_gradient(const Packet<T, kCount>* row, Packet<Out, kCount>* drow, int packets,
                                               const GradientWeights<Arithmetic<T>>& weights,
                                               const RowTransform<Arithmetic<T>>& f) {
  constexpr int kUnroll = kCount > 1 ? 2 : 8;
  constexpr int kStep = kUnroll * kBlock;
  for (int begin = (packets - 1) / kStep * kStep; begin >= 0; begin -= kStep) {
    Packet<T, kCount> block[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int i = begin + k * kBlock + static_cast<int>(threadIdx.x);
      if (i < packets) block[k] = row[i];
    }
    if constexpr (sizeof(Out) < sizeof(T)) __syncthreads();
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int i = begin + k * kBlock + static_cast<int>(threadIdx.x);
      if (i < packets) drow[i] = gradient_of<kPlain, Out>(block[k], weights, f);
    }
  }
}

// The same from shared memory, which nothing writes over.
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

// ---- rows of a launch

// Where the rows of a tensor [B, T, V] lie.
struct RowMemory {
  char* base;
  int64_t batch_stride, row_stride;  // bytes

  template <class T>
  __device__ __forceinline__ T* row(int64_t b, int64_t t) const {
    return reinterpret_cast<T*>(base + b * batch_stride + t * row_stride);
  }
};

// Packets of a row that each block of a cluster has, the last ones fewer: whole lines of 128 bytes.
constexpr __host__ __device__ int64_t part_of_row(int64_t packets, int blocks) {
  return ((packets + blocks - 1) / blocks + 7) / 8 * 8;
}

// Logits [B, rows_per_batch, V] and what of them is a token's: [B, length].
struct RowSpace {
  int rows, rows_per_batch, length, vocab;
};

struct Token {
  int batch, position, n;
  bool is_token;  // not the position past the last token

  __device__ __forceinline__ Token(int row, const RowSpace& space)
      : batch(row / space.rows_per_batch),
        position(row - batch * space.rows_per_batch),
        n(batch * space.length + position),
        is_token(position < space.length) {}
};

// An id held inside the vocabulary; one that was outside is flagged.
__device__ __forceinline__ int held_inside(int64_t id, int64_t n, int vocab, int64_t* first_bad) {
  if (id >= 0 && id < vocab) return static_cast<int>(id);
  flag(first_bad, kBadId, n);
  return id < 0 ? 0 : vocab - 1;
}

}  // namespace grpo::cuda
