// Emulates on the host the part of CUDA that csrc/cuda uses, for tests. Threads are fibers of one host thread.
//
// The blocks of a cluster run together. Their threads run in index order, each until its next barrier. This finds wrong
// numbers, reads of uninitialised shared memory (it starts as NaN), and those missing barriers that the order exposes.
// It does not find races or differences in how a GPU rounds.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <type_traits>
#include <vector>

#include "bad_values.h"
#include "tensors.h"

#define GRPO_DEVICE_KEY CPU
#define GRPO_HAS_CLUSTERS 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // kernels with clusters use dynamic shared memory: their blocks run together

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace grpo::cuda {

constexpr int kWarp = 32;

struct Grid {
  int64_t blocks;
  int threads;
  int shared_bytes = 0;
  int cluster = 1;
};

namespace emulation {

// A barrier of the threads of a warp, a block or a cluster.
struct Group {
  int size = 0, arrived = 0;
  int64_t generation = 0;
};

struct Warp {
  Group group;
  alignas(16) unsigned char slots[2][kWarp][64];
  int64_t exchanges[kWarp] = {};
};

struct Block {
  Group group;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
};

struct Thread {
  ucontext_t context;
  dim3 thread_index, block_index;
  int rank = 0;  // of its block in the cluster
  bool is_done = false;
  std::vector<char> stack = std::vector<char>(128 * 1024);
};

struct Cluster {
  Group group;
  std::vector<Block> blocks;
  std::vector<std::unique_ptr<Thread>> threads;
  ucontext_t scheduler;
  Thread* current = nullptr;
  const std::function<void()>* body = nullptr;
};

inline thread_local Cluster cluster;
inline thread_local dim3 block_dim, grid_dim;

inline Thread& current() { return *cluster.current; }
inline Block& block() { return cluster.blocks[current().rank]; }
inline Warp& warp() { return block().warps[current().thread_index.x / kWarp]; }

inline void yield() { swapcontext(&current().context, &cluster.scheduler); }

inline void wait(Group& group) {
  const int64_t generation = group.generation;
  if (++group.arrived == group.size) {
    group.arrived = 0;
    ++group.generation;
  }
  while (group.generation == generation) yield();
}

inline void enter() {
  (*cluster.body)();
  current().is_done = true;
  yield();
}

inline void start(Thread& thread) {
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.data();
  thread.context.uc_stack.ss_size = thread.stack.size();
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, reinterpret_cast<void (*)()>(&enter), 0);
}

inline void run_cluster(const Grid& grid, int64_t first_block) {
  cluster.group = {grid.cluster * grid.threads};
  cluster.blocks.assign(grid.cluster, {});
  const int threads = grid.cluster * grid.threads;
  while (static_cast<int>(cluster.threads.size()) < threads) cluster.threads.push_back(std::make_unique<Thread>());
  for (int rank = 0; rank < grid.cluster; ++rank) {
    Block& block = cluster.blocks[rank];
    block.group = {grid.threads};
    block.shared.assign(grid.shared_bytes + 128, 0xff);  // NaN in every type
    block.warps.resize((grid.threads + kWarp - 1) / kWarp);
    for (Warp& warp : block.warps) warp.group = {std::min(kWarp, grid.threads)};
    for (int t = 0; t < grid.threads; ++t) {
      Thread& thread = *cluster.threads[rank * grid.threads + t];
      thread.thread_index.x = t;
      thread.block_index.x = static_cast<unsigned>(first_block + rank);
      thread.rank = rank;
      thread.is_done = false;
      start(thread);
    }
  }
  for (int done = 0; done < threads;) {
    done = 0;
    for (int t = 0; t < threads; ++t) {
      cluster.current = cluster.threads[t].get();
      if (!current().is_done) swapcontext(&cluster.scheduler, &current().context);
      done += current().is_done;
    }
  }
}

}  // namespace emulation

#define threadIdx (::grpo::cuda::emulation::current().thread_index)
#define blockIdx (::grpo::cuda::emulation::current().block_index)
#define blockDim (::grpo::cuda::emulation::block_dim)
#define gridDim (::grpo::cuda::emulation::grid_dim)

// ---- barriers, exchanges, memory

inline void __syncthreads() { emulation::wait(emulation::block().group); }
inline void __syncwarp() { emulation::wait(emulation::warp().group); }

inline void* dynamic_shared() {
  const auto address = reinterpret_cast<uintptr_t>(emulation::block().shared.data());
  return reinterpret_cast<void*>((address + 127) / 128 * 128);
}

// The value of lane from(lane). Consecutive exchanges alternate between two sets of slots, so that no lane overwrites a
// slot that another has still to read.
template <class T, class From>
T exchange(const T& value, const From& from) {
  static_assert(sizeof(T) <= 64 && std::is_trivially_copyable_v<T>);
  emulation::Warp& warp = emulation::warp();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  auto& slots = warp.slots[warp.exchanges[lane]++ % 2];
  std::memcpy(slots[lane], &value, sizeof(T));
  __syncwarp();
  T other;
  std::memcpy(&other, slots[from(lane)], sizeof(T));
  return other;
}

