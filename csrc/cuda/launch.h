// What every launch needs of its device: torch's stream, the device's limits, and an error that says what failed.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <mutex>
#include <set>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "architectures.h"
#include "bad_values.h"
#include "tensors.h"

namespace grpo::cuda {

constexpr int kMostDevices = 64;
constexpr int kTenfold[] = {__CUDA_ARCH_LIST__};

// What this library is built for, rising, as 90 for 9.0; the last one's PTX serves later GPUs.
inline std::vector<int64_t> architectures() {
  std::vector<int64_t> found(std::begin(kTenfold), std::end(kTenfold));
  for (int64_t& capability : found) capability /= 10;
  return found;
}

// For tests: the paths of older GPUs can be taken on a newer one.
inline std::atomic<int> highest_code = INT32_MAX;

inline std::string told(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ")";
}

// Refuses a failed call of the CUDA runtime, and takes the error back: the next call's is its own.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  STD_TORCH_CHECK(false, what, " failed: ", told(error));
}

struct Properties {
  int device;
  int capability;       // 90 for 9.0
  int code;             // the architecture whose code it runs
  int processors;       // multiprocessors
  int shared_bytes;     // most of a block's, where a launch asks for it
  int processor_bytes;  // shared memory of a multiprocessor
  int cache_bytes;      // the L2
};

inline Properties ask_properties(int device) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
  };
  const int capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  return {device,
          capability,
          code_that_runs(kTenfold, 10 * capability) / 10,
          attribute(cudaDevAttrMultiProcessorCount),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          attribute(cudaDevAttrL2CacheSize)};
}

// Asked of the runtime once a device.
inline const Properties& properties_of(int device) {
  static std::array<Properties, kMostDevices> known;
  static std::array<std::once_flag, kMostDevices> asked;
  STD_TORCH_CHECK(device >= 0 && device < kMostDevices, "device ", device, " is beyond the ", kMostDevices, " served");
  std::call_once(asked[device], [&] { known[device] = ask_properties(device); });
  return known[device];
}

// ---- values that kernels flag, see grpo_kernels/device_values.py

// Memory of the flags by device; Python keeps it alive.
inline std::array<std::atomic<int64_t*>, kMostDevices> kept_flags = {};

inline int64_t* first_bad_of(int device) {
  int64_t* const flags = kept_flags.at(device).load(std::memory_order_acquire);
  STD_TORCH_CHECK(flags != nullptr, "cuda_keep_first_bad was not called for device ", device);
  return flags;
}

// Keeps the least index of a bad value of its kind.
__device__ __forceinline__ void flag(int64_t* first_bad, BadValue kind, int64_t index) {
  atomicMin(reinterpret_cast<long long*>(first_bad + kind), static_cast<long long>(index));
}

// ---- launches

// The device of a tensor, current while this lives, and torch's current stream there.
class Place {
 public:
  explicit Place(const Tensor& t) : Place(static_cast<int>(t.get_device_index())) {}

  const Properties& properties() const { return *properties_; }
  int processors() const { return properties_->processors; }
  int code() const { return std::min(properties_->code, highest_code.load(std::memory_order_relaxed)); }
  cudaStream_t stream() const { return stream_; }
  int64_t* first_bad() const { return first_bad_of(properties_->device); }

 private:
  explicit Place(int device) : guard_(device) {
    // torch's runtime is another copy than this library's: the guard moves its device, this call ours
    check(cudaSetDevice(device), "cudaSetDevice");
    properties_ = &properties_of(device);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  torch::stable::accelerator::DeviceGuard guard_;
  const Properties* properties_ = nullptr;
  cudaStream_t stream_ = nullptr;
};

struct Grid {
  int64_t blocks;
  int threads;
  int shared_bytes = 0;  // dynamic
  int cluster = 1;       // blocks, of which the grid holds a multiple
};

[[noreturn]] inline void refuse_launch(cudaError_t error, const char* name, std::initializer_list<int64_t> shape,
                                       const Grid& grid, const Place& place) {
  cudaGetLastError();
  std::string sizes, built;
  for (const int64_t size : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
  for (const int64_t capability : architectures()) built += " sm_" + std::to_string(capability);
  STD_TORCH_CHECK(false, "launching ", name, " on shape [", sizes, "] failed: ", told(error), "; ", grid.blocks,
                  " blocks of ", grid.threads, " threads in clusters of ", grid.cluster, " with ", grid.shared_bytes,
                  " bytes of shared memory, on device ", place.properties().device, ", which is sm_",
                  place.properties().capability, "; this build has", built);
  __builtin_unreachable();
}

// Lets a kernel's blocks have as much shared memory as the device has, where a launch asks for more than they have
// unasked; once, and always the same, so that threads that launch at a time do not undo each other's.
inline void allow_shared(const Properties& device, const void* function, int shared_bytes) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  if (shared_bytes <= 48 * 1024) return;
  const std::lock_guard lock(mutex);
  if (!allowed.insert({function, device.device}).second) return;
  const auto set = [&](cudaFuncAttribute which, int value) {
    check(cudaFuncSetAttribute(function, which, value), "cudaFuncSetAttribute");
  };
  set(cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes);
  set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

// What the runtime is told of a launch; `cluster` holds a part of it.
inline cudaLaunchConfig_t configuration(const Grid& grid, cudaStream_t stream, cudaLaunchAttribute& cluster) {
  cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  return config;
}

// Launches a kernel on the place's stream; nothing where the grid has no block. `name` and `shape` tell what failed.
template <class... Parameters>
void launch(const Place& place, const char* name, std::initializer_list<int64_t> shape, const Grid& grid,
            void (*kernel)(Parameters...), std::type_identity_t<Parameters>... arguments) {
  if (grid.blocks == 0) return;
  const auto checked = [&](cudaError_t error) {
    if (error != cudaSuccess) refuse_launch(error, name, shape, grid, place);
  };
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (grid.blocks > INT32_MAX) checked(cudaErrorInvalidConfiguration);
  allow_shared(place.properties(), function, grid.shared_bytes);
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = configuration(grid, place.stream(), cluster);
  checked(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace grpo::cuda
