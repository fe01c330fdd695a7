// Where a launch goes: the current stream of a device, found without linking libtorch_cuda or libcuda.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>

namespace rf {

// torch's C shim for the current stream, in the process that has libtorch_cuda loaded. A missing symbol
// throws: it must never mean the default stream, which a CUDA graph does not capture.
inline void* current_stream(int32_t device_index) {
  using GetStream = int32_t (*)(int32_t, void**);
  static GetStream get = [] {
    void* symbol = dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    if (symbol == nullptr) {
      // torch may have been opened RTLD_LOCAL: ask its library by name, without loading anything.
      if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD))
        symbol = dlsym(library, "aoti_torch_get_current_cuda_stream");
    }
    return reinterpret_cast<GetStream>(symbol);
  }();
  if (get == nullptr)
    throw std::runtime_error(
        "rf_kernels: this torch has no aoti_torch_get_current_cuda_stream (a CPU-only build?); refusing to "
        "launch on the default stream");
  void* stream = nullptr;
  if (get(device_index, &stream) != 0)
    throw std::runtime_error("rf_kernels: torch could not name the current CUDA stream");
  return stream;
}

}  // namespace rf
