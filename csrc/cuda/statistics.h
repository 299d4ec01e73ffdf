// The statistics of rows that are read once: token_logprobs' forward, and a loss without a gradient.
#pragma once

#include "row_launch.h"

namespace grpo::cuda {

// What a launch is given and where results go, [B, T] flattened; null where one is not wanted.
template <class R>
struct Statistics {
  RowSpace space;
  RowMemory logits;
  RowTransform<R> transform;
  const int64_t* ids;
  const bool* mask;
  R* logprobs;
  double* lse;
  R *entropy, *log_sum_squares, *mean_logits;
  bool *is_top1, *live;
  int64_t* first_bad;
};

// `logits` says the storage type; `from` are its rows.
template <class R>
void launch_statistics(const Place& place, const Tensor& logits, const Rows& from, const Statistics<R>& statistics);

}  // namespace grpo::cuda
