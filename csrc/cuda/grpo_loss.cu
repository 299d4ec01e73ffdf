// grpo_loss: the statistics of every row, dL/dlogprob, and the gradient of the logits.
//
// If the shared memory of a cluster holds a row, the logits are read once and the gradient is written once. Otherwise a
// block reads its row twice, the second time from the L2 cache if it fits.
#include <tuple>
#include <vector>

#include "policy_math.h"
#include "rewards.h"
#include "row_launch.h"
#include "statistics.h"
#include "token_fields.h"

namespace grpo::cuda {
namespace {

// The arguments of a launch. Per-token arrays are [B, T], flattened.
template <class R>
struct Loss {
  RowSpace space;
  RowMemory logits, dlogits;
  RowTransform<R> transform;
  PolicyOptions<R> options;
  const int64_t* ids;
  TokenFields<R> fields;
  R *logprobs, *entropy;
  bool* live;
  int64_t* first_bad;
};

// The inputs of a token other than its row. Each lane of the block's last warp loads one of them before the statistics,
// so that the loads overlap. Shared memory then passes them to the thread that plans the row.
enum Input { kTarget, kAdvantage, kWeight, kPolicyFactor, kEntropyWeight, kOldLogprob, kRefLogprob, kInputCount };

template <class R>
struct TokenInputs {
  int id;
  R values[kInputCount];  // kTarget: v of the token's logit
};

template <bool kPlain, class T>
struct InputReader {
  using R = Arithmetic<T>;
  int id = 0;
  R value = 0;

  __device__ __forceinline__ void start(const Loss<R>& loss, const T* row, const Token& token) {
    const int lane = reader_lane(), n = token.n;
    if (lane < 0 || lane >= kInputCount) return;
    if (lane == kTarget) {
      id = clamp_id(loss.ids[n], n, loss.space.vocab, loss.first_bad);
      value = element(row[id]);
      return;
    }
    const TokenFields<R>& fields = loss.fields;
    const PerToken<R>& from = lane == kAdvantage       ? fields.advantages
                              : lane == kWeight        ? fields.weights
                              : lane == kPolicyFactor  ? fields.policy_factors
                              : lane == kEntropyWeight ? fields.entropy_weights
                              : lane == kOldLogprob    ? fields.old_logprobs
                                                       : fields.ref_logprobs;
    if (from.values != nullptr) value = from.at(from.sequence_stride ? fields.sequence_of(token.batch, n) : 0, n);
    else if (lane == kPolicyFactor) value = 1;
  }

  __device__ __forceinline__ void finish(const RowTransform<R>& f, TokenInputs<R>& inputs) const {
    const int lane = reader_lane();
    if (lane < 0 || lane >= kInputCount) return;
    if (lane == kTarget) inputs.id = id;
    inputs.values[lane] = lane == kTarget ? apply_curve<kPlain>(value, f) : value;
  }

  static __device__ __forceinline__ int reader_lane() {
    return static_cast<int>(threadIdx.x) - (static_cast<int>(blockDim.x) - kWarp);
  }
};

// How to compute a row's gradient, and whether it has one.
template <class R>
struct RowPlan {
  GradientWeights<R> weights;
  int id;
  bool is_live;
};

template <bool kPlain, class R>
__device__ __forceinline__ RowPlan<R> plan_row(const Loss<R>& loss, const TokenInputs<R>& in,
                                               const RowResult<R>& result) {
  const R old_logprob = loss.fields.old_logprobs.values ? in.values[kOldLogprob] : result.logprob;
  const TokenLoss<R> token =
      token_loss(result.logprob, result.logprob - old_logprob, true, old_logprob,
                 loss.fields.ref_logprobs.values ? &in.values[kRefLogprob] : nullptr, in.values[kAdvantage],
                 in.values[kWeight] * in.values[kPolicyFactor], in.values[kWeight], loss.options);
  const R c = token.dlog_ratio + token.dlogprob, c_h = -in.values[kEntropyWeight];
  const R target_slope = slope_at<kPlain>(in.values[kTarget], loss.transform);
  return {gradient_weights(result.offset, result.log_sum, result.logprob, result.entropy, c, c_h, target_slope,
                           loss.transform.slope),
          in.id, c != 0 || c_h != 0};
}

template <class R>
__device__ __forceinline__ void write_token(const Loss<R>& loss, int n, R logprob, R entropy, bool is_live) {
  loss.logprobs[n] = logprob;
  loss.entropy[n] = entropy;
  loss.live[n] = is_live;
}

// Whether a row belongs to an unmasked token. The mask is loaded early; is_unmasked() waits for it.
struct MaskPrefetch {
  bool is_token;
  bool mask;

