// pack_rows: moves the live rows of a tensor to its front, in place, without a synchronisation with the host.
//
// Let n be the number of live rows. The k-th live row at or after n moves to the k-th dead row before n. No row is both
// read and written, so all moves run in parallel, and only rows that must move do.
#include <tuple>

#include "row_launch.h"

namespace grpo::cuda {
namespace {

// One flag per thread of the block: the number of set flags before this thread's, and, in `total`, of all set flags.
__device__ int count_before(bool flag, int* warp_counts, int& total) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  int inclusive = flag;  // count up to and including this lane
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const int other = shuffle_up(inclusive, lanes);
    if (lane >= lanes) inclusive += other;
  }
  __syncthreads();  // the counts of an earlier call have been read
  if (lane == kWarp - 1) warp_counts[warp] = inclusive;
  __syncthreads();
  int before = inclusive - flag;
  total = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w < warp) before += warp_counts[w];
    total += warp_counts[w];
  }
  return before;
}

// order[i] is the old position of new row i: the `count` live rows come first, then the dead ones.
__global__ void __launch_bounds__(kThreads)
order_kernel(const bool* live, int rows, int64_t* order, int64_t* count, int* holes) {
  auto* const warp_counts = static_cast<int*>(dynamic_shared());
  // calls visit(row, k) for every row with the flag; it is the k-th such row. Returns their number.
  const auto for_each_flagged = [&](auto&& has_flag, auto&& visit) {
    int before = 0;
    for (int begin = 0; begin < rows; begin += kThreads) {
      const int row = begin + static_cast<int>(threadIdx.x);
      const bool flag = row < rows && has_flag(row);
      int total;
      const int k = before + count_before(flag, warp_counts, total);
      if (flag) visit(row, k);
      before += total;
    }
    return before;
  };
  const int live_count =
      for_each_flagged([&](int row) { return live[row]; }, [&](int row, int) { order[row] = row; });
  if (threadIdx.x == 0) *count = live_count;
  for_each_flagged([&](int row) { return !live[row]; }, [&](int row, int) { order[row] = row; });
  for_each_flagged([&](int row) { return row < live_count && !live[row]; },
                   [&](int row, int k) { holes[k] = row; });
  __syncthreads();
  for_each_flagged([&](int row) { return row >= live_count && live[row]; },
                   [&](int row, int k) {
                     order[holes[k]] = row;
                     order[row] = holes[k];
                   });
}

// Moves rows into the first `count` positions, and fills their old positions with 0, like every dead row.
template <class T, Access kAccess>
__global__ void __launch_bounds__(kThreads, 3)
move_kernel(RowMemory values, RowSpace space, const int64_t* order, const int64_t* count) {
  constexpr int kCount = kWidth<T, kAccess>;
  const RowSize<kCount> size(space.vocab);
  const int live_count = static_cast<int>(*count);
  for (int row = static_cast<int>(blockIdx.x); row < live_count; row += static_cast<int>(gridDim.x)) {
    const auto from = static_cast<int>(order[row]);
    if (from == row) continue;
    auto* const source = values.row<Packet<T, kCount>>(0, from);
    auto* const target = values.row<Packet<T, kCount>>(0, row);
    for (int i = static_cast<int>(threadIdx.x); i < size.packets; i += kThreads) target[i] = source[i];
    if (size.tail.is_mine()) *Tail::of(target, size.packets) = *Tail::of(source, size.packets);
    write_zeros(source, size);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> pack_rows(const Tensor& values,  // [n, V], its last dimension dense
                                     const Tensor& live) {  // [n]
  const Device device(values);
  const Rows rows(values);
  STD_TORCH_CHECK(values.dim() == 2 && live.numel() == rows.length, "expected a flag for every row");
  const RowSpace space = row_space(rows, rows.length);
  const Tensor order = empty_like(live, ScalarType::Long), count = empty({}, ScalarType::Long, values);
  const Tensor holes = empty_like(live, ScalarType::Int);
  launch(device, "order of live rows", {rows.length}, {1, kThreads, kThreads / kWarp * int{sizeof(int)}}, order_kernel,
         data<bool>(live, rows.length), space.rows, mutable_data<int64_t>(order), mutable_data<int64_t>(count),
         mutable_data<int>(holes));
  with_storage(dtype_of(values), [&](auto t) {
    using T = decltype(t);
    const auto move = [&](auto access) {
      const auto kernel = move_kernel<T, access.value>;
      launch(device, "moving live rows", {rows.length, rows.width}, row_grid(device, rows.length, 0, kernel), kernel,
             row_memory(rows), space, mutable_data<int64_t>(order), mutable_data<int64_t>(count));
    };
    if constexpr (sizeof(T) < 8) {
      if (has_vectors(rows)) return move(std::integral_constant<Access, Access::kVector>{});
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
