// pack_rows: the live rows of a tensor brought to its front, in its own memory, without a word to the host.
//
// Live rows that lie past their number move into the dead rows before it, the first into the first: no row is both read
// and written, so all move at once, and none moves that need not.
#include <tuple>

#include "row_launch.h"

namespace grpo::cuda {
namespace {

// How many rows before this thread's, in this stretch of kThreads rows, have the flag; and, by `total`, how many in all.
__device__ int count_before(bool flag, int* of_warps, int& total) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  int through = flag;  // this lane and those before it
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const int other = shuffle_up(through, lanes);
    if (lane >= lanes) through += other;
  }
  __syncthreads();  // an earlier call's counts have been read
  if (lane == kWarp - 1) of_warps[warp] = through;
  __syncthreads();
  int before = through - flag;
  total = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w < warp) before += of_warps[w];
    total += of_warps[w];
  }
  return before;
}

// order[i] is the row that comes to be row i: the live ones first, of which there are `count`, then the dead ones.
__global__ void __launch_bounds__(kThreads)
order_kernel(const bool* live, int rows, int64_t* order, int64_t* count, int* holes) {
  auto* const of_warps = static_cast<int*>(dynamic_shared());
  const auto each = [&](auto&& has_flag, auto&& found) {  // found(row, how many with the flag before), in their order
    int before = 0;
    for (int begin = 0; begin < rows; begin += kThreads) {
      const int row = begin + static_cast<int>(threadIdx.x);
      const bool flag = row < rows && has_flag(row);
      int total;
      const int own = before + count_before(flag, of_warps, total);
      if (flag) found(row, own);
      before += total;
    }
    return before;
  };
  const int number = each([&](int row) { return live[row]; }, [&](int row, int) { order[row] = row; });
  if (threadIdx.x == 0) *count = number;
  each([&](int row) { return !live[row]; }, [&](int row, int) { order[row] = row; });
  each([&](int row) { return row < number && !live[row]; }, [&](int row, int k) { holes[k] = row; });
  __syncthreads();
  each([&](int row) { return row >= number && live[row]; },
       [&](int row, int k) {
         order[holes[k]] = row;
         order[row] = holes[k];
       });
}

// Rows whose place is before the live ones' number; where they came from is written 0, as a dead row is.
template <class T, Access kAccess>
__global__ void __launch_bounds__(kThreads, 3)
move_kernel(RowMemory values, int rows, int packets, const int64_t* order, const int64_t* count) {
  constexpr int kCount = kWidth<T, kAccess>;
  const int number = static_cast<int>(*count);
  for (int row = static_cast<int>(blockIdx.x); row < number; row += static_cast<int>(gridDim.x)) {
    const auto from = static_cast<int>(order[row]);
    if (from == row) continue;
    auto* const source = values.row<Packet<T, kCount>>(0, from);
    auto* const target = values.row<Packet<T, kCount>>(0, row);
    for (int i = static_cast<int>(threadIdx.x); i < packets; i += kThreads) target[i] = source[i];
    write_zeros(source, packets);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> pack_rows(const Tensor& values,  // [n, V], its last dimension dense
                                     const Tensor& live) {  // [n]
  const Place place(values);
  const Rows rows(values);
  STD_TORCH_CHECK(values.dim() == 2 && live.numel() == rows.length, "expected a flag for every row");
  const RowSpace space = row_space(rows, rows.length);
  const Tensor order = empty_like(live, ScalarType::Long), count = empty({}, ScalarType::Long, values);
  const Tensor holes = empty_like(live, ScalarType::Int);
  launch(place, "order of live rows", {rows.length}, {1, kThreads, kThreads / kWarp * int{sizeof(int)}}, order_kernel,
         data<bool>(live, rows.length), space.rows, mutable_data<int64_t>(order), mutable_data<int64_t>(count),
         mutable_data<int>(holes));
  with_storage(dtype_of(values), [&](auto t) {
    using T = decltype(t);
    const auto move = [&](auto access) {
      const auto kernel = move_kernel<T, access.value>;
      const int packets = space.vocab / kWidth<T, access.value>;
      launch(place, "moving live rows", {rows.length, rows.width}, row_grid(place, rows.length, 0, kernel), kernel,
             row_memory(rows), space.rows, packets, mutable_data<int64_t>(order), mutable_data<int64_t>(count));
    };
    if constexpr (sizeof(T) < 8) {
      if (has_vectors(rows, sizeof(T))) return move(std::integral_constant<Access, Access::kVector>{});
    }
    move(std::integral_constant<Access, Access::kElement>{});
  });
  return {order, count};
}

}  // namespace grpo::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(grpo_kernels, m) {
  m.def("pack_rows_cuda(Tensor(a!) values, Tensor live) -> (Tensor order, Tensor count)");
}
STABLE_TORCH_LIBRARY_IMPL(grpo_kernels, GRPO_DEVICE_KEY, m) {
  m.impl("pack_rows_cuda", TORCH_BOX(&grpo::cuda::pack_rows));
}