template <class T>
T shuffle_xor(const T& value, int lanes) {
  return exchange(value, [&](int lane) { return lane ^ lanes; });
}

inline int shuffle_up(int value, int lanes) {
  return exchange(value, [&](int lane) { return lane < lanes ? lane : lane - lanes; });
}

inline int cluster_size() { return static_cast<int>(emulation::cluster.blocks.size()); }
inline int cluster_rank() { return emulation::current().rank; }
inline int cluster_index() { return static_cast<int>(blockIdx.x) / cluster_size(); }
inline int cluster_count() { return static_cast<int>(gridDim.x) / cluster_size(); }
inline void release_to_cluster() {}
inline void sync_cluster() { emulation::wait(emulation::cluster.group); }

template <class T>
T* remote_shared(T* shared, int rank) {
  const auto own = reinterpret_cast<uintptr_t>(dynamic_shared());
  const auto base = reinterpret_cast<uintptr_t>(emulation::cluster.blocks[rank].shared.data());
  return reinterpret_cast<T*>((base + 127) / 128 * 128 + (reinterpret_cast<uintptr_t>(shared) - own));
}

struct Barrier {
  int64_t completed;
};

inline void init_barrier(Barrier* barrier) { barrier->completed = 0; }
inline void load_bulk(void* shared, const void* global, unsigned bytes, Barrier* barrier) {
  STD_TORCH_CHECK((reinterpret_cast<uintptr_t>(global) | reinterpret_cast<uintptr_t>(shared) | bytes) % 16 == 0,
                  "a bulk copy takes multiples of 16 bytes");
  std::memcpy(shared, global, bytes);
  ++barrier->completed;
}
inline void wait_barrier(Barrier* barrier, unsigned parity) {
  while ((barrier->completed - 1) % 2 != static_cast<int64_t>(parity)) emulation::yield();
}

// ---- arithmetic

inline float exp2_fast(float x) { return std::exp2(x); }
inline double exp2_fast(double x) { return std::exp2(x); }
inline float max_of_numbers(float a, float b) { return std::fmax(a, b); }
inline double max_of_numbers(double a, double b) { return std::fmax(a, b); }
inline float max_with_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b); }
inline double max_with_nan(double a, double b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b); }

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline BFloat16 nearest(float x, BFloat16) {
  const uint32_t bits = bits_of(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline Half nearest(float x, Half) {
  const auto half = static_cast<_Float16>(x);
  Half out;
  std::memcpy(&out, &half, sizeof out);
  return out;
}
template <class T>
uint32_t pack_two(float low, float high) {
  return nearest(low, T{}).bits | static_cast<uint32_t>(nearest(high, T{}).bits) << 16;
}
inline float widened(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float widened(Half x) {
  _Float16 half;
  std::memcpy(&half, &x, sizeof half);
  return static_cast<float>(half);
}
inline float low_of(uint32_t word, BFloat16) { return float_of(word << 16); }
inline float high_of(uint32_t word, BFloat16) { return float_of(word & 0xffff0000u); }
inline float low_of(uint32_t word, Half) { return widened(Half{static_cast<uint16_t>(word)}); }
inline float high_of(uint32_t word, Half) { return widened(Half{static_cast<uint16_t>(word >> 16)}); }
template <class T>
uint32_t max_of_two(uint32_t a, uint32_t b) {
  return pack_two<T>(std::fmax(low_of(a, T{}), low_of(b, T{})), std::fmax(high_of(a, T{}), high_of(b, T{})));
}

// ---- flags and launches

inline int64_t* registered_flags = nullptr;
inline int64_t last_kernel = 0;  // the address of the kernel that was launched last

inline void flag(int64_t* first_bad, BadValue kind, int64_t index) {
  first_bad[kind] = std::min(first_bad[kind], index);
}

struct Properties {
  int index = -1;
  int capability = 90;
  int processors = 2;
  int shared_bytes = 227 * 1024;
  int processor_bytes = 228 * 1024;
  int cache_bytes = 1 << 20;
};
inline Properties emulated;  // tests change it to take other code paths

class Device {
 public:
  explicit Device(const Tensor&) {}
  const Properties& properties() const { return emulated; }
  int processors() const { return emulated.processors; }
  int code() const { return emulated.capability; }
  int64_t* first_bad() const { return registered_flags; }
};

template <class... Parameters>
int64_t resident_clusters(const Device& device, const Grid&, void (*)(Parameters...)) {
  return device.processors();
}

template <class... Parameters>
void launch(const Device&, const char*, std::initializer_list<int64_t>, const Grid& grid, void (*kernel)(Parameters...),
            std::type_identity_t<Parameters>... arguments) {
  const std::function<void()> body = [&] { kernel(arguments...); };
  last_kernel = reinterpret_cast<int64_t>(kernel);
  emulation::cluster.body = &body;
  emulation::block_dim.x = static_cast<unsigned>(grid.threads);
  emulation::grid_dim.x = static_cast<unsigned>(grid.blocks);
  for (int64_t first = 0; first < grid.blocks; first += grid.cluster) emulation::run_cluster(grid, first);
}

}  // namespace grpo::cuda
