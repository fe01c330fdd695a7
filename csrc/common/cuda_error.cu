// What only the CUDA runtime can say: the text of an error code, and whether the runtime runs here at all.
// The one file outside the ops that needs it.
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <string>

namespace rf {

const char* cuda_error_text(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

const char* cuda_problem() {
  static const std::string problem = [] {
    int devices = 0, driver = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error == cudaSuccess) return std::string();
    cudaDriverGetVersion(&driver);
    cudaGetLastError();  // leaves no error behind for the caller's next check
    const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
    const std::string has = driver == 0 ? "no driver" : "a driver of CUDA " + version(driver);
    return "the CUDA runtime of this build (" + version(CUDART_VERSION) +
           ") does not run here: " + cudaGetErrorString(error) + "; found " + has +
           " (install a newer driver, or build with an nvcc of the driver's major version)";
  }();
  return problem.empty() ? nullptr : problem.c_str();
}

namespace {
__global__ void probe_kernel() {}
}  // namespace

int cuda_capability_major(int32_t device_index) {
  int major = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_index) == cudaSuccess)
    return major;
  cudaGetLastError();
  return 0;
}

bool cuda_has_code(int32_t device_index) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // 0: not asked yet
  const bool kept = device_index >= 0 && device_index < kDevices;
  if (kept && known[device_index] != 0) return known[device_index] == 1;
  int before = 0;
  cudaFuncAttributes attributes;
  bool found = true;  // of an error of another kind the launch itself speaks
  if (cudaGetDevice(&before) == cudaSuccess && cudaSetDevice(device_index) == cudaSuccess) {
    const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
    found = error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction;
    cudaSetDevice(before);
  }
  cudaGetLastError();
  if (kept) known[device_index] = found ? 1 : 2;
  return found;
}

}  // namespace rf
