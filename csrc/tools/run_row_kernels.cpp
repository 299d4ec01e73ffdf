// Runs one row kernel a number of times. A profiler counts the instructions of one more row, per logit.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/row_kernels.h"

namespace grpo {
namespace baseline {
extern const RowKernels kRowKernels[kDtypeCount];
}
#ifdef GRPO_HAVE_X86_ISA
namespace avx2 {
extern const RowKernels kRowKernels[kDtypeCount];
}
namespace avx512 {
extern const RowKernels kRowKernels[kDtypeCount];
}
#endif
}  // namespace grpo

namespace {

const grpo::RowKernels* table_of(const std::string& level) {
  if (level == "baseline") return grpo::baseline::kRowKernels;
#ifdef GRPO_HAVE_X86_ISA
  if (level == "avx2") return grpo::avx2::kRowKernels;
  if (level == "avx512") return grpo::avx512::kRowKernels;
#endif
  return nullptr;
}

// Logits between -4 and 4, as fp32 or as its upper half, bf16.
std::vector<char> row_of(grpo::Dtype dtype, int64_t vocab) {
  const size_t bytes = dtype == grpo::Dtype::kFloat ? 4 : 2;
  std::vector<char> row(static_cast<size_t>(vocab) * bytes);
  for (int64_t i = 0; i < vocab; ++i) {
    const float z = static_cast<float>(i * 7919 % 8191) / 1024.0f - 4.0f;
    char value[4];
    std::memcpy(value, &z, 4);
    std::memcpy(row.data() + static_cast<size_t>(i) * bytes, value + 4 - bytes, bytes);  // little-endian
  }
  return row;
}

// Sums the kernel's results, so that the compiler cannot remove the calls.
double run(const grpo::RowKernels& kernels, const std::string& kernel, grpo::Dtype dtype, int64_t vocab, int rows) {
  std::vector<char> z = row_of(dtype, vocab), q = row_of(dtype, vocab), dz(z.size());
  const grpo::Transform transform{1.0, 0.0, 1.0};
  const double lse = std::log(static_cast<double>(vocab)) + 2.0;
  const grpo::RowGradient gradient{vocab / 2, -lse, lse, lse, 0.5, 0.0};
  const grpo::ComparedRow p_row{z.data(), transform, lse, -lse}, q_row{q.data(), transform, lse, -lse};
  double sum = 0;
  for (int row = 0; row < rows; ++row) {
    if (kernel == "statistics") {
      sum += kernels.statistics(z.data(), vocab, vocab / 2, transform, false).target;
    } else if (kernel == "gradient") {
      kernels.gradient(z.data(), dz.data(), vocab, transform, gradient);
      sum += dz[0];
    } else if (kernel == "divergence") {
      sum += kernels.divergence(p_row, q_row, vocab, 0.5).value;
    } else {
      std::fprintf(stderr, "no kernel %s\n", kernel.c_str());
      std::exit(2);
    }
  }
  return sum;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 6) {
    std::fprintf(stderr, "usage: %s baseline|avx2|avx512 statistics|gradient|divergence float|bfloat16 VOCAB ROWS\n",
                 arguments[0]);
    return 2;
  }
  const grpo::RowKernels* table = table_of(arguments[1]);
  const std::string type = arguments[3];
  if (table == nullptr || (type != "float" && type != "bfloat16")) {
    std::fprintf(stderr, "not built: %s %s\n", arguments[1], arguments[3]);
    return 2;
  }
  const grpo::Dtype dtype = type == "float" ? grpo::Dtype::kFloat : grpo::Dtype::kBFloat16;
  const double sum = run(table[static_cast<int>(dtype)], arguments[2], dtype, std::atoll(arguments[4]),
                         std::atoi(arguments[5]));
  std::printf("%g\n", sum);
  return 0;
}
