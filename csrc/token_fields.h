// What the loss of a token needs beside its log-probability, as ops/policy_loss/fields.py hands it over; for host and
// device. A value that tokens share is held once and read by index.
#pragma once

#include <optional>

#include "policy_math.h"
#include "tensors.h"

namespace grpo {

// One value for all, one a sequence, or one a token.
template <class R>
struct PerToken {
  const R* values = nullptr;
  int64_t of_sequence = 0, of_token = 0;  // strides: 0 or 1

  GRPO_HOST_DEVICE R at(int64_t s, int64_t n) const { return values[s * of_sequence + n * of_token]; }
};

template <class R>
struct TokenFields {
  const bool* mask;             // [N]
  const int32_t* sequence_ids;  // [N], or null where the caller knows which sequence a token is of
  PerToken<R> advantages, weights;
  PerToken<R> policy_factors;  // or null, like the next three
  PerToken<R> entropy_weights, old_logprobs, ref_logprobs;

  GRPO_HOST_DEVICE int64_t sequence_of(int64_t s, int64_t n) const { return sequence_ids ? sequence_ids[n] : s; }

  // Of the policy term; that of the KL term is `weights`.
  GRPO_HOST_DEVICE R policy_weight(int64_t s, int64_t n) const {
    const R weight = weights.at(s, n);
    return policy_factors.values ? weight * policy_factors.values[n] : weight;
  }
  GRPO_HOST_DEVICE R old_logprob(int64_t n, R logprob) const {  // on-policy the log-probability itself
    return old_logprobs.values ? old_logprobs.values[n] : logprob;
  }
  GRPO_HOST_DEVICE const R* ref_logprob(int64_t n) const {
    return ref_logprobs.values ? ref_logprobs.values + n : nullptr;
  }
};

// The same as an op is given it.
struct TokenTensors {
  const Tensor& mask;
  const std::optional<Tensor>& sequence_ids;
  const std::optional<Tensor>& advantages;
  const Tensor& weights;
  const std::optional<Tensor>&policy_factors, &entropy_weights, &old_logprobs, &ref_logprobs;

  // Of those whose tokens have ids; else `known`.
  int64_t sequences(int64_t known) const {
    if (!sequence_ids) return known;
    if (weights.dim() == 1) return weights.numel();
    if (advantages && advantages->dim() == 1) return advantages->numel();
    return entropy_weights && entropy_weights->dim() == 1 ? entropy_weights->numel() : known;
  }
};

// The number of dimensions tells what a value is of: all, a sequence, or a token.
template <class R>
PerToken<R> per_token(const Tensor& t, int64_t sequences, int64_t tokens) {
  if (t.dim() == 0) return {data<R>(t, 1), 0, 0};
  return t.dim() == 1 ? PerToken<R>{data<R>(t, sequences), 1, 0} : PerToken<R>{data<R>(t, tokens), 0, 1};
}

template <class R>
PerToken<R> per_token(const std::optional<Tensor>& t, int64_t sequences, int64_t tokens) {
  return t.has_value() ? per_token<R>(*t, sequences, tokens) : PerToken<R>{};
}

// `advantages` apart, where they are made of rewards.
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
