// The inputs of a token's loss other than its log-probability, for host and device; mirrors grpo_kernels/loss/fields.py.
// A value that several tokens share is stored once.
#pragma once

#include <optional>

#include "policy_math.h"
#include "tensors.h"

namespace grpo {

// One value in all, one per sequence, or one per token.
template <class R>
struct PerToken {
  const R* values = nullptr;
  int64_t sequence_stride = 0, token_stride = 0;  // 0 or 1

  GRPO_HOST_DEVICE R at(int64_t s, int64_t n) const { return values[s * sequence_stride + n * token_stride]; }
};

template <class R>
struct TokenFields {
  const bool* mask;             // [N]
  const int32_t* sequence_ids;  // [N], or null if the caller knows each token's sequence
  PerToken<R> advantages, weights;
  PerToken<R> policy_factors;  // may be null, like the next three
  PerToken<R> entropy_weights, old_logprobs, ref_logprobs;

  GRPO_HOST_DEVICE int64_t sequence_of(int64_t s, int64_t n) const { return sequence_ids ? sequence_ids[n] : s; }

  // Weight of the policy term; the KL term has `weights`.
  GRPO_HOST_DEVICE R policy_weight(int64_t s, int64_t n) const {
    const R weight = weights.at(s, n);
    return policy_factors.values ? weight * policy_factors.values[n] : weight;
  }
  GRPO_HOST_DEVICE R old_logprob(int64_t n, R logprob) const {  // on-policy, logprob
    return old_logprobs.values ? old_logprobs.values[n] : logprob;
  }
  GRPO_HOST_DEVICE const R* ref_logprob(int64_t n) const {
    return ref_logprobs.values ? ref_logprobs.values + n : nullptr;
  }
};

// The same as tensors: the arguments of an op.
struct TokenTensors {
  const Tensor& mask;
  const std::optional<Tensor>& sequence_ids;
  const std::optional<Tensor>& advantages;
  const Tensor& weights;
  const std::optional<Tensor>&policy_factors, &entropy_weights, &old_logprobs, &ref_logprobs;

  // The number of sequences that `sequence_ids` index; `without_ids` if there are none.
  int64_t sequence_count(int64_t without_ids) const {
    if (!sequence_ids) return without_ids;
    if (weights.dim() == 1) return weights.numel();
    if (advantages && advantages->dim() == 1) return advantages->numel();
    return entropy_weights && entropy_weights->dim() == 1 ? entropy_weights->numel() : without_ids;
  }
};

// 0 dimensions: one value in all; 1: one per sequence; more: one per token.
template <class R>
PerToken<R> per_token(const Tensor& t, int64_t sequences, int64_t tokens) {
  if (t.dim() == 0) return {data<R>(t, 1), 0, 0};
  return t.dim() == 1 ? PerToken<R>{data<R>(t, sequences), 1, 0} : PerToken<R>{data<R>(t, tokens), 0, 1};
}

template <class R>
PerToken<R> per_token(const std::optional<Tensor>& t, int64_t sequences, int64_t tokens) {
  return t.has_value() ? per_token<R>(*t, sequences, tokens) : PerToken<R>{};
}

template <class R>
TokenFields<R> token_fields(const TokenTensors& in, int64_t sequences, int64_t tokens) {
  const auto of_tokens = [&](const std::optional<Tensor>& t) { return PerToken<R>{data<R>(t, tokens), 0, 1}; };
  return {data<bool>(in.mask, tokens),
          data<int32_t>(in.sequence_ids, tokens),
          per_token<R>(in.advantages, sequences, tokens),
          per_token<R>(in.weights, sequences, tokens),
          of_tokens(in.policy_factors),
          per_token<R>(in.entropy_weights, sequences, tokens),
          of_tokens(in.old_logprobs),
          of_tokens(in.ref_logprobs)};
}

}  // namespace grpo
