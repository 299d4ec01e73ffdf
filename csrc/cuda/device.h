// Device features that CUDA C++ lacks, as PTX: clusters, bulk copies, shuffles, conversions, fast functions.
#pragma once

#ifdef GRPO_EMULATED
#include "emulation/cuda.h"
#else

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>

#include "dtypes.h"
#include "launch.h"

#define GRPO_DEVICE_KEY CUDA

namespace grpo::cuda {

constexpr int kWarp = 32;

__device__ __forceinline__ void trap() { __trap(); }

// A launch's dynamic shared memory, aligned to 128 bytes.
__device__ __forceinline__ void* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  return shared_memory;
}

// The value of lane `lane ^ lanes` of this warp.
template <class T>
__device__ __forceinline__ T shuffle_xor(const T& value, int lanes) {
  static_assert(sizeof(T) % 4 == 0 && std::is_trivially_copyable_v<T>);
  constexpr int kWords = sizeof(T) / 4;
  unsigned words[kWords];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_xor_sync(0xffffffffu, words[i], lanes);
  T other;
  memcpy(&other, words, sizeof(T));
  return other;
}

// The value of the lane that is `lanes` lower; the first lanes get their own value.
__device__ __forceinline__ int shuffle_up(int value, int lanes) {
  return __shfl_up_sync(0xffffffffu, value, static_cast<unsigned>(lanes));
}

// ---- clusters and bulk copies: sm_90 and later. Before that a cluster is one block, and bulk-copy kernels never run.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define GRPO_HAS_CLUSTERS 1
#else
#define GRPO_HAS_CLUSTERS 0
#endif

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ int cluster_size() {
  unsigned size = 1;
#if GRPO_HAS_CLUSTERS
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
#endif
  return static_cast<int>(size);
}

__device__ __forceinline__ int cluster_rank() {
  unsigned rank = 0;
#if GRPO_HAS_CLUSTERS
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}

__device__ __forceinline__ int cluster_index() { return static_cast<int>(blockIdx.x) / cluster_size(); }
__device__ __forceinline__ int cluster_count() { return static_cast<int>(gridDim.x) / cluster_size(); }

// Makes this thread's writes visible to the cluster's other blocks after the next sync_cluster().
__device__ __forceinline__ void release_to_cluster() {
#if GRPO_HAS_CLUSTERS
  asm volatile("fence.acq_rel.cluster;" ::: "memory");
#endif
}

// Barrier of all threads of the cluster. It publishes only writes before release_to_cluster(): a fence by every thread
// would also wait for the stores to global memory.
__device__ __forceinline__ void sync_cluster() {
#if GRPO_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The address of `shared` in the shared memory of another block of the cluster.
template <class T>
__device__ __forceinline__ T* remote_shared(T* shared, int rank) {
  uint64_t address = reinterpret_cast<uint64_t>(shared);
#if GRPO_HAS_CLUSTERS
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
#endif
  return reinterpret_cast<T*>(address);
}

struct Barrier {
  uint64_t state;
};

// Called by one thread; the others may use it after __syncthreads().
__device__ __forceinline__ void init_barrier(Barrier* barrier) {
#if GRPO_HAS_CLUSTERS
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Called by one thread. Copies a multiple of 16 bytes between addresses that are multiples of 16, and completes a phase
// of the barrier.
__device__ __forceinline__ void load_bulk(void* shared, const void* global, unsigned bytes, Barrier* barrier) {
#if GRPO_HAS_CLUSTERS
  const unsigned at = shared_address(barrier);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(at)
               : "memory");
#endif
}

// Waits until the phase of this parity is complete. The first phase has parity 0.
__device__ __forceinline__ void wait_barrier(Barrier* barrier, unsigned parity) {
#if GRPO_HAS_CLUSTERS
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// ---- arithmetic

__device__ __forceinline__ float exp2_fast(float x) {  // error at most 2 ulp; subnormal results are 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double exp2_fast(double x) { return exp2(x); }

// Ignores NaN.
__device__ __forceinline__ float max_of_numbers(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double max_of_numbers(double a, double b) { return fmax(a, b); }

// Returns NaN if an argument is NaN.
__device__ __forceinline__ float max_with_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
__device__ __forceinline__ double max_with_nan(double a, double b) { return a != a ? a : fmax(a, b); }

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }

// ---- two half-precision values in a word; the first is in the low half

__device__ __forceinline__ float low_of(uint32_t word, BFloat16) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_of(uint32_t word, BFloat16) { return __uint_as_float(word & 0xffff0000u); }
__device__ __forceinline__ float low_of(uint32_t word, Half) {
  float y;
  asm("{.reg .f16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(y) : "r"(word));
  return y;
}
__device__ __forceinline__ float high_of(uint32_t word, Half) {
  float y;
  asm("{.reg .f16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}" : "=f"(y) : "r"(word));
  return y;
}

template <class T>
__device__ __forceinline__ uint32_t pack_two(float low, float high) {  // rounded to nearest
  uint32_t word;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}

template <class T>
__device__ __forceinline__ uint32_t max_of_two(uint32_t a, uint32_t b) {  // ignores NaN
  uint32_t word;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("max.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  } else {
    asm("max.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  }
  return word;
}

__device__ __forceinline__ float widened(BFloat16 x) { return low_of(x.bits, x); }
__device__ __forceinline__ float widened(Half x) { return low_of(x.bits, x); }

template <class T>
__device__ __forceinline__ T nearest(float x, T) {
  return {static_cast<uint16_t>(pack_two<T>(x, 0.0f))};
}

// ---- occupancy

// How many clusters of a launch the device can run at once; may be 0.
inline int query_resident_clusters(const Device& device, const Grid& grid, const void* function) {
  int count = 0;
  raise_shared_memory_limit(device.properties(), function, grid.shared_bytes);
  if (grid.cluster == 1) {
    const auto bytes = static_cast<size_t>(grid.shared_bytes);
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, function, grid.threads, bytes),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    return count * device.processors();
  }
  const Grid one{grid.cluster, grid.threads, grid.shared_bytes, grid.cluster};
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = launch_config(one, device.stream(), cluster);
  check(cudaOccupancyMaxActiveClusters(&count, function, &config), "cudaOccupancyMaxActiveClusters");
  return count;
}

// The same, cached.
template <class... Parameters>
int64_t resident_clusters(const Device& device, const Grid& grid, void (*kernel)(Parameters...)) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int, int>, int> counts;
  const void* const function = reinterpret_cast<const void*>(kernel);
  const std::tuple key{function, device.properties().index, grid.threads, grid.shared_bytes, grid.cluster};
  const std::lock_guard lock(mutex);
  const auto cached = counts.find(key);
  return cached != counts.end() ? cached->second : counts[key] = query_resident_clusters(device, grid, function);
}

}  // namespace grpo::cuda

#endif
