// Kernel launches: torch's stream, the device's limits, and errors that name the kernel and its shape.
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

constexpr int kMaxDevices = 64;
constexpr int kBuiltArchs[] = {__CUDA_ARCH_LIST__};  // 900 for 9.0

// The architectures of this library in rising order, 90 for 9.0. The last one's PTX serves later GPUs.
inline std::vector<int64_t> architectures() {
  std::vector<int64_t> architectures(std::begin(kBuiltArchs), std::end(kBuiltArchs));
  for (int64_t& capability : architectures) capability /= 10;
  return architectures;
}

inline std::string describe_error(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ")";
}

// Raises if a CUDA call failed. Clears the runtime's error first, so that the next call does not report it again.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  STD_TORCH_CHECK(false, what, " failed: ", describe_error(error));
}

struct Properties {
  int index;
  int capability;       // 90 for 9.0
  int code;             // the architecture whose code it runs, 90 for 9.0
  int processors;       // multiprocessors
  int shared_bytes;     // most shared memory of a block, by opt-in
  int processor_bytes;  // shared memory of a multiprocessor
  int cache_bytes;      // of the L2 cache
};

inline Properties query_properties(int device) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
  };
  const int capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  return {device,
          capability,
          select_architecture(kBuiltArchs, 10 * capability) / 10,
          attribute(cudaDevAttrMultiProcessorCount),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          attribute(cudaDevAttrL2CacheSize)};
}

// Queried once per device.
inline const Properties& properties_of(int device) {
  static std::array<Properties, kMaxDevices> properties;
  static std::array<std::once_flag, kMaxDevices> queried;
  STD_TORCH_CHECK(device >= 0 && device < kMaxDevices, "device ", device, " is beyond the ", kMaxDevices, " served");
  std::call_once(queried[device], [&] { properties[device] = query_properties(device); });
  return properties[device];
}

// ---- bad values that kernels flag; see grpo_kernels/device_values.py

// The flags of each device; Python keeps the memory alive.
inline std::array<std::atomic<int64_t*>, kMaxDevices> registered_flags = {};

inline int64_t* first_bad_of(int device) {
  int64_t* const flags = registered_flags.at(device).load(std::memory_order_acquire);
  STD_TORCH_CHECK(flags != nullptr, "cuda_keep_first_bad was not called for device ", device);
  return flags;
}

// Records a bad value: each kind has the smallest index seen.
__device__ __forceinline__ void flag(int64_t* first_bad, BadValue kind, int64_t index) {
  atomicMin(reinterpret_cast<long long*>(first_bad + kind), static_cast<long long>(index));
}

// ---- launches

// The device of a tensor, and torch's current stream on it. The device is current for the lifetime of the object.
class Device {
 public:
  explicit Device(const Tensor& t) : Device(static_cast<int>(t.get_device_index())) {}

  const Properties& properties() const { return *properties_; }
  int processors() const { return properties_->processors; }
  int code() const { return properties_->code; }
  cudaStream_t stream() const { return stream_; }
  int64_t* first_bad() const { return first_bad_of(properties_->index); }

 private:
  explicit Device(int device) : guard_(device) {
    // torch and this library each have a CUDA runtime: the guard sets torch's device, this call sets ours
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
  int cluster = 1;       // blocks of a cluster; divides `blocks`
};

[[noreturn]] inline void throw_launch_error(cudaError_t error, const char* name, std::initializer_list<int64_t> shape,
                                       const Grid& grid, const Device& device) {
  cudaGetLastError();
  std::string sizes, built;
  for (const int64_t size : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
  for (const int64_t capability : architectures()) built += " sm_" + std::to_string(capability);
  STD_TORCH_CHECK(false, "launching ", name, " on shape [", sizes, "] failed: ", describe_error(error), "; ",
                  grid.blocks, " blocks of ", grid.threads, " threads in clusters of ", grid.cluster, " with ",
                  grid.shared_bytes, " bytes of shared memory, on device ", device.properties().index, ", which is sm_",
                  device.properties().capability, "; this build has", built);
  __builtin_unreachable();
}

// Raises the limit of a kernel's dynamic shared memory to the device's maximum, if a launch needs more than the default
// 48 KB. Set once per kernel and always to the same value, so that concurrent launches do not conflict.
inline void raise_shared_memory_limit(const Properties& device, const void* function, int shared_bytes) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> raised;
  if (shared_bytes <= 48 * 1024) return;
  const std::lock_guard lock(mutex);
  if (!raised.insert({function, device.index}).second) return;
  const auto set = [&](cudaFuncAttribute which, int value) {
    check(cudaFuncSetAttribute(function, which, value), "cudaFuncSetAttribute");
  };
  set(cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes);
  set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

// The configuration of a launch. It points to `cluster`, which must outlive it.
inline cudaLaunchConfig_t launch_config(const Grid& grid, cudaStream_t stream, cudaLaunchAttribute& cluster) {
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

// Launches a kernel on the device's stream; does nothing if the grid is empty. `name` and `shape` are for errors.
template <class... Parameters>
void launch(const Device& device, const char* name, std::initializer_list<int64_t> shape, const Grid& grid,
            void (*kernel)(Parameters...), std::type_identity_t<Parameters>... arguments) {
  if (grid.blocks == 0) return;
  const auto checked = [&](cudaError_t error) {
    if (error != cudaSuccess) throw_launch_error(error, name, shape, grid, device);
  };
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (grid.blocks > INT32_MAX) checked(cudaErrorInvalidConfiguration);
  raise_shared_memory_limit(device.properties(), function, grid.shared_bytes);
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = launch_config(grid, device.stream(), cluster);
  checked(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace grpo::cuda
