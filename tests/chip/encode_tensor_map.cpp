// csrc/arch/tensor_map.h with a driver that refuses: prints "runtime driver call" of each encoding. Host
// code, no GPU.
#include <cstdio>

#include "csrc/arch/tensor_map.h"

namespace {
bool has_driver = false;
CUresult refuse(...) {
  return CUDA_ERROR_INVALID_VALUE;
}
}  // namespace

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** symbol, unsigned,
                                                        unsigned long long,
                                                        cudaDriverEntryPointQueryResult* found) {
  *symbol = reinterpret_cast<void*>(&refuse);
  *found = cudaDriverEntryPointSuccess;
  return has_driver ? cudaSuccess : cudaErrorInsufficientDriver;
}

int main() {
  for (bool driver : {false, true, true}) {
    has_driver = driver;
    CUtensorMap map;
    const rf::arch::Encoded done =
        rf::arch::encode_tensor_map(&map, {nullptr, 1, 64, 1, 64, 4096, 64, 64, 64, false});
    std::printf("%d %d %s\n", done.runtime, done.driver, done.call);
  }
}
