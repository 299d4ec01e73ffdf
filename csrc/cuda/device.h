// What kernels use of the device beyond CUDA C++: clusters, bulk copies, exchanges, conversions, fast functions.
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

// The value of the thread of this warp whose lane differs in the bits of `lanes`.
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

// That of the thread whose lane is `lanes` before; its own in the first ones.
__device__ __forceinline__ int shuffle_up(int value, int lanes) {
  return __shfl_up_sync(0xffffffffu, value, static_cast<unsigned>(lanes));
}

// ---- clusters and bulk copies: sm_90 and later; elsewhere a cluster is a block, and kernels that copy are not launched

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

// By the thread that has written what other blocks are to read after the next barrier of the cluster.
__device__ __forceinline__ void show_cluster() {
#if GRPO_HAS_CLUSTERS
  asm volatile("fence.acq_rel.cluster;" ::: "memory");
#endif
}

// Every thread of every block waits for all. Only what was shown is seen after: a fence of every thread would wait for
// its stores to global memory too.
__device__ __forceinline__ void sync_cluster() {
#if GRPO_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The same place in another block's shared memory.
template <class T>
__device__ __forceinline__ T* in_block(T* shared, int rank) {
  uint64_t address = reinterpret_cast<uint64_t>(shared);
#if GRPO_HAS_CLUSTERS
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
#endif
  return reinterpret_cast<T*>(address);
}

struct Barrier {
  uint64_t state;
};

// By one thread; the others may use it after a barrier of all.
__device__ __forceinline__ void make_barrier(Barrier* barrier) {
#if GRPO_HAS_CLUSTERS
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// By one thread: copies a multiple of 16 bytes, aligned to as many, and completes a phase of the barrier.
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

// Until the phase of this parity is complete; the first phase's is 0.
__device__ __forceinline__ void wait_for(Barrier* barrier, unsigned parity) {
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

__device__ __forceinline__ float exp2_fast(float x) {  // to 2 ulps; subnormal results are 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double exp2_fast(double x) { return exp2(x); }

// A NaN is no maximum.
__device__ __forceinline__ float max_of_numbers(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double max_of_numbers(double a, double b) { return fmax(a, b); }

// A NaN stays one.
__device__ __forceinline__ float max_with_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
__device__ __forceinline__ double max_with_nan(double a, double b) { return a != a ? a : fmax(a, b); }

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }

// ---- two half-precision values in a word, the first in its low half

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
__device__ __forceinline__ uint32_t max_of_two(uint32_t a, uint32_t b) {  // a NaN is no maximum
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

// How many clusters of a launch the device runs at once, which may be none.
inline int ask_resident_clusters(const Place& place, const Grid& grid, const void* function) {
  int count = 0;
  allow_shared(place.properties(), function, grid.shared_bytes);
  if (grid.cluster == 1) {
    const auto bytes = static_cast<size_t>(grid.shared_bytes);
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, function, grid.threads, bytes),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    return count * place.processors();
  }
  const Grid one{grid.cluster, grid.threads, grid.shared_bytes, grid.cluster};
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = configuration(one, place.stream(), cluster);
  check(cudaOccupancyMaxActiveClusters(&count, function, &config), "cudaOccupancyMaxActiveClusters");
  return count;
}

// Asked of the runtime once.
template <class... Parameters>
int64_t resident_clusters(const Place& place, const Grid& grid, void (*kernel)(Parameters...)) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int, int>, int> known;
  const void* const function = reinterpret_cast<const void*>(kernel);
  const std::tuple key{function, place.properties().device, grid.threads, grid.shared_bytes, grid.cluster};
  const std::lock_guard lock(mutex);
  const auto found = known.find(key);
  return found != known.end() ? found->second : known[key] = ask_resident_clusters(place, grid, function);
}

}  // namespace grpo::cuda

#endif
