// Statistics of rows, for token_logprobs' forward and for a loss without a gradient.
#pragma once

#include "row_launch.h"

namespace grpo::cuda {

// Inputs and outputs of a launch; per-token arrays are [B, T], flattened. Outputs that are not requested are null.
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

// `logits` gives the storage type; `from` are its rows.
template <class R>
void launch_statistics(const Device& device, const Tensor& logits, const Rows& from, const Statistics<R>& statistics);

}  // namespace grpo::cuda
