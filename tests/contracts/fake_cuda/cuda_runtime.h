// As much of the CUDA runtime as csrc/common/cuda_call.h calls, for a test without a GPU: a call fails when
// it is told to, and leaves its error behind until somebody asks for it, as the real one does.
#pragma once

#include <atomic>
#include <cstddef>
#include <map>
#include <mutex>
#include <string>
#include <utility>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace fake {
inline thread_local int device = 0;
inline thread_local cudaError_t last = cudaSuccess;
inline std::string failing;  // the name of the call that fails
inline std::mutex mutex;
inline std::map<std::pair<int, const void*>, std::pair<int, int>> limits;  // of a kernel: times set, bytes
inline std::atomic<int> launches = 0;
inline std::atomic<int> arguments = 0;  // sum over all launches

inline cudaError_t call(const char* name) {
  if (failing == name) last = cudaErrorInvalidValue;
  return failing == name ? cudaErrorInvalidValue : cudaSuccess;
}
}  // namespace fake

inline cudaError_t cudaGetLastError() {
  return std::exchange(fake::last, cudaSuccess);
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = fake::device;
  return fake::call("cudaGetDevice");
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = 200000 + 1000 * device;
  return fake::call("cudaDeviceGetAttribute");
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->sharedSizeBytes = 500;
  return fake::call("cudaFuncGetAttributes");
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  const std::lock_guard<std::mutex> lock(fake::mutex);
  auto& [times, limit] = fake::limits[{fake::device, kernel}];
  ++times;
  limit = bytes;
  return fake::call("cudaFuncSetAttribute");
}
inline cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void** arguments, size_t, cudaStream_t) {
  fake::arguments += *static_cast<int*>(arguments[0]) + *static_cast<char*>(arguments[1]);
  ++fake::launches;
  return fake::call("cudaLaunchKernel");
}
