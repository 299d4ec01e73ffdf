// scale: multiplies a gradient by a scalar in place. If the scalar is 1 nothing is read or written.
#include "parallel.h"
#include "row_kernels.h"

namespace grpo {

void scale(const Tensor& gradient, const Tensor& factor) {
  const double value = [&] {
    switch (dtype_of(factor)) {
      case Dtype::kFloat:
        return static_cast<double>(*data<float>(factor, 1));
      case Dtype::kDouble:
        return *data<double>(factor, 1);
      default:
        STD_TORCH_CHECK(false, "expected a float32 or float64 scalar");
    }
    return 0.0;
  }();
  if (value == 1) return;
  const Rows rows(gradient);
  const RowKernels& kernels = row_kernels(dtype_of(gradient));
  parallel_rows(rows.batch * rows.length, rows.width, [&](int64_t row) {
    kernels.scale(rows.row(row / rows.length, row % rows.length), rows.width, value);
  });
}

}  // namespace grpo

STABLE_TORCH_LIBRARY_IMPL(grpo_kernels, CPU, m) { m.impl("scale_cpu", TORCH_BOX(&grpo::scale)); }