  template <class R>
  __device__ __forceinline__ MaskPrefetch(const Loss<R>& loss, int row) {
    const int inside = row < loss.space.rows ? row : loss.space.rows - 1;
    const Token token(inside, loss.space);
    is_token = row < loss.space.rows && token.is_token;
    mask = loss.space.length > 0 && loss.fields.mask[token.is_token ? token.n : token.n - 1];
  }
  __device__ __forceinline__ bool is_unmasked() const { return is_token && mask; }
};

// ---- a row in a cluster's shared memory

template <class R>
struct ClusterShared {
  Barrier loaded;
  TokenInputs<R> inputs;
  RowPlan<R> plan;
  // of this block's part; they alternate, so that other blocks can read one while the next row writes the other
  Softmax<R> states[2];
  Softmax<R> parts[kThreads / kWarp];
};

// Three blocks per multiprocessor: one loads its row while another computes.
template <class T, class Out, bool kPlain>
__global__ void __launch_bounds__(kThreads, kPlain ? 3 : 2)
loss_on_chip(const __grid_constant__ Loss<Arithmetic<T>> loss) {
#if GRPO_HAS_CLUSTERS
  using R = Arithmetic<T>;
  constexpr int kCount = kWidth<T, Access::kVector>;
  auto& shared = *static_cast<ClusterShared<R>*>(dynamic_shared());
  static_assert(sizeof(shared) <= kRowOffset);
  auto* const part = reinterpret_cast<Packet<T, kCount>*>(static_cast<char*>(dynamic_shared()) + kRowOffset);
  const int blocks = cluster_size(), rank = cluster_rank();
  const RowSize<kCount> size(loss.space.vocab);
  const int part_size = static_cast<int>(packets_per_block(size.packets, blocks));
  const int first = rank * part_size;
  const int remaining = size.packets - first;
  const int packets = remaining < 0 ? 0 : remaining < part_size ? remaining : part_size;
  const Tail tail{rank == blocks - 1 ? size.tail.count : 0};
  const bool is_leader = threadIdx.x == 0;
  if (is_leader) init_barrier(&shared.loaded);
  __syncthreads();
  const auto start_load = [&](int row) {  // called by the leader
    const Token token(row, loss.space);
    const auto* from = loss.logits.template row<Packet<T, kCount>>(token.batch, token.position) + first;
    if (packets > 0) load_bulk(part, from, static_cast<unsigned>(packets * 16), &shared.loaded);
  };
  int row = cluster_index();
  MaskPrefetch next_mask(loss, row);
  bool is_row = next_mask.is_unmasked();
  if (is_leader && is_row) start_load(row);
  for (unsigned loads = 0; row < loss.space.rows; row += cluster_count()) {
    const Token token(row, loss.space);
    next_mask = MaskPrefetch(loss, row + cluster_count());  // used after this row
    auto* const drow = loss.dlogits.template row<Packet<Out, kCount>>(token.batch, token.position);
    Packet<T, 1> last[1] = {};  // this thread's element of the tail
    if (is_row) {
      InputReader<kPlain, T> reader;
      const auto* const row_in_memory = loss.logits.template row<Packet<T, kCount>>(token.batch, token.position);
      reader.start(loss, reinterpret_cast<const T*>(row_in_memory), token);
      if (tail.is_mine()) last[0] = *Tail::of(row_in_memory, size.packets);
      if (packets > 0) wait_barrier(&shared.loaded, loads % 2);
      Softmax<R> thread_state = thread_softmax<kPlain>(part, packets, loss.transform);
      if (tail.is_mine()) add<kPlain>(thread_state, last, loss.transform);
      reader.finish(loss.transform, shared.inputs);
      Softmax<R> state = merge_block_softmax(thread_state, shared.parts, loss.transform.rate);
      if (blocks > 1) {
        Softmax<R>& shared_state = shared.states[loads % 2];
        if (is_leader) {
          shared_state = state;
          release_to_cluster();
        }
        sync_cluster();
        if (threadIdx.x < kWarp) {
          const int lane = static_cast<int>(threadIdx.x);
          state = merge_warp_softmax<8>(lane < blocks ? *remote_shared(&shared_state, lane) : empty_softmax<R>(),
                                        loss.transform.rate);
        }
      }
      if (is_leader) {
        const RowResult<R> result = row_result(state, shared.inputs.values[kTarget], loss.transform.rate);
        shared.plan = plan_row<kPlain>(loss, shared.inputs, result);
        if (rank == 0) write_token(loss, token.n, result.logprob, result.entropy, shared.plan.is_live);
      }
      __syncthreads();
      ++loads;
    } else if (is_leader && rank == 0 && token.is_token) {
      write_token(loss, token.n, R(0), R(0), false);
    }
    const bool is_live = is_row && shared.plan.is_live;
    if (is_live) {
      const GradientWeights<R> weights = shared.plan.weights;
      write_gradient_of_shared<kPlain>(part, drow + first, packets, weights, loss.transform);
      if (tail.is_mine()) *Tail::of(drow, size.packets) = gradient_of<kPlain, Out>(last[0], weights, loss.transform);
    } else {
      write_zeros(drow + first, packets);
      if (tail.is_mine()) *Tail::of(drow, size.packets) = {};
    }
    __syncthreads();
    is_row = next_mask.is_unmasked();
    if (is_leader) {
      if (is_row) start_load(row + cluster_count());
      const int id = shared.plan.id - first * kCount;
      const bool is_in_tail = tail.count > 0 && shared.plan.id >= size.packets * kCount;
      if (is_live && (is_in_tail || (id >= 0 && id < packets * kCount))) {  // overwrites what another thread wrote there
        reinterpret_cast<Out*>(drow)[shared.plan.id] = rounded<Out>(shared.plan.weights.target_gradient);
      }
    }
  }
  if (blocks > 1) sync_cluster();  // a block must not exit while another reads its shared memory
#else
  trap();  // launched only if the code has clusters
#endif
}

// ---- a row read twice

template <class R>
struct BlockShared {
  TokenInputs<R> inputs;
  RowPlan<R> plan;
  Softmax<R> parts[kManyThreads / kWarp];
};

// fp64 needs more registers per thread, so it has fewer threads.
template <class T>
constexpr int kTwoPassThreads = sizeof(T) == 8 ? kThreads : kManyThreads;

// One block per multiprocessor, so that the cache holds all rows in flight.
template <class T, class Out, Access kAccess, bool kPlain>
__global__ void __launch_bounds__(kTwoPassThreads<T>, 1)
loss_in_two_passes(const __grid_constant__ Loss<Arithmetic<T>> loss) {
  using R = Arithmetic<T>;
  constexpr int kCount = kWidth<T, kAccess>;
  auto& shared = *static_cast<BlockShared<R>*>(dynamic_shared());
  const RowSize<kCount> size(loss.space.vocab);
  const bool is_leader = threadIdx.x == 0;
  for (int row = static_cast<int>(blockIdx.x); row < loss.space.rows; row += static_cast<int>(gridDim.x)) {
    const Token token(row, loss.space);
    const auto* const from = loss.logits.template row<Packet<T, kCount>>(token.batch, token.position);
    auto* const to = loss.dlogits.template row<Packet<Out, kCount>>(token.batch, token.position);
    const bool is_row = token.is_token && loss.fields.mask[token.n];
    if (is_row) {
      InputReader<kPlain, T> reader;
      reader.start(loss, reinterpret_cast<const T*>(from), token);
      const Softmax<R> thread_state = thread_softmax<kPlain, kTwoPassThreads<T>>(from, size, loss.transform);
      reader.finish(loss.transform, shared.inputs);
      const Softmax<R> state = merge_block_softmax<kTwoPassThreads<T>>(thread_state, shared.parts, loss.transform.rate);
      if (is_leader) {
        const RowResult<R> result = row_result(state, shared.inputs.values[kTarget], loss.transform.rate);
        shared.plan = plan_row<kPlain>(loss, shared.inputs, result);
        write_token(loss, token.n, result.logprob, result.entropy, shared.plan.is_live);
      }
      __syncthreads();
    } else if (is_leader && token.is_token) {
      write_token(loss, token.n, R(0), R(0), false);
    }
    const bool is_live = is_row && shared.plan.is_live;
    if (is_live) {
      const GradientWeights<R> weights = shared.plan.weights;
      write_gradient<kPlain, kTwoPassThreads<T>>(from, to, size, weights, loss.transform);
    } else {
      write_zeros<kTwoPassThreads<T>>(to, size);
    }
    __syncthreads();
    if (is_leader && is_live) {
      reinterpret_cast<Out*>(to)[shared.plan.id] = rounded<Out>(shared.plan.weights.target_gradient);
    }
  }
}

// ---- advantages

// The advantage of each completion, from the rewards of its group; one thread per completion.
template <class R>
__global__ void advantages_of(const R* rewards, int64_t count, int64_t num_generations, bool is_scaled, double eps,
                              R* advantages, int64_t* first_bad) {
  const int64_t s = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (s >= count) return;
  const R reward = rewards[s];
  if (std::isinf(reward)) flag(first_bad, kBadReward, s);
  const Moments m = moments(rewards + s / num_generations * num_generations, num_generations, 1);
  advantages[s] = zero_if_missing(static_cast<R>(m.normalized(reward, is_scaled ? m.std + eps : 1.0)));
}

// ---- launches

template <class T, class Out>
void launch_loss(const Device& device, Loss<Arithmetic<T>> loss, const Rows& from, const Rows& to) {
  const int64_t batch = from.batch, length = from.length, vocab = from.width;
  const bool vectors = has_gradient_vectors<T, Out>(from, to);
  if constexpr (sizeof(T) < 8) {
    Grid grid = cluster_grid(device, vocab * static_cast<int64_t>(sizeof(T)));
    if (vectors && grid.cluster > 0) {
      const bool is_plain = loss.transform.curve == Curve::kPlain;
      const auto kernel = is_plain ? loss_on_chip<T, Out, true> : loss_on_chip<T, Out, false>;
      const int64_t clusters = resident_clusters(device, grid, kernel);
      grid.blocks = grid.cluster * std::min<int64_t>(loss.space.rows, clusters);
      if (clusters > 0) return launch(device, "grpo_loss on chip", {batch, length, vocab}, grid, kernel, loss);
    }
  }
  with_access<T>(vectors, loss.transform.curve, [&](auto access, auto plain) {
    const auto kernel = loss_in_two_passes<T, Out, access.value, plain.value>;
    // as many rows as the cache holds, so that the second read hits it
    const int64_t cached = device.properties().cache_bytes / 5 * 4 / (vocab * static_cast<int64_t>(sizeof(T)));
    const int64_t rows = std::min<int64_t>(loss.space.rows, std::max<int64_t>(cached, 1));
    const Grid grid = row_grid(device, rows, sizeof(BlockShared<Arithmetic<T>>), kernel, kTwoPassThreads<T>);
    launch(device, "grpo_loss in two passes", {batch, length, vocab}, grid, kernel, loss);
  });
}

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
  const Tensor computed_advantages = empty({rewards ? rewards->numel() : 0}, type, ids);
  STD_TORCH_CHECK(advantages.has_value() != rewards.has_value(), "expected either advantages or rewards");
  const Device device(logits);
  const Rows from(logits);
  from.check_ids_fit(ids);
  const int64_t n = ids.numel(), count = rewards ? rewards->numel() : 0;
  if (rewards) {
    STD_TORCH_CHECK(num_generations > 0 && count % num_generations == 0, num_generations, " must divide ", count);
  }
  const std::optional<Tensor> used_advantages = rewards ? computed_advantages : advantages;
  const TokenTensors tensors{mask,           sequence_ids,    used_advantages, weights,
                             policy_factors, entropy_weights, old_logprobs,    ref_logprobs};
  const auto run = [&]<class R>(R) {
    const PolicyOptions<R> decoded = PolicyOptions<R>::decode(options, params);
    STD_TORCH_CHECK(decoded.level == Level::kToken, "a sequence-level ratio needs every token's statistics first");
    if (rewards) {
      launch(device, "advantages of rewards", {count}, {(count + 255) / 256, 256}, advantages_of<R>,
             data<R>(*rewards, count), count, num_generations, is_scaled, eps, mutable_data<R>(computed_advantages),
             device.first_bad());
    }
    const Loss<R> loss{row_space(from, ids.size(1)),
                       row_memory(from),
                       dlogits ? row_memory(Rows(*dlogits)) : RowMemory{},
                       row_transform<R>(temperature, softcap, logit_scale),
                       decoded,
                       data<int64_t>(ids, n),
                       token_fields<R>(tensors, tensors.sequence_count(ids.size(0)), n),
                       mutable_data<R>(logprobs),
                       mutable_data<R>(entropy),
                       mutable_data<bool>(live),
                       device.first_bad()};
    if (!dlogits) {
      launch_statistics<R>(device, logits, from,
                           {loss.space, loss.logits, loss.transform, loss.ids, loss.fields.mask, loss.logprobs, nullptr,
                            loss.entropy, nullptr, nullptr, nullptr, loss.live, loss.first_bad});
      return;
    }
    const Rows to(*dlogits);
    check_gradient(to, from, *dlogits, logits);
    with_storages(dtype_of(logits), dtype_of(*dlogits), [&](auto t, auto out) {
      if constexpr (std::is_same_v<Arithmetic<decltype(t)>, R>) {
        launch_loss<decltype(t), decltype(out)>(device, loss, from, to);
      }
    });
  };
  type == ScalarType::Double ? run(double()) : run(float());
  return {logprobs, entropy, live, computed_advantages};
}

}  // namespace grpo::cuda

STABLE_TORCH_LIBRARY_IMPL(grpo_kernels, GRPO_DEVICE_KEY, m) {
  m.impl("grpo_loss_fwd_cuda", TORCH_BOX(&grpo::cuda::grpo_loss_fwd));
}
