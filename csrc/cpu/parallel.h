// Parallel loops over rows on the CPU, and checks of tensor values.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "tensors.h"

namespace grpo {

// Checks that every unmasked id is in the vocabulary, before any row is read.
inline void check_ids(const int64_t* ids, const bool* mask, int64_t count, int64_t vocab) {
  for (int64_t n = 0; n < count; ++n) {
    if (mask && !mask[n]) continue;
    STD_TORCH_CHECK(ids[n] >= 0 && ids[n] < vocab, "id ", ids[n], " is outside the vocabulary of ", vocab);
  }
}

// Checks that every sequence id is below `sequences`.
inline void check_sequence_ids(const int32_t* sequence_ids, int64_t count, int64_t sequences) {
  for (int64_t n = 0; sequence_ids && n < count; ++n) {
    STD_TORCH_CHECK(sequence_ids[n] >= 0 && sequence_ids[n] < sequences, "token ", n, " is of completion ",
                    sequence_ids[n], " of ", sequences);
  }
}

// Checks that the offsets rise from 0 to `tokens`.
inline void check_offsets(const int64_t* offset, int64_t count, int64_t tokens) {
  for (int64_t s = 0; s < count; ++s) {
    STD_TORCH_CHECK(offset[s] >= 0 && offset[s] <= offset[s + 1] && offset[s + 1] <= tokens,
                    "cu_seqlens must rise from 0 to ", tokens);
  }
  STD_TORCH_CHECK(count >= 0 && offset[0] == 0 && offset[count] == tokens, "cu_seqlens must rise from 0 to ", tokens);
}

// Calls body(n) for rows 0..count in parallel, on torch's threads. `width` is the cost of a row in elements.
//
// Threads take rows in turn to balance the load: masked rows cost nothing and are adjacent, at a completion's end.
template <class Body>
void parallel_rows(int64_t count, int64_t width, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 15) / std::max<int64_t>(1, width));
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t turns = (count + threads - 1) / threads;
  torch::stable::parallel_for(0, turns * threads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i % turns * threads + i / turns;
      if (n < count) body(n);
    }
  });
}

}  // namespace grpo
