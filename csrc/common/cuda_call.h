// Calls of the CUDA runtime in launchers (.cu files alone): each failure is named, and none outlives its
// call.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <type_traits>

#include "csrc/common/cuda_status.h"

namespace rf {

// The runtime also keeps a failure as its "last error". Left there, the next good launch, ours or torch's,
// would report it as its own.
inline CudaStatus cuda_status(cudaError_t error, const char* call) {
  if (error != cudaSuccess) cudaGetLastError();
  return {static_cast<int>(error), error == cudaSuccess ? "" : call, 0};
}

// RF_CUDA_TRY(cudaGetDevice, &index): returns from a function of CudaStatus where the call fails.
#define RF_CUDA_TRY(call, ...)                                                       \
  do {                                                                               \
    const ::rf::CudaStatus rf_status_ = ::rf::cuda_status(call(__VA_ARGS__), #call); \
    if (!rf_status_.ok()) return rf_status_;                                         \
  } while (0)

// A launch that returns its own error: reading the last error instead would also find what another library
// has left there. `name`: of the kernel, a literal.
template <typename... Params>
CudaStatus launch_kernel(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
                         size_t shared_bytes, void* stream, std::type_identity_t<Params>... args) {
  void* pointers[] = {&args...};
  return cuda_status(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers,
                                      shared_bytes, static_cast<cudaStream_t>(stream)),
                     name);
}

// The dynamic shared memory that a block of kKernel may have on the current device, in `bytes`. Beyond 48 KiB
// a kernel must opt in: to the device's maximum, once for each device and instantiation. A limit set per call
// could be lowered by another thread between this thread's call and its launch.
template <auto kKernel>
CudaStatus opt_in_shared_memory(int& bytes) {
  static std::mutex mutex;
  static std::map<int, int> granted;
  int device = 0, most = 0;
  RF_CUDA_TRY(cudaGetDevice, &device);
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = granted.find(device); found != granted.end()) {
    bytes = found->second;
    return {};
  }
  cudaFuncAttributes attributes{};
  RF_CUDA_TRY(cudaDeviceGetAttribute, &most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  RF_CUDA_TRY(cudaFuncGetAttributes, &attributes, reinterpret_cast<const void*>(kKernel));
  most -= static_cast<int>(attributes.sharedSizeBytes);
  RF_CUDA_TRY(cudaFuncSetAttribute, reinterpret_cast<const void*>(kKernel),
              cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  bytes = granted[device] = most;
  return {};
}

}  // namespace rf
