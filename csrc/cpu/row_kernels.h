// Kernels over one row of logits, compiled once per instruction set and selected at run time.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "online_softmax.h"

namespace grpo {

// y = softcap tanh(scale z / softcap) / temperature; softcap 0 means none.
struct Transform {
  double temperature;
  double softcap;
  double logit_scale;
};

struct RowStatistics {
  OnlineSoftmax<double> softmax;
  double target = 0;           // y of the sampled token
  double sum_squares = 0;      // sum e^(2 (y - max)); with extras
  double sum_logits = 0;       // sum y; with extras
  int64_t first_largest = -1;  // first position of the largest y; with extras
};

// dz = [c (onehot(id) - p) - c_H p (log p + H)] f'(z)
struct RowGradient {
  int64_t id;
  double logprob;
  double lse;
  double entropy;
  double c;    // dL/dlogprob
  double c_h;  // dL/dentropy
};

// A row of logits as one side of a divergence.
struct ComparedRow {
  const void* z;
  Transform transform;
  double lse;
  double logprob;  // of the sampled token
};

// A divergence, and the mean `centre` in its gradient p (g - centre); 0 if the gradient has no such mean.
struct RowDivergence {
  double value;
  double centre;
};

struct RowKernels {
  RowStatistics (*statistics)(const void* z, int64_t vocab, int64_t id, const Transform&, bool extras);
  void (*gradient)(const void* z, void* dz, int64_t vocab, const Transform&, const RowGradient&);  // dz may be z
  // mixture 0: KL(q || p); 1: KL(p || q); in between: the generalised Jensen-Shannon divergence.
  RowDivergence (*divergence)(const ComparedRow& p, const ComparedRow& q, int64_t vocab, double mixture);
  // gradient() of p's row plus c_d times that of the divergence. dz may be p's row, but not q's. The transform has p's
  // softcap and scale; its temperature may differ from p's.
  void (*divergence_gradient)(const ComparedRow& p, const ComparedRow& q, void* dz, int64_t vocab, const Transform&,
                              const RowGradient&, double mixture, const RowDivergence&, double c_d);
  void (*scale)(void* values, int64_t count, double factor);
};

// The kernels for a storage type, for the widest instruction set of this processor.
const RowKernels& row_kernels(Dtype dtype);

// 0 baseline, 1 AVX2, 2 AVX-512.
int simd_level();

}  // namespace grpo
